r"""Embeddings of scans by a trained model: per slice, and their mean and maximum per volume.

    python -m ctssl_jax.embed --workdir=RUN --input=SCANS --output=FILE.parquet

SCANS is a folder of one scan or of many, a zip file, a DICOM or NIfTI file, or a prepared dataset.
Raw scans are read as `data_prep.prepare` reads them, with the run's window and image size: the
embeddings are those of the dataset that it would make. `ctssl_jax.inference.embedding_files` says
what the files hold; FILE.npz instead of FILE.parquet holds the same.

FILE.rejected.csv lists refused series. Killed at any moment, the same command continues where it
stopped, with the same result to the byte on the same device (FILE.parts holds finished volumes
until then).

Raw scans get pseudonyms, as in a dataset; the private folder FILE-audit holds their key (unless
--pseudonym_key_file names one, such as a dataset's) and `sources.csv`, which links volumes to
files. Keep it with the scans.
"""

import functools
from pathlib import Path

from absl import flags

from ctssl_jax.inference import scan_flags
from data_prep.system import command_line
from data_prep.system.errors import InputError, RunFailed

_FLAGS_OF_RAW_SCANS = (*scan_flags.ALL, "pseudonym_key_file", "num_workers")


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    text = functools.partial(flags.DEFINE_string, flag_values=given)
    text("workdir", None, "Run directory of ctssl_jax.train, of any task.")
    text("input", None, "Raw scans (a folder, a zip, DICOM or NIfTI file) or a prepared dataset.")
    text("output", None, "FILE.parquet or FILE.npz.")
    text("checkpoint", "best", "best (by validation loss), last, last_good (undamaged), or a step.")
    text("split", None, "train, validation or test of a dataset; by default all.")
    text(
        "pseudonym_key_file",
        None,
        "File with the key of the pseudonyms (default: made in FILE-audit).",
    )
    flags.DEFINE_integer(
        "batch_size", 0, "Slices at a time; 0 takes the training's.", flag_values=given
    )
    flags.DEFINE_integer(
        "num_workers",
        None,
        "Processes that decode raw scans (default: the usable cores, at most 4).",
        lower_bound=0,
        flag_values=given,
    )
    scan_flags.define(given)
    flags.adopt_module_key_flags(scan_flags, given)  # --help shows them, too


def start(given: flags.FlagValues) -> bool:
    """Embed as the flags ask, in this process."""
    for name in ("workdir", "input", "output"):
        if not given[name].value:
            raise InputError(f"give --{name}")
    if (Path(given.input).expanduser() / "preparation.json").is_file():
        for name in _FLAGS_OF_RAW_SCANS:
            if given[name].present:
                raise InputError(
                    f"--{name} is of raw scans, and --input={given.input} is a dataset; leave it "
                    "out"
                )
    from ctssl_jax.parallel.processes import configure_jax

    configure_jax()
    from ctssl_jax.inference.embedding import embed, summary

    try:
        result = embed(
            given.workdir,
            given.input,
            given.output,
            checkpoint=given.checkpoint,
            split=given.split,
            archive=given.archive,
            metadata_csv=given.metadata_csv,
            rules=scan_flags.rules_of(given),
            pseudonym_key_file=given.pseudonym_key_file,
            batch_size=given.batch_size,
            num_workers=given.num_workers,
        )
    except OSError as error:
        raise RunFailed(f"{error}; run the same command again to continue") from None
    print(summary(result))
    state = "written" if result["changed"] else "complete already, nothing to do"
    print(
        f"{state}: {given.output} and, beside it, files of that name and other endings", flush=True
    )
    return True


def main(argv: list[str]) -> int:
    """Command line."""
    start(flags.FLAGS)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
