"""Tables of labels and attributes, annotations and masks: read once into a private file, and
matched with the archive.

    check(sources, input_dir)                       # columns, before anything else
    labels = stage(sources, input_dir, database)    # every row, before the headers are read
    counts = match(labels, headers)                 # against the archive, before the conversion

The workers look up the staged tables by `data_prep.labels.lookup`.
"""

import collections
import contextlib
import csv
import errno
import json
import pickle
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_prep.labels import lidc, rsna_pe
from data_prep.labels import tables as label_tables
from data_prep.labels.lookup import Labels, LabelSources, TableSpec, header_key, key_place
from data_prep.labels.tables import Row, Spellings, Table
from data_prep.masks.files import index_masks
from data_prep.scan import nifti_metadata
from data_prep.scan.headers import Header
from data_prep.scan.loading import chunks
from data_prep.scan.reasons import LeftOut
from data_prep.system.errors import InputError
from data_prep.system.files import as_cell, file_sha256

_ROWS_AT_A_TIME = 10_000


# ---- before anything else ------------------------------------------------------------------------


def check(sources: LabelSources, input_dir: Path | None) -> None:
    """Checks flags and the first lines of tables.

    Raises:
        InputError: a file is missing or lacks a column, or two options exclude each other.
    """
    if sources.archive == "lidc_idri" and sources.masks_dir:
        raise InputError(
            "--masks_dir and --archive=lidc_idri both give masks; leave one out (--archive=dicom)"
        )
    if sources.annotations_dir and sources.archive != "lidc_idri":
        raise InputError(
            "--annotations_dir goes with --archive=lidc_idri; add --archive or leave the folder out"
        )
    if sources.annotations_dir and not sources.annotations_dir.exists():
        raise InputError(
            f"--annotations_dir={sources.annotations_dir}: no such directory; "
            "give the folder of the XML"
        )
    if sources.metadata_csv and sources.archive != "nifti":
        raise InputError(
            "--metadata_csv goes with --archive=nifti; add --archive or leave the table out"
        )
    if not 0 < sources.consensus <= 1:
        raise InputError(
            f"--consensus={sources.consensus:g}: give a share of the readers above 0, at most 1"
        )
    if sources.min_area_px < 0:
        raise InputError(f"--min_area_px={sources.min_area_px}: give a number of pixels, 0 or more")
    if sources.masks_dir and not sources.masks_dir.is_dir():
        raise InputError(
            f"--masks_dir={sources.masks_dir}: no such directory; give the folder of the masks"
        )
    if sources.require_masks and not sources.masks_dir:
        raise InputError("--require_masks goes with --masks_dir; add it or leave the flag out")
    if sources.attributes_csv:
        label_tables.check_attributes(sources.attributes_csv)
    if sources.metadata_csv:
        nifti_metadata.check(input_dir, sources.metadata_csv)
    tables = _tables(sources, input_dir)
    names = [name for table in tables for name in table.labels]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(
            f"the label {min(twice)} is in two tables; rename a column or leave one table out"
        )


def _tables(sources: LabelSources, input_dir: Path | None) -> list[Table]:
    tables = [label_tables.open_labels(path) for path in sources.labels_csv]
    if sources.archive == "rsna_pe":
        train_csv = rsna_pe.check_train_csv(input_dir)
        tables = [rsna_pe.slice_table(train_csv), rsna_pe.exam_table(train_csv), *tables]
    return tables


def input_digests(sources: LabelSources, input_dir: Path | None) -> tuple[tuple[str, str], ...]:
    """(option, SHA-256) of every table.

    Annotations and masks are compared series by series (`Labels.version`).
    """
    files = [
        ("train.csv", rsna_pe.train_csv(input_dir) if sources.archive == "rsna_pe" else None),
        *(("labels_csv", path) for path in sources.labels_csv),
        ("attributes_csv", sources.attributes_csv),
        ("metadata_csv", sources.metadata_csv),
    ]
    return tuple((name, file_sha256(path)) for name, path in files if path is not None)


# ---- staging -------------------------------------------------------------------------------------


def stage(
    sources: LabelSources,
    input_dir: Path | None,
    database: Path,
    violations_csv: Path | None = None,
    left_out_csv: Path | None = None,
) -> Labels:
    """Reads every table and annotation into a new `database`, which is private: it has UIDs.

    Exams that break a rule of the RSNA labels go to `violations_csv`, files of masks and
    annotations that cannot be used to `left_out_csv`. Their numbers go into `Labels.counts`.

    Raises:
        InputError: a table contradicts itself or has an impossible value.
        OSError: a file cannot be read, or the database cannot be written.
    """
    try:
        return _stage(sources, input_dir, database, violations_csv, left_out_csv)
    # SQLite names the cause less clearly than the system. It is nearly always a full disk.
    except sqlite3.OperationalError as error:
        raise OSError(errno.ENOSPC, f"cannot be written ({error})", str(database)) from error


def _stage(
    sources: LabelSources,
    input_dir: Path | None,
    database: Path,
    violations_csv: Path | None,
    left_out_csv: Path | None,
) -> Labels:
    database.unlink(missing_ok=True)
    specs: list[TableSpec] = []
    counts: dict[str, Any] = {}
    left_out: list[LeftOut] = []
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA synchronous = OFF")  # a killed run creates it again
        connection.execute(
            "CREATE TABLE labels (number, key, cells, line, PRIMARY KEY (number, key)) WITHOUT "
            "ROWID"
        )
        connection.execute("CREATE TABLE attributes (key PRIMARY KEY, cells) WITHOUT ROWID")
        connection.execute("CREATE TABLE annotations (key PRIMARY KEY, reading) WITHOUT ROWID")
        exams: dict[str, rsna_pe.Exam] = {}
        for number, table in enumerate(_tables(sources, input_dir)):
            if sources.archive == "rsna_pe" and number < 2:
                if number == 0:
                    rows = rsna_pe.read_train_csv(table.path, exams)
                else:
                    rows = (rsna_pe.exam_row(study, exam) for study, exam in exams.items())
                _insert(connection, number, table, rows, None)
                classes = dict.fromkeys(table.labels, ("0", "1"))
            else:
                spellings = Spellings(table)
                _insert(connection, number, table, label_tables.read_label_rows(table), spellings)
                classes = spellings.classes()
            specs.append(
                TableSpec(
                    table.key, table.level, table.labels, tuple(classes[n] for n in table.labels)
                )
            )
        if sources.archive == "rsna_pe":
            counts["exams_with_inconsistent_labels"] = _write_violations(exams, violations_csv)
        if sources.attributes_csv:
            _insert_attributes(connection, sources.attributes_csv)
        if sources.archive == "lidc_idri":
            readings = lidc.read_readings(sources.annotations_dir or input_dir, left_out)
            rows = ((uid, pickle.dumps(reading)) for uid, reading in readings.items())
            connection.executemany("INSERT INTO annotations VALUES (?, ?)", rows)
        connection.commit()
    masks = _index_masks(sources.masks_dir, left_out) if sources.masks_dir else {}
    if left_out:
        kind = "masks" if sources.masks_dir else "annotations"
        reasons = collections.Counter(entry.reason for entry in left_out)
        counts[f"files_of_{kind}_left_out"] = dict(sorted(reasons.items()))
        if left_out_csv is not None:
            with open(left_out_csv, "w", newline="", errors="backslashreplace") as file:
                csv.writer(file, lineterminator="\n").writerows(
                    [LeftOut._fields, *([as_cell(cell) for cell in row] for row in left_out)]
                )
    return Labels(database, tuple(specs), sources, masks, counts)


def _insert(
    connection: sqlite3.Connection,
    number: int,
    table: Table,
    rows: Iterable[Row],
    spellings: Spellings | None,
) -> None:
    """Inserts the rows of a table.

    Raises:
        InputError: two rows of one key have other labels.
    """
    for chunk in chunks(rows, _ROWS_AT_A_TIME):
        for row in chunk if spellings else ():
            spellings.add(row)
        cells = [(number, row.key, json.dumps(row.values), row.line) for row in chunk]
        added = connection.executemany(
            "INSERT OR IGNORE INTO labels VALUES (?, ?, ?, ?)", cells
        ).rowcount
        if added == len(chunk):
            continue
        for _, key, values, line in cells:
            other, first_line = connection.execute(
                "SELECT cells, line FROM labels WHERE number = ? AND key = ?", (number, key)
            ).fetchone()
            if other != values:
                raise InputError(
                    f"{table.path}, line {line}: the {table.key} of line {first_line} with other "
                    "labels; leave one of the two rows out"
                )


def _insert_attributes(connection: sqlite3.Connection, path: Path) -> None:
    lines: dict[str, tuple[int, dict[str, Any]]] = {}
    for line, patient, attributes in label_tables.read_attributes(path):
        first_line, first = lines.setdefault(patient, (line, attributes))
        if first != attributes:
            raise InputError(
                f"{path}, line {line}: the patient of line {first_line} with other attributes; "
                "leave one of the two rows out"
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


def _index_masks(masks_dir: Path, left_out: list[LeftOut]) -> dict[str, tuple[Path, ...]]:
    masks = index_masks(masks_dir, left_out)
    if not masks:
        others = f" ({'; '.join(sorted({entry.detail for entry in left_out}))})" if left_out else ""
        raise InputError(
            f"--masks_dir={masks_dir}: no masks in it{others}; "
            "give the folder of the DICOM-SEG, RTSTRUCT or NIfTI files"
        )
    return masks


# ---- against the archive -------------------------------------------------------------------------


def match(labels: Labels, headers: Iterable[Header]) -> dict[str, Any]:
    """Counts the rows and annotations without a match in the archive, and removes the staged rows
    whose key fits several slices or scans: they label none.

    Args:
        labels: the staged tables.
        headers: all headers of the archive.

    Raises:
        InputError: a table, the annotations or the masks have nothing in common with the archive.
    """
    sources, database = labels.sources, labels.database
    if not (labels.tables or sources.attributes_csv or labels.has_masks):
        return {}
    with contextlib.closing(sqlite3.connect("")) as seen:  # a temporary file
        # `place`: what the value names, digested
        seen.execute(
            "CREATE TABLE seen (key, value, place, PRIMARY KEY (key, value, place)) WITHOUT ROWID"
        )
        keys = {table.key for table in labels.tables} | {"PatientID", "SeriesInstanceUID"}
        if sources.masks_dir:
            keys.add("VolumeName")
        triples = (
            (key, header_key(header, key), key_place(header, key))
            for header in headers
            for key in sorted(keys)
        )
        seen.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?, ?)", triples)
        seen.execute("ATTACH DATABASE ? AS staged", (str(database),))

        def without(table: str, key: str, condition: str = "1") -> tuple[int, int]:
            """Number of rows of a staged table, and number of rows without a match."""
            (total,) = seen.execute(
                f"SELECT count(*) FROM staged.{table} AS t WHERE {condition}"
            ).fetchone()
            (matched,) = seen.execute(
                f"SELECT count(*) FROM staged.{table} AS t WHERE {condition} AND EXISTS "
                "(SELECT 1 FROM seen WHERE seen.key = ? AND seen.value = t.key)",
                (key,),
            ).fetchone()
            return total, total - matched

        counts = dict(labels.counts)
        unmatched, of_several = {}, {}
        for number, table in enumerate(labels.tables):
            total, lost = without("labels", table.key, f"t.number = {number}")
            if lost == total:
                raise InputError(
                    f"none of the {total} rows with the labels {', '.join(table.labels[:3])} is "
                    f"of this archive: no {table.key} of these rows is in it; "
                    "give the table of these scans, or leave it out"
                )
            unmatched[",".join(table.labels)] = lost
            doubtful = seen.execute(
                "DELETE FROM staged.labels WHERE number = ? AND key IN (SELECT value FROM seen "
                "WHERE key = ? GROUP BY value HAVING count(*) > 1)",
                (number, table.key),
            ).rowcount
            if doubtful:
                of_several[",".join(table.labels)] = doubtful
        seen.commit()
        if of_several:
            counts["label_rows_of_several_scans"] = of_several
        if labels.tables:
            counts["label_rows_without_match"] = unmatched
        if sources.attributes_csv:
            total, lost = without("attributes", "PatientID")
            if lost == total:
                raise InputError(
                    f"--attributes_csv={sources.attributes_csv}: none of its {total} patients is "
                    "in this archive; PatientID must be written as in the scans, and for NIfTI "
                    "files as in --metadata_csv"
                )
            counts["attribute_rows_without_match"] = lost
        if sources.archive == "lidc_idri":
            total, lost = without("annotations", "SeriesInstanceUID")
            if lost == total:
                raise InputError(
                    f"the XML of {total} readings is of other scans: no series of the readings is "
                    "in this archive; give --annotations_dir with the XML of these scans"
                )
            counts["annotations_without_match"] = lost
        if sources.masks_dir:
            names = seen.execute(
                "SELECT value FROM seen WHERE key IN ('SeriesInstanceUID', 'VolumeName')"
            )
            lost = len(labels.masks.keys() - {value for (value,) in names})
            if lost == len(labels.masks):
                raise InputError(
                    f"--masks_dir={sources.masks_dir}: none of its {lost} masks is of this "
                    "archive; name a mask by the Series Instance UID of its scan, or as its NIfTI "
                    "file"
                )
            counts["masks_without_match"] = lost
    return counts
