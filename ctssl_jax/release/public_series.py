"""Which published series a model was trained on, so that others can keep them out of their tests.

A dataset knows its series by pseudonyms alone. So a list of published identifiers is asked: the key
of the pseudonyms makes each of them into a pseudonym, and those that the run has read are told.
Nothing that is not in the list is ever told, and no pseudonym.
"""

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ctssl_jax.release.model_page import trained_volumes
from ctssl_jax.release.opening import fetched_file
from ctssl_jax.runs.run import Run
from data_prep.dataset.reader import Dataset
from data_prep.privacy import pseudonyms
from data_prep.system.errors import InputError
from data_prep.system.stores import local_path

FILE = "public_series.csv"
COLUMNS = ("series_instance_uid", "split")
# in a text without columns; RSNA's data have hexadecimal names in place of UIDs
_UID = re.compile(r"[0-9]+(\.[0-9]+)+|[0-9a-f]{8,}")
_NAMES = {  # a column without blanks and marks -> its field; as TCIA and IDC name them, and DICOM
    **dict.fromkeys(("patientid", "subjectid"), "patient"),
    **dict.fromkeys(("studyinstanceuid", "studyuid"), "study"),
    **dict.fromkeys(("seriesinstanceuid", "seriesuid"), "series"),
}


class Published(NamedTuple):
    """A series of a public collection, as the collection names it."""

    patient: str
    study: str
    series: str


def read_published(path: str | Path) -> list[Published]:
    """The series of a collection's table: CSV with columns for patient, study and series, such as
    `Subject ID`, `Study UID`, `Series UID` or `PatientID`, `StudyInstanceUID`, `SeriesInstanceUID`.

    Raises:
      InputError: it cannot be read, or lacks a column.
    """
    rows = _rows(_text(path, "--public_series"))
    for field in Published._fields:
        if not rows or field not in rows[0]:
            raise InputError(
                f"--public_series={path} has no column of the {field} (such as PatientID, "
                "StudyInstanceUID, SeriesInstanceUID); give the collection's table of series as CSV"
            )
    return [Published(*(row[field] for field in Published._fields)) for row in rows]


def read_series(path: str | Path) -> list[str]:
    """Series Instance UIDs of a CSV with a column of that name, or of a text with one a line.

    Raises:
      InputError: it cannot be read, or has none.
    """
    text = _text(path, "--series")
    uids = [row["series"] for row in _rows(text) if row.get("series")]
    if not uids:
        uids = [line for line in map(str.strip, text.splitlines()) if _UID.fullmatch(line)]
    if not uids:
        raise InputError(
            f"--series={path} has no Series Instance UID; give one a line, or CSV with the column "
            "SeriesInstanceUID"
        )
    return uids


def trained_on(
    run: Run, dataset: Dataset, published: Iterable[Published], key: bytes
) -> list[tuple[str, str]]:
    """The published series that a run has read, sorted: (Series Instance UID, `train` or
    `validation`, which chose the checkpoint).

    Of a study whose volume is a part of a series (several stacks), all published series are told.

    Args:
      run: the run; of its ancestors nothing is told.
      dataset: that it was trained on.
      published: of a collection.
      key: of the dataset's pseudonyms.

    Raises:
      InputError: another key than that of the dataset.
    """
    if pseudonyms.key_fingerprint(key) != dataset.preparation["key_fingerprint"]:
        raise InputError(
            "--pseudonym_key_file is not the key of the dataset's pseudonyms; give the one in its "
            "audit directory"
        )
    volumes, exams = {}, {}
    for split in ("train", "validation"):
        for row in trained_volumes(run, dataset, split):
            volumes[row["volume_id"]] = split
            exams[row["exam_id"]] = split
    told: dict[str, str] = {}
    for_studies: dict[str, list[Published]] = {}
    matched = set()
    for one in published:
        for patient in (one.patient, f"study:{one.study}"):
            exam = pseudonyms.exam_id(key, patient, one.study)
            volume = pseudonyms.series_pseudonym(key, patient, one.study, one.series)
            if volume in volumes:
                told[one.series] = volumes[volume]
                matched.add(exam)
            elif exam in exams:
                for_studies.setdefault(exam, []).append(one)
    for exam, series in for_studies.items():
        if exam not in matched:
            told |= {one.series: exams[exam] for one in series}
    return sorted(told.items())


def table(rows: Iterable[tuple[str, str]]) -> str:
    """The text of `FILE`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    return text.getvalue()


def overlap(model: str | Path, series: Iterable[str]) -> dict[str, list[str]]:
    """Which of some series a model was trained on, as far as it says so.

    Args:
      model: an export's folder, a zip file of it, or `hf-hub:ORG/NAME@REVISION`.
      series: Series Instance UIDs.

    Returns:
      `train` and `validation` -> sorted UIDs.

    Raises:
      InputError: the model cannot be read, or has no list of published series.
    """
    content = fetched_file(model, FILE, "--model")
    if content is None:
        raise InputError(
            f"--model={model} has no {FILE}: it does not say on which published series it was "
            "trained; ask its authors"
        )
    asked = set(series)
    rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(content.decode())))
    return {
        split: sorted(
            row[COLUMNS[0]] for row in rows if row["split"] == split and row[COLUMNS[0]] in asked
        )
        for split in ("train", "validation")
    }


def _rows(text: str) -> list[dict[str, str]]:
    """The rows of a CSV by field; columns of other names are left out."""
    reader = csv.DictReader(io.StringIO(text))
    names = {name: re.sub(r"[^a-z]", "", name.lower()) for name in reader.fieldnames or ()}
    fields = {name: _NAMES[plain] for name, plain in names.items() if plain in _NAMES}
    return [{field: (row[name] or "").strip() for name, field in fields.items()} for row in reader]


def _text(path: str | Path, flag: str) -> str:
    try:
        return local_path(path, flag).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(
            f"{flag}={path} cannot be read ({error.strerror}); give a CSV file"
        ) from None
    except ValueError:
        raise InputError(f"{flag}={path} is not a text; give a CSV file") from None
