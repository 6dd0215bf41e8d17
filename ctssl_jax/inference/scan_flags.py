"""Flags of the commands that read raw scans, with the names that `data_prep.prepare` gives them."""

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


def rules_of(flag_values: flags.FlagValues) -> Rules:
    """The rules that the flags ask for.

    Raises:
      InputError: a value out of its range.
    """
    try:
        return Rules(**{name: flag_values[name].value for name in RULES})
    except InputError as error:
        raise InputError(f"--{error}") from None
