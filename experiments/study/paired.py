"""Kept results compared in pairs, by patient."""

import collections
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.system.errors import InputError

NAMES = ("difference", "low", "high", "p", "detectable", "num_patients")
_WITH_SEEDS = ("num_seeds", "low_with_seeds", "high_with_seeds", "smallest_p")


def paired_volumes(ours: dict[str, Any], other: dict[str, Any], score: str) -> dict[str, Any]:
    """`paired_arms` of one result each, without the interval of several seeds."""
    found = paired_arms([ours], [other], score)
    return {name: value for name, value in found.items() if name in NAMES}


def paired_arms(
    ours: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], score: str
) -> dict[str, Any]:
    """The difference of a score that each volume has, such as MSE or the R^2 of a probe.

    Args:
      ours, other: kept results of each arm, one a seed; an arm without training has one. Those
        volumes are compared that all have: of the same patient, in the same place among the
        patient's volumes.
      score: column of `volumes`.

    Returns:
      {"difference": ours - other, mean over volumes and seeds, "low", "high": its 95 % bootstrap
      interval by patient, "p", "detectable": the smallest difference that so many patients (and
      seeds, if there are several) show with 80 % power, "num_patients", "num_seeds": of ours,
      "low_with_seeds", "high_with_seeds": the interval that knows the choice of seeds, too, None
      with one seed, "smallest_p": that p could be}; all None where fewer than two common patients
      have the score.
    """
    # not at the top: they import JAX, and --help should be fast
    from ctssl_jax.evaluation.comparisons import paired_difference
    from ctssl_jax.stats.bootstrap import detectable_difference, weighted_mean

    sides = [[_of_volumes(one.get("volumes", {}), score) for one in arm] for arm in (ours, other)]
    all_arms = [one for side in sides for one in side]
    common = [volume for volume in all_arms[0] if all(volume in one for one in all_arms)]
    values = [np.array([[one[volume] for volume in common] for one in side]) for side in sides]
    arms = [[weighted_mean(score, one) for one in side] for side in values]
    tested = [str(patient) for patient, _ in common]
    try:
        found = paired_difference(*arms, tested)
    except InputError:  # one patient, or none
        return dict.fromkeys((*NAMES, *_WITH_SEEDS))
    error, bounds = found["standard_error"], found["ci95"]
    content = {"difference": found["difference"], "low": bounds[0], "high": bounds[1]}
    content |= {"p": found["p"], "detectable": detectable_difference(error)}
    content |= {"num_patients": found["num_patients"], "num_seeds": len(ours)}
    # of the same seed; the arm of one result is the same for all
    number = max(map(len, sides))
    of_seeds = [
        float(np.mean(values[0][k % len(values[0])] - values[1][k % len(values[1])]))
        for k in range(number)
    ]
    with_seeds = interval_with_seeds(bounds, of_seeds, limit=math.inf) or (None, None)
    content |= {"low_with_seeds": with_seeds[0], "high_with_seeds": with_seeds[1]}
    if number > 1:
        content["detectable"] = detectable_with_seeds(error, of_seeds)
    return content | {"smallest_p": found["smallest_p"]}


def interval_with_seeds(
    by_patient: Sequence[float], of_seeds: Sequence[float], *, limit: float = 1.0
) -> list[float] | None:
    """The 95 % interval of a difference that depends on the choice of patients and on the seed.

    The variances of both sources add up. The one of few seeds is uncertain itself, so that the
    interval is of Student's t with the degrees of freedom of Welch and Satterthwaite.

    Args:
      by_patient: 95 % interval over the choice of patients, of the mean over seeds.
      of_seeds: the difference of each seed.
      limit: the largest difference that the score can have.

    Returns:
      [low, high] around the mean, not beyond -limit and limit; None with one seed.
    """
    from scipy.special import stdtrit

    if len(of_seeds) < 2:
        return None
    mean, variance = statistics.mean(of_seeds), statistics.variance(of_seeds) / len(of_seeds)
    two_sided = statistics.NormalDist().inv_cdf(0.975)
    both = ((by_patient[1] - by_patient[0]) / (2 * two_sided)) ** 2 + variance
    if variance > 0:
        two_sided = float(stdtrit((len(of_seeds) - 1) * (both / variance) ** 2, 0.975))
    half = two_sided * math.sqrt(both)
    return [max(-limit, mean - half), min(limit, mean + half)]


def detectable_with_seeds(standard_error: float, of_seeds: Sequence[float]) -> float | None:
    """The smallest difference that such a comparison shows with 80 % power, seeds included.

    Args:
      standard_error: of the mean over seeds, over the choice of patients.
      of_seeds: the difference of each seed.

    Returns:
      `detectable_difference` of both variances; None with one seed.
    """
    from ctssl_jax.stats.bootstrap import detectable_difference

    if len(of_seeds) < 2:
        return None
    variance = statistics.variance(of_seeds) / len(of_seeds)
    return detectable_difference(math.sqrt(standard_error**2 + variance))


def _of_volumes(volumes: dict[str, list], score: str) -> dict[tuple[Any, int], float]:
    """(patient, number among the patient's volumes) -> score, where it is defined."""
    found: dict[tuple[Any, int], float] = {}
    seen: collections.Counter = collections.Counter()
    for patient, value in zip(volumes.get("patient", ()), volumes.get(score, ()), strict=False):
        if value is not None and not np.isnan(value):
            found[patient, seen[patient]] = float(value)
        seen[patient] += 1
    return found
