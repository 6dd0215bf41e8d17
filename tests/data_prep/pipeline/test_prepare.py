"""prepare on small generated archives: same bytes however it ran, every file accounted for, growth,
refusals."""

import csv
import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest

from data_prep.dataset import tfds
from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import SPLITS
from data_prep.dataset.verify import verify
from data_prep.pipeline import convert, steps
from data_prep.pipeline import plan as planning
from data_prep.pipeline.accounting import num_failed_for_now
from data_prep.pipeline.assemble import NewVolume, freeze
from data_prep.pipeline.convert import convert_exam
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.prepare import dry_run, prepare
from data_prep.scan import loading
from data_prep.scan.rules import Rules
from data_prep.scan.volume import load_volume
from data_prep.system.errors import DatasetError, InputError
from data_prep.system.workers import WorkerPool
from tests.helpers import dicom_files
from tests.helpers.forked_commands import ended
from tests.helpers.opened_files import listed, listing

NUM_SLICES = 21
OPTIONS = Options(image_size=48, shard_size_mb=0.05)


def add_scan(archive: Path, number: int, **attributes) -> None:
    hu = dicom_files.thorax(NUM_SLICES, seed=number)
    options = {"study": number, "patient": f"patient-{number}"} | attributes
    dicom_files.write(archive / f"scan{number}", dicom_files.slices(hu, **options))


def directories(folder: Path, archive: Path) -> Directories:
    return Directories(archive, folder / "dataset", folder / "private")


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="session")
def archive(tmp_path_factory) -> Path:
    """Five patients; one of them with a second reconstruction and a duplicate; a short series; two
    other files."""
    folder = tmp_path_factory.mktemp("archive")
    for number in range(1, 6):
        add_scan(folder, number)
    sharp = dicom_files.slices(
        dicom_files.thorax(NUM_SLICES, seed=9), series=2, study=1, patient="patient-1"
    )
    for ds in sharp:
        ds.ConvolutionKernel = "BONE"
    dicom_files.write(folder / "scan1", sharp)
    shutil.copy(folder / "scan2" / "IM0003", folder / "scan2" / "again")
    short = dicom_files.slices(dicom_files.thorax(5, seed=8), study=8, patient="patient-8")
    dicom_files.write(folder / "short", short)
    (folder / "notes.txt").write_text("nothing to see")
    (folder / "empty").write_bytes(b"")
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, archive, key_file) -> Directories:
    where = directories(tmp_path_factory.mktemp("prepared"), archive)
    _, changed = prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file)
    assert changed
    return where


def test_dataset_is_sound_and_holds_every_exam_once(prepared):
    with WorkerPool(1) as pool:
        assert verify(Dataset.open(prepared.output_dir), pool) == []
    volumes = Dataset.open(prepared.output_dir).volumes()
    assert len(volumes) == 5
    assert {v["kernel"] for v in volumes} == {"STANDARD"}  # not the sharp one
    assert Counter(v["split"] for v in volumes) == {"train": 3, "validation": 1, "test": 1}
    assert {(v["num_slices"], v["sex"], v["age"], v["manufacturer"]) for v in volumes} == {
        (NUM_SLICES, "F", 61, "other")  # "Example Scanners" is no manufacturer
    }
    assert len(list(prepared.output_dir.glob("train.*"))) > 1  # shards of about 50 kB


def test_every_file_is_accounted_for(prepared, archive):
    counts = Dataset.open(prepared.output_dir).preparation["counts"]
    num_files = sum(1 for path in archive.rglob("*") if path.is_file())
    assert counts == {
        "files": num_files,
        "files_in_volumes": 5 * NUM_SLICES,
        "files_dropped": {"duplicate_slice": 1},
        "files_rejected": {"other_reconstruction": NUM_SLICES, "too_few_slices": 5},
        "files_not_images": {"not_dicom": 2},
        "volumes_without_files": 0,
        "series_rejected": {"other_reconstruction": 1, "too_few_slices": 1},
    }
    with open(prepared.audit_dir / "sources.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    listed = {str(path.relative_to(archive)) for path in archive.rglob("*") if path.is_file()}
    assert len(rows) == num_files and {row["path"] for row in rows} == listed
    with open(prepared.output_dir / "rejected.csv", newline="") as file:
        rejected = list(csv.DictReader(file))
    assert {(row["reason"], row["num_files"]) for row in rejected} == {
        ("other_reconstruction", str(NUM_SLICES)),
        ("too_few_slices", "5"),
    }


def test_private_things_are_private_and_nothing_is_left_over(prepared):
    assert prepared.audit_dir.stat().st_mode & 0o777 == 0o700
    expected = {
        "volumes.csv",
        "rejected.csv",
        "dataset_info.json",
        "features.json",
        "preparation.json",
    }
    names = set(content(prepared.output_dir))
    assert {name for name in names if ".array_record-" not in name} == expected
    assert sorted(p.name for p in prepared.audit_dir.iterdir()) == [
        "archive.json",
        "notes",
        "refused.csv",
        "sources.csv",
        "splits.json",
    ]


def test_same_bytes_with_two_workers_and_from_another_folder(prepared, tmp_path, archive, key_file):
    copy = tmp_path / "elsewhere" / "scans"
    shutil.copytree(archive, copy)
    other = directories(tmp_path, copy)
    prepare(OPTIONS, other, num_workers=2, pseudonym_key_file=key_file)
    assert content(other.output_dir) == content(prepared.output_dir)
    assert content(other.audit_dir) == content(prepared.audit_dir)


def test_killed_at_random_moments_and_run_again(prepared, tmp_path, archive, key_file):
    """SIGKILL, later and later, until a run gets through; nothing that a killed run left shows in
    the result."""
    where = directories(tmp_path, archive)
    command = [
        sys.executable,
        "-m",
        "data_prep.prepare",
        f"--input_dir={archive}",
        f"--output_dir={where.output_dir}",
    ]
    command += [
        f"--audit_dir={where.audit_dir}",
        f"--pseudonym_key_file={key_file}",
        "--num_workers=1",
    ]
    command += [f"--image_size={OPTIONS.image_size}", f"--shard_size_mb={OPTIONS.shard_size_mb}"]
    random.seed(0)
    states = set()
    for attempt in range(5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        steps = [
            lambda: where.records_dir.exists(),
            lambda: any(where.notes_dir.glob("*.json")),
            lambda: len(list(where.notes_dir.glob("*.json"))) > 3,
            lambda: where.frozen_file.exists(),
            lambda: len(list(where.output_dir.glob("*.array_record-*"))) > 1,
        ]
        deadline = time.monotonic() + 120
        while process.poll() is None and not steps[attempt]() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.02))
        process.kill()
        process.wait()
        states.add(tuple(sorted(content(tmp_path))))
    assert len(states) > 2, "the kills all came at the same moment"
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert content(where.output_dir) == content(prepared.output_dir)
    assert content(where.audit_dir) == content(prepared.audit_dir)


def test_a_killed_run_is_not_taken_for_a_dataset(tmp_path, archive, key_file, monkeypatch):
    where = directories(tmp_path, archive)

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(tfds, "_write_tfds_metadata", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file)
    with pytest.raises(DatasetError, match="not a complete dataset"):
        Dataset.open(where.output_dir)
    monkeypatch.undo()
    # decisions are made: other options are refused
    with pytest.raises(InputError, match="image_size=48, not 64"):
        prepare(Options(image_size=64, shard_size_mb=0.05), where, pseudonym_key_file=key_file)


def test_terminated_run_says_how_to_continue(tmp_path, archive):
    command = [
        sys.executable,
        "-m",
        "data_prep.prepare",
        f"--input_dir={archive}",
        f"--output_dir={tmp_path / 'd'}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "d" / ".work").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75
    assert errors.splitlines()[-1] == "stopped; run the same command again to continue"
    assert "Traceback" not in errors


def test_complete_dataset_is_left_alone(prepared, key_file):
    before = {path: path.stat().st_mtime_ns for path in prepared.output_dir.iterdir()}
    preparation, changed = prepare(OPTIONS, prepared, num_workers=1, pseudonym_key_file=key_file)
    assert not changed and preparation["counts"]["files_in_volumes"] == 5 * NUM_SLICES
    assert {path: path.stat().st_mtime_ns for path in prepared.output_dir.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (Options(image_size=64, shard_size_mb=0.05), "image_size=48, not 64"),
        (
            Options(image_size=48, shard_size_mb=0.05, windows=((50, 350), (-600, 1500))),
            "windows=50,350, not 50,350 -600,1500",
        ),
        (
            Options(image_size=48, shard_size_mb=0.05, splits=(1, 0, 0)),
            "splits=0.8,0.1,0.1, not 1,0,0",
        ),
        (
            Options(image_size=48, shard_size_mb=0.05, rules=Rules(min_slices=5)),
            "min_slices=20, not 5",
        ),
    ],
)
def test_other_options_are_refused_by_name(prepared, key_file, options, named):
    with pytest.raises(InputError) as error:
        prepare(options, prepared, pseudonym_key_file=key_file)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_another_key_is_refused(prepared, tmp_path):
    (tmp_path / "key").write_text("another key, another key")
    with pytest.raises(InputError, match="another pseudonym key"):
        prepare(OPTIONS, prepared, pseudonym_key_file=tmp_path / "key")


def test_grown_archive_appends(tmp_path, archive, key_file):
    """New patients, a new scan of an old patient, a new reconstruction of an old exam, a new file
    in an old series."""
    scans = tmp_path / "scans"
    shutil.copytree(archive, scans)
    where = directories(tmp_path, scans)
    prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file)
    before = content(where.output_dir)
    files = {path.name: path.stat() for path in where.output_dir.glob("*.array_record-*")}
    old = {v["volume_id"]: v for v in Dataset.open(where.output_dir).volumes()}
    splits = json.loads((where.audit_dir / "splits.json").read_text())

    for number in (11, 12, 13):
        add_scan(scans, number)
    add_scan(scans, 14, patient="patient-3")
    third = dicom_files.slices(
        dicom_files.thorax(NUM_SLICES, seed=4), study=4, series=3, patient="patient-4"
    )
    dicom_files.write(scans / "scan4", third, seed=5)
    late = dicom_files.slices(
        dicom_files.thorax(NUM_SLICES + 1, seed=5), study=5, patient="patient-5"
    )[-1:]
    dicom_files.write(scans / "late", late)
    preparation, changed = prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file)

    assert changed
    after = content(where.output_dir)
    for name in before:
        if ".array_record-" in name:
            assert after[name] == before[name]
            status = (where.output_dir / name).stat()
            assert (status.st_mtime_ns, status.st_ino) == (
                files[name].st_mtime_ns,
                files[name].st_ino,
            )
    volumes = {v["volume_id"]: v for v in Dataset.open(where.output_dir).volumes()}
    assert {name: volumes[name] for name in old} == old
    assert len(volumes) == 9
    grown = json.loads((where.audit_dir / "splits.json").read_text())
    assert {patient: grown[patient] for patient in splits} == splits and len(grown) == 8
    assert {(v["patient_id"], v["split"]) for v in volumes.values()} == set(grown.items())
    per_patient = Counter(v["patient_id"] for v in volumes.values())
    [twice] = [patient for patient, number in per_patient.items() if number == 2]
    assert twice in splits  # the known patient's new exam
    ends = {
        split: max(v["first_record"] for v in old.values() if v["split"] == split)
        for split in SPLITS
    }
    assert all(
        v["first_record"] > ends[v["split"]] for name, v in volumes.items() if name not in old
    )
    assert preparation["counts"]["files_rejected"] == {
        "other_reconstruction": 2 * NUM_SLICES,
        "series_changed": 1,
        "too_few_slices": 5,
    }
    with WorkerPool(1) as pool:
        assert verify(Dataset.open(where.output_dir), pool) == []
    assert not prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file)[1]


def test_growth_that_is_killed_touches_nothing_old_and_ends_the_same(
    tmp_path, archive, key_file, monkeypatch
):
    def killed(*arguments, **options):
        raise KeyboardInterrupt

    for name in ("undisturbed", "disturbed"):
        scans = tmp_path / name / "scans"
        shutil.copytree(archive, scans)
        where = directories(tmp_path / name, scans)
        prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file)
        old = {path: path.stat() for path in where.output_dir.glob("*.array_record-*")}
        add_scan(scans, 11)
        add_scan(scans, 14, patient="patient-3")
        places = [
            (steps, "freeze"),
            (tfds, "write_preparation"),
            (steps, "keep_notes"),
        ]
        for module, step in places if name == "disturbed" else ():
            monkeypatch.setattr(module, step, killed)
            with pytest.raises(KeyboardInterrupt):
                prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file)
            monkeypatch.undo()
            assert {path: path.stat().st_mtime_ns for path in old} == {
                p: s.st_mtime_ns for p, s in old.items()
            }
        prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file)
    disturbed, undisturbed = (
        directories(tmp_path / name, archive) for name in ("disturbed", "undisturbed")
    )
    assert content(disturbed.output_dir) == content(undisturbed.output_dir)
    assert content(disturbed.audit_dir) == content(undisturbed.audit_dir)
    assert len(Dataset.open(disturbed.output_dir).volumes()) == 7


def renamed(scans: Path) -> None:
    (scans / "scan1").rename(scans / "moved")


def zipped(scans: Path) -> None:
    shutil.make_archive(str(scans / "scan1"), "zip", scans / "scan1")
    shutil.rmtree(scans / "scan1")


@pytest.mark.parametrize("reconstructions", ["all", "one_per_study"])
@pytest.mark.parametrize("rearranged", [renamed, zipped])
def test_a_rearranged_archive_is_the_same_archive(
    tmp_path, archive, key_file, reconstructions, rearranged
):
    scans = tmp_path / "scans"
    shutil.copytree(archive, scans)
    options = dataclasses.replace(OPTIONS, rules=Rules(reconstructions=reconstructions))
    where = directories(tmp_path, scans)
    before, _ = prepare(options, where, num_workers=1, pseudonym_key_file=key_file)
    volumes = Dataset.open(where.output_dir).volumes()
    rearranged(scans)
    after, changed = prepare(options, where, num_workers=1, pseudonym_key_file=key_file)
    assert changed and after["counts"] == before["counts"]
    assert Dataset.open(where.output_dir).volumes() == volumes
    with open(where.audit_dir / "sources.csv", newline="") as file:
        named = Counter(
            row["pseudonym"] for row in csv.DictReader(file) if row["outcome"] == "volume"
        )
    assert named == {volume["volume_id"]: NUM_SLICES for volume in volumes}


def test_volumes_whose_files_are_gone_stay_and_are_counted(tmp_path, archive, key_file):
    shutil.copytree(archive, tmp_path / "scans")
    where = directories(tmp_path, tmp_path / "scans")
    prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file)
    shutil.rmtree(tmp_path / "scans" / "scan4")
    command = [*listing("preparation.json"), "data_prep.prepare"]
    command += [f"--input_dir={tmp_path / 'scans'}"]
    command += [
        f"--output_dir={where.output_dir}",
        f"--audit_dir={where.audit_dir}",
        "--image_size=48",
    ]
    command += ["--shard_size_mb=0.05", f"--pseudonym_key_file={key_file}", "--num_workers=1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert "1 volumes whose files are gone" in result.stdout, result.stderr
    assert listed(result.stderr) == [str(where.output_dir / "preparation.json")]  # once
    assert Dataset.open(where.output_dir).preparation["counts"]["volumes_without_files"] == 1
    assert len(Dataset.open(where.output_dir).volumes()) == 5


def test_a_volume_is_never_added_twice():
    row = {"volume_id": "v", "patient_id": "p", "num_slices": 20, "split": "train"}
    with pytest.raises(RuntimeError, match="volume v would be in the dataset 2 times"):
        freeze(
            options=OPTIONS.as_dict(),
            key=b"0123456789abcdef",
            archive_digest="",
            new_volumes={"a": NewVolume("v", "p", 20, 1)},
            row_of=lambda name: row,
            old_volumes=[row],
            old_preparation=None,
            known_splits={},
            rejected=[],
            counts={},
            labels={},
            known_patients={},
        )


def test_headers_lie_in_as_many_buckets_as_the_archive_needs(tmp_path, archive, monkeypatch):
    num_files, _ = planning.list_archive(archive)
    exams = []
    for headers_per_bucket in (num_files, 1):
        monkeypatch.setattr(planning, "_MIN_BUCKETS", 1)
        monkeypatch.setattr(planning, "_HEADERS_PER_BUCKET", headers_per_bucket)
        with WorkerPool(1) as pool:
            paths = planning.plan_archive(
                archive, tmp_path / str(headers_per_bucket), Rules(), num_files, pool
            )
        plans = [planning.read_plan(path) for path in paths]
        exams.append(sorted(exam[0].exam_key for plan in plans for exam in plan.exams))
        assert (len(plans) == 1) == (headers_per_bucket == num_files)
    assert exams[0] == exams[1] and len(exams[0]) == 5


def test_an_audit_directory_is_of_one_dataset(tmp_path, archive, key_file):
    first = directories(tmp_path / "a", archive)
    first.output_dir.parent.mkdir()
    prepare(OPTIONS, first, num_workers=1, pseudonym_key_file=key_file)
    made = content(tmp_path / "a")
    other = Directories(archive, tmp_path / "b" / "dataset", first.audit_dir)
    with pytest.raises(InputError, match=r"another dataset, .* --pseudonym_key_file"):
        prepare(OPTIONS, other, num_workers=1, pseudonym_key_file=key_file)
    assert content(tmp_path / "a") == made
    (tmp_path / "a").rename(tmp_path / "moved")
    assert not prepare(
        OPTIONS,
        directories(tmp_path / "moved", archive),
        num_workers=1,
        pseudonym_key_file=key_file,
    )[1]
    moved = directories(tmp_path / "moved", archive)
    shutil.rmtree(moved.output_dir)
    prepare(OPTIONS, moved, num_workers=1, pseudonym_key_file=key_file)
    assert content(tmp_path / "moved") == made


def test_an_output_that_was_removed_after_a_kill_is_made_again(
    tmp_path, archive, prepared, key_file, monkeypatch
):
    where = directories(tmp_path, archive)

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(tfds, "_write_tfds_metadata", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file)
    monkeypatch.undo()
    assert where.frozen_file.exists()
    shutil.rmtree(where.output_dir)
    prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file)
    assert content(where.output_dir) == content(prepared.output_dir)


def test_a_holdout_of_more_than_half_is_refused_before_converting(tmp_path, archive, key_file):
    options = dataclasses.replace(OPTIONS, holdout_volumes=3)
    where = directories(tmp_path, archive)
    with pytest.raises(
        InputError,
        match=r"--holdout_volumes=3: more than half of the 5 .* at most 2",
    ):
        dry_run(options, where, num_workers=1)
    with pytest.raises(
        InputError,
        match=r"--holdout_volumes=3: more than half of the 5 .* at most 2",
    ):
        prepare(options, where, num_workers=1, pseudonym_key_file=key_file)
    assert not list(where.notes_dir.glob("*"))


def test_scans_of_one_patient_id_say_so(tmp_path, key_file):
    for number in (1, 2, 3):
        add_scan(tmp_path / "scans", number, patient="ANON")
    with pytest.raises(InputError, match=r"1 patient .*all 3 scans have one Patient ID"):
        dry_run(OPTIONS, directories(tmp_path, tmp_path / "scans"), num_workers=1)


def test_a_dry_run_that_is_refused_shows_its_summary_all_the_same(tmp_path):
    for number in (1, 2):
        add_scan(tmp_path / "scans", number)
    (tmp_path / "t.csv").write_text("PatientID,grade\npatient-1,mild\npatient-2,severe\n")
    command = [sys.executable, "-m", "data_prep.prepare", f"--input_dir={tmp_path / 'scans'}"]
    command += [f"--output_dir={tmp_path / 'out'}", f"--labels_csv={tmp_path / 't.csv'}"]
    done = subprocess.run([*command, "--dry_run"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "2 patients with a usable scan cannot fill" in done.stderr
    for words in ("2 volumes of 2 patients", "2 usable series", "grade of a patient: mild, severe"):
        assert words in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_dry_run_leaves_nothing(tmp_path, archive, signum):
    (tmp_path / "tmp").mkdir()
    command = [
        sys.executable,
        "-m",
        "data_prep.prepare",
        f"--input_dir={archive}",
        f"--output_dir={tmp_path / 'd'}",
    ]
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    process = subprocess.Popen(
        [*command, "--dry_run"], env=environment, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list(tmp_path.glob("tmp/*/*")):
        time.sleep(0.002)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75, errors
    assert not list((tmp_path / "tmp").iterdir()) and not (tmp_path / "d").exists()


def test_too_few_patients_are_refused_before_converting_with_the_remedy(tmp_path, key_file):
    for number in (1, 2):
        add_scan(tmp_path / "scans", number)
    where = directories(tmp_path, tmp_path / "scans")
    with pytest.raises(
        InputError,
        match=r"2 patients .* train, validation, test; give .* 3 patients .*--splits=0.5,0.5,0\)",
    ):
        prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file)
    assert not list(where.notes_dir.glob("*"))
    options = Options(image_size=48, splits=(1, 0, 0))
    preparation, _ = prepare(options, where, num_workers=1, pseudonym_key_file=key_file)
    assert {split: facts["num_volumes"] for split, facts in preparation["splits"].items()} == {
        "train": 2
    }


def test_converted_volumes_stay_when_pixels_leave_too_few_patients(tmp_path, key_file):
    for number in (1, 2):
        add_scan(tmp_path / "scans", number)
    water = dicom_files.slices(
        np.zeros((NUM_SLICES, 64, 64), np.int16), study=3, patient="patient-3"
    )
    dicom_files.write(tmp_path / "scans" / "water", water)
    where = directories(tmp_path, tmp_path / "scans")
    with pytest.raises(InputError, match="2 patients"):
        prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file)
    staged = {path: path.stat().st_mtime_ns for path in where.records_dir.glob("*.array_record")}
    assert len(staged) == 2
    options = Options(image_size=48, shard_size_mb=0.05, splits=(0.5, 0, 0.5))
    preparation, _ = prepare(options, where, num_workers=1, pseudonym_key_file=key_file)
    assert list(preparation["splits"]) == ["train", "test"]
    assert preparation["counts"]["files_rejected"] == {"implausible_hu": NUM_SLICES}


def test_archive_without_any_chest_ct_says_what_there_was(tmp_path, archive):
    shutil.copytree(archive / "short", tmp_path / "scans")
    with pytest.raises(
        InputError,
        match=r"no usable chest CT in 5 files \(1 too_few_slices\); too_few_slices: The series has "
        r"too few slices .*; give a smaller --min_slices; .*sources.csv",
    ):
        prepare(OPTIONS, directories(tmp_path, tmp_path / "scans"), num_workers=1)


def test_dry_run_writes_nothing(tmp_path, archive):
    where = directories(tmp_path, archive)
    counts = dry_run(OPTIONS, where, num_workers=1)
    assert list(tmp_path.iterdir()) == []
    assert (counts["exams"], counts["patients"], counts["slices"]) == (5, 5, 5 * NUM_SLICES)
    assert counts["files_rejected"] == {"other_reconstruction": NUM_SLICES, "too_few_slices": 5}
    assert counts["files_dropped"] == {"duplicate_slice": 1}


def test_two_runs_on_one_output_are_refused(prepared, key_file):
    program = (
        "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); "
        "print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(prepared.output_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(InputError, match="another run is at work"):
            prepare(OPTIONS, prepared, pseudonym_key_file=key_file)
        holder.stdin.close()


def test_slices_are_the_source_through_each_window(tmp_path, key_file):
    """Every slice against the window formula on the generated HU; slices of one patient are told by
    their noise."""
    for number in (1, 2, 3):
        add_scan(tmp_path / "scans", number)
    options = Options(image_size=64, windows=((50, 350), (-600, 1500)))
    where = directories(tmp_path, tmp_path / "scans")
    prepare(options, where, num_workers=1, pseudonym_key_file=key_file)
    expected = set()
    for number in (1, 2, 3):
        hu = dicom_files.thorax(NUM_SLICES, seed=number)[..., None].astype(float)
        low, width = np.array([-125.0, -1350.0]), np.array([350.0, 1500.0])
        grey = np.rint(255 * np.clip((hu - low) / width, 0, 1)).astype(np.uint8)
        expected |= {(index, image.tobytes()) for index, image in enumerate(grey)}
    records = [
        record for split in SPLITS for record in Dataset.open(where.output_dir).source(split)
    ]
    assert {(record["slice_index"], record["image"].tobytes()) for record in records} == expected
    assert len(records) == 3 * NUM_SLICES and records[0]["image"].shape == (64, 64, 2)


def killed_at_patient_2(run, exam):
    if exam[0].patient_key == "patient-2":
        os.kill(os.getpid(), signal.SIGKILL)
    convert_exam(run, exam)


def failing_with(error: BaseException):
    def load(input_dir, candidate, rules):
        if candidate.patient_key == "patient-2":
            raise error
        return load_volume(input_dir, candidate, rules)

    return load


def disk_error_at_patient_2(run, exam):
    # in the worker process
    loading.load_volume = failing_with(OSError(errno.EIO, "Input/output error"))
    convert_exam(run, exam)


def memory_error_at_patient_2(run, exam):
    loading.load_volume = failing_with(MemoryError())
    convert_exam(run, exam)


@pytest.mark.parametrize(
    "failing", [killed_at_patient_2, disk_error_at_patient_2, memory_error_at_patient_2]
)
def test_a_failure_that_may_pass_leaves_the_exam_to_the_next_run(
    tmp_path, key_file, monkeypatch, failing
):
    for number in range(1, 5):
        add_scan(tmp_path / "scans", number)
    where = directories(tmp_path, tmp_path / "scans")
    monkeypatch.setattr(convert, "convert_exam", failing)
    for _ in range(2):  # the rest is complete, however often it fails
        preparation, changed = prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file)
        assert changed and preparation["counts"]["series_rejected"] == {"failed_for_now": 1}
        assert preparation["counts"]["files_in_volumes"] == 3 * NUM_SLICES
        assert num_failed_for_now(preparation["counts"]) == 1
    monkeypatch.undo()
    preparation, _ = prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file)
    assert preparation["counts"]["series_rejected"] == {}
    assert preparation["counts"]["files_in_volumes"] == 4 * NUM_SLICES
    assert not prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file)[1]


def test_a_file_that_cannot_be_read_any_more_costs_its_exam_only(tmp_path, key_file, monkeypatch):
    for number in range(1, 5):
        add_scan(tmp_path / "scans", number)
    where = directories(tmp_path, tmp_path / "scans")
    plan_archive = steps.plan_archive

    def plan_and_lose_a_file(*arguments):
        plans = plan_archive(*arguments)
        (tmp_path / "scans" / "scan3" / "IM0004").unlink()
        return plans

    monkeypatch.setattr(steps, "plan_archive", plan_and_lose_a_file)
    preparation, _ = prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file)
    assert preparation["counts"]["series_rejected"] == {"failed_for_now": 1}
    assert preparation["counts"]["files_in_volumes"] == 3 * NUM_SLICES


def test_wrong_flags_end_in_one_line(tmp_path, archive):
    there, out = f"--input_dir={archive}", f"--output_dir={tmp_path / 'out'}"
    (tmp_path / "nothing").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    wrong = (
        (
            [f"--input_dir={tmp_path / 'no'}", out],
            "no such directory; give the folder of the scans",
        ),
        (
            [f"--input_dir={archive / 'notes.txt'}", out],
            "notes.txt: is a file; give the folder of the scans",
        ),
        ([f"--input_dir={tmp_path / 'nothing'}", out, "--dry_run"], "nothing: no files in it"),
        ([there, "--output_dir=/proc/out"], "--output_dir: cannot make /proc/out"),
        ([there, f"--output_dir={archive / 'out'}"], "lies inside --input_dir="),
        ([there, out, "--window=350"], "--window=350: give level,width"),
        ([there, out, "--splits=0.8,0.1,0.2"], "three fractions that sum to 1"),
        ([there, out, "--pseudonym_key_file=/no/key"], "/no/key: no such key file"),
        ([there, out, "--image_size=9"], "--image_size=9"),
        ([there, out, "--irregular=maybe"], "keep|refuse"),
        ([there], "error: give --output_dir;"),
        ([there, out, "--max_slice_thickness_mm=0"], "max_slice_thickness_mm"),
        ([there, f"--output_dir={tmp_path / 'full'}"], "holds other files"),
    )
    commands = [("data_prep.prepare", *arguments) for arguments, _ in wrong]
    results = ended(commands, ["data_prep.pipeline.prepare"])
    for result, (_, named) in zip(results, wrong, strict=True):
        assert result.returncode == 2 and result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1 and named in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def real_dataset(tmp_path_factory, real_data) -> Directories:
    where = directories(tmp_path_factory.mktemp("real"), real_data)
    prepare(Options(), where)
    return where


def test_real_scans_that_are_good_are_taken_whole(real_dataset):
    volumes = Dataset.open(real_dataset.output_dir).volumes()
    assert sorted(v["num_slices"] for v in volumes) == [102, 133, 140]
    assert {v["split"] for v in volumes} == set(SPLITS)
    assert all(v["lung_box"] and v["first_lung_slice"] < v["middle_slice"] + 60 for v in volumes)
    counts = Dataset.open(real_dataset.output_dir).preparation["counts"]
    assert (
        counts["series_rejected"]["too_thick"] == 2
        and counts["series_rejected"]["missing_series_uid"] == 1
    )
    assert counts["files_in_volumes"] == 375


def test_real_slices_are_the_source_slices(real_dataset, real_data):
    """A head-first supine scan needs no turning: grey values are those of pydicom's own pixels and
    rescale, pixel by pixel, in the order of the table positions."""
    with open(real_dataset.audit_dir / "sources.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["path"].startswith("lidc_0001/")]
    assert len(rows) == 133 and len({row["pseudonym"] for row in rows}) == 1
    images = sorted(
        (pydicom.dcmread(real_data / row["path"]) for row in rows),
        key=lambda ds: ds.ImagePositionPatient[2],
    )
    [volume] = [
        v
        for v in Dataset.open(real_dataset.output_dir).volumes()
        if v["volume_id"] == rows[0]["pseudonym"]
    ]
    source = Dataset.open(real_dataset.output_dir).source(volume["split"])
    for index in (0, 66, 132):
        ds = images[index]
        hu = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        record = source[volume["first_record"] + index]
        np.testing.assert_array_equal(
            record["image"][..., 0], np.rint(255 * np.clip((hu + 125) / 350, 0, 1))
        )
        assert record["position_mm"] == pytest.approx(float(ds.ImagePositionPatient[2]), abs=1e-3)
