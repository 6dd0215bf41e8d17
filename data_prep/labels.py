"""Labels, masks and attributes of an archive: staged once in a private file, looked up by the workers.

    sources = LabelSources("rsna_pe", labels_csv=(...,))
    check(sources, input_dir)                       # columns, before anything else
    labels = stage(sources, input_dir, database)    # every row, before the headers are read
    counts = match(labels, headers)                 # against the archive, before the conversion
    found = labels.of_volume(volume)                # in a worker

A label keeps the level of its key: a slice (SOP Instance UID), a volume or a patient. What the archive has and the
tables lack is missing and stays so. Masks are those of LIDC-IDRI's readers or files of a folder; a series without one
is rejected, since an unread scan is no scan without nodules.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import posixpath
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep import label_tables, lidc, nifti_metadata, rsna_pe
from data_prep.geometry import canonical_axes, orient
from data_prep.headers import Header
from data_prep.label_tables import LabelError, Row, Spellings, Table
from data_prep.series import SeriesCandidate
from data_prep.volume import Volume

MAX_REGIONS = 255  # of a volume: a mask is uint8

# Reasons that arise here, beside `data_prep.dicom.REASONS`.
REASONS = {
    "no_annotation": "The series has no annotation or mask, so what it holds is unknown.",
    "annotation_mismatch": "The annotations are of other slices than the series has, or outside its images.",
    "mask_mismatch": "The mask does not fit the images.",
}
_VOLUME_NAME = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_MANY = 10_000


@dataclasses.dataclass(frozen=True)
class LabelSources:
    """Where labels, masks and attributes come from."""

    archive: str = "dicom"
    labels_csv: tuple[Path, ...] = ()
    attributes_csv: Path | None = None
    metadata_csv: Path | None = None  # of a NIfTI archive (`data_prep.nifti.read_metadata`)
    masks_dir: Path | None = None
    annotations_dir: Path | None = None  # XML of LIDC-IDRI; None: they lie among the scans
    consensus: float = lidc.CONSENSUS
    min_area_px: int = lidc.MIN_AREA_PX

    def mask_facts(self) -> dict[str, Any] | None:
        """`masks` of preparation.json."""
        if self.archive == "lidc_idri":
            return {"source": "lidc_idri", "consensus": self.consensus, "min_area_px": self.min_area_px}
        return {"source": "masks_dir"} if self.masks_dir else None


class NoMask(NamedTuple):
    """Why a series cannot have its mask; `reason` is a name of `REASONS`."""

    reason: str
    detail: str


class VolumeLabels(NamedTuple):
    """What labels and masks say of a volume."""

    slices: list[dict[str, int | None]]  # one a slice: class of each slice label
    volume: dict[str, int | None]  # class of each label of volume or patient
    mask: np.ndarray | None  # [S, H, W] uint8 at the source matrix, canonical orientation; None: the dataset has none
    regions: list[dict[str, Any]]  # rows of regions.csv but for `volume_id`


# ---- before anything else ----------------------------------------------------------------------------------


def check(sources: LabelSources, input_dir: Path) -> None:
    """Looks at flags and first lines only.

    Raises:
        LabelError: a file that is not there, lacks a column, or options that exclude each other.
    """
    if sources.archive == "lidc_idri" and sources.masks_dir:
        raise LabelError("--masks_dir and --archive=lidc_idri both give masks; leave one out (--archive=dicom)")
    if sources.annotations_dir and sources.archive != "lidc_idri":
        raise LabelError("--annotations_dir is of --archive=lidc_idri; add that or leave it out")
    if sources.annotations_dir and not sources.annotations_dir.exists():
        raise LabelError(f"--annotations_dir={sources.annotations_dir}: no such directory; give the folder of the XML")
    if sources.metadata_csv and sources.archive != "nifti":
        raise LabelError("--metadata_csv is of --archive=nifti; add that or leave it out")
    if not 0 < sources.consensus <= 1:
        raise LabelError(f"--consensus={sources.consensus:g}: give a share of the readers above 0, at most 1")
    if sources.min_area_px < 0:
        raise LabelError(f"--min_area_px={sources.min_area_px}: give a number of pixels, 0 or more")
    if sources.masks_dir and not sources.masks_dir.is_dir():
        raise LabelError(f"--masks_dir={sources.masks_dir}: no such directory; give the folder of the masks")
    if sources.attributes_csv:
        label_tables.check_attributes(sources.attributes_csv)
    if sources.metadata_csv:
        nifti_metadata.check(input_dir, sources.metadata_csv)
    tables = _tables(sources, input_dir)
    names = [name for table in tables for name in table.labels]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise LabelError(f"the label {twice[0]} is in two tables; rename a column or leave one table out")


def _tables(sources: LabelSources, input_dir: Path) -> list[Table]:
    tables = [label_tables.open_labels(path) for path in sources.labels_csv]
    if sources.archive == "rsna_pe":
        train_csv = rsna_pe.check_train_csv(input_dir)
        tables = [rsna_pe.slice_table(train_csv), rsna_pe.exam_table(train_csv), *tables]
    return tables


def input_digests(sources: LabelSources, input_dir: Path) -> tuple[tuple[str, str], ...]:
    """(option, SHA-256) of every table; annotations and masks are compared series by series (`Labels.version`)."""
    files = [("labels_csv", path) for path in sources.labels_csv]
    if sources.attributes_csv:
        files.append(("attributes_csv", sources.attributes_csv))
    if sources.metadata_csv:
        files.append(("metadata_csv", sources.metadata_csv))
    if sources.archive == "rsna_pe":
        files.insert(0, ("train.csv", input_dir / rsna_pe.TRAIN_FILE))
    digests = []
    for name, path in files:
        with open(path, "rb") as file:
            digests.append((name, hashlib.file_digest(file, "sha256").hexdigest()))
    return tuple(digests)


# ---- staging -----------------------------------------------------------------------------------------------


def stage(sources: LabelSources, input_dir: Path, database: Path, violations_csv: Path | None = None) -> "Labels":
    """Reads every table and annotation into `database` (private: it holds UIDs), which is made anew.

    Exams that break a rule of the RSNA labels go to `violations_csv`, their number by rule into `Labels.counts`.

    Raises:
        LabelError: a table that contradicts itself or holds what it can't; one line.
        OSError: a file cannot be read.
    """
    database.unlink(missing_ok=True)
    specs: list[TableSpec] = []
    counts: dict[str, Any] = {}
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA synchronous = OFF")  # a killed run makes it anew
        connection.execute("CREATE TABLE labels (number, key, cells, line, PRIMARY KEY (number, key)) WITHOUT ROWID")
        connection.execute("CREATE TABLE attributes (key PRIMARY KEY, cells) WITHOUT ROWID")
        connection.execute("CREATE TABLE annotations (key PRIMARY KEY, reading) WITHOUT ROWID")
        exams: dict[str, rsna_pe.Exam] = {}
        for number, table in enumerate(_tables(sources, input_dir)):
            if sources.archive == "rsna_pe" and number < 2:
                of_slices = number == 0
                rows = rsna_pe.read_train_csv(table.path, exams) if of_slices else _exam_rows(exams)
                _insert(connection, number, table, rows, None)
                classes = dict.fromkeys(table.labels, ("0", "1"))
            else:
                spellings = Spellings(table)
                _insert(connection, number, table, label_tables.read_label_rows(table), spellings)
                classes = spellings.classes()
            specs.append(TableSpec(table.key, table.level, table.labels, tuple(classes[n] for n in table.labels)))
        if sources.archive == "rsna_pe":
            counts["exams_with_inconsistent_labels"] = _write_violations(exams, violations_csv)
        if sources.attributes_csv:
            _insert_attributes(connection, sources.attributes_csv)
        if sources.archive == "lidc_idri":
            readings = lidc.read_readings(sources.annotations_dir or input_dir)
            rows = ((uid, pickle.dumps(reading)) for uid, reading in readings.items())
            connection.executemany("INSERT INTO annotations VALUES (?, ?)", rows)
        connection.commit()
    masks = _index_masks(sources.masks_dir) if sources.masks_dir else {}
    return Labels(database, tuple(specs), sources, masks, counts)


def _exam_rows(exams: Mapping[str, rsna_pe.Exam]) -> Iterator[Row]:
    return (rsna_pe.exam_row(study, exam) for study, exam in exams.items())


def _insert(
    connection: sqlite3.Connection, number: int, table: Table, rows: Iterable[Row], spellings: Spellings | None
) -> None:
    """A key that is there again must say the same."""
    rows = iter(rows)
    while some := list(itertools.islice(rows, _MANY)):
        for row in some if spellings else ():
            spellings.add(row)
        cells = [(number, row.key, json.dumps(row.values), row.line) for row in some]
        added = connection.executemany("INSERT OR IGNORE INTO labels VALUES (?, ?, ?, ?)", cells).rowcount
        if added == len(some):
            continue
        for _, key, values, line in cells:
            known = connection.execute("SELECT cells, line FROM labels WHERE number = ? AND key = ?", (number, key))
            other, first_line = known.fetchone()
            if other != values:
                raise LabelError(
                    f"{table.path}, line {line}: the {table.key} of line {first_line} with other labels; "
                    "leave one of the two rows out"
                )


def _insert_attributes(connection: sqlite3.Connection, path: Path) -> None:
    lines: dict[str, tuple[int, dict[str, Any]]] = {}
    for line, patient, attributes in label_tables.read_attributes(path):
        first_line, known = lines.setdefault(patient, (line, attributes))
        if known != attributes:
            raise LabelError(
                f"{path}, line {line}: the patient of line {first_line} with other attributes; leave one of them out"
            )
    rows = ((patient, json.dumps(attributes)) for patient, (_, attributes) in lines.items())
    connection.executemany("INSERT INTO attributes VALUES (?, ?)", rows)


def _write_violations(exams: Mapping[str, rsna_pe.Exam], path: Path | None) -> dict[str, int]:
    broken = [(study, rule) for study, exam in exams.items() for rule in rsna_pe.violations(exam)]
    if path is not None:
        lines = [f"{rsna_pe.STUDY},rule,explanation\n"]
        lines += [f'{study},{rule},"{rsna_pe.RULES[rule]}"\n' for study, rule in broken]
        path.write_text("".join(lines))
    rules = [rule for _, rule in broken]
    return {rule: rules.count(rule) for rule in rsna_pe.RULES if rule in rules}


def _index_masks(masks_dir: Path) -> dict[str, Path]:
    from data_prep import mask_files

    masks = mask_files.index_masks(masks_dir)
    if not masks:
        raise LabelError(f"--masks_dir={masks_dir}: no masks in it; give the folder of the DICOM-SEG or NIfTI files")
    return masks


# ---- lookup ------------------------------------------------------------------------------------------------


class TableSpec(NamedTuple):
    """A staged table."""

    key: str
    level: str
    labels: tuple[str, ...]
    classes: tuple[tuple[str, ...], ...]  # of each label


@dataclasses.dataclass(frozen=True)
class Labels:
    """What was staged; small, and the same in every worker."""

    database: Path
    tables: tuple[TableSpec, ...]
    sources: LabelSources
    masks: Mapping[str, Path]
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
        return self.sources.mask_facts() is not None

    def attributes(self, patient_id: str) -> dict[str, Any]:
        """What the table of attributes says of a patient; it goes before the headers."""
        row = _select(self.database, "SELECT cells FROM attributes WHERE key = ?", patient_id)
        return json.loads(row[0]) if row else {}

    def version(self, candidate: SeriesCandidate) -> str:
        """Tells the annotation or mask of a series from another one; "" if it has none."""
        if self.sources.archive == "lidc_idri":
            reading = self._reading(candidate)
            return hashlib.sha256(repr(_plain(reading)).encode()).hexdigest() if reading else ""
        path = self._mask_path(candidate.headers[0]) if self.has_masks else None
        if path is None:
            return ""
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def fault(self, candidate: SeriesCandidate) -> NoMask | None:
        """Why a series cannot have its mask, as far as headers tell."""
        if self.sources.archive == "lidc_idri":
            reading = self._reading(candidate)
            if reading is None:
                return NoMask("no_annotation", "")
            numbers = _numbers_of_instances(candidate)
            strange = {
                contour.sop_instance_uid
                for session in reading.sessions
                for nodule in session
                for contour in nodule.contours
            } - set(numbers)
            return NoMask("annotation_mismatch", f"{len(strange)} unknown slices") if strange else None
        if self.has_masks and self._mask_path(candidate.headers[0]) is None:
            return NoMask("no_annotation", "")
        return None

    def of_volume(self, volume: Volume) -> VolumeLabels | NoMask:
        """Labels and mask of a loaded volume.

        Raises:
            OSError: a mask cannot be read.
        """
        slices: list[dict[str, int | None]] = [{} for _ in volume.headers]
        of_volume: dict[str, int | None] = {}
        for number, table in enumerate(self.tables):
            if table.level == "slice":
                for header, found in zip(volume.headers, slices, strict=True):
                    found |= self._row(number, table, header)
            else:
                of_volume |= self._row(number, table, volume.headers[0])
        mask, regions = None, []
        if self.has_masks:
            painted = self._lidc_mask(volume) if self.sources.archive == "lidc_idri" else self._file_mask(volume)
            if isinstance(painted, NoMask):
                return painted
            mask, findings = painted
            regions = [row | findings.get(row["region"], {}) for row in region_rows(mask, volume)]
        return VolumeLabels(slices, of_volume, mask, regions)

    def _row(self, number: int, table: TableSpec, header: Header) -> dict[str, int | None]:
        key = header_key(header, table.key)
        row = _select(self.database, "SELECT cells FROM labels WHERE number = ? AND key = ?", number, key)
        cells = json.loads(row[0]) if row else [""] * len(table.labels)
        values = zip(table.labels, cells, table.classes, strict=True)
        return {name: label_tables.class_index(cell, classes) for name, cell, classes in values}

    def _reading(self, candidate: SeriesCandidate) -> lidc.Reading | None:
        uid = candidate.headers[0].series_instance_uid
        row = _select(self.database, "SELECT reading FROM annotations WHERE key = ?", uid)
        return pickle.loads(row[0]) if row else None

    def _mask_path(self, header: Header) -> Path | None:
        keys = (header.series_instance_uid, volume_name(header))
        return next((self.masks[key] for key in keys if key in self.masks), None)

    def _lidc_mask(self, volume: Volume) -> tuple[np.ndarray, dict[int, dict[str, Any]]] | NoMask:
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
        except lidc.LidcError as error:
            return NoMask("annotation_mismatch", "outside" if "leaves the image" in str(error) else "other slices")
        if len(nodules) > MAX_REGIONS:
            return NoMask("annotation_mismatch", f"{len(nodules)} nodules, at most {MAX_REGIONS}")
        axes = canonical_axes(first.orientation)
        mask = np.zeros(volume.hu.shape, np.uint8)
        for index, header in enumerate(volume.headers):
            source = np.zeros(shape, np.uint8)
            for region, nodule in reversed(list(enumerate(nodules, start=1))):  # where two overlap, the first stays
                source[lidc.slice_mask([nodule], numbers[header.sop_instance_uid], shape)] = region
            mask[index] = orient(source, axes)
        return mask, {
            region: {"malignancy": nodule.malignancy, "num_readers": nodule.num_readers}
            for region, nodule in enumerate(nodules, start=1)
        }

    def _file_mask(self, volume: Volume) -> tuple[np.ndarray, dict[int, dict[str, Any]]] | NoMask:
        from data_prep import mask_files

        try:
            mask = mask_files.read_mask(self._mask_path(volume.headers[0]), volume)
        except mask_files.MaskError:
            return NoMask("mask_mismatch", "")
        if mask.shape != volume.hu.shape or mask.dtype != np.uint8:
            return NoMask("mask_mismatch", f"{mask.dtype} {list(mask.shape)}")
        return mask, {}


def region_rows(mask: np.ndarray, volume: Volume) -> list[dict[str, Any]]:
    """`region`, `first_slice`, `last_slice`, `volume_mm3` and `diameter_mm` of the regions of `mask` [S, H, W] at the
    source matrix. A region that others cover wholly has no row."""
    voxel_mm3 = math.prod(volume.pixel_spacing_mm) * volume.slice_spacing_mm
    areas = np.stack([np.bincount(image.reshape(-1), minlength=MAX_REGIONS + 1) for image in mask])  # [S, 256]
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
    """What a table with the key column `key` calls this image; "" if nothing."""
    if key == "SOPInstanceUID":
        return header.sop_instance_uid if header.number_of_frames == 1 else ""  # else its label is of no one slice
    if key == "VolumeName":
        return volume_name(header)
    fields = {
        "SeriesInstanceUID": header.series_instance_uid,
        "StudyInstanceUID": header.study_instance_uid,
        "PatientID": header.patient_id,
    }
    return fields[key]


def volume_name(header: Header) -> str:
    """Name of a NIfTI file without .nii or .nii.gz; "" for other files."""
    name = posixpath.basename(header.source.member or header.source.path)
    return _VOLUME_NAME.sub("", name) if _VOLUME_NAME.search(name) else ""


def _numbers_of_instances(candidate: SeriesCandidate) -> dict[str, int]:
    """Position in the planned stack of each SOP Instance UID, duplicates included."""
    groups = zip(candidate.headers, candidate.duplicates, strict=True)
    return {
        header.sop_instance_uid: number for number, (first, others) in enumerate(groups) for header in (first, *others)
    }


def _plain(node: Any) -> Any:
    """Nested tuples and lists without arrays, so that `repr` shows all of it."""
    if isinstance(node, np.ndarray):
        return node.tolist()
    return [_plain(item) for item in node] if isinstance(node, tuple) else node


def _select(database: Path, query: str, *values: Any) -> tuple | None:
    return _connection(str(database), database.stat().st_mtime_ns, os.getpid()).execute(query, values).fetchone()


@functools.lru_cache(maxsize=2)
def _connection(database: str, mtime_ns: int, process: int) -> sqlite3.Connection:
    """Read-only; opened once a process."""
    return sqlite3.connect(f"{Path(database).absolute().as_uri()}?mode=ro&immutable=1", uri=True)


# ---- against the archive -----------------------------------------------------------------------------------


def match(labels: Labels, headers: Iterable[Header]) -> dict[str, Any]:
    """Counts of what the tables and annotations have and the archive lacks; `headers` are all of the archive.

    Raises:
        LabelError: a table, the annotations or the masks have nothing in common with the archive.
    """
    sources, database = labels.sources, labels.database
    if not (labels.tables or sources.attributes_csv or labels.has_masks):
        return {}
    with contextlib.closing(sqlite3.connect("")) as seen:  # a temporary file
        seen.execute("CREATE TABLE seen (key, value, PRIMARY KEY (key, value)) WITHOUT ROWID")
        keys = {table.key for table in labels.tables} | {"PatientID", "SeriesInstanceUID"}
        if sources.masks_dir:
            keys.add("VolumeName")
        pairs = ((key, header_key(header, key)) for header in headers for key in sorted(keys))
        seen.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", pairs)
        seen.execute("ATTACH DATABASE ? AS staged", (str(database),))

        def without(table: str, key: str, condition: str = "1") -> tuple[int, int]:
            total, found = seen.execute(
                f"SELECT count(*), count(seen.value) FROM staged.{table} AS t LEFT JOIN seen "
                f"ON seen.value = t.key AND seen.key = ? WHERE {condition}",
                (key,),
            ).fetchone()
            return total, total - found

        counts = dict(labels.counts)
        unmatched = {}
        for number, table in enumerate(labels.tables):
            total, lost = without("labels", table.key, f"t.number = {number}")
            if lost == total:
                raise LabelError(
                    f"none of the {total} rows with the labels {', '.join(table.labels[:3])} is of this archive: no "
                    f"{table.key} of theirs is in it; give the table of these scans, or leave it out"
                )
            unmatched[",".join(table.labels)] = lost
        if labels.tables:
            counts["label_rows_without_match"] = unmatched
        if sources.attributes_csv:
            total, lost = without("attributes", "PatientID")
            if lost == total:
                raise LabelError(
                    f"--attributes_csv={sources.attributes_csv}: none of its {total} patients is in this archive; "
                    "PatientID must be written as in the scans"
                )
            counts["attribute_rows_without_match"] = lost
        if sources.archive == "lidc_idri":
            total, lost = without("annotations", "SeriesInstanceUID")
            if lost == total:
                raise LabelError(
                    f"the XML of {total} readings is of other scans: no series of theirs is in this archive; give "
                    "--annotations_dir with the XML of these scans"
                )
            counts["annotations_without_match"] = lost
        if sources.masks_dir:
            keys = (("SeriesInstanceUID",), ("VolumeName",))
            known = {value for key in keys for (value,) in seen.execute("SELECT value FROM seen WHERE key = ?", key)}
            lost = len(labels.masks.keys() - known)
            if lost == len(labels.masks):
                raise LabelError(
                    f"--masks_dir={sources.masks_dir}: none of its {lost} masks is of this archive; name a mask by the "
                    "Series Instance UID of its scan, or as its NIfTI file"
                )
            counts["masks_without_match"] = lost
    return counts


def class_counts(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Number of rows (of slices.csv, labels.csv) by class of each label that they hold, and `missing`."""
    counts: dict[str, Any] = {}
    for name, fact in facts.items():
        if rows and name in rows[0]:
            values = [row[name] for row in rows]
            by_class = {text: values.count(index) for index, text in enumerate(fact["classes"])}
            counts[name] = by_class | {"missing": values.count(None)}
    return counts
