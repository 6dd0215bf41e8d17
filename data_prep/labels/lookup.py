"""Labels, mask and attributes of a volume, looked up by the workers in the tables that
`data_prep.labels.staging` staged.

    labels.fault(candidate)        # None, or a Rejection: the candidate cannot have its mask
    labels.labels_of(volume)       # VolumeLabels or Rejection

A label keeps the level of its key: a slice (SOP Instance UID), a volume or a patient. A label that
the tables lack stays missing. Masks come from LIDC-IDRI's readers or from the files of a folder. A
series that LIDC-IDRI's readers have not read is rejected. A scan without a mask file is taken, and
its mask is unknown, unless masks are required: an unread scan may or may not have nodules.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pickle
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.labels import lidc
from data_prep.labels import tables as label_tables
from data_prep.masks.grid import MAX_REGIONS, MaskError
from data_prep.masks.reading import read_masks
from data_prep.scan.geometry import canonical_axes, orient
from data_prep.scan.headers import Header
from data_prep.scan.nifti_metadata import volume_name, without_extension
from data_prep.scan.series import Rejection, SeriesCandidate
from data_prep.scan.volume import Volume
from data_prep.system.files import file_sha256


@dataclasses.dataclass(frozen=True)
class LabelSources:
    """The files and settings of labels, masks and attributes."""

    archive: str = "dicom"
    labels_csv: tuple[Path, ...] = ()
    attributes_csv: Path | None = None
    metadata_csv: Path | None = None  # of a NIfTI archive (`data_prep.scan.nifti_metadata`)
    masks_dir: Path | None = None
    require_masks: bool = False  # refuse scans without a mask in `masks_dir`
    annotations_dir: Path | None = None  # XML of LIDC-IDRI; None: among the scans
    consensus: float = lidc.CONSENSUS
    min_area_px: int = lidc.MIN_AREA_PX

    def mask_facts(self) -> dict[str, Any] | None:
        """`masks` of preparation.json."""
        if self.archive == "lidc_idri":
            return {
                "source": "lidc_idri",
                "consensus": self.consensus,
                "min_area_px": self.min_area_px,
            }
        required = {"required": True} if self.require_masks else {}
        return {"source": "masks_dir", **required} if self.masks_dir else None


class VolumeLabels(NamedTuple):
    """Labels, mask and regions of a volume."""

    slices: list[dict[str, int | None]]  # for each slice: class of each slice label
    volume: dict[str, int | None]  # class of each label of volume or patient
    # [S, H, W] uint8 at the source matrix, canonical orientation; None: unknown
    mask: np.ndarray | None
    regions: list[dict[str, Any]]  # rows of regions.csv but for `volume_id`


class TableSpec(NamedTuple):
    """A staged table."""

    key: str
    level: str
    labels: tuple[str, ...]
    classes: tuple[tuple[str, ...], ...]  # of each label


@dataclasses.dataclass(frozen=True)
class Labels:
    """The staged tables. Small, and the same in every worker."""

    database: Path
    tables: tuple[TableSpec, ...]
    sources: LabelSources
    masks: Mapping[str, tuple[Path, ...]]
    counts: Mapping[str, Any]

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """`labels` of preparation.json: level and classes of each label."""
        return {
            name: {"level": table.level, "classes": list(classes)}
            for table in self.tables
            for name, classes in zip(table.labels, table.classes, strict=True)
        }

    @property
    def has_masks(self) -> bool:
        """Whether the dataset gets masks."""
        return self.sources.mask_facts() is not None

    def attributes(self, patient_id: str) -> dict[str, Any]:
        """The attributes of a patient in the table; they replace the attributes in headers."""
        row = _select(self.database, "SELECT cells FROM attributes WHERE key = ?", patient_id)
        return json.loads(row[0]) if row else {}

    def version(self, candidate: SeriesCandidate) -> str:
        """A digest of the annotation or mask of a series; "" if it is missing."""
        if self.sources.archive == "lidc_idri":
            reading = self._reading(candidate)
            return hashlib.sha256(repr(_plain(reading)).encode()).hexdigest() if reading else ""
        paths = self._mask_paths(candidate.headers[0]) if self.has_masks else ()
        return " ".join(map(file_sha256, paths))

    def fault(self, candidate: SeriesCandidate) -> Rejection | None:
        """The reason why a series cannot have its mask, as far as headers tell; None: it may."""
        if self.sources.archive == "lidc_idri":
            reading = self._reading(candidate)
            if reading is None:
                return candidate.rejected("no_annotation", "")
            strange = {c.sop_instance_uid for c in reading.contours}
            strange -= _numbers_of_instances(candidate).keys()
            if not strange:
                return None
            return candidate.rejected("annotation_mismatch", f"{len(strange)} unknown slices")
        if self.sources.require_masks and not self._mask_paths(candidate.headers[0]):
            return candidate.rejected("no_annotation", "")
        return None

    def labels_of(self, volume: Volume) -> VolumeLabels | Rejection:
        """Labels and mask of a loaded volume.

        Raises:
            OSError: a mask cannot be read.
        """
        slices: list[dict[str, int | None]] = [{} for _ in volume.headers]
        whole_volume: dict[str, int | None] = {}
        for number, table in enumerate(self.tables):
            if table.level == "slice":
                for header, classes in zip(volume.headers, slices, strict=True):
                    classes |= self._row(number, table, header)
            elif table.level == "patient":
                whole_volume |= self._patient_row(number, table, volume)
            else:
                whole_volume |= self._row(number, table, volume.headers[0])
        mask, regions = None, []
        if self.sources.archive == "lidc_idri" or self._mask_paths(volume.headers[0]):
            painted = (
                self._lidc_mask(volume)
                if self.sources.archive == "lidc_idri"
                else self._file_mask(volume)
            )
            if isinstance(painted, Rejection):
                return painted
            mask, findings = painted
            regions = [row | findings.get(row["region"], {}) for row in region_rows(mask, volume)]
        return VolumeLabels(slices, whole_volume, mask, regions)

    def _patient_row(self, number: int, table: TableSpec, volume: Volume) -> dict[str, int | None]:
        """The labels of the patient under any Patient ID of the stack; two rows that differ label
        none."""
        by_id = {header.patient_id: header for header in volume.candidate.all_headers}
        missing = self._row(number, table, None)
        rows = [self._row(number, table, header) for header in by_id.values()]
        known = [row for n, row in enumerate(rows) if row != missing and row not in rows[:n]]
        return known[0] if len(known) == 1 else missing

    def _row(self, number: int, table: TableSpec, header: Header | None) -> dict[str, int | None]:
        key = header_key(header, table.key) if header else ""
        row = _select(
            self.database, "SELECT cells FROM labels WHERE number = ? AND key = ?", number, key
        )
        cells = json.loads(row[0]) if row else [""] * len(table.labels)
        values = zip(table.labels, cells, table.classes, strict=True)
        return {name: label_tables.class_index(cell, classes) for name, cell, classes in values}

    def _reading(self, candidate: SeriesCandidate) -> lidc.Reading | None:
        uid = candidate.headers[0].series_instance_uid
        row = _select(self.database, "SELECT reading FROM annotations WHERE key = ?", uid)
        return pickle.loads(row[0]) if row else None

    def _mask_paths(self, header: Header) -> tuple[Path, ...]:
        keys = {header.series_instance_uid, volume_name(header.source)} - {""}
        return tuple(sorted(path for key in keys for path in self.masks.get(key, ())))

    def _lidc_mask(
        self, volume: Volume
    ) -> tuple[np.ndarray, dict[int, dict[str, Any]]] | Rejection:
        candidate = volume.candidate
        first = volume.headers[0]
        shape = (first.rows, first.columns)
        numbers = _numbers_of_instances(candidate)
        try:
            nodules = lidc.consensus_nodules(
                self._reading(candidate),
                numbers,
                shape,
                candidate.slice_thickness_mm,
                consensus=self.sources.consensus,
                min_area_px=self.sources.min_area_px,
            )
        except lidc.ContourOutside:
            return candidate.rejected("annotation_mismatch", "outside")
        except lidc.LidcError:
            return candidate.rejected("annotation_mismatch", "other slices")
        if len(nodules) > MAX_REGIONS:
            return candidate.rejected(
                "annotation_mismatch", f"{len(nodules)} nodules, at most {MAX_REGIONS}"
            )
        mask = np.zeros(volume.hu.shape, np.uint8)
        for index, header in enumerate(volume.headers):
            source = np.zeros(shape, np.uint8)
            # Where two overlap, the first stays.
            for region, nodule in reversed(list(enumerate(nodules, start=1))):
                source[lidc.slice_mask([nodule], numbers[header.sop_instance_uid], shape)] = region
            mask[index] = orient(source, canonical_axes(header.orientation))
        return mask, {
            region: {"malignancy": nodule.malignancy, "num_readers": nodule.num_readers}
            for region, nodule in enumerate(nodules, start=1)
        }

    def _file_mask(
        self, volume: Volume
    ) -> tuple[np.ndarray, dict[int, dict[str, Any]]] | Rejection:
        candidate = volume.candidate
        try:
            mask = read_masks(self._mask_paths(volume.headers[0]), volume)
        except MaskError as error:
            return candidate.rejected("mask_mismatch", str(error))
        if mask.shape != volume.hu.shape or mask.dtype != np.uint8:
            return candidate.rejected("mask_mismatch", f"{mask.dtype} {list(mask.shape)}")
        return mask, {}


def region_rows(mask: np.ndarray, volume: Volume) -> list[dict[str, Any]]:
    """`region`, `first_slice`, `last_slice`, `volume_mm3` and `diameter_mm` of the regions of
    `mask` [S, H, W] at the source matrix. A region that others cover wholly is left out."""
    voxel_mm3 = math.prod(volume.pixel_spacing_mm) * volume.slice_spacing_mm
    # [S, 256]
    areas = np.stack([np.bincount(image.reshape(-1), minlength=MAX_REGIONS + 1) for image in mask])
    rows = []
    for region in 1 + np.flatnonzero(areas[:, 1:].sum(axis=0)):
        slices = np.flatnonzero(areas[:, region])
        mm3 = float(areas[:, region].sum() * voxel_mm3)
        rows.append(
            {
                "region": int(region),
                "first_slice": int(slices[0]),
                "last_slice": int(slices[-1]),
                "volume_mm3": mm3,
                "diameter_mm": (6 * mm3 / math.pi) ** (1 / 3),
            }
        )
    return rows


def header_key(header: Header, key: str) -> str:
    """The key of this image in a table with the key column `key`, or ""."""
    if key == "VolumeName":
        return volume_name(header.source)
    fields = {
        "SOPInstanceUID": header.sop_instance_uid,
        "SeriesInstanceUID": header.series_instance_uid,
        "StudyInstanceUID": header.study_instance_uid,
        "PatientID": header.patient_id,
    }
    return fields[key]


def key_place(header: Header, key: str) -> str:
    """What the key of this image names: two images of one key and different places show that the
    key is no name.

    A copy of an image lies at its place in its study. The UID of a multi-frame file names many
    slices. A Series or Study Instance UID is of one
    patient. Any scan may be of a patient.
    """
    if key == "SOPInstanceUID":
        position = ",".join(f"{value:.2f}" for value in header.position or ())
        return f"{header.study_instance_uid} {header.frame} {position}"
    if key == "VolumeName":
        return without_extension(f"{header.source.path}/{header.source.member}")
    return "" if key == "PatientID" else header.patient_key


def _numbers_of_instances(candidate: SeriesCandidate) -> dict[str, int]:
    """Position in the planned stack of each SOP Instance UID, duplicates included."""
    return {
        header.sop_instance_uid: number
        for number, group in enumerate(candidate.groups)
        for header in group
    }


def _plain(node: Any) -> Any:
    """Nested tuples and lists without arrays, since `repr` shortens arrays."""
    if isinstance(node, np.ndarray):
        return node.tolist()
    return [_plain(item) for item in node] if isinstance(node, tuple) else node


def _select(database: Path, query: str, *values: Any) -> tuple | None:
    connection = _connection(database, database.stat().st_mtime_ns, os.getpid())
    return connection.execute(query, values).fetchone()


@functools.lru_cache(maxsize=2)
def _connection(database: Path, mtime_ns: int, process: int) -> sqlite3.Connection:
    """A read-only connection, opened once in each process."""
    return sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
