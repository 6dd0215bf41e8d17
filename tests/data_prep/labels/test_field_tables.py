"""Tables as spreadsheets, pandas and R save them, and archives publish them: read alike, or refused
alike in one line."""

import pytest

from data_prep.labels import tables
from data_prep.labels.tables import Spellings
from data_prep.scan.nifti_metadata import read_metadata
from data_prep.system.errors import InputError


def saved(tmp_path, content: str | bytes):
    path = tmp_path / "table.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def labels(path):
    """Rows and classes of a table of labels."""
    opened = tables.open_labels(path)
    spellings, rows = Spellings(opened), []
    for row in tables.read_label_rows(opened):
        spellings.add(row)
        rows.append((row.key, row.values))
    return opened.labels, rows, spellings.classes()


# ---- missing cells -------------------------------------------------------------------------------


def test_words_for_a_missing_cell_are_no_classes(tmp_path):
    words = ["<NA>", "#NV", "nan", "n/a", "NULL", "#N/A", "None", "-"]
    text = "PatientID,pe\na,0\nb,1\n" + "".join(f"p{i},{w}\n" for i, w in enumerate(words))
    _, rows, classes = labels(saved(tmp_path, text))
    assert classes == {"pe": ("0", "1")}
    indices = [tables.class_index(value, classes["pe"]) for _, (value,) in rows]
    assert indices == [0, 1, *[None] * len(words)]


@pytest.mark.parametrize("cells", [("None", "Mild", "Severe"), ("-", "+"), ("None", "solid", "")])
def test_none_beside_words_is_a_class_or_missing_and_the_user_says_which(tmp_path, cells):
    """Of "none, mild, severe" the healthy must neither vanish nor become a class by chance."""
    text = "PatientID,emphysema\n" + "".join(f"p{i},{cell}\n" for i, cell in enumerate(cells))
    with pytest.raises(InputError, match=r"column emphysema: .*rename .*leave the cell empty"):
        labels(saved(tmp_path, text))


def test_none_in_small_letters_beside_words_is_a_class(tmp_path):
    text = "PatientID,emphysema\na,none\nb,mild\nc,NA\n"
    _, rows, classes = labels(saved(tmp_path, text))
    assert classes == {"emphysema": ("mild", "none")}
    assert [values for _, values in rows] == [("none",), ("mild",), ("",)]


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
@pytest.mark.parametrize("separator", [";", "\t"])
def test_tables_of_a_spreadsheet_are_read(tmp_path, encoding, separator):
    """Semicolons or tabs, CRLF, decimal commas, empty columns and rows behind the table."""
    lines = ["PatientID|volume|pe||", "a|0,5|1||", "b|2,0|0||", "||||", ""]
    text = "\r\n".join(lines).replace("|", separator)
    names, rows, classes = labels(saved(tmp_path, text.encode(encoding)))
    assert names == ("volume", "pe")
    assert classes == {"volume": ("0.5", "2"), "pe": ("0", "1")}
    assert [key for key, _ in rows] == ["a", "b"]


def test_the_other_tables_of_a_spreadsheet_are_read_as_well(tmp_path):
    lines = ["VolumeName;XYSpacing;ZSpacing;RescaleSlope;", "a.nii.gz;0,7;1,25;NaN;", ";;;;"]
    row = read_metadata(saved(tmp_path, "\r\n".join(lines).encode("utf-16")))["a"]
    assert (row.xy_spacing, row.z_spacing, row.rescale_slope) == ((0.7, 0.7), 1.25, None)
    path = saved(tmp_path, "sep=;\nPatientID;age;\na;61,5;\n;;\n")
    assert list(tables.read_attributes(path)) == [(3, "a", {"age": 61})]
    path = saved(tmp_path, "PatientID;age;\na;61;x\n")
    with pytest.raises(InputError, match="line 2: a cell in a column without a name"):
        list(tables.read_attributes(path))


# ---- people --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age", "sex", "expected"),
    [
        ("061Y", "Female", (61, "F")),
        ("61.0", "female", (61, "F")),
        ("720M", "F ", (60, "F")),
        ("999Y", "NaN", (None, "")),
        ("150", "-", (None, "")),
        ("000Y", "U", (None, "")),
        ("-45Y", "N/A", (None, "")),
        ("NaN", "male", (None, "M")),
    ],
)
def test_ages_and_sexes_are_read_alike_in_every_table(tmp_path, age, sex, expected):
    attributes = saved(tmp_path, f"PatientID,age,sex\na,{age},{sex}\n")
    [(_, _, cells)] = tables.read_attributes(attributes)
    assert (cells.get("age"), cells.get("sex", "")) == expected
    metadata = saved(tmp_path, f"VolumeName,PatientAge,PatientSex\na.nii,{age},{sex}\n")
    row = read_metadata(metadata)["a"]
    assert (row.age, row.sex) == expected


@pytest.mark.parametrize(("age", "sex"), [("old", "F"), ("61Y", "x1")])
def test_ages_and_sexes_are_refused_alike_in_every_table(tmp_path, age, sex):
    with pytest.raises(InputError, match=r"line 2: .*(age|sex)"):
        list(tables.read_attributes(saved(tmp_path, f"PatientID,age,sex\na,{age},{sex}\n")))
    with pytest.raises(InputError, match=r"line 2: Patient(Age|Sex)"):
        read_metadata(saved(tmp_path, f"VolumeName,PatientAge,PatientSex\na,{age},{sex}\n"))


# ---- CT-RATE -------------------------------------------------------------------------------------


def test_the_label_table_of_ct_rate(tmp_path):
    text = "VolumeName,Medical material,Lung nodule\nvalid_1_a_1.nii.gz,0,1\nvalid_1_a_2.NII,1,0\n"
    names, rows, _ = labels(saved(tmp_path, text))
    assert names == ("Medical_material", "Lung_nodule")
    assert [key for key, _ in rows] == ["valid_1_a_1", "valid_1_a_2"]


def test_two_columns_that_would_get_one_name_are_refused(tmp_path):
    with pytest.raises(InputError, match="'Lung_nodule' is there twice"):
        labels(saved(tmp_path, "VolumeName,Lung nodule,Lung_nodule\na,0,1\n"))
