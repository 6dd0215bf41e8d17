r"""Train a model: pretraining and downstream.

    ctssl train --config=masked_region --config.dataset=DATASET \
        --workdir=RUN

Run it again to resume where it stopped: a checkpoint holds the whole state, also the order of the
data. SIGTERM and Ctrl-C save and end with exit code 75. `--config.init_from=OTHER_RUN` starts from
the weights of another run. `--estimate` prints the cost of the run after a few timed steps, and
writes nothing; with `--topology=v5e:4x4` it compiles the step for those TPUs instead, without any
TPU or dataset. On several hosts start one process on each with `--distributed`.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

import functools

from absl import flags

from ctssl_jax.training.recipe_files import define_flag, recipe_names
from data_prep.system import command_line, early_stop
from data_prep.system.errors import InputError, StartAgain

# A host with an empty cache fetches while the others wait.
MOST_SECONDS_TO_FETCH = 48 * 3600.0


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Called if this module is the program: other programs may have flags of the same names."""
    define_flag(
        help="Recipe, e.g. masked_region:small, or a file; --config.FIELD=VALUE.",
        flag_values=flag_values,
    )
    text, flag, number = (
        functools.partial(define, flag_values=flag_values)
        for define in (flags.DEFINE_string, flags.DEFINE_bool, flags.DEFINE_integer)
    )
    text("workdir", None, "Run directory: made, or resumed.")
    flag("estimate", False, "Print the cost of the run after a few timed steps; writes nothing.")
    text("topology", "", "--estimate for TPUs that need not be there: v5e:4x4; v6e:4x4:2 (slices).")
    flag("set_aside_damaged", False, "Move damaged checkpoints and resume from the last good one.")
    number("profile", 0, "Trace so many steps into RUN/profile, for TensorBoard and XProf.", 0)
    flag("distributed", False, "One of several processes (TPU pod, Slurm, or the flags below).")
    text("coordinator_address", "", "host:port of process 0, where it cannot be detected.")
    number("num_processes", 0, "Number of processes, where it cannot be detected.")
    number("process_id", -1, "Number of this process, where it cannot be detected.")
    number("heartbeat_timeout_seconds", 100, "A process that is silent for so long is lost.", 1)


def start(flag_values: flags.FlagValues) -> bool:
    """Train as the flags ask, in this process; True if the run is complete."""
    config = flag_values.config
    if config is None or not (flag_values.workdir or flag_values.estimate):
        missing = [] if config else ["--config=RECIPE"]
        if not (flag_values.workdir or flag_values.estimate):
            missing.append("--workdir=DIR (or --estimate)")
        names = "" if config else f"; recipes: {', '.join(recipe_names())}"
        raise InputError(f"give {' and '.join(missing)}{names}")
    if flag_values.profile and flag_values.estimate:
        raise InputError("--profile traces a training: leave --estimate out")
    if flag_values.topology and not flag_values.estimate:
        raise InputError("--topology compiles for an estimate; add --estimate")
    config.lock()
    from ctssl_jax.parallel.processes import configure_jax, initialize

    configure_jax()
    import jax

    from ctssl_jax.parallel import lost_host
    from ctssl_jax.parallel.meeting import refusing_together
    from ctssl_jax.release.opening import as_run
    from ctssl_jax.training.estimate import estimate
    from ctssl_jax.training.loop import train
    from ctssl_jax.training.topology import estimate_topology
    from data_prep.dataset.reader import Dataset
    from data_prep.system import stores

    if flag_values.topology:
        estimate_topology(config, flag_values.topology)
        return True
    initialize(
        flag_values.distributed,
        flag_values.coordinator_address,
        flag_values.num_processes,
        flag_values.process_id,
        flag_values.heartbeat_timeout_seconds,
    )
    dataset = None
    with lost_host.ending_together(flag_values.workdir or ""):
        if stores.is_url(config.dataset):
            with refusing_together(f"fetching {config.dataset}", MOST_SECONDS_TO_FETCH):
                whole = ("validation",) if config.shuffle == "windowed" else ("train", "validation")
                dataset = Dataset.open(config.dataset, whole)
        if config.init_from:
            with refusing_together(f"opening {config.init_from}", MOST_SECONDS_TO_FETCH):
                config.init_from = str(as_run(config.init_from, "config.init_from"))
        if flag_values.estimate:
            estimate(config, dataset=dataset)
            return True
        finished = train(
            config,
            flag_values.workdir,
            dataset=dataset,
            set_aside_damaged=flag_values.set_aside_damaged,
            profile_steps=flag_values.profile,
        )
    if finished and jax.process_index() == 0:
        run = flag_values.workdir
        output = f"--output={command_line.beside(run, '-test.json')}"
        command_line.suggest("evaluate", f"--workdir={run}", output)
    return finished


def main(argv: list[str]) -> int:
    """Command line."""
    early_stop.leave_at_once()  # until the first step, when there is something to save
    if not start(flags.FLAGS):
        raise StartAgain("stopped before the last step; run the same command again to continue")
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
