"""RSNA STR Pulmonary Embolism Detection (2020): `train.csv` beside the DICOM files.

One row a slice: its own label, and labels of the exam, which are the same in all rows of the exam.
The labels obey rules that the challenge states; exams that break one are listed, and kept as they
are. A file has 1.8 million rows: it is read as a stream.
"""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_prep.labels.tables import Row, Table, read_header, read_rows
from data_prep.scan.remote_archives import RemoteArchive, local_copy
from data_prep.system.errors import InputError, RunFailed

TRAIN_FILE = "train.csv"
WINDOWS = ((50.0, 350.0), (100.0, 700.0))  # level, width in HU: soft tissue, pulmonary arteries
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
COLUMNS = (STUDY, SERIES, INSTANCE, SLICE_LABEL, *EXAM_LABELS)

# Name -> what an exam that breaks it does.
RULES = {
    "not_constant": "A label of the exam differs between its rows; the first row's counts.",
    "rv_lv_ratio": "Positive slices, and not exactly one of rv_lv_ratio_gte_1 and rv_lv_ratio_lt_1.",
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
    """What the rows of one study say."""

    labels: dict[str, int]  # of `EXAM_LABELS`, by the first row
    positive_slices: int
    constant: bool


def train_csv(input_dir: Path | RemoteArchive) -> Path | None:
    """`train.csv` of an archive; of one on a store, a copy that ends with this process. None: there
    is none."""
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
            f"the scans, or "
            "--archive=dicom to do without labels"
        )
    names = read_header(path, "train.csv")
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise InputError(
            f"{path}: lacks the column {', '.join(missing)}; fetch the file of the challenge "
            f"again, or give "
            "--archive=dicom and your own --labels_csv"
        )
    return path


def slice_table(path: Path) -> Table:
    return Table(path, INSTANCE, (SLICE_LABEL,))


def exam_table(path: Path) -> Table:
    return Table(path, STUDY, (*EXAM_LABELS, POSITIVE_EXAM))


def read_train_csv(path: Path, exams: dict[str, Exam]) -> Iterator[Row]:
    """The rows of `slice_table`; once all are taken, `exams` holds every exam by its Study Instance
    UID.

    Raises:
        InputError: a row without UIDs, or a label other than 0 and 1.
    """
    for line, (study, series, instance, *cells) in read_rows(path, COLUMNS):
        if not (study and series and instance):
            raise InputError(f"{path}, line {line}: a UID is empty; fetch the file again")
        if not set(cells) <= {"0", "1"}:
            raise InputError(
                f"{path}, line {line}: a label is neither 0 nor 1; fetch the file again"
            )
        positive, *labels = map(int, cells)
        known = exams.get(study)
        of_exam = dict(zip(EXAM_LABELS, labels, strict=True)) if known is None else known.labels
        constant = known is None or (known.constant and labels == list(known.labels.values()))
        exams[study] = Exam(of_exam, (known.positive_slices if known else 0) + positive, constant)
        yield Row(line, instance, (cells[0],))


def exam_row(study: str, exam: Exam) -> Row:
    """The row of `exam_table` of an exam."""
    positive = exam.labels["negative_exam_for_pe"] == 0 and exam.labels["indeterminate"] == 0
    return Row(0, study, (*map(str, exam.labels.values()), str(int(positive))))


def violations(exam: Exam) -> list[str]:
    """Names of the `RULES` that an exam breaks."""
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
