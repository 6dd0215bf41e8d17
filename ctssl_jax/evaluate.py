r"""Measure a trained model on a split of a dataset.

    python -m ctssl_jax.evaluate --workdir=RUN --dataset=DATASET --split=test --output=RESULT.json

Every slice is scored, the slices of a volume are averaged, and the results are mean and standard
deviation over volumes with a 95 % bootstrap interval by patient. Beside RESULT.json stand
RESULT.csv (one row a volume), RESULT.png (input, target, prediction and difference of slices spread
over the split) and RESULT.npz (these pictures as arrays).

A label gives AUROC, average precision, calibration, sensitivity and specificity at a threshold that
the validation split fixes, the same for exams, and AUROC by group of patients. A mask gives Dice
and IoU of slices, volumes and patients.
RESULT.predictions.npz holds what the model said of each slice, so that runs can be compared in
pairs.
"""

import functools

from absl import flags

from data_prep.system import command_line
from data_prep.system.errors import InputError


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    text = functools.partial(flags.DEFINE_string, flag_values=given)
    text("workdir", None, "Run directory of ctssl_jax.train.")
    text("dataset", None, "Dataset directory; by default the one that the run was trained on.")
    text("split", "test", "train, validation or test.")
    text("output", None, "Results file, ending in .json.")
    text("checkpoint", "best", "best (by validation loss), last, last_good (undamaged), or a step.")
    flags.DEFINE_integer(
        "batch_size",
        0,
        "Slices at a time; 0 takes the training's. Changes no result.",
        flag_values=given,
    )
    flags.DEFINE_bool(
        "baselines",
        False,
        "Also score predictors without a model (reads training slices).",
        flag_values=given,
    )


def start(given: flags.FlagValues) -> bool:
    """Evaluate as the flags ask, in this process."""
    for name in ("workdir", "output"):
        if not given[name].value:
            raise InputError(f"give --{name}")
    from ctssl_jax.parallel.processes import configure_jax

    configure_jax()
    from ctssl_jax.evaluation.measure import evaluate, table

    result = evaluate(
        given.workdir,
        given.dataset,
        given.split,
        given.output,
        checkpoint=given.checkpoint,
        batch_size=given.batch_size,
        baselines=given.baselines,
    )
    print(table(result))
    print(
        f"written: {given.output} and, beside it, files of that name and other endings", flush=True
    )
    return True


def main(argv: list[str]) -> int:
    """Command line."""
    start(flags.FLAGS)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
