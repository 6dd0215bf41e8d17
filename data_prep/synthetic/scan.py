"""One acquisition of a synthetic patient: geometry, contrast, dose, and the table."""

import dataclasses

import numpy as np

from data_prep.synthetic.patient import BODY_FRONT, Anatomy, body_back


@dataclasses.dataclass(frozen=True)
class Scan:
    """One acquisition and reconstruction. `z_mm` are slice positions towards superior in the
    patient's mm.

    `contrast` is "none", "pulmonary" (arterial, dense pulmonary arteries) or "venous", `bolus` the
    enhancement relative to the usual; `kernel` is "soft" or "sharp"; `noise_hu` the standard
    deviation of a soft reconstruction's noise inside the body.
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
    motion_mm: float = 0.0  # how far the patient moves between slices

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


def enhancement(scan: Scan) -> Enhancement:
    """HU of blood and organs in this scan."""
    plain, usual = ENHANCEMENTS["none"], ENHANCEMENTS[scan.contrast]
    names = [field.name for field in dataclasses.fields(Enhancement)]
    return Enhancement(
        *(getattr(plain, n) + scan.bolus * (getattr(usual, n) - getattr(plain, n)) for n in names)
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
