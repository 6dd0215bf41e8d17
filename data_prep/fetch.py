"""Dataset on an object store -> a copy on this machine.

    ctssl fetch --dataset=gs://BUCKET/DATASET [--splits=train,validation]

Prints the directory of the copy, which every command takes as a dataset. Commands that take the URL
use the same copy and fetch the files that it lacks. Killed at any moment, the same command
continues. Copies lie below $CTSSL_CACHE_DIR (default: the user's cache folder). Only the user
removes them.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

from absl import flags

from data_prep.system import command_line

FLAGS = flags.FLAGS


def main(argv: list[str]) -> int:
    from data_prep.dataset.reader import Dataset

    dataset = Dataset.open(FLAGS.dataset)
    dataset.fetch(FLAGS.splits or dataset.preparation["splits"])
    print(dataset.directory, flush=True)
    command_line.suggest("describe", f"--dataset={FLAGS.dataset}", "--verify", aside=True)
    return 0


def define_flags() -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    flags.DEFINE_string("dataset", None, "URL of the dataset.", required=True)
    flags.DEFINE_list("splits", [], "Splits whose shards are fetched (default: all).")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
