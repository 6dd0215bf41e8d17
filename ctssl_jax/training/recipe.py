"""Checks of a recipe and of its dataset, before any work starts."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import ml_collections
import numpy as np

from ctssl_jax.data import slices
from ctssl_jax.data.batches import Windows, bytes_of_windows
from ctssl_jax.data.labels import label_classes
from ctssl_jax.models.vqvae import Encoder
from ctssl_jax.runs.damage import holds_checkpoint
from ctssl_jax.runs.run import Run, flat
from ctssl_jax.tasks.table import check_task, get_task
from ctssl_jax.torch_bridge import imagenet_weights
from ctssl_jax.training import warm_start
from ctssl_jax.training.fields import FIELDS
from data_prep.dataset.cache import shard_bytes
from data_prep.dataset.reader import Dataset
from data_prep.system.errors import InputError
from data_prep.system.stores import is_url, local_path


def check_config(config: ml_collections.ConfigDict, num_devices: int) -> None:
    """Refuse a configuration that cannot work on this machine.

    Raises:
      InputError: names the field and the remedy.
    """
    if not config.dataset:
        raise InputError(
            "config.dataset is empty; give --config.dataset=DIR, made by ctssl prepare"
        )
    for name, value in flat(config.to_dict()).items():  # not as JSON, which not all values are
        if name in FIELDS and (remedy := FIELDS[name].remedy(value)):
            raise InputError(f"config.{name}={value!r}: {remedy}")
    _check_prolonged(config)
    part = num_devices * config.microbatches
    if config.batch_size % part:
        raise InputError(
            f"config.batch_size={config.batch_size} is not divisible by {num_devices} devices x "
            f"{config.microbatches} microbatches; choose a multiple of {part}"
        )
    if num_devices % config.fsdp_devices:
        raise InputError(
            f"config.fsdp_devices={config.fsdp_devices} does not divide the {num_devices} devices; "
            "choose a divisor"
        )
    group = config.get("batch_norm_group", 0)
    if group and num_devices % group:
        raise InputError(
            f"config.batch_norm_group={group} does not divide the {num_devices} devices; choose a "
            "divisor, or 0 for all"
        )
    if config.image_size % Encoder.stride:
        raise InputError(
            f"config.image_size={config.image_size} is not divisible by the encoder's stride "
            f"{Encoder.stride}; prepare with an --image_size that is"
        )
    check_task(config)


def check_encoder(config: ml_collections.ConfigDict) -> None:
    """Refuse an `encoder_learning_rate_factor` for a model without an encoder. Runs made before,
    which left it out, resume as they began.

    Raises:
      InputError: names the field and the remedy.
    """
    if config.encoder_learning_rate_factor != 1 and not get_task(config.task).encoder:
        raise InputError(
            f"config.encoder_learning_rate_factor={config.encoder_learning_rate_factor:g}: the "
            f"model of config.task={config.task!r} has no encoder that it could apply to; set it "
            "to 1, or train the recipe nodules, whose U-Net has one"
        )


def _check_prolonged(config: ml_collections.ConfigDict) -> None:
    changes = [
        tuple(change) if isinstance(change, list | tuple) else () for change in config.prolonged
    ]
    numbers = [number for change in changes for number in change]
    in_order = (
        all(len(change) == 2 for change in changes)
        and all(type(number) is int for number in numbers)  # True is none
        and all(0 < until <= number for until, number in changes)
        and all(
            before[0] < after[0] and before[1] < after[1]
            for before, after in itertools.pairwise([*changes, (math.inf, config.num_steps)])
        )
    )
    if not in_order:
        raise InputError(
            f"config.prolonged={config.prolonged}: must hold (step, number of steps) pairs, both "
            "rising, with numbers below config.num_steps; leave it out, a run records it itself"
        )


def check_dataset(
    config: ml_collections.ConfigDict, dataset: Dataset, splits: tuple[str, ...]
) -> tuple[int, ...]:
    """Refuse a dataset that does not fit the configuration.

    Args:
      config: a configuration that passed `check_config`.
      dataset: the dataset of `config.dataset`.
      splits: the splits that will be read.

    Returns:
      The channels that `config.windows` selects.

    Raises:
      InputError: another image size or window, a channel number that the model does not take, or a
        missing split.
      DatasetError: a damaged table.
    """
    preparation = dataset.preparation
    dataset.check_tables()
    if preparation["image_size"] != config.image_size:
        raise InputError(
            f"the dataset {config.dataset} holds images of {preparation['image_size']} pixels, "
            f"config.image_size is {config.image_size}; set "
            f"--config.image_size={preparation['image_size']} or prepare it again with "
            f"--image_size={config.image_size}"
        )
    channels = slices.select_channels(preparation, config.windows)
    task, read = get_task(config.task), f"{len(channels)} windows are selected"
    wanted = len(channels)
    if task.stacked:
        wanted *= len(task.offsets(config))
        read = f"{len(task.offsets(config))} adjacent slices of {len(channels)} window(s) are read"
    if config.model.in_channels != wanted and (task.stacked or len(channels) > 1):
        raise InputError(
            f"{read}, but config.model.in_channels is {config.model.in_channels}; set it to "
            f"{wanted}, or choose one window by --config.windows"
        )
    check_splits(config.dataset, preparation, splits)
    return channels


def check_patients(config: ml_collections.ConfigDict, source: slices.NeighbourSource) -> None:
    """Refuse training slices of one patient where the task tells patients apart.

    Raises:
      InputError: names the dataset and the remedy.
    """
    if source.targets.patient and len(np.unique(source.patients)) < 2:
        mixed = [objective.name for objective in get_task(config.task).objectives(config)]
        who = next(n for n in mixed or [config.task] if get_task(n).targets(config).patient)
        other = "train another recipe, such as lejepa"
        if mixed:
            other = "leave it out of config.objectives"
        raise InputError(
            f"the training slices of {config.dataset} (config.train_fraction="
            f"{config.train_fraction:g}) are of one patient, whose slices {who} does not compare "
            f"with each other; give it two or more patients, or {other}"
        )


def check_splits(dataset: str, preparation: dict, splits: Sequence[str]) -> None:
    """Raises InputError if a split has no slices."""
    for split in splits:
        if not preparation["splits"].get(split, {}).get("num_slices"):
            raise InputError(
                f"the dataset {dataset} has no {split} slices; prepare it again with --splits that "
                f"give {split} a share (every split takes a patient or more)"
                + (
                    ", or give evaluate --split=validation, which is no test"
                    if split == "test"
                    else ""
                )
            )


def with_whole_path(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The configuration with the whole path of a local `config.dataset`, so that a command of
    another folder finds it."""
    if not config.dataset or is_url(config.dataset):
        return config
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.dataset = str(local_path(config.dataset, "--config.dataset").absolute())
    return config


def with_num_classes(
    config: ml_collections.ConfigDict, dataset: Dataset
) -> ml_collections.ConfigDict:
    """The configuration with the dataset's number of classes of `config.label`, where
    `config.num_classes` is 0.

    Raises:
      InputError: no such label.
    """
    if config.get("num_classes") != 0 or not config.get("label"):
        return config
    classes, _ = label_classes(dataset, config.label)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.num_classes = len(classes)
    return config


def with_pooling(
    config: ml_collections.ConfigDict, workdir: Path | None
) -> ml_collections.ConfigDict:
    """The configuration with the pooling of the weights where `config.model.pooling` is `auto`.

    Args:
      config: the training configuration.
      workdir: the run directory; a run that began keeps its pooling. None for an estimate.

    Raises:
      InputError: the weights cannot be read.
    """
    if config.model.get("pooling") != "auto":
        return config
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if workdir is not None and holds_checkpoint(workdir):
            config.model.pooling = Run.open(workdir).config.model.pooling
        elif config.get("init_weights"):
            path = local_path(config.init_weights, "config.init_weights")
            config.model.pooling = imagenet_weights.pooling_of(path)
        elif config.init_from:
            donor = warm_start.open_other_run(config).config.model
            config.model.pooling = donor.get("pooling", "legacy")  # the donor may be another model
        else:
            config.model.pooling = "legacy"
    return config


def with_streams(
    config: ml_collections.ConfigDict, workdir: Path | None, num_processes: int
) -> ml_collections.ConfigDict:
    """The configuration with the number of streams of a windowed order, where
    `config.shuffle_streams` is 0: a run that began keeps its number, a new one takes the number of
    processes.

    Args:
      config: the training configuration.
      workdir: the run directory; None for an estimate.
      num_processes: processes of the run.

    Raises:
      InputError: the run directory is damaged, or the processes cannot share the streams equally.
    """
    if config.shuffle != "windowed":
        return config
    began = 0
    if workdir is not None and holds_checkpoint(workdir):
        began = Run.open(workdir).config.shuffle_streams
    streams = config.shuffle_streams or began or num_processes
    if streams % num_processes:
        divisors = [str(n) for n in range(streams, 0, -1) if streams % n == 0]
        whose = f"--workdir={workdir} holds a run whose order is of" if began else "it is"
        raise InputError(
            f"config.shuffle=windowed: {whose} {streams} streams (config.shuffle_streams), which "
            f"{num_processes} processes cannot share equally; start {', '.join(divisors)} of them, "
            "or a new --workdir"
        )
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.shuffle_streams = streams
    return config


def check_windows(
    config: ml_collections.ConfigDict,
    dataset: Dataset,
    source: slices.NeighbourSource,
    num_processes: int,
) -> None:
    """Refuse a windowed order that cannot give equal parts of a batch, or whose shards do not fit
    into `config.shards_gb`.

    Args:
      config: a configuration that passed `check_config` and `with_streams`.
      dataset: the dataset of `config.dataset`.
      source: the training slices.
      num_processes: processes of the run.

    Raises:
      InputError: names the field and the remedy.
      DatasetError: the store cannot be read.
    """
    windows = windows_of(config)
    if windows is None:
        return
    parts = config.microbatches * windows.num_streams
    if config.batch_size % parts:
        raise InputError(
            f"config.batch_size={config.batch_size} is not divisible by {config.microbatches} "
            f"microbatches x {windows.num_streams} streams of config.shuffle=windowed; choose a "
            f"multiple of {parts}"
        )
    if not is_url(dataset.name):
        return
    part_size = config.batch_size // config.microbatches // num_processes
    needed = bytes_of_windows(
        source,
        shard_bytes(dataset.name, "train"),
        windows,
        part_size,
        config.reading_threads,
        num_processes,
    )
    if needed > config.shards_gb * 1e9:
        raise InputError(
            f"config.shards_gb={config.shards_gb:g}: the shards of three windows of "
            f"{windows.size:,} slices take up to {needed / 1e9:.3g} GB; give "
            f"--config.shards_gb={math.ceil(needed / 1e6) / 1e3:g} or more, or a smaller "
            "--config.shuffle_window"
        )


def windows_of(config: ml_collections.ConfigDict) -> Windows | None:
    """The windowed order of a configuration that passed `with_streams`; None for the global
    shuffle."""
    if config.shuffle != "windowed":
        return None
    return Windows(config.shuffle_window, config.shuffle_streams)


def with_prolonged(
    config: ml_collections.ConfigDict, prolonged: Sequence[Sequence[int]]
) -> ml_collections.ConfigDict:
    """The configuration with the record of `run.check_resumable`."""
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        config.prolonged = tuple((until, number) for until, number in prolonged)
    return config


def check_targets(
    config: ml_collections.ConfigDict, dataset: Dataset, source: slices.NeighbourSource
) -> None:
    """Refuse training slices that cannot teach the task: too few classes, or no positive slice.

    Args:
      config: a configuration that passed `check_config`.
      dataset: the dataset of `config.dataset`.
      source: the training slices that `config.train_fraction` leaves.

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
        which += (
            f" (config.train_fraction={config.train_fraction:g} of {source.num_studies}, seed "
            f"{config.seed})"
        )
        remedy = "choose a larger config.train_fraction or another config.seed"
    if targets.label:
        classes, _ = label_classes(dataset, targets.label)
        if len(classes) != config.num_classes:
            raise InputError(
                f"config.num_classes={config.num_classes}, but the label {targets.label} has "
                f"{len(classes)} classes ({', '.join(classes[:8])}); set "
                f"--config.num_classes={len(classes)}"
            )
        if config.num_classes == 2 and not source.positive.any():
            raise InputError(f"none of the {which} is positive for {targets.label}; {remedy}")
        if len(set(source.labels.tolist())) < 2:
            raise InputError(f"all of the {which} have one class of {targets.label}; {remedy}")
    elif not source.positive.any():
        raise InputError(f"none of the {which} has a mask with foreground; {remedy}")
    if targets.positive_share and source.positive.all():
        raise InputError(
            f"all of the {which} are positive, so config.positive_share={targets.positive_share:g} "
            "cannot be kept; set --config.positive_share=0"
        )
