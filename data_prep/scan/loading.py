"""The one way in for scans: files -> headers -> exams, and an exam -> a volume or its rejections.

    entries = read_headers(input_dir, tuple(list_input(path)), header_reader("dicom"))
    plan = plan_exams(entries, rules)
    for exam in plan.exams:
        loaded = load_exam(input_dir, exam, rules)

`data_prep.prepare` reads archives through this module, and `data_prep.raw.scans` single scans, so
that both accept and refuse alike. The rules are in `series` (headers) and `volume` (pixels).
"""

import dataclasses
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
    list_file,
    list_sources,
    reading_ahead,
    will_read,
)
from data_prep.scan.headers import Header, NotAnImage
from data_prep.scan.patients import Patients, People, identities
from data_prep.scan.reasons import FAILED_FOR_NOW
from data_prep.scan.rules import Rules
from data_prep.scan.series import Rejection, SeriesCandidate, plan_series, select_reconstructions
from data_prep.scan.volume import Volume, load_volume
from data_prep.scan.window import grey_thumbnail
from data_prep.system.workers import WorkerDied, WorkerPool

SOURCES_PER_TASK = 128
_HEADER_BYTES = 32 << 10  # most headers are shorter

ReadHeader = Callable[[ArchiveDirectory, Source], Header | NotAnImage]


# ---- files -> headers ----------------------------------------------------------------------------


def list_input(path: Path) -> Iterator[Source | Unreadable]:
    """Every file of a directory or of a packed file, or the single file.

    Paths are relative to the directory, or to the folder of the file.
    """
    if path.is_dir():
        yield from list_sources(path)
        return
    yield from list_file(str(path), Source(path.name, "", path.stat().st_size))


def header_reader(archive: str, metadata_csv: Path | None = None) -> ReadHeader:
    """The function that reads a header.

    Args:
        archive: `nifti`; any other kind is read as DICOM.
        metadata_csv: table beside NIfTI files.
    """
    if archive == "nifti":
        return functools.partial(nifti.read_header, metadata_csv=metadata_csv)
    return headers.read_header


def read_headers(
    input_dir: ArchiveDirectory, entries: tuple[Source | Unreadable, ...], read: ReadHeader
) -> list[Header | NotAnImage | Unreadable]:
    """The header of each file, or the reason why it has none, in the order of the entries.

    `Unreadable` entries are returned unchanged.

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
    """`read_headers` for files of which one killed its worker: only that file is left out, by
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
        OSError: the whole archive went away.
    """
    if not input_dir.is_dir():
        raise OSError(f"{input_dir}: the archive went away; run again to continue") from None
    if error.errno is None:  # from the content of the file, not from the disk
        return "unreadable", "damaged"
    return FAILED_FOR_NOW, error.strerror or ""


# ---- headers -> exams ----------------------------------------------------------------------------


class ExamPlan(NamedTuple):
    """The exams and the refusals of some files, as far as headers tell.

    exams: the candidates of each exam in order of preference.
    rejections: series that are refused by their headers.
    not_images: files without an image.
    """

    exams: list[list[SeriesCandidate]]
    rejections: list[Rejection]
    not_images: list[NotAnImage | Unreadable]


def plan_exams(
    entries: Iterable[Header | NotAnImage | Unreadable],
    rules: Rules,
    patients: Patients | None = None,
) -> ExamPlan:
    """Sorts the entries of some files into exams, rejected series, and files without an image.

    `patients`: those of the whole archive; None: the files are the archive.
    """
    images, not_images = [], []
    for entry in entries:
        (images if isinstance(entry, Header) else not_images).append(entry)
    if patients is None:
        people = People()
        people.add(identities(images))
        patients = people.resolve()
    planned = plan_series(map(patients.named, images), rules)
    candidates = [entry for entry in planned if isinstance(entry, SeriesCandidate)]
    rejections = [entry for entry in planned if isinstance(entry, Rejection)]
    return ExamPlan(select_reconstructions(candidates, rules), rejections, not_images)


# ---- an exam -> a volume -------------------------------------------------------------------------


class LoadedExam(NamedTuple):
    """The volume of an exam, and its refused candidates.

    volume: from the first candidate that could be read; None: all were refused.
    labels: the result of `label` for the volume.
    rejections: the other candidates, in their order. After a candidate that failed for now, no
      further one was tried.
    """

    volume: Volume | None
    labels: Any
    rejections: list[Rejection]

    @property
    def failed_for_now(self) -> Rejection | None:
        """The candidate because of which the exam waits for the next run, so that the preferred
        candidate keeps its turn."""
        last = self.rejections[-1] if self.rejections else None
        return last if last and last.reason == FAILED_FOR_NOW else None


def load_exam(
    input_dir: ArchiveDirectory,
    exam: Iterable[SeriesCandidate],
    rules: Rules,
    fault: Callable[[SeriesCandidate], Rejection | None] = lambda candidate: None,
    label: Callable[[Volume], Any] = lambda volume: None,
) -> LoadedExam:
    """Tries the candidates of an exam in order and takes the first that becomes a volume.

    At most one volume is in memory.

    Args:
        input_dir: the archive.
        exam: the candidates, the preferred one first.
        rules: the rules that the exam was planned with.
        fault: returns a further reason to refuse a candidate, before its pixels are read.
        label: returns the labels of a volume, or a `Rejection`.

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
        if isinstance(labels, Rejection):
            image = grey_thumbnail(volume.hu[volume.chest.middle_slice])
            return dataclasses.replace(labels, thumbnail=image)
        return volume, labels
    except OSError as error:
        return candidate.rejected(*_reason_of(error, input_dir))
    except MemoryError:
        return candidate.rejected(FAILED_FOR_NOW, "out of memory")
    # One odd exam in a million must not end the run. It is reported by name.
    except Exception as error:
        return candidate.rejected("conversion_crashed", type(error).__name__)
