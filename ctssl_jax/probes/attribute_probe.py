"""The probe of `ctssl_jax.attributes`: attributes of patients, read out of a frozen encoder."""

import csv
from pathlib import Path
from typing import Any

import jax
import numpy as np
import threadpoolctl

from ctssl_jax.data.batches import evaluation_batches
from ctssl_jax.data.labels import OF_VOLUMES, AttributeLabels, AttributeRefused, read_attribute
from ctssl_jax.data.slices import NeighbourSource, Targets, open_source
from ctssl_jax.evaluation.measured_run import MeasuredRun, notes
from ctssl_jax.ops.images import to_unit_images
from ctssl_jax.parallel import batch_sizes
from ctssl_jax.probes.encoders import FrozenEncoder, ProbedRun
from ctssl_jax.probes.label_probe import LabelFeatures, fit_logistic
from ctssl_jax.stats.binary import multiclass_summary
from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import SPLITS
from data_prep.system.errors import InputError
from data_prep.system.files import make_folder, write_json, written_whole
from data_prep.system.stores import local_path

REGIONS = (1, 4)


def attributes(
    workdir: str | Path,
    dataset: str | Path | None,
    output: str | Path,
    *,
    names: list[str] | None = None,
    checkpoint: str = "best",
    encoder: str = "run",
    pooling_regions: int = 1,
    shuffled_labels: bool = False,
    min_patients: int = 10,
    seed: int | None = None,
    batch_size: int = 0,
) -> dict[str, Any]:
    """Probe the encoder of a run for attributes of patients; writes RESULT.json and RESULT.csv.

    Args:
      workdir: run directory, of any task whose model has the encoder of the pretraining.
      dataset: dataset directory; None takes the dataset of the training.
      output: path of RESULT.json; its folder is made.
      names: attributes, see `data.labels.read_attribute`; None takes age, sex and ethnic group, as
        far as they can be learned from this dataset.
      checkpoint: `best`, `last`, `last_good` or a step; the controls read no checkpoint.
      encoder: `run`, or one of the controls `untrained` and `pixels`.
      pooling_regions: latents are averaged over the whole slice (1) or over 4 x 4 regions (4).
      shuffled_labels: shuffle the labels of training and validation; the test labels stay.
      min_patients: training patients that a class needs.
      seed: of shuffling, random weights and bootstrap; None takes the seed of the run.
      batch_size: slices at a time at most; 0 chooses by memory.

    Returns:
      The contents of RESULT.json.

    Raises:
      InputError: an unknown run, checkpoint or attribute, data prepared otherwise than the data of
        the run, an attribute without two classes in a split, or a model without the encoder.
    """
    output = local_path(output, "--output", "choose a folder here")
    _check_settings(pooling_regions, min_patients, seed)
    probed = ProbedRun.open(
        workdir,
        dataset,
        output,
        SPLITS,
        encoder=encoder,
        checkpoint=checkpoint,
        batch_size=batch_size,
    )
    config, data = probed.measured.config, probed.measured.dataset
    config.seed = config.seed if seed is None else seed
    chosen, not_probed = _read_attributes(data, names, min_patients)
    sources = _middle_slices(probed.measured)
    make_folder(output.parent, "--output")

    frozen = probed.load_encoder(sources["train"], pooling_regions)
    batch_size = probed.batch_size(frozen, max(map(len, sources.values())))
    with batch_sizes.end_of_memory(batch_size):
        features = _features(frozen, sources, batch_size)
    patients = {
        split: [volume["patient_id"] for volume in source.volumes]
        for split, source in sources.items()
    }
    metrics, settings, probabilities = {}, {}, {}
    for attribute in chosen:
        labels = dict(attribute.labels)
        if shuffled_labels:
            for split in ("train", "validation"):
                labels[split] = _shuffle(labels[split], config.seed)
        penalty, probabilities[attribute.name], test = _fit(features, labels)
        test_patients = [patients["test"][index] for index in test.record_index]
        summary = multiclass_summary(
            test.label,
            probabilities[attribute.name],
            test_patients,
            attribute.classes,
            seed=config.seed,
        )
        metrics |= {f"{attribute.name}/{name}": value for name, value in summary.items()}
        settings[attribute.name] = {"inverse_penalty": penalty}
        print(f"{attribute.name:15}AUROC {summary['auroc']['mean']:.4f}", flush=True)

    result = {
        "kind": "attributes",
        **probed.header("test", patients["test"]),
        "pooling_regions": pooling_regions,
        "shuffled_labels": shuffled_labels,
        "metrics": metrics,
        "chosen": settings,
        "num_features": features["train"].shape[1],
        "min_patients": min_patients,
        "attributes": {attribute.name: _facts(attribute, patients) for attribute in chosen},
        "not_probed": not_probed,
        "num_volumes": {split: len(source) for split, source in sources.items()},
    }
    _write_volumes(output.with_suffix(".csv"), sources["test"].volumes, chosen, probabilities)
    write_json(output, result)  # last: with it the probe is complete
    return result


def table(result: dict) -> str:
    """The results as lines for the screen."""
    step = "" if result["checkpoint_step"] is None else f", step {result['checkpoint_step']:,}"
    shuffled = ", SHUFFLED LABELS" if result["shuffled_labels"] else ""
    lines = [
        f"{result['recipe']}, encoder: {result['encoder']}{step}, {result['num_features']} "
        "features of the middle "
        f"slice{shuffled}{'  SYNTHETIC DATA' if result['synthetic'] else ''}",
        f"{'':32}{'value':>7}   95 % interval     volumes patients",
    ]
    for name, value in result["metrics"].items():
        mean = "-" if value["mean"] is None else f"{value['mean']:.4f}"
        interval = (
            "-" if value["ci95"] is None else f"{value['ci95'][0]:.4f} to {value['ci95'][1]:.4f}"
        )
        lines.append(
            f"{name:32}{mean:>7}   {interval:17} {value['num_volumes']:7} {value['num_patients']:8}"
        )
    for name, facts in result["attributes"].items():
        left_out = [
            f"{number} volumes without a value"
            for number in [sum(facts["missing"].values())]
            if number
        ]
        left_out += [
            f"{number} of the small class {value}" for value, number in facts["too_small"].items()
        ]
        lines += [f"{name}: left out {', '.join(left_out)}"] if left_out else []
    lines += [f"not probed: {reason}" for reason in result["not_probed"].values()]
    return "\n".join([*lines, *notes(result)])


def _check_settings(pooling_regions: int, min_patients: int, seed: int | None) -> None:
    if pooling_regions not in REGIONS:
        raise InputError(
            f"--pooling_regions={pooling_regions}: choose one of {', '.join(map(str, REGIONS))}"
        )
    if min_patients < 1:
        raise InputError(f"--min_patients={min_patients}: must be 1 or more")
    if seed is not None and not 0 <= seed < 2**32:
        raise InputError(f"--seed={seed}: must be 0 to {2**32 - 1}")


def _read_attributes(
    dataset: Dataset, names: list[str] | None, min_patients: int
) -> tuple[list[AttributeLabels], dict[str, str]]:
    """Read the named attributes, or all of `OF_VOLUMES` that can be probed.

    Returns:
      The attributes; and the refused ones with the reasons.

    Raises:
      InputError: a named attribute cannot be probed, or all are refused.
    """
    remedy = "give a smaller --min_patients or a --dataset of more patients"
    chosen, refused = [], {}
    for name in OF_VOLUMES if names is None else dict.fromkeys(names):
        try:
            attribute = read_attribute(
                dataset, name, min_patients, asked_by="--attributes", remedy=remedy
            )
            for split, labels in attribute.labels.items():
                if len(set(labels[labels >= 0].tolist())) < 2:
                    reason = f"{name} has fewer than two classes in the {split} split"
                    more = "give a --dataset of more patients, or leave the attribute out"
                    raise AttributeRefused("--attributes", reason, more)
        except AttributeRefused as error:
            if names is not None:
                raise
            refused[name] = error.reason
        else:
            chosen.append(attribute)
    if not chosen:
        raise InputError(
            f"no attribute can be probed on {dataset.name}: "
            f"{'; '.join(refused.values()) or '--attributes is empty'}; name labels of the dataset "
            "by --attributes, or prepare it again with --attributes_csv"
        )
    return chosen, refused


def _middle_slices(measured: MeasuredRun) -> dict[str, NeighbourSource]:
    """The middle slice of each volume, in the order of the volumes, by split."""
    if any(volume["middle_slice"] is None for volume in measured.dataset.volumes()):
        raise InputError(
            f"--dataset={measured.dataset.name}: a volume has no middle slice; prepare the dataset "
            "again"
        )
    targets = Targets(middle_only=True)
    return {
        split: open_source(measured.dataset, split, measured.channels, (0,), targets)
        for split in SPLITS
    }


def _features(
    frozen: FrozenEncoder, sources: dict[str, NeighbourSource], batch_size: int
) -> dict[str, np.ndarray]:
    """Features of the middle slices, in the order of the volumes: split -> [V, F] float32."""

    @jax.jit
    def encode(state, images):
        return frozen.encode(state, to_unit_images(images, frozen.channels, frozen.normalize))[1]

    def features(source: NeighbourSource) -> np.ndarray:
        batches = evaluation_batches(source, batch_size)
        parts = [
            frozen.finish(jax.device_get(encode(frozen.state, batch["images"][:, 0])))[
                batch["weight"] > 0
            ]
            for batch in batches
        ]
        return np.concatenate(parts)

    return {split: features(source) for split, source in sources.items()}


def _fit(
    features: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> tuple[float, np.ndarray, LabelFeatures]:
    """Fit the probe of an attribute and apply it to the test split.

    Args:
      features: split -> [V, F].
      labels: split -> [V] int, -1 where the label is missing.

    Returns:
      The chosen inverse penalty, the probabilities [T, K] of the T test slices that have a label,
      and these slices.
    """
    train, validation, test = (
        LabelFeatures(features[split][labelled], labels[split][labelled], labelled)
        for split in SPLITS
        for labelled in [np.flatnonzero(labels[split] >= 0)]
    )
    with threadpoolctl.threadpool_limits(1):  # same sums on any number of cores
        readout = fit_logistic(train, validation)
        return readout.chosen, readout.probabilities(test.pooled), test


def _shuffle(labels: np.ndarray, seed: int) -> np.ndarray:
    """Shuffle the labels [V]; missing labels (-1) stay where they are."""
    shuffled, labelled = labels.copy(), labels >= 0
    shuffled[labelled] = np.random.default_rng(seed).permutation(labels[labelled])
    return shuffled


def _facts(attribute: AttributeLabels, patients: dict[str, list[str]]) -> dict:
    """The patients of each class and split, and the volumes that were left out."""
    counts = {
        name: {
            split: len(
                {
                    patient
                    for patient, label in zip(patients[split], labels, strict=True)
                    if label == index
                }
            )
            for split, labels in attribute.labels.items()
        }
        for index, name in enumerate(attribute.classes)
    }
    return {"num_patients": counts, "missing": attribute.missing, "too_small": attribute.too_small}


def _write_volumes(
    path: Path,
    volumes: list[dict],
    chosen: list[AttributeLabels],
    probabilities: dict[str, np.ndarray],
) -> None:
    """One row a test volume: pseudonyms, then the true class and the probabilities of each
    attribute, empty where the volume was left out."""
    columns = ["volume_id", "patient_id"]
    rows = [[volume["volume_id"], volume["patient_id"]] for volume in volumes]
    for attribute in chosen:
        columns += [
            f"{attribute.name}/class",
            *(f"{attribute.name}/probability/{name}" for name in attribute.classes),
        ]
        labelled = iter(probabilities[attribute.name])
        for row, label in zip(rows, attribute.labels["test"], strict=True):
            if label < 0:
                row += [""] * (1 + len(attribute.classes))
            else:
                row += [attribute.classes[label], *(f"{value:.6g}" for value in next(labelled))]
    with written_whole(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
