"""The connected regions of a mask: their sizes, and their places in the patient."""

import math

import numpy as np
from scipy import ndimage

from data_prep.scan.geometry import canonical_axes, canonical_origin
from data_prep.scan.volume import Volume


def regions_of(mask: np.ndarray, probabilities: np.ndarray, volume: Volume) -> list[dict]:
    """The connected parts of a mask, the largest first. Voxels that share a corner are connected.

    Args:
        mask: [S, H, W] bool, on `volume.hu`.
        probabilities: [S, H, W] float32, 0 to 1.
        volume: the scan.

    Returns:
        A dictionary each: `volume_ml`, `equivalent_diameter_mm` (of the sphere of that volume),
        `num_voxels`, `first_slice`, `last_slice`, `largest_slice` (of the largest area),
        `centre_slice` (nearest to the centroid), `centre_position_mm` (along the slice normal),
        `centre_lps_mm` (DICOM's patient space: left, posterior, superior) and
        `highest_probability`.
    """
    labels, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    regions = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[box] == number
        areas = np.count_nonzero(inside, axis=(1, 2))
        centre = np.array([axis.start for axis in box]) + ndimage.center_of_mass(inside)
        volume_ml = int(areas.sum()) * voxel_ml(volume)
        regions.append(
            {
                "volume_ml": round(volume_ml, 6),
                "equivalent_diameter_mm": round((6000 * volume_ml / math.pi) ** (1 / 3), 3),
                "num_voxels": int(areas.sum()),
                "first_slice": box[0].start,
                "last_slice": box[0].stop - 1,
                "largest_slice": box[0].start + int(areas.argmax()),
                "centre_slice": int(np.rint(centre[0])),
                "centre_position_mm": round(
                    float(np.interp(centre[0], np.arange(len(mask)), volume.position_mm)), 3
                ),
                "centre_lps_mm": [
                    round(float(value), 3) for value in patient_position_mm(centre, volume)
                ],
                "highest_probability": round(float(probabilities[box][inside].max()), 6),
            }
        )
    return sorted(regions, key=lambda region: -region["num_voxels"])


def voxel_ml(volume: Volume) -> float:
    """The volume of a voxel in millilitres, by the median slice spacing."""
    step_mm = volume.slice_spacing_mm or volume.slice_thickness_mm  # for a single slice
    return float(np.prod(volume.pixel_spacing_mm)) * step_mm / 1000


def patient_position_mm(index: np.ndarray, volume: Volume) -> np.ndarray:
    """A place (slice, row, column), possibly between voxels, as [3] mm in DICOM's patient space."""
    axes = canonical_axes(volume.headers[0].orientation)
    origins = np.array([canonical_origin(header) for header in volume.headers])
    origin = [np.interp(index[0], np.arange(len(origins)), along) for along in origins.T]
    down = axes.posterior * volume.pixel_spacing_mm[0]
    right = axes.left * volume.pixel_spacing_mm[1]
    return origin + index[1] * down + index[2] * right
