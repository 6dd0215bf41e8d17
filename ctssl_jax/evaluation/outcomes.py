"""How good the predictions of a downstream task are: of labels over slices, exams and groups of
patients; of masks over slices, volumes and patients.

Functions of `predictions.Predictions`, of nothing else; each measure with its 95 % bootstrap
interval by patient.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctssl_jax.evaluation.predictions import Predictions
from ctssl_jax.ops.overlap import add_up, dice, iou
from ctssl_jax.stats.binary import binary_summary, exam_scores, multiclass_summary, youden_threshold
from ctssl_jax.stats.subgroups import age_band, performance_by_group
from ctssl_jax.stats.volumes import overlap_summary
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
      predictions: of the evaluated split.
      validation: of the validation split, which fixes the thresholds of sensitivity and specificity
        (largest Youden index); None, or a split with one class only, leaves these two out.
      classes: names of the label's K classes.
      exam_of_volume: exam of each volume if the label is one of slices; None if it is one of
        volumes or patients, whose predictions are averaged over the slices of a volume.

    Returns:
      measures as `bootstrap.summaries`: of two classes those of `stats.binary.MEASURES` and, of
      slices, the same of exams as `exam_auroc`, ... (an exam's score is its highest slice's); of
      more classes those of `stats.binary.multiclass_statistic`. And the thresholds {"slice" or
      "volume": p or None, "exam": p or None}, empty for more than two classes.
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
    thresholds = {"slice" if of_slices else "volume": _threshold(of_validation)}
    (threshold,) = thresholds.values()
    found = binary_summary(
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
        found |= {
            f"exam_{name}": {**summary, "unit": f"exams: {summary['unit']}"}
            for name, summary in of_exams.items()
        }
    return found, thresholds


def by_group(predictions: Predictions, volumes: Sequence[Mapping[str, Any]]) -> dict[str, dict]:
    """AUROC over slices within groups of patients and the largest gap between groups, by sex, age
    and ethnic group.

    Args:
      predictions: of a label of two classes.
      volumes: rows of `volumes.csv` of the predictions' split.

    Returns:
      attribute -> as `subgroups.performance_by_group`, or {"not_measured": why}.
    """
    facts = {volume["volume_id"]: volume for volume in volumes}
    found = {}
    for name in GROUPS:
        values = [facts[volume_id][name] for volume_id in predictions.volume_id]
        groups = (
            [age_band(value if value != "" else None) for value in values]
            if name == "age"
            else values
        )
        groups = ["" if group is None else group for group in groups]
        try:
            found[name] = performance_by_group(
                predictions.label, predictions.probabilities[:, 1], predictions.patient_id, groups
            )
        except InputError as error:
            found[name] = {"not_measured": str(error)}
    return found


def mask_metrics(predictions: Predictions) -> dict[str, dict]:
    """Dice and IoU of masks at probability .5.

    Args:
      predictions: with pixel counts.

    Returns:
      As `bootstrap.summaries`: `dice` and `iou` of the slices whose true mask is not empty (the
      first ones to look at); `dice_all_slices`, `iou_all_slices` (both empty counts 1, exactly one
      empty 0); `volume_dice`, `volume_iou`, `patient_dice`, `patient_iou` of the voxels of a volume
      or patient together.

    Raises:
      InputError: no slice has a mask.
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
    found = {name: of_annotated[f"{name}/slice"] for name in ("dice", "iou")}
    found |= {f"{name}_all_slices": of_all[f"{name}/slice"] for name in ("dice", "iou")}
    levels = ("volume", "patient")
    return found | {
        f"{level}_{name}": of_all[f"{name}/{level}"] for level in levels for name in ("dice", "iou")
    }


def masks_of_volumes(
    predictions: Predictions, volume_index: np.ndarray, num_volumes: int
) -> dict[str, np.ndarray]:
    """Dice and IoU of the voxels of each volume, [num_volumes] float64; `volume_index` [N] int
    names the slices'."""
    counts = (predictions.intersection_px, predictions.predicted_px, predictions.target_px)
    sums = add_up(*counts, volume_index, num_volumes)
    return {"volume_dice": dice(*sums), "volume_iou": iou(*sums)}


def _threshold(validation: Predictions | None) -> float | None:
    if validation is None or len(np.unique(validation.label)) < 2:
        return None
    return youden_threshold(validation.label, validation.probabilities[:, 1])


def _mean_over_volumes(predictions: Predictions) -> Predictions:
    """One item a volume; its slices have one label."""
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
