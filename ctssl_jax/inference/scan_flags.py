"""Flags of the commands that read raw scans (`data_prep.raw.scans`), named as `data_prep.prepare`
names them."""

import functools

from absl import flags

from data_prep.scan.rules import ARCHIVES, Rules
from data_prep.system.errors import InputError

RULES = ("max_slice_thickness_mm", "min_slices", "require_lung", "irregular", "reconstructions")
ALL = ("archive", "metadata_csv", *RULES)


def define(given: flags.FlagValues = flags.FLAGS) -> None:
    """Define the flags."""
    enum = functools.partial(flags.DEFINE_enum, flag_values=given)
    enum(
        "archive",
        "auto",
        list(ARCHIVES),
        "Kind of raw scans; auto: NIfTI for a file of that name, else DICOM.",
    )
    flags.DEFINE_string(
        "metadata_csv",
        None,
        "Table of VolumeName and what NIfTI files do not say.",
        flag_values=given,
    )
    flags.DEFINE_float(
        "max_slice_thickness_mm", 3.0, "Thicker series are refused.", flag_values=given
    )
    flags.DEFINE_integer(
        "min_slices", 20, "Series of fewer slices are refused.", lower_bound=1, flag_values=given
    )
    flags.DEFINE_bool(
        "require_lung", True, "Refuse volumes that do not cover the chest.", flag_values=given
    )
    enum("irregular", "keep", ["keep", "refuse"], "Volumes with gaps or uneven spacing.")
    enum(
        "reconstructions",
        "one_per_study",
        ["one_per_study", "all"],
        "Reconstructions to take of an exam.",
    )


def rules_of(given: flags.FlagValues) -> Rules:
    """The rules that the flags ask for.

    Raises:
      InputError: a value out of its range.
    """
    try:
        return Rules(**{name: given[name].value for name in RULES})
    except InputError as error:
        raise InputError(f"--{error}") from None
