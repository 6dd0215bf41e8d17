"""Folds: every patient is tested once, records and tables are those of the whole dataset."""

import numpy as np
import pytest

from data_prep.dataset.folds import fold_splits, write_folds
from data_prep.dataset.reader import Dataset
from data_prep.dataset.verify import verify
from data_prep.system.errors import InputError
from data_prep.system.workers import WorkerPool
from tests.helpers.example_dataset import write_example_dataset


def test_every_patient_is_tested_once_and_is_in_one_split_of_a_fold():
    patients = [f"p{number:02d}" for number in range(13)]
    folds = [fold_splits(patients, 4, fold) for fold in range(4)]
    tested = [{p for p, split in fold.items() if split == "test"} for fold in folds]
    assert sorted(map(len, tested)) == [3, 3, 3, 4]
    assert set().union(*tested) == set(patients)
    for fold in folds:
        assert set(fold) == set(patients)
        assert sum(split == "validation" for split in fold.values()) == 2
    assert folds[1] == fold_splits(patients[::-1] * 2, 4, 1)  # neither order nor repeats matter


def test_too_few_patients_are_refused():
    with pytest.raises(InputError, match="2 patients can be cut"):
        fold_splits(["a", "b"], 2, 0)
    with pytest.raises(InputError, match="--folds=1"):
        fold_splits(["a", "b", "c"], 1, 0)
    with pytest.raises(InputError, match="--folds=5"):
        fold_splits(["a", "b", "c", "d"], 5, 0)


def test_the_folds_of_a_dataset_hold_its_records(tmp_path):
    made = {"train": 3, "validation": 1, "test": 1}
    whole = Dataset.open(
        write_example_dataset(
            tmp_path / "whole",
            volumes_per_split=made,
            masks=True,
            slice_labels=True,
            volume_labels=True,
        )
    )
    folders = write_folds([whole], tmp_path / "folds", 3)
    assert write_folds([whole], tmp_path / "folds", 3) == folders
    kept = {
        (record["volume_id"], record["slice_index"]): record
        for split in whole.preparation["splits"]
        for record in whole.source(split)
    }
    tested = []
    for folder in folders:
        fold = Dataset.open(folder)
        with WorkerPool(1) as pool:
            assert not verify(fold, pool)
        found = [
            record for split in ("train", "validation", "test") for record in fold.source(split)
        ]
        assert len(found) == len(kept)
        for record in found:
            of_whole = kept[record["volume_id"], record["slice_index"]]
            np.testing.assert_array_equal(record["image"], of_whole["image"])
            assert record["position_mm"] == of_whole["position_mm"]
        tested += [volume["patient_id"] for volume in fold.volumes("test")]
    assert sorted(tested) == sorted({row["patient_id"] for row in whole.volumes()})
    with pytest.raises(InputError, match="another number of folds"):
        write_folds([whole], tmp_path / "folds", 4)
