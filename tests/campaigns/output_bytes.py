"""Every byte of a file, stored and unpacked: compressed parts and base64 are opened.

ArrayRecord files give their records, pixels apart from the rest, PNG files their chunks, zip, npz,
`.pt` and Parquet files their members and columns. In all other bytes, and in those, streams of
gzip, zlib and zstd (Orbax checkpoints) are looked for at every place, and base64.
"""

import base64
import binascii
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import imagecodecs
import pyarrow
import pyarrow.parquet

from data_prep.dataset.storage import decode_record, read_records

PIXELS = "pixels"
_DEPTH = 4  # a zlib stream in a PNG in base64 in a zip file
_MAGIC = re.compile(
    rb"(?P<gzip>\x1f\x8b\x08)|(?P<zlib>\x78[\x01\x5e\x9c\xda])|(?P<zstd>\x28\xb5\x2f\xfd)"
    rb"|(?P<base64>(?:[A-Za-z0-9+/]{4}){16,}[A-Za-z0-9+/]{0,4}={0,2})"
)
_SHORTEST_STREAM = 8  # bytes; what two chance bytes of a magic number open is shorter


def pieces(path: Path) -> Iterator[tuple[str, bytes]]:
    """(place, bytes) of a file: "bytes" as they are stored, and the unpacked parts."""
    data = path.read_bytes()
    yield "bytes", data
    if ".array_record-" in path.name:
        for number, record in enumerate(read_records(path)):
            pixels, rest = _features(record)
            yield f"record {number}", rest
            yield f"record {number}, {PIXELS}", pixels
    else:
        yield from unpacked(data)


def _features(record: bytes) -> tuple[bytes, bytes]:
    """The bytes of the images of a record, and all others, in which the images are one blank."""
    image = decode_record(record, (-1, 1, 1))["image"].tobytes()
    return image, record.replace(image, b" ")


def unpacked(data: bytes, place: str = "", depth: int = 0) -> Iterator[tuple[str, bytes]]:
    """(place, bytes) of all packed parts of some bytes, at any depth up to four."""
    if depth == _DEPTH:
        return
    for name, inner in _members(data) if data.startswith(tuple(_CONTAINERS)) else _streams(data):
        where = f"{place}{', ' * bool(place)}{name}"
        yield where, inner
        yield from unpacked(inner, where, depth + 1)


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    return next(read(data) for start, read in _CONTAINERS.items() if data.startswith(start))


def _zip_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for member in archive.infolist():
            yield f"member {member.filename}", archive.read(member)


def _columns(data: bytes) -> Iterator[tuple[str, bytes]]:
    plain = io.BytesIO()
    table = pyarrow.parquet.read_table(io.BytesIO(data))
    pyarrow.parquet.write_table(table, plain, compression="none", use_dictionary=False)
    yield "columns", plain.getvalue()


def _png_chunks(data: bytes) -> Iterator[tuple[str, bytes]]:
    pixels, at = b"", 8
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        if kind == b"IDAT":
            pixels += data[at + 8 : at + 8 + size]
        else:
            yield f"chunk {kind.decode('latin-1')}", data[at + 8 : at + 8 + size]
        at += 12 + size
    yield PIXELS, _inflated(memoryview(pixels), 15)[0]


_CONTAINERS = {b"PK\x03\x04": _zip_members, b"PAR1": _columns, b"\x89PNG\r\n\x1a\n": _png_chunks}


def _streams(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Compressed streams at every place. Bytes that only look like the beginning of a stream are
    left out."""
    at = 0
    while match := _MAGIC.search(data, at):
        kind, at = match.lastgroup, match.start() + 1
        if kind == "base64":
            at = match.end()
            found = _base64(match.group())
        elif kind == "zstd":
            end = zstd_frame_end(data, match.start())
            found = b"" if end is None else _zstd(data[match.start() : end])
        else:
            found, used = _inflated(memoryview(data)[match.start() :], 31 if kind == "gzip" else 15)
            at = max(at, match.start() + used)
        if len(found) >= _SHORTEST_STREAM:
            yield f"{kind} at {match.start()}", found


def _inflated(data: memoryview, window_bits: int) -> tuple[bytes, int]:
    """What a whole or cut stream holds, and how many bytes it took; nothing for what is none."""
    stream = zlib.decompressobj(window_bits)
    found = b""
    try:
        for start in range(0, len(data), 1 << 16):
            found += stream.decompress(data[start : start + (1 << 16)])
            if stream.eof:
                return found, start + len(data[start : start + (1 << 16)]) - len(stream.unused_data)
    except zlib.error:
        pass
    return found, 0


def _base64(text: bytes) -> bytes:
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        return b""


def _zstd(frame: bytes) -> bytes:
    try:
        return imagecodecs.zstd_decode(frame)
    # imagecodecs has an exception of its own for each codec: these bytes are no frame
    except Exception:
        return b""


def zstd_frame_end(data: bytes, start: int) -> int | None:
    """Where the zstd frame that begins at `start` ends (RFC 8878, 3.1.1); None if these bytes are
    no whole frame."""
    at = start + 5
    if at > len(data):
        return None
    descriptor = data[start + 4]
    single_segment, checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
    at += (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    at += (single_segment, 2, 4, 8)[descriptor >> 6]
    while at + 3 <= len(data):
        header = int.from_bytes(data[at : at + 3], "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        at += 3 + (1 if kind == 1 else size)  # a run of one byte is stored once
        if kind == 3 or at > len(data):
            return None
        if last:
            at += 4 * checksum
            return at if at <= len(data) else None
    return None
