r"""The content of a dataset: cohort table, contact sheet, and checks.

    ctssl describe --dataset=DATASET [--html] [--verify
        [--audit_dir=DATASET-audit --input_dir=SCANS]]

Prints the table and writes cohort.csv and contact_sheet.png into --output_dir (default:
DATASET-description). With --html it also writes pages: of every volume into the folder `html`
there, of what was refused into the folder `refused` of the private audit directory. The exit code
is 1 if a table is damaged, with --verify if anything is wrong. With --verify, --audit_dir and
--input_dir it also searches the dataset for values of the source headers (see
`data_prep.privacy.leaks`).
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

import csv
from typing import TYPE_CHECKING

from absl import flags

from data_prep.system import command_line
from data_prep.system.errors import InputError
from data_prep.system.files import make_folder, written_whole

if TYPE_CHECKING:
    from data_prep.dataset.reader import Dataset

FLAGS = flags.FLAGS


def main(argv: list[str]) -> int:
    from data_prep.dataset.cohort import (
        cohort_table,
        contact_sheet,
        label_rows,
        notes_on_parts,
        table_text,
    )
    from data_prep.dataset.pages import write_pages
    from data_prep.dataset.reader import Dataset
    from data_prep.dataset.schema import REJECTED_FILE, rules_lines
    from data_prep.dataset.storage import write_table
    from data_prep.pipeline.refusals import audit_dir_of, write_refusals
    from data_prep.system import stores

    dataset = Dataset.open(FLAGS.dataset)
    dataset.fetch(dataset.preparation["splits"])
    alone = FLAGS.html and not FLAGS.input_dir  # the audit directory for the pages
    if not alone and (
        bool(FLAGS.audit_dir) != bool(FLAGS.input_dir) or (FLAGS.audit_dir and not FLAGS.verify)
    ):
        raise InputError(
            "--audit_dir and --input_dir belong together, and to --verify; give all three or "
            "none, or --audit_dir with --html"
        )
    is_merged = "parts" in dataset.preparation
    if FLAGS.audit_dir and is_merged:
        raise InputError(
            f"--dataset={dataset.directory}: was merged from several datasets; search each part"
        )
    audit_dir = audit_dir_of(dataset, FLAGS.audit_dir) if FLAGS.html and not is_merged else None
    if problems := dataset.damaged_tables():
        return _wrong(problems)
    with open(dataset.directory / REJECTED_FILE, newline="") as file:
        rejected = list(csv.DictReader(file))
    rows = cohort_table(dataset.volumes(), rejected) + label_rows(dataset)
    number = sum(row["synthetic"] for row in dataset.volumes())
    synthetic = f" (SYNTHETIC: {number} of {len(dataset.volumes())} volumes)" if number else ""
    print(table_text(rows, f"{dataset.directory}{synthetic}"))
    for note in [*notes_on_parts(dataset), *map(str.strip, rules_lines(dataset.preparation))]:
        print(f"NOTE {note}")
    named = FLAGS.dataset.rstrip("/")
    on_store = stores.is_url(named)
    named = named.rsplit("/", 1)[-1] if on_store else stores.local_path(named, "--dataset")
    output_dir = FLAGS.output_dir or f"{named}-description"
    output_dir = stores.local_path(output_dir, "--output_dir", "choose a folder here")
    make_folder(output_dir, "--output_dir")
    columns = ("group", "item", "value")
    cells = [dict(zip(columns, row, strict=True)) for row in rows]
    write_table(output_dir / "cohort.csv", columns, cells)
    print(f"Written: {output_dir}/cohort.csv")
    if problems := _verify(dataset) if FLAGS.verify else []:
        return _wrong(problems)
    with written_whole(output_dir / "contact_sheet.png") as temporary:
        contact_sheet(dataset, FLAGS.num_slices, FLAGS.seed).save(temporary, "PNG")
    print(f"Written: {output_dir}/contact_sheet.png")
    if FLAGS.html:
        write_pages(dataset, rows, output_dir / "html")
        print(f"Written: {output_dir}/html/index.html")
    if audit_dir:
        print(f"Written: {write_refusals(audit_dir)} (private)")
    if "validation" not in dataset.preparation["splits"]:  # no training takes it
        command_line.suggest(
            "embed", "--workdir=RUN", f"--input={FLAGS.dataset}", "--output=embeddings.npz"
        )
        return 0
    size = dataset.preparation["image_size"]
    recipe = f"--config=masked_region{':small' if size <= 64 else ''}"
    sizes = [] if size in (64, 512) else [f"--config.image_size={size}"]  # those of the recipes
    command_line.suggest(
        "train", recipe, f"--config.dataset={FLAGS.dataset}", *sizes, "--workdir=RUN"
    )
    return 0


def _wrong(problems: list[str]) -> int:
    for problem in problems:
        print(f"WRONG {problem}")
    return 1


def _verify(dataset: "Dataset") -> list[str]:
    from data_prep.dataset.verify import verify
    from data_prep.privacy.leaks import search
    from data_prep.scan.remote_archives import archive_directory
    from data_prep.system import stores
    from data_prep.system.workers import WorkerPool, usable_cores

    with WorkerPool(FLAGS.num_workers or usable_cores()) as pool:
        problems = verify(dataset, pool)
        if not problems:
            print("Verified: checksums, records, order, neighbours, tables.")
        if FLAGS.input_dir:
            input_dir = archive_directory(FLAGS.input_dir)
            if not input_dir.is_dir():
                raise InputError(
                    f"--input_dir={input_dir}: no such directory; give the folder of the scans"
                )
            audit_dir = stores.local_path(FLAGS.audit_dir, "--audit_dir")
            found = search(dataset, input_dir, audit_dir, pool)
            if found.num_damaged:
                print(f"NOTE {found.num_damaged} headers hold damaged values, searched as text.")
            if found.num_unread:
                print(
                    f"NOTE {found.num_unread} headers could not be read to their end: values of "
                    "theirs that identify someone were not searched."
                )
            elif not found.leaks:
                print("Verified: no identifying value of the source headers occurs in the dataset.")
            problems += found.leaks
    return problems


def define_flags() -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    flags.DEFINE_string("dataset", None, "Dataset directory.", required=True)
    flags.DEFINE_string(
        "output_dir",
        None,
        "Where the table and the contact sheet go (default: DATASET-description).",
    )
    flags.DEFINE_integer(
        "num_slices", 24, "Slices on the contact sheet.", lower_bound=1, upper_bound=400
    )
    flags.DEFINE_integer("seed", 0, "Seed of the choice of slices.")
    flags.DEFINE_bool(
        "html", False, "Write pages to look through: of every volume, and of what was refused."
    )
    flags.DEFINE_bool(
        "verify", False, "Check checksums, records and tables; exit code 1 if anything is wrong."
    )
    flags.DEFINE_string(
        "audit_dir",
        None,
        "With --verify and --input_dir: search the dataset for identifying values. With --html: "
        "where the pages of what was refused go (default: DATASET-audit, if it is there).",
    )
    flags.DEFINE_string(
        "input_dir", None, "Directory of the scans from which the dataset was made."
    )
    flags.DEFINE_integer(
        "num_workers", None, "Worker processes (default: the usable cores).", lower_bound=1
    )


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
