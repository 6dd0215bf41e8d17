r"""Measure what a frozen encoder has learned of patients: age, sex, ethnic group.

    ctssl attributes --workdir=RUN --dataset=DATASET --output=RESULT.json

This is the paper's section II.E and Figure 6. The middle slice of each volume (the slice of the
largest body cross-section) is encoded, and its latents are averaged. Logistic regression on the
standardised averages is fitted to the training split, with the penalty of the highest AUROC on the
validation split. The test split is scored by the AUROC of each class against the rest and by their
mean, with 95 % bootstrap intervals by patient. Ages are classes of ten years, joined where the
training split has too few patients.

Three controls:

    --encoder=untrained  the architecture of the run, random weights by --seed, and batch statistics
                         of training slices
    --encoder=pixels     the slice averaged down to about as many numbers
    --shuffled_labels    labels of training and validation shuffled among their volumes: the AUROCs
                         scatter around 0.5 from --seed to --seed, and a mean over seeds that is not
                         0.5 shows a leak

Compare an encoder with `untrained`, with `pixels`, and with the recipe `attributes`, which is
trained end to end. RESULT.csv beside RESULT.json has one row a test volume: its pseudonyms and, for
each attribute, the true class and the probabilities.
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
    flags.DEFINE_string("output", None, "Results file, ending in .json.")
    flags.DEFINE_list(
        "attributes",
        None,
        "age, sex, ethnic_group, or labels of volumes or patients; by default the first three, as "
        "far as the dataset has them.",
    )
    flags.DEFINE_string(
        "checkpoint",
        "best",
        "best (by config.best_by), last, last_good, or a step; the controls read none.",
    )
    flags.DEFINE_string(
        "encoder",
        "run",
        "run, renewed, or a control: untrained, pixels (see ctssl probe).",
    )
    flags.DEFINE_integer(
        "pooling_regions", 1, "Latents are averaged over the whole slice (1) or 4 x 4 regions (4)."
    )
    flags.DEFINE_bool("shuffled_labels", False, "Control: shuffle training and validation labels.")
    flags.DEFINE_integer("min_patients", 10, "Training patients that a class needs.")
    flags.DEFINE_integer(
        "seed", None, "Seed of shuffling, random weights and bootstrap; by default the run's."
    )
    flags.DEFINE_integer("batch_size", 0, "Slices at a time at most; 0 chooses.")


def start(flag_values: flags.FlagValues) -> None:
    """Probe as the flags ask, in this process."""
    for name in ("workdir", "output"):
        if not flag_values[name].value:
            raise InputError(f"give --{name}")
    from ctssl_jax.parallel.processes import configure_jax

    configure_jax()
    from ctssl_jax.probes.attribute_probe import attributes, table
    from ctssl_jax.release.opening import as_run

    result = attributes(
        as_run(flag_values.workdir),
        flag_values.dataset,
        flag_values.output,
        names=flag_values.attributes,
        checkpoint=flag_values.checkpoint,
        encoder=flag_values.encoder,
        pooling_regions=flag_values.pooling_regions,
        shuffled_labels=flag_values.shuffled_labels,
        min_patients=flag_values.min_patients,
        seed=flag_values.seed,
        batch_size=flag_values.batch_size,
    )
    print(table(result))
    print(f"written: {flag_values.output} and, beside it, .csv", flush=True)
    if flag_values.encoder == "run":  # a probe says little without its control
        untrained = str(flag_values.output).replace(".json", "-untrained.json")
        given = [word for word in sys.argv[1:] if not word.startswith("--output")]
        command_line.suggest("attributes", *given, "--encoder=untrained", f"--output={untrained}")
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
