"""Files that hold other files and are read in place: zip, tar, and a file compressed by gzip.

Other kinds (.tar.gz, .xz, .7z ...) are named with the remedy: a file within them cannot be read
without reading all before it. What would expand beyond any scan is refused before it is read.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import PurePosixPath, PureWindowsPath
from typing import BinaryIO, NamedTuple

from data_prep.scan.elements import MAX_COMPRESSION_RATIO, RATIO_FREE_BYTES
from data_prep.system.stores import store_failure

MAX_FILE_BYTES = 4 << 30  # the largest DICOM file taken: an enhanced multi-frame CT of 8,000 slices
PACKED_START = 264  # bytes that tell the kind of a file
READ_IN_PLACE = ZIP, GZIP, TAR = "a zip file", "a gzip file", "a tar file"
READ_COMPRESSED = ".nii.gz"  # names of files that are read as they are (`data_prep.scan.nifti`)

_OF_SYSTEM = (".DS_Store", "Thumbs.db", "desktop.ini")
_TOTAL_FREE_BYTES = 256 << 20  # zip files whose members add up to this size are harmless
_LOCAL_HEADER_BYTES = 30  # of a zip member, at least
_SIGNATURES = {
    **dict.fromkeys((b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08"), ZIP),
    b"\x1f\x8b\x08": GZIP,
    b"\xfd7zXZ\0": "an xz file",
    b"BZh": "a bzip2 file",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip file",
    b"Rar!\x1a\x07": "a RAR file",
    b"\x28\xb5\x2f\xfd": "a Zstandard file",
    b"\x04\x22\x4d\x18": "an LZ4 file",
    b"\x1f\x9d": "a file of compress (.Z)",
}


class Source(NamedTuple):
    """One file of an archive.

    A name that is no UTF-8 has surrogates in place of its bytes, as Python gives it.
    """

    path: str  # relative to the input directory, with forward slashes
    member: str  # "" for a plain file, or the name inside the packed file at `path`
    size: int  # bytes, uncompressed


class Unreadable(NamedTuple):
    """A file that is not read, with the reason (a name of `data_prep.scan.reasons.REASONS`)."""

    source: Source
    reason: str
    detail: str


def how_packed(start: bytes) -> str:
    """The kind of a packed file by its first `PACKED_START` bytes, in words; "" for other files."""
    is_dicom = start[128:132] == b"DICM"
    for signature, kind in _SIGNATURES.items():
        if start.startswith(signature) and (kind == ZIP or not is_dicom):
            return kind
    return TAR if start[257:262] == b"ustar" and not is_dicom else ""


def is_of_system(name: str, start: bytes) -> bool:
    """Whether a file is one that macOS (AppleDouble, Finder) or Windows puts into folders."""
    return start[:4] == b"\0\5\x16\7" or start[:8] == b"\0\0\0\1Bud1" or name in _OF_SYSTEM


# ---- members -------------------------------------------------------------------------------------


def packed_members(
    file: str | BinaryIO, source: Source, kind: str
) -> Iterator[Source | Unreadable]:
    """The files within a packed file, sorted by name.

    Args:
        file: path, or the open file at its start.
        source: the packed file.
        kind: by `how_packed`.

    Raises:
        StoreReadError: the store failed.
    """
    if kind == ZIP:
        yield from _zip_members(file, source)
    elif kind == TAR:
        yield from _tar_members(file, source)
    elif kind == GZIP:
        yield _gzip_member(file, source)
    else:  # who reads its start names it
        yield source


def _zip_members(file: str | BinaryIO, source: Source) -> Iterator[Source | Unreadable]:
    """A zip file that would expand beyond any scan is refused as a whole."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.filename)
            overlapping = _overlapping(members, archive.start_dir)
    except Exception as error:  # zipfile raises many kinds on damaged bytes
        if failure := store_failure(error):  # this says nothing about the file
            raise failure from None
        yield Unreadable(source, "bad_zip", str(error))
        return
    total = sum(member.file_size for member in members)
    if total > max(_TOTAL_FREE_BYTES, MAX_COMPRESSION_RATIO * source.size):
        yield Unreadable(
            source, "too_large", f"its {len(members)} members expand {source.size} to {total} bytes"
        )
        return
    previous = None
    for number, member in enumerate(members):
        if member.filename.endswith("/"):  # is_dir() fails on a member without a name
            continue
        item = Source(source.path, member.filename, member.file_size)
        # zipfile cuts names at NUL
        if fault := _fault_of_name(item, previous, number, "bad_zip", member.orig_filename):
            yield fault
        elif member.header_offset in overlapping:
            yield Unreadable(item, "bad_zip", "its bytes are those of another member, too")
        elif member.flag_bits & 0x1:
            yield Unreadable(item, "encrypted", "zip member protected by a password")
        elif member.file_size > MAX_FILE_BYTES:
            yield Unreadable(item, "too_large", f"{member.file_size} bytes")
        elif member.file_size > max(RATIO_FREE_BYTES, MAX_COMPRESSION_RATIO * member.compress_size):
            yield Unreadable(
                item, "too_large", f"expands {member.compress_size} to {member.file_size} bytes"
            )
        elif member.filename.lower().endswith(".zip"):
            yield Unreadable(item, "nested_zip", "zip file inside a zip file; unpack it first")
        else:
            yield item
        previous = member.filename


def _tar_members(file: str | BinaryIO, source: Source) -> Iterator[Source | Unreadable]:
    """A tar file that is damaged between its members is named beside them."""
    members, whole = [], False
    try:
        with _open_tar(file) as archive:
            try:
                members = archive.getmembers()
            except tarfile.TarError:
                members = archive.members  # those before the damage
            else:  # it also ends, without an error, where a header is damaged
                archive.fileobj.seek(archive.offset)
                whole = not archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0")
    except Exception as error:  # tarfile raises many kinds on damaged bytes
        if failure := store_failure(error):
            raise failure from None
    if not whole:
        yield Unreadable(source, "bad_packed", f"damaged behind its {len(members)} first members")
    previous = None
    for number, member in enumerate(sorted(members, key=lambda member: member.name)):
        if member.isdir():
            continue
        item = Source(source.path, member.name, member.size)
        if fault := _fault_of_name(item, previous, number, "bad_packed", member.name):
            yield fault
        elif not member.isfile() or member.issparse():
            yield Unreadable(item, "outside_archive", "a link or another thing that is no file")
        elif member.size > MAX_FILE_BYTES:
            yield Unreadable(item, "too_large", f"{member.size} bytes")
        else:
            yield item
        previous = member.name


def _gzip_member(file: str | BinaryIO, source: Source) -> Source | Unreadable:
    name = source.path.rsplit("/", 1)[-1]
    name = name[: -len(".gz")] if name.lower().endswith(".gz") else name
    try:
        with _binary(file) as content:
            content.seek(-4, io.SEEK_END)
            size = int.from_bytes(content.read(), "little")
            content.seek(0)
            unpacked = gzip.GzipFile(fileobj=content)
            kind = how_packed(unpacked.read(PACKED_START))
            if size > _allowed(source.size) and not kind:  # or the last bytes are no size
                size = _measured(unpacked, _allowed(source.size))
    except Exception as error:  # gzip raises many kinds on damaged bytes
        if failure := store_failure(error):
            raise failure from None
        return Unreadable(source, "bad_packed", f"damaged gzip file ({type(error).__name__})")
    if kind:
        return Unreadable(source, "packed", f"{kind} within a gzip file; unpack it first")
    if size > _allowed(source.size):
        return Unreadable(source, "too_large", f"expands {source.size} to {size} bytes or more")
    return Source(source.path, name or source.path, size)


def _measured(unpacked: gzip.GzipFile, enough: int) -> int:
    """The size of what is unpacked, up to a few bytes more than `enough`."""
    while unpacked.tell() <= enough and unpacked.read(1 << 20):
        pass
    return unpacked.tell()


def _fault_of_name(
    item: Source, previous: str | None, number: int, reason: str, original: str
) -> Unreadable | None:
    """The refusal of a member for its name. `original`: the name as it is stored."""
    if not item.member or any(unicodedata.category(letter) == "Cc" for letter in original):
        # A member without a name would mean the packed file itself.
        unnamed = item._replace(member=f"member {number}")
        return Unreadable(unnamed, reason, "control characters in its name")
    if item.member == previous:
        return Unreadable(item, reason, "a second member of the same name")
    if _points_outside(item.member):
        return Unreadable(
            item, "outside_archive", "the member's name points out of the packed file"
        )
    return None


def _points_outside(name: str) -> bool:
    """Whether a member's name leads out of the packed file on any system: `../x`, `/x`, `C:x`,
    `\\\\server\\share`."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return ".." in parts or bool(PureWindowsPath(name).anchor)


def _overlapping(members: list[zipfile.ZipInfo], end_of_members: int) -> set[int]:
    """Offsets of the members that share bytes with another member or with the directory.

    In this way a few bytes could expand many times.
    """
    overlapping, last, last_end = set(), 0, 0
    for member in sorted(members, key=lambda member: member.header_offset):
        start = member.header_offset
        end = start + _LOCAL_HEADER_BYTES + member.compress_size
        if start < last_end:
            overlapping |= {last, start}
        if end > end_of_members:
            overlapping.add(start)
        if end > last_end:
            last, last_end = start, end
    return overlapping


# ---- contents ------------------------------------------------------------------------------------


class PackedFile:
    """An open packed file; its directory is parsed once."""

    def __init__(self, file: str | BinaryIO):
        self._file = _binary(file)
        kind = how_packed(self._file.read(PACKED_START))
        self._file.seek(0)
        self._zip = zipfile.ZipFile(self._file) if kind not in (TAR, GZIP) else None
        self._tar = None
        if kind == TAR:
            with _open_tar(self._file) as archive:
                with contextlib.suppress(tarfile.TarError):
                    archive.getmembers()
                members = archive.members
            self._tar = {member.name: member.offset_data for member in reversed(members)}

    def read(self, source: Source) -> bytes:
        """The content of a member. Raises many kinds of errors on damaged bytes."""
        if self._zip is not None:
            with self._zip.open(source.member) as member:
                return member.read(source.size + 1)  # one that lies about its size ends here
        if self._tar is not None:
            self._file.seek(self._tar[source.member])
            content = self._file.read(source.size)
            if len(content) != source.size:
                raise EOFError("the tar file ends early")
            return content
        packed_size = self._file.seek(0, io.SEEK_END)
        self._file.seek(0)
        allowed = _allowed(packed_size)
        content = gzip.GzipFile(fileobj=self._file).read(allowed + 1)
        if len(content) > allowed:
            raise ValueError("expands beyond any scan")
        return content


def _allowed(packed_size: int) -> int:
    """Bytes that a gzip file may expand to."""
    return min(MAX_FILE_BYTES, max(RATIO_FREE_BYTES, MAX_COMPRESSION_RATIO * packed_size))


def _open_tar(file: str | BinaryIO) -> tarfile.TarFile:
    if isinstance(file, str):
        return tarfile.open(file, "r:")
    return tarfile.open(fileobj=file, mode="r:")


def _binary(file: str | BinaryIO) -> BinaryIO:
    return open(file, "rb") if isinstance(file, str) else file
