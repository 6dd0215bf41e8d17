"""Datasets on object stores: a copy on this machine, since ArrayRecord reads local files only.

    directory, preparation = fetch("gs://BUCKET/DATASET", ("train", "validation"))

The copy lies in a folder named by the dataset's fingerprint, below `$CTSSL_CACHE_DIR` or else the
user's cache folder: a dataset that has changed is fetched again, and two URLs of one dataset share
the copy. A file appears there when it is whole and has the checksum of preparation.json, so that a
killed run continues where it stopped. Only the user removes copies.

`BoundedCopy` holds some shards of a split at a time, for splits that are larger than the disk.
"""

import collections
import contextlib
import fcntl
import functools
import hashlib
import itertools
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

from array_record.python import array_record_module

from data_prep.dataset.schema import (
    PREPARATION_FILE,
    dataset_fingerprint,
    parse_preparation,
    split_shards,
)
from data_prep.dataset.storage import READER_OPTIONS
from data_prep.system import stores
from data_prep.system.errors import DatasetError
from data_prep.system.files import PARTIAL, file_sha256, make_folder, publish, written_whole
from data_prep.system.workers import Progress

CACHE_VARIABLE = "CTSSL_CACHE_DIR"
PIECE = 16 << 20  # bytes of a request
_STREAMS = 8  # files at a time: one stream does not fill a fast network
_TRIES = 2  # of a file whose checksum is wrong: the network may have damaged it


class _Snapshot(NamedTuple):
    """A dataset as it is on the store when this process first asks. `directory` is its copy."""

    url: str
    directory: Path
    preparation: dict[str, Any]


def fetch(url: str, splits: Sequence[str] = ()) -> tuple[Path, dict[str, Any]]:
    """The local copy of a dataset, its tables and the shards of `splits`, and the content of
    preparation.json.

    Asks the store once a process, so that a process reads one state of a dataset.

    Raises:
        DatasetError: the store lacks a complete dataset, a file is damaged, or the disk is full.
        InputError: a package or credentials are missing, or the folder for copies cannot be made.
    """
    snapshot = _open(stores.without_slash(url))
    names = [shard.name for split in splits for shard in split_shards(snapshot.preparation, split)]
    if not all((snapshot.directory / name).is_file() for name in names):
        with _lock(snapshot):  # meanwhile another process may have fetched some
            _fetch_files(
                snapshot, [name for name in names if not (snapshot.directory / name).is_file()]
            )
    return snapshot.directory, snapshot.preparation


def cache_dir() -> Path:
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "ctssl_jax" / "datasets"


@functools.cache
def _open(url: str) -> _Snapshot:
    """Fetches the tables, too."""
    content = _read_preparation(url)
    preparation = parse_preparation(content, f"{url}/{PREPARATION_FILE}")
    checksums = preparation["checksums"]
    fingerprint = dataset_fingerprint(checksums)
    if fingerprint != preparation["fingerprint"] or any(
        Path(name).name != name for name in checksums
    ):
        raise DatasetError(
            f"{url}/{PREPARATION_FILE}: damaged (its fingerprint differs from its checksums); "
            "upload the dataset again"
        )
    directory = cache_dir() / fingerprint
    make_folder(directory, url, remedy=f"name another folder for copies by ${CACHE_VARIABLE}")
    snapshot = _Snapshot(url, directory, preparation)
    tables = [name for name in checksums if ".array_record-" not in name]
    # The fingerprint does not cover all tables. They are small, so checksums show the old ones.
    old = [
        name
        for name in tables
        if not (directory / name).is_file() or file_sha256(directory / name) != checksums[name]
    ]
    preparation_file = directory / PREPARATION_FILE
    if old or not preparation_file.is_file() or preparation_file.read_bytes() != content:
        with _lock(snapshot):
            _fetch_files(snapshot, old)
            with written_whole(preparation_file) as temporary:
                temporary.write_bytes(content)
    return snapshot


def _read_preparation(url: str) -> bytes:
    store, path = stores.open_store(url)
    try:
        return store.cat_file(f"{path}/{PREPARATION_FILE}")
    except FileNotFoundError:
        raise DatasetError(
            f"{url}: no complete dataset there (no {PREPARATION_FILE}); check the name, or upload "
            "the dataset, that file last"
        ) from None
    except Exception as error:  # each store has its own
        raise DatasetError(f"{url}: {stores.explain(url, error)}") from None


@contextlib.contextmanager
def _lock(snapshot: _Snapshot) -> Iterator[None]:
    """Held while a copy is written; ends with the process, however it ends."""
    with open(snapshot.directory / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"{snapshot.url}: another process fetches it; waiting", file=sys.stderr, flush=True
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise DatasetError(
                f"{snapshot.directory}: no locks on this file system ({error.strerror}); name a "
                f"folder on a local disk by ${CACHE_VARIABLE}"
            ) from None
        yield


def _fetch_files(snapshot: _Snapshot, names: Sequence[str]) -> None:
    if not names:
        return
    url, directory = snapshot.url, snapshot.directory
    sizes = _sizes(url, names)
    total = sum(sizes.values())
    partial = [directory / f"{name}{PARTIAL}" for name in names]
    needed = total - sum(path.stat().st_size for path in partial if path.exists())
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise DatasetError(
            f"{url}: {needed / 1e9:.1f} GB are to be fetched and {directory} has {free / 1e9:.1f} "
            f"GB left; make room, or name a folder on a larger disk by ${CACHE_VARIABLE}"
        )
    stop, one_at_a_time, fetched = threading.Event(), threading.Lock(), 0
    with Progress(f"fetching {len(names)} files", "MB", round(total / 1e6)) as progress:

        def arrived(number: int, *, already_there: bool = False) -> None:
            nonlocal fetched
            if stop.is_set():
                raise _Stopped
            with one_at_a_time:
                before, fetched = fetched, fetched + number
                progress.advance(
                    round(fetched / 1e6) - round(before / 1e6), already_there=already_there
                )

        pool = ThreadPoolExecutor(_STREAMS)
        try:
            for task in [
                pool.submit(_fetch_file, snapshot, name, sizes[name], arrived) for name in names
            ]:
                task.result()
        finally:  # an error or a request to stop ends the other streams after their next piece
            stop.set()
            pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """Another file failed, or nobody reads any more."""


def _sizes(url: str, names: Sequence[str]) -> dict[str, int]:
    store, path = stores.open_store(url)
    try:
        entries = store.ls(path, detail=True)
    except Exception as error:
        raise DatasetError(f"{url}: {stores.explain(url, error)}") from None
    sizes = {
        entry["name"].rsplit("/", 1)[-1]: entry["size"]
        for entry in entries
        if entry["type"] == "file"
    }
    if absent := [name for name in names if name not in sizes]:
        raise DatasetError(f"{url}/{absent[0]}: is not there; upload the dataset again")
    return {name: sizes[name] for name in names}


def _fetch_file(
    snapshot: _Snapshot,
    name: str,
    size: int,
    arrived: Callable[..., None],
    remedy: str = "the fetched part stays: run again to continue",
) -> None:
    """Fetches a file, from where a killed process stopped. It appears when its checksum is right.
    `remedy`: for a store that fails."""
    store, root = stores.open_store(snapshot.url)
    partial = snapshot.directory / f"{name}{PARTIAL}"
    for _ in range(_TRIES):
        try:
            digest = hashlib.sha256()
            with open(partial, "a+b") as file:
                file.seek(0)
                while piece := file.read(PIECE):
                    digest.update(piece)
                    arrived(len(piece), already_there=True)
                while (at := file.tell()) < size:
                    try:
                        piece = store.cat_file(
                            f"{root}/{name}", start=at, end=min(at + PIECE, size)
                        )
                    except Exception as error:
                        raise DatasetError(
                            f"{snapshot.url}/{name}: {stores.explain(snapshot.url, error)}; "
                            f"{remedy}"
                        ) from None
                    if not piece:
                        break  # the file is shorter than the store lists it
                    digest.update(piece)
                    file.write(piece)
                    arrived(len(piece))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DatasetError(
                f"{partial}: {error.strerror}; name another folder by ${CACHE_VARIABLE}"
            ) from None
        if digest.hexdigest() == snapshot.preparation["checksums"][name]:
            publish(partial, snapshot.directory / name)
            return
        partial.unlink()
    raise DatasetError(
        f"{snapshot.url}/{name}: damaged (its checksum differs from {PREPARATION_FILE}); upload "
        "the dataset again"
    )


# ---- a split of which some shards are here at a time ---------------------------------------------


class BoundedCopy:
    """Shards of a split of a dataset on a store, of which some lie on this machine at a time.

    A shard is fetched when it is asked for, or beforehand by `fetch_ahead`. The ones that were not
    asked for longest make room. Shards of the whole copy (`fetch`) are read there. What lies in the
    folder of an earlier process that has ended is used again; processes that run have folders of
    their own. Thread-safe.

    Args:
        url: the dataset.
        split: a split that it has.
        most_bytes: of all shards in the folder, those on their way included. At least the largest
            shard's.
    """

    def __init__(self, url: str, split: str, most_bytes: float):
        self._url, self._split, self._most_bytes = url, split, most_bytes
        self._opened, self._stopping = False, threading.Event()
        self._changed = threading.Condition()  # of a lock that a thread may take twice
        self._asked: collections.OrderedDict[int, Future] = collections.OrderedDict()
        self._in_folder: set[int] = set()  # those on their way included
        self._pool = ThreadPoolExecutor(_STREAMS, thread_name_prefix="fetching shards")

    def open(self) -> None:
        """Takes a folder, unless it has one.

        Raises:
            DatasetError: a shard is not on the store, the store cannot be read, or the disk has no
                room for `most_bytes`.
        """
        with self._changed:
            if self._opened:
                return
            self._snapshot = _open(stores.without_slash(self._url))
            shards = split_shards(self._snapshot.preparation, self._split)
            self._names = [shard.name for shard in shards]
            self._sizes = shard_bytes(self._url, self._split)
            # the lock is held as long as this object
            self._folder, self._lock = _free_folder(self._snapshot.directory)
            self._take_over(self._folder)
            free = shutil.disk_usage(self._folder).free
            needed = min(self._most_bytes, sum(self._sizes)) - self._bytes_in_folder()
            if needed > free:
                self._lock.close()
                raise DatasetError(
                    f"{self._url}: up to {needed / 1e9:.1f} GB of shards are to be held and "
                    f"{self._folder} has {free / 1e9:.1f} GB left; make room, or name a folder on "
                    f"a larger disk by ${CACHE_VARIABLE}"
                )
            self._opened = True
            for shard in self._in_folder:
                self._ask(shard)

    def close(self) -> None:
        """Stops fetching and gives the folder free; the shards stay for the next process."""
        with self._changed:
            self._stopping.set()
            self._changed.notify_all()
        self._pool.shutdown(cancel_futures=True)
        if self._opened:
            self._lock.close()

    def reader(self, shard: int) -> Any:
        """The open ArrayRecord reader of a shard; waits until it is here.

        Raises:
            DatasetError: it is damaged on the store, or the store cannot be read.
        """
        return self._ask(shard).result()

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Asks for shards without waiting for them."""
        for shard in shards:
            self._ask(shard)

    def _ask(self, shard: int) -> Future:
        self.open()
        with self._changed:
            asked = self._asked.get(shard)
            if asked is None or (asked.done() and asked.exception() is not None):
                asked = self._asked[shard] = self._pool.submit(self._take, shard)
                asked.add_done_callback(self._say_done)
            self._asked.move_to_end(shard)
            return asked

    def _say_done(self, done: Future) -> None:
        with self._changed:
            self._changed.notify_all()

    def _take(self, shard: int) -> Any:
        name = self._names[shard]
        path = self._snapshot.directory / name
        if not path.is_file():
            path = self._folder / name
            if not path.is_file():
                self._make_room(shard)
                snapshot = self._snapshot._replace(directory=self._folder)
                try:
                    remedy = "run again to continue with the shards that are here"
                    _fetch_file(snapshot, name, self._sizes[shard], self._arrived, remedy)
                except BaseException:
                    with self._changed:
                        (self._folder / f"{name}{PARTIAL}").unlink(missing_ok=True)
                        self._in_folder.discard(shard)
                    raise
        return array_record_module.ArrayRecordReader(str(path), options=READER_OPTIONS)

    def _arrived(self, number: int, *, already_there: bool = False) -> None:
        if self._stopping.is_set():
            raise _Stopped

    def _make_room(self, shard: int) -> None:
        """Removes shards until this one fits; then it counts as one of the folder."""
        with self._changed:
            while self._bytes_in_folder() + self._sizes[shard] > self._most_bytes:
                oldest = next(
                    (
                        other
                        for other, asked in self._asked.items()
                        if other in self._in_folder and asked.done()
                    ),
                    None,
                )
                if oldest is None:  # all are on their way
                    self._changed.wait()
                    self._arrived(0)
                    continue
                del self._asked[oldest]  # a thread that reads it now keeps it open
                (self._folder / self._names[oldest]).unlink()
                self._in_folder.remove(oldest)
            self._in_folder.add(shard)

    def _bytes_in_folder(self) -> int:
        return sum(self._sizes[shard] for shard in self._in_folder)

    def _take_over(self, folder: Path) -> None:
        """Keeps whole shards of an earlier process, as far as they fit."""
        numbers = {name: number for number, name in enumerate(self._names)}
        for path in sorted(folder.iterdir()):
            shard = numbers.get(path.name)
            if shard is not None and (
                self._bytes_in_folder() + self._sizes[shard] <= self._most_bytes
            ):
                self._in_folder.add(shard)
            elif ".array_record-" in path.name:
                path.unlink()


def shard_bytes(url: str, split: str) -> list[int]:
    """Size of each shard of a split on the store.

    Raises:
        DatasetError: a shard is missing, or the store cannot be read.
    """
    snapshot = _open(stores.without_slash(url))
    names = [shard.name for shard in split_shards(snapshot.preparation, split)]
    return list(_sizes(snapshot.url, names).values())


def _free_folder(directory: Path) -> tuple[Path, IO[str]]:
    """The first of the folders `some-0`, `some-1`, ... that no other process uses, and its open
    lock, which ends with the process."""
    for number in itertools.count():
        folder = directory / f"some-{number}"
        try:
            folder.mkdir(exist_ok=True)
            file = open(folder / ".lock", "w")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        except OSError as error:
            raise DatasetError(
                f"{folder}: {error.strerror}; name a folder on a local disk by ${CACHE_VARIABLE}"
            ) from None
        return folder, file
    raise AssertionError("unreachable")
