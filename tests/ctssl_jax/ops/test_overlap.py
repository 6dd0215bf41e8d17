"""Dice and IoU: empty masks, three dimensions, counts on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctssl_jax.ops import overlap
from ctssl_jax.stats.volumes import overlap_summary
from data_prep.system.errors import InputError


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_scores_by_hand(array):
    both, predicted, target = (
        array([2.0, 0, 0, 0, 3]),
        array([4.0, 0, 5, 0, 3]),
        array([6.0, 0, 0, 7, 3]),
    )
    np.testing.assert_allclose(overlap.dice(both, predicted, target), [0.4, 1, 0, 0, 1])
    np.testing.assert_allclose(overlap.iou(both, predicted, target), [0.25, 1, 0, 0, 1])


def test_integer_counts_and_single_numbers():
    np.testing.assert_allclose(
        overlap.dice(np.array([1, 0]), np.array([2, 0]), np.array([2, 0])), [0.5, 1]
    )
    assert overlap.dice(1, 2, 2) == 0.5 and overlap.iou(0, 0, 0) == 1


def test_counts_on_the_device():
    # a logit of 0 is no foreground
    logits = jnp.array([[[0.1, -0.1], [5.0, 0.0]], [[-1.0, -1], [-1, -1]]])
    masks = jnp.array([[[1, 1], [3, 0]], [[0, 0], [0, 2]]], jnp.uint8)  # regions 1 to 3 count alike
    for counts in (overlap.counts(logits, masks), jax.jit(overlap.counts)(logits, masks)):
        assert [value.tolist() for value in counts] == [[2, 0], [2, 0], [3, 1]]
        assert all(value.dtype == jnp.float32 for value in counts)
    scores = jax.jit(lambda *values: overlap.dice(*overlap.counts(*values)))(logits, masks)
    np.testing.assert_allclose(scores, [0.8, 0])


def test_levels():
    both, predicted, target = [2, 0, 0, 0, 4], [4, 0, 2, 0, 4], [4, 0, 0, 8, 4]
    volumes, patients = ["v1", "v1", "v2", "v3", "v3"], ["a", "a", "a", "b", "b"]
    found = overlap_summary(both, predicted, target, volumes, patients, num_resamples=200)
    expected = {
        "dice/slice": (0.5 + 1 + 0 + 0 + 1) / 5,
        "dice/volume": (2 * 2 / 8 + 0 + 2 * 4 / 16) / 3,
        "dice/patient": (2 * 2 / (6 + 4) + 2 * 4 / (4 + 12)) / 2,
        "iou/slice": (2 / 6 + 1 + 0 + 0 + 1) / 5,
        "iou/volume": (2 / 6 + 0 + 4 / 12) / 3,
        "iou/patient": (2 / 8 + 4 / 12) / 2,
    }
    assert {name: value["mean"] for name, value in found.items()} == pytest.approx(expected)
    for name, value in found.items():
        assert (value["num_volumes"], value["num_patients"]) == (3, 2)
        assert value["ci95"][0] <= value["mean"] <= value["ci95"][1]
        assert ("num_slices" in value) == name.endswith("/slice")
    # of two patients: one of them, or both
    assert found["dice/patient"]["ci95"] == pytest.approx([0.4, 0.5])


def test_wrong_counts():
    for changed, message in (
        (([1], [1, 1], [1, 1]), "one intersection, area, volume and patient for each slice"),
        (([2, 0], [1, 1], [2, 1]), "larger than one of its masks"),
        (([-1, 0], [1, 1], [2, 1]), "below 0"),
    ):
        with pytest.raises(InputError, match=message):
            overlap_summary(*changed, ["v", "v"], ["p", "p"])
    with pytest.raises(InputError, match="at least one slice"):
        overlap_summary([], [], [], [], [])
