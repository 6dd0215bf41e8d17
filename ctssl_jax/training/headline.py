"""The scores of a validation under the names, and with the definitions, of `ctssl_jax.evaluate`: on
the same slices both give the same numbers.
"""

import math

import numpy as np

from ctssl_jax.data.slices import NeighbourSource
from ctssl_jax.ops.overlap import dice, iou
from ctssl_jax.stats.binary import binary_statistic, multiclass_statistic
from ctssl_jax.stats.volumes import volume_aurocs, volume_means, volumes_of_records
from ctssl_jax.training.scoring import SplitScores

# Undefined where no slice is positive, or all are. That is no fault of the model.
_NEED_BOTH_CLASSES = ("auroc", "average_precision", "dice", "iou")
_FOLLOW_THE_SHARE_OF_POSITIVES = (
    *("average_precision", "annotated_slices", "dice_all_slices", "iou_all_slices"),
)


def headline_scores(slices: SplitScores, source: NeighbourSource) -> dict[str, float]:
    """The numbers of a validation.

    Args:
      slices: scores of all slices of a split, or of a part of them.
      source: the split.

    Returns:
      name -> number. Scores of slices are averaged over the slices of a volume, then over volumes.
      A mask adds `dice` and `iou` over the slices whose true mask is not empty, and
      `dice_all_slices` and `iou_all_slices`, where both masks empty count 1. A label adds `auroc`,
      over slices where slices have the label, else over volumes with their mean probabilities; for
      two classes `average_precision`, too; for more the share of right items as `accuracy`.
      A transformation of slices adds the mean over volumes of the `auroc` within a volume.
      Numbers that are undefined (no slice with a mask, labels of one class) are absent. So are,
      for a part of a split, those that follow the share of positive slices: a part holds more of
      the rare class than the split (`data.subset.spread_items`).
    """
    volumes, index = volumes_of_records(source.volumes, slices.record_index)
    num_volumes = len(volumes)
    scores = {
        name: float(volume_means(values, index, num_volumes).mean())
        for name, values in slices.scores.items()
        if not name.endswith("_px")
    }
    if source.targets.mask:
        scores |= _overlap(slices.scores)
    elif slices.classes is not None and np.isfinite(slices.classes["probabilities"]).all():
        if not source.label_level:
            areas = volume_aurocs(**slices.classes, volume_index=index, num_volumes=num_volumes)
            defined = areas[~np.isnan(areas)]
            scores["auroc"] = float(defined.mean()) if len(defined) else math.nan
        else:
            of_slices = slices.classes["label"], slices.classes["probabilities"]
            of_volumes = None if source.label_level == "slice" else index
            scores |= _of_label(*of_slices, of_volumes, num_volumes)
    absent = {name for name in _NEED_BOTH_CLASSES if math.isnan(scores.get(name, math.nan))}
    if len(slices.record_index) < len(source):
        absent |= set(_FOLLOW_THE_SHARE_OF_POSITIVES)
    return {name: value for name, value in scores.items() if name not in absent}


def _overlap(scores: dict[str, np.ndarray]) -> dict[str, float]:
    counts = [
        scores[name].astype(float) for name in ("intersection_px", "predicted_px", "target_px")
    ]
    annotated = counts[-1] > 0
    numbers = {}
    for name, measure in (("dice", dice), ("iou", iou)):
        values = measure(*counts)
        numbers[name] = float(values[annotated].mean()) if annotated.any() else math.nan
        numbers[f"{name}_all_slices"] = float(values.mean())
    return numbers


def _of_label(
    label: np.ndarray, probabilities: np.ndarray, volume_index: np.ndarray | None, num_volumes: int
) -> dict[str, float]:
    """Measures over slices, or over volumes if each slice's volume is given."""
    if volume_index is not None:
        columns = (volume_means(column, volume_index, num_volumes) for column in probabilities.T)
        probabilities = np.stack(list(columns), axis=-1)
        label = label[np.unique(volume_index, return_index=True)[1]]
    everyone = np.ones(len(label))
    if probabilities.shape[1] == 2:
        names = ("auroc", "average_precision")
        return binary_statistic(label, probabilities[:, 1], names=names)(everyone)
    classes = [str(number) for number in range(probabilities.shape[1])]
    numbers = multiclass_statistic(label, probabilities, classes)(everyone)
    return {name: numbers[name] for name in ("auroc", "accuracy")}
