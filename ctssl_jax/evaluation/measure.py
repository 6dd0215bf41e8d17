"""A trained model measured on a split of a dataset: the core of `ctssl_jax.evaluate`."""

import dataclasses
import math
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
from ctssl_jax.ops.trees import fingerprint, flatten, with_sharding
from ctssl_jax.parallel import batch_sizes
from ctssl_jax.parallel.mesh import make_mesh, replicated, split_along_batch
from ctssl_jax.runs.run import Run, portable
from ctssl_jax.runs.strips import Legend, save_arrays, save_strip
from ctssl_jax.stats.volumes import volume_aurocs, volume_means, volumes_of_records
from ctssl_jax.tasks.interface import Task
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training import pictures
from ctssl_jax.training.health import embedding_use, warnings
from ctssl_jax.training.scoring import (
    Scorer,
    SplitScores,
    evaluate_split,
    make_scorer,
    render_pictures,
)
from ctssl_jax.training.state import (
    TrainState,
    abstract_batch,
    define,
    evaluation_keys,
    restore_model,
)
from data_prep.system.errors import DatasetError, InputError
from data_prep.system.files import make_folder, write_json
from data_prep.system.stores import local_path

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
      dataset: dataset directory; None takes the dataset of the training.
      split: `train`, `validation` or `test`.
      output: path of RESULT.json; its folder is made.
      checkpoint: `best`, `last`, `last_good` or a step.
      batch_size: slices at a time at most, a multiple of the devices; 0 chooses by memory.
      baselines: also score the mean training slice and the copied input as predictions.

    Returns:
      The contents of RESULT.json.

    Raises:
      InputError: no such run or checkpoint, or data prepared otherwise than the data of the run.
      DatasetError: not a complete dataset.
    """
    # ---- Can the request work? ----
    output = local_path(output, "--output", "choose a folder here")
    check_request(output, batch_size)
    measured = MeasuredRun.open(
        Run.open(workdir), dataset, (split, "train") if baselines else (split,)
    )
    chosen = measured.run.choose_checkpoint(checkpoint)
    task = get_task(measured.config.task)
    targets = task.targets(measured.config)
    source = _open_split(measured, task, split)
    make_folder(output.parent, "--output")

    # ---- Scores: slices, then volumes, then the split ----
    model = _restore(measured, task, chosen.step, batch_size, _most_items(measured, source))
    slices = model.score(source)
    volumes, volume_index = volumes_of_records(source.volumes, slices.record_index)
    by_volume = _volume_values(slices.scores, task, volume_index, len(volumes))
    predicted: Predictions | None = None
    metrics, fields = {}, {}
    if targets.mask:
        predicted = _predictions(source, slices)
        by_volume |= outcomes.masks_of_volumes(predicted, volume_index, len(volumes))
        metrics = outcomes.mask_metrics(predicted)
    elif targets.label:
        predicted = _predictions(source, slices)
        metrics, fields = _measure_label(model, targets.label, predicted, volumes)
    elif slices.classes is not None:
        by_volume["auroc"] = volume_aurocs(
            **slices.classes, volume_index=volume_index, num_volumes=len(volumes)
        )

    # ---- The result ----
    patient_ids = [volume["patient_id"] for volume in volumes]
    over_volumes = {name: values for name, values in by_volume.items() if name not in metrics}
    result = {
        **header(
            measured,
            split,
            patient_ids,
            chosen,
            device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            packages=("jax", "flax", "optax", "numpy"),
        ),
        "metrics": summaries(over_volumes, patient_ids) | metrics,
        **fields,
        **_facts(model, slices),
    }
    if baselines:
        result["baselines"] = {
            name: summaries(_volume_values(scores, task, volume_index, len(volumes)), patient_ids)
            for name, scores in _baseline_scores(model, source).items()
        }

    # ---- Files ----
    write_volumes(output.with_suffix(".csv"), volumes, by_volume)
    if predicted is not None:
        predictions.write(output, predicted)
    shown, legend = model.render(source)
    save_arrays(output.with_suffix(".npz"), shown)
    save_strip(output.with_suffix(".png"), shown, legend)
    write_json(output, result)  # last: with it the evaluation is complete
    return result


def _open_split(measured: MeasuredRun, task: Task, split: str) -> NeighbourSource:
    config = measured.config
    return open_source(
        measured.dataset, split, measured.channels, task.offsets(config), task.targets(config)
    )


@dataclasses.dataclass(frozen=True)
class _Model:
    """A checkpoint that scores the data that it is measured on, `batch_size` slices at a time."""

    measured: MeasuredRun
    task: Task
    scorer: Scorer
    state: TrainState
    batch_size: int

    def score(self, source: NeighbourSource) -> SplitScores:
        """Scores of all slices of a split.

        Raises:
          InputError: a score that is not finite, which would be missing in a mean.
        """
        # neighbours in one batch would be compared with each other
        mixed = np.random.default_rng(0).permutation(len(source))
        items = mixed if self.task.compares_batch else None
        batches = evaluation_batches(source, self.batch_size, items=items)
        with batch_sizes.end_of_memory(self.batch_size):
            scores = evaluate_split(self.scorer, self.state, batches)
        assert scores is not None  # `open_source` refuses a split without slices
        for name, values in (scores.scores | (scores.classes or {})).items():
            finite = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
            if not finite.all():
                raise InputError(
                    f"{name} is not a finite number for {np.count_nonzero(~finite):,} of "
                    f"{len(values):,} slices: the model's weights or the data are damaged; "
                    "evaluate another --checkpoint"
                )
        return scores

    def render(self, source: NeighbourSource) -> tuple[dict[str, np.ndarray], Legend]:
        """Pictures of slices spread over a split, see `render_pictures`, and their legend."""
        number, size = min(self.measured.config.num_pictures, len(source)), self.batch_size
        batch = picture_batch(source, math.ceil(number / size) * size, number)
        with batch_sizes.end_of_memory(size):
            parts = [
                render_pictures(
                    self.scorer,
                    self.state,
                    {name: values[start : start + size] for name, values in batch.items()},
                    number - start,
                )
                for start in range(0, number, size)
            ]
        setting = pictures.setting(
            self.measured.config,
            self.measured.dataset,
            self.measured.channels,
            source,
            batch["record_index"][:number],
        )
        arrays = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
        return setting.complete(arrays), setting.legend


def _restore(measured: MeasuredRun, task: Task, step: int, batch_size: int, number: int) -> _Model:
    """A checkpoint on all devices, for a split of so many slices; batch size 0 chooses."""
    config, mesh = measured.config, make_mesh()
    definition = define(config, task, len(measured.channels), mesh)
    scorer = make_scorer(definition)
    _, model = restore_model(measured.run.workdir, step, config, task, replicated(mesh))
    state = TrainState(step=(), optimizer=(), sums={}, nonfinite_step=(), **model)

    def trace(size: int) -> jax.stages.Traced:  # JAX keeps it for `score_batch`
        batch = with_sharding(split_along_batch(mesh), abstract_batch(definition, size))
        return scorer.score_batch.trace(state, batch)

    size = batch_sizes.choose(
        batch_size, number, config.image_size, list(mesh.devices.flat), trace, model
    )
    if task.compares_batch and size == 1:
        raise InputError(
            f"one slice at a time: the task {config.task} compares the slices of a batch with each "
            "other; give --batch_size=2 or more, and a --split of 2 slices or more"
        )
    return _Model(measured, task, scorer, state, size)


def _most_items(measured: MeasuredRun, source: NeighbourSource) -> int:
    """Slices of the largest split that is scored: the validation split fixes thresholds of labels,
    and a second batch size would be a second program."""
    if not source.targets.label or source.targets.middle_only:
        return len(source)
    splits = measured.dataset.preparation["splits"]
    return max(len(source), splits.get("validation", {}).get("num_slices", 0))


def _volume_values(
    scores: dict[str, np.ndarray], task: Task, volume_index: np.ndarray, num_volumes: int
) -> dict[str, np.ndarray]:
    """Means of the task's reported scores over the slices of each volume: [num_volumes] float64."""
    values = {
        name: volume_means(scores[name], volume_index, num_volumes)
        for name in task.reported
        if name not in task.over_annotated and name in scores
    }
    if "masked_mse" in values:
        values["masked_mse_batch_sum"] = RELEASE_BATCH_SIZE * values["masked_mse"]
    return values


def _facts(model: _Model, slices: SplitScores) -> dict[str, Any]:
    """Fields of the result about the model and its data, beside the scores."""
    measured, state = model.measured, model.state
    tensors = flatten({"params": state.params, "variables": state.variables})
    embedding, codebook = embedding_use(slices.embedding_moments), codebook_use(slices.code_counts)
    facts = {
        "num_slices": len(slices.record_index),
        "model_fingerprint": fingerprint(tensors),
        **measured.run.training_data,
        "config": portable(measured.config),
        "preparation": {
            name: measured.dataset.preparation[name]
            for name in ("archive", "windows", "image_size", "options")
        },
        "embedding": embedding,
        "warnings": warnings(measured.config, embedding | codebook),
    }
    if slices.code_counts is not None:
        facts["codebook"] = {**codebook, "num_codes": len(slices.code_counts)}
    if slices.classes is not None:
        facts["confusion"] = _confusion(**slices.classes)
    return facts


def _measure_label(
    model: _Model, label: str, predicted: Predictions, volumes: list[dict]
) -> tuple[dict[str, dict], dict[str, Any]]:
    """Measures of a label, and further fields of the result.

    The thresholds of a label with two classes come from the validation split; where the dataset
    lacks this split or its labels, the measures that need a threshold are left out.
    """
    dataset = model.measured.dataset
    classes, level = label_classes(dataset, label)
    fields: dict[str, Any] = {"label": label, "classes": list(classes)}
    validation = None
    if len(classes) == 2:
        try:
            source = _open_split(model.measured, model.task, "validation")
        except DatasetError:
            raise
        except InputError:
            pass
        else:
            validation = _predictions(source, model.score(source))
    exams = {volume["volume_id"]: volume["exam_id"] for volume in dataset.volumes()}
    metrics, thresholds = outcomes.label_metrics(
        predicted, validation, classes, exams if level == "slice" else None
    )
    if len(classes) == 2:
        fields |= {
            "thresholds": thresholds,
            "by_group": outcomes.by_group(predicted, volumes, level),
        }
    return metrics, fields


def table(result: dict) -> str:
    """The results as lines for the screen."""
    data = "  SYNTHETIC DATA" if result["synthetic"] else ""
    lines = [
        f"{result['recipe']}, step {result['checkpoint_step']:,}, {result['split']} split: "
        f"{result['num_slices']:,} slices{data}",
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
                f"{value['num_volumes']:6} {value['num_patients']:8}"
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
    missing = [
        item for item, threshold in result.get("thresholds", {}).items() if threshold is None
    ]
    if missing:
        lines.append(
            f"NOTE: no sensitivity and specificity of a {' or '.join(missing)}: the validation "
            "split has no labels of both classes, which would fix the threshold"
        )
    if "confusion" in result:
        counts = "; ".join(" ".join(map(str, row)) for row in result["confusion"])
        lines.append(f"slices by true class (rows) and predicted class: {counts}")
    # Runs of older versions have a checkpoint of step 0.
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
    start = f"AUROC by {name} ({groups.get('items', 'slices')}): {values}"
    gap = groups["gap"]
    if gap is None or gap["mean"] is None:
        return start
    interval = "" if gap["ci95"] is None else f" ({gap['ci95'][0]:.3f} to {gap['ci95'][1]:.3f})"
    return f"{start}; gap {gap['mean']:.3f}{interval}"


def _predictions(source: NeighbourSource, slices: SplitScores) -> Predictions:
    """The predictions of a label or of masks for each slice."""
    volumes, index = volumes_of_records(source.volumes, slices.record_index)
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


def _confusion(label, probabilities) -> list[list[int]]:
    """Number of slices by true class (rows) and most probable class."""
    num_classes = probabilities.shape[1]
    counts = np.zeros((num_classes, num_classes), int)
    np.add.at(counts, (label, probabilities.argmax(axis=1)), 1)
    return counts.tolist()


def _baseline_scores(model: _Model, source: NeighbourSource) -> dict[str, dict[str, np.ndarray]]:
    """Scores [N] of the task's baselines by baseline and score, in record order.

    The mean image is the mean of slices spread over the training split.
    """
    task, config = model.task, model.measured.config
    train_source = _open_split(model.measured, task, "train")
    number = min(MEAN_IMAGE_SLICES, len(train_source))
    items = np.linspace(0, len(train_source) - 1, number).astype(int)
    images = (train_source[int(item)]["images"] for item in items)
    channels, normalize = config.model.in_channels, config.normalize
    mean_image = sum(to_unit_images(image, channels, normalize)[0] for image in images) / number

    @jax.jit
    def score(batch):
        return task.baselines(batch, evaluation_keys(batch["record_index"]), mean_image, config)

    batches = []
    for batch in evaluation_batches(source, model.batch_size):
        scores = jax.device_get(score(batch))
        batches.append(jax.tree.map(lambda values, real=batch["weight"] > 0: values[real], scores))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
