"""From scores of slices to volumes and patients: means, one-vs-rest AUROC, overlap of masks."""

import math
from collections.abc import Sequence

import numpy as np

from ctssl_jax.ops.overlap import add_up, dice, iou
from ctssl_jax.stats import bootstrap
from ctssl_jax.stats.binary import auroc, curve, rank
from ctssl_jax.stats.units import UNITS
from data_prep.system.errors import InputError


def auroc_one_vs_rest(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes of the AUROC of each class against all others.

    Args:
        probabilities: [N, K] float.
        labels: [N] int in [0, K).

    Returns:
        In [0, 1]; the mean over the classes whose AUROC is defined, NaN if all are undefined.
    """
    positives = [labels == label for label in range(probabilities.shape[1])]
    areas = [
        float(auroc(curve(rank(positive, scores), np.ones(len(labels)))))
        for positive, scores in zip(positives, probabilities.T, strict=True)
        if 0 < np.count_nonzero(positive) < len(labels)
    ]
    return sum(areas) / len(areas) if areas else math.nan


def volume_aurocs(
    label: np.ndarray, probabilities: np.ndarray, volume_index: np.ndarray, num_volumes: int
) -> np.ndarray:
    """One-vs-rest AUROC over the slices of each volume, NaN where all slices have one label.

    Args:
        label: [N] int in [0, K).
        probabilities: [N, K] float.
        volume_index: [N] int in [0, num_volumes), the volume of each slice.

    Returns:
        [num_volumes] float64.
    """
    order = np.argsort(volume_index, kind="stable")
    ends = np.searchsorted(volume_index[order], np.arange(1, num_volumes))
    of_volume = np.split(order, ends)
    return np.array(
        [auroc_one_vs_rest(probabilities[chosen], label[chosen]) for chosen in of_volume]
    )


def volumes_of_records(
    volumes: Sequence[dict], record_index: np.ndarray
) -> tuple[list[dict], np.ndarray]:
    """The volumes that some records belong to, and the volume of each record.

    Args:
        volumes: rows of `volumes.csv` of one split.
        record_index: [N] int, counted within the split.

    Returns:
        The volumes that occur (one without adjacent slices gives no pair of neighbours, and so has
        no records here), and [N] int, which of them each record belongs to.
    """
    first = np.array([volume["first_record"] for volume in volumes])
    order = np.argsort(first)
    occurring, place = np.unique(
        order[np.searchsorted(first[order], record_index, side="right") - 1], return_inverse=True
    )
    return [volumes[index] for index in occurring], place


def volume_means(
    values: Sequence[float] | np.ndarray, volume_index: Sequence[int] | np.ndarray, num_volumes: int
) -> np.ndarray:
    """Average per-slice values within each volume.

    Args:
        values: [N] one value a slice.
        volume_index: [N] int in [0, num_volumes), the volume of each slice.

    Returns:
        [num_volumes] float64.

    Raises:
        ValueError: a volume without slices.
    """
    volume_index = np.asarray(volume_index, np.int64)
    counts = np.bincount(volume_index, minlength=num_volumes)
    if np.any(counts == 0):
        raise ValueError(f"volume {int(np.argmin(counts))} is without slices to average")
    return (
        np.bincount(volume_index, weights=np.asarray(values, np.float64), minlength=num_volumes)
        / counts
    )


def volume_summary(
    volume_values: Sequence[float] | np.ndarray,
    patient_ids: Sequence[str],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, object]:
    """Mean and standard deviation over volumes, with a 95 % bootstrap interval of the mean by
    patient.

    Volumes of a patient are not independent, so whole patients are drawn with replacement, each
    with all of its volumes; the interval is the 2.5th to 97.5th percentile of the resampled means.

    Args:
        volume_values: [V] one value a volume, from `volume_means`.
        patient_ids: V patients, one a volume.
        num_resamples: bootstrap draws.
        seed: seed of the draws; equal arguments give equal results.

    Returns:
        {"mean": float,
        "sd": sample standard deviation over volumes, None with one volume,
        "ci95": [low, high], None with one patient,
        "num_volumes": int, "num_patients": int}.

    Raises:
        ValueError: lengths that are 0 or differ.
    """
    values = np.asarray(volume_values, np.float64)
    if len(values) == 0 or len(values) != len(patient_ids):
        raise ValueError(
            f"need as many patients as volumes and at least one, got {len(values)} and "
            f"{len(patient_ids)}"
        )
    num_patients = len(set(patient_ids))
    bounds = None
    if num_patients > 1:
        _, draws = bootstrap.patient_bootstrap(
            bootstrap.weighted_mean("mean", values),
            patient_ids,
            num_resamples=num_resamples,
            seed=seed,
        )
        bounds, _ = bootstrap.interval(draws["mean"])
    return {
        "mean": float(values.mean()),
        "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
        "ci95": bounds,
        "num_volumes": len(values),
        "num_patients": num_patients,
    }


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
    """Mean Dice and IoU over slices, over volumes (in three dimensions) and over patients, with
    bootstrap intervals by patient.

    Args:
      intersection, predicted, target: [N] pixels of each slice, from `ops.overlap.counts`.
      volume_ids, patient_ids: N pseudonyms.
      num_resamples, seed: as in `bootstrap.patient_bootstrap`.

    Returns:
      `dice/slice`, `dice/volume`, `dice/patient`, `iou/slice`, ... as `bootstrap.summaries`.

    Raises:
      InputError: lengths that are 0 or differ, or counts that two masks cannot have.
    """
    intersection, predicted, target = (
        np.asarray(values, np.float64) for values in (intersection, predicted, target)
    )
    if (
        not len(intersection)
        == len(predicted)
        == len(target)
        == len(volume_ids)
        == len(patient_ids)
        > 0
    ):
        raise InputError(
            "overlap needs one intersection, area, volume and patient for each slice, and at "
            "least one slice"
        )
    if np.any(intersection < 0) or np.any(intersection > np.minimum(predicted, target)):
        raise InputError(
            "an intersection is larger than one of its masks, or below 0; give pixel counts of "
            "each slice"
        )
    patient_of_item = np.asarray(patient_ids, str)
    levels = {"slice": None, "volume": np.asarray(volume_ids, str), "patient": patient_of_item}
    summary = {}
    for level, ids in levels.items():
        sums, patients, volumes = (
            (intersection, predicted, target),
            patient_of_item,
            levels["volume"],
        )
        if ids is not None:
            _, first, index = np.unique(ids, return_index=True, return_inverse=True)
            sums, patients, volumes = add_up(*sums, index, len(first)), patient_of_item[first], None
        for name, measure in (("dice", dice), ("iou", iou)):
            statistic = bootstrap.weighted_mean(f"{name}/{level}", measure(*sums))
            units = {f"{name}/{level}": UNITS[name]}
            summary |= bootstrap.summaries(
                statistic,
                patients,
                units,
                num_resamples=num_resamples,
                seed=seed,
                volume_ids=volumes,
            )
    for value in summary.values():
        value["num_volumes"] = len(set(volume_ids))
    return summary
