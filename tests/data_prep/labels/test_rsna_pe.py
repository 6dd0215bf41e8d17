"""train.csv of the RSNA challenge: columns by name, labels of slices and exams, and its rules, by
hand."""

import csv

import pytest

from data_prep.labels import rsna_pe
from data_prep.labels.rsna_pe import EXAM_LABELS, Exam, violations
from data_prep.system.errors import InputError


def exam(positive_slices: int, *ones: str, constant: bool = True) -> Exam:
    return Exam({name: int(name in ones) for name in EXAM_LABELS}, positive_slices, constant)


def write_train_csv(path, rows: list[dict], columns=rsna_pe.COLUMNS) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(columns), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def row(study: str, instance: str, positive: int, *ones: str) -> dict:
    labels = {name: int(name in ones) for name in EXAM_LABELS}
    named = {
        "StudyInstanceUID": study,
        "SeriesInstanceUID": f"{study}s",
        "SOPInstanceUID": instance,
    }
    return named | {"pe_present_on_image": positive} | labels


@pytest.mark.parametrize(
    ("one_exam", "broken"),
    [
        (exam(0, "negative_exam_for_pe"), []),
        (exam(0, "indeterminate", "qa_motion", "flow_artifact", "true_filling_defect_not_pe"), []),
        (exam(3, "rv_lv_ratio_lt_1", "central_pe"), []),
        (exam(3, "rv_lv_ratio_gte_1", "leftsided_pe", "rightsided_pe", "chronic_pe"), []),
        (exam(1, "central_pe"), ["rv_lv_ratio"]),
        (exam(1, "central_pe", "rv_lv_ratio_lt_1", "rv_lv_ratio_gte_1"), ["rv_lv_ratio"]),
        (exam(1, "rv_lv_ratio_lt_1"), ["no_side"]),
        (
            exam(1, "rv_lv_ratio_lt_1", "central_pe", "chronic_pe", "acute_and_chronic_pe"),
            ["chronic"],
        ),
        (exam(1, "rv_lv_ratio_lt_1", "central_pe", "negative_exam_for_pe"), ["positive_slices"]),
        (exam(1, "rv_lv_ratio_lt_1", "central_pe", "indeterminate"), ["positive_slices"]),
        (exam(0), ["negative"]),
        (exam(0, "negative_exam_for_pe", "indeterminate"), ["negative"]),
        (exam(0, "negative_exam_for_pe", "leftsided_pe"), ["no_positive_slice"]),
        (exam(0, "rv_lv_ratio_lt_1"), ["negative", "no_positive_slice"]),
        (exam(0, "negative_exam_for_pe", constant=False), ["not_constant"]),
    ],
)
def test_rules(one_exam, broken):
    assert violations(one_exam) == broken
    assert set(broken) <= set(rsna_pe.RULES)


def test_columns_are_read_by_name_and_exams_are_put_together(tmp_path):
    rows = [
        row("a", "1", 0, "rv_lv_ratio_lt_1", "central_pe"),
        row("b", "9", 0, "indeterminate"),
        row("a", "2", 1, "rv_lv_ratio_lt_1", "central_pe"),
        row("a", "3", 1, "rv_lv_ratio_lt_1"),  # central_pe differs: the first row's counts
    ]
    path = tmp_path / "train.csv"
    write_train_csv(path, rows, ["extra", *reversed(rsna_pe.COLUMNS)])
    assert rsna_pe.check_train_csv(tmp_path) == path
    exams = {}
    read = list(rsna_pe.read_train_csv(path, exams))
    assert [(r.line, r.key, r.values) for r in read] == [
        (2, "1", ("0",)), (3, "9", ("0",)), (4, "2", ("1",)), (5, "3", ("1",)),
    ]  # fmt: skip
    assert exams == {
        "a": exam(2, "rv_lv_ratio_lt_1", "central_pe", constant=False),
        "b": exam(0, "indeterminate"),
    }
    labels = rsna_pe.exam_table(path).labels
    of_a = dict(zip(labels, rsna_pe.exam_row("a", exams["a"]).values, strict=True))
    assert (
        of_a["central_pe"] == "1"
        and of_a["indeterminate"] == "0"
        and of_a["pe_positive_exam"] == ("1")
    )
    assert rsna_pe.exam_row("b", exams["b"]).values[-1] == "0"  # indeterminate is not positive
    assert rsna_pe.exam_row("c", exam(0, "negative_exam_for_pe")).values[-1] == "0"


def test_a_missing_column_or_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no train.csv in it; .*--archive=dicom"):
        rsna_pe.check_train_csv(tmp_path)
    columns = [name for name in rsna_pe.COLUMNS if name not in ("central_pe", "qa_motion")]
    write_train_csv(tmp_path / "train.csv", [], columns)
    with pytest.raises(InputError, match="lacks the column qa_motion, central_pe; "):
        rsna_pe.check_train_csv(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pe_present_on_image": 2}, "line 2: a label is neither 0 nor 1"),
        ({"chronic_pe": ""}, "line 2: a label is neither 0 nor 1"),
        ({"SOPInstanceUID": ""}, "line 2: a UID is empty"),
    ],
)
def test_damaged_rows_are_refused_by_line(tmp_path, change, message):
    write_train_csv(tmp_path / "train.csv", [row("a", "1", 0) | change])
    with pytest.raises(InputError, match=message):
        list(rsna_pe.read_train_csv(tmp_path / "train.csv", {}))
