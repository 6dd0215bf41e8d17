r"""Train a model: pretraining and downstream.

    python -m ctssl_jax.train --config=configs/masked_region.py --config.dataset=DATASET --workdir=RUN

Run it again to go on where it stopped: checkpoints hold everything, the order of the data included. SIGTERM and Ctrl-C
save and end with exit code 75. `--config.init_from=OTHER_RUN` starts from the weights of another run. `--estimate` says
after a few timed steps what the run will cost, and writes nothing. On several hosts start one process on each with
`--distributed`.
"""

import functools
import hashlib
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from ctssl_jax.parallel.processes import configure_jax
from data_prep.system import command_line
from data_prep.system.errors import InputError, StartAgain
from data_prep.system.files import write_json


def train(
    config: ml_collections.ConfigDict,
    workdir: str | Path | None,
    devices: Sequence[Any] | None = None,
    *,
    estimate: bool = False,
    set_aside_damaged: bool = False,
) -> bool:
    """Train, or go on training, until `config.num_steps`.

    Args:
      config: a recipe, see `configs/masked_region.py`.
      workdir: the run directory, see `ctssl_jax.checkpoint`; unused by an estimate.
      devices: JAX devices to use, by default all of all processes.
      estimate: only print what the run will cost; nothing is written.
      set_aside_damaged: move damaged checkpoints aside and go on from the last good one.

    Returns:
      True if the run is complete, False if it was asked to stop before.

    Raises:
      InputError: something in the configuration, the dataset or the run directory cannot work.
      TrainingDiverged: the loss or a gradient was not finite; the last checkpoint is from before.
    """
    from ctssl_jax import distributed

    with distributed.stop_requests() as should_stop:
        return _train(config, None if estimate else Path(workdir), devices, should_stop, set_aside_damaged)


def _train(
    config: ml_collections.ConfigDict,
    workdir: Path | None,
    devices: Sequence[Any] | None,
    should_stop: Callable[[int], bool],
    set_aside_damaged: bool,
) -> bool:
    import jax

    from ctssl_jax import checkpoint, configuration, data, distributed, estimate, health, pictures, training, transplant
    from ctssl_jax.checkpoint import Checkpoints, flatten, holds_checkpoint, restore
    from ctssl_jax.data__batches import evaluation_batches, picture_batch, training_batches
    from ctssl_jax.models.quantizer import codebook_use
    from ctssl_jax.reports import Reports, duration, read_reports, say
    from ctssl_jax.tasks import get_task
    from ctssl_jax.torch_bridge import imagenet_weights
    from data_prep.dataset import Dataset

    # ---- What is asked for, and can it work? ------------------------------------------------------------------------
    devices = jax.devices() if devices is None else devices
    num_devices, num_processes, process = len(devices), jax.process_count(), jax.process_index()
    config = configuration.with_num_classes(config)
    with distributed.refusing_together():
        configuration.check_config(config, num_devices)
        if process == 0 and workdir is not None:
            for step in checkpoint.set_aside_damaged(workdir) if set_aside_damaged else ():
                say(f"WARNING      checkpoint {step:,} is damaged; it was moved to {workdir / checkpoint.SET_ASIDE}")
            checkpoint.check_all_undamaged(workdir)
            read_reports(workdir, "train")  # here, since it refuses a damaged file
        dataset = Dataset.open(config.dataset)
        preparation = dataset.preparation
        channels = configuration.check_dataset(config, dataset, ("train", "validation"))
        task = get_task(config.task)
        what = (channels, task.offsets(config), task.targets(config))
        train_source = data.open_source(dataset, "train", *what, fraction=config.train_fraction, seed=config.seed)
        validation_source = data.open_source(dataset, "validation", *what)
        configuration.check_targets(config, train_source)
        _, *abstract_model = training.abstract_model(config, task)
        fresh = workdir is None or not holds_checkpoint(workdir)
        starts_from_donor = bool(config.init_from) and fresh
        if starts_from_donor:
            transplant.check_is_run(config)
        weights_digest = ""
        if config.get("init_weights") and fresh:
            if config.init_from:
                raise InputError("config.init_weights and config.init_from: give one of them, not both")
            shapes = flatten(dict(zip(("params", "variables"), abstract_model, strict=True)))
            imagenet_weights.load_state_dict(imagenet_weights.read_file(config.init_weights), shapes, head=False)
            weights_digest = hashlib.sha256(Path(config.init_weights).read_bytes()).hexdigest()
    with distributed.refusing_together():  # Orbax waits for all processes here, so none may have refused before
        windows = data.selected_windows(preparation, channels)
        like = dict(zip(("params", "variables"), abstract_model, strict=True))
        donor = transplant.find_donor(config, windows, like) if starts_from_donor else None
        let_pass = ""
        if donor is not None:
            held_out = {volume["patient_id"] for volume in validation_source.volumes}
            held_out |= {volume["patient_id"] for volume in dataset.volumes("test")}
            let_pass = transplant.check_leakage(config, donor, preparation["key_fingerprint"], held_out)
    with distributed.refusing_together():
        if process == 0 and workdir is not None:
            configuration.check_resumable(workdir, config, preparation)
            patients = {
                split: sorted({volume["patient_id"] for volume in source.volumes})
                for split, source in (("train", train_source), ("validation", validation_source))
            }
            configuration.open_workdir(workdir, config, preparation, patients)
            if fresh:
                transplant.record(donor, workdir, let_pass)
                training_data = {
                    "train_fraction": config.train_fraction,
                    "num_train_studies": len({volume["exam_id"] for volume in train_source.volumes}),
                    "num_train_slices": len(train_source),
                    "init_weights_sha256": weights_digest,
                }
                write_json(workdir / "training_data.json", training_data)
    paths = ("dataset", "init_from", "init_weights")
    settings = {name: value for name, value in configuration.to_json(config).items() if name not in paths}
    distributed.require_agreement("configuration or dataset", [settings, preparation["fingerprint"]])
    distributed.require_agreement("checkpoint of config.init_from", donor and [donor.step, donor.moved])

    # ---- The program and what it will cost --------------------------------------------------------------------------
    mesh = distributed.make_mesh(devices, config.fsdp_devices)
    program = training.make_program(config, task, len(channels), mesh)
    abstract_params = abstract_model[0]
    abstract_state = jax.eval_shape(program.initial_state)
    part_size = config.batch_size // config.microbatches
    batch_shapes = training.abstract_batch(config, task, len(channels), part_size)

    encoder_size = training.count_parameters(abstract_params.get("encoder", {}))
    flops = task.flops(config)
    kind = mesh.devices.flat[0].device_kind
    say(f"devices      {num_devices} x {kind} in {num_processes} process(es), jax {jax.__version__}")
    say(f"model        {training.count_parameters(abstract_params):,} trainable parameters ({encoder_size:,} encoder)")
    say(f"compute      {flops / 1e9:,.2f} GFLOP a slice forward, {3 * flops / 1e9:,.2f} with the backward pass")
    say(
        f"batch        {config.batch_size} slices = {num_devices} device(s) x {config.microbatches} microbatch(es) x "
        f"{part_size // num_devices}, {config.dtype}"
    )
    say(
        f"data         {len(train_source):,} training slices of {len(train_source.volumes)} volumes, "
        f"{len(validation_source):,} validation slices of {len(validation_source.volumes)}; {config.num_steps:,} steps "
        f"are {config.num_steps * config.batch_size / len(train_source):.1f} epochs"
        + ("; SYNTHETIC" if preparation["synthetic"] else "")
    )
    started = time.monotonic()
    program, memory = training.compile_step(program, config, abstract_state, batch_shapes)
    say(f"compiled     in {time.monotonic() - started:.1f} s; XLA expects {memory / 2**30:.2f} GiB a device")
    share = dict(process_index=process, process_count=num_processes, num_threads=config.reading_threads)
    if workdir is None:
        batches = training_batches(
            train_source, config.batch_size, config.seed, microbatches=config.microbatches, **share
        )
        times = estimate.timed_steps(program, batches, config)
        for line in estimate.lines(times, config, len(train_source), estimate.state_bytes(abstract_state)):
            say(line)
        return True

    # ---- Start or go on ---------------------------------------------------------------------------------------------
    checkpoints = Checkpoints(workdir)
    fresh = checkpoints.last_step is None
    start_step = 0 if fresh else checkpoints.last_step
    distributed.require_agreement("last checkpoint in --workdir", start_step)
    if fresh and config.init_from and donor is None:
        raise InputError(
            f"--workdir={workdir} holds an incomplete checkpoint and nothing else; remove its checkpoints folder"
        )
    if not fresh:
        like = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract_state,
            program.shardings,
        )
        state = restore(workdir, start_step, like)
        say(f"going on     from step {start_step:,} of {workdir}")
    else:
        state = program.initial_state()
        if donor is not None:
            state = transplant.transplant(donor, state)
            for line in transplant.report(donor):
                say(line)
            if let_pass:
                say(f"WARNING      config.leakage={config.leakage}: {let_pass}")
        elif weights_digest:
            state = imagenet_weights.load_into(state, config.init_weights)
            say(f"start        weights of {config.init_weights}")
    batches = training_batches(
        train_source,
        config.batch_size,
        config.seed,
        microbatches=config.microbatches,
        start_step=start_step,
        **share,
    )
    feed = training.Feed(mesh, batches, config.microbatches) if start_step < config.num_steps else None
    num_pictures = min(config.num_pictures, part_size // num_processes)
    fixed_slices = picture_batch(validation_source, part_size // num_processes, num_pictures)
    label = "SYNTHETIC" if preparation["synthetic"] else ""
    layer_gradient_norms: dict[str, float] = {}
    reports = Reports(workdir, -1 if fresh else start_step)
    metadata = {"config": configuration.to_json(config), "preparation": preparation}

    def validate(step: int) -> float | None:
        batches = evaluation_batches(validation_source, part_size, **share)
        if num_processes == 1:  # a request to stop does not wait for the end of a long validation
            batches = itertools.takewhile(lambda batch: not should_stop(step), batches)
        result = training.evaluate_split(program, state, batches)
        if result is None or len(result.record_index) < len(validation_source):
            return None
        means = {name: float(values.mean(dtype=float)) for name, values in result.scores.items()}
        training.check_finite(means["loss"], step, workdir, checkpoints.last_step)
        use = codebook_use(result.code_counts) | health.embedding_use(result.embedding_moments)
        means |= {name: value for name, value in use.items() if name != "embedding_dim"}
        reports.write("validation", step, means)
        shown = training.render_pictures(program, state, fixed_slices, num_pictures)
        if process == 0:
            pictures.save_strip(workdir / "pictures" / f"step_{step:08d}.png", shown, label)
        say(f"validation   step {step:,}  " + "  ".join(f"{name} {value:.4g}" for name, value in means.items()))
        for warning in health.warnings(use, layer_gradient_norms) if step > 0 else ():
            say(f"WARNING      step {step:,}: {warning}")
        return means["loss"]

    # ---- Evaluate, save, step, fetch the next batch -----------------------------------------------------------------
    step, finished = start_step, False
    unscored = not checkpoints.last_is_scored and (step % config.eval_every == 0 or step >= config.num_steps)
    unsaved = fresh or unscored  # a stop may have come just before or within a validation
    clock, clock_step, training_seconds, validation_seconds = time.monotonic(), step, 0.0, 0.0
    try:
        while True:
            at_end, stopping = step >= config.num_steps, should_stop(step)
            due = at_end or step % config.eval_every == 0
            if unsaved and (due or stopping):
                training.check_state(state, workdir, checkpoints.last_step)
                paused = time.monotonic()
                loss = validate(step) if due and not stopping else None
                stopping = stopping or loss is None
                if step > 0 or loss is not None:
                    checkpoints.save(step, state, metadata, loss)
                unsaved, validation_seconds = False, time.monotonic() - paused
                clock += validation_seconds  # slices/s is of training alone
            if at_end or stopping:
                finished = at_end and not stopping
                break
            state = training.run_step(program, state, feed.parts)
            step, unsaved = step + 1, True
            if step < config.num_steps:
                feed.advance(state.step)
            if step % config.log_every == 0:
                training.check_state(state, workdir, checkpoints.last_step)
                state, (means, code_counts, layer_gradient_norms) = training.take_report(program, state)
                now = time.monotonic()
                speed = (step - clock_step) * config.batch_size / (now - clock)
                means |= {"slices_per_second": speed, "waiting_for_data": feed.waited / (now - clock)}
                training_seconds += now - clock
                clock, clock_step, feed.waited = now, step, 0.0
                means |= codebook_use(code_counts)
                reports.write("train", step, means)
                reports.write("gradient_norm", step, layer_gradient_norms)
                left = (config.num_steps - step) * training_seconds / (step - start_step)
                left += ((config.num_steps - step) // config.eval_every + 1) * validation_seconds
                say(
                    f"step {step:,}/{config.num_steps:,}  loss {means['loss']:.4g}  "
                    + "  ".join(f"{name} {means[name]:.4g}" for name in task.reported)
                    + (f"  codes {means['used_codes']}" if "used_codes" in means else "")
                    + f"  {speed:.1f} slices/s"
                    + f" ({means['waiting_for_data']:.0%} waiting for data)  {duration(left)} left"
                )
    finally:
        checkpoints.close()
        reports.close()
    say(f"{'finished' if finished else 'stopped'}     at step {step:,}; checkpoints in {workdir}")
    return finished


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    config_flags.DEFINE_config_file(
        "config", None, "Recipe, e.g. configs/masked_region.py; --config.FIELD=VALUE.", flag_values=given
    )
    text, flag, number = (
        functools.partial(define, flag_values=given)
        for define in (flags.DEFINE_string, flags.DEFINE_bool, flags.DEFINE_integer)
    )
    text("workdir", None, "Run directory: made, or gone on with.")
    flag("estimate", False, "Only say what the run will cost, after a few timed steps; writes nothing.")
    flag("set_aside_damaged", False, "Move damaged checkpoints aside and go on from the last good one.")
    flag("distributed", False, "One of several processes (TPU pod, Slurm, or the flags below).")
    text("coordinator_address", "", "host:port of process 0, where it cannot be detected.")
    number("num_processes", 0, "Number of processes, where it cannot be detected.")
    number("process_id", -1, "Number of this process, where it cannot be detected.")
    number("heartbeat_timeout_seconds", 100, "A process that is silent for so long is lost.", 1)


def start(given: flags.FlagValues) -> bool:
    """Train as the flags ask, in this process; True if the run is complete."""
    config = given.config
    if config is None or not (given.workdir or given.estimate):
        raise InputError("give --config=configs/RECIPE.py and --workdir=DIR (or --estimate)")
    try:
        config.lock()
    except OSError:  # what stands for a recipe that could not be loaded raises this at any use
        name = config_flags.get_config_filename(given["config"])
        raise InputError(f"--config={name}: no such file; recipes are in configs/") from None
    configure_jax()
    from ctssl_jax import distributed, lost_host
    from data_prep.dataset import Dataset

    Dataset.open(config.dataset, ("train", "validation"))  # from a store: before others wait

    distributed.initialize(
        given.distributed,
        given.coordinator_address,
        given.num_processes,
        given.process_id,
        given.heartbeat_timeout_seconds,
    )
    with lost_host.ending_together(given.workdir or ""):
        return train(config, given.workdir, estimate=given.estimate, set_aside_damaged=given.set_aside_damaged)


def main(argv: list[str]) -> int:
    """Command line."""
    if not start(flags.FLAGS):
        raise StartAgain("stopped before the last step; run the same command again to continue")
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
