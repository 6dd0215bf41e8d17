"""The tables of a merged dataset: the rows of its parts, split by split, in each split part by
part.

Tables of labels are read and written row by row, as slices may be millions. Cells stay as they are
written.
"""

import collections
import csv
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import (
    LABELS_FILE,
    REGIONS_FILE,
    REJECTED_FILE,
    SLICES_FILE,
    SPLITS,
    table_columns,
)
from data_prep.system.errors import InputError


def _rows(part: Dataset, name: str) -> Iterator[dict[str, str]]:
    """Rows of one of its tables, their cells as they are written."""
    with open(part.directory / name, newline="") as file:
        yield from csv.DictReader(file)


def in_order(parts: Sequence[Dataset]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the part, row of its volumes.csv) in the order of the merged dataset."""
    for split in SPLITS:
        for number, part in enumerate(parts):
            for volume in part.volumes():
                if volume["split"] == split:
                    yield number, volume


def volume_rows(parts: Sequence[Dataset]) -> Iterator[dict[str, Any]]:
    num_records = collections.Counter()
    for _, volume in in_order(parts):
        yield volume | {"first_record": num_records[volume["split"]]}
        num_records[volume["split"]] += volume["num_slices"]


def rejected_rows(parts: Sequence[Dataset]) -> list[dict[str, str]]:
    rows = [row for part in parts for row in _rows(part, REJECTED_FILE)]
    return sorted(rows, key=lambda row: tuple(row.values()))


def slice_rows(parts: Sequence[Dataset]) -> Iterator[dict[str, Any]]:
    tables = []
    for part in parts:
        tables.append(
            _rows(part, SLICES_FILE)
            if SLICES_FILE in table_columns(part.preparation)
            else _slices_without_labels(part)
        )
    for number, volume in in_order(parts):
        yield from itertools.islice(tables[number], volume["num_slices"])


def _slices_without_labels(part: Dataset) -> Iterator[dict[str, Any]]:
    for volume in part.volumes():
        for index in range(volume["num_slices"]):
            yield {"volume_id": volume["volume_id"], "slice_index": index}


def label_rows(
    parts: Sequence[Dataset], labels: Mapping[str, Mapping[str, Any]]
) -> Iterator[dict[str, str]]:
    """A label of a patient holds for the patient's volumes in all parts.

    Raises:
        InputError: a patient has one class in one part and another in another.
    """
    of_patients: dict[str, dict[str, str]] = {
        n: {} for n, facts in labels.items() if facts["level"] == "patient"
    }
    tables = []
    for part in parts:
        listed = _rows(part, LABELS_FILE) if LABELS_FILE in table_columns(part.preparation) else ()
        table = {row["volume_id"]: row for row in listed}
        tables.append(table)
        for name, known in of_patients.items():
            found = {
                v["patient_id"]: table.get(v["volume_id"], {}).get(name, "") for v in part.volumes()
            }
            found = {patient: cell for patient, cell in found.items() if cell}
            differing = [
                patient for patient, cell in found.items() if known.get(patient, cell) != cell
            ]
            if differing:
                raise InputError(
                    f"{len(differing)} patients have another class of the label {name} in "
                    f"{part.directory} than in the "
                    "datasets before it; make the tables agree and prepare it again"
                )
            known |= found
    for number, volume in in_order(parts):
        row = tables[number].get(volume["volume_id"], {"volume_id": volume["volume_id"]})
        yield row | {
            name: known.get(volume["patient_id"], "") for name, known in of_patients.items()
        }


def region_rows(parts: Sequence[Dataset]) -> Iterator[dict[str, str]]:
    tables = []
    for part in parts:
        of_volume = collections.defaultdict(list)
        for row in _rows(part, REGIONS_FILE):
            of_volume[row["volume_id"]].append(row)
        tables.append(of_volume)
    for number, volume in in_order(parts):
        yield from tables[number][volume["volume_id"]]


def counted(
    rows: Iterable[Mapping[str, Any]],
    columns: Iterable[str],
    cells: Mapping[str, collections.Counter],
) -> Iterator[Mapping[str, Any]]:
    """The rows as they are; counts the cells of each label in `cells`."""
    names = [name for name in columns if name in cells]
    for row in rows:
        for name in names:
            cells[name][row.get(name, "")] += 1
        yield row
