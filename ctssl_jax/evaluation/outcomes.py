"""How good the predictions of a downstream task are. Labels are measured over slices, exams and
groups of patients, masks over slices, volumes and patients.

The functions take `predictions.Predictions`, and give each measure with its 95 % bootstrap interval
by patient.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctssl_jax.evaluation.predictions import Predictions
from ctssl_jax.ops.overlap import add_up, dice, iou
from ctssl_jax.stats.binary import binary_summary, exam_scores, multiclass_summary, youden_threshold
from ctssl_jax.stats.subgroups import age_band, performance_by_group
from ctssl_jax.stats.units import UNITS
from ctssl_jax.stats.volumes import overlap_summary, volume_means
from data_prep.system.errors import InputError

GROUPS = ("sex", "age", "ethnic_group")  # columns of volumes.csv


def label_metrics(
    predictions: Predictions,
    validation: Predictions | None,
    classes: Sequence[str],
    exam_of_volume: Mapping[str, str] | None,
) -> tuple[dict[str, dict], dict[str, float | None]]:
    """Measures of a label.

    Args:
      predictions: predictions of the evaluated split.
      validation: predictions of the validation split, which fixes the thresholds of sensitivity and
        specificity (largest Youden index); None, or a split with one class only, leaves these two
        measures out.
      classes: names of the label's K classes.
      exam_of_volume: exam of each volume if slices have the label; None if volumes or patients have
        it, whose predictions are averaged over the slices of a volume.

    Returns:
      Measures as `bootstrap.summaries`, and the thresholds {"slice" or "volume": p or None, "exam":
      p or None}, empty for more than two classes.
      Two classes have `stats.binary.MEASURES`, and for labels of slices the same measures of exams
      as `exam_auroc`, ... (an exam has the score of its highest slice). More classes have the
      measures of `stats.binary.multiclass_statistic`.
    """
    of_slices = exam_of_volume is not None
    items, of_validation = predictions, validation
    if not of_slices:
        items = _mean_over_volumes(predictions)
        of_validation = None if validation is None else _mean_over_volumes(validation)
    volume_ids = items.volume_id if of_slices else None
    if len(classes) > 2:
        return multiclass_summary(
            items.label, items.probabilities, items.patient_id, list(classes), volume_ids=volume_ids
        ), {}
    threshold = _threshold(of_validation)
    thresholds = {"slice" if of_slices else "volume": threshold}
    summaries = binary_summary(
        items.label, items.probabilities[:, 1], items.patient_id, threshold, volume_ids=volume_ids
    )
    if of_slices:
        exams = _exams(predictions, exam_of_volume)
        thresholds["exam"] = _threshold(
            None if validation is None else _exams(validation, exam_of_volume)
        )
        of_exams = binary_summary(
            exams.label, exams.probabilities[:, 1], exams.patient_id, thresholds["exam"]
        )
        summaries |= {
            f"exam_{name}": {**summary, "unit": f"exams: {summary['unit']}"}
            for name, summary in of_exams.items()
        }
    return summaries, thresholds


def by_group(
    predictions: Predictions, volumes: Sequence[Mapping[str, Any]], level: str
) -> dict[str, dict]:
    """AUROC within groups of patients and the largest gap between groups, by sex, age and ethnic
    group: over the items of the main `auroc` of `label_metrics`.

    Args:
      predictions: predictions of a label with two classes.
      volumes: rows of `volumes.csv` for the volumes of the predictions.
      level: `slice`, `volume` or `patient`, which have the label.

    Returns:
      attribute -> as `subgroups.performance_by_group`, with `items`: `slices`, or `volumes` with
      their mean probabilities; or {"not_measured": why}.
    """
    items = predictions if level == "slice" else _mean_over_volumes(predictions)
    volume_rows = {volume["volume_id"]: volume for volume in volumes}
    by_attribute: dict[str, dict] = {}
    for name in GROUPS:
        groups = [volume_rows[volume_id][name] for volume_id in items.volume_id]
        groups = ["" if group is None else group for group in groups]
        if name == "age":
            groups = [age_band(None if age == "" else age) for age in groups]
        try:
            found = performance_by_group(
                items.label, items.probabilities[:, 1], items.patient_id, groups
            )
        except InputError as error:
            by_attribute[name] = {"not_measured": str(error)}
        else:
            kind = "slices" if level == "slice" else "volumes"
            by_attribute[name] = {"items": kind, **found}
    return by_attribute


def mask_metrics(predictions: Predictions) -> dict[str, dict]:
    """Dice and IoU of masks at probability 0.5.

    Args:
      predictions: predictions with pixel counts.

    Returns:
      Summaries as `bootstrap.summaries`.
      `dice` and `iou`, the main measures, are means over the slices whose true mask is not empty.
      `dice_all_slices` and `iou_all_slices` are means over all slices (both masks empty: 1, exactly
      one empty: 0).
      `volume_dice`, `volume_iou`, `patient_dice` and `patient_iou` are computed over all voxels of
      a volume or patient, and averaged over all of them (both masks empty: 1). The unit of each
      says so.

    Raises:
      InputError: all true masks are empty.
    """
    annotated = np.flatnonzero(predictions.target_px > 0)
    if not len(annotated):
        raise InputError(
            "no slice of this split has a mask with foreground; evaluate on another --split or "
            "--dataset"
        )

    def summary(chosen: Any) -> dict[str, dict]:
        counts = (predictions.intersection_px, predictions.predicted_px, predictions.target_px)
        chosen_counts = [values[chosen] for values in counts]
        return overlap_summary(
            *chosen_counts, predictions.volume_id[chosen], predictions.patient_id[chosen]
        )

    of_annotated, of_all = summary(annotated), summary(slice(None))
    names, levels = ("dice", "iou"), ("volume", "patient")
    summaries = {
        **{name: of_annotated[f"{name}/slice"] for name in names},
        **{f"{name}_all_slices": of_all[f"{name}/slice"] for name in names},
        **{f"{level}_{name}": of_all[f"{name}/{level}"] for level in levels for name in names},
    }
    return {name: {**value, "unit": UNITS[name]} for name, value in summaries.items()}


def masks_of_volumes(
    predictions: Predictions, volume_index: np.ndarray, num_volumes: int
) -> dict[str, np.ndarray]:
    """Dice and IoU of each volume, [num_volumes] float64, named as in `mask_metrics`: `dice` is the
    mean over the volume's slices whose true mask is not empty, NaN if there is none.

    Args:
      predictions: predictions of N slices with pixel counts.
      volume_index: [N] int in [0, num_volumes), the volume of each slice.
    """
    counts = (predictions.intersection_px, predictions.predicted_px, predictions.target_px)
    sums = add_up(*counts, volume_index, num_volumes)
    annotated = np.flatnonzero(predictions.target_px > 0)
    number = np.bincount(volume_index[annotated], minlength=num_volumes)
    of_volumes = {}
    for name, measure in (("dice", dice), ("iou", iou)):
        values = measure(*(np.asarray(count, np.float64) for count in counts))
        total = np.bincount(volume_index[annotated], values[annotated], num_volumes)
        of_volumes[name] = np.divide(
            total, number, out=np.full(num_volumes, np.nan), where=number > 0
        )
        of_volumes[f"{name}_all_slices"] = volume_means(values, volume_index, num_volumes)
    return of_volumes | {"volume_dice": dice(*sums), "volume_iou": iou(*sums)}


def _threshold(validation: Predictions | None) -> float | None:
    if validation is None or len(np.unique(validation.label)) < 2:
        return None
    return youden_threshold(validation.label, validation.probabilities[:, 1])


def _mean_over_volumes(predictions: Predictions) -> Predictions:
    """One item a volume, with mean probabilities; all slices of a volume have one label."""
    volumes, first, index = np.unique(predictions.volume_id, return_index=True, return_inverse=True)
    sums = np.stack(
        [
            np.bincount(index, column, len(volumes))
            for column in predictions.probabilities.T.astype(np.float64)
        ],
        axis=-1,
    )
    return Predictions(
        patient_id=predictions.patient_id[first],
        volume_id=volumes,
        slice_index=predictions.slice_index[first],
        label=predictions.label[first],
        probabilities=sums / np.bincount(index, minlength=len(volumes))[:, None],
    )


def _exams(predictions: Predictions, exam_of_volume: Mapping[str, str]) -> Predictions:
    """One item an exam: the highest probability and the highest label of its slices."""
    exam_ids = np.array([exam_of_volume[volume_id] for volume_id in predictions.volume_id])
    exams, first, index = np.unique(exam_ids, return_index=True, return_inverse=True)
    positive = exam_scores(predictions.probabilities[:, 1], index, len(exams))
    return Predictions(
        patient_id=predictions.patient_id[first],
        volume_id=exams,
        slice_index=predictions.slice_index[first],
        label=exam_scores(predictions.label, index, len(exams)).astype(np.int32),
        probabilities=np.stack([1 - positive, positive], axis=-1),
    )
