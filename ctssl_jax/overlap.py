"""How well a predicted mask covers the true one: hard Dice and IoU at probability 0.5.

Both are computed from three counts a slice (pixels in both masks, in the predicted one, in the true one), so that
masks need not be kept; the counts of a volume's or patient's slices add up to those of the volume or patient. Where
both masks are empty the score is 1, where exactly one is it is 0.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ctssl_jax import bootstrap
from data_prep.system.errors import InputError

UNITS = {
    "dice": "2 |both| / (|predicted| + |true|) at 0.5; both empty 1, one empty 0",
    "iou": "|both| / |either| at 0.5; both empty 1, one empty 0",
}


def counts(logits: jax.Array, masks: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pixels in both masks, in the predicted and in the true one.

    Args:
      logits: [B, H, W]; above 0 (probability above 0.5) is foreground.
      masks: [B, H, W], above 0 is foreground.

    Returns:
      Three arrays [B] float32, exact up to 2 ** 24 pixels.
    """
    predicted, target = logits > 0, masks > 0
    both = predicted & target
    return tuple(jnp.sum(chosen, axis=(1, 2), dtype=jnp.float32) for chosen in (both, predicted, target))


def dice(intersection, predicted, target):
    """2 * intersection / (predicted + target); arrays of jax or numpy of one shape, in [0, 1]."""
    total = predicted + target
    empty = total == 0  # counted as one pixel that is right
    return (2 * intersection + empty) / (total + empty)


def iou(intersection, predicted, target):
    """intersection / (predicted + target - intersection), as `dice`."""
    union = predicted + target - intersection
    empty = union == 0
    return (intersection + empty) / (union + empty)


def add_up(
    intersection: np.ndarray, predicted: np.ndarray, target: np.ndarray, index: np.ndarray, number: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts of slices [N] to those of the volumes or patients that `index` [N] int in [0, number) names: [number]."""
    return tuple(np.bincount(index, values, number) for values in (intersection, predicted, target))


def overlap_summary(
    intersection: np.ndarray,
    predicted: np.ndarray,
    target: np.ndarray,
    volume_ids: Sequence[str],
    patient_ids: Sequence[str],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, object]]:
    """Mean Dice and IoU over slices, over volumes (in three dimensions) and over patients, with bootstrap intervals by
    patient.

    Args:
      intersection, predicted, target: [N] counts of each slice, from `counts`.
      volume_ids, patient_ids: N pseudonyms.
      num_resamples, seed: of `bootstrap.patient_bootstrap`.

    Returns:
      `dice/slice`, `dice/volume`, `dice/patient`, `iou/slice`, ... as `bootstrap.summaries`.

    Raises:
      InputError: lengths that differ, no slice, or counts that no two masks can have.
    """
    intersection, predicted, target = (np.asarray(values, np.float64) for values in (intersection, predicted, target))
    if not len(intersection) == len(predicted) == len(target) == len(volume_ids) == len(patient_ids) > 0:
        raise InputError("overlap needs one intersection, area, volume and patient a slice, and at least one slice")
    if np.any(intersection < 0) or np.any(intersection > np.minimum(predicted, target)):
        raise InputError("an intersection is larger than one of its masks, or below 0; give pixel counts of each slice")
    patient_of_item = np.asarray(patient_ids, str)
    levels = {"slice": None, "volume": np.asarray(volume_ids, str), "patient": patient_of_item}
    found = {}
    for level, ids in levels.items():
        sums, patients, volumes = (intersection, predicted, target), patient_of_item, levels["volume"]
        if ids is not None:
            _, first, index = np.unique(ids, return_index=True, return_inverse=True)
            sums, patients, volumes = add_up(*sums, index, len(first)), patient_of_item[first], None
        for name, measure in (("dice", dice), ("iou", iou)):
            statistic = bootstrap.weighted_mean(f"{name}/{level}", measure(*sums))
            units = {f"{name}/{level}": UNITS[name]}
            found |= bootstrap.summaries(
                statistic, patients, units, num_resamples=num_resamples, seed=seed, volume_ids=volumes
            )
    for summary in found.values():
        summary["num_volumes"] = len(set(volume_ids))
    return found
