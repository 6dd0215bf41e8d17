"""Raw scans -> prepared volumes, one at a time, without a dataset: what `data_prep.prepare` would have written.

    plan = plan_scans(path)                                     # headers only
    for exam in plan.exams:
        scan = read_scan(plan.input_dir, exam, windows, size)   # Scan or Refused

`path` is a directory (one scan, or a tree of many), a zip file, or one DICOM or NIfTI file. Listing, headers, choice of
series, pixels, window and size are the functions of `data_prep`, so that with the same options the slices equal those
of a prepared dataset bit for bit; labels and masks are not read. Nothing here needs JAX.
"""

import collections
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ctssl_jax.scan_flags import ARCHIVES
from data_prep import archives, conversion, deidentify, nifti_metadata, planning, stores
from data_prep.dicom import (
    REASONS,
    Header,
    NotAnImage,
    Rejection,
    Rules,
    SeriesCandidate,
    Source,
    Unreadable,
    Volume,
    list_sources,
    load_volume,
    plan_series,
    select_reconstructions,
)
from data_prep.system.errors import InputError
from data_prep.window import resize_slice, window_to_uint8
from data_prep.workers import Progress, WorkerDied, WorkerPool

__all__ = [
    "FAILED_FOR_NOW",
    "PreparedVolume",
    "Refused",
    "Rules",
    "Scan",
    "ScanPlan",
    "explain",
    "local_input",
    "nothing_taken",
    "of_scan",
    "plan_scans",
    "prepare_images",
    "read_scan",
    "refused_series",
]

FAILED_FOR_NOW = conversion.FAILED_FOR_NOW  # the one reason that is not final
_SOURCES_PER_TASK = 128
_REMEDIES = {  # what takes that which a reason refuses
    "too_few_slices": "give a smaller --min_slices",
    "too_thick": "give a larger --max_slice_thickness_mm",
    "no_chest": "give --require_lung=false",
    "irregular": "give --irregular=keep",
    "no_metadata": "leave out --metadata_csv or add the missing rows",
    "not_dicom": "give DICOM, or --archive=nifti for NIfTI",
    "not_nifti": "give NIfTI, or --archive=dicom for DICOM",
}


class Scan(NamedTuple):
    """A prepared volume.

    volume_id, patient_id: pseudonyms, as in `volumes.csv` of a dataset under the same key.
    images: [S, H, W, C] uint8, a channel a window; slices to superior, rows to posterior, columns to the left.
    position_mm: [S] float64, along the slice normal, increasing.
    volume: the HU of the source's matrix, headers and geometry.
    """

    volume_id: str
    patient_id: str
    images: np.ndarray
    position_mm: np.ndarray
    volume: Volume


class PreparedVolume(NamedTuple):
    """What the model reads of a volume.

    images: [S, H, W, C] uint8, a channel a window.
    gap_positions: slices whose next one is missing.
    lung_box: "top left bottom right" in pixels as in `volumes.csv`; "" where no lung was found, None where unknown.
    """

    images: np.ndarray
    gap_positions: Sequence[int] = ()
    lung_box: str | None = None


class Refused(NamedTuple):
    """A series that is not taken: its pseudonym, a name of `data_prep.dicom.REASONS` or `data_prep.conversion.REASONS`,
    and a detail without identifiers."""

    volume_id: str
    reason: str
    detail: str


class ScanPlan(NamedTuple):
    """What the headers of an input say.

    input_dir: the directory that sources are relative to.
    exams: of each exam its candidates, the preferred one first; at least one exam.
    rejections: series that no pixel needs to be read of.
    not_images: files that hold no image.
    num_files: all files, with those in zip files.
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
    """Reads the headers of an input and says which volumes it may hold.

    The headers stay in memory, about 3 KB a slice; an archive of many thousand scans is better prepared first.

    Args:
      input_path: directory, zip file, DICOM file or NIfTI file.
      archive: `dicom`, `nifti`, or `auto`: NIfTI for a file of that name, else DICOM.
      rules: what is taken; None takes the defaults of `data_prep.prepare`.
      metadata_csv: table beside NIfTI files, see `data_prep.nifti_metadata`.
      num_workers: processes that read headers; 0 reads them in this one.

    Raises:
      InputError: no such input, a metadata table that cannot be used, or no CT volume in it: with the reasons.
    """
    path, rules = local_input(input_path), rules or Rules()
    archive = _kind(path, archive)
    metadata_csv = Path(metadata_csv).expanduser() if metadata_csv else None
    if metadata_csv is not None:
        if archive != "nifti":
            raise InputError("--metadata_csv goes with --archive=nifti; leave it out, or give --archive")
        nifti_metadata.check(path, metadata_csv) if path.is_dir() else nifti_metadata.read_metadata(metadata_csv)
    input_dir = path if path.is_dir() else path.parent
    read = planning.header_reader(archive, metadata_csv)
    headers, not_images = [], []
    for entry in _read_headers(input_dir, list(_list_input(path)), read, num_workers):
        (headers if isinstance(entry, Header) else not_images).append(entry)
    planned = plan_series(headers, rules)
    candidates = [entry for entry in planned if isinstance(entry, SeriesCandidate)]
    plan = ScanPlan(
        input_dir=input_dir,
        exams=select_reconstructions(candidates, rules),
        rejections=[entry for entry in planned if isinstance(entry, Rejection)],
        not_images=not_images,
        num_files=len({header.source for header in headers}) + len(not_images),
    )
    if not plan.exams:
        raise InputError(nothing_taken(path, [*plan.rejections, *plan.not_images]))
    return plan


def local_input(input_path: str | Path) -> Path:
    """The path of an input. Raises InputError for the URL of an object store."""
    return stores.local_path(
        input_path, "--input", "copy scans here first, or fetch a dataset with python -m data_prep.fetch"
    )


def read_scan(
    input_dir: Path,
    exam: Sequence[SeriesCandidate],
    windows: Sequence[tuple[float, float]],
    image_size: int,
    rules: Rules | None = None,
    key: bytes = b"",
) -> Scan | Refused:
    """Reads the pixels of an exam: its first candidate that becomes a volume. One volume is in memory at a time.

    Args:
      input_dir: of the plan.
      exam: an exam of the plan.
      windows: (level, width) in HU, a channel each.
      image_size: height and width of the slices in pixels.
      rules: those of the plan.
      key: of the pseudonyms; the empty key makes names that can be traced back, which must not be published.

    Returns:
      The scan, or why the preferred candidate was refused where none becomes a volume.

    Raises:
      OSError: the input went away.
    """
    refused = None
    for candidate in exam:
        volume_id = conversion.volume_id(key, candidate)
        volume = _load(input_dir, candidate, rules or Rules())
        if isinstance(volume, Volume):
            images = prepare_images(volume.hu, volume.pixel_spacing_mm, windows, image_size)
            patient_id = deidentify.patient_pseudonym(key, candidate.patient_key)
            return Scan(volume_id, patient_id, images, volume.position_mm, volume)
        if volume.reason == FAILED_FOR_NOW:  # the preferred reconstruction keeps its turn
            return Refused(volume_id, volume.reason, volume.detail)
        refused = refused or Refused(volume_id, volume.reason, volume.detail)
    return refused


def prepare_images(
    hu: np.ndarray, pixel_spacing_mm: tuple[float, float], windows: Sequence[tuple[float, float]], image_size: int
) -> np.ndarray:
    """Resized and windowed slices of a canonically oriented volume: HU [S, H, W] -> [S, size, size, C] uint8."""
    images = np.empty((len(hu), image_size, image_size, len(windows)), np.uint8)
    for image, out in zip(hu, images, strict=True):
        out[:] = window_to_uint8(resize_slice(image, pixel_spacing_mm, image_size), windows)
    return images


def of_scan(scan: Scan) -> PreparedVolume:
    """A scan without its HU and headers."""
    volume = scan.volume
    gaps = np.flatnonzero(~volume.pair_valid[:-1]).tolist()
    box = conversion.lung_box(volume.chest, volume.hu.shape[1:], volume.pixel_spacing_mm, scan.images.shape[1])
    return PreparedVolume(scan.images, gaps, box)


def refused_series(plan: ScanPlan, key: bytes = b"") -> list[Refused]:
    """The series that the headers refuse."""
    rows = [conversion.rejected_row(key, rejection) for rejection in plan.rejections]
    return [Refused(row.series_id, row.reason, row.detail) for row in rows]


def nothing_taken(input_path: str | Path, refused: Sequence[Refused | Rejection | NotAnImage | Unreadable]) -> str:
    """One line for an input of which nothing is taken: the reasons with counts, and the flag that takes more.

    A single series is explained by itself, files that are no images beside it being no reason."""
    series = [entry for entry in refused if isinstance(entry, Refused | Rejection)]
    counts = collections.Counter(entry.reason for entry in series or refused)
    remedies = [_REMEDIES[reason] for reason, _ in counts.most_common() if reason in _REMEDIES]
    remedy = f"; {', or '.join(remedies) or 'give another scan'}"
    if len(series or refused) == 1:
        (only,) = series or refused
        detail = f" ({only.detail})" if only.detail else ""
        return f"--input={input_path}: {explain(only.reason)}{detail}{remedy}"
    what = "series" if series else "files"
    found = ", ".join(f"{number} {what} {reason}: {explain(reason)}" for reason, number in counts.most_common())
    return f"--input={input_path} holds no usable CT volume ({found or 'no files'}){remedy}"


def explain(reason: str) -> str:
    """A reason in words, without a full stop."""
    return (REASONS | conversion.REASONS)[reason].rstrip(".")


def _kind(path: Path, archive: str) -> str:
    if archive not in ARCHIVES:
        raise InputError(f"--archive={archive}: choose one of {', '.join(ARCHIVES)}")
    if not path.exists():
        raise InputError(f"--input={path}: no such file or directory; give a scan, or a folder of scans")
    if archive != "auto":
        return archive
    return "nifti" if path.name.lower().endswith((".nii", ".nii.gz")) else "dicom"


def _list_input(path: Path) -> Iterator[Source | Unreadable]:
    """Every file of an input, as `list_sources` lists a directory."""
    if path.is_dir():
        yield from list_sources(path)
        return
    source = Source(path.name, "", path.stat().st_size)
    if archives.is_zip(str(path)):
        yield from archives.zip_members(str(path), source)
    else:
        yield source


def _read_headers(input_dir: Path, entries: list, read: planning.ReadHeader, num_workers: int) -> Iterator:
    """The headers of all files; in processes, as far as it is worth starting them."""
    chunks = [tuple(entries[i : i + _SOURCES_PER_TASK]) for i in range(0, len(entries), _SOURCES_PER_TASK)]
    if num_workers == 0 or len(chunks) < 8:
        for chunk in chunks:
            yield from planning.read_headers(input_dir, chunk, read)
        return
    tasks = [(input_dir, chunk, read) for chunk in chunks]
    with WorkerPool(num_workers) as pool, Progress("reading headers", "files", len(entries)) as progress:
        for (_, chunk, _), found in pool.run(planning.read_headers, tasks):
            if isinstance(found, WorkerDied):
                found = planning.read_headers_one_by_one(input_dir, chunk, read)
            yield from found
            progress.advance(len(chunk))


def _load(input_dir: Path, candidate: SeriesCandidate, rules: Rules) -> Volume | Rejection:
    """`load_volume`, whatever happens to one exam in a million, as `data_prep.conversion` has it."""

    def rejection(reason: str, detail: str) -> Rejection:
        return Rejection(candidate.series_key, candidate.all_headers, reason, detail)

    try:
        return load_volume(input_dir, candidate, rules)
    except OSError as error:
        if not Path(input_dir).is_dir():
            raise OSError(f"{input_dir}: the input went away; run again to continue") from None
        if error.errno is None:  # not from the disk: what the file holds
            return rejection("unreadable", "damaged")
        return rejection(FAILED_FOR_NOW, error.strerror or "")
    except MemoryError:
        return rejection(FAILED_FOR_NOW, "out of memory")
    except Exception as error:
        return rejection("conversion_crashed", type(error).__name__)
