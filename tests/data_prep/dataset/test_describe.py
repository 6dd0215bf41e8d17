"""describe: the cohort table, the contact sheet, what --verify finds, and the search for
identifying values."""

import csv
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.dataset.cohort import choose_slices, cohort_table, contact_sheet, label_rows
from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import VOLUME_COLUMNS, dataset_fingerprint, write_preparation
from data_prep.dataset.storage import (
    decode_record,
    encode_record,
    read_records,
    write_records,
    write_table,
)
from data_prep.dataset.verify import verify
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.prepare import prepare
from data_prep.privacy.leaks import SecretTexts, find_leaks
from data_prep.system.files import file_sha256
from data_prep.system.workers import WorkerPool
from tests.helpers import dicom_files
from tests.helpers.example_dataset import write_example_dataset


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(1) as pool:
        yield pool


@pytest.fixture
def example(tmp_path) -> Path:
    return write_example_dataset(tmp_path / "example")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Directories:
    folder = tmp_path_factory.mktemp("describe")
    for number in (1, 2, 3):
        datasets = dicom_files.slices(
            dicom_files.thorax(20, seed=number), study=number, patient=f"patient-{number}"
        )
        for ds in datasets:
            ds.StudyDate, ds.StudyTime, ds.AccessionNumber = (
                "20010203",
                "040506.789",
                f"A{number}7731",
            )
            ds.InstitutionName, ds.SeriesDescription = "County Hospital", "chest"
            ds.Manufacturer = "SIEMENS"
            ds.RequestAttributesSequence = [pydicom_item(f"order for {number} by Dr. Grey")]
        dicom_files.write(folder / "scans" / str(number), datasets)
    directories = Directories(folder / "scans", folder / "dataset", folder / "dataset-audit")
    prepare(Options(image_size=64), directories, num_workers=1)
    return directories


def pydicom_item(text: str):
    from pydicom.dataset import Dataset

    item = Dataset()
    item.RequestedProcedureDescription = text
    return item


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data_prep.describe", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_table_sheet_and_verification_of_a_sound_dataset(prepared, tmp_path):
    output = tmp_path / "description"
    result = run(
        f"--dataset={prepared.output_dir}",
        f"--output_dir={output}",
        "--verify",
        f"--audit_dir={prepared.audit_dir}",
        f"--input_dir={prepared.input_dir}",
        "--num_slices=5",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("Verified") == 2
    with open(output / "cohort.csv", newline="") as file:
        table = {(row["group"], row["item"]): row["value"] for row in csv.DictReader(file)}
    assert table["Dataset", "Volumes, slices"] == "3, 60"
    assert table["Patients", "Age, mean +/- sd"] == "61.0 +/- 0.0 years (of 3 patients)"
    assert table["Sex", "Female"] == "3"
    sheet = np.asarray(Image.open(output / "contact_sheet.png"))
    assert sheet.shape == (2 * (192 + 46) + 26, 4 * 192) and sheet.std() > 20


def test_table_counts(example):
    volumes = Dataset.open(example).volumes()
    volumes[0] |= {"slice_thickness_mm": 3.0, "contrast": True, "age": None, "sex": ""}
    rejected = [
        {"reason": "too_thick", "num_files": "30"},
        {"reason": "too_thick", "num_files": "12"},
    ]
    table = {(group, item): value for group, item, value in cohort_table(volumes, rejected)}
    assert table["Dataset", "Slice thickness < 3 mm: volumes, slices"] == "8, 96"
    assert table["Dataset", "Contrast-enhanced: volumes, slices"] == "1, 12"
    assert table["Patients", "Patients"] == "9"
    assert table["Sex", "not recorded"] == "1"
    assert table["Rejected", "too_thick"] == "2 series, 42 files"
    assert table["Split", "train: volumes, patients"] == "5, 5"


def test_contact_sheet_is_seeded_and_a_synthetic_one_says_so(example):
    first, again, other = (
        np.asarray(contact_sheet(Dataset.open(example), 6, seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    preparation = json.loads((example / "preparation.json").read_text())
    write_preparation(example, preparation | {"synthetic": False})
    title = np.asarray(contact_sheet(Dataset.open(example), 6, 0))[:24]
    assert (first[:24] > 0).sum() > (title > 0).sum()


def test_contact_sheet_repeats_no_slice_before_all_are_shown(example):
    volumes = Dataset.open(example).volumes()
    total = sum(volume["num_slices"] for volume in volumes)
    chosen = choose_slices(volumes, total, np.random.default_rng(0))
    assert len({(volume["volume_id"], index) for volume, index in chosen}) == total == len(chosen)
    few = choose_slices(volumes, len(volumes), np.random.default_rng(0))
    assert len({volume["volume_id"] for volume, _ in few}) == len(volumes)
    assert len(choose_slices(volumes, total + 7, np.random.default_rng(0))) == total + 7


def damaged_byte(directory: Path) -> None:
    path = directory / "train.array_record-00000"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def damaged_table(directory: Path) -> None:
    path = directory / "volumes.csv"
    path.write_text(path.read_text().replace("2.5", "2.6", 1))


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (damaged_byte, "train.array_record-00000: checksum"),
        (damaged_table, "volumes.csv: checksum"),
        (lambda d: (d / "test.array_record-00000").unlink(), "test.array_record-00000: missing"),
        (lambda d: (d / "features.json").write_text("{}"), "features.json: checksum"),
    ],
)
def test_verify_names_the_damaged_file(example, pool, damage, name):
    assert verify(Dataset.open(example), pool) == []
    damage(example)
    assert any(problem.startswith(name) for problem in verify(Dataset.open(example), pool))


def test_verify_finds_a_volume_that_is_there_twice(example, pool):
    path = example / "volumes.csv"
    first, second = (line.split(",")[0] for line in path.read_text().splitlines()[1:3])
    path.write_text(path.read_text().replace(second, first))
    assert any(
        f"volume {first} is there 2 times" in problem
        for problem in verify(Dataset.open(example), pool)
    )


def rewritten(example: Path, change) -> None:
    """The first training shard with changed records, and a preparation.json that agrees with it."""
    path = example / "train.array_record-00000"
    records = [dict(decode_record(r, (32, 32, 1))) for r in read_records(path)]
    write_records(path, [encode_record(**record) for record in change(records)])
    preparation = json.loads((example / "preparation.json").read_text())
    preparation["checksums"][path.name] = file_sha256(path)
    preparation["fingerprint"] = dataset_fingerprint(preparation["checksums"])
    write_preparation(example, preparation)


def swapped(records):
    records[2], records[3] = records[3], records[2]
    return records


def paired_across_the_gap(records):
    records[5]["pair_valid"] = True
    return records


def backwards(records):
    for record in records:
        record["position_mm"] = -record["position_mm"]
    return records


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (swapped, "slice_index does not count"),
        (paired_across_the_gap, "pair_valid does not agree with"),
        (backwards, "positions do not increase"),
        (lambda records: records[:-1], "23 records"),
        (lambda records: records[12:] + records[:12], "belong to another volume"),
    ],
)
def test_verify_finds_wrong_records_behind_right_checksums(example, pool, change, problem):
    rewritten(example, change)
    problems = verify(Dataset.open(example), pool)
    assert any(
        problem in line and line.startswith("train.array_record-00000") for line in problems
    ), problems


def test_jumps_and_damaged_files_are_no_faults_of_the_dataset(tmp_path, pool):
    """An origin that jumps aside ends a pair; a zip member that cannot be read has nothing to
    leak."""
    jumping = dicom_files.slices(dicom_files.thorax(24))
    for ds in jumping[12:]:
        ds.ImagePositionPatient[0] = "-140"
    dicom_files.write(tmp_path / "scans" / "a", jumping)
    content = bytearray(b"".join(bytes([number % 251]) for number in range(4000)))
    with zipfile.ZipFile(tmp_path / "scans" / "b.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("member", bytes(content))
    damaged = bytearray((tmp_path / "scans" / "b.zip").read_bytes())
    damaged[60:70] = b"\xff" * 10
    (tmp_path / "scans" / "b.zip").write_bytes(damaged)
    directories = Directories(tmp_path / "scans", tmp_path / "dataset", tmp_path / "dataset-audit")
    preparation, _ = prepare(Options(image_size=64, splits=(1, 0, 0)), directories, num_workers=1)
    assert preparation["counts"]["files_in_volumes"] == 24
    assert sum(preparation["counts"]["files_not_images"].values()) == 1
    assert Dataset.open(directories.output_dir).volumes()[0]["gap_positions"] == "11"
    assert verify(Dataset.open(directories.output_dir), pool) == []
    assert (
        find_leaks(
            Dataset.open(directories.output_dir), directories.input_dir, directories.audit_dir, pool
        )
        == []
    )


def test_needles_are_found_by_length_and_boundary():
    needles = SecretTexts(["12345", "patient-4711-x", "Meier"])
    assert list(needles.find_in_text("id=12345; Meier")) == ["12345", "Meier"]
    assert list(needles.find_in_text("a123456 Meiers")) == []
    assert list(needles.find_in_text("xxpatient-4711-xyy")) == ["patient-4711-x"]
    assert list(needles.find(b"\0\0patient-4711-x")) == [(2, "patient-4711-x")]
    assert list(needles.find(b"1234")) == []


def in_pixels(directory: Path) -> None:
    path = directory / "train.array_record-00000"
    records = [dict(decode_record(r, (64, 64, 1))) for r in read_records(path)]
    image = bytearray(records[4]["image"].tobytes())
    hidden = dicom_files.uid(1).encode()
    image[100 : 100 + len(hidden)] = hidden
    records[4]["image"] = np.frombuffer(bytes(image), np.uint8).reshape(64, 64, 1)
    write_records(path, [encode_record(**record) for record in records])


def in_table(old: str, new: str):
    def plant(directory: Path) -> None:
        path = directory / "volumes.csv"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return plant


def in_preparation(text: str):
    def plant(directory: Path) -> None:
        preparation = json.loads((directory / "preparation.json").read_text())
        write_preparation(directory, preparation | {"comment": text})

    return plant


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (in_pixels, "train.array_record-00000: record 4"),
        (in_table(",train,", ",train Doe^Jane,"), "volumes.csv: line 2, split"),
        (in_table("SIEMENS", "patient-1"), "volumes.csv: line 2, manufacturer: "),
        (in_preparation("made 20010203"), "preparation.json"),
        (in_preparation("at 040506.789 h"), "preparation.json"),
        (in_preparation("A27731"), "preparation.json"),
        (in_preparation("order for 2 by Dr. Grey"), "preparation.json"),
        (lambda d: (d / "patient-2").write_text(""), "patient-2: its name"),
        (lambda d: (d / "note.bin").write_bytes(b"\0County Hospital"), "note.bin: its bytes"),
    ],
)
def test_planted_identifiers_are_found(prepared, tmp_path, pool, plant, name):
    copy = tmp_path / "dataset"
    shutil.copytree(prepared.output_dir, copy)
    plant(copy)
    leaks = find_leaks(Dataset.open(copy), prepared.input_dir, prepared.audit_dir, pool)
    assert leaks and all(leak.startswith(name) for leak in leaks), leaks
    # the report tells no secrets
    assert not any("Doe" in leak or "27731" in leak for leak in leaks)


@pytest.mark.parametrize(
    ("keyword", "value", "kernel"),
    [
        ("PatientName", "Greyfield^Anne", "GREYFIELD"),
        ("PatientID", "ab-47-cd", "AB-47-CD"),
        ("InstitutionName", "Northwing", "for northwing"),
        ("StudyDate", "20010203", "2001 0203 20010"),
    ],
)
def test_identifiers_in_the_published_texts_are_found(tmp_path, pool, keyword, value, kernel):
    """In the kernel, whatever the capitals, where somebody wrote them: they are not published."""
    for number in (1, 2, 3):
        datasets = dicom_files.slices(
            dicom_files.thorax(20, seed=number), study=number, patient=f"patient-{number}"
        )
        for ds in datasets:
            if number == 2:
                setattr(ds, keyword, value)
                ds.ConvolutionKernel = kernel
        dicom_files.write(tmp_path / "scans" / str(number), datasets)
    directories = Directories(tmp_path / "scans", tmp_path / "dataset", tmp_path / "dataset-audit")
    prepare(Options(image_size=32), directories, num_workers=1)
    where = directories.input_dir, directories.audit_dir, pool
    assert find_leaks(Dataset.open(directories.output_dir), *where) == []
    table = directories.output_dir / "volumes.csv"
    assert kernel not in table.read_text()
    table.write_text(table.read_text().replace(",other,other,", f",other,{kernel},"))
    leaks = find_leaks(Dataset.open(directories.output_dir), *where)
    assert leaks and all(", kernel: " in leak for leak in leaks), leaks
    assert keyword == "StudyDate" or any("source value" in leak for leak in leaks), leaks


def test_a_clean_dataset_has_no_leaks(prepared, pool):
    assert (
        find_leaks(Dataset.open(prepared.output_dir), prepared.input_dir, prepared.audit_dir, pool)
        == []
    )


def test_a_damaged_dataset_ends_with_exit_code_1(example):
    damaged_byte(example)
    result = run(f"--dataset={example}", "--verify")
    assert result.returncode == 1 and "WRONG train.array_record-00000: checksum" in result.stdout


def test_wrong_arguments_end_in_one_line(example, tmp_path):
    for arguments, message in (
        ([f"--dataset={tmp_path / 'no'}"], "no such directory"),
        ([f"--dataset={example}", "--verify", f"--audit_dir={tmp_path}"], "belong together"),
        (
            [
                f"--dataset={example}",
                "--verify",
                f"--audit_dir={tmp_path}",
                f"--input_dir={tmp_path}",
            ],
            "no sources.csv",
        ),
    ):
        result = run(*arguments)
        assert (
            result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
        )


@pytest.fixture
def annotated(tmp_path) -> Path:
    return write_example_dataset(
        tmp_path / "annotated", masks=True, slice_labels=True, volume_labels=True
    )


def test_table_counts_labels_and_nodules_by_split(annotated):
    found = {(group, item): value for group, item, value in label_rows(Dataset.open(annotated))}
    assert found["Label pe_present_on_image (slices)", "missing"] == "train 5, validation 2, test 2"
    assert found["Label pe_positive_exam (volumes)", "1"] == "train 2, validation 1, test 1"
    assert found["Label smoker (patients)", "missing"] == "train 1, validation 0, test 0"
    assert found["Masks", "slices with foreground"] == "train 30, validation 12, test 12"
    assert found["Masks", "nodules of malignancy 5"] == "train 6, validation 2, test 2"
    assert ("Label pe_positive_exam (volumes)", "missing") not in found


def without_first_row(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1] + lines[2:]))


def change_cell(path: Path, column: str, value: str) -> None:
    """In the third row."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    rows[2][column] = value
    write_table(path, rows[0], rows)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda d: without_first_row(d / "slices.csv"), "slices.csv: its rows are not the records"),
        (lambda d: without_first_row(d / "labels.csv"), "labels.csv: its rows are not the volumes"),
        (
            lambda d: without_first_row(d / "regions.csv"),
            "its masks hold region 1, which regions.csv does not list",
        ),
        (
            lambda d: change_cell(d / "slices.csv", "mask_area_px", "3"),
            "the foreground of its masks differs from slices.csv",
        ),
        (
            lambda d: change_cell(d / "slices.csv", "pe_present_on_image", "2"),
            "holds 2, which is not one of its 2",
        ),
        (
            lambda d: change_cell(d / "slices.csv", "pe_present_on_image", "x"),
            "slices.csv, line 4: ",
        ),
        (lambda d: change_cell(d / "labels.csv", "smoker", "-1"), "labels.csv: smoker holds -1"),
        (
            lambda d: change_cell(d / "regions.csv", "last_slice", "12"),
            "its slices are not slices of the volume",
        ),
        (lambda d: change_cell(d / "regions.csv", "region", "2"), "its number occurs twice"),
        (lambda d: (d / "regions.csv").unlink(), "regions.csv: no such file"),
    ],
)
def test_verify_compares_labels_and_masks_with_the_records(annotated, pool, damage, problem):
    assert verify(Dataset.open(annotated), pool) == []
    damage(annotated)
    found = verify(Dataset.open(annotated), pool)
    assert any(problem in line for line in found), found
    assert all("\n" not in line for line in found)


def test_verify_finds_a_label_of_patients_that_differs_between_their_volumes(annotated, pool):
    rows = Dataset.open(annotated).volumes()
    rows[1]["patient_id"] = rows[0]["patient_id"]
    write_table(annotated / "volumes.csv", VOLUME_COLUMNS, rows)
    assert any(
        "smoker is a label of patients and differs" in line
        for line in verify(Dataset.open(annotated), pool)
    )
