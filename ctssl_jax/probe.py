r"""Measure what a frozen encoder knows beside its own task: labels of other tasks, and reconstruction.

    python -m ctssl_jax.probe --workdir=RUN --dataset=DATASET --output=RESULT.json

The encoder's numbers stay as they are; simple probes are fitted to its features of training slices, their settings are
chosen on the validation split, and all slices of the test split are scored as `ctssl_jax.evaluate` does: per volume,
with a 95 % bootstrap interval by patient. The targets and corruptions are the same for every encoder:

    rotation, flip        which of 4 (3) ways the slice was turned, the same labels as in evaluation
    clean                 the slice itself
    masked_region         the slice, 20 % of whose area is covered
    denoising             the slice, half of whose pixels are salt or pepper
    next_slice            the slice after it, of the same volume and across no gap

    linear                labels: logistic regression on latents averaged over 4 x 4 regions; slices: ridge regression
                          from each latent to the 4 x 4 pixels that it stands for
    knn                   the nearest training slices by cosine of the averaged latents: shares of labels, mean slice

`--encoder=untrained` is the control with the run's architecture and random weights, its batch statistics set from
training slices; `--encoder=pixels` is the control without a network: the slice averaged down to as many numbers for
labels and neighbours, and the mean of each block of 4 x 4 pixels for the linear decoder. Beside RESULT.json stands
RESULT.csv, one row a volume.
"""

import time
from pathlib import Path

from absl import flags

from ctssl_jax.measurement import notes
from ctssl_jax.parallel.processes import configure_jax
from data_prep.system import command_line
from data_prep.system.errors import InputError
from data_prep.system.files import make_folder, write_json

ENCODERS = ("run", "untrained", "pixels")
LEAST_TRAINING_SLICES = 32


def probe(
    workdir: str | Path,
    dataset: str | Path | None,
    output: str | Path,
    *,
    checkpoint: str = "best",
    encoder: str = "run",
    split: str = "test",
    max_slices: int = 4096,
    batch_size: int = 0,
) -> dict:
    """Probe the encoder of a run and write RESULT.json and RESULT.csv; prints a line a stage.

    Args:
      workdir: run directory, of any task.
      dataset: dataset directory; None takes the training's.
      output: path of RESULT.json; its folder is made.
      checkpoint: `best`, `last` or a step; the controls read none.
      encoder: `run`, or one of the controls `untrained` and `pixels`.
      split: `test` or `validation`, which also chooses the probes' settings.
      max_slices: training slices at most, and validation slices to choose by, spread evenly over their splits. The
        training slices are held in memory (4,096 of 512 x 512: 1 GiB a channel).
      batch_size: slices at a time; 0 takes the training's.

    Returns:
      The contents of RESULT.json.

    Raises:
      InputError: no such run or checkpoint, data prepared otherwise than the run's, or too few slices.
    """
    import jax
    import threadpoolctl

    from ctssl_jax import checkpoint as checkpoint_files
    from ctssl_jax import linear_probes, measurement
    from ctssl_jax.data__batches import evaluation_batches, training_batches
    from ctssl_jax.ops.images import SSIM_WINDOW
    from ctssl_jax.tasks import get_task

    # ---- What is asked for, and can it work? ----
    workdir, output = Path(workdir), Path(output)
    if encoder not in ENCODERS:
        raise InputError(f"--encoder={encoder}: choose one of {', '.join(ENCODERS)}")
    if split not in ("test", "validation"):
        raise InputError(f"--split={split}: choose test or validation; the probes are fitted to train")
    if max_slices < LEAST_TRAINING_SLICES:
        raise InputError(f"--max_slices={max_slices}: must be {LEAST_TRAINING_SLICES} or more")
    measurement.check_request(output, batch_size)
    run = measurement.open_run(workdir, dataset, ("train", "validation", split))
    config, channels = run.config, run.channels
    step = checkpoint_files.choose_step(workdir, checkpoint) if encoder == "run" else None
    if config.image_size < SSIM_WINDOW:
        raise InputError(f"--dataset={config.dataset}: SSIM needs images of {SSIM_WINDOW} pixels or more")
    sources = {
        (name, offsets): _open(config.dataset, name, channels, offsets, 0 if name == split else max_slices)
        for offsets in ((0,), (0, 1))
        for name in ("train", "validation", split)
    }
    _check_sources(sources, split)
    make_folder(output.parent, "--output")

    # ---- The encoder ----
    task, batch_size = get_task(config.task), batch_size or config.batch_size // config.microbatches
    if encoder == "run":
        frozen = linear_probes.trained_encoder(config, task, workdir, step)
    elif encoder == "untrained":
        size = min(batch_size, len(sources["train", (0,)]))
        batches = training_batches(sources["train", (0,)], size, config.seed)
        frozen = linear_probes.untrained_encoder(config, task, batches)
    else:
        frozen = linear_probes.pixel_encoder(len(channels), config.model.embedding_dim)
    origin = f"{encoder}, step {step:,}" if encoder == "run" else f"control: {encoder}"
    print(f"encoder        {config.recipe} ({origin}) on {jax.local_devices()[0].device_kind}", flush=True)

    # ---- The probes, one target after the other ----
    volumes = sources[split, (0,)].volumes
    by_volume, chosen = {}, {}
    for name in (*linear_probes.LABELS, *linear_probes.IMAGES):
        started = time.monotonic()
        measure = _label_values if name in linear_probes.LABELS else _image_values
        offsets = (0,) if name in linear_probes.LABELS else linear_probes.IMAGES[name].offsets
        batches = [evaluation_batches(sources[part, offsets], batch_size) for part in ("train", "validation", split)]
        with threadpoolctl.threadpool_limits(1):  # same sums on any number of cores; on busy ones twenty times faster
            values, settings = measure(frozen, name, *batches, volumes)
        by_volume |= {f"{name}/{score}": value for score, value in values.items()}
        chosen |= {f"{name}/{probe}": setting for probe, setting in settings.items()}
        print(f"{name:15}{time.monotonic() - started:.1f} s", flush=True)

    # ---- Files ----
    patient_ids = [volume["patient_id"] for volume in volumes]
    result = {
        "kind": "probe",
        **measurement.header(
            run,
            split,
            patient_ids,
            step,
            device=jax.local_devices()[0].device_kind,
            packages=("jax", "flax", "numpy", "scikit-learn"),
        ),
        "encoder": encoder,
        "metrics": measurement.summaries(by_volume, patient_ids),
        "chosen": chosen,
        "num_features": linear_probes.num_features(frozen, config.image_size),
        "corruptions": {
            "mask_fraction_of_area": linear_probes.MASK_FRACTION,
            "noise_fraction": linear_probes.NOISE_FRACTION,
            "slice_gap": linear_probes.IMAGES["next_slice"].offsets[1],
        },
        "num_train_slices": len(sources["train", (0,)]),
        "num_train_pairs": len(sources["train", (0, 1)]),
        "num_slices": len(sources[split, (0,)]),
        "num_pairs": len(sources[split, (0, 1)]),
    }
    measurement.write_volumes(output.with_suffix(".csv"), volumes, by_volume)
    write_json(output, result)  # last: with it the probe is complete
    return result


def table(result: dict) -> str:
    """The results as lines for the screen: a line a target and probe, means over volumes."""
    step = "" if result["checkpoint_step"] is None else f", step {result['checkpoint_step']:,}"
    lines = [
        f"{result['recipe']}, encoder: {result['encoder']}{step}, {result['split']} split: {result['num_slices']:,} "
        f"slices, probes fitted to {result['num_train_slices']:,}{'  SYNTHETIC DATA' if result['synthetic'] else ''}"
    ]
    rows: dict[str, list[str]] = {}
    for name, value in result["metrics"].items():
        target, probe, score = name.split("/")
        rows.setdefault(f"{target:15}{probe:8}", []).append(f"{score} {value['mean']:.4f}")
    lines += [row + "".join(f"{score:20}" for score in scores).rstrip() for row, scores in rows.items()]
    return "\n".join([*lines, *notes(result)])


def _open(dataset: str, split: str, channels: tuple[int, ...], offsets: tuple[int, ...], most: int):
    """A split, or at most so many of its items, spread evenly (0: all)."""
    import numpy as np

    from ctssl_jax import data
    from data_prep.dataset import Dataset

    source = data.open_source(Dataset.open(dataset), split, channels, offsets)
    if 0 < most < len(source):
        source.table = source.table[np.linspace(0, len(source) - 1, most).astype(int)]
    return source


def _check_sources(sources: dict, split: str) -> None:
    """Refuse, before any work, slices too few to fit, to choose or to score; all labels are known beforehand."""
    import numpy as np

    from ctssl_jax import linear_probes

    for offsets, what in (((0,), "slices"), ((0, 1), "pairs of neighbouring slices")):
        if len(sources["train", offsets]) < LEAST_TRAINING_SLICES:
            raise InputError(
                f"{len(sources['train', offsets])} training {what} are too few for probes, which need "
                f"{LEAST_TRAINING_SLICES}; give a --dataset of more scans"
            )
    for name, target in linear_probes.LABELS.items():
        train, validation, scored = (
            linear_probes.labels_of(sources[part, (0,)].table[:, 0].astype(np.int32), target.num_classes)
            for part in ("train", "validation", split)
        )
        chosen = _slices_of_volumes(sources[split, (0,)].volumes, sources[split, (0,)].table[:, 0])
        if len(set(train)) < target.num_classes or len(set(validation)) < 2:
            raise InputError(
                f"the training and validation slices are too few: not every {name} occurs; give a larger --max_slices "
                "or a --dataset of more scans"
            )
        if all(len(set(scored[of_volume])) < 2 for of_volume in chosen):
            raise InputError(
                f"the volumes of the {split} split have too few slices for an AUROC of {name} each; prepare the "
                "--dataset again with a larger --min_slices"
            )


def _slices_of_volumes(volumes: list[dict], record_index) -> list:
    """Which of the records [N] belong to each volume: a list of [N] bool."""
    firsts = [volume["first_record"] for volume in volumes]
    return [
        (record_index >= first) & (record_index < first + volume["num_slices"])
        for first, volume in zip(firsts, volumes, strict=True)
    ]


def _label_values(frozen, name: str, train, validation, test, volumes: list[dict]) -> tuple[dict, dict]:
    """Fit both probes of a label and score them: `linear/auroc`, ... -> [V], NaN where undefined; chosen settings."""
    import numpy as np

    from ctssl_jax import linear_probes
    from ctssl_jax.stats.volumes import auroc_one_vs_rest

    target = linear_probes.LABELS[name]
    train, validation, test = (
        linear_probes.label_features(frozen, target, batches) for batches in (train, validation, test)
    )
    fitted = {
        "linear": linear_probes.fit_logistic(train, validation),
        "knn": linear_probes.fit_neighbours(train, validation),
    }
    chosen = _slices_of_volumes(volumes, test.record_index)
    values = {}
    for probe, readout in fitted.items():
        probabilities = readout.probabilities(test.pooled)
        right = probabilities.argmax(axis=1) == test.label
        aurocs = [auroc_one_vs_rest(probabilities[inside], test.label[inside]) for inside in chosen]
        values[f"{probe}/auroc"] = np.array(aurocs)
        values[f"{probe}/accuracy"] = np.array([right[inside].mean() for inside in chosen])
    settings = {
        "linear": {"inverse_penalty": fitted["linear"].chosen},
        "knn": {"neighbours": fitted["knn"].chosen},
    }
    return values, settings


def _image_values(frozen, name: str, train, validation, test, volumes: list[dict]) -> tuple[dict, dict]:
    """The same for an image: `linear/mse`, ... -> [V], NaN for a volume without a pair of neighbours."""
    import numpy as np

    from ctssl_jax import linear_probes

    train, validation, test = (
        linear_probes.image_features(frozen, linear_probes.IMAGES[name], batches)
        for batches in (train, validation, test)
    )
    probes = linear_probes.fit_images(train, validation)
    scores, record_index = linear_probes.score_images(probes, test)
    chosen = _slices_of_volumes(volumes, record_index)
    values = {
        score: np.array([value[inside].mean(dtype=float) if inside.any() else np.nan for inside in chosen])
        for score, value in scores.items()
    }
    return values, {"linear": {"penalty": probes.penalty}, "knn": {"neighbours": probes.number}}


def define_flags() -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    flags.DEFINE_string("workdir", None, "Run directory of ctssl_jax.train, of any task.")
    flags.DEFINE_string("dataset", None, "Dataset directory; by default the one that the run was trained on.")
    flags.DEFINE_string("split", "test", "test, or validation, which also chooses the probes' settings.")
    flags.DEFINE_string("output", None, "Results file, ending in .json.")
    flags.DEFINE_string(
        "checkpoint", "best", "best (by validation loss), last, last_good, or a step; the controls read none."
    )
    flags.DEFINE_string("encoder", "run", "run, or a control: untrained (random weights), pixels (no network).")
    flags.DEFINE_integer("max_slices", 4096, "Training slices at most, and validation slices to choose settings by.")
    flags.DEFINE_integer("batch_size", 0, "Slices at a time; 0 takes the training's.")


def main(argv: list[str]) -> int:
    """Command line."""
    for name in ("workdir", "output"):
        if not flags.FLAGS[name].value:
            raise InputError(f"give --{name}")
    configure_jax()
    result = probe(
        flags.FLAGS.workdir,
        flags.FLAGS.dataset,
        flags.FLAGS.output,
        checkpoint=flags.FLAGS.checkpoint,
        encoder=flags.FLAGS.encoder,
        split=flags.FLAGS.split,
        max_slices=flags.FLAGS.max_slices,
        batch_size=flags.FLAGS.batch_size,
    )
    print(table(result))
    print(f"written: {flags.FLAGS.output} and, beside it, .csv")
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
