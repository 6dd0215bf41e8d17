"""Kept results compared in pairs, by patient."""

import collections
import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from data_prep.system.errors import InputError

NAMES = ("difference", "low", "high", "p", "detectable", "num_patients")
FIXED = ("pixels", "handcrafted")  # controls in which nothing is random
_OF_FAMILY = ("standard_error", "sd_over_seeds", "smallest_p")
_WITH_SEEDS = ("num_seeds", "low_with_seeds", "high_with_seeds", *_OF_FAMILY)


def paired_volumes(ours: dict[str, Any], other: dict[str, Any], score: str) -> dict[str, Any]:
    """`paired_arms` of one result each, without the interval of several seeds."""
    found = paired_arms([ours], [other], score)
    return {name: value for name, value in found.items() if name in NAMES}


def paired_arms(
    ours: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], score: str
) -> dict[str, Any]:
    """The difference of a score that each volume has, such as MSE or the R^2 of a probe.

    Args:
      ours, other: kept results of each arm, one a seed. Those seeds are compared that both have; a
        control in which nothing is random is compared with all seeds of the other. Those volumes
        are compared that all have: of the same patient, in the same place among the patient's
        volumes.
      score: column of `volumes`.

    Returns:
      {"difference": ours - other, mean over volumes and seeds, "low", "high": its 95 % bootstrap
      interval by patient, "p", "detectable": the smallest difference that one such comparison shows
      with 80 % power (of patients, and of seeds if there are several), None where p could not be
      below 5 %, "num_patients", "num_seeds": of those compared, "low_with_seeds",
      "high_with_seeds": the interval that knows the choice of seeds, too, None with one seed, and
      for `holm_with_seeds` "standard_error", "sd_over_seeds" and "smallest_p"}; all None where
      fewer than two common patients have the score, or the arms have no common seed.
    """
    # not at the top: they import JAX, and --help should be fast
    from ctssl_jax.evaluation.comparisons import LEVEL, paired_difference
    from ctssl_jax.stats.bootstrap import weighted_mean

    ours, other = _common_seeds(ours, other)
    of_all, tested = _of_common_volumes([*ours, *other], score)
    values = [of_all[: len(ours)], of_all[len(ours) :]]
    arms = [[weighted_mean(score, one) for one in side] for side in values]
    try:
        found = paired_difference(*arms, tested)
    except InputError:  # one patient, or none; or no seed
        return dict.fromkeys((*NAMES, *_WITH_SEEDS))
    error, bounds = found["standard_error"], found["ci95"]
    # of the same seed; the arm of one result is the same for all
    number = max(map(len, values))
    of_seeds = [
        float(np.mean(values[0][k % len(values[0])] - values[1][k % len(values[1])]))
        for k in range(number)
    ]
    with_seeds = interval_with_seeds(bounds, of_seeds, limit=math.inf) or (None, None)
    detectable = (
        detectable_with_seeds(error, of_seeds, found["num_patients"])
        if found["smallest_p"] < LEVEL
        else None
    )
    return {
        "difference": found["difference"],
        "low": bounds[0],
        "high": bounds[1],
        "p": found["p"],
        "detectable": detectable,
        "num_patients": found["num_patients"],
        "num_seeds": number,
        "low_with_seeds": with_seeds[0],
        "high_with_seeds": with_seeds[1],
        "standard_error": error,
        "sd_over_seeds": statistics.stdev(of_seeds) if number > 1 else None,
        "smallest_p": found["smallest_p"],
    }


def interval_by_patient(arm: Sequence[dict[str, Any]], score: str) -> list[float] | None:
    """The 95 % bootstrap interval by patient of a score's mean over volumes and seeds.

    Args:
      arm: kept results, one a seed; those volumes count that all have.
      score: column of `volumes`.

    Returns:
      [low, high]; None for fewer than two patients.
    """
    from ctssl_jax.stats import bootstrap

    values, tested = _of_common_volumes(arm, score)
    if not tested:
        return None
    mean = bootstrap.mean_over([bootstrap.weighted_mean(score, one) for one in values])
    return bootstrap.summaries(mean, tested, {score: ""})[score]["ci95"]


def _of_common_volumes(
    arm: Sequence[dict[str, Any]], score: str
) -> tuple[list[np.ndarray], list[str]]:
    """The score of each result at the volumes that all have, and the patients of these volumes."""
    by_volume = [_of_volumes(one.get("volumes", {}), score) for one in arm]
    common = [v for v in (by_volume or [{}])[0] if all(v in one for one in by_volume)]
    values = [np.array([one[volume] for volume in common]) for one in by_volume]
    return values, [str(patient) for patient, _ in common]


def _common_seeds(*arms: Sequence[dict[str, Any]]) -> list[Sequence[dict[str, Any]]]:
    if any(len(arm) == 1 and arm[0].get("encoder") in FIXED for arm in arms):
        return list(arms)
    by_seed = [{one.get("seed"): one for one in arm} for arm in arms]
    common = sorted(set.intersection(*map(set, by_seed)))
    return [[one[seed] for seed in common] for one in by_seed]


def holm_with_seeds(
    family: Sequence[dict[str, Any]], alike: Callable[[dict[str, Any]], Hashable]
) -> tuple[list[float | None], str]:
    """Holm's correction over a family of comparisons, of p-values that know seeds as well.

    Each p is the larger one of the comparison's own, which knows patients alone, and that of
    Student's t with the variances of patients and seeds. The variance over seeds is that of all
    rows that are alike together, since one row has few seeds or one; its degrees of freedom add up.
    They share the seeds of their reference, so that this is a little too sure: where seeds alone
    vary, one of ten rows without any difference is taken for sure in 7 % of simulated families, and
    one of three in 5 %. With the effective degrees by Satterthwaite it would be 1 and 2 %. Where
    none of them has several, p knows patients alone.

    Args:
      family: rows with "difference", "p", "smallest_p", "num_patients", "standard_error",
        "num_seeds" and "sd_over_seeds" (None with one seed).
      alike: row -> what its spread over seeds depends on, such as its score: an R^2 may vary a
        hundred times as much as an AUROC.

    Returns:
      The corrected p-values, None where the data are too few for any; and why, or "".
    """
    from ctssl_jax.evaluation.comparisons import holm
    from ctssl_jax.stats.bootstrap import t_test

    degrees: collections.Counter = collections.Counter()
    pooled: collections.Counter = collections.Counter()
    for row in family:
        if row["sd_over_seeds"] is not None:
            degrees[alike(row)] += row["num_seeds"] - 1
            pooled[alike(row)] += (row["num_seeds"] - 1) * row["sd_over_seeds"] ** 2
    values = []
    for row in family:
        value, freedom = row["p"], degrees[alike(row)]
        if freedom:
            of_mean = pooled[alike(row)] / freedom / row["num_seeds"]
            of_both = _of_both(row["standard_error"], row["num_patients"], of_mean, freedom)
            value = max(value, t_test(row["difference"], *of_both))
        values.append(value)
    try:
        return holm(values, [row["smallest_p"] for row in family]), ""
    except InputError as error:
        return [None] * len(family), str(error)


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


def detectable_with_seeds(
    standard_error: float, of_seeds: Sequence[float], num_patients: int
) -> float:
    """The smallest difference that one such comparison shows with 80 % power.

    Args:
      standard_error: of the mean over seeds, over the choice of patients.
      of_seeds: the difference of each seed; with one, seeds are left out.
      num_patients: 2 or more.

    Returns:
      `detectable_difference` of both variances, with the degrees of freedom of Welch and
      Satterthwaite.
    """
    from ctssl_jax.stats.bootstrap import detectable_difference

    degrees = len(of_seeds) - 1
    of_mean = statistics.variance(of_seeds) / len(of_seeds) if degrees else 0.0
    error, freedom = _of_both(standard_error, num_patients, of_mean, degrees)
    return detectable_difference(error, degrees_of_freedom=freedom)


def _of_both(
    standard_error: float, num_patients: int, variance: float, degrees: int
) -> tuple[float, float]:
    """Standard error of patients and of seeds, whose mean has a variance of so many degrees of
    freedom, and the degrees of freedom of both by Welch and Satterthwaite."""
    of_patients = standard_error**2
    both = of_patients + variance
    parts = of_patients**2 / (num_patients - 1) + (variance**2 / degrees if degrees else 0.0)
    return math.sqrt(both), both**2 / parts if parts > 0 else math.inf


def _of_volumes(volumes: dict[str, list], score: str) -> dict[tuple[Any, int], float]:
    """(patient, number among the patient's volumes) -> score, where it is defined."""
    found: dict[tuple[Any, int], float] = {}
    seen: collections.Counter = collections.Counter()
    for patient, value in zip(volumes.get("patient", ()), volumes.get(score, ()), strict=False):
        if value is not None and not np.isnan(value):
            found[patient, seen[patient]] = float(value)
        seen[patient] += 1
    return found
