"""Slices of a slab: at even distances in mm, at most the slab's thickness apart, never across a
gap."""

import numpy as np
import pytest

from ctssl_jax.data.batches import training_batches
from ctssl_jax.data.slices import Targets, neighbour_table, open_source
from ctssl_jax.ops.views import slice_offsets, slice_step_mm
from data_prep.dataset.reader import Dataset


def table(spacing, number=3, slab_mm=12.0, num_slices=20, gaps=""):
    volume = {
        "num_slices": num_slices,
        "first_record": 100,
        "gap_positions": gaps,
        "middle_slice": 0,
        "slice_spacing_mm": spacing,
    }
    step = slice_step_mm(number, slab_mm)
    return neighbour_table([volume], slice_offsets(number), step_mm=step) - 100


@pytest.mark.parametrize(
    ("spacing", "number", "expected"),
    [
        (2.5, 3, (-2, 0, 2)),  # 5 mm to both sides: 7.5 mm would be too far
        (3.0, 3, (-2, 0, 2)),  # 6 mm exactly
        (1.0, 5, (-6, -3, 0, 3, 6)),
        (2.5, 2, (-4, 0)),
        (7.0, 3, (0, 0, 0)),
        (None, 3, (0, 0, 0)),  # a volume of one slice has no spacing
    ],
)
def test_distances_in_slices(spacing, number, expected):
    assert tuple(table(spacing, number)[10] - 10) == expected


def test_neighbours_beyond_an_end_or_a_gap_are_the_last_ones_before_it():
    rows = table(1.0, num_slices=20, gaps="9")
    assert len(rows) == 20  # every slice is an item
    np.testing.assert_array_equal(rows[:, 1], np.arange(20))
    assert tuple(rows[0]) == (0, 0, 6) and tuple(rows[19]) == (13, 19, 19)
    assert tuple(rows[9]) == (3, 9, 9) and tuple(rows[10]) == (10, 10, 16)
    assert np.all((rows <= 9) == (rows[:, 1:2] <= 9))


def test_a_rounded_spacing_loses_no_slice():
    """Spacings come from places as the scanner wrote them: 2.00001 mm is 2 mm."""
    assert np.array_equal(table(2.00001), table(2.0))
    assert np.ptp(table(2.01)[10]) < np.ptp(table(2.0)[10])  # but no slab is thicker than it says


def test_slices_of_a_real_source_lie_in_one_slab(tiny_dataset):
    """Positions are in mm, with a gap of 5 mm after slice 5."""
    dataset = Dataset.open(tiny_dataset)
    targets = Targets(step_mm=slice_step_mm(3, 12.0), patient=True)
    source = open_source(dataset, "train", (0,), slice_offsets(3), targets)
    records = dataset.source("train")
    assert len(source) == 60
    for row in source.table:
        found = [records[number] for number in row]
        assert len({record["volume_id"] for record in found}) == 1
        places = [record["position_mm"] for record in found]
        assert max(places) - min(places) <= 12.0
        assert len({record["slice_index"] > 5 for record in found}) == 1
    np.testing.assert_allclose(source.position_mm(np.array([0, 7])), [0.0, 20.0])
    batch = next(training_batches(source, 8, 0))
    assert batch["images"].shape == (8, 3, 16, 16, 1)
    np.testing.assert_array_equal(batch["patient"], batch["record_index"] // 12)
