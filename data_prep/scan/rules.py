"""The rules for taking scans. Light to import, so that flags can be defined from them."""

import dataclasses

from data_prep.system.errors import InputError

# kinds of raw scans; auto: NIfTI for a file name with .nii or .nii.gz, else DICOM
ARCHIVES = ("auto", "dicom", "nifti")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which series become volumes.

    Raises:
        InputError: a value out of its range.
    """

    max_slice_thickness_mm: float = 3.0  # the limit itself is taken
    min_slices: int = 20
    max_lost_fraction: float = 0.1  # of the slices that the volume should have
    require_lung: bool = True  # refuse volumes that do not cover the chest
    irregular: str = "keep"  # or "refuse": volumes with gaps or uneven spacing
    reconstructions: str = "one_per_study"  # or "all"
    preferred_kernel: str = "soft"  # or "sharp" or "any", see `series.select_reconstructions`

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
