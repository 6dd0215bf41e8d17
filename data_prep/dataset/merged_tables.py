"""The tables of a merged dataset: the rows of its parts, by split and in each split by part.

Tables of labels are read and written row by row, since there may be millions of slices. Cells keep
their text.
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
    """Rows of a table of the part, with the text of each cell."""
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
    tables = [
        _rows(part, SLICES_FILE)
        if SLICES_FILE in table_columns(part.preparation)
        else _slices_without_labels(part)
        for part in parts
    ]
    for number, volume in in_order(parts):
        yield from itertools.islice(tables[number], volume["num_slices"])


def _slices_without_labels(part: Dataset) -> Iterator[dict[str, Any]]:
    for volume in part.volumes():
        for index in range(volume["num_slices"]):
            yield {"volume_id": volume["volume_id"], "slice_index": index}


def label_rows(
    parts: Sequence[Dataset], labels: Mapping[str, Mapping[str, Any]]
) -> Iterator[dict[str, str]]:
    """Rows of labels.csv: a label of a patient holds for the patient's volumes in all parts.

    Raises:
        InputError: a patient has one class in one part and another in another.
    """
    patient_labels: dict[str, dict[str, str]] = {  # name -> patient -> cell
        name: {} for name, facts in labels.items() if facts["level"] == "patient"
    }
    tables = []
    for part in parts:
        listed = _rows(part, LABELS_FILE) if LABELS_FILE in table_columns(part.preparation) else ()
        table = {row["volume_id"]: row for row in listed}
        tables.append(table)
        for name, cell_of in patient_labels.items():
            own = {
                v["patient_id"]: table.get(v["volume_id"], {}).get(name, "") for v in part.volumes()
            }
            own = {patient: cell for patient, cell in own.items() if cell}
            differing = sum(cell_of.get(patient, cell) != cell for patient, cell in own.items())
            if differing:
                raise InputError(
                    f"{differing} patients have another class of the label {name} in "
                    f"{part.directory} than in the datasets before it; make the tables agree and "
                    "prepare it again"
                )
            cell_of |= own
    for number, volume in in_order(parts):
        row = tables[number].get(volume["volume_id"], {"volume_id": volume["volume_id"]})
        yield row | {
            name: cell_of.get(volume["patient_id"], "") for name, cell_of in patient_labels.items()
        }


def region_rows(parts: Sequence[Dataset]) -> Iterator[dict[str, str]]:
    tables = []
    for part in parts:
        table = collections.defaultdict(list)  # volume_id -> rows
        for row in _rows(part, REGIONS_FILE):
            table[row["volume_id"]].append(row)
        tables.append(table)
    for number, volume in in_order(parts):
        yield from tables[number][volume["volume_id"]]


def counted(
    rows: Iterable[Mapping[str, Any]],
    columns: Iterable[str],
    cells: Mapping[str, collections.Counter],
) -> Iterator[Mapping[str, Any]]:
    """The same rows; counts the cells of each label in `cells`."""
    names = [name for name in columns if name in cells]
    for row in rows:
        for name in names:
            cells[name][row.get(name, "")] += 1
        yield row
