"""One acquisition of a synthetic patient: geometry, contrast, dose, and the table."""

import dataclasses

import numpy as np

from data_prep.synthetic.anatomy import Anatomy
from data_prep.synthetic.patient import BODY_FRONT, body_back


@dataclasses.dataclass(frozen=True)
class Scan:
    """One acquisition and reconstruction. `z_mm` are slice positions towards superior in the
    patient's mm.

    `contrast` is "none", "pulmonary" (arterial, dense pulmonary arteries) or "venous", `bolus` the
    enhancement relative to the usual and `timing` how far it is on the way to the aortic phase, 0
    to 1; `kernel` is "soft" or "sharp", `sharpness` its cutoff relative to the usual; `noise_hu`
    the standard deviation of a soft reconstruction's noise inside the body and `correlation` that
    of the noise of neighbouring slices. The patient breathes by `breath_mm` at the diaphragm, a
    breath in `breath_slices`, and moves by up to `motion_mm` between slices.
    """

    image_size: int
    field_of_view_mm: float
    centre_mm: tuple[float, float]
    z_mm: tuple[float, ...]
    slice_spacing_mm: float
    slice_thickness_mm: float
    contrast: str
    bolus: float
    kernel: str
    noise_hu: float
    rotation_degrees: float
    circular: bool
    prone: bool
    flat_table: bool
    timing: float = 0.0
    sharpness: float = 1.0
    correlation: float = 0.3
    breath_mm: float = 0.0
    breath_slices: float = 20.0
    motion_mm: float = 0.0

    @property
    def partial_volume(self) -> float:
        """The share of either neighbour in a slice, as thick as it is."""
        return min(0.2, 0.1 * self.slice_thickness_mm / self.slice_spacing_mm)

    def heights(self) -> np.ndarray:
        """[S] float64: z in the patient's mm of what each slice shows, displaced by breathing: in
        full at the diaphragm, not at all at the apices."""
        z = np.array(self.z_mm)
        breath = np.sin(2 * np.pi * np.arange(len(z)) / self.breath_slices)
        return z + self.breath_mm * breath * np.clip((60 - z) / 160, 0, 1)

    def loudness(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """[H, W] float32: noise in HU over that of a tile, at pixels of the reference space.
        Photons are fewest in the middle of the body."""
        middle = np.exp(-0.5 * (np.hypot(x, y * 1.3) / 150) ** 2)
        return (self.noise_hu * (0.45 + 0.75 * middle)).astype(np.float32)

    @property
    def pixel_spacing_mm(self) -> float:
        return self.field_of_view_mm / self.image_size

    @property
    def first_voxel_mm(self) -> tuple[float, float]:
        """(x, y) of the centre of pixel (0, 0)."""
        half = (self.image_size - 1) / 2 * self.pixel_spacing_mm
        return round(self.centre_mm[0] - half, 4), round(self.centre_mm[1] - half, 4)


@dataclasses.dataclass(frozen=True)
class Enhancement:
    """HU of blood and organs at a contrast phase."""

    pulmonary_artery: float
    left_heart: float
    aorta: float
    superior_cava: float
    right_heart: float
    muscle: float
    liver: float
    liver_vessels: float
    spleen: float
    kidney: float


ENHANCEMENTS = {
    "none": Enhancement(41, 41, 41, 41, 41, 44, 56, 44, 48, 34),
    "pulmonary": Enhancement(390, 320, 260, 480, 400, 85, 66, 60, 95, 110),
    "venous": Enhancement(165, 165, 170, 160, 160, 105, 108, 165, 122, 185),
}
# Between the two: the bolus has reached the aorta.
AORTIC = Enhancement(235, 330, 345, 210, 225, 110, 74, 72, 150, 160)
# Dose follows the body's width, not quite: noise by height in reference space.
LOUDNESS_Z, LOUDNESS = (-200, -120, -60, 10, 60, 110), (1.1, 1.05, 0.9, 0.9, 1.1, 1.35)


def enhancement(scan: Scan) -> Enhancement:
    """HU of blood and organs in this scan."""
    values = (
        dataclasses.astuple(phase)
        for phase in (ENHANCEMENTS["none"], ENHANCEMENTS[scan.contrast], AORTIC)
    )
    timing = scan.timing if scan.contrast != "none" else 0.0
    return Enhancement(
        *(
            plain + scan.bolus * ((1 - timing) * usual + timing * aortic - plain)
            for plain, usual, aortic in zip(*values, strict=True)
        )
    )


def outside_field_of_view(scan: Scan) -> np.ndarray:
    """[H, W] bool: the pixels beyond the circular field of view, if the scanner has one."""
    offset = (np.arange(scan.image_size) - (scan.image_size - 1) / 2) / (scan.image_size / 2)
    return (np.hypot(offset[:, None], offset[None, :]) > 1) & scan.circular


def table_layer(anatomy: Anatomy, scan: Scan) -> np.ndarray:
    """[H, W] float32: HU above air of the patient table and its mattress, which lie below the
    patient, supine or prone."""
    along = (np.arange(scan.image_size) - (scan.image_size - 1) / 2) * scan.pixel_spacing_mm
    x, y = along[None, :] + scan.centre_mm[0], along[:, None] + scan.centre_mm[1]
    patient = anatomy.patient
    z = np.array(scan.z_mm) / patient.scale[2]
    if scan.prone:
        y = -y
        contact = -(BODY_FRONT(z).min() - patient.fat_mm * 0.7) * patient.scale[1]
        contact += 0.6 * patient.breast_mm
    else:
        contact = (body_back(z, patient).max() + patient.fat_mm * 0.6 + 6) * patient.scale[1]
    sag = 0 if scan.flat_table else 0.0011
    pad = y - contact - 8 + sag * x**2
    shell = pad - 14 - (0 if scan.flat_table else 6)
    edge = max(scan.pixel_spacing_mm, 1.2)

    def cover(distance):
        return np.clip(0.5 - distance / edge, 0, 1)

    inside = cover(np.abs(x) - 205)
    layer = 55 * cover(np.abs(pad) - 1.0) + 40 * cover(np.abs(pad - 8) - 8)
    layer += 760 * cover(np.abs(shell - 6) - 1.4) + 60 * cover(np.abs(shell - 22) - 14)
    layer += 520 * cover(np.abs(shell - 37) - 1.2)
    return (layer * inside).astype(np.float32)
