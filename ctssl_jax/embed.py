r"""Embeddings of scans by a trained model: per slice, and their mean and maximum per volume.

    ctssl embed --workdir=RUN --input=SCANS --output=FILE.parquet

SCANS is a folder of one scan or of many, a zip file, a DICOM or NIfTI file, or a prepared dataset.
Raw scans are read as `data_prep.prepare` reads them, with the window and the image size of the run:
the embeddings equal the embeddings of a dataset of these scans. FILE.npz instead of FILE.parquet
holds the same; `ctssl_jax.inference.embedding_files` describes both.

FILE.rejected.csv lists refused series. After a kill at any moment the same command continues, with
the same result to the byte on the same device (FILE.parts holds the finished volumes until then).

Raw scans get pseudonyms, as in a dataset; the private folder FILE-audit holds their key (unless
--pseudonym_key_file names one, such as a dataset's) and `sources.csv`, which links volumes to
files. Keep it with the scans.

With --watch SCANS is a folder that grows. Each exam is embedded once, when its files have stopped
coming (--settle_s), into FILE.scans/PSEUDONYM.npz; FILE is written at the end (--idle_exit_s).
FILE-audit/embeddings.jsonl has the files of each.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

from absl import flags

from ctssl_jax.inference import scan_flags
from data_prep.dataset.schema import SPLITS
from data_prep.system import command_line
from data_prep.system.errors import InputError

_FLAGS_OF_RAW_SCANS = (*scan_flags.ALL, "pseudonym_key_file", "num_workers")


def define_flags() -> None:
    """Only where this module is the program: others define flags of the same names."""
    flags.DEFINE_string(
        "workdir", None, "Run directory of any task, or an export's folder, zip or hf-hub:."
    )
    flags.DEFINE_string(
        "input", None, "Raw scans (a folder, a zip, DICOM or NIfTI file) or a prepared dataset."
    )
    flags.DEFINE_string("output", None, "FILE.parquet or FILE.npz.")
    flags.DEFINE_string(
        "checkpoint", "best", "best (by config.best_by), last, last_good (undamaged), or a step."
    )
    flags.DEFINE_enum("split", None, SPLITS, "Split of a dataset; by default all.")
    flags.DEFINE_string(
        "pseudonym_key_file",
        None,
        "File with the key of the pseudonyms (default: made in FILE-audit).",
    )
    flags.DEFINE_integer("batch_size", 0, "Slices at a time at most; 0 chooses.")
    flags.DEFINE_integer(
        "num_workers",
        None,
        "Processes that decode raw scans (default: the usable cores, at most 4).",
        lower_bound=0,
    )
    scan_flags.define()
    scan_flags.define_watch()
    flags.adopt_module_key_flags(scan_flags)  # --help shows them, too


def start(flag_values: flags.FlagValues) -> None:
    """Embed as the flags ask, in this process."""
    for name in ("workdir", "input", "output"):
        if not flag_values[name].value:
            raise InputError(f"give --{name}")
    from data_prep.dataset.schema import PREPARATION_FILE
    from data_prep.raw.scans import local_input

    if (local_input(flag_values.input) / PREPARATION_FILE).is_file():
        for name in _FLAGS_OF_RAW_SCANS:
            if flag_values[name].present:
                raise InputError(
                    f"--{name} is for raw scans, and --input={flag_values.input} is a dataset; "
                    "leave it out"
                )
        if flag_values.watch:
            raise InputError(
                f"--watch is for raw scans, and --input={flag_values.input} is a dataset"
            )
    scan_flags.check_watch(flag_values, only=(), never=("split",))
    from ctssl_jax.parallel.processes import configure_jax

    configure_jax()
    from ctssl_jax.inference.embedding import embed, summary
    from ctssl_jax.inference.serving import Watch, watch_embeddings
    from ctssl_jax.release.opening import as_run

    run, places = as_run(flag_values.workdir), (flag_values.input, flag_values.output)
    settings = dict(
        checkpoint=flag_values.checkpoint,
        archive=flag_values.archive,
        metadata_csv=flag_values.metadata_csv,
        rules=scan_flags.rules_of(flag_values),
        pseudonym_key_file=flag_values.pseudonym_key_file,
        batch_size=flag_values.batch_size,
        num_workers=flag_values.num_workers,
    )
    if flag_values.watch:
        watch = Watch(flag_values.settle_s, flag_values.idle_exit_s)
        print(summary(watch_embeddings(run, *places, watch, **settings)))
        print(f"written: {flag_values.output} and, beside it, files of that name and other endings")
        return
    result = embed(run, *places, split=flag_values.split, **settings)
    print(summary(result))
    state = "written" if result["changed"] else "complete already, nothing to do"
    print(f"{state}: {flag_values.output} and, beside it, files of that name and other endings")
    command_line.suggest("probe", f"--workdir={flag_values.workdir}", "--output=PROBE.json")


def main(argv: list[str]) -> int:
    """Command line."""
    start(flags.FLAGS)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
