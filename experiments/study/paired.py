"""Kept results compared in pairs, by patient."""

import collections
from typing import Any

import numpy as np

from data_prep.system.errors import InputError


def paired_volumes(ours: dict[str, Any], other: dict[str, Any], score: str) -> dict[str, Any]:
    """The difference of a score that each volume has, such as MSE or the R^2 of a probe.

    Args:
      ours, other: kept results. Those volumes are compared that both have: of the same patient, in
        the same place among the patient's volumes.
      score: column of `volumes`.

    Returns:
      {"difference": ours - other, mean over volumes, "low", "high": its 95 % bootstrap interval by
      patient, "p", "detectable": the smallest difference that so many patients show with 80 %
      power, "num_patients"}; all None where fewer than two common patients have the score.
    """
    # not at the top: they import JAX, and --help should be fast
    from ctssl_jax.evaluation.comparisons import paired_difference
    from ctssl_jax.stats.bootstrap import detectable_difference, weighted_mean

    names = ("difference", "low", "high", "p", "detectable", "num_patients")
    sides = [_of_volumes(one.get("volumes", {}), score) for one in (ours, other)]
    common = [volume for volume in sides[0] if volume in sides[1]]
    arms = [[weighted_mean(score, np.array([side[v] for v in common]))] for side in sides]
    tested = [str(patient) for patient, _ in common]
    try:
        found = paired_difference(*arms, tested)
    except InputError:  # one patient, or none
        return dict.fromkeys(names)
    numbers = found["difference"], *found["ci95"], found["p"]
    detectable = detectable_difference(found["standard_error"])
    return dict(zip(names, (*numbers, detectable, found["num_patients"]), strict=True))


def _of_volumes(volumes: dict[str, list], score: str) -> dict[tuple[Any, int], float]:
    """(patient, number among the patient's volumes) -> score, where it is defined."""
    found: dict[tuple[Any, int], float] = {}
    seen: collections.Counter = collections.Counter()
    for patient, value in zip(volumes.get("patient", ()), volumes.get(score, ()), strict=False):
        if value is not None and not np.isnan(value):
            found[patient, seen[patient]] = float(value)
        seen[patient] += 1
    return found
