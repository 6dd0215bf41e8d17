"""How well probabilities predict a label: numpy, with weights, fast enough for thousands of
bootstrap draws.

A label is 1 (positive) or 0. A slice or volume is called positive where its probability is at least
the threshold. The threshold is fixed on validation data (`youden_threshold`), never on the data
that are measured.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ctssl_jax.stats import bootstrap
from ctssl_jax.stats.units import CALIBRATION_BINS, UNITS
from data_prep.system.errors import InputError

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
    """Summed weights of the items whose probability is at least each distinct one, both [T].

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
    """The counts behind ROC and precision-recall curves; weights [N], 0 or more."""
    weights = weights[ranking.order]
    positive = np.cumsum(np.where(ranking.positive, weights, 0.0))[ranking.ends]
    return Curve(positive, np.cumsum(weights)[ranking.ends] - positive)


def auroc(counts: Curve) -> float:
    """scikit-learn's `roc_auc_score`, in [0, 1]; NaN without a positive or without a negative."""
    true, false = counts
    if true[-1] == 0 or false[-1] == 0:
        return math.nan
    area = true[0] * false[0] / 2 + np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2)
    return float(area / (true[-1] * false[-1]))


def average_precision(counts: Curve) -> float:
    """As scikit-learn's `average_precision_score`, in [0, 1]; NaN without a positive."""
    true, false = counts
    if true[-1] == 0:
        return math.nan
    called = true + false
    precision = np.divide(true, called, out=np.zeros_like(true), where=called > 0)
    return float(np.sum(np.diff(true, prepend=0.0) * precision) / true[-1])


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
    """All measures of binary predictions as a function of weights, for `bootstrap`.

    Items are sorted and binned once.

    Args:
      labels: [N] 0 or 1.
      probabilities: [N] in [0, 1].
      threshold: for sensitivity and specificity, from `youden_threshold` of validation data.
      names: a part of `MEASURES`; None takes all, without sensitivity and specificity if the
        threshold is None.

    Returns:
      Weights [N] -> name -> float; NaN where undefined.

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
    squared_error = np.square(error)
    bins = np.minimum((probabilities * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    called = probabilities >= (math.inf if threshold is None else threshold)

    def share(weights: np.ndarray, chosen: np.ndarray, right: np.ndarray) -> float:
        total = weights[chosen].sum()
        return float(weights[chosen & right].sum() / total) if total > 0 else math.nan

    def values(weights: np.ndarray) -> dict[str, float]:
        scores = {}
        if "auroc" in names or "average_precision" in names:
            counts = curve(ranking, weights)
            of_curve = {"auroc": auroc, "average_precision": average_precision}
            scores |= {name: measure(counts) for name, measure in of_curve.items() if name in names}
        if "brier" in names:
            scores["brier"] = float(weights @ squared_error / weights.sum())
        if "ece" in names:
            gaps = np.bincount(bins, weights * error, CALIBRATION_BINS)
            scores["ece"] = float(np.abs(gaps).sum() / weights.sum())
        if "sensitivity" in names:
            scores["sensitivity"] = share(weights, positive, called)
        if "specificity" in names:
            scores["specificity"] = share(weights, ~positive, ~called)
        return {name: scores[name] for name in names}

    return values


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
    """One-vs-rest AUROC of each class, their mean, and accuracy, as a function of weights.

    Args:
      labels: [N] int in [0, K).
      probabilities: [N, K] in [0, 1].
      classes: K names.

    Returns:
      Weights [N] -> {"auroc": mean over the classes, "auroc/CLASS": ..., "accuracy": ...}. A class
      that the labels lack is NaN and not part of the mean. Where a draw lacks a class that the
      labels have, the mean is NaN, too: all draws must average the same classes.

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
    rankings = [
        rank(*check_predictions(labels == index, probabilities[:, index]))
        for index in range(len(classes))
    ]
    occurring = [
        name
        for index, name in enumerate(classes)
        if 0 < np.count_nonzero(labels == index) < len(labels)
    ]
    right = probabilities.argmax(axis=1) == labels

    def values(weights: np.ndarray) -> dict[str, float]:
        areas = {
            name: auroc(curve(ranking, weights))
            for name, ranking in zip(classes, rankings, strict=True)
        }
        mean = sum(areas[name] for name in occurring) / len(occurring) if occurring else math.nan
        accuracy = float(weights[right].sum() / weights.sum())
        return {
            "auroc": mean,
            **{f"auroc/{name}": area for name, area in areas.items()},
            "accuracy": accuracy,
        }

    return values


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
