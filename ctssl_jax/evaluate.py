r"""Measure a trained model on a split of a dataset.

    ctssl evaluate --workdir=RUN --dataset=DATASET --split=test --output=RESULT.json

Every slice is scored, the slices of a volume are averaged, and the results are mean and standard
deviation over volumes with a 95 % bootstrap interval by patient. Beside RESULT.json stand
RESULT.csv (one row a volume), RESULT.png (of slices spread over the split: input, target,
prediction and difference; or outlines of masks; or the truth and the probability of each class) and
RESULT.npz (the same as arrays).

A label gives AUROC, average precision, calibration, sensitivity and specificity at a threshold that
the validation split fixes, the same for exams, and AUROC by group of patients. A mask gives Dice
and IoU of slices, volumes and patients.
RESULT.predictions.npz contains the predictions for each slice, so that runs can be compared in
pairs.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

from absl import flags

from data_prep.dataset.schema import SPLITS
from data_prep.system import command_line
from data_prep.system.errors import InputError


def define_flags() -> None:
    """Called only if this module is the program: other programs define flags of the same names."""
    text = flags.DEFINE_string
    text("workdir", None, "Run directory, or an export's folder, zip or hf-hub:ORG/NAME.")
    text("dataset", None, "Dataset directory; by default the dataset of the training.")
    flags.DEFINE_enum("split", "test", SPLITS, "Split to score.")
    text("output", None, "Results file, ending in .json.")
    text("checkpoint", "best", "best (by config.best_by), last, last_good (undamaged), or a step.")
    flags.DEFINE_integer(
        "batch_size",
        0,
        "Slices at a time at most; 0 chooses by memory. Does not change results.",
    )
    flags.DEFINE_bool(
        "baselines",
        False,
        "Also score predictors without a model (reads training slices).",
    )


def start(values: flags.FlagValues) -> None:
    """Evaluate as the flags ask, in this process."""
    for name in ("workdir", "output"):
        if not values[name].value:
            raise InputError(f"give --{name}")
    from ctssl_jax.parallel.processes import configure_jax

    configure_jax()
    from ctssl_jax.evaluation.measure import evaluate, table
    from ctssl_jax.release.opening import as_run

    result = evaluate(
        as_run(values.workdir),
        values.dataset,
        values.split,
        values.output,
        checkpoint=values.checkpoint,
        batch_size=values.batch_size,
        baselines=values.baselines,
    )
    print(table(result))
    print(
        f"written: {values.output} and, beside it, files of this name with other endings",
        flush=True,
    )
    run, results = f"--workdir={values.workdir}", f"--results={values.output}"
    folder = f"--output_dir={command_line.beside(values.workdir, '-export')}"
    command_line.suggest("export", run, folder, results, "--license=LICENCE")


def main(argv: list[str]) -> int:
    """Command line."""
    start(flags.FLAGS)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
