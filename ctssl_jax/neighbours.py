r"""Picture of slices and the most like slices of other patients, by a frozen encoder.

    ctssl neighbours --workdir=RUN --dataset=DATASET --output=NEIGHBOURS.png

Six slices, spread over the volumes of the split and from low to high, each beside the five nearest
ones of other patients by cosine of standardised embeddings (as in `ctssl probe`); their places in
the scans are written on the row. The picture shows patients: keep it with the dataset.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

from absl import flags

from data_prep.dataset.schema import SPLITS
from data_prep.system import command_line
from data_prep.system.errors import InputError


def define_flags() -> None:
    """Only where this module is the program: others define flags of the same names."""
    flags.DEFINE_string(
        "workdir", None, "Run directory of any task, or an export's folder, zip or hf-hub:."
    )
    flags.DEFINE_string(
        "dataset", None, "Dataset directory; by default the one that the run was trained on."
    )
    flags.DEFINE_enum("split", "test", SPLITS, "Split that is searched.")
    flags.DEFINE_string("output", None, "Picture, ending in .png.")
    flags.DEFINE_string(
        "checkpoint", "best", "best (by config.best_by), last, last_good, or a step."
    )
    flags.DEFINE_string(
        "encoder",
        "run",
        "run, renewed, untrained, pixels or handcrafted (see ctssl probe).",
    )
    flags.DEFINE_integer("slices", 6, "Rows.", lower_bound=1, upper_bound=64)
    flags.DEFINE_integer("batch_size", 0, "Slices at a time at most; 0 chooses.")


def start(flag_values: flags.FlagValues) -> None:
    """Draw as the flags ask, in this process."""
    for name in ("workdir", "output"):
        if not flag_values[name].value:
            raise InputError(f"give --{name}")
    from ctssl_jax.parallel.processes import configure_jax

    configure_jax()
    from ctssl_jax.probes.neighbours import neighbours
    from ctssl_jax.release.opening import as_run

    neighbours(
        as_run(flag_values.workdir),
        flag_values.dataset,
        flag_values.output,
        split=flag_values.split,
        checkpoint=flag_values.checkpoint,
        encoder=flag_values.encoder,
        num_slices=flag_values.slices,
        batch_size=flag_values.batch_size,
    )
    print(f"written: {flag_values.output}", flush=True)
    output = command_line.beside(flag_values.workdir, "-probe.json")
    command_line.suggest("probe", f"--workdir={flag_values.workdir}", f"--output={output}")


def main(argv: list[str]) -> int:
    """Command line."""
    start(flags.FLAGS)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
