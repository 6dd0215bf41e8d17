"""Configurations: what must hold before any work starts, and what may change when a run goes on."""

import json
import math
from pathlib import Path
from typing import Any

import ml_collections

from ctssl_jax import data
from ctssl_jax.checkpoint import holds_checkpoint, saved_with
from ctssl_jax.models.vqvae import Encoder
from ctssl_jax.tasks import check_task
from data_prep import dataset as dataset_directory
from data_prep.system.errors import InputError
from data_prep.system.files import read_json, write_json

CHOICES = {
    "normalize": ("window", "slice_minmax"),
    "optimizer": ("radam", "adamw"),
    "schedule": ("constant", "cosine", "linear"),
    "dtype": ("float32", "bfloat16"),
    "init_scope": ("model", "encoder", "compression"),
    "leakage": ("refuse", "allow_unchecked", "allow"),
}
AT_LEAST_ONE = (
    "batch_size",
    "microbatches",
    "num_steps",
    "log_every",
    "eval_every",
    "num_pictures",
    "reading_threads",
    "fsdp_devices",
)
AT_LEAST_ZERO = ("learning_rate", "warmup_steps", "weight_decay", "gradient_clip", "encoder_learning_rate_factor")

# A run may go on with other values of these; everything else is part of what the run is. `num_steps` only under a
# constant schedule: a cosine depends on it from the first step.
MAY_CHANGE = (
    "dataset",
    "num_steps",
    "log_every",
    "eval_every",
    "num_pictures",
    "reading_threads",
    "remat",
    "scan",
    "fsdp_devices",
)
OF_THE_DATA = ("archive", "fingerprint", "image_size", "key_fingerprint", "labels", "synthetic", "windows")


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """A configuration as JSON would give it back (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def from_json(content: dict[str, Any]) -> ml_collections.ConfigDict:
    """The inverse of `to_json`."""
    return ml_collections.ConfigDict(content)


def check_config(config: ml_collections.ConfigDict, num_devices: int) -> None:
    """Refuse a configuration that cannot work on this machine.

    Raises:
      InputError: names the field and the remedy.
    """
    if not config.dataset:
        raise InputError("config.dataset is empty; give --config.dataset=DIR, made by python -m data_prep.prepare")
    for name, allowed in CHOICES.items():
        if config[name] not in allowed:
            raise InputError(f"config.{name}={config[name]!r}: choose one of {', '.join(allowed)}")
    for names, least in ((AT_LEAST_ONE, 1), (AT_LEAST_ZERO, 0)):
        for name in names:
            if not (math.isfinite(config[name]) and config[name] >= least):
                raise InputError(f"config.{name}={config[name]}: must be {least} or more")
    if not 0 < config.train_fraction <= 1:
        raise InputError(f"config.train_fraction={config.train_fraction}: must lie above 0 and be at most 1")
    if not 0 <= config.seed < 2**32:
        raise InputError(f"config.seed={config.seed}: must be 0 to {2**32 - 1}")
    if any(not isinstance(window, tuple | list) or len(window) != 2 for window in config.windows):
        raise InputError(
            f"config.windows={config.windows}: must hold (level, width) pairs, e.g. --config.windows='((50, 350),)'"
        )
    part = num_devices * config.microbatches
    if config.batch_size % part:
        raise InputError(
            f"config.batch_size={config.batch_size} is not divisible by {num_devices} devices x "
            f"{config.microbatches} microbatches; choose a multiple of {part}"
        )
    if num_devices % config.fsdp_devices:
        raise InputError(
            f"config.fsdp_devices={config.fsdp_devices} does not divide the {num_devices} devices; choose a divisor"
        )
    if config.image_size % Encoder.stride:
        raise InputError(
            f"config.image_size={config.image_size} is not divisible by the encoder's stride {Encoder.stride}; "
            f"prepare with an --image_size that is"
        )
    check_task(config)


def check_dataset(config: ml_collections.ConfigDict, splits: tuple[str, ...]) -> tuple[dict, tuple[int, ...]]:
    """Refuse a dataset that was prepared for something else.

    Args:
      config: a configuration that passed `check_config`.
      splits: the splits that will be read.

    Returns:
      The contents of `preparation.json`, and the channels that `config.windows` selects.

    Raises:
      InputError: another image size or window, a channel number that the model does not take, or a missing split.
      data_prep.dataset.DatasetError: not a complete dataset directory, or one with a damaged table.
    """
    preparation = dataset_directory.read_preparation(config.dataset)
    dataset_directory.check_tables(config.dataset, preparation)
    if preparation["image_size"] != config.image_size:
        raise InputError(
            f"the dataset {config.dataset} holds images of {preparation['image_size']} pixels, config.image_size is "
            f"{config.image_size}; set --config.image_size={preparation['image_size']} or prepare it again with "
            f"--image_size={config.image_size}"
        )
    channels = data.select_channels(preparation, config.windows)
    if len(channels) not in (1, config.model.in_channels):
        raise InputError(
            f"{len(channels)} windows are selected, but config.model.in_channels is {config.model.in_channels}; set it "
            f"to {len(channels)}, or choose one window by --config.windows"
        )
    for split in splits:
        if not preparation["splits"].get(split, {}).get("num_slices"):
            raise InputError(
                f"the dataset {config.dataset} has no {split} slices; prepare it again with --splits that give {split} "
                "a share (that takes three patients or more)"
            )
    return preparation, channels


def with_num_classes(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A `config.num_classes` of 0 replaced by the number of classes that `config.label` has in the dataset.

    Raises:
      InputError: no such label.
      data_prep.dataset.DatasetError: not a complete dataset directory.
    """
    if config.get("num_classes") != 0 or not config.get("label") or not config.dataset:
        return config
    classes, _ = data.label_classes(config.dataset, config.label)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.num_classes = len(classes)
    return config


def check_targets(config: ml_collections.ConfigDict, source: data.NeighbourSource) -> None:
    """Refuse training slices that cannot teach what the task asks: too few classes, no positive slice.

    Args:
      config: a configuration that passed `check_config`.
      source: the training slices, after `config.train_fraction` was taken.

    Raises:
      InputError: names what is missing, and the remedy.
    """
    targets = source.targets
    if source.positive is None:
        return
    studies = len({volume["exam_id"] for volume in source.volumes})
    which = f"{len(source):,} slices of {studies} training studies"
    remedy = "prepare a --dataset with more of them"
    if config.train_fraction < 1:
        which += f" (config.train_fraction={config.train_fraction:g} of {source.num_studies}, seed {config.seed})"
        remedy = "choose a larger config.train_fraction or another config.seed"
    if targets.label:
        classes, _ = data.label_classes(config.dataset, targets.label)
        if len(classes) != config.num_classes:
            raise InputError(
                f"config.num_classes={config.num_classes}, but the label {targets.label} has {len(classes)} classes "
                f"({', '.join(classes[:8])}); set --config.num_classes={len(classes)}"
            )
        if config.num_classes == 2 and not source.positive.any():
            raise InputError(f"none of the {which} is positive for {targets.label}; {remedy}")
        if len(set(source.labels.tolist())) < 2:
            raise InputError(f"all of the {which} have one class of {targets.label}; {remedy}")
    elif not source.positive.any():
        raise InputError(f"none of the {which} has a mask with foreground; {remedy}")
    if targets.positive_share and source.positive.all():
        raise InputError(
            f"all of the {which} are positive, so config.positive_share={targets.positive_share:g} cannot be kept; "
            "set --config.positive_share=0"
        )


def read_run(workdir: Path) -> tuple[ml_collections.ConfigDict, dict]:
    """`config.json` and `preparation.json` of a run, compared with what its newest checkpoint was saved with.

    Raises:
      InputError: no run directory, or a damaged one.
    """
    if not (workdir / "config.json").is_file():
        raise InputError(
            f"--workdir={workdir} is not a run directory; give the --workdir of a run of ctssl_jax.train"
            + ("" if not holds_checkpoint(workdir) else ", or bring back its config.json")
        )
    config = read_json(workdir / "config.json", ("task", "recipe", "windows", "model"))
    preparation = read_json(workdir / "preparation.json", OF_THE_DATA)
    saved = saved_with(workdir) or {}
    if "config" in saved:
        old, new = _flat(saved["config"]), _flat(config)
        for name in sorted(old.keys() | new.keys()):
            if name.split(".")[0] not in MAY_CHANGE and old.get(name) != new.get(name):
                raise _other_than_saved(workdir / "config.json", name)
    for name in OF_THE_DATA if "preparation" in saved else ():
        if saved["preparation"].get(name) != preparation[name]:
            raise _other_than_saved(workdir / "preparation.json", name)
    return from_json(config), preparation


def _other_than_saved(path: Path, name: str) -> InputError:
    return InputError(f"{path} is damaged ({name} is another than in the checkpoint); bring back a copy of it")


_WRITTEN_FIRST = ("preparation.json", "patients.json", "config.json")  # in this order


def check_resumable(workdir: Path, config: ml_collections.ConfigDict, preparation: dict) -> None:
    """Refuse to go on with a run under another configuration or on other data; accept a new or empty folder.

    Raises:
      InputError: names the first field that differs, or says that the folder holds something else.
    """
    path = workdir / "config.json"
    if not path.exists():
        # What a run that was killed at its very start may have left is no run yet, and no harm.
        begun = {name + ending for name in _WRITTEN_FIRST for ending in ("", ".tmp")}
        if workdir.is_dir() and any(entry.name not in begun for entry in workdir.iterdir()):
            raise InputError(f"--workdir={workdir} holds files but no run; give a new or empty folder")
        return
    if not holds_checkpoint(workdir):
        return  # nothing was learned yet: a corrected configuration may take its place
    of_run, of_data = read_run(workdir)
    old, new = _flat(to_json(of_run)), _flat(to_json(config))
    may_change = MAY_CHANGE if config.schedule == "constant" else tuple(set(MAY_CHANGE) - {"num_steps"})
    for name in sorted(old | new):
        if name.split(".")[0] in may_change or (name in old and name in new and old[name] == new[name]):
            continue
        if name in ("init_from", "init_weights") and bool(old.get(name)) == bool(new[name]):
            continue  # another spelling of the path; where the weights came from stands in ancestors.json
        if name in old and name in new:
            remedy = f"use another --workdir, or --config.{name}={old[name]}"
            raise InputError(
                f"--workdir={workdir} holds a run with config.{name}={old[name]}, not {new[name]}; {remedy}"
            )
        raise InputError(
            f"--workdir={workdir} holds a run of another version of this program (config.{name} is not in both); use "
            "another --workdir"
        )
    if of_data["fingerprint"] != preparation["fingerprint"]:
        raise InputError(
            f"--workdir={workdir} holds a run on other data than {config.dataset} (dataset fingerprints differ); give "
            "the dataset that it began with, or another --workdir"
        )


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def open_workdir(
    workdir: Path,
    config: ml_collections.ConfigDict,
    preparation: dict,
    patients: dict[str, list[str]],
) -> None:
    """Create a run directory with its `config.json`, `preparation.json` and `patients.json`.

    Args:
      workdir: the folder.
      config: the training configuration.
      preparation: contents of the dataset's `preparation.json`.
      patients: pseudonyms of the patients of the training and the validation split, so that a later evaluation can
        tell whom the model has seen.

    Raises:
      InputError: the folder cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        of_patients = {"key_fingerprint": preparation["key_fingerprint"], **patients}
        for name, content in zip(_WRITTEN_FIRST, (preparation, of_patients, to_json(config)), strict=True):
            write_json(workdir / name, content)
    except OSError as error:
        raise InputError(f"--workdir={workdir} cannot be written ({error.strerror}); choose another folder") from None
