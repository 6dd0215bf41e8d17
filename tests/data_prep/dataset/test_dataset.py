"""The dataset directory: records, tables, metadata, and what its readers say about a bad one."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import SPLITS, dataset_fingerprint
from data_prep.dataset.storage import decode_record, encode_record
from data_prep.system.errors import DatasetError
from tests.helpers.example_dataset import write_example_dataset
from tests.helpers.opened_files import opened_files


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return write_example_dataset(tmp_path_factory.mktemp("dataset") / "example")


def test_records_survive_a_round_trip():
    image = np.random.default_rng(0).integers(0, 256, (7, 7, 3), np.uint8)
    for slice_index, position, pair_valid in (
        (0, -12.25, True),
        (128, 1e3, True),
        (70000, 0.5, False),
    ):
        record = encode_record(image, "abc", slice_index, position, pair_valid)
        decoded = decode_record(record, image.shape)
        np.testing.assert_array_equal(decoded.pop("image"), image)
        expected = {"slice_index": slice_index, "position_mm": position, "pair_valid": pair_valid}
        assert decoded == expected | {"volume_id": "abc"}


def test_a_float_image_is_refused():
    with pytest.raises(ValueError, match="uint8"):
        encode_record(np.zeros((4, 4, 1)), "abc", 0, 0.0, True)


def test_tfds_opens_it_without_tensorflow(example):
    """In a process of its own, so that nothing else can have imported TensorFlow."""
    program = f"""
import sys
import tensorflow_datasets as tfds
source = tfds.builder_from_directory({str(example)!r}).as_data_source("train[:50%]")
records = [source[0], source[29]]
print(len(source), "tensorflow" in sys.modules)
print([(r["slice_index"], r["volume_id"].decode(), r["position_mm"]) for r in records])
print([(r["pair_valid"], int(r["image"].sum()), r["image"].shape) for r in records])
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    ours = Dataset.open(example).source("train")
    records = [ours[0], ours[29]]
    assert result.stdout.splitlines() == [
        f"{len(ours) // 2} False",
        str([(r["slice_index"], r["volume_id"], r["position_mm"]) for r in records]),
        str([(r["pair_valid"], int(r["image"].sum()), r["image"].shape) for r in records]),
    ]


def test_source_reads_across_shards(example):
    source = Dataset.open(example).source("train")
    assert len(source) == 60
    for volume in Dataset.open(example).volumes("train"):
        for index in (0, 5, volume["num_slices"] - 1):
            record = source[volume["first_record"] + index]
            assert (record["volume_id"], record["slice_index"]) == (volume["volume_id"], index)
            assert record["pair_valid"] == (index == 0)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[59]["image"], source[59]["image"])
    assert repr(copy) == repr(source) and str(example) not in repr(source)
    with pytest.raises(IndexError):
        source[60]


def test_volumes_are_typed(example):
    volume = Dataset.open(example).volumes()[0]
    assert (volume["num_slices"], volume["synthetic"], volume["age"]) == (12, True, 60)
    assert (
        volume["tube_voltage_kvp"] is None
        and volume["manufacturer"] == ""
        and volume["contrast"] is None
    )


def test_metadata_hold_no_path_and_no_time(example, tmp_path):
    other = write_example_dataset(tmp_path / "elsewhere")
    names = sorted(path.name for path in example.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (other / name).read_bytes() == (example / name).read_bytes(), name
        assert str(example).encode() not in (example / name).read_bytes()


def test_reading_side_does_not_import_the_dicom_side():
    program = (
        "import sys, data_prep.dataset.reader; print({'pydicom', 'jax', 'tensorflow_datasets'} & "
        "set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.rename(d.with_name("gone")), "no such directory"),
        (lambda d: (d / "preparation.json").unlink(), "not a complete dataset"),
        (lambda d: (d / "checkpoints").mkdir(), "a run directory, not a dataset"),
        (lambda d: (d / "preparation.json").write_text("{"), "damaged"),
        (
            lambda d: (d / "preparation.json").write_text('{"format_version": 9}'),
            "format_version 9",
        ),
    ],
)
def test_unusable_directories_are_refused_in_one_line(tmp_path, damage, message):
    dataset_dir = write_example_dataset(tmp_path / "d", volumes_per_split={"train": 1})
    damage(dataset_dir)
    with pytest.raises(DatasetError, match=message) as error:
        Dataset.open(dataset_dir)
    assert "\n" not in str(error.value) and str(dataset_dir) in str(error.value)


def test_missing_split_and_missing_shard_are_named(tmp_path):
    dataset_dir = write_example_dataset(tmp_path / "d", volumes_per_split={"train": 1})
    with pytest.raises(DatasetError, match=r"'test' is not in this dataset \(it has train\)"):
        Dataset.open(dataset_dir).source("test")
    (dataset_dir / "train.array_record-00000").unlink()
    with pytest.raises(DatasetError, match="shard is missing"):
        Dataset.open(dataset_dir).source("train")[0]


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotated") / "example"
    return write_example_dataset(folder, masks=True, slice_labels=True, volume_labels=True)


def test_a_record_with_a_mask_survives_a_round_trip():
    random = np.random.default_rng(0)
    image, mask = (
        random.integers(0, 256, (7, 9, 2), np.uint8),
        random.integers(0, 256, (7, 9), np.uint8),
    )
    decoded = decode_record(encode_record(image, "abc", 300, 1.5, True, mask), image.shape)
    np.testing.assert_array_equal(decoded["image"], image)
    np.testing.assert_array_equal(decoded["mask"], mask)
    assert (decoded["slice_index"], decoded["pair_valid"]) == (300, True)
    without = encode_record(image, "abc", 300, 1.5, True)
    assert "mask" not in decode_record(without, image.shape)


@pytest.mark.parametrize(
    "mask", [np.zeros((7, 8), np.uint8), np.zeros((7, 9), bool), np.zeros((7, 9, 1), np.uint8)]
)
def test_a_mask_of_another_shape_or_type_is_refused(mask):
    with pytest.raises(ValueError, match=r"a mask is uint8 \[7, 9\]"):
        encode_record(np.zeros((7, 9, 1), np.uint8), "abc", 0, 0.0, True, mask)


def test_tables_of_labels_and_regions(annotated):
    assert {p.name for p in annotated.iterdir()} >= {"slices.csv", "labels.csv", "regions.csv"}
    for split in SPLITS:
        source, rows = Dataset.open(annotated).source(split), Dataset.open(annotated).slices(split)
        assert len(source) == len(rows)
        for row, record in zip(rows, map(source.__getitem__, range(len(source))), strict=True):
            assert (row["volume_id"], row["slice_index"]) == (
                record["volume_id"],
                record["slice_index"],
            )
            assert row["mask_area_px"] == np.count_nonzero(record["mask"])
            assert (row["pe_present_on_image"] is None) == (row["slice_index"] == 0)
    everything = [row for split in SPLITS for row in Dataset.open(annotated).slices(split)]
    assert Dataset.open(annotated).slices() == everything
    labels = Dataset.open(annotated).labels()
    assert [row["volume_id"] for row in labels] == [
        row["volume_id"] for row in Dataset.open(annotated).volumes()
    ]
    assert [(row["pe_positive_exam"], row["smoker"]) for row in labels[:4]] == [
        (0, 0),
        (1, 1),
        (0, None),
        (1, 0),
    ]
    region = Dataset.open(annotated).regions()[1]
    assert (
        region["region"],
        region["first_slice"],
        region["volume_mm3"],
        region["malignancy"],
    ) == (2, 4, 50.0, 5)


def test_a_dataset_without_labels_has_no_tables_of_them(example):
    assert not {p.name for p in example.iterdir()} & {"slices.csv", "labels.csv", "regions.csv"}
    assert (
        Dataset.open(example).slices(),
        Dataset.open(example).labels(),
        Dataset.open(example).regions(),
    ) == (
        [],
        [],
        [],
    )


def test_labels_count_for_the_fingerprint(annotated):
    checksums = Dataset.open(annotated).preparation["checksums"]
    fingerprint = dataset_fingerprint(checksums)
    for name in ("slices.csv", "labels.csv", "regions.csv"):
        assert dataset_fingerprint(checksums | {name: "0"}) != fingerprint


def test_a_missing_table_of_labels_is_named(tmp_path):
    folder = write_example_dataset(
        tmp_path / "d", volumes_per_split={"train": 1}, slice_labels=True
    )
    (folder / "slices.csv").unlink()
    with pytest.raises(DatasetError, match=r"slices.csv: no such file"):
        Dataset.open(folder).slices()


def test_a_handle_reads_each_file_once_and_pickles_without_tables(annotated):
    with opened_files("preparation.json") as preparations, opened_files("slices.csv") as tables:
        opened = Dataset.open(str(annotated))
        for _ in range(2):
            assert len(opened.slices("train")) == 60 and len(opened.slices()) == 108
            assert len(opened.volumes("test")) == len(opened.labels()) - 7 == 2
            assert opened.regions()[0]["region"] == 1
            assert len(opened.source("validation")) == 24
        opened.check_tables()
    assert len(preparations) == 1 and len(tables) == 2  # the second time for its checksum
    assert (opened.name, opened.directory) == (str(annotated), annotated)
    assert (
        opened.fingerprint == opened.preparation["fingerprint"]
        and "sha256" not in opened.preparation
    )
    copy = pickle.loads(pickle.dumps(opened))
    assert len(pickle.dumps(opened)) < 8000 and copy.labels() == opened.labels()
