"""Tables that a user lays beside an archive: labels (--labels_csv) and attributes of patients
(--attributes_csv).

A table of labels has a key column, whose name tells the level of a row, and a column for each
label. Cells are classes. An empty cell and the words of `spreadsheets.MISSING` (NaN, NA, null,
#N/A ...) are a missing label.

"None", "-", "." and "?" are missing where all other cells of their column are numbers. Beside words
they may be a class (None, Mild, Severe) or a missing cell, so that such a column is refused until
the user says which: rename the class, or leave the cells empty. "none" in small letters beside
words is a class, since no program writes it for a missing cell.

Messages name files, lines and columns, never the values of keys.
"""

import math
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.dataset.schema import MASK_AREA_COLUMN, VOLUME_COLUMNS
from data_prep.scan.demographics import parse_age, parse_sex
from data_prep.scan.nifti_metadata import without_extension
from data_prep.system.errors import InputError
from data_prep.system.spreadsheets import is_missing, read_names, read_rows

# Key column -> level of the labels, the finest key first. VolumeName is the name of a NIfTI file.
KEY_LEVELS = {
    "SOPInstanceUID": "slice",
    "SeriesInstanceUID": "volume",
    "VolumeName": "volume",
    "StudyInstanceUID": "volume",
    "PatientID": "patient",
}
ATTRIBUTES = ("age", "sex", "ethnic_group")
MAX_CLASSES = 64

_MAX_SPELLINGS = 4 * MAX_CLASSES  # "1", "1.0" and "1.00" are one class
_LABEL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_CLASS = re.compile(r"[A-Za-z0-9 .,_+/()<>=-]{1,32}")
_LIKE_AN_IDENTIFIER = re.compile(r"[0-9]{5}")
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _/-]{0,31}")
_NONE = "none"
_NOT_LABELS = {"volume_id", "slice_index", MASK_AREA_COLUMN, *VOLUME_COLUMNS}


class Table(NamedTuple):
    """The columns of a table of labels."""

    path: Path
    key: str  # name of `KEY_LEVELS`
    labels: tuple[str, ...]
    columns: tuple[str, ...]  # of the labels, as the file names them

    @property
    def level(self) -> str:
        """`slice`, `volume` or `patient`."""
        return KEY_LEVELS[self.key]


class Row(NamedTuple):
    """A line of a table."""

    line: int
    key: str
    values: tuple[str, ...]  # one for each label, "" where missing; None and - as they stand


# ---- labels --------------------------------------------------------------------------------------


def open_labels(path: Path) -> Table:
    """The key and the labels of a table. Of several key columns the finest is the key, and the
    others are ignored. Blanks in the name of a label become underscores.

    Raises:
        InputError: the key column or a label is missing, or a dataset cannot have the name of a
          label.
    """
    names = read_names(path, "--labels_csv")
    key = next((name for name in KEY_LEVELS if name in names), None)
    if key is None:
        raise InputError(
            f"--labels_csv={path}: no key column; name one of {', '.join(KEY_LEVELS)} "
            "in the first line"
        )
    columns = tuple(name for name in names if name not in KEY_LEVELS)
    labels = tuple("_".join(name.split()) for name in columns)
    if not labels:
        raise InputError(
            f"--labels_csv={path}: no column beside {key}; add a column for each label"
        )
    for name in labels:
        if not _LABEL_NAME.fullmatch(name) or name in _NOT_LABELS:
            raise InputError(
                f"--labels_csv={path}: {name!r} cannot name a label; rename the column: letters, "
                "digits and _ . -, a letter first, and no name of a column of the dataset"
            )
    if twice := {name for name in labels if labels.count(name) > 1}:
        raise InputError(
            f"--labels_csv={path}: the label {min(twice)!r} is there twice; rename a column"
        )
    return Table(path, key, labels, columns)


def read_label_rows(table: Table) -> Iterator[Row]:
    """The rows of a table. A VolumeName may be a path, and end in .nii or .nii.gz.

    Raises:
        InputError: a row without a key.
    """
    columns = (table.key, *table.columns)
    for line, (key, *values) in read_rows(table.path, columns, keep_doubtful=True):
        if is_missing(key):
            raise InputError(
                f"{table.path}, line {line}: {table.key} is empty; give it or leave the row out"
            )
        if table.key == "VolumeName":
            key = without_extension(posixpath.basename(key))
        yield Row(line, key, tuple(values))


class Spellings:
    """The different cells of each label of a table, collected as its rows go by."""

    def __init__(self, table: Table):
        self._table = table
        self._spellings: list[set[str]] = [set() for _ in table.labels]

    def add(self, row: Row) -> None:
        """Collects the cells of a row.

        Raises:
            InputError: a label has too many values for classes.
        """
        for number, value in enumerate(row.values):
            spellings = self._spellings[number]
            if value and value not in spellings:
                spellings.add(value)
                if len(spellings) > _MAX_SPELLINGS:
                    self._classes(number)

    def classes(self) -> dict[str, tuple[str, ...]]:
        """The classes of each label.

        Raises:
            InputError: the values of a label cannot be classes.
        """
        return {name: self._classes(number) for number, name in enumerate(self._table.labels)}

    def _classes(self, number: int) -> tuple[str, ...]:
        where = f"{self._table.path}, column {self._table.labels[number]}"
        spellings = self._spellings[number]
        classes = classes_of(spellings)
        doubtful = {value for value in spellings if is_missing(value)} - set(classes)
        if doubtful and any(_number(value) is None for value in classes):
            raise InputError(
                f"{where}: {min(doubtful)!r} beside other words may be a class or a missing cell; "
                "rename the class (for instance no_finding), or leave the cell empty"
            )
        if not classes:
            raise InputError(f"{where}: every cell is empty; fill it or leave the column out")
        if len(classes) > MAX_CLASSES:
            raise InputError(
                f"{where}: more than {MAX_CLASSES} different values; a label is a class: "
                "put numbers into bins"
            )
        for value in classes:
            if not _CLASS.fullmatch(value) or _LIKE_AN_IDENTIFIER.search(value):
                raise InputError(
                    f"{where}: a value cannot name a class (at most 32 letters, digits and "
                    ".,_+/()<>=-, fewer than five digits in a row, since classes are published); "
                    "rename it"
                )
        return classes


def classes_of(values: Iterable[str]) -> tuple[str, ...]:
    """The classes of a label's cells: sorted as numbers if all are numbers (1 and 1.0 are equal),
    else as text. Cells that may be missing are no classes, except "none" beside other words."""
    values = set(values)
    words = {value for value in values if not is_missing(value)}
    numbers = {_number(value) for value in words}
    if None in numbers:
        return tuple(sorted(words | (values & {_NONE})))
    return tuple(f"{number:g}" for number in sorted(numbers))


def class_index(value: str, classes: Sequence[str]) -> int | None:
    """Index of a cell's class; None for a missing cell.

    Raises:
        ValueError: the class does not exist.
    """
    if value not in classes and is_missing(value):
        return None
    return classes.index(value if value in classes else f"{_number(value):g}")


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number + 0.0 if math.isfinite(number) else None  # -0 is 0


# ---- attributes ----------------------------------------------------------------------------------


def check_attributes(path: Path) -> tuple[str, ...]:
    """The attributes in a table.

    Raises:
        InputError: PatientID is missing, or all attributes are.
    """
    names = read_names(path, "--attributes_csv")
    attributes = tuple(name for name in ATTRIBUTES if name in names)
    if "PatientID" not in names or not attributes:
        lacks = (
            "no column PatientID"
            if "PatientID" not in names
            else f"none of the columns {', '.join(ATTRIBUTES)}"
        )
        raise InputError(
            f"--attributes_csv={path}: {lacks}; the first line names PatientID and any of "
            f"{', '.join(ATTRIBUTES)}"
        )
    return attributes


def read_attributes(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(line, Patient ID, attributes) of every row, without missing cells.

    `age` is in whole years, 90 for an age above 89. `sex` is F, M or O. Both are read as in headers
    (`data_prep.scan.demographics`). `ethnic_group` is text of at most 32 characters.

    Raises:
        InputError: the patient is missing, or a value is not allowed.
    """
    names = check_attributes(path)
    for line, (patient, *cells) in read_rows(path, ("PatientID", *names)):
        if not patient:
            raise InputError(
                f"{path}, line {line}: PatientID is empty; give it or leave the row out"
            )
        try:
            read = {name: _attribute(name, cell) for name, cell in zip(names, cells, strict=True)}
        except ValueError as error:
            raise InputError(f"{path}, line {line}: {error}, or leave the cell empty") from None
        attributes = {name: value for name, value in read.items() if value not in (None, "")}
        yield line, patient, attributes


def _attribute(name: str, cell: str) -> Any:
    if not cell:
        return None
    try:
        if name != "ethnic_group":
            return parse_age(cell) if name == "age" else parse_sex(cell)
    except ValueError as error:
        raise ValueError(f"{name} {error}; correct the cell") from None
    if not _GROUP.fullmatch(cell) or _LIKE_AN_IDENTIFIER.search(cell):
        raise ValueError(
            "ethnic_group is not a name of at most 32 letters, digits, blanks, _ / -; "
            "give another one"
        )
    return " ".join(cell.split())
