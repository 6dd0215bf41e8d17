"""A trained model measured on a split of a dataset: the core of `ctssl_jax.evaluate`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ctssl_jax.data.batches import evaluation_batches, picture_batch
from ctssl_jax.data.labels import label_classes
from ctssl_jax.data.slices import NeighbourSource, open_source
from ctssl_jax.evaluation import outcomes, predictions
from ctssl_jax.evaluation.measured_run import (
    MeasuredRun,
    check_request,
    header,
    notes,
    summaries,
    write_volumes,
)
from ctssl_jax.evaluation.predictions import Predictions
from ctssl_jax.models.quantizer import codebook_use
from ctssl_jax.ops.images import to_unit_images
from ctssl_jax.ops.trees import fingerprint, flatten
from ctssl_jax.parallel.mesh import make_mesh, replicated
from ctssl_jax.runs.run import Run, portable
from ctssl_jax.runs.strips import save_arrays, save_strip
from ctssl_jax.stats.volumes import auroc_one_vs_rest, volume_means
from ctssl_jax.tasks.interface import Task
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training.health import embedding_use, warnings
from ctssl_jax.training.scoring import SplitScores, evaluate_split, make_scorer, render_pictures
from ctssl_jax.training.state import TrainState, define, evaluation_keys, restore_model
from data_prep.system.errors import DatasetError, InputError
from data_prep.system.files import make_folder, write_json

RELEASE_BATCH_SIZE = 16
MEAN_IMAGE_SLICES = 1024


def evaluate(
    workdir: str | Path,
    dataset: str | Path | None,
    split: str,
    output: str | Path,
    *,
    checkpoint: str = "best",
    batch_size: int = 0,
    baselines: bool = False,
) -> dict[str, Any]:
    """Evaluate a run and write RESULT.json, RESULT.csv, RESULT.png and RESULT.npz.

    Args:
      workdir: run directory.
      dataset: dataset directory; None takes the training's.
      split: `train`, `validation` or `test`.
      output: path of RESULT.json; its folder is made.
      checkpoint: `best`, `last` or a step.
      batch_size: slices at a time, rounded up to a multiple of the devices; 0 takes the training's.
      baselines: also score the mean training slice and the copied input as predictions.

    Returns:
      The contents of RESULT.json.

    Raises:
      InputError: no such run or checkpoint, or data prepared otherwise than the run's.
    """
    # ---- Can the request work? ----
    output = Path(output)
    check_request(output, batch_size)
    measured = MeasuredRun.open(
        Run.open(workdir), dataset, (split, "train") if baselines else (split,)
    )
    config = measured.config
    step = measured.run.choose_step(checkpoint)
    task = get_task(config.task)
    targets = task.targets(config)

    def open_split(name: str) -> NeighbourSource:
        return open_source(measured.dataset, name, measured.channels, task.offsets(config), targets)

    source = open_split(split)
    make_folder(output.parent, "--output")

    # ---- The model ----
    num_devices = jax.device_count()
    batch_size = batch_size or config.batch_size // config.microbatches
    batch_size = -(-batch_size // num_devices) * num_devices
    mesh = make_mesh()
    scorer = make_scorer(define(config, task, len(measured.channels), mesh))
    _, model = restore_model(measured.run.workdir, step, config, task, replicated(mesh))
    state = TrainState(step=(), optimizer=(), sums={}, nonfinite_step=(), **model)

    def score(source: NeighbourSource) -> SplitScores:
        scores = evaluate_split(scorer, state, evaluation_batches(source, batch_size))
        assert scores is not None  # `open_source` refuses a split without slices
        return scores

    # ---- Scores: slices, then volumes, then the split ----
    slices = score(source)
    volumes, volume_index = _volumes_of_records(source.volumes, slices.record_index)
    patient_ids = [volume["patient_id"] for volume in volumes]
    by_volume = _volume_values(slices.scores, task, volume_index, len(volumes))
    if slices.classes is not None and not targets.label:
        by_volume["auroc"] = _volume_aurocs(
            **slices.classes, volume_index=volume_index, num_volumes=len(volumes)
        )
    predicted: Predictions | None = None
    downstream_metrics, downstream = {}, {}
    if targets.mask:
        predicted = _predictions(source, slices)
        by_volume |= outcomes.masks_of_volumes(predicted, volume_index, len(volumes))
        downstream_metrics = outcomes.mask_metrics(predicted)
    elif targets.label:
        predicted = _predictions(source, slices)
        downstream_metrics, downstream = _measure_label(
            measured, targets.label, predicted, volumes, open_split, score
        )
    over_volumes = {
        name: values for name, values in by_volume.items() if name not in downstream_metrics
    }
    embedding, codebook = embedding_use(slices.embedding_moments), codebook_use(slices.code_counts)
    result = {
        **header(
            measured,
            split,
            patient_ids,
            step,
            device=f"{num_devices} x {jax.devices()[0].device_kind}",
            packages=("jax", "flax", "optax", "numpy"),
        ),
        "metrics": summaries(over_volumes, patient_ids) | downstream_metrics,
        **downstream,
        "num_slices": len(slices.record_index),
        "model_fingerprint": fingerprint(flatten(model)),
        **measured.run.training_data,
        "config": portable(config),
        "preparation": {
            name: measured.dataset.preparation[name]
            for name in ("archive", "windows", "image_size", "options")
        },
        "embedding": embedding,
        "warnings": warnings(embedding | codebook),
    }
    if slices.code_counts is not None:
        result["codebook"] = {**codebook, "num_codes": len(slices.code_counts)}
    if slices.classes is not None:
        result["confusion"] = _confusion(**slices.classes)
    if baselines:
        scores = _baseline_scores(config, task, source, open_split("train"), batch_size)
        result["baselines"] = {
            name: summaries(_volume_values(values, task, volume_index, len(volumes)), patient_ids)
            for name, values in scores.items()
        }

    # ---- Files ----
    write_volumes(output.with_suffix(".csv"), volumes, by_volume)
    if predicted is not None:
        predictions.write(output, predicted)
    number = min(config.num_pictures, batch_size)
    shown = render_pictures(scorer, state, picture_batch(source, batch_size, number), number)
    save_arrays(output.with_suffix(".npz"), shown)
    save_strip(output.with_suffix(".png"), shown, "SYNTHETIC" if result["synthetic"] else "")
    write_json(output, result)  # last: with it the evaluation is complete
    return result


def _volume_values(
    scores: dict[str, np.ndarray], task: Task, volume_index: np.ndarray, num_volumes: int
) -> dict[str, np.ndarray]:
    """Means over the slices of each volume, of the scores that the task reports: [num_volumes]
    float64 each."""
    values = {name: volume_means(scores[name], volume_index, num_volumes) for name in task.reported}
    if "masked_mse" in values:
        values["masked_mse_batch_sum"] = RELEASE_BATCH_SIZE * values["masked_mse"]
    return values


def _measure_label(
    measured: MeasuredRun,
    label: str,
    predicted: Predictions,
    volumes: list[dict],
    open_split: Callable[[str], NeighbourSource],
    score: Callable[[NeighbourSource], SplitScores],
) -> tuple[dict[str, dict], dict[str, Any]]:
    """Measures of a label, and further fields of the result.

    The validation split fixes the thresholds of a label with two classes, where the dataset has one
    with this label.
    """
    classes, level = label_classes(measured.dataset, label)
    fields: dict[str, Any] = {"label": label, "classes": list(classes)}
    validation = None
    if len(classes) == 2:
        try:
            source = open_split("validation")
            validation = _predictions(source, score(source))
        except DatasetError:
            raise
        except InputError:
            pass
    exams = {volume["volume_id"]: volume["exam_id"] for volume in measured.dataset.volumes()}
    metrics, thresholds = outcomes.label_metrics(
        predicted, validation, classes, exams if level == "slice" else None
    )
    if len(classes) == 2:
        fields |= {"thresholds": thresholds, "by_group": outcomes.by_group(predicted, volumes)}
    return metrics, fields


def table(result: dict) -> str:
    """The results as lines for the screen."""
    data = "  SYNTHETIC DATA" if result["synthetic"] else ""
    lines = [
        f"{result['recipe']}, step {result['checkpoint_step']:,}, {result['split']} split: "
        f"{result['num_slices']:,} "
        f"slices{data}",
        f"{'':34}{'mean':>9} {'sd':>9}   95 % interval       volumes patients",
    ]
    rows = {"model": result["metrics"], **result.get("baselines", {})}
    for predictor, metrics in rows.items():
        for name, value in metrics.items():
            sd = "-" if value["sd"] is None else f"{value['sd']:.5f}"
            interval = (
                "-"
                if value["ci95"] is None
                else f"{value['ci95'][0]:.5f} to {value['ci95'][1]:.5f}"
            )
            mean = "undefined" if value["mean"] is None else f"{value['mean']:.5f}"
            lines.append(
                f"{predictor + ' ' + name:34}{mean:>9} {sd:>9}   {interval:20} "
                f"{value['num_volumes']:6} "
                f"{value['num_patients']:8}"
            )
    if "codebook" in result:
        codebook = result["codebook"]
        lines.append(
            f"codes used {codebook['used_codes']} of {codebook['num_codes']}, perplexity "
            f"{codebook['perplexity']:.1f}"
        )
    for name, groups in result.get("by_group", {}).items():
        lines.append(_group_line(name, groups))
    embedding = result["embedding"]
    lines.append(
        f"embeddings spread over {embedding['effective_rank']:.1f} of "
        f"{embedding['embedding_dim']} directions"
    )
    lines += [f"WARNING: {warning}" for warning in result["warnings"]]
    if "confusion" in result:
        counts = "; ".join(" ".join(map(str, row)) for row in result["confusion"])
        lines.append(f"slices by true class (rows) and predicted class: {counts}")
    # by the validation loss after few steps, the untrained model may be the best
    if result["checkpoint_step"] == 0:
        lines.append(
            "NOTE: step 0 is the model before training, nothing was learned; --checkpoint=last "
            "takes the last"
        )
    return "\n".join([*lines, *notes(result)])


def _group_line(name: str, groups: dict) -> str:
    if "not_measured" in groups:
        return f"AUROC by {name}: {groups['not_measured']}"
    values = ", ".join(f"{group} {value['mean']:.3f}" for group, value in groups["groups"].items())
    gap = groups["gap"]
    if gap is None or gap["mean"] is None:
        return f"AUROC by {name}: {values}"
    interval = "" if gap["ci95"] is None else f" ({gap['ci95'][0]:.3f} to {gap['ci95'][1]:.3f})"
    return f"AUROC by {name}: {values}; gap {gap['mean']:.3f}{interval}"


def _predictions(source: NeighbourSource, slices: SplitScores) -> Predictions:
    """What the model said of each slice."""
    volumes, index = _volumes_of_records(source.volumes, slices.record_index)
    first = np.array([volume["first_record"] for volume in volumes])
    counts = {
        name: np.asarray(slices.scores[name])
        for name in Predictions._fields
        if name in slices.scores
    }
    return Predictions(
        patient_id=np.array([volume["patient_id"] for volume in volumes])[index],
        volume_id=np.array([volume["volume_id"] for volume in volumes])[index],
        slice_index=(slices.record_index - first[index]).astype(np.int32),
        **(slices.classes or {}),
        **counts,
    )


def _volumes_of_records(volumes: list[dict], record_index):
    """The volumes that the records [N] belong to, and the place of each record's volume among them,
    [N] int.

    A volume that is nothing but gaps has no pair of neighbours, and so no record here.
    """
    first = np.array([volume["first_record"] for volume in volumes])
    order = np.argsort(first)
    occurring, place = np.unique(
        order[np.searchsorted(first[order], record_index, side="right") - 1], return_inverse=True
    )
    return [volumes[index] for index in occurring], place


def _volume_aurocs(label, probabilities, *, volume_index, num_volumes: int):
    """One-vs-rest AUROC of each volume's slices, NaN where all slices have one label: [num_volumes]
    float64."""
    of_volume = [volume_index == index for index in range(num_volumes)]
    return np.array(
        [auroc_one_vs_rest(probabilities[chosen], label[chosen]) for chosen in of_volume]
    )


def _confusion(label, probabilities) -> list[list[int]]:
    """Number of slices by true class (rows) and most probable class."""
    num_classes = probabilities.shape[1]
    counts = np.zeros((num_classes, num_classes), int)
    np.add.at(counts, (label, probabilities.argmax(axis=1)), 1)
    return counts.tolist()


def _baseline_scores(config, task, source, train_source, batch_size: int) -> dict[str, dict]:
    """Per-slice scores of the task's baselines, in record order: baseline -> score -> [N]."""
    chosen = np.linspace(
        0, len(train_source) - 1, min(MEAN_IMAGE_SLICES, len(train_source))
    ).astype(int)
    total = 0.0
    for item in chosen:
        images = train_source[int(item)]["images"]
        total = total + to_unit_images(images, config.model.in_channels, config.normalize)[0]
    mean_image = total / len(chosen)

    @jax.jit
    def score(batch):
        return task.baselines(batch, evaluation_keys(batch["record_index"]), mean_image, config)

    batches = []
    for batch in evaluation_batches(source, batch_size):
        scores = jax.device_get(score(batch))
        batches.append(jax.tree.map(lambda values, kept=batch["weight"] > 0: values[kept], scores))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
