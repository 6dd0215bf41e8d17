"""prepare --same_splits_as: patients of another dataset keep their split; other keys and
contradictions are refused."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.dataset.merge import merge
from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import FORMAT_VERSION, VOLUME_COLUMNS, VOLUMES_FILE, write_preparation
from data_prep.dataset.storage import write_table
from data_prep.dataset.verify import verify
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.prepare import prepare
from data_prep.pipeline.splits import read_known_splits
from data_prep.system.errors import DatasetError, InputError
from data_prep.system.workers import WorkerPool
from tests.helpers import dicom_files

OPTIONS = Options(image_size=32, shard_size_mb=0.02)


def add_scans(archive: Path, patients: range | tuple[int, ...], study: int = 0) -> None:
    for number in patients:
        hu = dicom_files.thorax(20, seed=number + study)
        made = dicom_files.slices(hu, study=number + study, patient=f"patient-{number}")
        dicom_files.write(archive / f"scan{number + study}", made)


def directories(folder: Path, name: str) -> Directories:
    return Directories(folder / f"scans-{name}", folder / name, folder / f"{name}-audit")


def splits_of(directory: Path) -> dict[str, str]:
    return {row["patient_id"]: row["split"] for row in Dataset.open(directory).volumes()}


@pytest.fixture(scope="module")
def first(tmp_path_factory, key_file) -> Path:
    """Patients 1 to 5; the second archive, not yet prepared, has other exams of three of them and
    two new patients."""
    folder = tmp_path_factory.mktemp("sites")
    add_scans(folder / "scans-first", range(1, 6))
    prepare(OPTIONS, directories(folder, "first"), num_workers=1, pseudonym_key_file=key_file)
    return folder / "first"


def second_archive(folder: Path) -> Directories:
    add_scans(folder / "scans-second", range(3, 8), study=20)
    return directories(folder, "second")


def test_patients_keep_the_split_that_they_have_elsewhere(tmp_path, first, key_file):
    where = second_archive(tmp_path)
    command = [
        sys.executable,
        "-m",
        "data_prep.prepare",
        f"--input_dir={where.input_dir}",
        "--num_workers=1",
    ]
    command += [
        f"--output_dir={where.output_dir}",
        f"--pseudonym_key_file={key_file}",
        "--image_size=32",
    ]
    command += ["--shard_size_mb=0.02", f"--same_splits_as={first}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    known, splits = splits_of(first), splits_of(where.output_dir)
    shared = known.keys() & splits.keys()
    assert len(shared) == 3 and {p: known[p] for p in shared} == {p: splits[p] for p in shared}
    kept = json.loads((where.audit_dir / "splits.json").read_text())
    assert kept == splits and len(kept) == 5  # nothing of patients whom this archive has not
    preparation = Dataset.open(where.output_dir).preparation
    assert preparation["options"]["same_splits_as"] == [
        Dataset.open(first).preparation["fingerprint"]
    ]
    merged, _ = merge([Dataset.open(part) for part in [first, where.output_dir]], tmp_path / "view")
    assert sum(facts["num_patients"] for facts in merged["splits"].values()) == 7
    with WorkerPool(1) as pool:
        assert verify(Dataset.open(tmp_path / "view"), pool) == []  # no patient in two splits
    assert "nothing to do" in subprocess.run(command, capture_output=True, text=True).stdout
    without = subprocess.run(command[:-1], capture_output=True, text=True)
    assert without.returncode == 2
    assert "was prepared with --same_splits_as; give it again" in without.stderr.splitlines()[-1]


def test_both_may_grow(tmp_path, key_file):
    """Each asks the other; what was recorded of the other's earlier state does not stand in the
    way."""
    add_scans(tmp_path / "scans-first", range(1, 4))
    add_scans(tmp_path / "scans-second", range(11, 14))
    a, b = directories(tmp_path, "first"), directories(tmp_path, "second")

    def prepare_after(where: Directories, other: Directories | None):
        others = [other.output_dir] if other else []
        return prepare(
            OPTIONS, where, num_workers=1, pseudonym_key_file=key_file, same_splits_as=others
        )

    prepare_after(a, None)
    prepare_after(b, a)
    add_scans(a.input_dir, (4, 5))
    prepare_after(a, b)  # for the first time with the flag
    add_scans(b.input_dir, (1, 2, 3, 4, 5), study=20)
    preparation, changed = prepare_after(b, a)
    assert changed and preparation["splits"].keys() == {"train", "validation", "test"}
    known, splits = splits_of(a.output_dir), splits_of(b.output_dir)
    assert len(known.keys() & splits.keys()) == 5
    assert all(splits[patient] == split for patient, split in known.items())
    assert merge([Dataset.open(part) for part in [a.output_dir, b.output_dir]], tmp_path / "view")[
        1
    ]


def test_a_dataset_that_was_split_by_itself_is_refused_and_stays(tmp_path, first, key_file):
    where = second_archive(tmp_path)
    options = dataclasses.replace(OPTIONS, splits=(0.2, 0.2, 0.6))
    prepare(options, where, num_workers=1, pseudonym_key_file=key_file)
    known, splits = splits_of(first), splits_of(where.output_dir)
    differing = sum(known.get(patient, split) != split for patient, split in splits.items())
    assert differing, "choose other fractions: this test needs a contradiction"
    with pytest.raises(
        InputError,
        match=rf"{differing} patients are in another split there .* another --output_dir",
    ):
        prepare(options, where, num_workers=1, pseudonym_key_file=key_file, same_splits_as=[first])
    with pytest.raises(
        InputError,
        match=rf"{differing} patients are in one split .* "
        rf"--same_splits_as={first}",
    ):
        merge([Dataset.open(part) for part in [first, where.output_dir]], tmp_path / "view")
    assert splits_of(where.output_dir) == splits


def test_other_keys_are_refused_before_anything_is_made(tmp_path, first):
    where = second_archive(tmp_path)
    (tmp_path / "key").write_text("another key, another key")
    for key_file in (None, tmp_path / "key"):
        with pytest.raises(
            InputError,
            match=r"--same_splits_as=.*first: has another pseudonym key, .*_key_file",
        ) as e:
            prepare(
                OPTIONS, where, num_workers=1, pseudonym_key_file=key_file, same_splits_as=[first]
            )
        assert "\n" not in str(e.value)
    assert not where.output_dir.exists() and not where.audit_dir.exists()


def test_known_datasets_that_contradict_each_other_are_refused(tmp_path):
    for name, splits, key in (("a", "train", "0"), ("b", "test", "0"), ("c", "train", "1")):
        (tmp_path / name).mkdir()
        row = dict.fromkeys(VOLUME_COLUMNS) | {
            "volume_id": name,
            "patient_id": "p",
            "split": splits,
        }
        write_table(tmp_path / name / VOLUMES_FILE, VOLUME_COLUMNS, [row])
        preparation = {
            "format_version": FORMAT_VERSION,
            "fingerprint": name,
            "key_fingerprint": key,
        }
        write_preparation(tmp_path / name, preparation)
    with pytest.raises(InputError, match="1 patients are in different splits of them"):
        read_known_splits([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(InputError, match="have different pseudonym keys"):
        read_known_splits([tmp_path / "a", tmp_path / "c"])
    with pytest.raises(DatasetError, match="no such directory"):
        read_known_splits([tmp_path / "none"])
    assert read_known_splits([]) is None
