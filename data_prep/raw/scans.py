"""Raw scans -> prepared volumes, one at a time, without a dataset.

    plan = plan_scans(path)                                     # headers only
    for exam in plan.exams:
        scan = read_scan(plan.input_dir, exam, windows, size)   # Scan or Refused

`path` is a directory (one scan, or a tree of many), a zip file, or one DICOM or NIfTI file. The
functions of `data_prep.scan.loading` list, read and choose the files, as for `data_prep.prepare`.
So with the same options the slices equal the records of a prepared dataset bit for bit. Labels and
masks are not read. JAX is not needed.
"""

import collections
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.privacy.pseudonyms import patient_pseudonym, rejected_row, volume_id
from data_prep.scan import nifti_metadata
from data_prep.scan.archives import Source, Unreadable
from data_prep.scan.headers import Header, NotAnImage
from data_prep.scan.loading import (
    SOURCES_PER_TASK,
    ReadHeader,
    chunks,
    header_reader,
    list_input,
    load_exam,
    plan_exams,
    read_headers,
    read_headers_one_by_one,
)
from data_prep.scan.reasons import REASONS
from data_prep.scan.rules import ARCHIVES, Rules
from data_prep.scan.series import Rejection, SeriesCandidate
from data_prep.scan.volume import Volume
from data_prep.scan.window import Window, lung_box, prepare_images
from data_prep.system import stores
from data_prep.system.errors import InputError
from data_prep.system.workers import Progress, WorkerDied, WorkerPool

REMEDIES = {  # for a reason, the flag that takes such a scan
    "too_few_slices": "give a smaller --min_slices",
    "too_thick": "give a larger --max_slice_thickness_mm",
    "no_chest": "give --require_lung=false",
    "irregular": "give --irregular=keep",
    "no_metadata": "leave out --metadata_csv or add the missing rows",
    "not_dicom": "give DICOM, or --archive=nifti for NIfTI",
    "several_volumes": "give one of its volumes as a 3-D file",
    "packed": "unpack it first",
    "not_nifti": "give NIfTI, or --archive=dicom for DICOM",
}


class Scan(NamedTuple):
    """A prepared volume.

    Attributes:
      volume_id, patient_id: pseudonyms, as in `volumes.csv` of a dataset under the same key.
      images: [S, H, W, C] uint8, a channel for each window; slices to superior, rows to posterior,
        columns to the left.
      position_mm: [S] float64, along the slice normal, increasing.
      volume: HU at the matrix of the source, headers and geometry.
    """

    volume_id: str
    patient_id: str
    images: np.ndarray
    position_mm: np.ndarray
    volume: Volume


class PreparedVolume(NamedTuple):
    """The part of a volume that a model reads.

    images: [S, H, W, C] uint8, a channel for each window.
    gap_positions: slices whose next slice is missing.
    lung_box: "top left bottom right" in pixels as in `volumes.csv`; "" without lungs, None if
      unknown.
    """

    images: np.ndarray
    gap_positions: Sequence[int] = ()
    lung_box: str | None = None


class Refused(NamedTuple):
    """A series that is not taken.

    Attributes:
      volume_id: its pseudonym.
      reason: a name of `data_prep.scan.reasons.REASONS`.
      detail: free of identifiers.
    """

    volume_id: str
    reason: str
    detail: str


class ScanPlan(NamedTuple):
    """The exams and the refusals of an input, as far as headers tell.

    input_dir: the directory that sources are relative to.
    exams: for each exam its candidates, the preferred candidate first; at least one exam.
    rejections: series that are refused by their headers.
    not_images: files without an image.
    num_files: number of files, with the members of zip files.
    """

    input_dir: Path
    exams: list[list[SeriesCandidate]]
    rejections: list[Rejection]
    not_images: list[NotAnImage | Unreadable]
    num_files: int


def plan_scans(
    input_path: str | Path,
    archive: str = "auto",
    rules: Rules | None = None,
    metadata_csv: str | Path | None = None,
    *,
    num_workers: int = 0,
) -> ScanPlan:
    """Reads the headers of an input and plans its volumes.

    The headers stay in memory, about 3 KB for each slice. An archive of many thousand scans is
    better prepared first.

    Args:
      input_path: directory, zip file, DICOM file or NIfTI file.
      archive: `dicom`, `nifti`, or `auto`: NIfTI for a file name with .nii, .nii.gz or .hdr, else
        DICOM.
      rules: which series are taken; None takes the defaults of `data_prep.prepare`.
      metadata_csv: table beside NIfTI files, see `data_prep.scan.nifti_metadata`.
      num_workers: processes that read headers; 0 reads them in this one.

    Raises:
      InputError: the input is missing or has no CT volume (with the reasons), or the metadata
        table cannot be used.
      OSError: the archive went away.
    """
    path, rules = local_input(input_path), rules or Rules()
    reader = header_reader_of(path, archive, metadata_csv)
    input_dir = path if path.is_dir() else path.parent
    entries = list(read_all_headers(input_dir, list(list_input(path)), reader, num_workers))
    sources = {entry.source for entry in entries if isinstance(entry, Header)}
    planned = plan_exams(entries, rules)
    plan = ScanPlan(input_dir, *planned, num_files=len(sources) + len(planned.not_images))
    if not plan.exams:
        raise InputError(nothing_taken(path, [*plan.rejections, *plan.not_images]))
    return plan


def header_reader_of(
    path: Path,
    archive: str = "auto",
    metadata_csv: str | Path | None = None,
    *,
    grows: bool = False,
) -> ReadHeader:
    """The function that reads the headers of an input; arguments as for `plan_scans`.

    `grows`: files that the metadata table names may come later.

    Raises:
      InputError: the input is missing, or the metadata table cannot be used.
    """
    archive = _kind(path, archive)
    metadata_csv = stores.local_path(metadata_csv, "--metadata_csv") if metadata_csv else None
    if metadata_csv is not None:
        if archive != "nifti":
            raise InputError(
                "--metadata_csv goes with --archive=nifti; leave it out, or give --archive"
            )
        if path.is_dir() and not grows:
            nifti_metadata.check(path, metadata_csv)
        else:
            nifti_metadata.read_metadata(metadata_csv)
    return header_reader(archive, metadata_csv)


def local_input(input_path: str | Path) -> Path:
    """The path of an input.

    Raises:
      InputError: it is the URL of an object store.
    """
    remedy = "copy scans here first, or fetch a dataset with ctssl fetch"
    return stores.local_path(input_path, "--input", remedy)


def read_scan(
    input_dir: Path,
    exam: Sequence[SeriesCandidate],
    windows: Sequence[Window],
    image_size: int,
    rules: Rules | None = None,
    key: bytes = b"",
) -> Scan | Refused:
    """Reads the pixels of an exam, from its first candidate that becomes a volume.

    At most one volume is in memory.

    Args:
      input_dir: the `input_dir` of the plan.
      exam: an exam of the plan.
      windows: (level, width) in HU, a channel each.
      image_size: height and width of the slices in pixels.
      rules: the rules that the plan was made with.
      key: the pseudonym key. Names under the empty key can be traced back, so they must not be
        published.

    Returns:
      The scan, or the refusal of the preferred candidate if all candidates are refused.

    Raises:
      OSError: the archive went away.
    """
    loaded = load_exam(Path(input_dir), exam, rules or Rules())
    if loaded.volume is None:
        # The preferred candidate represents the exam, unless another candidate failed for now and
        # the exam is to be tried again.
        number = len(loaded.rejections) - 1 if loaded.failed_for_now else 0
        rejection = loaded.rejections[number]
        return Refused(volume_id(key, exam[number]), rejection.reason, rejection.detail)
    volume = loaded.volume
    images = prepare_images(volume.hu, volume.pixel_spacing_mm, windows, image_size)
    patient_id = patient_pseudonym(key, volume.candidate.patient_key)
    return Scan(volume_id(key, volume.candidate), patient_id, images, volume.position_mm, volume)


def prepared_volume(scan: Scan) -> PreparedVolume:
    """A scan without its HU and headers."""
    volume = scan.volume
    gaps = np.flatnonzero(~volume.pair_valid[:-1]).tolist()
    box = lung_box(volume.chest, volume.hu.shape[1:], volume.pixel_spacing_mm, scan.images.shape[1])
    return PreparedVolume(scan.images, gaps, box)


def refused_series(plan: ScanPlan, key: bytes = b"") -> list[Refused]:
    """The series that are refused by their headers."""
    rows = [rejected_row(key, rejection) for rejection in plan.rejections]
    return [Refused(row.series_id, row.reason, row.detail) for row in rows]


def nothing_taken(
    input_path: str | Path, refused: Sequence[Refused | Rejection | NotAnImage | Unreadable]
) -> str:
    """One line for an input without a usable scan: the reasons with counts, and the remedy.

    A single series is explained by itself, without the files beside it.
    """
    series = [entry for entry in refused if isinstance(entry, Refused | Rejection)]
    counts = collections.Counter(entry.reason for entry in series or refused)
    remedies = [REMEDIES[reason] for reason, _ in counts.most_common() if reason in REMEDIES]
    remedy = f"; {', or '.join(remedies) or 'give another scan'}"
    if len(series or refused) == 1:
        (only,) = series or refused
        detail = f" ({only.detail})" if only.detail else ""
        return f"--input={input_path}: {only.reason}: {explain(only.reason)}{detail}{remedy}"
    noun = "series" if series else "files"
    listed = ", ".join(
        f"{number} {noun} {reason}: {explain(reason)}" for reason, number in counts.most_common()
    )
    return f"--input={input_path} holds no usable CT volume ({listed or 'no files'}){remedy}"


def explain(reason: str) -> str:
    """A reason in words, without a full stop."""
    return REASONS[reason].rstrip(".")


def _kind(path: Path, archive: str) -> str:
    if archive not in ARCHIVES:
        raise InputError(f"--archive={archive}: choose one of {', '.join(ARCHIVES)}")
    if not path.exists():
        raise InputError(
            f"--input={path}: no such file or directory; give a scan, or a folder of scans"
        )
    if archive != "auto":
        return archive
    return "nifti" if path.name.lower().endswith((".nii", ".nii.gz", ".hdr")) else "dicom"


def read_all_headers(
    input_dir: Path, entries: Sequence[Source | Unreadable], read: ReadHeader, num_workers: int
) -> Iterable[Header | NotAnImage | Unreadable]:
    """The headers of all files, read in processes if there are many files."""
    tasks = [(input_dir, chunk, read) for chunk in chunks(entries, SOURCES_PER_TASK)]
    if num_workers == 0 or len(tasks) < 8:
        for task in tasks:
            yield from read_headers(*task)
        return
    with (
        WorkerPool(num_workers) as pool,
        Progress("reading headers", "files", len(entries)) as progress,
    ):
        for task, result in pool.run(read_headers, tasks):
            yield from read_headers_one_by_one(*task) if isinstance(result, WorkerDied) else result
            progress.advance(len(task[1]))
