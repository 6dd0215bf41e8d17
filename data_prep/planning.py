"""From the files of an archive to exams to convert, with a bounded part of the headers in memory.

The headers of an archive of millions of files do not fit into memory, and a series may lie in any number of folders.
So headers are spread over bucket files by the study that they belong to, and each bucket is planned by itself.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from data_prep import nifti
from data_prep.archives import ArchiveDirectory, Source, Unreadable, list_sources, read_ahead
from data_prep.conversion import FAILED_FOR_NOW
from data_prep.dicom import (
    Header,
    NotAnImage,
    Rejection,
    Rules,
    SeriesCandidate,
    plan_series,
    read_header,
    select_reconstructions,
)
from data_prep.workers import Progress, WorkerDied, WorkerPool

_MIN_BUCKETS = 64
_HEADERS_PER_BUCKET = 5_000  # about, in memory at a time in each worker
_SOURCES_PER_TASK = 128
_HEADER_BYTES = 32 << 10  # most headers are shorter

ReadHeader = Callable[[ArchiveDirectory, Source], Header | NotAnImage]


@dataclasses.dataclass(frozen=True)
class BucketPlan:
    """What headers say of the files of one bucket."""

    exams: list[list[SeriesCandidate]]  # candidates of an exam in order of preference
    rejections: list[Rejection]
    not_images: list[NotAnImage | Unreadable]


def list_archive(input_dir: ArchiveDirectory) -> tuple[int, str]:
    """Number of files, and a digest of their names and sizes: equal digests mean that nothing came or went.

    A file that is replaced by another of the same size is not noticed. Times are left out: copies have other ones.

    Raises:
        ValueError: there are no files.
    """
    digest = hashlib.sha256()
    number = 0
    with Progress("listing", "files", None) as progress:
        for entry in list_sources(input_dir):
            digest.update(repr(_source(entry)).encode("utf-8", "backslashreplace"))
            number += 1
            progress.advance(1)
        if not number:
            raise ValueError(f"--input_dir={input_dir}: no files in it; give the folder of the scans")
    return number, digest.hexdigest()


def header_reader(archive: str, metadata_csv: Path | None = None) -> ReadHeader:
    """What reads the headers of an archive of this kind."""
    return functools.partial(nifti.read_header, metadata_csv=metadata_csv) if archive == "nifti" else read_header


def plan_archive(
    input_dir: ArchiveDirectory,
    plan_dir: Path,
    rules: Rules,
    num_files: int,
    pool: WorkerPool,
    read: ReadHeader = read_header,
) -> list[Path]:
    """Reads all headers and writes one plan file a bucket into `plan_dir`; `read_plan` reads them.

    Raises:
        OSError: the archive went away.
    """
    plan_dir.mkdir(parents=True, exist_ok=True)
    for stale in plan_dir.iterdir():
        stale.unlink()
    _scan(input_dir, plan_dir, num_files, pool, read)
    tasks = [(bucket, bucket.with_suffix(".plan"), rules) for bucket in sorted(plan_dir.glob("*.headers"))]
    with Progress("planning", "buckets", len(tasks)) as progress:
        for _, result in pool.run(_plan_bucket, tasks):
            if isinstance(result, WorkerDied):
                raise OSError("planning was killed, probably for memory; run again with a smaller --num_workers")
            progress.advance(1)
    return [plan for _, plan, _ in tasks]


def read_plan(path: Path) -> BucketPlan:
    with open(path, "rb") as file:
        return pickle.load(file)


def all_headers(plans: Iterable[Path]) -> Iterator[Header]:
    """The headers of all images of the planned buckets."""
    for plan in map(read_plan, plans):
        for exam in plan.exams:
            for candidate in exam:
                yield from candidate.all_headers
        for rejection in plan.rejections:
            yield from rejection.headers


def _scan(input_dir: ArchiveDirectory, plan_dir: Path, num_files: int, pool: WorkerPool, read: ReadHeader) -> None:
    num_buckets = max(_MIN_BUCKETS, num_files // _HEADERS_PER_BUCKET)
    with Progress("reading headers", "files", num_files) as progress:
        tasks = ((input_dir, chunk, read) for chunk in _chunks(list_sources(input_dir), _SOURCES_PER_TASK))
        for (_, chunk, _), entries in pool.run(read_headers, tasks):
            if isinstance(entries, WorkerDied):
                entries = list(read_headers_one_by_one(input_dir, chunk, read))
            by_bucket = collections.defaultdict(list)
            for entry in entries:
                by_bucket[_bucket_number(entry, num_buckets)].append(entry)
            for number, content in by_bucket.items():
                with open(plan_dir / f"{number:05d}.headers", "ab") as file:
                    for entry in content:
                        pickle.dump(entry, file, pickle.HIGHEST_PROTOCOL)
            progress.advance(len(entries))


def _chunks(items: Iterable, size: int) -> Iterator[tuple]:
    items = iter(items)
    while chunk := tuple(itertools.islice(items, size)):
        yield chunk


def read_headers(
    input_dir: ArchiveDirectory, entries: tuple[Source | Unreadable, ...], read: ReadHeader
) -> list[Header | NotAnImage | Unreadable]:
    """What the files are, in their order; what could not be listed stays as it is.

    Raises:
        OSError: the archive went away.
    """
    read_ahead(input_dir, (entry for entry in entries if isinstance(entry, Source)), _HEADER_BYTES)
    return [entry if isinstance(entry, Unreadable) else _read_one(input_dir, entry, read) for entry in entries]


def read_headers_one_by_one(input_dir, entries, read) -> Iterator[Header | NotAnImage | Unreadable]:
    """For a chunk that killed its worker: the file that did it is left out, by name."""
    tasks = [(input_dir, (entry,), read) for entry in entries]
    with WorkerPool(1) as pool:
        for (_, (entry,), _), result in pool.run(read_headers, tasks):
            if isinstance(result, WorkerDied):
                yield NotAnImage(_source(entry), FAILED_FOR_NOW, "reading the header crashed")
            else:
                yield from result


def _read_one(input_dir: ArchiveDirectory, source: Source, read: ReadHeader) -> Header | NotAnImage:
    try:
        return read(input_dir, source)
    except OSError as error:
        if not input_dir.is_dir():
            raise OSError(f"{input_dir}: the archive went away; run again to continue") from None
        if error.errno is None:  # not from the disk: what the file holds
            return NotAnImage(source, "unreadable", "damaged")
        return NotAnImage(source, FAILED_FOR_NOW, error.strerror or "")


def _source(entry: Source | Unreadable | Header | NotAnImage) -> Source:
    return entry if isinstance(entry, Source) else entry.source


def _bucket_number(entry: Header | NotAnImage | Unreadable, num_buckets: int) -> int:
    """Files of one study and patient share a bucket; files that are no images are spread by their names."""
    if isinstance(entry, Header):
        name = f"{entry.patient_key}|{entry.study_instance_uid}"
    else:
        name = repr(entry.source)
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "backslashreplace")).digest()[:8]) % num_buckets


def _plan_bucket(headers_path: Path, plan_path: Path, rules: Rules) -> None:
    headers, not_images = [], []
    with open(headers_path, "rb") as file:
        with contextlib.suppress(EOFError):
            while True:
                entry = pickle.load(file)
                (headers if isinstance(entry, Header) else not_images).append(entry)
    planned = plan_series(headers, rules)
    candidates = [entry for entry in planned if isinstance(entry, SeriesCandidate)]
    plan = BucketPlan(
        exams=select_reconstructions(candidates, rules),
        rejections=[entry for entry in planned if isinstance(entry, Rejection)],
        not_images=not_images,
    )
    with open(plan_path, "wb") as file:
        pickle.dump(plan, file, pickle.HIGHEST_PROTOCOL)
    headers_path.unlink()
