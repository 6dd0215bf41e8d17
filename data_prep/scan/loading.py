"""The one way in for scans: files -> headers -> exams; an exam -> a volume, or the reasons why not.

    entries = read_headers(input_dir, tuple(list_input(path)), header_reader("dicom"))
    plan = plan_exams(entries, rules)
    for exam in plan.exams:
        loaded = load_exam(input_dir, exam, rules)

`data_prep.prepare` takes archives through this module, and `data_prep.raw.scans` single scans, so
that both accept and refuse alike. The rules themselves are in `series` (headers) and `volume`
(pixels).
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.scan import headers, nifti
from data_prep.scan.archives import (
    ArchiveDirectory,
    Source,
    Unreadable,
    is_zip,
    list_sources,
    reading_ahead,
    will_read,
    zip_members,
)
from data_prep.scan.headers import Header, NotAnImage
from data_prep.scan.reasons import FAILED_FOR_NOW
from data_prep.scan.rules import Rules
from data_prep.scan.series import Rejection, SeriesCandidate, plan_series, select_reconstructions
from data_prep.scan.volume import Volume, load_volume
from data_prep.system.workers import WorkerDied, WorkerPool

SOURCES_PER_TASK = 128
_HEADER_BYTES = 32 << 10  # most headers are shorter

ReadHeader = Callable[[ArchiveDirectory, Source], Header | NotAnImage]


# ---- files -> headers ----------------------------------------------------------------------------


def list_input(path: Path) -> Iterator[Source | Unreadable]:
    """Every file of a directory, of a zip file, or the file itself; paths are relative to the
    directory."""
    if path.is_dir():
        yield from list_sources(path)
        return
    source = Source(path.name, "", path.stat().st_size)
    if is_zip(str(path)):
        yield from zip_members(str(path), source)
    else:
        yield source


def header_reader(archive: str, metadata_csv: Path | None = None) -> ReadHeader:
    """The function that reads a header of this kind of archive."""
    if archive == "nifti":
        return functools.partial(nifti.read_header, metadata_csv=metadata_csv)
    return headers.read_header


def read_headers(
    input_dir: ArchiveDirectory, entries: tuple[Source | Unreadable, ...], read: ReadHeader
) -> list[Header | NotAnImage | Unreadable]:
    """What each file is, in the order of the files. Files that could not be listed stay as they
    are.

    Raises:
        OSError: the archive went away.
    """
    sources = [entry for entry in entries if isinstance(entry, Source)]
    will_read(input_dir, sources, _HEADER_BYTES)
    input_dir = reading_ahead(input_dir, sources, starts=True)
    return [
        entry if isinstance(entry, Unreadable) else _read_one(input_dir, entry, read)
        for entry in entries
    ]


def read_headers_one_by_one(
    input_dir: ArchiveDirectory, entries: tuple[Source | Unreadable, ...], read: ReadHeader
) -> Iterator[Header | NotAnImage | Unreadable]:
    """`read_headers` for files of which one killed its worker: that file alone is left out, by
    name."""
    tasks = [(input_dir, (entry,), read) for entry in entries]
    with WorkerPool(1) as pool:
        for (_, (entry,), _), result in pool.run(read_headers, tasks):
            if isinstance(result, WorkerDied):
                yield NotAnImage(source_of(entry), FAILED_FOR_NOW, "reading the header crashed")
            else:
                yield from result


def source_of(entry: Source | Unreadable | Header | NotAnImage) -> Source:
    """The file of an entry."""
    return entry if isinstance(entry, Source) else entry.source


def chunks(entries: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    """Tuples of `size` entries; the last one may be shorter."""
    entries = iter(entries)
    while chunk := tuple(itertools.islice(entries, size)):
        yield chunk


def _read_one(input_dir: ArchiveDirectory, source: Source, read: ReadHeader) -> Header | NotAnImage:
    try:
        return read(input_dir, source)
    except OSError as error:
        return NotAnImage(source, *_reason_of(error, input_dir))


def _reason_of(error: OSError, input_dir: ArchiveDirectory) -> tuple[str, str]:
    """Reason and detail of a file that cannot be read.

    Raises:
        OSError: nothing can be read any more.
    """
    if not input_dir.is_dir():
        raise OSError(f"{input_dir}: the archive went away; run again to continue") from None
    if error.errno is None:  # not from the disk, but from the content of the file
        return "unreadable", "damaged"
    return FAILED_FOR_NOW, error.strerror or ""


# ---- headers -> exams ----------------------------------------------------------------------------


class ExamPlan(NamedTuple):
    """What headers say of files.

    exams: of each exam its candidates in order of preference.
    rejections: series that no pixel needs to be read of.
    not_images: files without an image.
    """

    exams: list[list[SeriesCandidate]]
    rejections: list[Rejection]
    not_images: list[NotAnImage | Unreadable]


def plan_exams(entries: Iterable[Header | NotAnImage | Unreadable], rules: Rules) -> ExamPlan:
    """Sorts the entries of some files into exams, rejected series, and files without an image."""
    found, not_images = [], []
    for entry in entries:
        (found if isinstance(entry, Header) else not_images).append(entry)
    planned = plan_series(found, rules)
    candidates = [entry for entry in planned if isinstance(entry, SeriesCandidate)]
    rejections = [entry for entry in planned if isinstance(entry, Rejection)]
    return ExamPlan(select_reconstructions(candidates, rules), rejections, not_images)


# ---- an exam -> a volume -------------------------------------------------------------------------


class LoadedExam(NamedTuple):
    """What became of an exam.

    volume: of the first candidate that becomes one; None: there is none.
    labels: what `label` returned for the volume.
    rejections: the other candidates, in their order; after one that failed for now no further one
      was tried.
    """

    volume: Volume | None
    labels: Any
    rejections: list[Rejection]

    @property
    def failed_for_now(self) -> Rejection | None:
        """The candidate because of which the exam is left for the next run: the preferred one keeps
        its turn."""
        last = self.rejections[-1] if self.rejections else None
        return last if last and last.reason == FAILED_FOR_NOW else None


def load_exam(
    input_dir: ArchiveDirectory,
    exam: Iterable[SeriesCandidate],
    rules: Rules,
    fault: Callable[[SeriesCandidate], Rejection | None] = lambda candidate: None,
    label: Callable[[Volume], Any] = lambda volume: None,
) -> LoadedExam:
    """Tries the candidates of an exam in order and takes the first that becomes a volume. Holds one
    volume in memory.

    Args:
        input_dir: of the candidates.
        exam: the candidates.
        rules: of the plan.
        fault: a further reason to refuse a candidate, before its pixels are read.
        label: the labels of a volume, or a `Rejection`.

    Raises:
        OSError: the archive went away.
    """
    taken, labels, rejections = None, None, []
    for candidate in exam:
        if taken is not None:
            rejections.append(candidate.rejected("other_reconstruction", ""))
            continue
        loaded = fault(candidate) or _load(input_dir, candidate, rules, label)
        if not isinstance(loaded, Rejection):
            taken, labels = loaded
            continue
        rejections.append(loaded)
        if loaded.reason == FAILED_FOR_NOW:
            break
    return LoadedExam(taken, labels, rejections)


def _load(
    input_dir: ArchiveDirectory,
    candidate: SeriesCandidate,
    rules: Rules,
    label: Callable[[Volume], Any],
) -> tuple[Volume, Any] | Rejection:
    try:
        volume = load_volume(input_dir, candidate, rules)
        if isinstance(volume, Rejection):
            return volume
        labels = label(volume)
        return labels if isinstance(labels, Rejection) else (volume, labels)
    except OSError as error:
        return candidate.rejected(*_reason_of(error, input_dir))
    except MemoryError:
        return candidate.rejected(FAILED_FOR_NOW, "out of memory")
    # one odd exam in a million must not end the run; it is reported by name
    except Exception as error:
        return candidate.rejected("conversion_crashed", type(error).__name__)
