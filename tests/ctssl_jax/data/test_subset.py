"""Validation slices: spread over patients and volumes, with positives, fixed by the seed."""

import numpy as np
import pytest

from ctssl_jax.data import slices
from ctssl_jax.data.batches import evaluation_batches
from ctssl_jax.data.subset import FEWEST_OF_A_KIND, spread_items
from data_prep.dataset.reader import Dataset


class Split:
    """A split of volumes with so many slices each: pairs of patient and number."""

    def __init__(self, volumes, labels=None, positive=None):
        numbers = [number for _, number in volumes]
        self.patients = np.repeat([patient for patient, _ in volumes], numbers)
        self.volumes = np.repeat(np.arange(len(volumes)), numbers)
        self.labels, self.positive = labels, positive

    def __len__(self):
        return len(self.patients)


def test_every_patient_gives_as_many_slices_at_equal_distances():
    split = Split([(0, 300), (1, 90), (2, 30), (0, 600), (1, 500), (3, 5)])
    items = spread_items(split, 65, seed=1)
    assert sorted(np.bincount(split.patients[items])) == [5, 20, 20, 20]
    assert (np.bincount(split.volumes[items])[[0, 3]] >= [6, 13]).all()
    of_first = np.flatnonzero(split.patients == 0)
    distances = np.diff(np.flatnonzero(np.isin(of_first, items)))
    assert set(distances) == {45}
    assert items.tolist() != spread_items(split, 65, seed=2).tolist()
    assert items.tolist() == spread_items(split, 65, seed=1).tolist()
    # fewer than patients: as many patients
    assert len(set(split.patients[spread_items(split, 3, seed=1)])) == 3


@pytest.mark.parametrize("number", [0, 12, 13])
def test_the_whole_split(number):
    assert spread_items(Split([(0, 12)]), number, seed=1).tolist() == list(range(12))


def test_classes_have_their_share_and_rare_ones_enough():
    random = np.random.default_rng(0)
    volumes = [(patient, 100) for patient in range(200)]
    foreground = random.random(20_000) < 0.1
    items = spread_items(Split(volumes, positive=foreground), 1_000, seed=0)
    assert foreground[items].sum() == pytest.approx(1_000 * foreground.mean(), abs=1)
    rare = np.zeros(20_000, bool)
    rare[random.permutation(20_000)[:100]] = True
    items = spread_items(Split(volumes, positive=rare), 1_000, seed=0)
    assert rare[items].sum() == FEWEST_OF_A_KIND and len(items) == 1_000
    assert set(np.bincount(np.repeat(np.arange(200), 100)[items])) == {5}
    rare[np.flatnonzero(rare)[7:]] = False
    assert rare[spread_items(Split(volumes, positive=rare), 1_000, seed=0)].sum() == 7
    labels = random.choice(4, 20_000, p=[0.9, 0.09, 0.0095, 0.0005])
    split = Split(volumes, labels=labels)
    counts = np.bincount(labels[spread_items(split, 1_000, seed=0)], minlength=4)
    assert counts.sum() == 1_000 and counts[3] == (labels == 3).sum() and counts[2] == 64
    assert np.bincount(labels[spread_items(split, 12, seed=0)]).tolist() == [3, 3, 3, 3]


def test_equal_slices_on_any_number_of_processes(tiny_dataset):
    source = slices.open_source(Dataset.open(tiny_dataset), "validation", (0,), (0, 1))
    items = spread_items(source, 7, seed=0)
    assert np.bincount(source.patients).tolist() == [10, 10]
    assert sorted(np.bincount(source.patients[items])) == [3, 4]
    for processes in (1, 2, 4):
        read = []
        for number in range(processes):
            process = {"process_index": number, "process_count": processes}
            for batch in evaluation_batches(source, 4, items=items, **process):
                read += zip(batch["record_index"], batch["weight"], strict=True)
        kept = sorted(record for record, weight in read if weight)
        assert kept == source.table[items, 0].tolist() and len(read) == 8
