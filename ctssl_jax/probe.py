r"""Measure what a frozen encoder has learned beside its own task.

    ctssl probe --workdir=RUN --dataset=DATASET --output=RESULT.json

The weights of the encoder stay as they are. Simple probes are fitted to its features of training
slices, and the validation split chooses their settings. All slices of the test split are scored as
`ctssl_jax.evaluate` scores them: per volume, with a 95 % bootstrap interval by patient. The targets
and corruptions are the same for every encoder:

    rotation, flip    which of 4 (3) ways the slice was turned, the same labels as in evaluation
    clean             the slice itself
    masked_region     the slice, 20 % of whose area is covered
    denoising         the slice, half of whose pixels are salt or pepper
    next_slice        the slice after it, of the same volume and not across a gap
    position          how high the slice lies in its volume, from 0 to 1: R^2
    order             which of two slices of a volume, 3 to 30 mm apart, lies higher: AUROC
    neighbours        the slices of the same volume within 10 mm, searched for among the slices of
                      all scored volumes by cosine: recall. Nothing is fitted
    whole_position, whole_order, whole_neighbours
                      the same by the mean over the whole slice, which `ctssl embed` gives; all
                      others see means over 4 x 4 regions, and so where in the slice things are

and so are the two kinds of probes (position and order: linear, neighbours: knn; their penalties
are chosen by training volumes left out of the fit):

    linear            labels: logistic regression on latents averaged over 4 x 4 regions
                      slices: ridge regression from each latent to the 4 x 4 pixels that it covers
    knn               the nearest training slices by cosine of the averaged latents: the shares of
                      their labels, or their mean slice

Three controls show what an encoder adds. `--encoder=untrained` has the architecture of the run,
random weights, and batch statistics of training slices. `--encoder=pixels` has no network: labels
and neighbours get the slice averaged down to as many numbers, the linear decoder gets the mean of
each block of 4 x 4 pixels. `--encoder=handcrafted` has 140 statistics of intensity, shape and
texture, by scikit-image (`pip install '.[handcrafted]'`), and mean, spread and ends of each block.
`--encoder=renewed` is the run's encoder with batch statistics of whole training slices: a run that
hides parts of its slices has those of what it left, and its features of whole slices are shifted.
RESULT.csv beside RESULT.json has one row a volume.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

import sys

from absl import flags

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
    flags.DEFINE_enum(
        "split",
        "test",
        ["test", "validation"],
        "Split to score; validation also chooses the probes' settings.",
    )
    flags.DEFINE_string("output", None, "Results file, ending in .json.")
    flags.DEFINE_string(
        "checkpoint",
        "best",
        "best (by config.best_by), last, last_good, or a step; the controls read none.",
    )
    flags.DEFINE_string(
        "encoder",
        "run",
        "run, renewed (with batch statistics of whole slices), or a control: untrained (random "
        "weights), pixels or handcrafted (no network).",
    )
    flags.DEFINE_list(
        "targets",
        [],
        "Of rotation, flip, clean, masked_region, denoising, next_slice; by default all. Position, "
        "order and neighbours come in any case.",
    )
    flags.DEFINE_integer(
        "max_slices", 4096, "Training slices at most, and validation slices to choose settings by."
    )
    flags.DEFINE_integer("batch_size", 0, "Slices at a time at most; 0 chooses.")


def start(flag_values: flags.FlagValues) -> None:
    """Probe as the flags ask, in this process."""
    for name in ("workdir", "output"):
        if not flag_values[name].value:
            raise InputError(f"give --{name}")
    from ctssl_jax.parallel.processes import configure_jax

    configure_jax()
    from ctssl_jax.probes.probing import TARGETS, probe, table
    from ctssl_jax.release.opening import as_run

    result = probe(
        as_run(flag_values.workdir),
        flag_values.dataset,
        flag_values.output,
        checkpoint=flag_values.checkpoint,
        encoder=flag_values.encoder,
        split=flag_values.split,
        targets=flag_values.targets or TARGETS,
        max_slices=flag_values.max_slices,
        batch_size=flag_values.batch_size,
    )
    print(table(result))
    print(f"written: {flag_values.output} and, beside it, .csv", flush=True)
    if flag_values.encoder == "run":  # a probe says little without its control
        untrained = str(flag_values.output).replace(".json", "-untrained.json")
        given = [word for word in sys.argv[1:] if not word.startswith("--output")]
        command_line.suggest("probe", *given, "--encoder=untrained", f"--output={untrained}")
    else:
        run, folder = flag_values.workdir, command_line.beside(flag_values.workdir, "-export")
        command_line.suggest(
            "export", f"--workdir={run}", f"--output_dir={folder}", "--license=LICENCE"
        )


def main(argv: list[str]) -> int:
    """Command line."""
    start(flags.FLAGS)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
