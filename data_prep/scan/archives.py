"""The files of an archive: any directory tree or folder of an object store, with zip files read in
place.

Names and extensions are not trusted. Every file is yielded exactly once, in an order that depends
on the names alone: as a `Source` that `read_bytes` can read, or as an `Unreadable` entry with the
reason.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO, NamedTuple

from data_prep.scan import remote_archives
from data_prep.scan.remote_archives import RemoteArchive
from data_prep.system.errors import InputError
from data_prep.system.stores import StoreReadError, store_failure

MAX_FILE_BYTES = 4 << 30  # the largest DICOM file taken: an enhanced multi-frame CT of 8,000 slices
# Deflate cannot pass 1032. CT slices stay below 10, blank slices below 100.
MAX_COMPRESSION_RATIO = 200
RATIO_FREE_BYTES = 16 << 20  # members up to this size are harmless at any ratio
_TOTAL_FREE_BYTES = 256 << 20  # so are zip files whose members add up to this size
_LOCAL_HEADER_BYTES = 30  # of a zip member, at least
ZIP_SIGNATURES = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")


ArchiveDirectory = Path | RemoteArchive


class Source(NamedTuple):
    """One file of the archive."""

    path: str  # relative to the input directory, with forward slashes
    member: str  # "" for a plain file, or the name inside the zip file at `path`
    size: int  # bytes, uncompressed


class Unreadable(NamedTuple):
    """A file that is not read, with the reason (a name of `data_prep.scan.reasons.REASONS`)."""

    source: Source
    reason: str
    detail: str


def list_sources(input_dir: ArchiveDirectory) -> Iterator[Source | Unreadable]:
    """Every file below `input_dir`, sorted by path, zip files expanded in place.

    Directory links are not followed: a loop cannot arise, and their target is listed where it lies,
    or is outside the archive. File links are followed only to files inside `input_dir`. An archive
    on a store gives the same list as its local copy, except for zip files whose names do not end in
    .zip (see `data_prep.scan.remote_archives`).

    Raises:
        InputError: `input_dir` is missing, not a directory, or a URL that cannot be used.
        OSError: a store cannot be listed to the end.
    """
    if isinstance(input_dir, RemoteArchive):
        input_dir.check()
        try:
            yield from _list_remote(input_dir)
        except StoreReadError as error:  # a partial list would describe another archive
            raise OSError(
                f"{input_dir}: cannot be listed ({error.strerror}); run again to continue"
            ) from None
        return
    input_dir = Path(input_dir)
    if not input_dir.exists():
        raise InputError(f"{input_dir}: no such directory; give the folder that holds the scans")
    if not input_dir.is_dir():
        raise InputError(
            f"{input_dir}: is a file, not a directory; give the folder that holds the scans"
        )
    yield from _walk(input_dir, "", input_dir.resolve())


def _walk(input_dir: Path, folder: str, root: Path) -> Iterator[Source | Unreadable]:
    try:
        entries = sorted(os.scandir(input_dir / folder), key=lambda entry: entry.name, reverse=True)
    except OSError as error:
        yield Unreadable(
            Source(folder, "", 0), "unreadable", error.strerror or "cannot list the directory"
        )
        return
    while entries:
        # Freed with its cached file status: a folder may hold a million files.
        entry = entries.pop()
        path = f"{folder}/{entry.name}" if folder else entry.name
        try:
            path.encode("utf-8")
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(input_dir, path, root)
                continue
            if entry.is_symlink():
                target = Path(entry.path).resolve()
                if target.is_dir() or not target.is_relative_to(root):
                    yield Unreadable(
                        Source(path, "", 0), "outside_archive", "link to a folder or out of it"
                    )
                    continue
            status = entry.stat()
            source = Source(path, "", status.st_size)
            if not stat.S_ISREG(status.st_mode):
                yield Unreadable(source, "unreadable", "not a regular file")
            elif source.size > MAX_FILE_BYTES and not is_zip(entry.path):
                yield Unreadable(source, "too_large", f"{source.size} bytes")
            elif is_zip(entry.path):
                yield from zip_members(entry.path, source)
            else:
                yield source
        except UnicodeEncodeError:
            yield Unreadable(
                Source(path.encode("utf-8", "replace").decode(), "", 0),
                "unreadable",
                "file name is not UTF-8",
            )
        # RuntimeError: a loop of links, before Python 3.13.
        except (OSError, RuntimeError) as error:
            yield Unreadable(
                Source(path, "", 0), "unreadable", getattr(error, "strerror", None) or str(error)
            )


def _list_remote(archive: RemoteArchive) -> Iterator[Source | Unreadable]:
    for path, size, fault in remote_archives.walk(archive):
        source = Source(path, "", size)
        if fault:
            yield Unreadable(source, "unreadable", fault)
        elif path.lower().endswith(".zip") and _is_remote_zip(archive, source):
            yield from zip_members(remote_archives.open_zip_file(archive, path, size), source)
        elif size > MAX_FILE_BYTES:
            yield Unreadable(source, "too_large", f"{size} bytes")
        else:
            yield source


def _is_remote_zip(archive: RemoteArchive, source: Source) -> bool:
    with remote_archives.open_file(archive, source.path, source.size, block=4) as file:
        return file.read(4) in ZIP_SIGNATURES


def is_zip(path: str) -> bool:
    """Whether a file begins as a zip file."""
    with open(path, "rb") as file:
        return file.read(4) in ZIP_SIGNATURES


def zip_members(file: str | BinaryIO, source: Source) -> Iterator[Source | Unreadable]:
    """The members of a zip file, sorted by name.

    A zip file that would expand beyond any scan is refused as a whole.
    """
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
        if not member.filename or any(
            unicodedata.category(letter) == "Cc" for letter in member.orig_filename
        ):
            # zipfile cuts names at NUL. A member without a name would mean the zip file itself.
            yield Unreadable(
                item._replace(member=f"member {number}"),
                "bad_zip",
                "control characters in its name",
            )
            continue
        if member.filename == previous:
            yield Unreadable(item, "bad_zip", "a second member of the same name")
        elif _points_outside(member.filename):
            yield Unreadable(
                item, "outside_archive", "the member's name points out of the zip file"
            )
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


def _points_outside(name: str) -> bool:
    """Whether a member's name leads out of the zip file on any system: `../x`, `/x`, `C:x`,
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


def reading_ahead(
    input_dir: ArchiveDirectory, sources: Iterable[Source], *, starts: bool = False
) -> ArchiveDirectory:
    """The directory from which one thread reads these sources in this order.

    A store is asked for several files at a time, with `starts` only for the start of each file. A
    local directory is returned unchanged (see `will_read`).
    """
    if not isinstance(input_dir, RemoteArchive):
        return input_dir
    plain = {source.path: source.size for source in sources if not source.member}
    return remote_archives.reading_ahead(input_dir, plain, starts=starts)


def open_source(input_dir: ArchiveDirectory, source: Source) -> BinaryIO:
    """An open source that is not a zip member, to read its start.

    Raises:
        OSError: here or from any read: the file is gone, has changed its size, or cannot be read.
    """
    if isinstance(input_dir, RemoteArchive):
        return remote_archives.open_file(input_dir, source.path, source.size)
    file = open(os.path.join(input_dir, source.path), "rb")
    check_size(source, os.fstat(file.fileno()).st_size)
    return file


def changed(source: Source, how: str) -> OSError:
    """The error for a file that is written or replaced while the archive is read; the next run
    retries it."""
    return OSError(errno.ESTALE, f"the file {how}", source.path)


def check_size(source: Source, size: int) -> None:
    """Raises OSError if a plain file has another size than when it was listed."""
    if size != source.size:
        raise changed(source, "changed since it was listed")


def read_bytes(input_dir: ArchiveDirectory, source: Source) -> bytes:
    """The whole content of one source.

    Raises:
        OSError: the file is gone, has changed its size, cannot be read, or is a damaged zip member,
          which the message names.
    """
    if isinstance(input_dir, RemoteArchive):
        if not source.member:
            content = remote_archives.read_file(input_dir, source.path)
            check_size(source, len(content))
            return content
        version = (input_dir, source.path)
    else:
        path = os.path.join(input_dir, source.path)
        if not source.member:
            with open(path, "rb", buffering=0) as file:
                content = file.read()
            check_size(source, len(content))
            return content
        status = os.stat(path)
        version = (path, status.st_mtime_ns, status.st_size)
    try:
        archive = _open_zip(version, os.getpid())
        with archive.open(source.member) as file:
            return file.read(source.size + 1)  # a member that lies about its size ends here
    except Exception as error:  # zipfile and the decompressors raise a dozen kinds on damaged bytes
        if isinstance(input_dir, RemoteArchive):
            _open_zip.cache_clear()  # the next try opens it again
            if failure := store_failure(error):
                raise failure from None
        # from the disk, not from a decompressor
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise OSError(f"{source.path}: {source.member}: damaged zip member: {error}") from error


def will_read(input_dir: ArchiveDirectory, sources: Iterable[Source], num_bytes: int = 0) -> None:
    """Asks the system to fetch plain files ahead of their use, since disks are faster with a queue.

    On systems and stores that cannot, nothing happens.

    Args:
        input_dir: the archive.
        sources: the files; zip members are skipped.
        num_bytes: number of first bytes; 0 fetches whole files.
    """
    if isinstance(input_dir, RemoteArchive) or not hasattr(os, "posix_fadvise"):
        return
    for source in sources:
        if source.member:
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(os.path.join(input_dir, source.path), os.O_RDONLY | os.O_NONBLOCK)
            try:
                os.posix_fadvise(descriptor, 0, num_bytes, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


@functools.lru_cache(maxsize=4)
def _open_zip(version: tuple, process: int) -> zipfile.ZipFile:
    """An open zip file; its directory is parsed once, and a forked process opens its own."""
    if isinstance(version[0], RemoteArchive):
        return zipfile.ZipFile(remote_archives.open_zip_file(*version))
    return zipfile.ZipFile(version[0])
