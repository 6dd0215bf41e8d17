"""Tables of labels and attributes: keys, classes, missing cells, and refusals by line or
column."""

import pytest

from data_prep.labels import tables
from data_prep.labels.tables import Spellings, class_index, classes_of
from data_prep.system.errors import InputError


def table(tmp_path, text: str):
    path = tmp_path / "table.csv"
    path.write_text(text)
    return path


def classes(tmp_path, text: str):
    opened = tables.open_labels(table(tmp_path, text))
    spellings = Spellings(opened)
    for row in tables.read_label_rows(opened):
        spellings.add(row)
    return spellings.classes()


def test_the_finest_key_is_the_key_and_the_other_keys_are_no_labels(tmp_path):
    path = table(
        tmp_path, "\ufeffPatientID,calcium, StudyInstanceUID ,nodule\np,high,1.2,1\n\np,,1.3,0\n"
    )
    opened = tables.open_labels(path)
    assert (opened.key, opened.level, opened.labels) == (
        "StudyInstanceUID",
        "volume",
        ("calcium", "nodule"),
    )
    rows = list(tables.read_label_rows(opened))
    assert [(row.line, row.key, row.values) for row in rows] == [
        (2, "1.2", ("high", "1")),
        (4, "1.3", ("", "0")),
    ]


@pytest.mark.parametrize(
    ("key", "level"),
    [("SOPInstanceUID", "slice"), ("VolumeName", "volume"), ("PatientID", "patient")],
)
def test_level_of_a_key(tmp_path, key, level):
    assert tables.open_labels(table(tmp_path, f"{key},x\n1,2\n")).level == level


def test_numbers_are_sorted_as_numbers_and_texts_as_texts():
    assert classes_of(["10", "9", "1", "1.0", "-0", "0"]) == ("0", "1", "9", "10")
    assert classes_of(["10", "9", "none"]) == ("9", "10")
    assert [class_index(value, ("0", "1", "9")) for value in ("9.0", "", "1", "-0")] == [
        2,
        None,
        1,
        0,
    ]
    with pytest.raises(ValueError):
        class_index("2", ("0", "1"))


def test_classes_of_a_table(tmp_path):
    table_classes = classes(tmp_path, "PatientID,stage,smoker\na,2,yes\nb,,no\nc,10,\nd,2.0,yes\n")
    assert table_classes == {"stage": ("2", "10"), "smoker": ("no", "yes")}


@pytest.mark.parametrize("number", [64, 65, 300])
def test_sixty_four_classes_and_no_more(tmp_path, number):
    text = "PatientID,volume\n" + "".join(f"p{i},{i}\n" for i in range(number))
    if number == 64:
        assert len(classes(tmp_path, text)["volume"]) == 64
        return
    with pytest.raises(InputError, match=r"column volume: more than 64 different values; .* bins"):
        classes(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line is empty"),
        ("scan,label\n1,2\n", "no key column; name one of SOPInstanceUID"),
        ("PatientID\n1\n", "no column beside PatientID"),
        ("PatientID,x,x\n1,2,3\n", "column 'x' is there twice"),
        ("PatientID,split\n1,2\n", "'split' cannot name a label"),
        ("PatientID,a:b\n1,2\n", "'a:b' cannot name a label"),
        ("PatientID,x\n1,2,3\n", "line 2: 3 cells, the first line has 2"),
        ("PatientID,x\n1,2\n,3\n", "line 3: PatientID is empty"),
        ("PatientID,x\n1,\n", "column x: every cell is empty"),
        ("PatientID,x\n1,19991231\n", "column x: a value cannot name a class"),
        ("PatientID,x\n1,Dr. Müller\n", "column x: a value cannot name a class"),
    ],
)
def test_unusable_tables_are_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as error:
        classes(tmp_path, text)
    assert (
        "\n" not in str(error.value)
        and "Müller" not in str(error.value)
        and "19991231" not in str(error.value)
    )


def test_a_missing_file_and_a_file_that_is_no_text_are_named(tmp_path):
    with pytest.raises(InputError, match=r"--labels_csv=.*no such file"):
        tables.open_labels(tmp_path / "absent.csv")
    (tmp_path / "binary.csv").write_bytes(b"PatientID,x\n\xff\xfe,1\n")
    with pytest.raises(InputError, match="not UTF-8"):
        list(tables.read_label_rows(tables.open_labels(tmp_path / "binary.csv")))


def test_attributes(tmp_path):
    path = table(
        tmp_path,
        "sex,PatientID,age,site,ethnic_group\nf,a,95,x,group_a\n,b,,x,\nO,c,61.9,x,Not  Hispanic\n",
    )
    assert list(tables.read_attributes(path)) == [
        (2, "a", {"sex": "F", "age": 90, "ethnic_group": "group_a"}),
        (3, "b", {}),
        (4, "c", {"sex": "O", "age": 61, "ethnic_group": "Not Hispanic"}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patient,age\n1,2\n", "no column PatientID"),
        ("PatientID,weight\n1,2\n", "none of the columns age, sex, ethnic_group"),
        ("PatientID,age\na,60\nb,old\n", "line 3: age is not a number of years"),
        ("PatientID,sex\na,x\n", "line 2: sex is not F, M or O"),
        ("PatientID,ethnic_group\na,born 19991231\n", "line 2: ethnic_group"),
        ("PatientID,sex\n,F\n", "line 2: PatientID is empty"),
    ],
)
def test_unusable_attributes_are_refused_by_line(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as error:
        list(tables.read_attributes(table(tmp_path, text)))
    assert "19991231" not in str(error.value)
