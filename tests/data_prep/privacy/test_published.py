"""What leaves the archive: known spellings and bounded numbers; and the search that checks it."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.dataset.reader import Dataset
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.prepare import prepare
from data_prep.privacy import pseudonyms
from data_prep.privacy.leaks import find_leaks, search
from data_prep.system.workers import WorkerPool
from tests.helpers import dicom_files

KERNELS = (
    *("B30f", "B31f", "Br40d", "Bl57f", "Hr38", "Qr40d", "I31f 3", "Br36 2", "B_SHARP_C"),
    *("STANDARD", "LUNG", "BONE", "BONEPLUS", "SOFT", "DETAIL", "CHST", "EDGE", "HD Lung"),
    *("FC08", "FC51-H", "FC18", "YA", "YC", "C", "D", "L", "EB", "Smooth (iDose 4)", "IMR1"),
    *("Standard (B)", "BODY FILTER/BONE", "STANDARD ASiR 50", "Y-Sharp", "31", "AiCE Body Sharp"),
)


def dataset_of(folder: Path, change, number: int = 1) -> Directories:
    """The dataset of scans that `change(dataset, scan)` changed."""
    for scan in range(number):
        datasets = dicom_files.slices(
            dicom_files.thorax(20, seed=scan), study=scan + 1, patient=f"p{scan}"
        )
        for ds in datasets:
            change(ds, scan)
        dicom_files.write(folder / "scans" / str(scan), datasets)
    directories = Directories(folder / "scans", folder / "dataset", folder / "audit")
    options = Options(image_size=32, splits=(1.0, 0.0, 0.0))
    prepare(options, directories, num_workers=1)
    return directories


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(1) as pool:
        yield pool


# ---- two further members -------------------------------------------------------------------------


def test_kernels_of_the_vendors_keep_their_spelling_and_names_do_not():
    assert [pseudonyms.public_kernel(kernel) for kernel in KERNELS] == list(KERNELS)
    for text in ("SMITH JOHN", "LUNG Smith", "J D", "F 61 Y", "+1+1", "-2-3", "@SUM(1+9)"):
        assert pseudonyms.public_kernel(text) == "other"
    for text in ("Smith", "born 1961", "=1"):
        assert pseudonyms.public_ethnic_group(text) == "other"


def test_numbers_of_a_header_are_bounded(tmp_path):
    """A patient number in each number field; where the header is refused, nothing is published."""

    def change(ds, scan):
        ds.KVP, ds.GantryDetectorTilt = ("19610407", "4711471") if scan else ("120", "0")

    directories = dataset_of(tmp_path, change, 2)
    text = (directories.output_dir / "volumes.csv").read_text()
    assert "19610407" not in text and "4711471" not in text
    volumes = Dataset.open(directories.output_dir).volumes()
    assert sorted(str(volume["tube_voltage_kvp"]) for volume in volumes) == ["120.0", "None"]


def test_values_in_number_columns_are_found(tmp_path, pool):
    directories = dataset_of(tmp_path, lambda ds, scan: setattr(ds, "PatientID", "47114711"))
    where = (Dataset.open(directories.output_dir), directories.input_dir, directories.audit_dir)
    assert find_leaks(*where, pool) == []
    table = directories.output_dir / "volumes.csv"
    for planted in ("47114711.0", "1.47114711"):
        text = table.read_text()
        table.write_text(text.replace(",2.5,", f",{planted},", 1))
        where = (Dataset.open(directories.output_dir), *where[1:])
        assert any("volumes.csv: line 2, slice_" in leak for leak in find_leaks(*where, pool))
        table.write_text(text)


def test_the_search_goes_on_past_damaged_elements_and_counts_them(tmp_path, pool):
    """A number of a wrong length before the name of the patient, in a private sequence, too."""

    def change(ds, scan):
        ds.PatientName, ds.PatientID = "Greyfield^Anne", "47-11"

    directories = dataset_of(tmp_path, change)
    for path in sorted((directories.input_dir / "0").iterdir())[:7]:
        content = path.read_bytes()
        at = content.index(b"\x10\0\x10\0PN")
        path.write_bytes(content[:at] + b"\x09\0\x01\x10FD\4\0\0\0\x20\x41" + content[at:])
    table = directories.output_dir / "volumes.csv"
    table.write_text(table.read_text().replace(",STANDARD,", ",GREYFIELD,"))
    where = (Dataset.open(directories.output_dir), directories.input_dir, directories.audit_dir)
    found = search(*where, pool)
    assert found.leaks and (found.num_damaged, found.num_unread) == (7, 0)
    path.write_bytes(content[:at] + b"\x09\0\x01\0LO\0\0" * 100_000)
    assert search(*where, pool).num_unread == 1


def test_our_own_names_and_words_are_no_leaks(tmp_path, pool):
    """A patient Train of the institution Volumes, described in words of ours, with a kernel that is
    another patient's name."""

    def change(ds, scan):
        ds.PatientName = "train^slice" if scan else "Standard^bounds"
        ds.InstitutionName, ds.StationName = "volumes.csv", "array_record"
        ds.SeriesDescription, ds.StudyDescription = "preparation.json", "validation"
        ds.AccessionNumber = "image_size"

    directories = dataset_of(tmp_path, change, 2)
    where = (Dataset.open(directories.output_dir), directories.input_dir, directories.audit_dir)
    assert find_leaks(*where, pool) == []


def test_names_of_files_do_not_act_on_a_terminal_nor_as_formulas(tmp_path):
    """Escapes in the name of a folder, and a file that is named as a formula."""
    folder = tmp_path / "scans" / "\x1b[31mred\x07\r"
    dicom_files.write(folder, dicom_files.slices(dicom_files.thorax(20)))
    os.rename(folder / "IM0000", tmp_path / "scans" / '=HYPERLINK("x")')
    directories = Directories(tmp_path / "scans", tmp_path / "out", tmp_path / "audit")
    prepare(Options(image_size=32, splits=(1.0, 0.0, 0.0)), directories, num_workers=1)
    with open(tmp_path / "audit" / "sources.csv", newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    assert '\'=HYPERLINK("x")' in paths and "\\x1b[31mred\\x07\\r/IM0001" in paths
    table = tmp_path / "a\x1b]0;title\x07.csv"
    table.write_text("PatientID,x\n")
    command = [sys.executable, "-m", "data_prep.prepare", f"--input_dir={tmp_path / 'scans'}"]
    command += [f"--output_dir={tmp_path / 'other'}", f"--labels_csv={table}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "\x1b" not in done.stderr and "\\x1b]0;title" in done.stderr
