"""Kept results compared in pairs, by patient."""

from typing import Any

import numpy as np

from data_prep.system.errors import InputError


def paired_volumes(ours: dict[str, Any], other: dict[str, Any], score: str) -> dict[str, Any]:
    """The difference of a score that each volume has, such as MSE or the R^2 of a probe.

    Args:
      ours, other: kept results of the same volumes in the same order.
      score: column of `volumes`.

    Returns:
      {"difference": ours - other, mean over volumes, "low", "high": its 95 % bootstrap interval by
      patient, "p", "detectable": the smallest difference that so many patients show with 80 %
      power, "num_patients"}; all None where the volumes differ or lack the score.
    """
    # not at the top: they import JAX, and --help should be fast
    from ctssl_jax.evaluation.comparisons import paired_difference
    from ctssl_jax.stats.bootstrap import detectable_difference, weighted_mean

    names = ("difference", "low", "high", "p", "detectable", "num_patients")
    sides = [one.get("volumes", {}) for one in (ours, other)]
    patients = sides[0].get("patient")
    if not all(score in side for side in sides) or patients != sides[1].get("patient"):
        return dict.fromkeys(names)
    values = np.array([[np.nan if v is None else v for v in side[score]] for side in sides], float)
    defined = ~np.isnan(values).any(axis=0)
    arms = [[weighted_mean(score, side[defined])] for side in values]
    tested = [str(patient) for patient, there in zip(patients, defined, strict=True) if there]
    try:
        found = paired_difference(*arms, tested)
    except InputError:  # one patient, or none
        return dict.fromkeys(names)
    numbers = found["difference"], *found["ci95"], found["p"]
    detectable = detectable_difference(found["standard_error"])
    return dict(zip(names, (*numbers, detectable, found["num_patients"]), strict=True))
