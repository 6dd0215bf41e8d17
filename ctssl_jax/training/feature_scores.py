"""What the features of a validation's slices tell without any label, and how far apart they lie."""

import numpy as np
import threadpoolctl

from ctssl_jax.data.slices import NeighbourSource
from ctssl_jax.ops.embeddings import spread
from ctssl_jax.stats.label_free import (
    PlacedSlices,
    neighbour_recall,
    order_auroc_across,
    position_r2_across,
)
from ctssl_jax.stats.volumes import volumes_of_records
from ctssl_jax.training.scoring import SplitScores

FEWEST_PATIENTS = 3  # that a place is told of: two are fitted to at least


def feature_scores(
    slices: SplitScores, source: NeighbourSource, z_mm: np.ndarray
) -> dict[str, float]:
    """Numbers of the features of a split, or of a part of it.

    Args:
      slices: with `embedding`.
      source: the split.
      z_mm: [N], the place of each slice.

    Returns:
      Those of `ops.embeddings.spread`; `position_r2`, the mean over volumes of the R^2 with which a
      ridge regression that is fitted to other patients tells the relative place of a slice;
      `order_auroc`, with which a logistic regression tells which of two slices lies higher; and
      `neighbour_recall`, see `stats.label_free`. Those that are undefined (fewer than three
      patients) are absent.
    """
    volumes, index = volumes_of_records(source.volumes, slices.record_index)
    patient = np.array([volume["patient_id"] for volume in volumes])[index]
    placed = PlacedSlices(slices.embedding, index, z_mm, patient)
    numbers = spread(slices.embedding)
    if not np.isfinite(slices.embedding).all():
        return {}
    # same sums on any number of cores; on busy ones ten times faster
    with threadpoolctl.threadpool_limits(1):
        of_volumes = {"neighbour_recall": neighbour_recall(placed)}
        if len(np.unique(patient)) >= FEWEST_PATIENTS:
            of_volumes["position_r2"] = position_r2_across(placed)
            of_volumes["order_auroc"] = order_auroc_across(placed)
    numbers |= {
        name: float(np.nanmean(values))
        for name, values in of_volumes.items()
        if not np.isnan(values).all()
    }
    return {name: value for name, value in numbers.items() if np.isfinite(value)}
