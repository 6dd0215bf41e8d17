"""What the commands that measure a run share (`ctssl_jax.evaluate`, `ctssl_jax.probe`,
`ctssl_jax.attributes`): a run opened on data that fit it, means over volumes, the origin of a
result, and the table of volumes.
"""

import csv
import dataclasses
import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from ctssl_jax.data.slices import select_channels, selected_windows
from ctssl_jax.runs.checkpoints import Chosen
from ctssl_jax.runs.run import Run
from ctssl_jax.stats.bootstrap import LEAST_PATIENTS
from ctssl_jax.stats.units import UNITS
from ctssl_jax.stats.volumes import volume_summary
from ctssl_jax.training.recipe import check_dataset, check_splits
from data_prep.dataset.reader import Dataset
from data_prep.system.errors import DatasetError, InputError
from data_prep.system.files import check_writable, written_whole

MANY_UNDEFINED_DRAWS = 100  # of 2,000


@dataclasses.dataclass(frozen=True)
class MeasuredRun:
    """A run and the data that it is measured on.

    run: the run.
    dataset: the data.
    config: the configuration of the run, with `dataset` and `windows` of the data.
    channels: indices of the image channels that the model reads.
    learned_from: contents of `patients.json` of the run and of its ancestors.
    """

    run: Run
    dataset: Dataset
    config: ml_collections.ConfigDict
    channels: tuple[int, ...]
    learned_from: list[dict]

    @classmethod
    def open(
        cls, run: Run, dataset: str | Path | None, splits: tuple[str, ...], flag: str = "--dataset"
    ) -> "MeasuredRun":
        """Open the data of a measurement.

        Args:
          run: the run.
          dataset: dataset directory or URL; None takes the dataset of the training.
          splits: splits that will be read.
          flag: the flag that names the dataset, for messages.

        Raises:
          InputError: a missing split, or data prepared otherwise than the data of the run.
          DatasetError: not a complete dataset.
        """
        config, trained_on = run.config.copy_and_resolve_references(), run.preparation
        trained_channels = select_channels(trained_on, config.windows)
        config.windows = [list(window) for window in selected_windows(trained_on, trained_channels)]
        if dataset is not None:
            config.dataset = str(dataset)
        opened = Dataset.open(config.dataset)
        try:
            channels = check_dataset(config, opened, ())
        except DatasetError:
            raise
        except InputError as error:
            raise InputError(
                f"{flag}={config.dataset} was prepared otherwise than the run's data: {error}"
            ) from None
        check_splits(config.dataset, opened.preparation, splits)
        return cls(run, opened, config, channels, run.learned_from)


def check_request(output: Path, batch_size: int) -> None:
    """Refuse a results file whose name does not end in .json or that cannot be written, or a batch
    size below 0.

    Raises:
      InputError: names the flag.
    """
    if batch_size < 0:
        raise InputError(f"--batch_size={batch_size}: must be 0 or more")
    if output.suffix != ".json":
        raise InputError(f"--output={output} must end in .json")
    check_writable(output, "--output")


def summaries(
    by_volume: dict[str, np.ndarray], patient_ids: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """`volume_summary` of each score over the volumes where it is defined, with its unit.

    Args:
      by_volume: score (`mse`, or `rotation/linear/auroc`) -> [V] float, NaN where undefined.
      patient_ids: V patients.

    Raises:
      InputError: a score that is defined for no volume.
    """
    summary = {}
    for name, values in by_volume.items():
        defined = np.flatnonzero(~np.isnan(values))
        if not len(defined):
            raise InputError(
                f"{name} is defined for no volume of this split; give a --dataset with more slices"
            )
        score = name.split("/")[-1]
        unit = UNITS["auroc_within_volumes" if score == "auroc" else score]
        summary[name] = {
            **volume_summary(values[defined], [patient_ids[index] for index in defined]),
            "unit": unit,
        }
    return summary


def write_volumes(path: Path, volumes: Sequence[dict], by_volume: dict[str, np.ndarray]) -> None:
    """One row a volume as CSV: its pseudonyms, number of slices and scores; empty if undefined."""
    with written_whole(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["volume_id", "patient_id", "num_slices", *by_volume])
        for index, volume in enumerate(volumes):
            scores = [
                "" if math.isnan(values[index]) else f"{values[index]:.6g}"
                for values in by_volume.values()
            ]
            writer.writerow(
                [volume["volume_id"], volume["patient_id"], volume["num_slices"], *scores]
            )


def patients_seen(
    learned_from: Sequence[dict], key_fingerprint: str, split: str, evaluated: Sequence[str]
) -> int | None:
    """The number of evaluated patients from whom a run or one of its ancestors learned, or by whom
    it chose a checkpoint.

    Args:
      learned_from: contents of `patients.json` of the run and of its ancestors.
      key_fingerprint: fingerprint of the key that made the pseudonyms of the evaluated patients.
      split: the evaluated split; for `validation`, patients by whom a checkpoint was chosen do not
        count.
      evaluated: pseudonyms of the evaluated patients.

    Returns:
      The number; None if a run used pseudonyms of another key, which cannot be compared.
    """
    if any(patients["key_fingerprint"] != key_fingerprint for patients in learned_from):
        return None
    splits = ("train",) if split == "validation" else ("train", "validation")
    seen = {patient for patients in learned_from for name in splits for patient in patients[name]}
    return len(seen.intersection(evaluated))


def header(
    measured: MeasuredRun,
    split: str,
    evaluated: Sequence[str],
    checkpoint: Chosen | None,
    *,
    device: str,
    packages: Sequence[str],
) -> dict[str, Any]:
    """The origin of a result: the fields that all results files have.

    Args:
      measured: the run and its data.
      split: the evaluated split.
      evaluated: pseudonyms of the evaluated patients.
      checkpoint: the checkpoint; None for a control, which did not learn.
      device: number and name of the devices.
      packages: names of packages whose versions are stored.
    """
    run, preparation, learned = measured.run, measured.dataset.preparation, checkpoint is not None
    return {
        "recipe": run.config.recipe,
        "task": run.config.task,
        "synthetic": preparation["synthetic"],
        "split": split,
        "num_patients_seen_in_training": patients_seen(
            measured.learned_from if learned else [],
            preparation["key_fingerprint"],
            split,
            evaluated,
        ),
        **(checkpoint.facts if checkpoint else {"checkpoint_step": None, "checkpoint_score": None}),
        "init_from": run.lineage if learned else [],
        "dataset_fingerprint": preparation["fingerprint"],
        "trained_on_fingerprint": run.preparation["fingerprint"],
        "seed": measured.config.seed,
        "versions": {name: version(name) for name in packages},
        "device": device,
        "python": platform.python_version(),
    }


def notes(result: dict) -> list[str]:
    """Warnings about the patients of a result: lines for the screen, empty if all are held out and
    there are enough."""
    allowed = [
        ancestor["leakage_let_pass"]
        for ancestor in result["init_from"]
        if ancestor.get("leakage_let_pass")
    ]
    return [
        *_seen(result),
        *(f"NOTE: allowed by config.leakage: {text}" for text in allowed),
        *_few(result),
    ]


def _few(result: dict) -> list[str]:
    """Intervals that say less than 95 %."""
    intervals = {
        name: value for name, value in result["metrics"].items() if value["ci95"] is not None
    }
    lines = []
    fewest = min((value["num_patients"] for value in intervals.values()), default=LEAST_PATIENTS)
    if fewest < LEAST_PATIENTS:
        lines.append(
            f"NOTE: intervals of {fewest} patients do not cover 95 %: with fewer than "
            f"{LEAST_PATIENTS} patients none can"
        )
    undefined = {
        name: number
        for name, value in intervals.items()
        if (number := value.get("num_undefined_draws", 0)) > MANY_UNDEFINED_DRAWS
    }
    if undefined:
        lines.append(
            f"NOTE: {', '.join(undefined)}: up to {max(undefined.values()):,} bootstrap draws lack "
            "a class, and the interval is of the others; measure more patients"
        )
    return lines


def _seen(result: dict) -> list[str]:
    if result["num_patients_seen_in_training"] is None:
        return [
            "NOTE: whether these patients were in the training data cannot be checked (other "
            "pseudonym key)"
        ]
    if result["num_patients_seen_in_training"]:
        return [
            f"NOTE: {result['num_patients_seen_in_training']} of these patients were in the "
            "training data"
        ]
    return []
