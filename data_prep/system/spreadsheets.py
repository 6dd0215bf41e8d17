"""Tables that a user lays beside an archive: labels, attributes, metadata, RSNA-PE's train.csv.

One reader for all of them, so that each kind of file is read, or refused, alike:

    names = read_names(path, "--labels_csv")                # the first line
    for line, cells in read_rows(path, ("PatientID", "pe")):  # the others

Commas, semicolons or tabs separate the cells, whichever gives the first line the most names (a
line `sep=;` before it counts, too). The text is UTF-8, or UTF-16 as spreadsheet programs write
"Unicode text". Where commas do not separate cells, they are decimal commas: 0,5 reads as 0.5.
Columns without a name and lines without a cell are passed over. A cell of `MISSING` is an empty
cell. Messages name files, lines and columns, never cells.
"""

import codecs
import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.system.errors import InputError

# What pandas, R, SQL and spreadsheet programs (also German ones) write for a missing cell, in any
# case. "none", "-", "." and "?" may also be words: see `DOUBTFUL`.
MISSING = frozenset(
    "na n/a n.a. nan -nan null <na> #n/a #na #nv #null! #value! #wert! #ref! #bezug! "
    "#div/0!".split()
)
DOUBTFUL = frozenset(("none", "-", "--", ".", "?"))
_LONGEST_WORD = max(map(len, MISSING))
_SEPARATORS = ",;\t"
_DECIMAL_COMMA = re.compile(r"[-+]?[0-9]+,[0-9]+")


def is_missing(cell: str) -> bool:
    """Whether a cell without blanks around it says that its value is missing."""
    if len(cell) > _LONGEST_WORD:
        return False
    word = cell.casefold()
    return not word or word in MISSING or word in DOUBTFUL


def read_names(path: Path, flag: str) -> tuple[str, ...]:
    """The names in the first line, without those that are empty; `flag` is the option that named
    the file.

    Raises:
        InputError: the file is missing or not a table, or a name recurs.
    """
    if not path.is_file():
        raise InputError(
            f"{flag}={path}: no such file; give a CSV file with a line of column names"
        )
    _, header = next(_lines(path), (0, []))
    names = tuple(name for name in header if name)
    if not names:
        raise InputError(
            f"{path}: the first line is empty; it names the columns, separated by commas, "
            "semicolons or tabs"
        )
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"{path}: column {min(twice)!r} is there twice; leave one out")
    return names


def read_rows(
    path: Path, columns: Sequence[str], *, keep_doubtful: bool = False
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, cells of `columns`) of every line but the first; missing cells are "".

    Args:
        path: of a table whose first line names all `columns`.
        columns: names.
        keep_doubtful: leave the words of `DOUBTFUL` as they are, for the caller to judge.

    Raises:
        InputError: a line has another length than the first line, or a cell in a column without a
            name.
    """
    lines = _lines(path)
    _, names = next(lines)
    places = [names.index(column) for column in columns]
    unnamed = [place for place, name in enumerate(names) if not name]
    kept = DOUBTFUL if keep_doubtful else ()
    for line, cells in lines:
        if not any(cells):
            continue
        beyond = any(cells[len(names) :])
        if len(cells) < len(names) or beyond:
            raise InputError(
                f"{path}, line {line}: {len(cells)} cells, the first line has {len(names)}; "
                "correct it"
            )
        if any(cells[place] for place in unnamed):
            raise InputError(
                f"{path}, line {line}: a cell in a column without a name; name the column in the "
                "first line, or leave it out"
            )
        yield (
            line,
            tuple(
                "" if is_missing(cell := cells[place]) and cell.casefold() not in kept else cell
                for place in places
            ),
        )


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, stripped cells) of every line of a table."""
    with open(path, "rb") as file:
        start = file.read(2)
    utf16 = start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    line = 0
    with open(path, newline="", encoding="utf-16" if utf16 else "utf-8-sig") as file:
        try:
            first = file.readline()
            declared = re.fullmatch(r"sep=(.)", first.rstrip("\r\n"))
            if not declared:
                file.seek(0)
            separator = declared[1] if declared else _separator(first)
            reader = csv.reader(file, delimiter=separator)
            for cells in reader:
                line = reader.line_num + bool(declared)
                cells = [cell.strip() for cell in cells]
                if separator != ",":
                    cells = [
                        cell.replace(",", ".") if _DECIMAL_COMMA.fullmatch(cell) else cell
                        for cell in cells
                    ]
                yield line, cells
        except (csv.Error, UnicodeError) as error:
            kind = "not UTF-8 text" if isinstance(error, UnicodeError) else error
            raise InputError(
                f"{path}, near line {line + 1}: {kind}; save it as CSV in UTF-8"
            ) from None


def _separator(first: str) -> str:
    """The separator of which the first line has the most, outside quotes; the comma of two."""
    return max(_SEPARATORS, key=lambda sign: len(next(csv.reader([first], delimiter=sign), ())))
