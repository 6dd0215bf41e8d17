"""Confidence intervals whose unit is the patient.

Slices and volumes of a patient are not independent, so whole patients are drawn with replacement,
each with all of their slices. A draw is a weight for every item: how often its patient was drawn. A
statistic is a function of these weights, [N] float64 -> name -> value. Sorting and binning are
therefore done once and not in every draw. NaN says that the statistic is undefined (a draw with one
class only). Such draws are left out of the interval, and counted.

The intervals say how much a result depends on the choice of patients, not on the seed of training.
Average several seeds, and report their spread beside the interval.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from data_prep.system.errors import InputError

Statistic = Callable[[np.ndarray], dict[str, float]]


def draw_patients(num_patients: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Draws of `num_patients` patients with replacement: [num_patients] int in [0, num_patients).

    Equal seeds and numbers of patients give equal draws for every statistic.
    """
    random = np.random.default_rng(seed)
    for _ in range(num_resamples):
        yield random.integers(0, num_patients, num_patients)


def patient_bootstrap(
    statistic: Statistic, patient_ids: Sequence[str], *, num_resamples: int = 2000, seed: int = 0
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Evaluate a statistic on the data as they are and on draws of whole patients with replacement.

    Args:
      statistic: weights [N] float64 -> values; NaN where undefined.
      patient_ids: N patients, one an item.
      num_resamples: draws.
      seed: as in `draw_patients`.

    Returns:
      Values with all weights 1, and name -> [num_resamples] float64 of the draws.

    Raises:
      InputError: no item.
    """
    if len(patient_ids) == 0:
        raise InputError("no slice or volume to draw patients from; choose a split with slices")
    patients, patient_index = np.unique(np.asarray(patient_ids, dtype=str), return_inverse=True)
    estimates = statistic(np.ones(len(patient_index)))
    draws = {name: np.empty(num_resamples) for name in estimates}
    for number, drawn in enumerate(draw_patients(len(patients), num_resamples, seed)):
        times_drawn = np.bincount(drawn, minlength=len(patients))
        for name, value in statistic(times_drawn.astype(np.float64)[patient_index]).items():
            draws[name][number] = value
    return estimates, draws


def interval(draws: np.ndarray) -> tuple[list[float] | None, int]:
    """The 2.5th to 97.5th percentile of the defined draws among [R] draws, None if all are NaN; and
    the number of NaN.
    """
    defined = draws[~np.isnan(draws)]
    bounds = (
        [float(bound) for bound in np.percentile(defined, [2.5, 97.5])] if len(defined) else None
    )
    return bounds, len(draws) - len(defined)


def summaries(
    statistic: Statistic,
    patient_ids: Sequence[str],
    units: Mapping[str, str],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
    volume_ids: Sequence[str] | None = None,
) -> dict[str, dict[str, object]]:
    """A statistic with its intervals, in the form of results files.

    Args:
      statistic: weights [N] float64 -> values; NaN where undefined.
      patient_ids: N patients, one an item.
      units: name -> unit of the number.
      num_resamples, seed: as in `patient_bootstrap`.
      volume_ids: N volumes if the items are slices; None if each item is a volume.

    Returns:
      name -> {"mean": the value, None where undefined, "sd": None (there is one value), "ci95":
      [low, high] or None with one patient, "num_slices" (only with `volume_ids`), "num_volumes",
      "num_patients", "num_undefined_draws", "unit"}.
    """
    estimates, draws = patient_bootstrap(
        statistic, patient_ids, num_resamples=num_resamples, seed=seed
    )
    counts = {"num_volumes": len(patient_ids), "num_patients": len(set(patient_ids))}
    if volume_ids is not None:
        counts = {"num_slices": len(patient_ids), **counts, "num_volumes": len(set(volume_ids))}
    summary = {}
    for name, value in estimates.items():
        bounds, undefined = interval(draws[name])
        summary[name] = {
            "mean": None if math.isnan(value) else float(value),
            "sd": None,
            "ci95": bounds if counts["num_patients"] > 1 and not math.isnan(value) else None,
            **counts,
            "num_undefined_draws": undefined,
            "unit": units[name],
        }
    return summary


def mean_over(statistics: Sequence[Statistic]) -> Statistic:
    """The mean of several statistics, such as one measure of an arm's training seeds."""

    def averaged(weights: np.ndarray) -> dict[str, float]:
        values = [statistic(weights) for statistic in statistics]
        return {name: sum(value[name] for value in values) / len(values) for name in values[0]}

    return averaged


def weighted_mean(name: str, values: np.ndarray, chosen: np.ndarray | None = None) -> Statistic:
    """The mean of values [N], such as the Dice of each slice, as a statistic.

    With `chosen` [N] bool, the mean of the chosen values.
    """
    values = np.asarray(values, np.float64)
    counted = np.ones(len(values)) if chosen is None else np.asarray(chosen, np.float64)

    def mean(weights: np.ndarray) -> dict[str, float]:
        total = weights @ counted
        return {name: float(weights @ (values * counted) / total) if total > 0 else math.nan}

    return mean
