"""The start of a training run: first every refusal, then the run directory and the program."""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from ctssl_jax.data import slices
from ctssl_jax.data.batches import evaluation_batches, picture_batch, training_batches
from ctssl_jax.data.subset import spread_items
from ctssl_jax.ops.trees import flatten
from ctssl_jax.parallel.meeting import (
    WAIT_SECONDS,
    gather,
    refusing_together,
    require_agreement,
    require_shared,
)
from ctssl_jax.parallel.memory import COMPILING_SECONDS
from ctssl_jax.parallel.mesh import make_mesh
from ctssl_jax.runs import damage
from ctssl_jax.runs.checkpoints import Checkpoints
from ctssl_jax.runs.lock import TrainingLock
from ctssl_jax.runs.reports import read_reports, say
from ctssl_jax.runs.run import check_resumable, open_workdir, to_json
from ctssl_jax.stats.volumes import volumes_of_records
from ctssl_jax.tasks.interface import Task, is_frozen, step_flops
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training import fitting, pictures, recipe, validation_share, warm_start
from ctssl_jax.training.state import abstract_model, count_parameters, trained_names
from ctssl_jax.training.step import Program, compile_step, make_program
from ctssl_jax.training.topology import advice
from ctssl_jax.training.warm_start import WarmStart, WeightFile
from data_prep.dataset.reader import Dataset
from data_prep.system.errors import InputError
from data_prep.system.files import write_json

# Fields that may differ between the processes of a run.
PATHS = ("dataset", "init_from", "init_weights")


@dataclasses.dataclass(frozen=True)
class Job:
    """A training run that can work.

    config: checked, with `num_classes` filled in.
    workdir: the run directory; None for an estimate.
    dataset: the dataset of `config.dataset`.
    task: the task of `config.task`.
    channels: channels of the dataset's images that are read.
    train_source, validation_source: the slices.
    mesh: the devices.
    params: shapes of the model's parameters.
    has_checkpoint: whether the run directory held a complete checkpoint, readable or not.
    warm_start: the weights that a new run starts from; None if they are random.
    damaged_steps: checkpoints that will be set aside.
    """

    config: ml_collections.ConfigDict
    workdir: Path | None
    dataset: Dataset
    task: Task
    channels: tuple[int, ...]
    train_source: slices.NeighbourSource
    validation_source: slices.NeighbourSource
    mesh: Mesh
    params: Any
    has_checkpoint: bool
    warm_start: WarmStart | WeightFile | None
    damaged_steps: list[int]

    @property
    def part_size(self) -> int:
        """Slices of a microbatch, on all devices together."""
        return self.config.batch_size // self.config.microbatches

    @property
    def process_index(self) -> int:
        """This process's number."""
        return jax.process_index()

    @property
    def num_processes(self) -> int:
        """Processes of the run."""
        return jax.process_count()

    @property
    def num_pictures(self) -> int:
        """Slices that a validation shows: at most as many as a process has in a microbatch."""
        return min(self.config.num_pictures, self.part_size // self.num_processes)

    @property
    def metadata(self) -> dict:
        """The JSON that each checkpoint is saved with."""
        return {"config": to_json(self.config), "preparation": self.dataset.preparation}

    @functools.cached_property
    def picture_slices(self) -> dict[str, np.ndarray]:
        """A batch of this process that begins with the slices that a validation shows."""
        return picture_batch(
            self.validation_source, self.part_size // self.num_processes, self.num_pictures
        )

    @functools.cached_property
    def picture_setting(self) -> pictures.Setting:
        """What belongs to the pictures of `picture_slices`."""
        return pictures.setting(
            self.config,
            self.dataset,
            self.channels,
            self.validation_source,
            self.picture_slices["record_index"][: self.num_pictures],
        )

    @functools.cached_property
    def validation_items(self) -> np.ndarray:
        """Items of `validation_source` that a validation scores: `config.validation_slices` of
        them, equal in every process."""
        config = self.config
        return spread_items(self.validation_source, config.validation_slices, config.seed)

    @functools.cached_property
    def validation_places(self) -> np.ndarray:
        """Place along the body in mm of each of `validation_items`."""
        source = self.validation_source
        centres = source.table[self.validation_items, list(self.task.offsets(self.config)).index(0)]
        return source.position_mm(centres)

    def training_batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """This process's slices of each microbatch, beginning at a step."""
        return training_batches(
            self.train_source,
            self.config.batch_size,
            self.config.seed,
            microbatches=self.config.microbatches,
            start_step=start_step,
            windows=recipe.windows_of(self.config),
            **self._process_slice(),
        )

    def validation_batches(self) -> Iterator[dict[str, np.ndarray]]:
        """This process's slices of a validation."""
        items = self.validation_items
        if self.task.compares_batch:  # neighbours in one batch would be compared
            items = np.random.default_rng(self.config.seed).permutation(items)
        return evaluation_batches(
            self.validation_source,
            self.part_size,
            items=items,
            **self._process_slice(),
        )

    def _process_slice(self) -> dict[str, int]:
        return {
            "process_index": self.process_index,
            "process_count": self.num_processes,
            "num_threads": self.config.reading_threads,
        }

    def compile(self) -> tuple[Program, int]:
        """Print devices, model and data, then compile the step.

        Returns:
          The program, and the bytes a device that XLA expects its step to need.

        Raises:
          InputError: the step needs more memory than a device has.
        """
        for line in self.description():
            say(line)
        began = time.monotonic()
        program, memory = compile_step(
            make_program(self.config, self.task, len(self.channels), self.mesh)
        )
        with refusing_together("the look at memory", COMPILING_SECONDS):
            program, memory = fitting.check_fits(program, memory)
        say(
            f"compiled     in {time.monotonic() - began:.1f} s; XLA expects {memory / 2**30:.2f} "
            "GiB a device"
        )
        return program, memory

    def description(self) -> list[str]:
        """Devices, model and data, as lines for the screen."""
        config, devices, source = self.config, self.mesh.devices.flat, self.train_source
        names = trained_names(config, self.task, self.params)
        trained = [leaf for name, leaf in flatten(self.params).items() if name in names]
        encoder = [self.params[part] for part in self.task.encoder]
        flops, of_step = self.task.flops(config), step_flops(self.task, config)
        synthetic = "; SYNTHETIC" if self.dataset.preparation["synthetic"] else ""
        return [
            f"devices      {len(devices)} x {devices[0].device_kind} in {self.num_processes} "
            f"process(es), jax {jax.__version__}",
            f"model        {count_parameters(self.params):,} parameters "
            f"({count_parameters(encoder):,} encoder), {count_parameters(trained):,} trained"
            + ("; the encoder is frozen" if is_frozen(config) else ""),
            f"compute      {flops / 1e9:,.2f} GFLOP a slice forward, {of_step / 1e9:,.2f} with "
            "the backward pass",
            f"batch        {config.batch_size} slices = {len(devices)} device(s) x "
            f"{config.microbatches} microbatch(es) x {self.part_size // len(devices)}, "
            f"{config.dtype}",
            f"data         {len(source):,} training slices of {len(source.volumes)} volumes, "
            f"{len(self.validation_source):,} validation slices of "
            f"{len(self.validation_source.volumes)}; {config.num_steps:,} steps are "
            f"{config.num_steps * config.batch_size / len(source):.1f} epochs" + synthetic,
            *self._order_line(),
            validation_share.line(config, self.task, self.validation_source, self.validation_items),
            *[
                f"schedule     {config.schedule} over {number:,} steps up to step {until:,}, where "
                "the run was prolonged"
                for until, number in config.prolonged
            ],
            *self._views_lines(),
            *advice(config, self.mesh),
        ]

    def _views_lines(self) -> list[str]:
        table, lines = self.train_source.table, []
        if self.train_source.targets.step_mm and table.shape[1] > 1:
            volumes, volume = volumes_of_records(self.train_source.volumes, table[:, 0])
            several = set(volume[np.ptp(table, axis=1) > 0].tolist())
            alone = sum(n not in several and v["num_slices"] > 1 for n, v in enumerate(volumes))
            if alone:
                lines.append(
                    f"views        of one slice each in {alone:,} of {len(volumes):,} volumes, "
                    "whose slices are further apart than --config.views.slab_mm="
                    f"{self.config.views.slab_mm:g} takes; a larger one takes neighbours, too"
                )
        validated = self.validation_source
        if validated.targets.patient and len(np.unique(validated.patients)) < 2:
            lines.append(
                "WARNING      the validation slices are of one patient: the validation loss "
                "of simclr is 0; choose the best checkpoint by another score"
            )
        return lines

    def _order_line(self) -> list[str]:
        windows = recipe.windows_of(self.config)
        if windows is None:
            return []
        shards = len(np.unique(self.train_source.shards))
        return [
            f"shuffle      windowed: {windows.num_streams} stream(s) of {shards:,} shards, windows "
            f"of {windows.size:,} slices"
        ]

    def open_run(self, lock: TrainingLock) -> Checkpoints:
        """Write the run directory's first files, and open its checkpoints.

        Raises:
          InputError: another process trains in it, it cannot be written, or its only checkpoint is
            incomplete.
        """
        # process 0 alone writes, and may fail alone
        with refusing_together("writing the first files of --workdir"):
            if self.process_index == 0:
                lock.take(self.workdir)
                self._write_workdir()
        require_shared(self.workdir)
        checkpoints = Checkpoints(self.workdir)
        require_agreement("last checkpoint in --workdir", checkpoints.last_step or 0)
        other_weights = self.config.init_from or self.config.get("init_weights")
        if self.has_checkpoint and checkpoints.last_step is None and other_weights:
            checkpoints.close()
            raise InputError(
                f"--workdir={self.workdir} holds an incomplete checkpoint and nothing else; remove "
                "its checkpoints folder"
            )
        return checkpoints

    def _write_workdir(self) -> None:
        damage.set_aside(self.workdir, self.damaged_steps)
        for step in self.damaged_steps:
            say(
                f"WARNING      checkpoint {step:,} is damaged; it was moved to "
                f"{self.workdir / damage.SET_ASIDE}"
            )
        patients = {
            split: sorted({volume["patient_id"] for volume in source.volumes})
            for split, source in (
                ("train", self.train_source),
                ("validation", self.validation_source),
            )
        }
        open_workdir(self.workdir, self.config, self.dataset.preparation, patients)
        if not self.has_checkpoint:
            warm_start.record(self.warm_start, self.workdir)
            training_data = {
                "train_fraction": self.config.train_fraction,
                "num_train_studies": len(
                    {volume["exam_id"] for volume in self.train_source.volumes}
                ),
                "num_train_slices": len(self.train_source),
                "init_weights_sha256": self.warm_start.sha256
                if isinstance(self.warm_start, WeightFile)
                else "",
            }
            write_json(self.workdir / "training_data.json", training_data)


def check(
    config: ml_collections.ConfigDict,
    workdir: Path | None,
    devices: Sequence[Any] | None = None,
    dataset: Dataset | None = None,
    *,
    set_aside_damaged: bool = False,
) -> Job:
    """Refuse a run that cannot work, on all processes together. Nothing is written.

    Args:
      config: a recipe.
      workdir: the run directory; None for an estimate.
      devices: JAX devices to use, by default all of all processes.
      dataset: the dataset of `config.dataset`, if it is open already.
      set_aside_damaged: plan to move damaged checkpoints aside instead of refusing them.

    Raises:
      InputError: something in the configuration, the dataset or the run directory cannot work.
    """
    devices = jax.devices() if devices is None else devices
    with refusing_together("checking the dataset and the checkpoints", _seconds_to_check(workdir)):
        if dataset is None and config.dataset:  # `check_config` refuses an empty one
            dataset = Dataset.open(config.dataset)
        config = recipe.with_whole_path(config)
        if dataset is not None:
            config = recipe.with_num_classes(config, dataset)
        config = recipe.with_pooling(config, workdir)
        recipe.check_config(config, len(devices))
        config = recipe.with_streams(config, workdir, jax.process_count())
        damaged_steps, prolonged = [], None
        if workdir is not None and jax.process_index() == 0:
            damaged_steps = damage.damaged_steps(workdir) if set_aside_damaged else []
            damage.check_all_undamaged(workdir, except_steps=damaged_steps)
            read_reports(workdir, "train")  # refuses a damaged file
        channels = recipe.check_dataset(config, dataset, ("train", "validation"))
        task = get_task(config.task)
        reading = (channels, task.offsets(config), task.targets(config))
        train_source = slices.open_source(
            dataset,
            "train",
            *reading,
            fraction=config.train_fraction,
            seed=config.seed,
            most_bytes=config.shards_gb * 1e9 if config.shuffle == "windowed" else None,
        )
        recipe.check_patients(config, train_source)
        recipe.check_windows(config, dataset, train_source, jax.process_count())
        if workdir is not None:
            train_source.open()
        validation_source = slices.open_source(dataset, "validation", *reading)
        recipe.check_targets(config, dataset, train_source)
        _, params, variables = abstract_model(config, task)
        model = {"params": params, "variables": variables}
        has_checkpoint = workdir is not None and damage.holds_checkpoint(workdir)
        if not has_checkpoint:
            recipe.check_encoder(config)
        other_run = source = None
        windows = slices.selected_windows(dataset.preparation, channels)
        if not has_checkpoint and config.get("init_weights"):
            source = warm_start.open_weight_file(config, dataset, windows, model)
        elif not has_checkpoint and config.init_from:
            other_run = warm_start.open_other_run(config)
        if workdir is not None and jax.process_index() == 0:
            prolonged = check_resumable(workdir, config, dataset.preparation, damaged_steps)
    if workdir is not None:
        config = recipe.with_prolonged(config, gather("reading the run", prolonged)[0])
    # In a second block, since Orbax waits for all processes when it opens checkpoints: a process
    # that had refused before would let the others wait for ever.
    with refusing_together("reading config.init_from"):
        if other_run is not None:
            source = warm_start.find(config, other_run, windows, model)
        if source is not None:
            held_out = {
                volume["patient_id"]
                for volume in (*validation_source.volumes, *dataset.volumes("test"))
            }
            key = dataset.preparation["key_fingerprint"]
            source = source._replace(
                allowed_overlap=warm_start.check_leakage(config, source, key, held_out)
            )
    settings = {name: value for name, value in to_json(config).items() if name not in PATHS}
    require_agreement("configuration or dataset", [settings, dataset.fingerprint])
    tensors = [source.step, source.moved] if isinstance(source, WarmStart) else None
    require_agreement("checkpoint of config.init_from", tensors)
    return Job(
        config=config,
        workdir=workdir,
        dataset=dataset,
        task=task,
        channels=channels,
        train_source=train_source,
        validation_source=validation_source,
        mesh=make_mesh(devices, config.fsdp_devices),
        params=params,
        has_checkpoint=has_checkpoint,
        warm_start=source,
        damaged_steps=damaged_steps,
    )


def _seconds_to_check(workdir: Path | None) -> float:
    """How long the other processes wait while process 0 reads all checkpoints: two minutes, and a
    second for 10 MB. On `gs://` it reads none."""
    files = workdir.glob(f"{damage.CHECKPOINTS}/**/*") if isinstance(workdir, Path) else ()
    return WAIT_SECONDS + sum(path.stat().st_size for path in files if path.is_file()) / 1e7
