"""What the commands that measure a run (`ctssl_jax.evaluate`, `ctssl_jax.probe`, `ctssl_jax.attributes`) do alike: open
it on data that it was made for, average over volumes, say where a result comes from, and write a row a volume.
"""

import csv
import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.system.errors import DatasetError, InputError
from data_prep.system.files import read_json, written_whole


class MeasuredRun(NamedTuple):
    """A run and the data that it is measured on.

    config: the run's configuration, with `dataset` and `windows` those of the data.
    trained_on: `preparation.json` of the run's own data.
    preparation: that of the data.
    channels: of the data's images that the model reads.
    ancestors: the runs that its weights come from, without patients.
    learned_from: `patients.json` of the run and of its ancestors.
    """

    config: Any
    trained_on: dict
    preparation: dict
    channels: tuple[int, ...]
    ancestors: list[dict]
    learned_from: list[dict]


def open_run(
    workdir: Path, dataset: str | Path | None, splits: tuple[str, ...], flag: str = "--dataset"
) -> MeasuredRun:
    """Open a run directory.

    Args:
      workdir: run directory.
      dataset: dataset directory; None takes the training's.
      splits: that will be read.
      flag: that names the dataset, for the message.

    Raises:
      InputError: no such run, a missing split, or data prepared otherwise than the run's.
    """
    from ctssl_jax import configuration, data, transplant

    config, trained_on = configuration.read_run(workdir)
    trained_channels = data.select_channels(trained_on, config.windows)
    config.windows = [list(window) for window in data.selected_windows(trained_on, trained_channels)]
    if dataset is not None:
        config.dataset = str(dataset)
    try:
        preparation, channels = configuration.check_dataset(config, splits)
    except DatasetError:
        raise
    except InputError as error:
        raise InputError(f"{flag}={config.dataset} was prepared otherwise than the run's data: {error}") from None
    ancestors = transplant.read_ancestors(workdir)
    learned_from = [transplant.read_patients(workdir), *[run.pop("patients") for run in ancestors]]
    return MeasuredRun(config, trained_on, preparation, channels, ancestors, learned_from)


def check_request(output: Path, batch_size: int) -> None:
    """Refuse a results file that is no JSON, or a batch size below 0.

    Raises:
      InputError: names the flag.
    """
    if batch_size < 0:
        raise InputError(f"--batch_size={batch_size}: must be 0 or more")
    if output.suffix != ".json":
        raise InputError(f"--output={output} must end in .json")


def summaries(by_volume: dict[str, Any], patient_ids: Sequence[str]) -> dict[str, dict]:
    """`stats.volumes.volume_summary` of each score over the volumes where it is defined, with its unit.

    Args:
      by_volume: score (`mse`, or `rotation/linear/auroc`) -> [V] float, NaN where undefined.
      patient_ids: V patients.

    Raises:
      InputError: a score that is defined for no volume.
    """
    import numpy as np

    from ctssl_jax.stats.units import UNITS
    from ctssl_jax.stats.volumes import volume_summary

    summary = {}
    for name, values in by_volume.items():
        defined = np.flatnonzero(~np.isnan(values))
        if not len(defined):
            raise InputError(f"{name} is defined for no volume of this split; give a --dataset with more slices")
        score = name.split("/")[-1]
        unit = UNITS["auroc_within_volumes" if score == "auroc" else score]
        of_volumes = volume_summary(values[defined], [patient_ids[index] for index in defined])
        summary[name] = {**of_volumes, "unit": unit}
    return summary


def write_volumes(path: Path, volumes: Sequence[dict], by_volume: dict[str, Any]) -> None:
    """One row a volume as CSV: its pseudonyms, number of slices and scores; empty where undefined."""
    with written_whole(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["volume_id", "patient_id", "num_slices", *by_volume])
        for index, volume in enumerate(volumes):
            scores = ["" if math.isnan(values[index]) else f"{values[index]:.6g}" for values in by_volume.values()]
            writer.writerow([volume["volume_id"], volume["patient_id"], volume["num_slices"], *scores])


def patients_seen(
    learned_from: Sequence[dict], key_fingerprint: str, split: str, evaluated: Sequence[str]
) -> int | None:
    """How many of the evaluated patients a run or one of its ancestors has learned from, or chose a checkpoint by.

    Args:
      learned_from: contents of `patients.json` of the run and of its ancestors.
      key_fingerprint: of the pseudonyms of the evaluated patients.
      split: that is evaluated; of `validation`, the patients that a checkpoint was chosen by do not count.
      evaluated: pseudonyms.

    Returns:
      None where that cannot be known: pseudonyms of another key tell nothing.
    """
    if any(patients["key_fingerprint"] != key_fingerprint for patients in learned_from):
        return None
    splits = ("train",) if split == "validation" else ("train", "validation")
    known = {patient for patients in learned_from for name in splits for patient in patients[name]}
    return len(known.intersection(evaluated))


def header(
    run: MeasuredRun, split: str, evaluated: Sequence[str], step: int | None, *, device: str, packages: Sequence[str]
) -> dict:
    """Where a result comes from: the fields that all results JSON files have.

    Args:
      run: what was measured.
      split: that was evaluated.
      evaluated: pseudonyms of its patients.
      step: of the checkpoint; None for a control, which has learned from nobody.
      device: that it was computed on.
      packages: whose versions are told.
    """
    learned = step is not None
    return {
        "recipe": run.config.recipe,
        "task": run.config.task,
        "synthetic": run.preparation["synthetic"],
        "split": split,
        "num_patients_seen_in_training": patients_seen(
            run.learned_from if learned else [], run.preparation["key_fingerprint"], split, evaluated
        ),
        "checkpoint_step": step,
        "init_from": run.ancestors if learned else [],
        "dataset_fingerprint": run.preparation["fingerprint"],
        "trained_on_fingerprint": run.trained_on["fingerprint"],
        "seed": run.config.seed,
        "versions": {name: version(name) for name in packages},
        "device": device,
        "python": platform.python_version(),
    }


def training_data(workdir: Path) -> dict:
    """What a run was trained on, as results say it: train_fraction, num_train_studies, num_train_slices."""

    path = workdir / "training_data.json"
    return read_json(path) if path.exists() else {}


def notes(result: dict) -> list[str]:
    """What a reader must know of the patients of a result: lines for the screen, empty if they are held out."""
    let_pass = [ancestor["leakage_let_pass"] for ancestor in result["init_from"] if ancestor.get("leakage_let_pass")]
    return [*_seen(result), *(f"NOTE: let pass by config.leakage: {text}" for text in let_pass)]


def _seen(result: dict) -> list[str]:
    if result["num_patients_seen_in_training"] is None:
        return ["NOTE: whether these patients were in the training data cannot be checked (other pseudonym key)"]
    if result["num_patients_seen_in_training"]:
        return [f"NOTE: {result['num_patients_seen_in_training']} of these patients were in the training data"]
    return []
