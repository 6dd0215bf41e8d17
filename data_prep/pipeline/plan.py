"""From the files of an archive to exams to convert, with a bounded part of the headers in memory.

The headers of an archive of millions of files do not fit into memory, and a series may lie in any
number of folders. So headers are spread over bucket files by their study, and each bucket is
planned by itself. Who is the same patient (`data_prep.scan.patients`) is found before, from a few
bytes an image of the whole archive.

Reading the headers takes long, so the result stays: the files are listed in chunks, and a staged
file a chunk holds its headers as they go to the buckets. A run that is started again reads only
the chunks of which a file is missing, new or changed. It writes all buckets and plans again.
"""

import collections
import contextlib
import dataclasses
import hashlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.scan.archives import ArchiveDirectory, Source, Unreadable, list_sources
from data_prep.scan.headers import Header, NotAnImage, read_header
from data_prep.scan.loading import (
    SOURCES_PER_TASK,
    ExamPlan,
    ReadHeader,
    chunks,
    plan_exams,
    read_headers,
    read_headers_one_by_one,
    source_of,
)
from data_prep.scan.patients import Identity, Patients, People, identities
from data_prep.scan.reasons import FAILED_FOR_NOW
from data_prep.scan.rules import VERSION, Rules
from data_prep.system.errors import InputError, RunFailed
from data_prep.system.files import PARTIAL, file_sha256, write_file
from data_prep.system.workers import Progress, WorkerDied, WorkerPool

_MIN_BUCKETS = 64
_HEADERS_PER_BUCKET = 5_000  # about, in memory at a time in each worker
_STAGED_FILES_PER_TASK = 16  # each has the headers of a series or more
_STAGED = "staged"  # folder of the plan directory
_PATIENTS = "patients"  # file of the plan directory

# headers as they go to the buckets, what they say about patients, whether they were staged before
_Part = tuple[dict[int, bytes], dict[Identity, list[int]], bool]


def list_archive(input_dir: ArchiveDirectory, listing: Path | None = None) -> tuple[int, str]:
    """Number of files, and a digest of their names and sizes: equal digests mean that no file came
    or went.

    A file that is replaced by a file of the same size is not noticed. Times are left out, since
    copies have other times. `listing` (private): a file to write, so that `plan_archive` plans the
    same files without listing them again.

    Raises:
        InputError: there are no files.
    """
    digest = hashlib.sha256()
    number = 0
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress("listing", "files", None))
        if listing:
            listing.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(listing, "wb"))
        for chunk in chunks(list_sources(input_dir), SOURCES_PER_TASK):
            for entry in chunk:
                digest.update(repr(source_of(entry)).encode("utf-8", "backslashreplace"))
            if listing:
                pickle.dump(chunk, file, pickle.HIGHEST_PROTOCOL)
            number += len(chunk)
            progress.advance(len(chunk))
        if not number:
            raise InputError(
                f"--input_dir={input_dir}: no files in it; give the folder of the scans"
            )
    return number, digest.hexdigest()


def plan_archive(
    input_dir: ArchiveDirectory,
    plan_dir: Path,
    rules: Rules,
    num_files: int,
    pool: WorkerPool,
    read: ReadHeader = read_header,
    listing: Path | None = None,
    known_patients: Iterable[Sequence[str]] = (),
) -> list[Path]:
    """Reads all headers and writes one plan file a bucket into `plan_dir`; `read_plan` reads them,
    and `read_patients` the patients.

    `plan_dir` is private: it holds headers. Staged headers of a killed run are used. `listing` is
    of `list_archive`; None: the archive is listed here. `known_patients`: patient keys that earlier
    runs took for one patient.

    Raises:
        OSError: the archive went away.
    """
    scan_headers(input_dir, plan_dir, num_files, pool, read, listing, known_patients)
    return plan_buckets(plan_dir, rules, pool)


def plan_staged(
    staged: Sequence[Path],
    plan_dir: Path,
    rules: Rules,
    num_files: int,
    pool: WorkerPool,
    read: Callable[[Path], list[Header | NotAnImage | Unreadable]],
    known_patients: Iterable[Sequence[str]] = (),
) -> list[Path]:
    """`plan_archive` for headers that lie in the files `staged`; `read` reads such a file."""
    scan_staged(staged, plan_dir, num_files, pool, read, known_patients)
    return plan_buckets(plan_dir, rules, pool)


def plan_buckets(plan_dir: Path, rules: Rules, pool: WorkerPool) -> list[Path]:
    """The second half of `plan_archive`: from bucket files to plan files."""
    everyone = read_patients(plan_dir)
    patients = Patients(everyone.key_of, study_of=everyone.study_of)
    tasks = [
        (bucket, bucket.with_suffix(".plan"), rules, patients)
        for bucket in sorted(plan_dir.glob("*.headers"))
    ]
    with Progress("planning", "buckets", len(tasks)) as progress:
        for _, result in pool.run(_plan_bucket, tasks):
            if isinstance(result, WorkerDied):
                raise RunFailed(
                    "planning was killed, probably for memory; run again with a smaller "
                    "--num_workers"
                )
            progress.advance(1)
    return [plan for _, plan, *_ in tasks]


def read_patients(plan_dir: Path) -> Patients:
    """The patients of the whole archive."""
    return pickle.loads((plan_dir / _PATIENTS).read_bytes())


def read_plan(path: Path) -> ExamPlan:
    with open(path, "rb") as file:
        return pickle.load(file)


def all_headers(plans: Iterable[Path]) -> Iterator[Header]:
    """The headers of all images of the planned buckets."""
    for plan in map(read_plan, plans):
        yield from headers_in(plan)


def headers_in(plan: ExamPlan) -> Iterator[Header]:
    """The headers of all images of a plan."""
    for exam in plan.exams:
        for candidate in exam:
            yield from candidate.all_headers
    for rejection in plan.rejections:
        yield from rejection.headers


def scan_headers(
    input_dir: ArchiveDirectory,
    plan_dir: Path,
    num_files: int,
    pool: WorkerPool,
    read: ReadHeader,
    listing: Path | None = None,
    known_patients: Iterable[Sequence[str]] = (),
) -> None:
    """The first half of `plan_archive`: from files to bucket files and patients."""
    num_buckets = _clear(plan_dir, num_files)
    staged_dir = plan_dir / _STAGED
    staged_dir.mkdir(exist_ok=True)
    for stale in staged_dir.glob(f"*{PARTIAL}"):
        stale.unlink(missing_ok=True)
    version = f"{num_buckets} {header_version(read)}"
    listed = _unpickled(listing) if listing else chunks(list_sources(input_dir), SOURCES_PER_TASK)
    tasks = (
        (input_dir, chunk, read, staged_dir / f"{number:07d}", version, num_buckets)
        for number, chunk in enumerate(listed)
    )

    def parts() -> Iterator[tuple[int, _Part]]:
        for (_, chunk, *_), result in pool.run(stage_headers, tasks):
            if isinstance(result, WorkerDied):
                entries = list(read_headers_one_by_one(input_dir, chunk, read))
                result = _by_bucket(entries, num_buckets), _identities(entries), False
            yield len(chunk), result

    _fill_buckets(plan_dir, num_files, num_buckets, parts(), known_patients)


def scan_staged(
    staged: Sequence[Path],
    plan_dir: Path,
    num_files: int,
    pool: WorkerPool,
    read: Callable[[Path], list[Header | NotAnImage | Unreadable]],
    known_patients: Iterable[Sequence[str]] = (),
) -> None:
    """`scan_headers` for headers that lie in files; `read` reads such a file."""
    num_buckets = _clear(plan_dir, num_files)
    tasks = ((paths, read, num_buckets) for paths in chunks(staged, _STAGED_FILES_PER_TASK))

    def parts() -> Iterator[tuple[int, _Part]]:
        for (paths, *_), result in pool.run(_read_staged, tasks):
            if isinstance(result, WorkerDied):
                raise RunFailed(
                    f"{paths[0].parent}: reading {paths[0].name} or one of the {len(paths) - 1} "
                    "files after it was killed; run again"
                )
            yield result

    _fill_buckets(plan_dir, num_files, num_buckets, parts(), known_patients)


def _read_staged(
    paths: Sequence[Path],
    read: Callable[[Path], list[Header | NotAnImage | Unreadable]],
    num_buckets: int,
) -> tuple[int, _Part]:
    entries = [entry for path in paths for entry in read(path)]
    return len(entries), (_by_bucket(entries, num_buckets), _identities(entries), False)


def _clear(plan_dir: Path, num_files: int) -> int:
    """Removes the buckets of a killed run; returns the number of buckets."""
    plan_dir.mkdir(parents=True, exist_ok=True)
    for stale in [*plan_dir.glob("*.headers"), *plan_dir.glob("*.plan")]:
        # a worker of the killed run may have renamed it in this moment
        stale.unlink(missing_ok=True)
    num_buckets = _MIN_BUCKETS
    while num_buckets * _HEADERS_PER_BUCKET < num_files:
        num_buckets *= (
            2  # a growing archive rarely changes this number, so staged headers stay valid
        )
    return num_buckets


def _fill_buckets(
    plan_dir: Path,
    num_files: int,
    num_buckets: int,
    parts: Iterable[tuple[int, _Part]],
    known_patients: Iterable[Sequence[str]],
) -> None:
    """Writes bucket files and patients; parts: number of files, and `stage_headers` of them."""
    people = People(known_patients)
    with Progress("reading headers", "files", num_files) as progress:
        for number, (by_bucket, found, already_there) in parts:
            people.add(found)
            for bucket, content in by_bucket.items():
                with open(plan_dir / f"{bucket:05d}.headers", "ab") as file:
                    file.write(content)
            progress.advance(number, already_there=already_there)
    patients = people.resolve()
    if patients.study_of:
        _gather_studies(plan_dir, patients, num_buckets)
    write_file(plan_dir / _PATIENTS, pickle.dumps(patients, pickle.HIGHEST_PROTOCOL))


def _gather_studies(plan_dir: Path, patients: Patients, num_buckets: int) -> None:
    """Moves images that lack the Study Instance UID of their series to the bucket of that study."""
    for bucket in sorted(plan_dir.glob("*.headers")):
        entries = [entry for entries in _unpickled(bucket) for entry in entries]
        named = [patients.named(one) if isinstance(one, Header) else one for one in entries]
        bucket.unlink()
        for number, content in _by_bucket(named, num_buckets).items():
            with open(plan_dir / f"{number:05d}.headers", "ab") as file:
                file.write(content)


def stage_headers(
    input_dir: ArchiveDirectory,
    entries: tuple[Source | Unreadable, ...],
    read: ReadHeader,
    path: Path,
    version: str,
    num_buckets: int,
) -> _Part:
    """Headers as they go to the bucket files, by number of the bucket, what they say about their
    patients, and whether an earlier run had staged them.

    The file at `path` holds them with a digest of the names, sizes and times of the files and of
    `version`, and a checksum. Chunks of which a file could not be read for now are not staged.

    Raises:
        OSError: the archive went away, or the staged file cannot be written.
    """
    facts = repr((version, entries, [_times(input_dir, entry) for entry in entries]))
    digest = hashlib.sha256(facts.encode("utf-8", "backslashreplace")).digest()
    if path.exists():
        content = path.read_bytes()
        if content[:32] == hashlib.sha256(content[32:]).digest() and content[32:64] == digest:
            return *pickle.loads(content[64:]), True
    headers = read_headers(input_dir, entries, read)
    staged = _by_bucket(headers, num_buckets), _identities(headers)
    if not any(isinstance(one, NotAnImage) and one.reason == FAILED_FOR_NOW for one in headers):
        content = digest + pickle.dumps(staged, pickle.HIGHEST_PROTOCOL)
        write_file(path, hashlib.sha256(content).digest() + content)
    return *staged, False


def _identities(entries: Iterable[Header | NotAnImage | Unreadable]) -> dict[Identity, list[int]]:
    return identities(entry for entry in entries if isinstance(entry, Header))


def _times(input_dir: ArchiveDirectory, entry: Source | Unreadable) -> tuple[int, int] | None:
    """When a file was changed, in ns; None on a store, which shows names and sizes only."""
    if not isinstance(input_dir, Path):
        return None
    try:
        status = os.stat(input_dir / source_of(entry).path)
    except (OSError, ValueError):
        return None
    return status.st_mtime_ns, status.st_ctime_ns


def header_version(read: ReadHeader) -> str:
    """What headers depend on besides the files: the function that reads them, with its tables."""
    function, options = getattr(read, "func", read), getattr(read, "keywords", {})
    tables = [file_sha256(path) for path in options.values() if path]
    return repr(
        (
            function.__module__,
            function.__name__,
            tables,
            VERSION,
            [field.name for field in dataclasses.fields(Header)],
        )
    )


def _by_bucket(
    entries: Iterable[Header | NotAnImage | Unreadable], num_buckets: int
) -> dict[int, bytes]:
    buckets = collections.defaultdict(list)
    for entry in entries:
        buckets[_bucket_number(entry, num_buckets)].append(entry)
    return {
        number: pickle.dumps(content, pickle.HIGHEST_PROTOCOL)
        for number, content in buckets.items()
    }


def _unpickled(path: Path) -> Iterator[Any]:
    """The objects that were pickled into a file one after the other."""
    with open(path, "rb") as file, contextlib.suppress(EOFError):
        while True:
            yield pickle.load(file)


def _bucket_number(entry: Header | NotAnImage | Unreadable, num_buckets: int) -> int:
    """Files of one study share a bucket, whatever patients they name. Files without an image are
    spread by name."""
    if isinstance(entry, Header):
        name = entry.study_instance_uid or entry.patient_key
    else:
        name = repr(entry.source)
    digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).digest()
    return int.from_bytes(digest[:8]) % num_buckets


def _plan_bucket(headers_path: Path, plan_path: Path, rules: Rules, patients: Patients) -> None:
    entries = (entry for entries in _unpickled(headers_path) for entry in entries)
    plan = plan_exams(entries, rules, patients)
    with open(plan_path, "wb") as file:
        pickle.dump(plan, file, pickle.HIGHEST_PROTOCOL)
    headers_path.unlink()
