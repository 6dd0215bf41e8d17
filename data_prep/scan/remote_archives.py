"""Archives on an object store: the work of `data_prep.scan.archives` on a directory, by requests.

Packed files are read in place, zip and tar files by ranges. Here only names that end in .zip, .tar
or .gz are looked into, since a look into every file would cost a request each.
"""

import concurrent.futures
import dataclasses
import errno
import functools
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from data_prep.system import stores
from data_prep.system.errors import InputError

# bytes of a request for a header; nearly all headers of CT slices are shorter
HEADER_BLOCK = 64 << 10
_REQUESTS_AT_A_TIME = 16
_ZIP_BLOCK = 1 << 20  # bytes; mostly a whole member of a zip file


@dataclasses.dataclass(frozen=True)
class RemoteArchive:
    """A folder of a store. It can stand for the `Path` of a local archive everywhere, also in
    worker processes."""

    url: str  # without a slash at its end
    # see `reading_ahead`
    starts: "_Ahead | None" = dataclasses.field(default=None, compare=False, repr=False)
    contents: "_Ahead | None" = dataclasses.field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.url

    def is_dir(self) -> bool:
        """Whether the folder exists and can be reached."""
        try:
            self.check()
        except InputError:
            return False
        return True

    def is_file(self) -> bool:
        return False  # `check` refuses a file

    def check(self, flag: str = "") -> None:
        """Checks that the URL is a folder that can be reached.

        Raises:
            InputError: it is not; the message begins with `flag`.
        """
        store, path = stores.open_store(self.url)
        named = f"{flag}={self.url}" if flag else self.url
        try:
            kind = store.info(path)["type"]
        except Exception as error:  # each store raises its own kinds
            raise InputError(f"{named}: {stores.explain(self.url, error)}") from None
        if kind != "directory":
            raise InputError(f"{named}: is a file; give the folder of the scans")


class _Ahead:
    """Requests files before they are needed: sixteen requests take a store as long as one."""

    def __init__(self, request: Callable[[str], bytes], paths: Iterable[str]):
        self._request, self._following = request, iter(dict.fromkeys(paths))
        self._requested: dict[str, concurrent.futures.Future] = {}

    def take(self, path: str) -> bytes | None:
        """The content of a path; None if it was not requested, or was taken before.

        Raises:
            StoreReadError: the request failed.
        """
        future = self._requested.pop(path, None)
        while (
            len(self._requested) < _REQUESTS_AT_A_TIME
            and (following := next(self._following, None)) is not None
        ):
            task = _threads().submit(self._request, following)
            if following == path and future is None:
                future = task
            else:
                self._requested[following] = task
        return None if future is None else future.result()


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(_REQUESTS_AT_A_TIME)


def reading_ahead(
    archive: RemoteArchive, sizes: Mapping[str, int], *, starts: bool
) -> RemoteArchive:
    """The archive from which one thread reads files in the order of `sizes`: their first blocks
    with `starts`, else whole files."""
    if not starts:
        return dataclasses.replace(
            archive, contents=_Ahead(functools.partial(read_file, archive), sizes)
        )

    def read_start(path: str) -> bytes:
        with open_file(archive, path, sizes[path]) as file:
            return file.read(HEADER_BLOCK)

    return dataclasses.replace(archive, starts=_Ahead(read_start, sizes))


def archive_directory(text: str | os.PathLike) -> Path | RemoteArchive:
    """The directory of an archive that a flag names: a URL of a store, or a local path."""
    if stores.is_url(text):
        return RemoteArchive(stores.without_slash(os.fspath(text)))
    return stores.local_path(text)


def walk(archive: RemoteArchive, folder: str = "") -> Iterator[tuple[str, int, str]]:
    """(path, size, fault) of every file below a folder, in the order of a local copy's list.

    Paths are relative to the archive. `fault` is the reason why a file cannot be read, or "".
    Objects that stand for empty folders are skipped, and so are names with an empty part (`a//b`),
    which a folder cannot hold.

    Raises:
        StoreReadError: a folder cannot be listed.
    """
    store, root = stores.open_store(archive.url)
    whole = f"{root}/{folder}" if folder else root
    try:
        listed = store.ls(whole, detail=True)
    except Exception as error:
        raise stores.read_error(error) from error
    entries = []
    for entry in listed:
        name = entry["name"].rstrip("/")
        if name != whole.rstrip("/"):
            entries.append((name.rsplit("/", 1)[-1], entry["type"], entry.get("size")))
    for name, kind, size in sorted(entries, key=lambda entry: entry[:2]):
        path = f"{folder}/{name}" if folder else name
        if kind == "directory":
            yield from walk(archive, path)
        elif kind != "file" or size is None:
            yield path, 0, "not a regular file"
        else:
            yield path, size, ""


def open_file(
    archive: RemoteArchive, path: str, size: int | None = None, block: int = HEADER_BLOCK
) -> BinaryIO:
    """A file that is read by requests for `block` bytes or more.

    Args:
        archive: with the files that were requested before.
        path: of the file, relative to the archive.
        size: of the file, in bytes; None asks the store.
        block: bytes of the smallest request.

    Raises:
        StoreReadError: here and from any read, if the store fails.
    """
    store, root = stores.open_store(archive.url)
    whole = f"{root}/{path}"
    if size is None:
        try:
            size = store.info(whole)["size"]
        except Exception as error:
            raise stores.read_error(error) from error
    start = archive.starts.take(path) if archive.starts else None
    return io.BufferedReader(_StoreFile(store, whole, size, start or b""), block)


def open_zip_file(archive: RemoteArchive, path: str, size: int | None = None) -> BinaryIO:
    """`open_file` with requests that fit the members of a zip file."""
    return open_file(archive, path, size, _ZIP_BLOCK)


def read_file(archive: RemoteArchive, path: str) -> bytes:
    """The whole content of a file, by one request. Raises StoreReadError."""
    if archive.contents and (content := archive.contents.take(path)) is not None:
        return content
    store, root = stores.open_store(archive.url)
    try:
        return store.cat_file(f"{root}/{path}")
    except Exception as error:
        raise stores.read_error(error) from error


@functools.lru_cache(maxsize=8)
def local_copy(archive: RemoteArchive, name: str) -> Path:
    """A file of the archive's own folder, copied into a private temporary directory that is removed
    when this process ends.

    Raises:
        StoreReadError: its errno is ENOENT if the file does not exist.
    """
    content = read_file(archive, name)
    path = Path(_temporary_directory().name) / name
    path.write_bytes(content)
    return path


@functools.cache
def _temporary_directory() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="ctssl_jax_")


class _StoreFile(io.RawIOBase):
    """A seekable object of a store. `start` was read before; each read of the rest is one
    request."""

    def __init__(self, store, path: str, size: int, start: bytes = b""):
        super().__init__()
        self._store, self._size, self._start, self._at = store, size, start, 0
        self.name = path  # pydicom asks for the name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + (0, self._at, self._size)[whence]
        if at < 0:
            # zipfile counts on this error of files
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._at = at
        return at

    def readinto(self, buffer: memoryview) -> int:
        content = self._read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        return self._read(self._size) + self._read(self._size)  # `start`, and the rest

    def _read(self, number: int) -> bytes:
        end = min(self._at + number, self._size)
        if end <= self._at:
            return b""
        if self._at < len(self._start):
            content = self._start[self._at : end]
            self._at += len(content)
            return content
        try:
            content = self._store.cat_file(self.name, start=self._at, end=end)
            if len(content) != end - self._at:
                raise EOFError
        except Exception as error:
            raise stores.read_error(error) from error
        self._at = end
        return content
