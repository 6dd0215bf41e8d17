r"""Several datasets -> one, at once and without copying: a view, whose shards are links to theirs.

    python -m data_prep.merge --datasets=A,B[,C...] --output_dir=VIEW

VIEW is a dataset directory like any other (`data_prep.dataset.reader`): volumes in the order of A,
B, C within each split, tables of its own. A label that only some of them have is missing in the
others; a label of a patient holds for the patient's volumes in all. Nothing in A, B, C is touched,
and since a grown archive only adds shards, VIEW stays what it is when they grow: a snapshot, which
`describe --verify` names as such. Merge into a new directory to take in the new volumes. A part
that was prepared again is refused when VIEW is read.

The datasets must share the pseudonym key (--pseudonym_key_file of data_prep.prepare) and the splits
of the patients whom they share (--same_splits_as). Images must be alike: windows, size, masks or
none.

--link=symlink: relative links, over file systems as well; a part that is moved or removed is missed
at once. hard: the same bytes under two names, which stay when a part is removed; one file system.
copy: independent of the parts.
"""

from pathlib import Path

from absl import flags

from data_prep.system import command_line

FLAGS = flags.FLAGS


def main(argv: list[str]) -> int:
    from data_prep.dataset.merge import merge
    from data_prep.dataset.reader import Dataset
    from data_prep.dataset.schema import PREPARATION_FILE

    output_dir = Path(FLAGS.output_dir).expanduser()
    parts = [Dataset.open(Path(name)) for name in FLAGS.datasets if name]
    preparation, changed = merge(parts, output_dir, FLAGS.link)
    state = "is complete" if changed else "is complete already: nothing to do"
    print(f"{output_dir} {state}{' (SYNTHETIC data)' * preparation['synthetic']}.")
    for split, facts in preparation["splits"].items():
        print(
            f"  {split}: {facts['num_volumes']} volumes of {facts['num_patients']} patients, "
            f"{facts['num_slices']} slices"
        )
    named = dict.fromkeys(name for part in preparation["parts"] for name in part["options"])
    differing = [
        name for name in named if name not in preparation["options"] and name != "same_splits_as"
    ]
    if differing:
        print(
            f"NOTE: they were prepared with different {', '.join(differing)}; "
            f"{PREPARATION_FILE} says how."
        )
    return 0


def define_flags() -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    flags.DEFINE_list("datasets", None, "Dataset directories, separated by commas.", required=True)
    flags.DEFINE_string("output_dir", None, "Directory of the view to make.", required=True)
    flags.DEFINE_enum(
        "link", "symlink", ["symlink", "hard", "copy"], "How its shards are those of the datasets."
    )


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
