"""Confidence intervals whose unit is the patient.

Slices and volumes of a patient are not independent, so whole patients are drawn with replacement,
each with all of their slices. A draw says how often each patient was drawn. NaN says that a number
is undefined (a draw with one class only). Such draws are left out of the interval, and counted.

A statistic first adds up what it needs of each patient, then gives its numbers for thousands of
draws at once: a mean costs a product of matrices, whatever the number of slices.

The intervals say how much a result depends on the choice of patients, not on the seed of training.
Average several seeds, and report their spread beside the interval. Of fewer than `LEAST_PATIENTS`
patients no interval covers 95 %: it cannot be wider than from the lowest to the highest patient.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from scipy.special import stdtr, stdtrit

from data_prep.system.errors import InputError

LEAST_PATIENTS = 6  # the range of n values holds their median in 1 - 2^(1-n) of all samples
BLOCK = 2**20  # numbers of an array that one block of draws needs: 8 MB, whatever their number
KEPT = 2**22  # numbers of a table of draws: 32 MB

Draws = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Statistic:
    """Numbers of N items as a function of how often the patient of each item is drawn.

    num_items: N.
    of_patients: (patient of each item [N] int in [0, P), P) -> draws; draws are a function of how
      often each patient is drawn, [R, P] float64 -> name -> [R] float64, NaN where undefined.
    """

    num_items: int
    of_patients: Callable[[np.ndarray, int], Draws]

    def __call__(self, weights: np.ndarray) -> dict[str, float]:
        """The numbers where each item has a weight of its own, [N] and 0 or more."""
        draws = self.of_patients(np.arange(self.num_items), self.num_items)
        weights = np.asarray(weights, np.float64)[None]
        return {name: float(values[0]) for name, values in draws(weights).items()}


def draw_patients(num_patients: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each patient is drawn where `num_patients` are drawn with replacement, in blocks
    [R, num_patients] float64 that together have `num_resamples` rows.

    Equal seeds and numbers of patients give equal draws for every statistic, so the last ones are
    kept where they are small.
    """
    if num_patients * num_resamples > KEPT:
        return _draws(num_patients, num_resamples, seed)
    return iter(_kept_draws(num_patients, num_resamples, seed))


@functools.lru_cache(maxsize=1)
def _kept_draws(*given: int) -> tuple[np.ndarray, ...]:
    return tuple(_draws(*given))


def _draws(num_patients: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(seed)
    at_once = max(1, BLOCK // num_patients)
    for first in range(0, num_resamples, at_once):
        number = min(at_once, num_resamples - first)
        drawn = random.integers(0, num_patients, (number, num_patients))
        drawn += num_patients * np.arange(number)[:, None]
        times = np.bincount(drawn.ravel(), minlength=number * num_patients)
        yield times.reshape(number, num_patients).astype(np.float64)


def patient_bootstrap(
    statistic: Statistic, patient_ids: Sequence[str], *, num_resamples: int = 2000, seed: int = 0
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Evaluate a statistic on the data as they are and on draws of whole patients with replacement.

    Args:
      statistic: of N items.
      patient_ids: N patients, one an item.
      num_resamples: draws.
      seed: as in `draw_patients`.

    Returns:
      Values with every patient once, and name -> [num_resamples] float64 of the draws.

    Raises:
      InputError: no item.
    """
    if len(patient_ids) == 0:
        raise InputError("no slice or volume to draw patients from; choose a split with slices")
    patients, patient_index = np.unique(np.asarray(patient_ids, dtype=str), return_inverse=True)
    values = statistic.of_patients(patient_index, len(patients))
    estimates = {
        name: float(value[0]) for name, value in values(np.ones((1, len(patients)))).items()
    }
    blocks = [values(times) for times in draw_patients(len(patients), num_resamples, seed)]
    return estimates, {
        name: np.concatenate([np.empty(0), *(block[name] for block in blocks)])
        for name in estimates
    }


def interval(draws: np.ndarray) -> tuple[list[float] | None, int]:
    """The 2.5th to 97.5th percentile of the defined draws among [R] draws, None if all are NaN; and
    the number of NaN.
    """
    defined = draws[~np.isnan(draws)]
    bounds = (
        [float(bound) for bound in np.percentile(defined, [2.5, 97.5])] if len(defined) else None
    )
    return bounds, len(draws) - len(defined)


def widened(bounds: Sequence[float], estimate: float, num_patients: int) -> tuple[float, float]:
    """An interval of bootstrap draws, as wide as few patients ask for.

    Draws of n patients vary less than samples of n patients do, by sqrt((n - 1) / n), and know
    nothing of how uncertain that variation itself is: 95 % intervals of four patients would miss
    the truth in a fifth of all cases. So each bound moves away from the estimate by
    sqrt(n / (n - 1)) and by the ratio of Student's t with n - 1 degrees of freedom to the normal
    distribution's quantile: 1.87 times as far for 4 patients, 1.16 for 13, 1.01 for 144.

    Args:
      bounds: 95 % interval of the draws.
      estimate: the value with every patient once.
      num_patients: n, 2 or more.
    """
    normal, few = statistics.NormalDist().inv_cdf(0.975), num_patients - 1
    times = float(stdtrit(few, 0.975)) / normal * math.sqrt(num_patients / few)
    low, high = (estimate + times * (bound - estimate) for bound in bounds)
    return low, high


def t_test(difference: float, standard_error: float, degrees_of_freedom: float) -> float:
    """Two-sided p-value of Student's t, 1 where nothing varies and the difference is 0."""
    if standard_error == 0:
        return float(difference == 0)
    return float(2 * stdtr(degrees_of_freedom, -abs(difference) / standard_error))


def detectable_difference(
    standard_error: float, *, power: float = 0.8, degrees_of_freedom: float = math.inf
) -> float:
    """The smallest true difference that one two-sided test at the level of 5 % finds with this
    power, before any correction for others.

    (t(.975) + t(power)) x the standard error of the difference: 2.8 standard errors for 80 % and
    many patients, 3.1 for 13.

    Args:
      standard_error: of the difference, 0 or more, with the variance over seeds added where seeds
        are drawn, too.
      power: in (0, 1).
      degrees_of_freedom: of Student's t: patients less one.
    """
    quantiles = stdtrit(degrees_of_freedom, np.array([0.975, power]))
    return float(np.sum(quantiles)) * standard_error


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
      statistic: of N items.
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
            "mean": None if math.isnan(value) else value,
            "sd": None,
            "ci95": bounds if counts["num_patients"] > 1 and not math.isnan(value) else None,
            **counts,
            "num_undefined_draws": undefined,
            "unit": units[name],
        }
    return summary


def mean_over(statistics: Sequence[Statistic]) -> Statistic:
    """The mean of several statistics of the same items, such as one measure of an arm's training
    seeds."""

    def of_patients(patient_index: np.ndarray, num_patients: int) -> Draws:
        parts = [one.of_patients(patient_index, num_patients) for one in statistics]

        def draws(times: np.ndarray) -> dict[str, np.ndarray]:
            values = [part(times) for part in parts]
            return {name: sum(value[name] for value in values) / len(values) for name in values[0]}

        return draws

    return Statistic(statistics[0].num_items, of_patients)


def only(statistic: Statistic, name: str) -> Statistic:
    """One of the numbers of a statistic."""

    def of_patients(patient_index: np.ndarray, num_patients: int) -> Draws:
        draws = statistic.of_patients(patient_index, num_patients)
        return lambda times: {name: draws(times)[name]}

    return Statistic(statistic.num_items, of_patients)


def weighted_mean(name: str, values: np.ndarray, chosen: np.ndarray | None = None) -> Statistic:
    """The mean of values [N], such as the Dice of each slice, as a statistic.

    With `chosen` [N] bool, the mean of the chosen values.
    """
    values = np.asarray(values, np.float64)
    counted = np.ones(len(values)) if chosen is None else np.asarray(chosen, np.float64)

    def of_patients(patient_index: np.ndarray, num_patients: int) -> Draws:
        mean = share(values * counted, counted, patient_index, num_patients)
        return lambda times: {name: mean(times)}

    return Statistic(len(values), of_patients)


def share(
    part: np.ndarray, whole: np.ndarray, patient_index: np.ndarray, num_patients: int
) -> Callable[[np.ndarray], np.ndarray]:
    """A ratio of two sums over items [N], each added up by patient: times drawn [R, P] -> [R], NaN
    where the whole is 0."""
    sums = np.stack(
        [np.bincount(patient_index, values, num_patients) for values in (part, whole)], axis=-1
    )

    def ratio(times: np.ndarray) -> np.ndarray:
        part, whole = (times @ sums).T
        return np.divide(part, whole, out=np.full(len(times), math.nan), where=whole > 0)

    return ratio
