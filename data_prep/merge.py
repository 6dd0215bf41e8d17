r"""Several datasets -> one, at once and without copying: a view, whose shards are links.

    ctssl merge --datasets=A,B[,C...] --output_dir=VIEW

VIEW is a dataset directory like any other (`data_prep.dataset.reader`): volumes in the order of A,
B, C within each split, tables of its own. A label that only some of the datasets have is missing in
the others. A label of a patient holds for the patient's volumes in all datasets. A, B, C do not
change. Since a grown archive only adds shards, VIEW stays the same when they grow: a snapshot,
which `describe --verify` names as such. Merge into a new directory to take in the new volumes. If a
part was prepared again, readers refuse VIEW.

The datasets must share the pseudonym key (--pseudonym_key_file of data_prep.prepare) and the splits
of the patients whom they share (--same_splits_as). Their images must have the same windows and
size, and all datasets must have masks or all lack them.

--link=symlink: relative links, over file systems as well. VIEW cannot be read once a part is moved
or removed. hard: the same bytes under two names, which stay when a part is removed, on one file
system. copy: independent of the parts.

--folds=N makes N datasets VIEW/fold_0 ... of the same patients (of one dataset or more), with
copied records and splits of their own: each patient is in the test split of one fold, and an eighth
of the others (rounded up) in its validation split. So a few patients are all tested once. The folds
follow from the pseudonyms, so that the same key and scans give the same folds anywhere.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

from absl import flags

from data_prep.system import command_line, stores

FLAGS = flags.FLAGS


def main(argv: list[str]) -> int:
    from data_prep.dataset.folds import write_folds
    from data_prep.dataset.merge import merge
    from data_prep.dataset.reader import Dataset
    from data_prep.dataset.schema import PREPARATION_FILE, rules_lines, summary_text

    output_dir = stores.local_path(FLAGS.output_dir, "--output_dir", "choose a folder here")
    remedy = "fetch it first: ctssl fetch"
    names = [stores.local_path(name, "--datasets", remedy) for name in FLAGS.datasets if name]
    parts = [Dataset.open(name) for name in names]
    if FLAGS.folds:
        for folder in write_folds(parts, output_dir, FLAGS.folds):
            print(summary_text(Dataset.open(folder).preparation, True, folder))
        return 0
    preparation, changed = merge(parts, output_dir, FLAGS.link)
    print(summary_text(preparation, changed, output_dir))
    for line in rules_lines(preparation):
        print(f"NOTE: {line.strip()}")
    options = dict.fromkeys(name for part in preparation["parts"] for name in part["options"])
    differing = [
        name for name in options if name not in {*preparation["options"], "same_splits_as"}
    ]
    if differing:
        print(
            f"NOTE: the datasets were prepared with different {', '.join(differing)}; "
            f"{PREPARATION_FILE} lists them."
        )
    command_line.suggest("describe", f"--dataset={output_dir}", "--verify")
    return 0


def define_flags() -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    flags.DEFINE_list("datasets", None, "Dataset directories, separated by commas.", required=True)
    flags.DEFINE_string("output_dir", None, "Directory of the view to make.", required=True)
    flags.DEFINE_enum(
        "link", "symlink", ["symlink", "hard", "copy"], "How the view holds the shards."
    )
    flags.DEFINE_integer(
        "folds", 0, "Make so many datasets in which every patient is tested once.", lower_bound=0
    )


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
