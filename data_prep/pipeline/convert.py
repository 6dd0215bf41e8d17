"""One exam: pixels -> HU -> windowed slices in a staged file, with a note on each of its files.

Worker processes run this. A finished exam leaves `<key>.json` in the private work directory and, if
one of its candidates was taken, `<key>.array_record` in the other one. The note is written last,
whole or not at all, so that its presence means "done". The key covers the files with their sizes
and all options: files of an earlier run are used only if this run would write the same.
"""

import base64
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_prep.dataset.schema import MASK_AREA_COLUMN
from data_prep.dataset.storage import encode_record, write_records
from data_prep.labels.lookup import VolumeLabels
from data_prep.pipeline.notes import Conversion, ExamNote, exam_key, records_path, write_note
from data_prep.privacy.pseudonyms import (
    exam_id,
    patient_pseudonym,
    pixel_digests,
    public_fields,
    public_number,
    rejected,
    slice_id,
    sources_of,
    volume_id,
)
from data_prep.scan.loading import load_exam
from data_prep.scan.reasons import FAILED_FOR_NOW
from data_prep.scan.series import Rejection, SeriesCandidate
from data_prep.scan.volume import Volume
from data_prep.scan.window import lung_box, resize_mask, resize_slice, window_to_uint8
from data_prep.system.pages import jpeg_thumbnail

# half the time of the shards' zstd-1 for a fifth more space
_STAGING_OPTIONS = "group_size:1,snappy"


def convert_exam(conversion: Conversion, exam: list[SeriesCandidate]) -> str:
    """Stages the first candidate of an exam that becomes a volume, and notes the outcome of all.

    If a candidate fails for now, the whole exam is left for the next run.

    Returns:
        `ExamNote.refusal`: "", or why there is no volume.

    Raises:
        OSError: the archive went away, or the output can't be written.
    """
    key = exam_key(conversion, exam)
    labels = conversion.labels
    loaded = load_exam(conversion.input_dir, exam, conversion.rules, labels.fault, labels.labels_of)
    rejections, facts, record_bytes = loaded.rejections, None, 0
    if loaded.failed_for_now:
        rejections = [
            candidate.rejected(FAILED_FOR_NOW, loaded.failed_for_now.detail) for candidate in exam
        ]
    elif loaded.volume is not None:
        facts = _VolumeFacts(loaded.volume, loaded.labels, conversion)
        path = records_path(conversion.records_dir, key)
        records = _records(
            loaded.volume, loaded.labels, facts.row["volume_id"], conversion, facts.mask_areas
        )
        write_records(path, records, _STAGING_OPTIONS)
        record_bytes = path.stat().st_size
    note = _note(conversion, exam, facts, record_bytes, rejections)
    write_note(conversion, note)
    return note.refusal


def note_of_crash(conversion: Conversion, exam: list[SeriesCandidate]) -> ExamNote:
    """The note of an exam whose conversion killed its worker."""
    rejections = [
        candidate.rejected(FAILED_FOR_NOW, "the worker process died") for candidate in exam
    ]
    return _note(conversion, exam, None, 0, rejections)


class _VolumeFacts:
    """The part of a volume that stays when its pixels are gone."""

    def __init__(self, volume: Volume, labels: VolumeLabels, conversion: Conversion):
        self.candidate = volume.candidate
        self.row = _row(volume, conversion)
        self.taken = sources_of(volume.headers)
        self.reasons = {header.source: reason for header, reason in volume.dropped}
        self.slices = {
            slice_id(conversion.key, header): reason for header, reason in volume.dropped
        }
        self.slices |= {slice_id(conversion.key, header): "" for header in volume.headers}
        self.pixels = pixel_digests(conversion.key, volume.hu)
        self.labels = labels._replace(mask=None)
        # filled as the records are written; None: the mask is unknown
        self.mask_areas: list[int | None] = []

    def label_note(self) -> dict[str, Any]:
        """The volume's part of the tables of labels and regions; {} if the dataset lacks them.

        `slices`: {column of slices.csv: [S]}, `volume`: {column of labels.csv: class}, `regions`:
        rows of regions.csv.
        """
        names = self.labels.slices[0]
        slices = {name: [row[name] for row in self.labels.slices] for name in names}
        if self.mask_areas:
            slices = {MASK_AREA_COLUMN: self.mask_areas} | slices
        if not (slices or self.labels.volume):
            return {}
        return {"slices": slices, "volume": self.labels.volume, "regions": self.labels.regions}


def _row(volume: Volume, conversion: Conversion) -> dict[str, Any]:
    candidate, chest = volume.candidate, volume.chest
    gaps = np.flatnonzero(~volume.pair_valid[:-1])
    return {
        "volume_id": volume_id(conversion.key, candidate),
        "patient_id": patient_pseudonym(conversion.key, candidate.patient_key),
        "exam_id": exam_id(conversion.key, *candidate.exam_key),
        "num_slices": len(volume.hu),
        "source_rows": volume.hu.shape[1],
        "source_columns": volume.hu.shape[2],
        "pixel_spacing_row_mm": float(volume.pixel_spacing_mm[0]),
        "pixel_spacing_column_mm": float(volume.pixel_spacing_mm[1]),
        "slice_thickness_mm": public_number(float(volume.slice_thickness_mm), 0.01, 100),
        "slice_spacing_mm": float(volume.slice_spacing_mm),
        "gap_positions": " ".join(str(index) for index in gaps),
        "gantry_tilt_degrees": public_number(float(volume.gantry_tilt_degrees), -35, 35),
        **public_fields(volume.headers[0]),
        **_attributes(volume, conversion),
        "middle_slice": chest.middle_slice,
        "first_lung_slice": chest.first_lung_slice,
        "last_lung_slice": chest.last_lung_slice,
        "lung_box": lung_box(
            chest, volume.hu.shape[1:], volume.pixel_spacing_mm, conversion.image_size
        ),
        "notes": " ".join(volume.notes),
    }


def _attributes(volume: Volume, conversion: Conversion) -> dict[str, Any]:
    """The patient's row of the table of attributes, under the first Patient ID that it lists."""
    names = dict.fromkeys(header.patient_id for header in volume.candidate.all_headers)
    rows = (
        conversion.labels.attributes(name)
        for name in (*names, volume.candidate.patient_key)
        if name
    )
    return next((row for row in rows if row), {})


def _records(
    volume: Volume,
    labels: VolumeLabels,
    volume_id: str,
    conversion: Conversion,
    mask_areas: list[int | None],
) -> Iterator[bytes]:
    """The records of a volume. Appends the foreground of each mask, in pixels, to `mask_areas`."""
    unknown = np.zeros(2 * (conversion.image_size,), np.uint8)
    for index, hu in enumerate(volume.hu):
        mask = None
        if labels.mask is not None:
            mask = resize_mask(labels.mask[index], volume.pixel_spacing_mm, conversion.image_size)
            mask_areas.append(int(np.count_nonzero(mask)))
        elif conversion.labels.has_masks:
            mask = unknown
            mask_areas.append(None)
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
    exam: list[SeriesCandidate],
    facts: _VolumeFacts | None,
    record_bytes: int,
    rejections: list[Rejection],
) -> ExamNote:
    taken, dropped, row = [], [], None
    if facts is not None:
        taken = facts.taken
        rest = {header.source for header in facts.candidate.all_headers} - set(taken)
        dropped = [(source, facts.reasons[source]) for source in sorted(rest)]
        row = facts.row | {"num_files": len(taken), "num_dropped_files": len(dropped)}
    others = [candidate for candidate in exam if facts is None or candidate is not facts.candidate]
    refused = [
        dataclasses.replace(
            rejected(volume_id(conversion.key, candidate), entry), thumbnail=_jpeg_text(entry)
        )
        for candidate, entry in zip(others, rejections, strict=True)
    ]
    note = ExamNote(exam_key(conversion, exam), row, record_bytes, taken, dropped, refused)
    if facts is None:
        return note
    return dataclasses.replace(
        note, slices=facts.slices, labels=facts.label_note(), pixels=facts.pixels
    )


def _jpeg_text(rejection: Rejection) -> str:
    """The thumbnail of a rejection as JPEG in base64; "" if it has none."""
    if rejection.thumbnail is None:
        return ""
    return base64.b64encode(jpeg_thumbnail(rejection.thumbnail)).decode()
