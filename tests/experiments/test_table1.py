"""Table I: counts of LIDC-IDRI from the annotations of its scans, and the command."""

import csv
import itertools
import subprocess
import sys
import tarfile

import pytest

from data_prep.labels import lidc
from data_prep.system.errors import InputError
from experiments.study import lidc_counts
from tests.data_prep.labels.test_lidc import SCORES, rectangle, xml, xml_nodule
from tests.helpers.example_dataset import write_example_dataset

HEADER = "patient_id,series_instance_uid,slice_thickness_mm,median_slice_spacing_mm"


def test_counts_of_a_part_of_the_collection(real_data, tmp_path):
    """The first 60 of 1,018 scans; `tests/campaigns/lidc_counts.py` compares all with the numbers
    of the paper."""
    with tarfile.open(real_data / "lidc_xml" / "tcia-lidc-xml_all1318.tar.xz") as archive:
        files = (archive.extractfile(member) for member in archive if member.name.endswith(".xml"))
        for number, file in enumerate(itertools.islice(files, 60)):
            (tmp_path / f"{number}.xml").write_bytes(file.read())
    readings = lidc.read_readings(tmp_path)
    contours = [
        len(nodule.contours)
        for one in readings.values()
        for session in one.sessions
        for nodule in session
    ]
    assert (len(readings), len(contours), sum(contours)) == (60, 414, 2722)
    geometry = lidc_counts.read_geometry(real_data / "lidc_xml" / "series_geometry.csv")
    assert len(geometry) == 1018
    patients = lidc_counts.first_scan_votes(
        readings, [one for one in geometry if one.series_instance_uid in readings]
    )
    assert lidc_counts.count(patients, 0.7, 20) == {
        "Slices": 736,
        "Cancer: volumes": 24,
        "Ambiguous: volumes": 32,
        "No cancer: volumes": 21,
        "Malignancy score 1: slices": 44,
        "Malignancy score 2: slices": 81,
        "Malignancy score 3: slices": 280,
        "Malignancy score 4: slices": 191,
        "Malignancy score 5: slices": 140,
        "Patients": 48,
    }
    weaker = lidc_counts.count(patients, 0.5, 8)
    assert (weaker["Slices"], weaker["Patients"]) == (1049, 51)


@pytest.fixture
def annotations(tmp_path):
    """Patient A has two scans, B one without a nodule of 3 mm."""
    folder = tmp_path / "xml"
    folder.mkdir()
    nodules = [
        xml_nodule(rectangle(10, 10, 8, 8), SCORES),
        xml_nodule(rectangle(60, 60, 8, 8), SCORES | {"malignancy": 1}),
    ]
    (folder / "1.xml").write_bytes(xml(nodules, series="first"))
    (folder / "2.xml").write_bytes(xml(nodules[:1], series="second"))
    (folder / "3.xml").write_bytes(xml([], series="third"))
    return folder


def geometry_file(tmp_path, *lines: str, header: str = HEADER):
    path = tmp_path / "geometry.csv"
    path.write_text("\n".join([header, *lines]))
    return path


def test_only_a_patients_first_scan_counts(annotations, tmp_path):
    readings = lidc.read_readings(annotations)
    path = geometry_file(tmp_path, "B,third,1,1", "A,first,1,1", "A,second,1,1")
    counted = lidc_counts.count(
        lidc_counts.first_scan_votes(readings, lidc_counts.read_geometry(path)), 0.7, 20
    )
    assert {name: number for name, number in counted.items() if number} == {
        "Slices": 2,
        "Cancer: volumes": 1,
        "No cancer: volumes": 1,
        "Malignancy score 1: slices": 1,
        "Malignancy score 4: slices": 1,
        "Patients": 1,
    }
    ordered = ("A,first,1,1,9", "B,third,1,1,10", "A,second,1,1,8")
    path = geometry_file(tmp_path, *ordered, header=f"{HEADER},scan_order")
    counted = lidc_counts.count(
        lidc_counts.first_scan_votes(readings, lidc_counts.read_geometry(path)), 0.7, 20
    )
    assert (counted["Slices"], counted["No cancer: volumes"]) == (1, 0)
    votes = lidc_counts.first_scan_votes(readings, lidc_counts.read_geometry(path))
    assert lidc_counts.count(votes, 0.7, 36)["Slices"] == 0


def test_bad_geometry_is_named(annotations, tmp_path):
    readings = lidc.read_readings(annotations)
    for lines, words in (
        ((), "no line"),
        (("A,first,1",), "line 2: not a number"),
        (("A,first,1,1", "A,second,thin,1"), "line 3: not a number"),
        (("A,first,1,0",), "not above 0"),
        (("A,first,1,nan",), "not above 0"),
        (("A,first,1,1", "A,first,1,1"), "twice"),
    ):
        with pytest.raises(InputError, match=words):
            lidc_counts.read_geometry(geometry_file(tmp_path, *lines))
    with pytest.raises(InputError, match="no column slice_thickness_mm"):
        lidc_counts.read_geometry(
            geometry_file(tmp_path, "A,first", header="patient_id,series_instance_uid")
        )
    with pytest.raises(InputError, match=r"none\.csv"):
        lidc_counts.read_geometry(tmp_path / "none.csv")
    partial = lidc_counts.read_geometry(geometry_file(tmp_path, "A,first,1,1", "B,other,1,1"))
    with pytest.raises(
        InputError, match="2 series of --annotations are not in --geometry, and 1 the reverse"
    ):
        lidc_counts.first_scan_votes(readings, partial)


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.table1", *arguments], capture_output=True, text=True
    )


def test_command_writes_both_parts(annotations, tmp_path):
    geometry = geometry_file(tmp_path, "A,first,1,1", "B,third,1,1", "A,second,1,1")
    dataset = write_example_dataset(tmp_path / "example")
    output = tmp_path / "table"
    given = (
        f"--annotations={annotations}",
        f"--geometry={geometry}",
        f"--dataset={dataset}",
        f"--output_dir={output}",
    )
    result = run(*given)
    assert result.returncode == 0, result.stdout + result.stderr
    text = (output / "table1.md").read_text()
    assert (
        text in result.stdout and "| Slices | 2 | 10,005 |" in text and "## Dataset example" in text
    )
    with open(output / "table1.csv", newline="") as file:
        rows = {
            (row["cohort"], row["characteristic"]): (row["ours"], row["paper"])
            for row in csv.DictReader(file)
        }
    assert rows["LIDC-IDRI", "Volumes"] == ("3", "1012") and rows["LIDC-IDRI", "Patients"] == (
        "1",
        "840",
    )
    assert rows["example", "Volumes, slices"] == ("9, 108", "")
    assert (output / "example" / "contact_sheet.png").exists()


def test_command_refuses_in_one_line(annotations, tmp_path):
    geometry = geometry_file(tmp_path, "A,first,1,1")
    for arguments, words in (
        ((), "nothing to count"),
        ((f"--annotations={annotations}",), "belong together"),
        ((f"--annotations={tmp_path / 'none'}", f"--geometry={geometry}"), "no such directory"),
    ):
        result = run(*arguments, f"--output_dir={tmp_path / 'table'}")
        assert result.returncode == 2 and words in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
