r"""Measure a trained model on a split of a dataset.

    python -m ctssl_jax.evaluate --workdir=RUN --dataset=DATASET --split=test --output=RESULT.json

Every slice is scored, the slices of a volume are averaged, and the results are mean and standard deviation over
volumes with a 95 % bootstrap interval by patient. Beside RESULT.json stand RESULT.csv (one row a volume), RESULT.png
(input, target, prediction and difference of slices spread over the split) and RESULT.npz (these pictures as arrays).

Of a label or a mask the results are those of `ctssl_jax.outcomes`: AUROC, average precision, calibration, sensitivity
and specificity at a threshold that the validation split fixes, the same of exams, and AUROC by group of patients; Dice
and IoU of slices, volumes and patients. RESULT.predictions.npz holds what the model said of each slice, so that runs
can be compared in pairs.
"""

import functools
from pathlib import Path

from absl import flags

from ctssl_jax.measurement import notes
from ctssl_jax.parallel.processes import configure_jax
from data_prep.system import command_line
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
) -> dict:
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
    import jax

    from ctssl_jax import checkpoint as checkpoint_files
    from ctssl_jax import configuration, data, distributed, health, measurement, outcomes, pictures, training
    from ctssl_jax import predictions as prediction_files
    from ctssl_jax.data__batches import evaluation_batches, picture_batch
    from ctssl_jax.data__labels import label_classes
    from ctssl_jax.models.quantizer import codebook_use
    from ctssl_jax.stats.volumes import volume_means
    from ctssl_jax.tasks import get_task
    from data_prep.dataset import Dataset

    # ---- What is asked for, and can it work? ----
    workdir, output = Path(workdir), Path(output)
    measurement.check_request(output, batch_size)
    run = measurement.open_run(workdir, dataset, (split, "train") if baselines else (split,))
    config, preparation, channels = run.config, run.preparation, run.channels
    step = checkpoint_files.choose_step(workdir, checkpoint)
    task = get_task(config.task)
    targets = task.targets(config)
    source = data.open_source(Dataset.open(config.dataset), split, channels, task.offsets(config), targets)
    make_folder(output.parent, "--output")

    # ---- The model ----
    num_devices = jax.device_count()
    batch_size = batch_size or config.batch_size // config.microbatches
    batch_size = -(-batch_size // num_devices) * num_devices
    mesh = distributed.make_mesh()
    program = training.make_program(config, task, len(channels), mesh)
    _, model = training.restore_model(workdir, step, config, task, distributed.replicated(mesh))
    state = training.TrainState(step=(), optimizer=(), sums={}, nonfinite_step=(), **model)

    # ---- Scores: slices, then volumes, then the split ----
    slices = training.evaluate_split(program, state, evaluation_batches(source, batch_size))
    volumes, volume_index = _volumes_of_records(source.volumes, slices.record_index)
    patient_ids = [volume["patient_id"] for volume in volumes]

    def volume_values(scores: dict) -> dict:
        values = {name: volume_means(scores[name], volume_index, len(volumes)) for name in task.reported}
        if "masked_mse" in values:
            values["masked_mse_batch_sum"] = RELEASE_BATCH_SIZE * values["masked_mse"]
        return values

    by_volume = volume_values(slices.scores)
    if slices.classes is not None and not targets.label:
        by_volume["auroc"] = _volume_aurocs(**slices.classes, volume_index=volume_index, num_volumes=len(volumes))
    predicted = _predictions(source, slices) if targets.label or targets.mask else None
    of_masks = outcomes.mask_metrics(predicted) if targets.mask else {}
    if targets.mask:
        by_volume |= outcomes.masks_of_volumes(predicted, volume_index, len(volumes))
    over_volumes = {name: values for name, values in by_volume.items() if name not in of_masks}
    measured, downstream = measurement.summaries(over_volumes, patient_ids) | of_masks, {}
    if targets.label:
        classes, level = label_classes(Dataset.open(config.dataset), targets.label)
        validation = None
        if len(classes) == 2:
            validation = _validation_predictions(program, state, config, task, channels, batch_size)
        exams = {volume["volume_id"]: volume["exam_id"] for volume in Dataset.open(config.dataset).volumes()}
        found, thresholds = outcomes.label_metrics(predicted, validation, classes, exams if level == "slice" else None)
        measured |= found
        downstream = {"label": targets.label, "classes": list(classes)}
        if len(classes) == 2:
            downstream |= {"thresholds": thresholds, "by_group": outcomes.by_group(predicted, volumes)}
    embedding = health.embedding_use(slices.embedding_moments)
    result = {
        **measurement.header(
            run,
            split,
            patient_ids,
            step,
            device=f"{num_devices} x {jax.devices()[0].device_kind}",
            packages=("jax", "flax", "optax", "numpy"),
        ),
        "metrics": measured,
        **downstream,
        "num_slices": len(slices.record_index),
        "model_fingerprint": checkpoint_files.fingerprint(checkpoint_files.flatten(model)),
        **measurement.training_data(workdir),
        "config": configuration.to_json(config),
        "preparation": {name: preparation[name] for name in ("archive", "windows", "image_size", "options")},
    }
    for name in ("dataset", "init_from", "init_weights"):  # paths of this machine
        result["config"].pop(name, None)
    codebook = codebook_use(slices.code_counts)
    result["embedding"] = embedding
    result["warnings"] = health.warnings(embedding | codebook)
    if codebook:
        result["codebook"] = {**codebook, "num_codes": len(slices.code_counts)}
    if slices.classes is not None:
        result["confusion"] = _confusion(**slices.classes)
    if baselines:
        train_source = data.open_source(Dataset.open(config.dataset), "train", channels, task.offsets(config), targets)
        scores = _baseline_scores(config, task, source, train_source, batch_size)
        result["baselines"] = {
            name: measurement.summaries(volume_values(values), patient_ids) for name, values in scores.items()
        }

    # ---- Files ----
    measurement.write_volumes(output.with_suffix(".csv"), volumes, by_volume)
    if predicted is not None:
        prediction_files.write(output, predicted)
    number = min(config.num_pictures, batch_size)
    shown = training.render_pictures(program, state, picture_batch(source, batch_size, number), number)
    pictures.save_arrays(output.with_suffix(".npz"), shown)
    pictures.save_strip(output.with_suffix(".png"), shown, "SYNTHETIC" if preparation["synthetic"] else "")
    write_json(output, result)  # last: with it the evaluation is complete
    return result


def table(result: dict) -> str:
    """The results as lines for the screen."""
    data = "  SYNTHETIC DATA" if result["synthetic"] else ""
    lines = [
        f"{result['recipe']}, step {result['checkpoint_step']:,}, {result['split']} split: {result['num_slices']:,} "
        f"slices{data}",
        f"{'':34}{'mean':>9} {'sd':>9}   95 % interval       volumes patients",
    ]
    rows = {"model": result["metrics"], **result.get("baselines", {})}
    for predictor, metrics in rows.items():
        for name, value in metrics.items():
            sd = "-" if value["sd"] is None else f"{value['sd']:.5f}"
            interval = "-" if value["ci95"] is None else f"{value['ci95'][0]:.5f} to {value['ci95'][1]:.5f}"
            mean = "undefined" if value["mean"] is None else f"{value['mean']:.5f}"
            lines.append(
                f"{predictor + ' ' + name:34}{mean:>9} {sd:>9}   {interval:20} {value['num_volumes']:6} "
                f"{value['num_patients']:8}"
            )
    if "codebook" in result:
        codebook = result["codebook"]
        lines.append(
            f"codes used {codebook['used_codes']} of {codebook['num_codes']}, perplexity {codebook['perplexity']:.1f}"
        )
    for name, groups in result.get("by_group", {}).items():
        lines.append(_group_line(name, groups))
    embedding = result["embedding"]
    lines.append(f"embeddings spread over {embedding['effective_rank']:.1f} of {embedding['embedding_dim']} directions")
    lines += [f"WARNING: {warning}" for warning in result["warnings"]]
    if "confusion" in result:
        counts = "; ".join(" ".join(map(str, row)) for row in result["confusion"])
        lines.append(f"slices by true class (rows) and predicted class: {counts}")
    if result["checkpoint_step"] == 0:  # by the validation loss after few steps, the untrained model may be the best
        lines.append("NOTE: step 0 is the model before training, nothing was learned; --checkpoint=last takes the last")
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


def _predictions(source, slices):
    """What was said of each slice: `predictions.Predictions`."""
    import numpy as np

    from ctssl_jax.predictions import Predictions

    volumes, index = _volumes_of_records(source.volumes, slices.record_index)
    first = np.array([volume["first_record"] for volume in volumes])
    counts = {name: np.asarray(slices.scores[name]) for name in Predictions._fields if name in slices.scores}
    return Predictions(
        patient_id=np.array([volume["patient_id"] for volume in volumes])[index],
        volume_id=np.array([volume["volume_id"] for volume in volumes])[index],
        slice_index=(slices.record_index - first[index]).astype(np.int32),
        **(slices.classes or {}),
        **counts,
    )


def _validation_predictions(program, state, config, task, channels, batch_size: int):
    """Those of the validation split; None where the dataset has none with this label."""
    from ctssl_jax import data, training
    from ctssl_jax.data__batches import evaluation_batches
    from data_prep.dataset import Dataset

    try:
        source = data.open_source(
            Dataset.open(config.dataset), "validation", channels, task.offsets(config), task.targets(config)
        )
    except DatasetError:
        raise
    except InputError:
        return None
    return _predictions(source, training.evaluate_split(program, state, evaluation_batches(source, batch_size)))


def _volumes_of_records(volumes: list[dict], record_index):
    """The volumes that the records [N] belong to, and the place of each record's volume among them, [N] int.

    A volume that is nothing but gaps has no pair of neighbours, and so no record here.
    """
    import numpy as np

    first = np.array([volume["first_record"] for volume in volumes])
    order = np.argsort(first)
    occurring, place = np.unique(
        order[np.searchsorted(first[order], record_index, side="right") - 1], return_inverse=True
    )
    return [volumes[index] for index in occurring], place


def _volume_aurocs(label, probabilities, *, volume_index, num_volumes: int):
    """One-vs-rest AUROC of each volume's slices, NaN where all slices have one label: [num_volumes] float64."""
    import numpy as np

    from ctssl_jax.stats.volumes import auroc_one_vs_rest

    of_volume = [volume_index == index for index in range(num_volumes)]
    return np.array([auroc_one_vs_rest(probabilities[chosen], label[chosen]) for chosen in of_volume])


def _confusion(label, probabilities) -> list[list[int]]:
    """Number of slices by true class (rows) and most probable class."""
    import numpy as np

    num_classes = probabilities.shape[1]
    counts = np.zeros((num_classes, num_classes), int)
    np.add.at(counts, (label, probabilities.argmax(axis=1)), 1)
    return counts.tolist()


def _baseline_scores(config, task, source, train_source, batch_size: int) -> dict[str, dict]:
    """Per-slice scores of the task's baselines, in record order: baseline -> score -> [N]."""
    import jax
    import numpy as np

    from ctssl_jax.data__batches import evaluation_batches
    from ctssl_jax.ops.images import to_unit_images
    from ctssl_jax.training import evaluation_keys

    chosen = np.linspace(0, len(train_source) - 1, min(MEAN_IMAGE_SLICES, len(train_source))).astype(int)
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


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    text = functools.partial(flags.DEFINE_string, flag_values=given)
    text("workdir", None, "Run directory of ctssl_jax.train.")
    text("dataset", None, "Dataset directory; by default the one that the run was trained on.")
    text("split", "test", "train, validation or test.")
    text("output", None, "Results file, ending in .json.")
    text("checkpoint", "best", "best (by validation loss), last, last_good (undamaged), or a step.")
    flags.DEFINE_integer(
        "batch_size", 0, "Slices at a time; 0 takes the training's. Changes no result.", flag_values=given
    )
    flags.DEFINE_bool(
        "baselines", False, "Also score predictors without a model (reads training slices).", flag_values=given
    )


def start(given: flags.FlagValues) -> bool:
    """Evaluate as the flags ask, in this process."""
    for name in ("workdir", "output"):
        if not given[name].value:
            raise InputError(f"give --{name}")
    configure_jax()
    result = evaluate(
        given.workdir,
        given.dataset,
        given.split,
        given.output,
        checkpoint=given.checkpoint,
        batch_size=given.batch_size,
        baselines=given.baselines,
    )
    print(table(result))
    print(f"written: {given.output} and, beside it, files of that name and other endings", flush=True)
    return True


def main(argv: list[str]) -> int:
    """Command line."""
    start(flags.FLAGS)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
