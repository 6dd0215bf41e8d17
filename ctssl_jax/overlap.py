r"""Which series of yours a published model was trained on.

    ctssl overlap --model=hf-hub:ORG/NAME@REVISION --series=MY_SERIES.csv

MY_SERIES is a CSV with the column SeriesInstanceUID, or a text with one UID a line. It stays on
this machine: the list is the model's (`public_series.csv` of an export with --public_series), of
which no weights are fetched. Series of private archives are in no such list.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

from absl import flags

from data_prep.system import command_line
from data_prep.system.errors import InputError


def define_flags() -> None:
    """Only where this module is the program: others define flags of the same names."""
    flags.DEFINE_string("model", None, "An export's folder or zip file, or hf-hub:ORG/NAME.")
    flags.DEFINE_string("series", None, "Your Series Instance UIDs.")


def start(flag_values: flags.FlagValues) -> None:
    """Print the series of both lists, and how many there are."""
    for name in ("model", "series"):
        if not flag_values[name].value:
            raise InputError(f"give --{name}")
    from ctssl_jax.release.public_series import overlap, read_series

    own = read_series(flag_values.series)
    found = overlap(flag_values.model, own)
    for split, uids in found.items():
        for uid in uids:
            print(f"{split:10}   {uid}")
    print(
        f"of {len(set(own)):,} series the model was trained on {len(found['train']):,}, and "
        f"{len(found['validation']):,} chose its checkpoint",
        flush=True,
    )
    command_line.suggest(
        "embed", f"--workdir={flag_values.model}", "--input=SCANS", "--output=FILE.npz"
    )


def main(argv: list[str]) -> int:
    """Command line."""
    start(flags.FLAGS)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
