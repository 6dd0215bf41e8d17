"""Splits by patient: fractions, hold-outs by number of volumes, growth, nobody moves."""

import itertools
from collections import Counter

import pytest

from data_prep.pipeline.splits import assign_splits, cut_into_shards
from data_prep.system.errors import InputError

THIRDS = (0.8, 0.1, 0.1)


def patients(*volumes: int) -> dict[str, int]:
    return {f"p{index:03d}": number for index, number in enumerate(volumes)}


def test_fractions_of_patients():
    splits = assign_splits(patients(*[1] * 200), THIRDS, 0, {})
    assert Counter(splits.values()) == {"train": 160, "validation": 20, "test": 20}


@pytest.mark.parametrize("number", range(3, 12))
@pytest.mark.parametrize("holdout", [0, 1, 3])
def test_from_three_patients_on_no_split_is_empty(number, holdout):
    splits = assign_splits(patients(*range(1, number + 1)), THIRDS, holdout, {})
    assert len(splits) == number and set(splits.values()) == {"train", "validation", "test"}


@pytest.mark.parametrize("number", [1, 2])
def test_fewer_patients_than_splits_name_the_remedy(number):
    with pytest.raises(InputError, match="--splits=1,0,0"):
        assign_splits(patients(*[1] * number), THIRDS, 0, {})
    assert set(assign_splits(patients(*[1] * number), (1, 0, 0), 0, {}).values()) == {"train"}


def test_a_holdout_of_more_than_half_is_refused():
    with pytest.raises(
        InputError,
        match=r"--holdout_volumes=128: more than half of the 100 .* at most 50",
    ):
        assign_splits(patients(*[1] * 100), THIRDS, 128, {})
    assert Counter(assign_splits(patients(*[1] * 100), THIRDS, 50, {}).values())["test"] == 50


def test_holdout_is_as_near_as_whole_patients_can_be():
    """Against all subsets, the first two patients being kept for training and validation."""
    volumes = patients(3, 1, 7, 7, 5, 2, 9, 4)
    names = list(volumes)
    for wanted in range(1, 20):
        splits = assign_splits(volumes, THIRDS, wanted, {})
        held = sum(number for patient, number in volumes.items() if splits[patient] == "test")
        subsets = itertools.chain.from_iterable(
            itertools.combinations(names[2:], k) for k in range(1, 7)
        )
        best = min(abs(sum(volumes[patient] for patient in subset) - wanted) for subset in subsets)
        assert abs(held - wanted) == best


def test_holdout_of_128_volumes_leaves_the_rest_in_proportion():
    splits = assign_splits(patients(*[1, 2, 3] * 300), THIRDS, 128, {})
    volumes = patients(*[1, 2, 3] * 300)
    assert sum(volumes[patient] for patient, split in splits.items() if split == "test") == 128
    counts = Counter(splits.values())
    assert counts["train"] == pytest.approx(8 * counts["validation"], abs=8)


@pytest.mark.parametrize("holdout", [0, 10])
def test_known_patients_stay_and_new_ones_restore_the_proportions(holdout):
    few = patients(*[1] * 20)
    before = assign_splits(few, THIRDS, holdout, {})
    many = patients(*[1] * 100)
    after = assign_splits(many, THIRDS, holdout, before)
    assert {patient: after[patient] for patient in few} == before
    counts = Counter(after.values())
    assert counts["test"] == 10
    assert counts["validation"] == 10


def test_growth_in_any_steps_keeps_every_split():
    known: dict[str, str] = {}
    for number in range(3, 60):
        grown = assign_splits(
            patients(*[1 + index % 3 for index in range(number)]), THIRDS, 0, known
        )
        assert {patient: grown[patient] for patient in known} == known
        known = grown
    counts = Counter(known.values())
    assert abs(counts["test"] - 6) <= 1 and abs(counts["validation"] - 6) <= 1


def test_known_patients_that_leave_a_split_empty_are_named():
    with pytest.raises(InputError, match=r"splits validation, test, .* another --audit_dir"):
        assign_splits(
            patients(1, 1, 1), THIRDS, 0, {"p000": "train", "p001": "train", "p002": "train"}
        )


def test_shards_hold_whole_volumes():
    assert cut_into_shards([4, 4, 4, 20, 1, 1], 10) == [
        range(0, 2),
        range(2, 3),
        range(3, 4),
        range(4, 6),
    ]
    assert cut_into_shards([], 10) == []
