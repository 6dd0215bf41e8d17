"""The probes of `ctssl_jax.probe`: labels of other tasks and reconstruction, read out of a frozen
encoder."""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import threadpoolctl

from ctssl_jax.data.batches import evaluation_batches
from ctssl_jax.data.slices import NeighbourSource, open_source
from ctssl_jax.evaluation.measured_run import (
    MeasuredRun,
    check_request,
    header,
    notes,
    summaries,
    write_volumes,
)
from ctssl_jax.ops.images import SSIM_WINDOW
from ctssl_jax.probes.encoders import FrozenEncoder, check_encoder, num_features, open_encoder
from ctssl_jax.probes.image_probe import (
    IMAGES,
    MASK_FRACTION,
    NOISE_FRACTION,
    fit_images,
    image_features,
    score_images,
)
from ctssl_jax.probes.label_probe import (
    LABELS,
    fit_logistic,
    fit_neighbours,
    label_features,
    labels_of,
)
from ctssl_jax.runs.run import Run
from ctssl_jax.stats.volumes import auroc_one_vs_rest
from data_prep.system.errors import InputError
from data_prep.system.files import make_folder, write_json

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
) -> dict[str, Any]:
    """Probe the encoder of a run and write RESULT.json and RESULT.csv; prints a line a stage.

    Args:
      workdir: run directory, of any task.
      dataset: dataset directory; None takes the training's.
      output: path of RESULT.json; its folder is made.
      checkpoint: `best`, `last` or a step; the controls read none.
      encoder: `run`, or one of the controls `untrained` and `pixels`.
      split: `test` or `validation`, which also chooses the probes' settings.
      max_slices: training slices at most, and validation slices to choose by, spread evenly over
        their splits. The training slices are held in memory (4,096 of 512 x 512: 1 GiB a channel).
      batch_size: slices at a time; 0 takes the training's.

    Returns:
      The contents of RESULT.json.

    Raises:
      InputError: no such run or checkpoint, data prepared otherwise than the run's, or too few
        slices.
    """
    # ---- Can the request work? ----
    output = Path(output)
    check_encoder(encoder)
    if split not in ("test", "validation"):
        raise InputError(
            f"--split={split}: choose test or validation; the probes are fitted to train"
        )
    if max_slices < LEAST_TRAINING_SLICES:
        raise InputError(f"--max_slices={max_slices}: must be {LEAST_TRAINING_SLICES} or more")
    check_request(output, batch_size)
    measured = MeasuredRun.open(Run.open(workdir), dataset, ("train", "validation", split))
    config = measured.config
    step = measured.run.choose_step(checkpoint) if encoder == "run" else None
    if config.image_size < SSIM_WINDOW:
        raise InputError(
            f"--dataset={config.dataset}: SSIM needs images of {SSIM_WINDOW} pixels or more"
        )
    sources: dict[tuple[str, tuple[int, ...]], NeighbourSource] = {
        (name, offsets): _open(measured, name, offsets, 0 if name == split else max_slices)
        for offsets in ((0,), (0, 1))
        for name in ("train", "validation", split)
    }
    _check_sources(sources, split)
    make_folder(output.parent, "--output")

    # ---- The encoder ----
    batch_size = batch_size or config.batch_size // config.microbatches
    frozen, origin = open_encoder(encoder, measured, step, sources["train", (0,)], batch_size)
    print(
        f"encoder        {config.recipe} ({origin}) on {jax.local_devices()[0].device_kind}",
        flush=True,
    )

    # ---- The probes, one target after the other ----
    volumes = sources[split, (0,)].volumes
    by_volume, chosen = {}, {}
    for name in (*LABELS, *IMAGES):
        started = time.monotonic()
        measure = _label_values if name in LABELS else _image_values
        offsets = (0,) if name in LABELS else IMAGES[name].offsets
        train, validation, tested = (
            evaluation_batches(sources[part, offsets], batch_size)
            for part in ("train", "validation", split)
        )
        # same sums on any number of cores; on busy ones twenty times faster
        with threadpoolctl.threadpool_limits(1):
            values, settings = measure(frozen, name, train, validation, tested, volumes)
        by_volume |= {f"{name}/{score}": value for score, value in values.items()}
        chosen |= {f"{name}/{probe}": setting for probe, setting in settings.items()}
        print(f"{name:15}{time.monotonic() - started:.1f} s", flush=True)

    # ---- Files ----
    patient_ids = [volume["patient_id"] for volume in volumes]
    result = {
        "kind": "probe",
        **header(
            measured,
            split,
            patient_ids,
            step,
            device=jax.local_devices()[0].device_kind,
            packages=("jax", "flax", "numpy", "scikit-learn"),
        ),
        "encoder": encoder,
        "metrics": summaries(by_volume, patient_ids),
        "chosen": chosen,
        "num_features": num_features(frozen, config.image_size),
        "corruptions": {
            "mask_fraction_of_area": MASK_FRACTION,
            "noise_fraction": NOISE_FRACTION,
            "slice_gap": IMAGES["next_slice"].offsets[1],
        },
        "num_train_slices": len(sources["train", (0,)]),
        "num_train_pairs": len(sources["train", (0, 1)]),
        "num_slices": len(sources[split, (0,)]),
        "num_pairs": len(sources[split, (0, 1)]),
    }
    write_volumes(output.with_suffix(".csv"), volumes, by_volume)
    write_json(output, result)  # last: with it the probe is complete
    return result


def table(result: dict) -> str:
    """The results as lines for the screen: a line a target and probe, means over volumes."""
    step = "" if result["checkpoint_step"] is None else f", step {result['checkpoint_step']:,}"
    lines = [
        f"{result['recipe']}, encoder: {result['encoder']}{step}, {result['split']} split: "
        f"{result['num_slices']:,} slices, probes fitted to "
        f"{result['num_train_slices']:,}{'  SYNTHETIC DATA' if result['synthetic'] else ''}"
    ]
    rows: dict[str, list[str]] = {}
    for name, value in result["metrics"].items():
        target, probe, score = name.split("/")
        rows.setdefault(f"{target:15}{probe:8}", []).append(f"{score} {value['mean']:.4f}")
    lines += [
        row + "".join(f"{score:20}" for score in scores).rstrip() for row, scores in rows.items()
    ]
    return "\n".join([*lines, *notes(result)])


def _open(
    measured: MeasuredRun, split: str, offsets: tuple[int, ...], limit: int
) -> NeighbourSource:
    """A split, or at most so many of its items, spread evenly (0: all)."""
    source = open_source(measured.dataset, split, measured.channels, offsets)
    if 0 < limit < len(source):
        source.table = source.table[np.linspace(0, len(source) - 1, limit).astype(int)]
    return source


def _check_sources(sources: dict, split: str) -> None:
    """Refuse, before any work, slices too few to fit, to choose or to score. All labels are known
    beforehand."""
    for offsets, items in (((0,), "slices"), ((0, 1), "pairs of neighbouring slices")):
        if len(sources["train", offsets]) < LEAST_TRAINING_SLICES:
            raise InputError(
                f"{len(sources['train', offsets])} training {items} are too few for probes, which "
                f"need "
                f"{LEAST_TRAINING_SLICES}; give a --dataset of more scans"
            )
    for name, target in LABELS.items():
        train, validation, scored = (
            labels_of(sources[part, (0,)].table[:, 0].astype(np.int32), target.num_classes)
            for part in ("train", "validation", split)
        )
        chosen = _slices_of_volumes(sources[split, (0,)].volumes, sources[split, (0,)].table[:, 0])
        if len(set(train)) < target.num_classes or len(set(validation)) < 2:
            raise InputError(
                f"the training and validation slices are too few: not every {name} occurs; give a "
                f"larger --max_slices "
                "or a --dataset of more scans"
            )
        if all(len(set(scored[of_volume])) < 2 for of_volume in chosen):
            raise InputError(
                f"the volumes of the {split} split have too few slices for an AUROC of {name} "
                f"each; prepare the "
                "--dataset again with a larger --min_slices"
            )


def _slices_of_volumes(volumes: list[dict], record_index) -> list:
    """Which of the records [N] belong to each volume: a list of [N] bool."""
    firsts = [volume["first_record"] for volume in volumes]
    return [
        (record_index >= first) & (record_index < first + volume["num_slices"])
        for first, volume in zip(firsts, volumes, strict=True)
    ]


def _label_values(
    frozen: FrozenEncoder, name: str, train, validation, test, volumes: list[dict]
) -> tuple[dict, dict]:
    """Fit both probes of a label and score them: `linear/auroc`, ... -> [V], NaN where undefined;
    chosen settings."""
    target = LABELS[name]
    train, validation, test = (
        label_features(frozen, target, batches) for batches in (train, validation, test)
    )
    fitted = {
        "linear": fit_logistic(train, validation),
        "knn": fit_neighbours(train, validation),
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


def _image_values(
    frozen: FrozenEncoder, name: str, train, validation, test, volumes: list[dict]
) -> tuple[dict, dict]:
    """The same for an image: `linear/mse`, ... -> [V], NaN for a volume without a pair of
    neighbours."""
    train, validation, test = (
        image_features(frozen, IMAGES[name], batches) for batches in (train, validation, test)
    )
    probes = fit_images(train, validation)
    scores, record_index = score_images(probes, test)
    chosen = _slices_of_volumes(volumes, record_index)
    values = {
        score: np.array(
            [value[inside].mean(dtype=float) if inside.any() else np.nan for inside in chosen]
        )
        for score, value in scores.items()
    }
    return values, {"linear": {"penalty": probes.penalty}, "knn": {"neighbours": probes.number}}
