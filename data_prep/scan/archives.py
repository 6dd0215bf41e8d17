"""The files of an archive: any directory tree or folder of an object store, with zip, tar and gzip
files read in place (`data_prep.scan.packed_files`).

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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from data_prep.scan import remote_archives
from data_prep.scan.packed_files import (
    MAX_FILE_BYTES,
    PACKED_START,
    READ_COMPRESSED,
    PackedFile,
    Source,
    Unreadable,
    how_packed,
    packed_members,
)
from data_prep.scan.remote_archives import RemoteArchive
from data_prep.system.errors import InputError
from data_prep.system.stores import StoreReadError, store_failure

ArchiveDirectory = Path | RemoteArchive

_PACKED_ON_STORES = (".zip", ".tar", ".gz", ".tgz")


def list_sources(input_dir: ArchiveDirectory) -> Iterator[Source | Unreadable]:
    """Every file below `input_dir`, sorted by path, packed files expanded in place.

    Directory links are not followed: a loop cannot arise, and their target is listed where it lies,
    or is outside the archive. File links are followed only to files inside `input_dir`. An archive
    on a store gives the same list as its local copy, except for packed files whose names do not end
    in .zip, .tar or .gz (see `data_prep.scan.remote_archives`).

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
    for found in walk_files(input_dir):
        if isinstance(found, Unreadable):
            yield found
            continue
        source, _ = found
        try:
            yield from list_file(os.path.join(input_dir, source.path), source)
        except OSError as error:
            yield Unreadable(Source(source.path, "", 0), "unreadable", error.strerror or str(error))


def walk_files(input_dir: Path) -> Iterator[tuple[Source, os.stat_result] | Unreadable]:
    """Every file below a local folder with its status, sorted by path; none is opened.

    Links are followed as `list_sources` says.
    """
    return _walk(input_dir, "", input_dir.resolve())


def _walk(
    input_dir: Path, folder: str, root: Path
) -> Iterator[tuple[Source, os.stat_result] | Unreadable]:
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
            else:
                yield source, status
        # RuntimeError: a loop of links, before Python 3.13.
        except (OSError, RuntimeError) as error:
            yield Unreadable(
                Source(path, "", 0), "unreadable", getattr(error, "strerror", None) or str(error)
            )


def list_file(path: str, source: Source) -> Iterator[Source | Unreadable]:
    """A local file, or the files within it."""
    kind = ""
    if not source.path.lower().endswith(READ_COMPRESSED):
        with open(path, "rb", buffering=0) as file:
            kind = how_packed(file.read(PACKED_START))
    if kind:
        yield from packed_members(path, source, kind)
    elif source.size > MAX_FILE_BYTES:
        yield Unreadable(source, "too_large", f"{source.size} bytes")
    else:
        yield source


def _list_remote(archive: RemoteArchive) -> Iterator[Source | Unreadable]:
    for path, size, fault in remote_archives.walk(archive):
        source = Source(path, "", size)
        if fault:
            yield Unreadable(source, "unreadable", fault)
        elif kind := _remote_kind(archive, source):
            file = remote_archives.open_zip_file(archive, path, size)
            yield from packed_members(file, source, kind)
        elif size > MAX_FILE_BYTES:
            yield Unreadable(source, "too_large", f"{size} bytes")
        else:
            yield source


def _remote_kind(archive: RemoteArchive, source: Source) -> str:
    """The kind of a packed file whose name says that it is one."""
    name = source.path.lower()
    if not name.endswith(_PACKED_ON_STORES) or name.endswith(READ_COMPRESSED):
        return ""
    with remote_archives.open_file(archive, source.path, source.size, PACKED_START) as file:
        return how_packed(file.read(PACKED_START))


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
    """An open source that is no member, to read its start.

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
        OSError: the file is gone, has changed its size, cannot be read, or is a damaged member of a
          packed file, which the message names.
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
        return _open_packed(version, os.getpid()).read(source)
    except Exception as error:  # the decompressors raise a dozen kinds on damaged bytes
        if isinstance(input_dir, RemoteArchive):
            _open_packed.cache_clear()  # the next try opens it again
            if failure := store_failure(error):
                raise failure from None
        # from the disk, not from a decompressor
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise OSError(f"{source.path}: {source.member}: damaged member: {error}") from error


def will_read(input_dir: ArchiveDirectory, sources: Iterable[Source], num_bytes: int = 0) -> None:
    """Asks the system to fetch plain files ahead of their use, since disks are faster with a queue.

    On systems and stores that cannot, nothing happens.

    Args:
        input_dir: the archive.
        sources: the files; members of packed files are skipped.
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
def _open_packed(version: tuple, process: int) -> PackedFile:
    """An open packed file; a forked process opens its own."""
    if isinstance(version[0], RemoteArchive):
        return PackedFile(remote_archives.open_zip_file(*version))
    return PackedFile(version[0])
