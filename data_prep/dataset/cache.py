"""Datasets on object stores: a copy on this machine, since ArrayRecord reads local files only.

    directory, preparation = fetch("gs://BUCKET/DATASET", ("train", "validation"))

The copy lies in a folder named by the dataset's fingerprint, below `$CTSSL_CACHE_DIR` or else the
user's cache folder: a dataset that has changed is fetched again, and two URLs of one dataset share
the copy. A file appears there when it is whole and has the checksum of preparation.json, so that a
killed run continues where it stopped. Only the user removes copies.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.dataset.schema import (
    PREPARATION_FILE,
    dataset_fingerprint,
    parse_preparation,
    split_shards,
)
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
    sizes = _sizes(url)
    absent = [name for name in names if name not in sizes]
    if absent:
        raise DatasetError(f"{url}/{absent[0]}: is not there; upload the dataset again")
    total = sum(sizes[name] for name in names)
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
    """Another file failed."""


def _sizes(url: str) -> dict[str, int]:
    store, path = stores.open_store(url)
    try:
        entries = store.ls(path, detail=True)
    except Exception as error:
        raise DatasetError(f"{url}: {stores.explain(url, error)}") from None
    return {
        entry["name"].rsplit("/", 1)[-1]: entry["size"]
        for entry in entries
        if entry["type"] == "file"
    }


def _fetch_file(snapshot: _Snapshot, name: str, size: int, arrived: Callable[..., None]) -> None:
    """Fetches a file, from where a killed process stopped. It appears when its checksum is
    right."""
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
                            f"{snapshot.url}/{name}: {stores.explain(snapshot.url, error)}; the "
                            "fetched part stays: run again to continue"
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
