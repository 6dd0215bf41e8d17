"""The probes of `ctssl_jax.probe`: labels of other tasks, and reconstructions of slices."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl

from ctssl_jax.data.batches import evaluation_batches
from ctssl_jax.data.slices import NeighbourSource, open_source
from ctssl_jax.evaluation.measured_run import MeasuredRun, notes, summaries, write_volumes
from ctssl_jax.ops.images import SSIM_WINDOW
from ctssl_jax.parallel import batch_sizes
from ctssl_jax.probes.encoders import FrozenEncoder, ProbedRun, num_features
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
from ctssl_jax.stats.label_free import PlacedSlices, label_free_scores
from ctssl_jax.stats.volumes import auroc_one_vs_rest, volumes_of_records
from data_prep.system.errors import InputError
from data_prep.system.files import make_folder, write_json
from data_prep.system.stores import local_path

LEAST_TRAINING_SLICES = 32
TARGETS = (*LABELS, *IMAGES)


def probe(
    workdir: str | Path,
    dataset: str | Path | None,
    output: str | Path,
    *,
    checkpoint: str = "best",
    encoder: str = "run",
    split: str = "test",
    targets: Sequence[str] = TARGETS,
    max_slices: int = 4096,
    batch_size: int = 0,
) -> dict[str, Any]:
    """Probe the encoder of a run and write RESULT.json and RESULT.csv; prints a line a target.

    Args:
      workdir: run directory, of any task.
      dataset: dataset directory; None takes the dataset of the training.
      output: path of RESULT.json; its folder is made.
      checkpoint: `best`, `last`, `last_good` or a step; the controls read no checkpoint.
      encoder: name in `ENCODERS`.
      split: `test` or `validation`, which also chooses the settings of the probes.
      targets: names in `TARGETS`; position, order and neighbours are told in any case.
      max_slices: limit of the training slices, and of the validation slices that choose settings;
        they are spread evenly over their splits. The training slices are held in memory (4,096 of
        512 x 512: 1 GiB a channel).
      batch_size: slices at a time at most; 0 chooses by memory.

    Returns:
      The contents of RESULT.json.

    Raises:
      InputError: an unknown run, checkpoint or target, data prepared otherwise than the data of the
        run, or too few slices.
    """
    output = local_path(output, "--output", "choose a folder here")
    splits = ("train", "validation", split)
    if split not in ("test", "validation"):
        raise InputError(
            f"--split={split}: choose test or validation; the probes are fitted to train"
        )
    for name in targets:
        if name not in TARGETS:
            raise InputError(f"--targets={name}: choose among {', '.join(TARGETS)}")
    if max_slices < LEAST_TRAINING_SLICES:
        raise InputError(f"--max_slices={max_slices}: must be {LEAST_TRAINING_SLICES} or more")
    probed = ProbedRun.open(
        workdir,
        dataset,
        output,
        splits,
        encoder=encoder,
        checkpoint=checkpoint,
        batch_size=batch_size,
    )
    image_size = probed.measured.config.image_size
    if image_size < SSIM_WINDOW:
        raise InputError(
            f"--dataset={probed.measured.dataset.name}: SSIM needs images of {SSIM_WINDOW} pixels "
            "or more; prepare it again with a larger --image_size"
        )
    sources: dict[tuple[str, tuple[int, ...]], NeighbourSource] = {
        (name, offsets): _open(probed.measured, name, offsets, 0 if name == split else max_slices)
        for offsets in sorted({(0,)} | {IMAGES[name].offsets for name in targets if name in IMAGES})
        for name in splits
    }
    _check_sources(sources, split, [name for name in LABELS if name in targets])
    make_folder(output.parent, "--output")

    frozen = probed.load_encoder(sources["train", (0,)])
    batch_size = probed.batch_size(frozen, max(map(len, sources.values())))
    volumes = sources[split, (0,)].volumes
    by_volume, chosen = {}, {}
    for name in dict.fromkeys(targets):  # one after the other
        started = time.monotonic()
        measure = _label_values if name in LABELS else _image_values
        offsets = (0,) if name in LABELS else IMAGES[name].offsets
        train, validation, tested = (
            evaluation_batches(sources[part, offsets], batch_size) for part in splits
        )
        # same sums on any number of cores; on busy ones twenty times faster
        with threadpoolctl.threadpool_limits(1), batch_sizes.end_of_memory(batch_size):
            values, settings = measure(frozen, name, train, validation, tested, volumes)
        by_volume |= {f"{name}/{score}": value for score, value in values.items()}
        chosen |= {f"{name}/{probe}": setting for probe, setting in settings.items()}
        print(f"{name:18}{time.monotonic() - started:.1f} s", flush=True)
    started = time.monotonic()
    with threadpoolctl.threadpool_limits(1), batch_sizes.end_of_memory(batch_size):
        placed = [
            placed_slices(frozen, sources[part, (0,)], batch_size)[0] for part in ("train", split)
        ]
        places = label_free_scores(*placed)
        whole = [one._replace(embedding=frozen.whole(one.embedding)) for one in placed]
        places |= {f"whole_{name}": values for name, values in label_free_scores(*whole).items()}
    # scans too short or too few for a score do without it
    by_volume |= {name: values for name, values in places.items() if not np.isnan(values).all()}
    print(f"{'place':18}{time.monotonic() - started:.1f} s", flush=True)

    patient_ids = [volume["patient_id"] for volume in volumes]
    result = {
        "kind": "probe",
        **probed.header(split, patient_ids),
        "metrics": summaries(by_volume, patient_ids),
        "chosen": chosen,
        "num_features": num_features(frozen, image_size),
        "corruptions": {
            "mask_fraction_of_area": MASK_FRACTION,
            "noise_fraction": NOISE_FRACTION,
            "slice_gap": IMAGES["next_slice"].offsets[1],
        },
        "num_train_slices": len(sources["train", (0,)]),
        "num_slices": len(sources[split, (0,)]),
    }
    pairs = IMAGES["next_slice"].offsets
    if (split, pairs) in sources:
        result |= {"num_train_pairs": len(sources["train", pairs])}
        result |= {"num_pairs": len(sources[split, pairs])}
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
        rows.setdefault(f"{target:18}{probe:8}", []).append(f"{score} {value['mean']:.4f}")
    lines += [
        row + "".join(f"{score:20}" for score in scores).rstrip() for row, scores in rows.items()
    ]
    return "\n".join([*lines, *notes(result)])


def _open(
    measured: MeasuredRun, split: str, offsets: tuple[int, ...], limit: int
) -> NeighbourSource:
    """The items of a split; with a limit above 0 so many of them, spread evenly."""
    source = open_source(measured.dataset, split, measured.channels, offsets)
    if 0 < limit < len(source):
        source.table = source.table[np.linspace(0, len(source) - 1, limit).astype(int)]
    return source


def _check_sources(sources: dict, split: str, labels: Sequence[str]) -> None:
    """Refuse slices too few to fit, to choose or to score these labels, before any work. The labels
    follow from the numbers of the records."""
    for offsets in dict.fromkeys(offsets for _, offsets in sources):
        items = "pairs of neighbouring slices" if len(offsets) > 1 else "slices"
        if len(sources["train", offsets]) < LEAST_TRAINING_SLICES:
            raise InputError(
                f"{len(sources['train', offsets])} training {items} are too few for probes, which "
                f"need {LEAST_TRAINING_SLICES}; give a --dataset of more scans"
            )
    for name in labels:
        target = LABELS[name]
        train, validation, scored = (
            labels_of(sources[part, (0,)].table[:, 0].astype(np.int32), target.num_classes)
            for part in ("train", "validation", split)
        )
        chosen = _slices_of_volumes(sources[split, (0,)].volumes, sources[split, (0,)].table[:, 0])
        if len(set(train)) < target.num_classes or len(set(validation)) < 2:
            raise InputError(
                f"the training and validation slices are too few: not every {name} occurs; give a "
                "larger --max_slices or a --dataset of more scans"
            )
        if all(len(set(scored[inside])) < 2 for inside in chosen):
            raise InputError(
                f"the volumes of the {split} split have too few slices for an AUROC of {name} "
                "each; prepare the --dataset again with a larger --min_slices"
            )


def _slices_of_volumes(volumes: list[dict], record_index) -> list:
    """For each volume a mask [N] bool of its records."""
    return [
        (record_index >= volume["first_record"])
        & (record_index < volume["first_record"] + volume["num_slices"])
        for volume in volumes
    ]


def placed_slices(
    frozen: FrozenEncoder, source: NeighbourSource, batch_size: int
) -> tuple[PlacedSlices, np.ndarray]:
    """The averaged latents of all slices, the number of the volume of each, and its place; and the
    record of each."""
    parts = [
        (features.pooled[features.kept], features.record_index[features.kept])
        for features in image_features(
            frozen, IMAGES["clean"], evaluation_batches(source, batch_size)
        )
    ]
    pooled, record_index = (np.concatenate(values) for values in zip(*parts, strict=True))
    volumes, volume = volumes_of_records(source.volumes, record_index)
    patient = np.array([one["patient_id"] for one in volumes])[volume]
    return PlacedSlices(pooled, volume, source.position_mm(record_index), patient), record_index


def _label_values(
    frozen: FrozenEncoder, name: str, train, validation, test, volumes: list[dict]
) -> tuple[dict, dict]:
    """Fit both probes of a label and score them.

    Returns:
      `linear/auroc`, `knn/accuracy`, ... -> [V], NaN where undefined; and the chosen settings.
    """
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
    """Fit both probes of an image and score them; as `_label_values`.

    Returns:
      `linear/mse`, ... -> [V], NaN for a volume without neighbouring slices; and the settings.
    """
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
