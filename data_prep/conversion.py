"""One exam: pixels -> HU -> windowed slices in a staged file, with a note of what became of each of its files.

This is what worker processes run. A finished exam leaves `<key>.json` in the private work directory and, if one of its
candidates was taken, `<key>.array_record` in the other one; the note is written last and is there in full or not at
all, so that its presence means "done". The key covers the files with their sizes and all options: what an earlier run
left is used only if it would come out the same.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import dataset_writer, deidentify
from data_prep.anatomy import ChestSummary
from data_prep.archives import ArchiveDirectory, Source
from data_prep.dataset__schema import MASK_AREA_COLUMN
from data_prep.dataset__storage import encode_record, write_records
from data_prep.dicom import Header, Rejection, Rules, SeriesCandidate, Volume, load_volume
from data_prep.labels import Labels, NoMask, VolumeLabels
from data_prep.window import resize_box, resize_mask, resize_slice, window_to_uint8

_STAGING_OPTIONS = "group_size:1,snappy"  # half the time of the shards' zstd-1 for a fifth more space

FAILED_FOR_NOW = "failed_for_now"  # the one reason that is not final: the next run tries again

# Reasons that arise here, beside `data_prep.dicom.REASONS`.
REASONS = {
    "conversion_crashed": "The conversion failed in an unforeseen way; please report it.",
    FAILED_FOR_NOW: "Reading failed (disk, memory, network) or the worker was killed; run again to retry.",
    "series_changed": "Files came to a series that is in the dataset already; only a new dataset takes them.",
}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What every exam of a run is converted with."""

    input_dir: ArchiveDirectory
    notes_dir: Path  # private: notes name source files
    records_dir: Path
    rules: Rules
    windows: tuple[tuple[float, float], ...]  # (level, width) in HU, one a channel
    image_size: int
    key: bytes = dataclasses.field(repr=False)  # of the pseudonyms
    labels: Labels
    options_digest: str = ""


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A row of rejected.csv with the files that it stands for."""

    series_id: str
    reason: str
    detail: str
    sources: list[Source]


@dataclasses.dataclass(frozen=True)
class ExamNote:
    """What became of an exam."""

    key: str
    volume: dict[str, Any] | None  # row of volumes.csv but for split and first_record; None: nothing was taken
    record_bytes: int
    taken: list[Source]
    dropped: list[tuple[Source, str]]  # files of the taken series that are not in the volume, with reasons
    rejected: list[Rejected]
    slices: dict[str, str] = dataclasses.field(default_factory=dict)  # of the volume: `slice_id` -> "" or why dropped
    labels: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the volume: see `_VolumeFacts.label_note`

    @property
    def failed_for_now(self) -> bool:
        return any(series.reason == FAILED_FOR_NOW for series in self.rejected)


def slice_id(key: bytes, header: Header) -> str:
    """Names a slice wherever its file lies: in a renamed folder, in a zip file."""
    parts = (header.series_instance_uid, header.sop_instance_uid, str(header.frame), repr(header.position))
    return deidentify.private_digest(key, "slice", *parts)


def exam_key(conversion: Conversion, exam: list[SeriesCandidate]) -> str:
    """Names the outcome of an exam."""
    files = [
        [candidate.series_key, [(*header.source, header.frame) for header in candidate.all_headers]]
        for candidate in exam
    ]
    content = json.dumps([exam[0].exam_key, files, [conversion.labels.version(candidate) for candidate in exam]])
    return deidentify.private_digest(conversion.key, conversion.options_digest, content)


def note_path(conversion: Conversion, key: str) -> Path:
    return conversion.notes_dir / f"{key}.json"


def records_path(records_dir: Path, key: str) -> Path:
    return records_dir / f"{key}.array_record"


def read_note(path: Path) -> ExamNote:
    fields = json.loads(path.read_text())
    return ExamNote(
        key=fields["key"],
        volume=fields["volume"],
        record_bytes=fields["record_bytes"],
        taken=[Source(*source) for source in fields["taken"]],
        dropped=[(Source(*source), reason) for source, reason in fields["dropped"]],
        rejected=[
            Rejected(row["series_id"], row["reason"], row["detail"], [Source(*s) for s in row["sources"]])
            for row in fields["rejected"]
        ],
        slices=fields["slices"],
        labels=fields["labels"],
    )


def write_note(conversion: Conversion, note: ExamNote) -> None:
    dataset_writer.write_file(note_path(conversion, note.key), json.dumps(dataclasses.asdict(note)).encode())


def convert_exam(conversion: Conversion, exam: list[SeriesCandidate]) -> None:
    """Tries the candidates of an exam in order and stages the first that becomes a volume.

    Where one fails for now, the whole exam is left for the next run: the preferred reconstruction keeps its turn.

    Raises:
        OSError: the archive went away, or the output can't be written.
    """
    key = exam_key(conversion, exam)
    outcome: list[tuple[SeriesCandidate, str, str]] = []  # rejections
    volume, record_bytes = None, 0
    for candidate in exam:
        if volume is not None:
            outcome.append((candidate, "other_reconstruction", ""))
            continue
        fault = conversion.labels.fault(candidate)
        if fault is not None:
            outcome.append((candidate, *fault))
            continue
        loaded = _load(conversion, candidate)
        if isinstance(loaded, Rejection) and loaded.reason == FAILED_FOR_NOW:
            outcome = [(candidate, FAILED_FOR_NOW, loaded.detail) for candidate in exam]
            break
        if isinstance(loaded, Rejection):
            outcome.append((candidate, loaded.reason, loaded.detail))
            continue
        volume = _VolumeFacts(candidate, *loaded, conversion)
        path = records_path(conversion.records_dir, key)
        records = _records(*loaded, volume.row["volume_id"], conversion, volume.mask_areas)
        write_records(path, records, _STAGING_OPTIONS)
        record_bytes = path.stat().st_size
        del loaded, records
    write_note(conversion, _note(conversion, key, volume, record_bytes, outcome))


def note_of_crash(conversion: Conversion, exam: list[SeriesCandidate]) -> ExamNote:
    """For an exam whose conversion killed its worker."""
    outcome = [(candidate, FAILED_FOR_NOW, "the worker process died") for candidate in exam]
    return _note(conversion, exam_key(conversion, exam), None, 0, outcome)


def volume_id(key: bytes, candidate: SeriesCandidate) -> str:
    return deidentify.series_pseudonym(key, *candidate.exam_key, candidate.series_key)


def exam_id(key: bytes, patient_key: str, study_uid: str) -> str:
    return deidentify.series_pseudonym(key, patient_key, study_uid, "")


def rejected_row(key: bytes, rejection: Rejection) -> Rejected:
    """A rejection that was made from the headers."""
    first = rejection.headers[0]
    series_id = deidentify.series_pseudonym(key, first.patient_key, first.study_instance_uid, rejection.series_key)
    return Rejected(series_id, rejection.reason, rejection.detail, sources_of(rejection.headers))


def _load(conversion: Conversion, candidate: SeriesCandidate) -> tuple[Volume, VolumeLabels] | Rejection:
    try:
        volume = load_volume(conversion.input_dir, candidate, conversion.rules)
        if isinstance(volume, Rejection):
            return volume
        labels = conversion.labels.of_volume(volume)
        if isinstance(labels, NoMask):
            return Rejection(candidate.series_key, candidate.all_headers, *labels)
        return volume, labels
    except OSError as error:
        if not conversion.input_dir.is_dir():
            raise OSError(f"{conversion.input_dir}: the archive went away; run again to continue") from None
        if error.errno is None:  # not from the disk: what the file holds
            return Rejection(candidate.series_key, candidate.all_headers, "unreadable", "damaged")
        return Rejection(candidate.series_key, candidate.all_headers, FAILED_FOR_NOW, error.strerror or "")
    except MemoryError:
        return Rejection(candidate.series_key, candidate.all_headers, FAILED_FOR_NOW, "out of memory")
    except Exception as error:  # one odd exam in a million must not end the run; it is reported by name
        detail = type(error).__name__
        return Rejection(candidate.series_key, candidate.all_headers, "conversion_crashed", detail)


class _VolumeFacts:
    """The part of a volume that stays when its pixels are gone."""

    def __init__(self, candidate: SeriesCandidate, volume: Volume, labels: VolumeLabels, conversion: Conversion):
        self.candidate = candidate
        self.row = _row(candidate, volume, conversion)
        self.taken = sources_of(volume.headers)
        self.reasons = {header.source: reason for header, reason in volume.dropped}
        self.slices = {slice_id(conversion.key, header): reason for header, reason in volume.dropped}
        self.slices |= {slice_id(conversion.key, header): "" for header in volume.headers}
        self.labels = labels._replace(mask=None)
        self.mask_areas: list[int] = []  # filled as the records are written

    def label_note(self) -> dict[str, Any]:
        """What the tables of labels and regions say of the volume; {} if the dataset has none.

        `slices`: {column of slices.csv: [S]}, `volume`: {column of labels.csv: class}, `regions`: rows of regions.csv.
        """
        names = self.labels.slices[0]
        slices = {name: [row[name] for row in self.labels.slices] for name in names}
        if self.mask_areas:
            slices = {MASK_AREA_COLUMN: self.mask_areas} | slices
        if not (slices or self.labels.volume):
            return {}
        return {"slices": slices, "volume": self.labels.volume, "regions": self.labels.regions}


def _row(candidate: SeriesCandidate, volume: Volume, conversion: Conversion) -> dict[str, Any]:
    chest = volume.chest
    gaps = np.flatnonzero(~volume.pair_valid[:-1])
    return {
        "volume_id": volume_id(conversion.key, candidate),
        "patient_id": deidentify.patient_pseudonym(conversion.key, candidate.patient_key),
        "exam_id": exam_id(conversion.key, *candidate.exam_key),
        "num_slices": len(volume.hu),
        "source_rows": volume.hu.shape[1],
        "source_columns": volume.hu.shape[2],
        "pixel_spacing_row_mm": float(volume.pixel_spacing_mm[0]),
        "pixel_spacing_column_mm": float(volume.pixel_spacing_mm[1]),
        "slice_thickness_mm": float(volume.slice_thickness_mm),
        "slice_spacing_mm": float(volume.slice_spacing_mm),
        "gap_positions": " ".join(str(index) for index in gaps),
        "gantry_tilt_degrees": float(volume.gantry_tilt_degrees),
        **deidentify.public_fields(volume.headers[0]),
        **conversion.labels.attributes(volume.headers[0].patient_id),
        "middle_slice": chest.middle_slice,
        "first_lung_slice": chest.first_lung_slice,
        "last_lung_slice": chest.last_lung_slice,
        "lung_box": lung_box(chest, volume.hu.shape[1:], volume.pixel_spacing_mm, conversion.image_size),
        "notes": " ".join(volume.notes),
    }


def lung_box(
    chest: ChestSummary, shape: tuple[int, int], pixel_spacing_mm: tuple[float, float], image_size: int
) -> str:
    """Top, left, bottom and right of the lungs in pixels of the resized image (the last two not included), or ""."""
    if chest.lung_box is None:
        return ""
    top, bottom, left, right = resize_box(chest.lung_box, shape, pixel_spacing_mm, image_size)
    return f"{top} {left} {bottom} {right}"


def _records(
    volume: Volume, labels: VolumeLabels, volume_id: str, conversion: Conversion, mask_areas: list[int]
) -> Iterator[bytes]:
    """Appends the foreground of each mask to `mask_areas`."""
    for index, hu in enumerate(volume.hu):
        mask = None
        if labels.mask is not None:
            mask = resize_mask(labels.mask[index], volume.pixel_spacing_mm, conversion.image_size)
            mask_areas.append(int(np.count_nonzero(mask)))
        hu = resize_slice(hu, volume.pixel_spacing_mm, conversion.image_size)
        yield encode_record(
            window_to_uint8(hu, conversion.windows),
            volume_id,
            index,
            float(volume.position_mm[index]),
            bool(volume.pair_valid[index]),
            mask,
        )


def _note(
    conversion: Conversion,
    key: str,
    volume: _VolumeFacts | None,
    record_bytes: int,
    outcome: list[tuple[SeriesCandidate, str, str]],
) -> ExamNote:
    taken, dropped, row = [], [], None
    if volume is not None:
        taken = volume.taken
        rest = {header.source for header in volume.candidate.all_headers} - set(taken)
        dropped = [(source, volume.reasons[source]) for source in sorted(rest)]
        row = volume.row | {"num_files": len(taken), "num_dropped_files": len(dropped)}
    rejected = [
        Rejected(volume_id(conversion.key, candidate), reason, detail, sources_of(candidate.all_headers))
        for candidate, reason, detail in outcome
    ]
    slices, labels = (volume.slices, volume.label_note()) if volume else ({}, {})
    return ExamNote(key, row, record_bytes, taken, dropped, rejected, slices, labels)


def sources_of(headers: Iterable[Header]) -> list[Source]:
    """The files of some headers; a multi-frame file has many headers."""
    return sorted({header.source for header in headers})
