r"""What a frozen encoder knows of patients: age, sex, ethnic group (paper, section II.E and Figure
6).

    python -m ctssl_jax.attributes --workdir=RUN --dataset=DATASET --output=RESULT.json

Each volume's middle slice (that of the largest body cross-section) is encoded, the latents are
averaged, and logistic regression on the standardised averages is fitted to the training split; its
penalty is the one with the highest AUROC on the validation split. The test split is scored by the
AUROC of each class against the rest and their mean, with 95 % bootstrap intervals by patient. Ages
are classes of ten years, joined where the training split has too few patients.

Controls: `--encoder=untrained`, the run's architecture with random weights by --seed and batch
statistics of training slices; `--encoder=pixels`, the slice averaged down to about as many numbers;
`--shuffled_labels`, labels of training and validation shuffled among their volumes: its AUROCs
scatter around 0.5 from --seed to --seed, and a mean over seeds that is not 0.5 shows a leak. What
an encoder adds is seen against `untrained`, `pixels`, and configs/attributes.py, trained end to
end.

Beside RESULT.json stands RESULT.csv, one row a test volume with its pseudonyms and, of each
attribute, true class and probabilities.
"""

import functools

from absl import flags

from data_prep.system import command_line
from data_prep.system.errors import InputError


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    text = functools.partial(flags.DEFINE_string, flag_values=given)
    number = functools.partial(flags.DEFINE_integer, flag_values=given)
    text("workdir", None, "Run directory of ctssl_jax.train, of any task.")
    text("dataset", None, "Dataset directory; by default the one that the run was trained on.")
    text("output", None, "Results file, ending in .json.")
    flags.DEFINE_list(
        "attributes",
        None,
        "age, sex, ethnic_group, or labels of volumes or patients; by default the first three, as "
        "far as they can be.",
        flag_values=given,
    )
    text(
        "checkpoint",
        "best",
        "best (by validation loss), last, last_good, or a step; the controls read none.",
    )
    text("encoder", "run", "run, or a control: untrained (random weights), pixels (no network).")
    number(
        "pooling_regions", 1, "Latents are averaged over the whole slice (1) or 4 x 4 regions (4)."
    )
    flags.DEFINE_bool(
        "shuffled_labels",
        False,
        "Control: shuffle training and validation labels.",
        flag_values=given,
    )
    number("min_patients", 10, "Training patients that a class needs.")
    number("seed", None, "Of shuffling, random weights and bootstrap; by default the run's.")
    number("batch_size", 0, "Slices at a time; 0 takes the training's.")


def start(given: flags.FlagValues) -> bool:
    """Probe as the flags ask, in this process."""
    for name in ("workdir", "output"):
        if not given[name].value:
            raise InputError(f"give --{name}")
    from ctssl_jax.parallel.processes import configure_jax

    configure_jax()
    from ctssl_jax.probes.attribute_probe import attributes, table

    result = attributes(
        given.workdir,
        given.dataset,
        given.output,
        names=given.attributes,
        checkpoint=given.checkpoint,
        encoder=given.encoder,
        pooling_regions=given.pooling_regions,
        shuffled_labels=given.shuffled_labels,
        min_patients=given.min_patients,
        seed=given.seed,
        batch_size=given.batch_size,
    )
    print(table(result))
    print(f"written: {given.output} and, beside it, .csv", flush=True)
    return True


def main(argv: list[str]) -> int:
    """Command line."""
    start(flags.FLAGS)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
