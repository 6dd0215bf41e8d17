"""The label of one scan: probabilities of its slices, and of the exam as in the evaluation."""

import csv
import json
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from ctssl_jax.data.labels import label_classes
from ctssl_jax.inference.pictures import save_curve
from ctssl_jax.inference.pretrained import PretrainedModel
from ctssl_jax.stats.binary import exam_scores
from data_prep.dataset.reader import Dataset
from data_prep.raw.scans import Scan
from data_prep.system.errors import InputError
from data_prep.system.stores import local_path

TASKS = ("slice_label", "slice_label_se_resnext")


def predict_label(
    model: PretrainedModel,
    scan: Scan,
    probabilities: np.ndarray,
    thresholds: dict[str, float | None],
    output: Path,
    title: str,
) -> dict[str, Any]:
    """Write slices.csv and prediction.png.

    The score of the exam is as in `outcomes.label_metrics`: the highest slice for a label of slices
    with two classes, else the mean over slices.

    Args:
      model: of one of `TASKS`.
      scan: prepared with the windows and the image size of the model.
      probabilities: [S, K] of its slices, `PretrainedModel.outputs`.
      thresholds: from `read_thresholds`, or {}.
      output: folder.
      title: of the picture; the score is added.

    Returns:
      Fields of prediction.json.
    """
    slices = np.arange(len(probabilities))
    if model.config.slices == "middle":  # the run has learned from no other slices
        slices = slices[[scan.volume.chest.middle_slice]]
        probabilities = probabilities[slices]
    classes, level = _classes(model, probabilities.shape[1])
    position_mm = scan.position_mm[slices]
    _write_csv(output / "slices.csv", slices, position_mm, probabilities, classes)

    rule, scores = exam_probabilities(probabilities, level)
    exam = {"rule": rule, "probabilities": dict(zip(classes, scores.tolist(), strict=True))}
    threshold = thresholds.get("exam" if level == "slice" else "volume")
    slice_threshold = thresholds.get("slice")
    if threshold is not None:
        exam |= {"threshold": threshold, "positive": bool(scores[1] >= threshold)}
    if slice_threshold is not None:
        above = int(np.count_nonzero(probabilities[:, 1] >= slice_threshold))
        exam |= {"slice_threshold": slice_threshold, "slices_at_or_above_threshold": above}
    binary = len(classes) == 2
    first = 1 if binary else 0  # of two classes one curve tells both
    shown = probabilities[:, first:]
    top = int(shown.max(axis=1).argmax())
    named = 1 if binary else int(scores.argmax())
    save_curve(
        output / "prediction.png",
        position_mm,
        {f"P({name})": curve for name, curve in zip(classes[first:], shown.T, strict=True)},
        scan.images[slices[top], ..., 0],
        top,
        thresholds={
            name: value
            for name, value in (("exam", threshold), ("slice", slice_threshold))
            if value is not None
        },
        title=f"{title}: {model.config.label}, P({classes[named]}) = {scores[named]:.3f} ({rule})",
    )
    return {
        "label": model.config.label,
        "classes": list(classes),
        "label_level": level,
        "exam": exam,
        "top_slice": {
            "slice_index": int(slices[top]),
            "position_mm": round(float(position_mm[top]), 3),
            "probabilities": dict(zip(classes, probabilities[top].tolist(), strict=True)),
        },
    }


def exam_probabilities(probabilities: np.ndarray, level: str) -> tuple[str, np.ndarray]:
    """The rule in words, and the probabilities of the exam.

    Args:
      probabilities: [N, K] of its slices.
      level: of the label: `slice`, `volume` or `patient`.

    Returns:
      The rule, and [K] float64.
    """
    if level == "slice" and probabilities.shape[1] == 2:
        (positive,) = exam_scores(probabilities[:, 1], np.zeros(len(probabilities), int), 1)
        return "highest slice", np.array([1 - positive, positive])
    return "mean over slices", probabilities.mean(axis=0, dtype=np.float64)


def read_thresholds(
    path: str | Path, config: ml_collections.ConfigDict, fingerprint: str
) -> dict[str, float | None]:
    """The thresholds that an evaluation of these weights fixed on the validation split.

    Args:
      path: RESULT.json of `ctssl_jax.evaluate`.
      config: of the run.
      fingerprint: of the weights.

    Returns:
      `slice` and `exam`, or `volume` -> threshold; None where one class alone occurs.

    Raises:
      InputError: an unreadable file, or a result of another label, of more than two classes, of
        other weights, or without a threshold.
    """
    try:
        result = json.loads(local_path(path, "--evaluation").read_text())
        fits = result["label"] == config.label and bool(result["thresholds"])
        same_weights = result["model_fingerprint"] == fingerprint
    except OSError as error:
        raise InputError(
            f"--evaluation={path} cannot be read ({error.strerror}); give a RESULT.json"
        ) from None
    except (ValueError, TypeError, KeyError):
        fits = False
    if not fits:
        raise InputError(
            f"--evaluation={path} has no thresholds of the label {config.label}; give the "
            "RESULT.json that ctssl_jax.evaluate wrote of this run, of a label with two classes"
        )
    if not same_weights:
        raise InputError(
            f"--evaluation={path} is of other weights (step {result.get('checkpoint_step')}) than "
            "the checkpoint; give the evaluation of this run, and the same --checkpoint"
        )
    if all(threshold is None for threshold in result["thresholds"].values()):
        raise InputError(
            f"--evaluation={path} fixed no threshold: its validation split has one class only; "
            "leave it out"
        )
    return result["thresholds"]


def _write_csv(
    path: Path,
    slices: np.ndarray,
    position_mm: np.ndarray,
    probabilities: np.ndarray,
    classes: tuple[str, ...],
) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["slice_index", "position_mm", *(f"probability_{name}" for name in classes)]
        )
        for index, position, row in zip(slices, position_mm, probabilities, strict=True):
            writer.writerow([int(index), f"{position:.3f}", *(f"{value:.6g}" for value in row)])


def _classes(model: PretrainedModel, number: int) -> tuple[tuple[str, ...], str]:
    """Names of the classes and the level of the label; `class_0`, ... where the dataset that names
    the classes of an attribute is gone."""
    label = model.config.label
    if label in model.preparation["labels"]:
        facts = model.preparation["labels"][label]
        return tuple(facts["classes"]), facts["level"]
    try:  # the classes of an attribute follow from the training patients
        classes, level = label_classes(Dataset.open(model.config.dataset), label)
    except (InputError, OSError):
        classes, level = (), "volume"
    if len(classes) != number:
        classes = [f"class_{k}" for k in range(number)]
    return tuple(classes), level
