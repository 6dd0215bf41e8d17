"""Flags of the commands that read raw scans, with the names that `data_prep.prepare` gives them."""

from collections.abc import Sequence

from absl import flags

from data_prep.scan.rules import ARCHIVES, Rules
from data_prep.system.errors import InputError

RULES = ("max_slice_thickness_mm", "min_slices", "require_lung", "irregular", "reconstructions")
ALL = ("archive", "metadata_csv", *RULES)


def define(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the flags."""
    flags.DEFINE_enum(
        "archive",
        "auto",
        list(ARCHIVES),
        "Kind of raw scans; auto: NIfTI for a file of that name, else DICOM.",
        flag_values=flag_values,
    )
    flags.DEFINE_string(
        "metadata_csv",
        None,
        "Table of VolumeName and the facts that NIfTI files do not hold.",
        flag_values=flag_values,
    )
    flags.DEFINE_float(
        "max_slice_thickness_mm", 3.0, "Thicker series are refused.", flag_values=flag_values
    )
    flags.DEFINE_integer(
        "min_slices",
        20,
        "Series of fewer slices are refused.",
        lower_bound=1,
        flag_values=flag_values,
    )
    flags.DEFINE_bool(
        "require_lung", True, "Refuse volumes that do not cover the chest.", flag_values=flag_values
    )
    flags.DEFINE_enum(
        "irregular",
        "keep",
        ["keep", "refuse"],
        "Volumes with gaps or uneven spacing.",
        flag_values=flag_values,
    )
    flags.DEFINE_enum(
        "reconstructions",
        "one_per_study",
        ["one_per_study", "all"],
        "Reconstructions to take of an exam.",
        flag_values=flag_values,
    )


def define_watch(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the flags of a folder that grows."""
    flags.DEFINE_bool(
        "watch",
        False,
        "Take the scans of a folder as they come, such as a PACS export.",
        flag_values=flag_values,
    )
    flags.DEFINE_float(
        "settle_s",
        60.0,
        "With --watch: an exam is taken when no file of it came or changed for so many seconds.",
        flag_values=flag_values,
    )
    flags.DEFINE_float(
        "idle_exit_s",
        0.0,
        "With --watch: end when nothing came for so many seconds; 0 goes on until it is stopped.",
        flag_values=flag_values,
    )


def check_watch(flag_values: flags.FlagValues, only: Sequence[str], never: Sequence[str]) -> None:
    """Refuse flags that do not go with --watch, or without it.

    Args:
      flag_values: the flags.
      only: flags that need --watch.
      never: flags that --watch has no use for.

    Raises:
      InputError: names the flag.
    """
    for name in () if flag_values.watch else ("settle_s", "idle_exit_s", *only):
        if flag_values[name].present:
            raise InputError(f"--{name} goes with --watch; give both, or leave it out")
    for name in never if flag_values.watch else ():
        if flag_values[name].present:
            raise InputError(f"--{name} does not go with --watch; leave one of them out")


def rules_of(flag_values: flags.FlagValues) -> Rules:
    """The rules that the flags ask for.

    Raises:
      InputError: a value out of its range.
    """
    try:
        return Rules(**{name: flag_values[name].value for name in RULES})
    except InputError as error:
        raise InputError(f"--{error}") from None
