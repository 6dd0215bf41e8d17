"""How well probabilities predict a label: numpy, for tens of thousands of bootstrap draws.

A label is 1 (positive) or 0. A slice or volume is called positive where its probability is at least
the threshold. The threshold is fixed on validation data (`youden_threshold`), never on the data
that are measured.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ctssl_jax.stats import bootstrap
from ctssl_jax.stats.units import CALIBRATION_BINS, UNITS
from data_prep.system.errors import InputError

_MOST_PAIRS = 2**24  # pairs of patients that are kept: 128 MB
AT_THRESHOLD = ("sensitivity", "specificity")
MEASURES = ("auroc", "average_precision", "brier", "ece", *AT_THRESHOLD)


def check_predictions(
    labels: np.ndarray, probabilities: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Labels [N] as bool and probabilities [N] as float64.

    Raises:
      InputError: lengths that differ, no item, a label other than 0 and 1, a probability outside
        [0, 1] or NaN.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, np.float64)
    if labels.ndim != 1 or labels.shape != probabilities.shape or len(labels) == 0:
        raise InputError(
            f"labels {list(labels.shape)} and probabilities {list(probabilities.shape)} must be "
            "lists of equal length, not empty"
        )
    if not np.isin(labels, (0, 1)).all():
        raise InputError("labels must be 0 or 1; leave items without a label out")
    if np.isnan(probabilities).any():
        raise InputError(
            f"{np.count_nonzero(np.isnan(probabilities)):,} of {len(probabilities):,} are NaN, and "
            "probabilities must lie in [0, 1]: the model's output is not finite; take an earlier "
            "--checkpoint"
        )
    if not np.all((probabilities >= 0) & (probabilities <= 1)):
        raise InputError(
            "probabilities must lie in [0, 1]; scores of another scale (logits) have to be "
            "converted first"
        )
    return labels.astype(bool), probabilities


class Ranking(NamedTuple):
    """Items sorted once.

    order: [N] int, from the highest probability to the lowest.
    positive: [N] bool, in this order.
    ends: [T] int, the last place of each of the T distinct probabilities.
    """

    order: np.ndarray
    positive: np.ndarray
    ends: np.ndarray


class Curve(NamedTuple):
    """Summed weights of the items whose probability is at least each distinct one, both [..., T].

    true_positives: summed weights of positive items.
    false_positives: summed weights of negative items.
    """

    true_positives: np.ndarray
    false_positives: np.ndarray


def rank(positive: np.ndarray, probabilities: np.ndarray) -> Ranking:
    """Sort items: positive [N] bool, probabilities [N] float."""
    order = np.argsort(-probabilities, kind="stable")
    changes = np.flatnonzero(np.diff(probabilities[order]))
    return Ranking(order, positive[order], np.append(changes, len(order) - 1))


def curve(ranking: Ranking, weights: np.ndarray) -> Curve:
    """The counts behind ROC and precision-recall curves; weights [..., N], 0 or more."""
    return _curve_of_sorted(ranking, np.asarray(weights, np.float64)[..., ranking.order])


def _curve_of_sorted(ranking: Ranking, weights: np.ndarray) -> Curve:
    """As `curve`, of weights [..., N] in the order of the ranking."""
    called = np.cumsum(weights, axis=-1)[..., ranking.ends]
    positive = np.cumsum(np.where(ranking.positive, weights, 0.0), axis=-1)[..., ranking.ends]
    return Curve(positive, called - positive)


def auroc(counts: Curve) -> np.ndarray:
    """scikit-learn's `roc_auc_score`, in [0, 1], [...]; NaN without a positive or a negative."""
    true, false = counts
    area = true[..., 0] * false[..., 0] / 2 + np.sum(
        np.diff(false) * (true[..., 1:] + true[..., :-1]) / 2, axis=-1
    )
    return _ratio(area, true[..., -1] * false[..., -1])


def average_precision(counts: Curve) -> np.ndarray:
    """As scikit-learn's `average_precision_score`, in [0, 1], [...]; NaN without a positive."""
    true, false = counts
    called = true + false
    precision = np.divide(true, called, out=np.zeros_like(true), where=called > 0)
    return _ratio(np.sum(np.diff(true, prepend=0.0) * precision, axis=-1), true[..., -1])


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """[...], NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), math.nan), where=whole > 0)


def _curves_of_draws(
    ranking: Ranking,
    measures: Mapping[str, Callable[[Curve], np.ndarray]],
    patient_index: np.ndarray,
) -> bootstrap.Draws:
    """Measures of the curves of each draw, as many draws at a time as fit into a block."""
    patient_of_sorted = patient_index[ranking.order]
    at_once = max(1, bootstrap.BLOCK // len(patient_index))

    def draws(times: np.ndarray) -> dict[str, np.ndarray]:
        blocks = []
        for first in range(0, len(times), at_once):
            counts = _curve_of_sorted(ranking, times[first : first + at_once, patient_of_sorted])
            blocks.append({name: measure(counts) for name, measure in measures.items()})
        return {name: np.concatenate([block[name] for block in blocks]) for name in measures}

    return draws


def _auroc_of_patients(
    positive: np.ndarray, probabilities: np.ndarray, patient_index: np.ndarray, num_patients: int
) -> Callable[[np.ndarray], np.ndarray]:
    """The AUROC of draws: times drawn [R, P] -> [R].

    It is the share of pairs of a positive and a negative item whose positive one has the higher
    probability; equal ones count half. The pairs are counted once for every two patients, where
    that is less work than to go through all items in every draw. Both ways count whole and half
    pairs, so they give the same number to the last bit.
    """
    with_positives, with_negatives = (
        np.unique(patient_index[chosen]) for chosen in (positive, ~positive)
    )
    num_pairs = len(with_positives) * len(with_negatives)
    # a product of matrices does about a hundred pairs in the time of one item of a curve
    if num_pairs == 0 or num_pairs > min(100 * len(positive), _MOST_PAIRS):
        draws = _curves_of_draws(rank(positive, probabilities), {"auroc": auroc}, patient_index)
        return lambda times: draws(times)["auroc"]
    won = np.empty((len(with_negatives), len(with_positives)))
    by_patient = np.argsort(patient_index[positive], kind="stable")
    starts = np.searchsorted(patient_index[positive][by_patient], with_positives)
    distinct, place = np.unique(probabilities[positive], return_inverse=True)
    place = place[by_patient]
    negatives = np.flatnonzero(~positive)
    negatives = negatives[np.argsort(patient_index[negatives], kind="stable")]
    ends = np.searchsorted(patient_index[negatives], with_negatives[1:])
    for row, own in zip(won, np.split(probabilities[negatives], ends), strict=True):
        # twice the negatives below each distinct probability, and once those that are equal
        halves = np.zeros(len(distinct) + 1)
        for side in ("left", "right"):
            halves += np.bincount(np.searchsorted(distinct, own, side), minlength=len(halves))
        row[:] = np.add.reduceat(np.cumsum(halves)[place], starts) / 2
    num_positives, num_negatives = (
        np.bincount(patient_index[chosen], minlength=num_patients).astype(np.float64)
        for chosen in (positive, ~positive)
    )

    def draws_by_pairs(times: np.ndarray) -> np.ndarray:
        pairs_won = np.einsum("rp,rp->r", times[:, with_negatives] @ won, times[:, with_positives])
        return _ratio(pairs_won, (times @ num_positives) * (times @ num_negatives))

    return draws_by_pairs


def youden_threshold(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The threshold with the largest sensitivity + specificity - 1 (Youden 1950), for validation
    predictions.

    It lies half-way between the lowest probability that is called positive and the next lower
    probability, so that rounding of stored probabilities changes nothing. Of several equally good
    thresholds it is the highest.

    Args:
      labels: [N] 0 or 1.
      probabilities: [N] in [0, 1].

    Raises:
      InputError: one class only, or as `check_predictions`.
    """
    positive, probabilities = check_predictions(labels, probabilities)
    if positive.all() or not positive.any():
        raise InputError(
            "all validation labels are the same, so they cannot fix a threshold; prepare a "
            "--dataset with more scans"
        )
    ranking = rank(positive, probabilities)
    true, false = curve(ranking, np.ones(len(positive)))
    best = int(np.argmax(true / true[-1] - false / false[-1]))
    distinct = probabilities[ranking.order[ranking.ends]]
    return float((distinct[best] + distinct[min(best + 1, len(distinct) - 1)]) / 2)


def binary_statistic(
    labels: np.ndarray,
    probabilities: np.ndarray,
    threshold: float | None = None,
    names: Sequence[str] | None = None,
) -> bootstrap.Statistic:
    """All measures of binary predictions, for `bootstrap`. Items are sorted and binned once.

    Args:
      labels: [N] 0 or 1.
      probabilities: [N] in [0, 1].
      threshold: for sensitivity and specificity, from `youden_threshold` of validation data.
      names: a part of `MEASURES`; None takes all, without sensitivity and specificity if the
        threshold is None.

    Returns:
      A statistic of N items with these names; NaN where undefined.

    Raises:
      InputError: as `check_predictions`, an unknown name, or sensitivity without a threshold.
    """
    positive, probabilities = check_predictions(labels, probabilities)
    if names is None:
        names = [name for name in MEASURES if threshold is not None or name not in AT_THRESHOLD]
    if not set(names) <= set(MEASURES):
        raise InputError(f"measures {', '.join(names)}: choose among {', '.join(MEASURES)}")
    if threshold is None and set(names) & set(AT_THRESHOLD):
        raise InputError(
            "sensitivity and specificity need a threshold; take youden_threshold of validation "
            "predictions"
        )
    ranking = rank(positive, probabilities)
    error = probabilities - positive
    bins = np.minimum((probabilities * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    called = probabilities >= (math.inf if threshold is None else threshold)
    # part and whole of the measures that are a share or a mean
    shares = {
        "brier": (np.square(error), np.ones(len(error))),
        "sensitivity": (positive & called, positive),
        "specificity": (~positive & ~called, ~positive),
    }

    def of_patients(patient_index: np.ndarray, num_patients: int) -> bootstrap.Draws:
        grouping = patient_index, num_patients
        draws: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            name: bootstrap.share(*shares[name], *grouping) for name in names if name in shares
        }
        if "ece" in names:
            draws["ece"] = _calibration_error(error, bins, *grouping)
        curves = None
        if "average_precision" in names:
            of_curve = {"auroc": auroc, "average_precision": average_precision}
            measures = {name: measure for name, measure in of_curve.items() if name in names}
            curves = _curves_of_draws(ranking, measures, patient_index)
        elif "auroc" in names:
            draws["auroc"] = _auroc_of_patients(positive, probabilities, *grouping)

        def values(times: np.ndarray) -> dict[str, np.ndarray]:
            found = {name: of_draws(times) for name, of_draws in draws.items()}
            found |= {} if curves is None else curves(times)
            return {name: found[name] for name in names}

        return values

    return bootstrap.Statistic(len(positive), of_patients)


def _calibration_error(
    error: np.ndarray, bins: np.ndarray, patient_index: np.ndarray, num_patients: int
) -> Callable[[np.ndarray], np.ndarray]:
    """The expected calibration error of draws: times drawn [R, P] -> [R]."""
    place = patient_index * CALIBRATION_BINS + bins
    gaps = np.bincount(place, error, num_patients * CALIBRATION_BINS)
    gaps = gaps.reshape(num_patients, CALIBRATION_BINS)
    number = np.bincount(patient_index, minlength=num_patients).astype(np.float64)
    return lambda times: _ratio(np.abs(times @ gaps).sum(axis=1), times @ number)


def binary_summary(
    labels: np.ndarray,
    probabilities: np.ndarray,
    patient_ids: Sequence[str],
    threshold: float | None = None,
    *,
    volume_ids: Sequence[str] | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, object]]:
    """All measures of binary predictions with 95 % bootstrap intervals by patient.

    Args:
      labels: [N] 0 or 1.
      probabilities: [N] in [0, 1].
      patient_ids: N patients.
      threshold: for sensitivity and specificity, from `youden_threshold` of validation data; None
        leaves both out.
      volume_ids: N volumes if the items are slices; None if each item is a volume.
      num_resamples, seed: as in `bootstrap.patient_bootstrap`.

    Returns:
      As `bootstrap.summaries`, by the names in `MEASURES`.

    Raises:
      InputError: as `check_predictions`, or not one patient or volume for each item.
    """
    _check_lengths(len(labels), patient_ids=patient_ids, volume_ids=volume_ids)
    statistic = binary_statistic(labels, probabilities, threshold)
    return bootstrap.summaries(
        statistic, patient_ids, UNITS, num_resamples=num_resamples, seed=seed, volume_ids=volume_ids
    )


def _check_lengths(expected: int, **lists: Sequence | None) -> None:
    for name, values in lists.items():
        if values is not None and len(values) != expected:
            raise InputError(f"{len(values)} {name} for {expected} labels; give one for each label")


def multiclass_statistic(
    labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]
) -> bootstrap.Statistic:
    """One-vs-rest AUROC of each class, their mean, and accuracy, for `bootstrap`.

    Args:
      labels: [N] int in [0, K).
      probabilities: [N, K] in [0, 1].
      classes: K names.

    Returns:
      A statistic of N items: "auroc", the mean over the classes, "auroc/CLASS" and "accuracy". A
      class that the labels lack is NaN and not part of the mean. Where a draw lacks a class that
      the labels have, the mean is NaN, too: all draws must average the same classes.

    Raises:
      InputError: shapes that do not fit, a label outside [0, K), or a probability outside [0, 1] or
        NaN.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, np.float64)
    if len(labels) == 0 or probabilities.shape != (len(labels), len(classes)):
        raise InputError(
            f"probabilities {list(probabilities.shape)} do not fit {len(labels)} labels of "
            f"{len(classes)} classes"
        )
    if not np.isin(labels, np.arange(len(classes))).all():
        raise InputError(f"labels must be 0 to {len(classes) - 1}; leave items without a label out")
    of_classes = [
        check_predictions(labels == index, probabilities[:, index]) for index in range(len(classes))
    ]
    occurring = [
        name
        for index, name in enumerate(classes)
        if 0 < np.count_nonzero(labels == index) < len(labels)
    ]
    right = probabilities.argmax(axis=1) == labels

    def of_patients(patient_index: np.ndarray, num_patients: int) -> bootstrap.Draws:
        grouping = patient_index, num_patients
        areas = {
            name: _auroc_of_patients(*of_class, *grouping)
            for name, of_class in zip(classes, of_classes, strict=True)
        }
        accuracy = bootstrap.share(right, np.ones(len(right)), *grouping)

        def values(times: np.ndarray) -> dict[str, np.ndarray]:
            found = {name: area(times) for name, area in areas.items()}
            undefined = np.full(len(times), math.nan)
            mean = (
                sum(found[name] for name in occurring) / len(occurring) if occurring else undefined
            )
            return {
                "auroc": mean,
                **{f"auroc/{name}": area for name, area in found.items()},
                "accuracy": accuracy(times),
            }

        return values

    return bootstrap.Statistic(len(labels), of_patients)


def multiclass_summary(
    labels: np.ndarray,
    probabilities: np.ndarray,
    patient_ids: Sequence[str],
    classes: Sequence[str],
    *,
    volume_ids: Sequence[str] | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, object]]:
    """`multiclass_statistic` with 95 % bootstrap intervals by patient.

    Args:
      labels, probabilities, classes: as in `multiclass_statistic`.
      patient_ids, volume_ids, num_resamples, seed: as in `binary_summary`.
    """
    _check_lengths(len(labels), patient_ids=patient_ids, volume_ids=volume_ids)
    units = {
        "auroc": "one class against the rest, mean over the classes that occur",
        **{f"auroc/{name}": "this class against the rest" for name in classes},
        "accuracy": f"share of {'volumes' if volume_ids is None else 'slices'}",
    }
    statistic = multiclass_statistic(labels, probabilities, classes)
    return bootstrap.summaries(
        statistic, patient_ids, units, num_resamples=num_resamples, seed=seed, volume_ids=volume_ids
    )


def exam_scores(
    probabilities: np.ndarray, exam_index: np.ndarray, num_exams: int, top_k: int = 1
) -> np.ndarray:
    """The mean of the k highest slice probabilities of each exam; its maximum with k = 1.

    Args:
      probabilities: [N], one for each slice.
      exam_index: [N] int in [0, num_exams), the exam of each slice.
      num_exams: E.
      top_k: k; an exam with fewer slices is averaged over all of them.

    Returns:
      [E] float64. Exam labels follow from slice labels in the same way:
      `exam_scores(labels, exam_index, E)`.

    Raises:
      InputError: top_k below 1, or an exam without a slice.
    """
    probabilities, exam_index = (
        np.asarray(probabilities, np.float64),
        np.asarray(exam_index, np.int64),
    )
    if top_k < 1:
        raise InputError(f"top_k={top_k}: must be 1 or more")
    counts = np.bincount(exam_index, minlength=num_exams)
    if len(counts) != num_exams or not counts.all():
        raise InputError(
            f"every one of the {num_exams} exams needs a slice, and every slice must be of one of "
            "these exams"
        )
    order = np.lexsort((-probabilities, exam_index))
    # 0 for the highest slice of an exam, 1 for the next, ...
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = order[place < top_k]
    return np.bincount(exam_index[kept], probabilities[kept], num_exams) / np.minimum(counts, top_k)
