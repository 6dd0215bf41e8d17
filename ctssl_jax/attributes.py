r"""What a frozen encoder knows of patients: age, sex, ethnic group (paper, section II.E and Figure 6).

    python -m ctssl_jax.attributes --workdir=RUN --dataset=DATASET --output=RESULT.json

Each volume's middle slice (that of the largest body cross-section) is encoded, the latents are averaged, and logistic
regression on the standardised averages is fitted to the training split; its penalty is the one with the highest AUROC
on the validation split. The test split is scored by the AUROC of each class against the rest and their mean, with 95 %
bootstrap intervals by patient. Ages are classes of ten years, joined where the training split has too few patients.

Controls: `--encoder=untrained`, the run's architecture with random weights by --seed and batch statistics of training
slices; `--encoder=pixels`, the slice averaged down to about as many numbers; `--shuffled_labels`, labels of training
and validation dealt out anew among their volumes: its AUROCs scatter around 0.5 from --seed to --seed, and a mean over
seeds that is not 0.5 shows a leak. What an encoder adds is seen against `untrained`, `pixels`, and
configs/attributes.py, trained end to end.

Beside RESULT.json stands RESULT.csv, one row a test volume with its pseudonyms and, of each attribute, true class and
probabilities.
"""

import csv
import functools
import math
from pathlib import Path

from absl import flags

from ctssl_jax.measurement import notes
from ctssl_jax.parallel.processes import configure_jax
from data_prep.system import command_line
from data_prep.system.errors import InputError
from data_prep.system.files import make_folder, write_json, written_whole

ENCODERS = ("run", "untrained", "pixels")
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
) -> dict:
    """Probe the encoder of a run for attributes of patients; writes RESULT.json and RESULT.csv.

    Args:
      workdir: run directory, of any task whose model has the pretraining's encoder.
      dataset: dataset directory; None takes the training's.
      output: path of RESULT.json; its folder is made.
      names: attributes, see `data__labels.read_attribute`; None takes those of age, sex and ethnic group that can
        be learned from this dataset.
      checkpoint: `best`, `last` or a step; the controls read none.
      encoder: `run`, or one of the controls `untrained` and `pixels`.
      pooling_regions: latents are averaged over the whole slice (1) or over 4 x 4 regions (4).
      shuffled_labels: deal the labels of training and validation out anew; the test labels stay.
      min_patients: training patients that a class needs.
      seed: of shuffling, random weights and bootstrap; None takes the run's.
      batch_size: slices at a time; 0 takes the training's.

    Returns:
      The contents of RESULT.json.

    Raises:
      InputError: no such run, checkpoint or attribute, data prepared otherwise than the run's, an attribute without two
        classes in a split, or a model without the encoder.
    """
    import jax
    import threadpoolctl

    from ctssl_jax import checkpoint as checkpoint_files
    from ctssl_jax import data, linear_probes, measurement
    from ctssl_jax.stats.binary import multiclass_summary
    from data_prep.dataset import Dataset
    from data_prep.dataset__schema import SPLITS

    # ---- What is asked for, and can it work? ----
    workdir, output = Path(workdir), Path(output)
    if encoder not in ENCODERS:
        raise InputError(f"--encoder={encoder}: choose one of {', '.join(ENCODERS)}")
    if pooling_regions not in REGIONS:
        raise InputError(f"--pooling_regions={pooling_regions}: choose one of {', '.join(map(str, REGIONS))}")
    if min_patients < 1:
        raise InputError(f"--min_patients={min_patients}: must be 1 or more")
    if seed is not None and not 0 <= seed < 2**32:
        raise InputError(f"--seed={seed}: must be 0 to {2**32 - 1}")
    measurement.check_request(output, batch_size)
    run = measurement.open_run(workdir, dataset, SPLITS)
    config, channels = run.config, run.channels
    config.seed = config.seed if seed is None else seed
    step = checkpoint_files.choose_step(workdir, checkpoint) if encoder == "run" else None
    chosen, not_probed = _read_attributes(config.dataset, names, min_patients)
    if any(volume["middle_slice"] is None for volume in Dataset.open(config.dataset).volumes()):
        raise InputError(f"--dataset={config.dataset}: a volume has no middle slice; prepare the dataset again")
    sources = {
        split: data.open_source(Dataset.open(config.dataset), split, channels, (0,), data.Targets(middle_only=True))
        for split in SPLITS
    }
    make_folder(output.parent, "--output")

    # ---- Features of the middle slices ----
    batch_size = batch_size or config.batch_size // config.microbatches
    embed, origin = _make_encoder(
        encoder, config, workdir, step, channels, pooling_regions, sources["train"], batch_size
    )
    print(f"encoder        {config.recipe} ({origin}) on {jax.local_devices()[0].device_kind}", flush=True)
    features = {split: _features(embed, source, batch_size) for split, source in sources.items()}
    patients = {split: [volume["patient_id"] for volume in source.volumes] for split, source in sources.items()}

    # ---- One probe an attribute ----
    metrics, settings, probabilities = {}, {}, {}
    for attribute in chosen:
        labels = dict(attribute.labels)
        if shuffled_labels:
            for split in ("train", "validation"):
                labels[split] = _shuffle(labels[split], config.seed)
        train, validation, test = (
            linear_probes.LabelFeatures(features[split][kept], labels[split][kept], kept)
            for split in SPLITS
            for kept in [labels[split] >= 0]
        )
        with threadpoolctl.threadpool_limits(1):  # same sums on any number of cores
            readout = linear_probes.fit_logistic(train, validation)
            probabilities[attribute.name] = readout.probabilities(test.pooled)
        summary = multiclass_summary(
            test.label,
            probabilities[attribute.name],
            [patient for patient, kept in zip(patients["test"], labels["test"] >= 0, strict=True) if kept],
            attribute.classes,
            seed=config.seed,
        )
        metrics |= {f"{attribute.name}/{name}": value for name, value in summary.items()}
        settings[attribute.name] = {"inverse_penalty": readout.chosen}
        print(f"{attribute.name:15}AUROC {summary['auroc']['mean']:.4f}", flush=True)

    # ---- Files ----
    result = {
        "kind": "attributes",
        **measurement.header(
            run,
            "test",
            patients["test"],
            step,
            device=jax.local_devices()[0].device_kind,
            packages=("jax", "flax", "numpy", "scikit-learn"),
        ),
        "encoder": encoder,
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
        f"{result['recipe']}, encoder: {result['encoder']}{step}, {result['num_features']} features of the middle slice"
        f"{shuffled}{'  SYNTHETIC DATA' if result['synthetic'] else ''}",
        f"{'':32}{'value':>7}   95 % interval     volumes patients",
    ]
    for name, value in result["metrics"].items():
        mean = "-" if value["mean"] is None else f"{value['mean']:.4f}"
        interval = "-" if value["ci95"] is None else f"{value['ci95'][0]:.4f} to {value['ci95'][1]:.4f}"
        lines.append(f"{name:32}{mean:>7}   {interval:17} {value['num_volumes']:7} {value['num_patients']:8}")
    for name, facts in result["attributes"].items():
        left_out = [f"{number} volumes without a value" for number in [sum(facts["missing"].values())] if number]
        left_out += [f"{number} of the small class {value}" for value, number in facts["too_small"].items()]
        lines += [f"{name}: left out {', '.join(left_out)}"] if left_out else []
    lines += [f"not probed: {reason}" for reason in result["not_probed"].values()]
    return "\n".join([*lines, *notes(result)])


def _read_attributes(dataset: str, names: list[str] | None, min_patients: int) -> tuple[list, dict[str, str]]:
    """The attributes that are asked for; or those of volumes.csv that can be probed, and why others cannot."""
    from ctssl_jax.data__labels import OF_VOLUMES, AttributeRefused, read_attribute
    from data_prep.dataset import Dataset

    remedy = "give a smaller --min_patients or a --dataset of more patients"
    chosen, refused = [], {}
    for name in OF_VOLUMES if names is None else dict.fromkeys(names):
        try:
            attribute = read_attribute(
                Dataset.open(dataset), name, min_patients, asked_by="--attributes", remedy=remedy
            )
            for split, labels in attribute.labels.items():
                if len(set(labels[labels >= 0].tolist())) < 2:
                    raise AttributeRefused(
                        "--attributes",
                        f"{name} has fewer than two classes in the {split} split",
                        "give a --dataset of more patients, or leave the attribute out",
                    )
        except AttributeRefused as error:
            if names is not None:
                raise
            refused[name] = error.reason
        else:
            chosen.append(attribute)
    if not chosen:
        raise InputError(
            f"no attribute can be probed on {dataset}: {'; '.join(refused.values()) or '--attributes is empty'}; name "
            "labels of the dataset by --attributes, or prepare it again with --attributes_csv"
        )
    return chosen, refused


def _make_encoder(encoder: str, config, workdir: Path, step, channels, regions: int, train, batch_size: int):
    """(images [B, H, W, C] uint8) -> features [B, F] float32, and what it is in words."""
    import jax

    from ctssl_jax import linear_probes, training
    from ctssl_jax.data__batches import training_batches
    from ctssl_jax.ops.images import to_unit_images
    from ctssl_jax.tasks import get_task

    if encoder == "pixels":
        side = max(1, math.isqrt(regions * regions * config.model.get("embedding_dim", 64) // len(channels)))

        def average(images):
            return linear_probes.pool(to_unit_images(images, len(channels), "window"), min(side, images.shape[1]))

        return jax.jit(average), "control: pixels"
    task = get_task(config.task)
    if "encoder" not in training.abstract_model(config, task)[1]:
        raise InputError(
            f"--workdir={workdir}: a model of the task {config.task} has no encoder to probe; give another run"
        )
    if encoder == "run":
        frozen, origin = linear_probes.trained_encoder(config, task, workdir, step), f"run, step {step:,}"
    else:
        batches = training_batches(train, min(batch_size, len(train)), config.seed)
        frozen, origin = (
            linear_probes.untrained_encoder(config, task, batches),
            f"control: untrained, seed {config.seed}",
        )

    @jax.jit
    def encode(state, images):
        latents = frozen.encode(state, to_unit_images(images, frozen.channels, frozen.normalize))[0]
        return linear_probes.pool(latents, min(regions, latents.shape[1]))

    return functools.partial(encode, frozen.state), origin


def _features(embed, source, batch_size: int):
    """Features of the middle slices in the order of the volumes: [V, F] float32."""
    import jax
    import numpy as np

    from ctssl_jax.data__batches import evaluation_batches

    parts = [
        jax.device_get(embed(batch["images"][:, 0]))[batch["weight"] > 0]
        for batch in evaluation_batches(source, min(batch_size, len(source)))
    ]
    return np.concatenate(parts)


def _shuffle(labels, seed: int):
    """Deal the labels [V] of the volumes that have one out anew; missing ones (-1) stay missing."""
    import numpy as np

    shuffled, known = labels.copy(), labels >= 0
    shuffled[known] = np.random.default_rng(seed).permutation(labels[known])
    return shuffled


def _facts(attribute, patients: dict[str, list[str]]) -> dict:
    """Classes, patients of each by split, and what was left out."""
    counts = {
        name: {
            split: len({patient for patient, label in zip(patients[split], labels, strict=True) if label == index})
            for split, labels in attribute.labels.items()
        }
        for index, name in enumerate(attribute.classes)
    }
    return {"num_patients": counts, "missing": attribute.missing, "too_small": attribute.too_small}


def _write_volumes(path: Path, volumes: list[dict], chosen: list, probabilities: dict) -> None:
    """One row a test volume: pseudonyms; of each attribute the true class and probabilities, empty where left out."""
    columns = ["volume_id", "patient_id"]
    rows = [[volume["volume_id"], volume["patient_id"]] for volume in volumes]
    for attribute in chosen:
        columns += [f"{attribute.name}/class", *(f"{attribute.name}/probability/{name}" for name in attribute.classes)]
        of_kept = iter(probabilities[attribute.name])
        for row, label in zip(rows, attribute.labels["test"], strict=True):
            if label < 0:
                row += [""] * (1 + len(attribute.classes))
            else:
                row += [attribute.classes[label], *(f"{value:.6g}" for value in next(of_kept))]
    with written_whole(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    text = functools.partial(flags.DEFINE_string, flag_values=given)
    number = functools.partial(flags.DEFINE_integer, flag_values=given)
    text("workdir", None, "Run directory of ctssl_jax.train, of any task.")
    text("dataset", None, "Dataset directory; by default the one that the run was trained on.")
    text("output", None, "Results file, ending in .json.")
    flags.DEFINE_list(
        "attributes",
        None,
        "age, sex, ethnic_group, or labels of volumes or patients; by default the first three, as far as they can be.",
        flag_values=given,
    )
    text("checkpoint", "best", "best (by validation loss), last, last_good, or a step; the controls read none.")
    text("encoder", "run", "run, or a control: untrained (random weights), pixels (no network).")
    number("pooling_regions", 1, "Latents are averaged over the whole slice (1) or 4 x 4 regions (4).")
    flags.DEFINE_bool(
        "shuffled_labels", False, "Control: deal training and validation labels out anew.", flag_values=given
    )
    number("min_patients", 10, "Training patients that a class needs.")
    number("seed", None, "Of shuffling, random weights and bootstrap; by default the run's.")
    number("batch_size", 0, "Slices at a time; 0 takes the training's.")


def start(given: flags.FlagValues) -> bool:
    """Probe as the flags ask, in this process."""
    for name in ("workdir", "output"):
        if not given[name].value:
            raise InputError(f"give --{name}")
    configure_jax()
    result = attributes(
        given.workdir,
        given.dataset,
        given.output,
        names=given.attributes,
        checkpoint=given.checkpoint,
        encoder=given.encoder,
        pooling_regions=given.pooling_regions,
        shuffled_labels=given.shuffled_labels,
        min_patients=given.min_patients,
        seed=given.seed,
        batch_size=given.batch_size,
    )
    print(table(result))
    print(f"written: {given.output} and, beside it, .csv", flush=True)
    return True


def main(argv: list[str]) -> int:
    """Command line."""
    start(flags.FLAGS)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
