"""Two arms of an experiment on the same patients: paired bootstrap by patient, and Holm's
correction.

Both arms see the same draws of patients, and each arm is the mean over its training seeds.
Intervals and p-values say how far a difference depends on the choice of patients. How far training
itself varies shows in the spread over seeds.
"""

import math
from collections.abc import Sequence

import numpy as np

from ctssl_jax.evaluation.predictions import Predictions
from ctssl_jax.ops.overlap import dice, iou
from ctssl_jax.stats.binary import binary_statistic, multiclass_statistic
from ctssl_jax.stats.bootstrap import (
    Draws,
    Statistic,
    interval,
    mean_over,
    only,
    patient_bootstrap,
    t_test,
    weighted_mean,
    widened,
)
from data_prep.system.errors import InputError

LEVEL = 0.05
LEAST_DRAWS = 20_000
DRAWS_A_ROW = 400  # with these the smallest p of a family is a tenth of LEVEL after the correction
_EQUAL = 1e-12  # differences that rounding makes of equal arms

OF_CLASSES = ("auroc", "average_precision", "brier", "ece")
OF_MASKS = {"dice": dice, "iou": iou}


def draws_of_family(num_rows: int) -> int:
    """Bootstrap draws of each of the comparisons that are corrected together."""
    return max(LEAST_DRAWS, DRAWS_A_ROW * num_rows)


def smallest_p(num_draws: int, num_patients: int) -> float:
    """The smallest p-value that a comparison can have, in (0, 1].

    2 / (num_draws + 1), as no draw lies on the other side; and not below 2 / 2^num_patients, that
    of a test which exchanges the arms of whole patients: draws do not make up for patients.
    """
    return min(1.0, max(2 / (num_draws + 1), 2.0 ** (1 - num_patients)))


def paired_difference(
    arm_a: Sequence[Statistic],
    arm_b: Sequence[Statistic],
    patient_ids: Sequence[str],
    *,
    num_resamples: int = LEAST_DRAWS,
    seed: int = 0,
) -> dict[str, object]:
    """Compare one measure of two arms.

    The interval is `bootstrap.widened`. The two-sided p-value is the larger one of Student's t test
    with the standard error below, and 2 (1 + k) / (1 + n) of n draws, of which the smaller side has
    k: those whose difference does not lie beyond 0. It is at least `smallest_p`, and 1 for equal
    arms.

    Args:
      arm_a, arm_b: the statistics of each arm, one for each training seed, all with one name and
        with the same items in the same order.
      patient_ids: N patients, one for each item.
      num_resamples, seed: as in `bootstrap.patient_bootstrap`.

    Returns:
      {"a", "b": values of the arms, "difference": a - b, "ci95": [low, high] of the difference,
      "standard_error": standard deviation of its draws x sqrt(n / (n - 1)) of n patients, "p",
      "smallest_p": that p could be, "num_draws", "num_patients", "num_undefined_draws"}.

    Raises:
      InputError: an arm without statistics, fewer than two patients, or a measure that is undefined
        for these items.
    """
    if not arm_a or not arm_b:
        raise InputError("an arm of the comparison has no run; give each arm at least one run")
    num_patients = len(set(patient_ids))
    if num_patients < 2:
        raise InputError(
            f"{num_patients} patients cannot be compared; evaluate on a split with two or more"
        )
    means = mean_over(arm_a), mean_over(arm_b)

    def of_patients(patient_index: np.ndarray, num_patients: int) -> Draws:
        sides = [mean.of_patients(patient_index, num_patients) for mean in means]

        def values(times: np.ndarray) -> dict[str, np.ndarray]:
            (a,), (b,) = (side(times).values() for side in sides)
            return {"a": a, "b": b}

        return values

    both = Statistic(len(patient_ids), of_patients)
    estimates, draws = patient_bootstrap(both, patient_ids, num_resamples=num_resamples, seed=seed)
    differences = draws["a"] - draws["b"]
    bounds, undefined = interval(differences)
    difference = float(estimates["a"] - estimates["b"])
    if math.isnan(difference) or bounds is None:
        raise InputError(
            "the measure is undefined for these slices (one class only); evaluate on a larger split"
        )
    defined = differences[~np.isnan(differences)]
    smallest = smallest_p(len(defined), num_patients)
    error = float(np.std(defined, ddof=1)) * math.sqrt(num_patients / (num_patients - 1))
    by_t = t_test(difference, error, num_patients - 1)
    return {
        "a": float(estimates["a"]),
        "b": float(estimates["b"]),
        "difference": difference,
        "ci95": list(widened(bounds, difference, num_patients)),
        "standard_error": error,
        "p": max(smallest, by_t, _two_sided(defined)),
        "smallest_p": smallest,
        "num_draws": num_resamples,
        "num_patients": num_patients,
        "num_undefined_draws": undefined,
    }


def _two_sided(differences: np.ndarray) -> float:
    sides = (differences <= _EQUAL, differences >= -_EQUAL)
    not_beyond = min(np.count_nonzero(side) for side in sides)
    return min(1.0, 2 * (1 + int(not_beyond)) / (1 + len(differences)))


def statistic_of(predictions: Predictions, metric: str) -> Statistic:
    """A measure of a run's predictions, for `bootstrap`.

    Args:
      predictions: the predictions.
      metric: for a label with two classes `auroc`, `average_precision`, `brier` or `ece`; for a
        label with more classes `auroc`, the mean of one class against the rest; for masks `dice` or
        `iou`, the mean over the slices whose true mask is not empty.

    Raises:
      InputError: a measure that is not defined for such predictions.
    """
    if metric in OF_MASKS and predictions.target_px is not None:
        counts = (predictions.intersection_px, predictions.predicted_px, predictions.target_px)
        annotated = predictions.target_px > 0
        return weighted_mean(metric, OF_MASKS[metric](*counts), annotated)
    if metric in OF_CLASSES and predictions.probabilities is not None:
        if predictions.probabilities.shape[1] == 2:
            return binary_statistic(
                predictions.label, predictions.probabilities[:, 1], names=[metric]
            )
        if metric == "auroc":
            classes = [str(index) for index in range(predictions.probabilities.shape[1])]
            whole = multiclass_statistic(predictions.label, predictions.probabilities, classes)
            return only(whole, metric)
    raise InputError(
        f"{metric} cannot be compared for these predictions; choose among "
        f"{', '.join(OF_CLASSES)} for a label with two classes, auroc for a label with more, "
        f"{', '.join(OF_MASKS)} for masks"
    )


def paired_comparison(
    arm_a: Sequence[Predictions],
    arm_b: Sequence[Predictions],
    metric: str,
    *,
    num_resamples: int = LEAST_DRAWS,
    seed: int = 0,
) -> dict[str, object]:
    """Compare two arms by the predictions of their runs, one run for each training seed.

    Args:
      arm_a, arm_b: from `predictions.read`, all for the same slices.
      metric: as in `statistic_of`.
      num_resamples, seed: as in `bootstrap.patient_bootstrap`.

    Returns:
      As `paired_difference`.

    Raises:
      InputError: as `paired_difference` and `statistic_of`, or runs that were not measured on the
        same slices.
    """
    runs = [*arm_a, *arm_b]
    for run in runs[1:]:
        for name in ("patient_id", "volume_id", "slice_index", "label", "target_px"):
            if not np.array_equal(getattr(runs[0], name), getattr(run, name)):
                raise InputError(
                    f"the runs were not measured on the same slices ({name} differs); evaluate "
                    "them again on one dataset and split"
                )
    arms = ([statistic_of(run, metric) for run in arm] for arm in (arm_a, arm_b))
    return paired_difference(
        *arms, runs[0].patient_id if runs else [], num_resamples=num_resamples, seed=seed
    )


def holm(p_values: Sequence[float], smallest: Sequence[float] = ()) -> list[float]:
    """Holm's correction (1979) of the p-values of a family of comparisons.

    Args:
      p_values: K numbers in [0, 1].
      smallest: the smallest p-values that each of the K comparisons could have, from `smallest_p`;
        empty if they can be as small as they like.

    Returns:
      K adjusted p-values in [0, 1], in the same order. Whoever rejects the hypotheses with an
      adjusted p-value below 5 % makes an error in the family with a probability of at most 5 %.

    Raises:
      InputError: a value outside [0, 1], or NaN; or no comparison could be below 5 % after the
        correction, whatever the data.
    """
    p_values = np.asarray(p_values, np.float64)
    if not np.all((p_values >= 0) & (p_values <= 1)):
        raise InputError("a p-value lies outside [0, 1]; leave out undefined comparisons")
    if len(smallest) and min(smallest) * len(p_values) >= LEVEL:
        raise InputError(
            f"Holm's correction of {len(p_values)} comparisons cannot give a p below {LEVEL:g}: "
            f"each p is {min(smallest):.2g} or more; take {draws_of_family(len(p_values)):,} draws "
            f"of {_patients_for(len(p_values))} patients or more, or compare less"
        )
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p_values[order] * factors))
    return adjusted.tolist()


def _patients_for(num_rows: int) -> int:
    """The fewest patients with which a family of so many comparisons can be below `LEVEL`."""
    return math.floor(math.log2(num_rows / LEVEL)) + 2
