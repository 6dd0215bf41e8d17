"""RSNA STR Pulmonary Embolism Detection (2020): `train.csv` beside the DICOM files.

Each row is a slice with its own label and the labels of its exam, which are equal in all rows of
the exam. The labels obey rules that the challenge states. Exams that break a rule are listed, and
kept unchanged. The file has 1.8 million rows, so it is read as a stream.
"""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_prep.labels.tables import Row, Table
from data_prep.scan.remote_archives import RemoteArchive, local_copy
from data_prep.system.errors import InputError, RunFailed
from data_prep.system.spreadsheets import read_names, read_rows

TRAIN_FILE = "train.csv"
STUDY, SERIES, INSTANCE = "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"
SLICE_LABEL = "pe_present_on_image"
EXAM_LABELS = (
    "negative_exam_for_pe",
    "qa_motion",
    "qa_contrast",
    "flow_artifact",
    "rv_lv_ratio_gte_1",
    "rv_lv_ratio_lt_1",
    "leftsided_pe",
    "chronic_pe",
    "true_filling_defect_not_pe",
    "rightsided_pe",
    "acute_and_chronic_pe",
    "central_pe",
    "indeterminate",
)
POSITIVE_EXAM = "pe_positive_exam"  # neither negative nor indeterminate
_BINARY = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}  # the latter as spreadsheet programs save them
COLUMNS = (STUDY, SERIES, INSTANCE, SLICE_LABEL, *EXAM_LABELS)

# Name of a rule -> the property of an exam that breaks it.
RULES = {
    "not_constant": "A label of the exam differs between its rows; the first row's counts.",
    "rv_lv_ratio": "Positive slices, and not exactly one of rv_lv_ratio_gte_1 and "
    "rv_lv_ratio_lt_1.",
    "no_side": "Positive slices, and none of central_pe, leftsided_pe, rightsided_pe.",
    "chronic": "Positive slices, and both chronic_pe and acute_and_chronic_pe.",
    "positive_slices": "Positive slices, and negative_exam_for_pe or indeterminate.",
    "negative": "No positive slice, and not exactly one of negative_exam_for_pe and indeterminate.",
    "no_positive_slice": "No positive slice, and a label that only an exam with emboli has.",
}
_ONLY_POSITIVE = (
    *("rv_lv_ratio_gte_1", "rv_lv_ratio_lt_1", "leftsided_pe", "rightsided_pe", "central_pe"),
    *("chronic_pe", "acute_and_chronic_pe"),
)


class Exam(NamedTuple):
    """The rows of one study, combined."""

    labels: dict[str, int]  # `EXAM_LABELS` in the first row
    positive_slices: int
    constant: bool  # all rows have the same labels of the exam


def train_csv(input_dir: Path | RemoteArchive) -> Path | None:
    """`train.csv` of an archive, or None if it is missing.

    From a store it is a copy that is removed when this process ends.

    Raises:
        RunFailed: a store cannot be read.
    """
    if isinstance(input_dir, RemoteArchive):
        try:
            return local_copy(input_dir, TRAIN_FILE)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise RunFailed(
                f"{input_dir}/{TRAIN_FILE}: cannot be read ({error.strerror}); run again"
            ) from None
    path = input_dir / TRAIN_FILE
    return path if path.is_file() else None


def check_train_csv(input_dir: Path | RemoteArchive) -> Path:
    """`train.csv` of an archive, with all its columns.

    Raises:
        InputError: no such file, or a column is missing.
    """
    path = train_csv(input_dir)
    if path is None:
        raise InputError(
            f"--input_dir={input_dir}: no {TRAIN_FILE} in it; give the folder that holds it and "
            "the scans, or --archive=dicom to do without labels"
        )
    names = read_names(path, "train.csv")
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise InputError(
            f"{path}: lacks the column {', '.join(missing)}; fetch the file of the challenge "
            "again, or give --archive=dicom and your own --labels_csv"
        )
    return path


def slice_table(path: Path) -> Table:
    """The labels of slices in `train.csv`."""
    return Table(path, INSTANCE, (SLICE_LABEL,), (SLICE_LABEL,))


def exam_table(path: Path) -> Table:
    """The labels of exams in `train.csv`, with `POSITIVE_EXAM`."""
    labels = (*EXAM_LABELS, POSITIVE_EXAM)
    return Table(path, STUDY, labels, labels)


def read_train_csv(path: Path, exams: dict[str, Exam]) -> Iterator[Row]:
    """The rows of `slice_table`.

    Args:
        path: of the file.
        exams: gets every exam by its Study Instance UID, complete after the last row.

    Raises:
        InputError: a row without UIDs, or a label other than 0 and 1.
    """
    for line, (study, series, instance, *cells) in read_rows(path, COLUMNS):
        if not (study and series and instance):
            raise InputError(f"{path}, line {line}: a UID is empty; fetch the file again")
        if not set(cells) <= _BINARY.keys():
            raise InputError(
                f"{path}, line {line}: a label is neither 0 nor 1; fetch the file again"
            )
        positive, *labels = (_BINARY[cell] for cell in cells)
        first = dict(zip(EXAM_LABELS, labels, strict=True))
        exam = exams.get(study) or Exam(first, 0, True)
        exams[study] = Exam(
            exam.labels, exam.positive_slices + positive, exam.constant and exam.labels == first
        )
        yield Row(line, instance, (str(positive),))


def exam_row(study: str, exam: Exam) -> Row:
    """The row of an exam in `exam_table`."""
    positive = exam.labels["negative_exam_for_pe"] == 0 and exam.labels["indeterminate"] == 0
    return Row(0, study, (*map(str, exam.labels.values()), str(int(positive))))


def violations(exam: Exam) -> list[str]:
    """The names of the `RULES` that an exam breaks."""
    labels = exam.labels
    if exam.positive_slices:
        broken = {
            "rv_lv_ratio": labels["rv_lv_ratio_gte_1"] + labels["rv_lv_ratio_lt_1"] != 1,
            "no_side": not (
                labels["central_pe"] or labels["leftsided_pe"] or labels["rightsided_pe"]
            ),
            "chronic": bool(labels["chronic_pe"] and labels["acute_and_chronic_pe"]),
            "positive_slices": bool(labels["negative_exam_for_pe"] or labels["indeterminate"]),
        }
    else:
        broken = {
            "negative": labels["negative_exam_for_pe"] + labels["indeterminate"] != 1,
            "no_positive_slice": any(labels[name] for name in _ONLY_POSITIVE),
        }
    return [
        name
        for name, is_broken in ({"not_constant": not exam.constant} | broken).items()
        if is_broken
    ]
