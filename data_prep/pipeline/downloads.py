"""The files of an entry of a manifest, brought to this machine and checked.

A remote entry is downloaded into a folder of its own: `FOLDER/KEY/files`, beside it the file
`complete`, written last. A killed download begins again. Local files are not copied: links lead to
them.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from data_prep.pipeline.manifest import Entry, Place
from data_prep.scan.archives import Source, Unreadable, list_file, list_sources
from data_prep.system import stores
from data_prep.system.errors import InputError
from data_prep.system.files import lock_directory, remove_tree
from data_prep.system.stores import Access

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_REQUESTS_AT_A_TIME = 8  # of a worker
_TRIES = 3
_SECONDS_BETWEEN_TRIES = 2.0
_COMPLETE = "complete"
_NOT_TRIED_AGAIN = (FileNotFoundError, PermissionError)
_CUT_OFF = ("ClientPayloadError", "IncompleteReadError", "ResponseStreamingError")
_OF_THIS_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class FetchFailed(Exception):
    """An entry cannot be had for now. The message names lines of the manifest and no file."""


@dataclasses.dataclass(frozen=True)
class Downloads:
    """Where files are downloaded to, and how."""

    folder: Path  # private: scans with all that their headers hold
    access: Access = dataclasses.field(default_factory=Access)
    remove: bool = False  # once they are converted


@contextlib.contextmanager
def fetched(entry: Entry, key: str, downloads: Downloads) -> Iterator[Path]:
    """A folder with the files of the entry, each at its path in the archive.

    Args:
        entry: of the manifest.
        key: a name for its folder.
        downloads: where to.

    Raises:
        FetchFailed: a file is missing, has another size or hash than the manifest says, or the
            store failed several times.
        OSError: the files cannot be written here.
    """
    own = downloads.folder / key
    own.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_directory(own))
        except InputError:
            raise FetchFailed(f"{entry.named}: another task is at work on it") from None
        files = own / "files"
        try:
            if not _is_complete(own):
                if files.is_symlink():  # to the local folder that is the whole archive
                    files.unlink()
                remove_tree(files)
                files.mkdir()
                num_bytes = _fetch(entry, files, downloads.access)
                (own / _COMPLETE).write_text(f"{num_bytes}\n")
            yield files
        finally:
            if downloads.remove or not any(place.is_remote for place in entry.places):
                remove_tree(own)


def discard(key: str, downloads: Downloads) -> None:
    """Removes what a killed task left of an entry, unless another task is at work on it."""
    own = downloads.folder / key
    with contextlib.suppress(InputError, FileNotFoundError), lock_directory(own):
        remove_tree(own)


def list_entry(entry: Entry, files: Path) -> Iterator[Source | Unreadable]:
    """Every file of a fetched entry, by its path in the archive; packed files are expanded."""
    for place in entry.places:
        if (path := files / place.path).is_dir():
            for found in list_sources(path):
                yield _below(place.path, found)
        else:
            yield from list_file(str(path), Source(place.path, "", path.stat().st_size))


def _below(folder: str, found: Source | Unreadable) -> Source | Unreadable:
    if isinstance(found, Unreadable):
        return found._replace(source=_below(folder, found.source))
    return found._replace(path=f"{folder}/{found.path}" if folder else found.path)


def _is_complete(own: Path) -> bool:
    """Whether an earlier task downloaded all files of an entry, and no power cut emptied them."""
    try:
        num_bytes = int((own / _COMPLETE).read_text())
    except (OSError, ValueError):
        return False
    paths = [path for path in (own / "files").rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in paths) == num_bytes


# ---- one entry -----------------------------------------------------------------------------------


class _Wanted(NamedTuple):
    """A file to download."""

    store: "AbstractFileSystem"
    name: str  # in the store
    path: Path  # here
    place: Place
    size: int | None


def _fetch(entry: Entry, files: Path, access: Access) -> int:
    """Puts the files of an entry into an empty folder; returns the bytes of those downloaded."""
    wanted: list[_Wanted] = []
    for place in entry.places:
        if place.is_remote:
            wanted += _listed(place, files / place.path, access)
        else:
            _link(place, files / place.path)
    for folder in {one.path.parent for one in wanted}:
        folder.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(_REQUESTS_AT_A_TIME) as threads:
        futures = [threads.submit(_download, one) for one in wanted]
        try:
            sizes = [future.result() for future in futures]
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    for place in entry.places:
        if place.is_remote and place.is_folder and place.size is not None:
            of_place = zip(wanted, sizes, strict=True)
            _check_size(place, sum(size for one, size in of_place if one.place == place))
    return sum(sizes)


def _link(place: Place, path: Path) -> None:
    """A link to a local file or folder."""
    target = Path(place.url)
    if not target.exists():
        raise FetchFailed(f"line {place.line}: no such file or folder")
    size = target.stat().st_size
    if place.is_folder:
        size = sum(one.stat().st_size for one in target.rglob("*") if one.is_file())
    if place.size is not None:
        _check_size(place, size)
    try:
        _check_hashes(place, target)
    except _Wrong as error:
        raise FetchFailed(f"line {place.line}: {error}") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    if not place.path:
        path.rmdir()
    path.symlink_to(target, target_is_directory=place.is_folder)


def _listed(place: Place, path: Path, access: Access) -> list[_Wanted]:
    """The files that a remote place names."""
    store, name = stores.open_store(place.url, access)
    if not place.is_folder:
        return [_Wanted(store, name, path, place, place.size)]
    found = _tried(place, lambda: store.find(f"{name}/", detail=True))
    wanted = []
    for entry in found.values():
        inside = entry["name"].removeprefix(name).lstrip("/")
        parts = PurePosixPath(inside).parts
        if entry["type"] == "file" and parts and not {"..", "."} & set(parts) and "?" not in inside:
            if not inside.endswith("/"):  # an object that stands for a folder
                wanted.append(_Wanted(store, entry["name"], path / inside, place, entry["size"]))
    if not wanted:
        raise FetchFailed(f"line {place.line}: no files there")
    return wanted


def _download(wanted: _Wanted) -> int:
    """Downloads a file and returns its size."""

    def download() -> int:
        wanted.store.get_file(wanted.name, str(wanted.path))
        size = wanted.path.stat().st_size
        if wanted.size is not None and size != wanted.size:
            raise _Wrong(f"has {size} bytes, {wanted.size} are listed")
        _check_hashes(wanted.place, wanted.path)
        return size

    return _tried(wanted.place, download)


class _Wrong(Exception):
    """A file that is not what the manifest or the store says."""


def _tried(place: Place, request: Callable[[], Any]) -> Any:
    """The result of a request, which is repeated if it fails."""
    for attempt in range(_TRIES):
        time.sleep(attempt * _SECONDS_BETWEEN_TRIES)
        try:
            return request()
        except Exception as error:  # each store raises its own kinds
            if isinstance(error, OSError) and error.errno in _OF_THIS_MACHINE:
                raise
            failure = error
            if isinstance(error, _NOT_TRIED_AGAIN) or _is_forbidden(error):
                break
    raise FetchFailed(f"line {place.line}: {_reason(failure)}") from None


def _is_forbidden(error: Exception) -> bool:
    """Whether a web server refused."""
    return getattr(error, "status", None) in (401, 403)


def _reason(error: Exception) -> str:
    """The failure of a request, without names of files."""
    if isinstance(error, FileNotFoundError):
        return "not found"
    if isinstance(error, PermissionError) or _is_forbidden(error):
        return "no permission to read it; --noanonymous reads it with your credentials"
    if isinstance(error, _Wrong | FetchFailed):
        return str(error)
    if isinstance(error, TimeoutError) or "timeout" in type(error).__name__.lower():
        return f"no answer in time, {_TRIES} times"
    if type(error).__name__ in _CUT_OFF:
        return f"was cut off, {_TRIES} times"
    return f"the store failed {_TRIES} times ({type(error).__name__})"


def _check_size(place: Place, size: int) -> None:
    if size != place.size:
        raise FetchFailed(f"line {place.line}: has {size} bytes, the manifest says {place.size}")


def _check_hashes(place: Place, path: Path) -> None:
    for name, digits in place.hashes:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, name).hexdigest() != digits:
                raise _Wrong(f"has another {name} than the manifest says")
