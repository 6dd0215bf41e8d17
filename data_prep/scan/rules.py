"""The rules for taking scans. Light to import, so that flags can be defined from them."""

import dataclasses

from data_prep.system.errors import InputError

# Version of the rules by which scans are read: of everything in `data_prep.scan` that decides which
# scans are taken, their values and their patients. preparation.json has it ("rules"; datasets
# without it are of version 1), since programs of different versions read some scans differently.
VERSION = 2
CHANGES = {  # version -> the difference to the version before
    2: "stacks that lie between one another are told apart, images turned within their plane are "
    "refused, the lungs decide and not Body Part Examined, single bad slices are dropped, "
    "frames are read by what they hold, overlay bits and wrong bits of a pixel are told by its "
    "values, maps that are no HU and fields in another unit than mm are refused, "
    "Patient IDs are read by their character set and joined where they are one patient's, "
    "placeholders of ages and a contrast that nothing names are unknown, and lungs behind thin "
    "walls are seen",
}

# kinds of raw scans; auto: NIfTI for a file name with .nii or .nii.gz, else DICOM
ARCHIVES = ("auto", "dicom", "nifti")


def changes_since(version: int) -> str:
    """What this program reads otherwise than a program with an earlier version of the rules."""
    return "; ".join(text for number, text in sorted(CHANGES.items()) if number > version)


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which series become volumes.

    Attributes:
        max_slice_thickness_mm: thicker series are refused; the limit itself is taken.
        min_slices: series of fewer are refused.
        max_lost_fraction: of the slices that the volume should have; more refuse it.
        require_lung: refuse volumes that do not cover the chest.
        irregular: `keep` or `refuse` volumes with gaps or uneven spacing.
        reconstructions: of an exam, `one_per_study` or `all`.
        preferred_kernel: `soft`, `sharp` or `any`, see `series.select_reconstructions`.

    Raises:
        InputError: a value out of its range.
    """

    max_slice_thickness_mm: float = 3.0
    min_slices: int = 20
    max_lost_fraction: float = 0.1
    require_lung: bool = True
    irregular: str = "keep"
    reconstructions: str = "one_per_study"
    preferred_kernel: str = "soft"

    def __post_init__(self):
        if not self.max_slice_thickness_mm > 0:
            raise InputError(
                f"max_slice_thickness_mm is {self.max_slice_thickness_mm}; give a positive number"
            )
        if self.min_slices < 1:
            raise InputError(f"min_slices is {self.min_slices}; give 1 or more")
        if not 0 <= self.max_lost_fraction < 1:
            raise InputError(
                f"max_lost_fraction is {self.max_lost_fraction}; give 0 or more, below 1"
            )
        for name, values in (
            ("irregular", ("keep", "refuse")),
            ("reconstructions", ("one_per_study", "all")),
            ("preferred_kernel", ("soft", "sharp", "any")),
        ):
            if getattr(self, name) not in values:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}; give one of {', '.join(values)}"
                )
