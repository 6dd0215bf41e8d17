"""Decoders of compressed frames, on imagecodecs (BSD).

A frame says by its first bytes how it is coded: JPEG, JPEG-LS, JPEG 2000, else run lengths. The
decoders stop at the end marker, so bytes behind it count nothing. A frame without one, as some
encoders leave it, is read if its data are whole.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Callable
from typing import NamedTuple

import imagecodecs
import numpy as np
from pydicom.uid import UID

COMPRESSED_SYNTAXES = {
    UID("1.2.840.10008.1.2.4.50"): "JPEG baseline, 8 bits",
    UID("1.2.840.10008.1.2.4.51"): "JPEG extended, 12 bits",
    UID("1.2.840.10008.1.2.4.53"): "JPEG spectral selection (retired)",
    UID("1.2.840.10008.1.2.4.55"): "JPEG full progression (retired)",
    UID("1.2.840.10008.1.2.4.57"): "JPEG lossless",
    UID("1.2.840.10008.1.2.4.70"): "JPEG lossless, first-order prediction",
    UID("1.2.840.10008.1.2.4.80"): "JPEG-LS lossless",
    UID("1.2.840.10008.1.2.4.81"): "JPEG-LS near-lossless",
    UID("1.2.840.10008.1.2.4.90"): "JPEG 2000 lossless",
    UID("1.2.840.10008.1.2.4.91"): "JPEG 2000",
    UID("1.2.840.10008.1.2.4.201"): "high-throughput JPEG 2000 lossless",
    UID("1.2.840.10008.1.2.4.202"): "high-throughput JPEG 2000, RPCL lossless",
    UID("1.2.840.10008.1.2.4.203"): "high-throughput JPEG 2000",
    UID("1.2.840.10008.1.2.5"): "run lengths",
}
_END = b"\xff\xd9"  # the last marker in JPEG, JPEG-LS and JPEG 2000
# In the data of a scan FF is followed by a stuffed byte or bit, a restart marker or another FF.
_MARKER_IN_SCAN = re.compile(rb"\xff+([\x80-\xcf\xd8-\xfe])")
# No packet has them; lower ones begin a tile part, a packet, or its data.
_MARKER_IN_PACKETS = re.compile(rb"\xff[\x94-\xff]")
_START_OF_PACKETS = b"\xff\x93"
STARTS = _START_OF_JPEG, _START_OF_JPEG_2000 = b"\xff\xd8\xff", b"\xff\x4f\xff\x51"
_START_OF_SCAN, _END_OF_IMAGE, _JPEG_LS_FRAME = 0xDA, 0xD9, 0xF7
# What the JPEG decoder takes for more data: if the pixels do not depend on it, none is missing.
_CONTINUATIONS = (b"", b"\x55" * 64, b"\xaa" * 64)


class Decoded(NamedTuple):
    """A decoded frame: `values` [rows, columns], and the bits that its coding gives a value."""

    values: np.ndarray
    precision: int


def decode(frame: bytes, rows: int, columns: int, bytes_a_value: int) -> Decoded:
    """One frame of grey values; `bytes_a_value`, from Bits Allocated, counts for run lengths only.

    Raises:
        ValueError: the frame ends early, or has another matrix than Rows x Columns, or several
          channels.
        RuntimeError: imagecodecs cannot decode it.
    """
    if frame.startswith(_START_OF_JPEG):
        decoded = _decode_jpeg(frame, rows, columns)
    elif (start := frame.find(_START_OF_JPEG_2000, 0, 4096)) >= 0:  # a box may lie before
        decoded = _decode_jpeg_2000(frame[start:] if start else frame, rows, columns)
    else:
        decoded = Decoded(_decode_rle(frame, rows, columns, bytes_a_value), 8 * bytes_a_value)
    if decoded.values.shape != (rows, columns):
        raise ValueError(f"the frame is {decoded.values.shape}, the header says {(rows, columns)}")
    return decoded


# ---- JPEG, JPEG-LS -------------------------------------------------------------------------------


def _decode_jpeg(frame: bytes, rows: int, columns: int) -> Decoded:
    start_of_frame, precision, matrix, scan = _jpeg_header(frame)
    # Decoders allocate the matrix of the frame, so a damaged one could fill the memory.
    if matrix != (rows, columns):
        raise ValueError(f"the frame is {matrix}, the header says {(rows, columns)}")
    read = (
        imagecodecs.jpegls_decode if start_of_frame == _JPEG_LS_FRAME else imagecodecs.jpeg8_decode
    )
    ends = frame.endswith(_END) or frame.rstrip(b"\0").endswith(_END) or _jpeg_ends(frame, scan)
    return Decoded(read(frame) if ends else _whole(frame, read), precision)


def _jpeg_header(frame: bytes) -> tuple[int, int, tuple[int, int], int]:
    """The start-of-frame marker (SOF0 .. SOF15, SOF55), the precision in bits, the matrix, and
    where the first scan begins.

    Raises:
        ValueError: the segments are damaged, or have none of them.
    """
    at, found = 2, None
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == _JPEG_LS_FRAME or (
            0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)
        ):
            found = (marker, frame[at + 4], struct.unpack_from(">HH", frame, at + 5))
        if marker == _START_OF_SCAN and found:
            return *found, at
        at += 2 + struct.unpack_from(">H", frame, at + 2)[0]
    raise ValueError("the frame does not name its matrix")


def _jpeg_ends(frame: bytes, at: int) -> bool:
    """Whether the scans of a frame, from the first one at `at` on, are followed by the end
    marker."""
    while at + 4 <= len(frame):
        at += 2 + struct.unpack_from(">H", frame, at + 2)[0]  # behind the header of the segment
        marker = _MARKER_IN_SCAN.search(frame, at)
        if marker is None:
            return False
        if marker[1][0] == _END_OF_IMAGE:
            return True
        at = marker.end() - 2
    return False


def _whole(frame: bytes, read: Callable[[bytes], np.ndarray]) -> np.ndarray:
    """The pixels of a frame without end marker, which a zero may pad to an even length.

    Its data are whole if the pixels do not depend on what would follow, and if the last byte is
    needed: else it could stand where lost data were.

    Raises:
        ValueError: data are missing.
    """
    for data in (frame, frame[:-1]) if frame.endswith(b"\0") else (frame,):
        shorter = data[: -2 if data.endswith(b"\xff\0") else -1]  # a stuffed zero goes with its FF
        pixels = _pixels_of_whole(data, read)
        if pixels is not None and _pixels_of_whole(shorter, read) is None:
            return pixels
    # Here the JPEG decoder would fill in pixels, and the JPEG-LS decoder may take minutes.
    raise ValueError("the frame ends early")


def _pixels_of_whole(data: bytes, read: Callable[[bytes], np.ndarray]) -> np.ndarray | None:
    # The other decoders find out by themselves that data are missing.
    continuations = _CONTINUATIONS if read is imagecodecs.jpeg8_decode else (b"",)
    try:
        pixels, *others = (read(data + more + _END) for more in continuations)
    except RuntimeError:
        return None
    return pixels if all(np.array_equal(pixels, other) for other in others) else None


# ---- JPEG 2000 -----------------------------------------------------------------------------------


def _decode_jpeg_2000(frame: bytes, rows: int, columns: int) -> Decoded:
    if len(frame) < 43:
        raise ValueError("the frame ends within its header")
    right, bottom, left, top = struct.unpack_from(">4I", frame, 8)
    if (bottom - top, right - left) != (rows, columns):
        raise ValueError("the frame does not name the matrix of the header")
    precision = (frame[42] & 0x7F) + 1
    read = imagecodecs.jpeg2k_decode
    if frame.endswith(_END) or frame.rstrip(b"\0").endswith(_END):
        return Decoded(read(frame), precision)
    end = _end_of_tiles(frame)
    return Decoded(_whole(frame, read) if end is None else read(frame[:end] + _END), precision)


def _end_of_tiles(frame: bytes) -> int | None:
    """Where the data of a code stream end, by the lengths of its tile parts. None: the last part
    names no length, and no end marker follows.

    Raises:
        ValueError: a tile part is cut off or missing.
    """
    right, bottom, *_, width, height, tile_left, tile_top = struct.unpack_from(">8I", frame, 8)
    tiles = -(-(right - tile_left) // max(1, width)) * -(-(bottom - tile_top) // max(1, height))
    at, seen, length = frame.find(b"\xff\x90\0\x0a"), set(), 0
    while at >= 0 and frame[at : at + 2] == b"\xff\x90" and at + 12 <= len(frame):
        tile, length, part, parts = struct.unpack_from(">HIBB", frame, at + 4)
        if not parts or part + 1 == parts:
            seen.add(tile)
        if length == 0:  # up to the end marker: no packet holds its two bytes
            end = frame.find(_END, frame.find(_START_OF_PACKETS, at))
            if end >= 0:
                return end
            at = len(frame)
            break
        at += length
    if not 0 < at <= len(frame) or len(seen) < tiles:
        raise ValueError("the frame ends early")
    if frame[at : at + 2] == _END:
        return at
    # Other bytes may stand where data were lost.
    packets = frame.find(_START_OF_PACKETS)
    if len(frame) > at + 1 or _MARKER_IN_PACKETS.search(frame, packets, at):
        raise ValueError("bytes that are no data stand in the frame, and no end marker")
    return at if length else None


# ---- run lengths ---------------------------------------------------------------------------------


def _decode_rle(frame: bytes, rows: int, columns: int, bytes_a_value: int) -> np.ndarray:
    sample = np.dtype(f"<u{bytes_a_value}")
    size = rows * columns
    offsets = _segments(frame, bytes_a_value)
    try:
        values = np.frombuffer(imagecodecs.dicomrle_decode(frame, sample), sample)
    except RuntimeError:  # also where bytes stand behind a segment
        cut = [_run_lengths(frame[a:b], size) for a, b in itertools.pairwise(offsets)]
        starts = itertools.accumulate((len(part) for part in cut[:-1]), initial=64)
        header = struct.pack("<16I", len(cut), *starts, *[0] * (15 - len(cut)))
        values = imagecodecs.dicomrle_decode(header + b"".join(cut), sample)
        values = np.frombuffer(values, sample)
    if values.size < size:
        raise ValueError("too few run-length coded values")
    return values[:size].reshape(rows, columns)


def _segments(frame: bytes, number: int) -> list[int]:
    """Where the segments of a run-length coded frame begin, and the end of the last one.

    Raises:
        ValueError: the header is damaged. The decoder would read wherever it points to.
    """
    if len(frame) < 64:
        raise ValueError("the frame ends within its header")
    segments, *offsets = struct.unpack_from("<16I", frame)
    offsets = [*offsets[:number], len(frame)]
    if segments != number or offsets[0] < 64 or any(a >= b for a, b in itertools.pairwise(offsets)):
        raise ValueError("the segments of the frame are not where its header says")
    return offsets


def _run_lengths(segment: bytes, size: int) -> bytes:
    """The start of a segment that gives `size` bytes; all of it if it gives fewer."""
    at = given = 0
    while given < size and at < len(segment):
        code = segment[at]
        if code == 128:  # no operation
            at += 1
            continue
        given += code + 1 if code < 128 else 257 - code
        at += code + 2 if code < 128 else 2
    return segment[:at]
