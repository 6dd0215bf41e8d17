"""merge: one view of several datasets, bytes and records of its parts, what is refused, parts that
grow or go away."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep.dataset import merge as dataset_merge
from data_prep.dataset import merged_tables
from data_prep.dataset import tfds as dataset_tfds
from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import (
    LABELS_FILE,
    SPLITS,
    VOLUME_COLUMNS,
    VOLUMES_FILE,
    dataset_fingerprint,
    description,
    read_preparation,
    rules_lines,
    write_preparation,
)
from data_prep.dataset.storage import write_table
from data_prep.dataset.verify import verify
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.prepare import prepare
from data_prep.scan.rules import VERSION
from data_prep.system.errors import DatasetError, InputError
from data_prep.system.files import file_sha256
from data_prep.system.workers import WorkerPool
from tests.helpers import dicom_files
from tests.helpers.example_dataset import write_example_dataset
from tests.helpers.opened_files import opened_by_command


def merge(directories, *arguments):
    return dataset_merge.merge([Dataset.open(directory) for directory in directories], *arguments)


MORE = {"train": 3, "test": 2}  # no validation


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(1) as pool:
        yield pool


@pytest.fixture
def parts(tmp_path) -> tuple[Path, Path]:
    """With slice labels and labels of volumes and patients; the second has neither, nor a
    validation split."""
    a = write_example_dataset(
        tmp_path / "sites" / "a", image_size=16, slice_labels=True, volume_labels=True
    )
    b = write_example_dataset(
        tmp_path / "sites" / "b", image_size=16, seed=1, volumes_per_split=MORE
    )
    return a, b


def records(directory: Path, split: str) -> list[dict]:
    return (
        list(Dataset.open(directory).source(split))
        if split in Dataset.open(directory).preparation["splits"]
        else []
    )


def same_record(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def own_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if not path.is_symlink()}


def state(directory: Path) -> dict[str, tuple]:
    return {
        p.name: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in directory.iterdir()
    }


def rewrite_preparation(directory: Path, **fields) -> None:
    preparation = json.loads((directory / "preparation.json").read_text()) | fields
    write_preparation(directory, preparation)


def rewrite_table(directory: Path, name: str, rows: list[dict]) -> None:
    """Also brings checksums and fingerprint up to date."""
    write_table(directory / name, list(rows[0]), rows)
    preparation = Dataset.open(directory).preparation
    checksums = preparation["checksums"] | {name: file_sha256(directory / name)}
    rewrite_preparation(directory, checksums=checksums, fingerprint=dataset_fingerprint(checksums))


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=120
    )


def test_a_view_holds_the_records_and_rows_of_its_parts(tmp_path, parts, pool):
    before = [state(part) for part in parts]
    preparation, changed = merge(parts, tmp_path / "view")
    assert changed and verify(Dataset.open(tmp_path / "view"), pool) == []
    for split in SPLITS:
        expected = [record for part in parts for record in records(part, split)]
        found = records(tmp_path / "view", split)
        assert len(found) == len(expected) > 0
        assert all(same_record(a, b) for a, b in zip(found, expected, strict=True))
    volumes = {v["volume_id"]: v for v in Dataset.open(tmp_path / "view").volumes()}
    assert len(volumes) == 9 + 5
    for part in parts:
        for row in Dataset.open(part).volumes():
            assert {**volumes[row["volume_id"]], "first_record": 0} == {**row, "first_record": 0}
    assert {split: facts["num_volumes"] for split, facts in preparation["splits"].items()} == {
        "train": 8,
        "validation": 2,
        "test": 4,
    }
    assert [p["fingerprint"] for p in preparation["parts"]] == [
        Dataset.open(part).preparation["fingerprint"] for part in parts
    ]
    assert preparation["parts"][1]["num_shards"] == {"train": 2, "test": 1}
    assert [state(part) for part in parts] == before


def test_volumes_of_other_rules_are_counted_and_named(tmp_path, parts):
    preparation = read_preparation(parts[0])
    del preparation["rules"]  # of a program before version 2 of the rules
    write_preparation(parts[0], preparation)
    view, _ = merge(parts, tmp_path / "view")
    assert view["rules"] == {"version": VERSION, "volumes": {"1": 9, str(VERSION): 5}}
    [line] = rules_lines(view)
    assert "9 volumes were read by version 1 of the rules" in line


def test_labels_that_one_part_lacks_are_missing_there(tmp_path, parts):
    preparation, _ = merge(parts, tmp_path / "view")
    first, second = ({v["volume_id"] for v in Dataset.open(part).volumes()} for part in parts)
    slices, labels = (
        Dataset.open(tmp_path / "view").slices(),
        Dataset.open(tmp_path / "view").labels(),
    )
    assert [row for row in slices if row["volume_id"] in first] == Dataset.open(parts[0]).slices()
    assert {row["pe_present_on_image"] for row in slices if row["volume_id"] in second} == {None}
    assert sum(row["volume_id"] in second for row in slices) == 5 * 12
    assert [row for row in labels if row["volume_id"] in first] == Dataset.open(parts[0]).labels()
    assert {
        (row["smoker"], row["pe_positive_exam"]) for row in labels if row["volume_id"] in second
    } == {(None, None)}
    counts = preparation["counts"]["labels"]
    # slice 0 of each volume of the first
    assert counts["pe_present_on_image"]["missing"] == 9 + 5 * 12
    assert sum(counts["pe_present_on_image"].values()) == 14 * 12
    assert counts["pe_positive_exam"] == {"0": 5, "1": 4, "missing": 5}


def test_masks_and_their_regions_come_along(tmp_path, pool):
    parts = [
        write_example_dataset(tmp_path / str(n), image_size=16, masks=True, seed=n) for n in (1, 2)
    ]
    merge(parts, tmp_path / "view")
    assert verify(Dataset.open(tmp_path / "view"), pool) == []
    regions = Dataset.open(tmp_path / "view").regions()
    assert Counter(row["volume_id"] for row in regions) == Counter(
        row["volume_id"] for part in parts for row in Dataset.open(part).regions()
    )
    assert {row["malignancy"] for row in regions} == {1, 2, 3, 4, 5}


def test_the_bytes_depend_on_the_parts_alone_and_links_are_relative(tmp_path, parts):
    merge(parts, tmp_path / "view")
    shutil.copytree(tmp_path / "sites", tmp_path / "elsewhere" / "deep" / "sites")
    copies = [tmp_path / "elsewhere" / "deep" / "sites" / name for name in "ab"]
    merge(copies, tmp_path / "elsewhere" / "view")
    assert own_files(tmp_path / "view") == own_files(tmp_path / "elsewhere" / "view")
    assert os.readlink(tmp_path / "view" / "train.array_record-00003") == (
        "../sites/b/train.array_record-00000"
    )
    (tmp_path / "elsewhere").rename(tmp_path / "moved")  # with its parts
    assert len(records(tmp_path / "moved" / "view", "train")) == 8 * 12


@pytest.mark.parametrize("link", ["hard", "copy"])
def test_other_links_outlive_the_parts(tmp_path, parts, pool, link):
    merge(parts, tmp_path / "view", link)
    inodes = {path.stat().st_ino for part in parts for path in part.glob("*.array_record-*")}
    own = {path.stat().st_ino for path in (tmp_path / "view").glob("*.array_record-*")}
    assert own == inodes if link == "hard" else not own & inodes
    shutil.rmtree(tmp_path / "sites")
    assert verify(Dataset.open(tmp_path / "view"), pool) == []


def test_a_view_can_be_a_part(tmp_path, parts, pool):
    third = write_example_dataset(tmp_path / "c", image_size=16, seed=2)
    merge(parts, tmp_path / "ab")
    merge([tmp_path / "ab", third], tmp_path / "abc")
    merge([*parts, third], tmp_path / "flat")
    assert verify(Dataset.open(tmp_path / "abc"), pool) == []
    fingerprints = [
        Dataset.open(tmp_path / name).preparation["fingerprint"] for name in ("abc", "flat")
    ]
    assert fingerprints[0] == fingerprints[1]
    merge([tmp_path / "ab", third], tmp_path / "hard", "hard")
    assert not any(path.is_symlink() for path in (tmp_path / "hard").iterdir())


def test_what_reads_datasets_reads_views(tmp_path, parts):
    import tensorflow_datasets as tfds

    from ctssl_jax.data import slices as data

    merge(parts, tmp_path / "view")
    described = run(
        "data_prep.describe", f"--dataset={tmp_path / 'view'}", "--verify", "--num_workers=1"
    )
    assert described.returncode == 0 and "Verified: checksums" in described.stdout, (
        described.stdout + described.stderr
    )
    assert "14, 168" in described.stdout and "NOTE" not in described.stdout
    searched = run(
        "data_prep.describe",
        f"--dataset={tmp_path / 'view'}",
        "--verify",
        "--audit_dir=x",
        "--input_dir=y",
    )
    assert (
        searched.returncode == 2
        and "was merged from several datasets; search each part" in searched.stderr
    )
    source = tfds.builder_from_directory(tmp_path / "view").as_data_source("train[50%:]")
    ours = records(tmp_path / "view", "train")
    assert len(source) == 48 and source[47]["volume_id"] == ours[95]["volume_id"].encode()
    neighbours = data.open_source(Dataset.open(tmp_path / "view"), "train", [0], [0, 1])
    per_part = [len(data.open_source(Dataset.open(part), "train", [0], [0, 1])) for part in parts]
    assert len(neighbours) == sum(per_part)


def test_each_dataset_is_opened_once(tmp_path, parts):
    view = tmp_path / "view"
    names = [f"{part}/preparation.json" for part in parts]
    flags = (f"--datasets={parts[0]},{parts[1]}", f"--output_dir={view}")
    assert opened_by_command("data_prep.merge", *flags, names=("preparation.json",)) == names
    described = opened_by_command(
        "data_prep.describe", f"--dataset={view}", "--verify", names=("preparation.json",)
    )
    assert described == [*names, f"{view}/preparation.json"]


def test_a_killed_merge_leaves_no_view(tmp_path, parts, monkeypatch):
    merge(parts, tmp_path / "undisturbed")

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    for module, step in (
        (dataset_merge, "_link"),
        (dataset_merge, "write_table"),
        (dataset_tfds, "_write_tfds_metadata"),
        (dataset_tfds, "write_preparation"),
    ):
        monkeypatch.setattr(module, step, killed)
        with pytest.raises(KeyboardInterrupt):
            merge(parts, tmp_path / "view")
        assert not (tmp_path / "view").exists()
        monkeypatch.undo()
    assert merge(parts, tmp_path / "view")[1]
    assert not merge(parts, tmp_path / "view")[1]
    assert own_files(tmp_path / "view") == own_files(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sites", "undisturbed", "view"]


def other_key(a, b):
    rewrite_preparation(b, key_fingerprint="1" * 16)


def other_windows(a, b):
    rewrite_preparation(b, windows=[{"level": -600.0, "width": 1500.0}])


def other_classes(a, b):
    rewrite_preparation(
        b, labels={"smoker": {"level": "patient", "classes": ["no", "former", "yes"]}}
    )


def other_version(a, b):
    rewrite_preparation(b, format_version=1)


def incomplete(a, b):
    (b / "preparation.json").unlink()


def damaged_table(a, b):
    (b / "volumes.csv").write_text((b / "volumes.csv").read_text().replace(",60,", ",61,"))


def shard_gone(a, b):
    (b / "test.array_record-00000").unlink()


def same_volume(a, b):
    rows = Dataset.open(b).volumes()
    rewrite_table(
        b,
        "volumes.csv",
        [{**rows[0], "volume_id": Dataset.open(a).volumes()[0]["volume_id"]}, *rows[1:]],
    )


def other_split(a, b):
    patient = Dataset.open(a).volumes("validation")[0]["patient_id"]
    rows = Dataset.open(b).volumes()
    rewrite_table(b, "volumes.csv", [{**rows[0], "patient_id": patient}, *rows[1:]])


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (other_key, r"different pseudonym keys, .* --pseudonym_key_file"),
        (other_windows, r"different windows \(50,350 and -600,1500\); prepare them alike"),
        (
            other_classes,
            r"smoker is of patients with the classes no, yes in .*a and of .* no, former, yes in "
            r".*b;",
        ),
        (other_version, r"format_version 1"),
        (incomplete, r"b: not a complete dataset"),
        (damaged_table, r"volumes.csv: checksum differs from preparation.json"),
        (shard_gone, r"test.array_record-00000: missing"),
        (same_volume, r"1 volumes are in .*a and in .*b; leave one"),
        (
            other_split,
            r"1 patients are in one split of .*a and in another of .*b; prepare .* "
            r"--same_splits_as=",
        ),
    ],
)
def test_datasets_that_cannot_be_one_are_refused(tmp_path, parts, spoil, named):
    spoil(*parts)
    with pytest.raises(InputError, match=named) as error:
        merge(parts, tmp_path / "view")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "view").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"image_size": 24}, r"different image_size \(16 and 24\)"),
        ({"image_size": 16, "channels": 2}, r"different windows"),
        ({"image_size": 16, "masks": True}, r"different masks \(none and source:lidc_idri,"),
    ],
)
def test_other_images_are_refused(tmp_path, parts, options, named):
    other = write_example_dataset(tmp_path / "other", seed=2, **options)
    with pytest.raises(InputError, match=named):
        merge([parts[0], other], tmp_path / "view")


def test_wrong_directories_are_refused_in_one_line(tmp_path, parts):
    a, b = parts
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    for datasets, output, named in (
        (f"{a}", tmp_path / "view", "give two datasets or more"),
        (f"{a},{a}/../a", tmp_path / "view", "is named twice"),
        (f"{a},{tmp_path / 'no'}", tmp_path / "view", "no such directory"),
        (f"{a},{b}", a / "view", "choose another"),
        (f"{a},{b}", tmp_path / "full", "is not empty"),
    ):
        result = run("data_prep.merge", f"--datasets={datasets}", f"--output_dir={output}")
        assert (
            result.returncode == 2 and result.stderr.count("\n") == 1 and named in result.stderr
        ), result.stderr
    third = write_example_dataset(tmp_path / "c", image_size=16, seed=2)
    with pytest.raises(InputError, match="is a dataset, not a view"):
        merge(parts, third)
    merge(parts, tmp_path / "view")
    with pytest.raises(InputError, match=r"a view of 2 datasets, not of 3; .* new --output_dir"):
        merge([*parts, third], tmp_path / "view")
    with pytest.raises(InputError, match="was not made with --link=copy"):
        merge(parts, tmp_path / "view", "copy")


def test_a_shard_that_is_gone_or_changed_is_told(tmp_path, parts, pool):
    merge(parts, tmp_path / "view")
    shard = parts[1] / "test.array_record-00000"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert any(
        "test.array_record-00001: checksum differs" in line
        for line in verify(Dataset.open(tmp_path / "view"), pool)
    )
    shard.unlink()
    assert "test.array_record-00001: missing" in verify(Dataset.open(tmp_path / "view"), pool)
    with pytest.raises(DatasetError, match=r"test\.array_record-00001: a shard is missing"):
        records(tmp_path / "view", "test")
    shutil.rmtree(parts[1])  # and prepared again, from other scans
    write_example_dataset(parts[1], image_size=16, seed=3, volumes_per_split=MORE)
    with pytest.raises(
        DatasetError,
        match=r"view: its part .*/sites/b was prepared again .* into a new directory",
    ):
        Dataset.open(tmp_path / "view")


def test_a_label_of_a_patient_holds_in_all_parts(tmp_path):
    labels = {"smoker": {"level": "patient", "classes": ["no", "yes"]}}

    def part(name: str, cells: list[tuple[str, str, str]]) -> Dataset:
        (tmp_path / name).mkdir()
        rows = [{"volume_id": volume, "smoker": cell} for volume, _, cell in cells]
        write_table(tmp_path / name / LABELS_FILE, ["volume_id", "smoker"], rows)
        volumes = [
            {"volume_id": volume, "patient_id": patient, "split": "train"}
            for volume, patient, _ in cells
        ]
        write_table(tmp_path / name / VOLUMES_FILE, VOLUME_COLUMNS, volumes)
        return Dataset(name, tmp_path / name, {"labels": labels, "masks": None})

    a = part("a", [("v1", "p1", "1"), ("v2", "p2", "")])
    b = part("b", [("v3", "p1", ""), ("v4", "p3", "0")])
    c = part("c", [("v5", "p1", "0")])
    without = dataclasses.replace(
        part("d", [("v6", "p3", "")]), preparation={"labels": {}, "masks": None}
    )
    found = {
        row["volume_id"]: row["smoker"] for row in merged_tables.label_rows([a, b, without], labels)
    }
    assert found == {"v1": "1", "v2": "", "v3": "1", "v4": "0", "v6": "0"}
    with pytest.raises(
        InputError,
        match=r"1 patients have another class of the label smoker in .*c than",
    ):
        list(merged_tables.label_rows([a, c], labels))


# ---- prepared archives ---------------------------------------------------------------------------


OPTIONS = Options(image_size=32, shard_size_mb=0.02)


def add_scans(archive: Path, patients: range, study: int = 0) -> None:
    for number in patients:
        hu = dicom_files.thorax(20, seed=number + study)
        made = dicom_files.slices(hu, study=number + study, patient=f"patient-{number}")
        dicom_files.write(archive / f"scan{number + study}", made)


def test_parts_that_grow_leave_the_view_as_it_was(tmp_path, key_file, pool):
    places = {}
    for name, patients in (("a", range(1, 4)), ("b", range(11, 14))):
        add_scans(tmp_path / f"scans-{name}", patients)
        places[name] = Directories(
            tmp_path / f"scans-{name}", tmp_path / name, tmp_path / f"{name}-audit"
        )
        prepare(OPTIONS, places[name], num_workers=1, pseudonym_key_file=key_file)
    parts = [tmp_path / "a", tmp_path / "b"]
    preparation, _ = merge(parts, tmp_path / "view")
    assert preparation["counts"]["files"] == preparation["counts"]["files_in_volumes"] == 6 * 20
    assert preparation["options"] == OPTIONS.as_dict()
    expected = description(preparation)
    assert (
        json.loads((tmp_path / "view" / "dataset_info.json").read_text())["description"] == expected
    )
    held = {split: records(tmp_path / "view", split) for split in SPLITS}

    add_scans(tmp_path / "scans-a", range(4, 6))
    prepare(OPTIONS, places["a"], num_workers=1, pseudonym_key_file=key_file)
    assert verify(Dataset.open(tmp_path / "view"), pool) == []
    for split in SPLITS:
        now = records(tmp_path / "view", split)
        assert len(now) == len(held[split])
        assert all(same_record(a, b) for a, b in zip(now, held[split], strict=True))
    described = run("data_prep.describe", f"--dataset={tmp_path / 'view'}", "--num_slices=1")
    assert f"NOTE its part {tmp_path}/a has grown since; data_prep.merge" in described.stdout
    with pytest.raises(InputError, match=r"view: .*a has grown .*; merge into a new --output_dir"):
        merge(parts, tmp_path / "view")
    grown, _ = merge(parts, tmp_path / "view2")
    assert sum(facts["num_volumes"] for facts in grown["splits"].values()) == 8
    assert verify(Dataset.open(tmp_path / "view2"), pool) == []
    with open(tmp_path / "view2" / "volumes.csv", newline="") as file:
        assert sum(1 for _ in csv.DictReader(file)) == 8
