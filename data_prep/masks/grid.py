"""Where the slices of a mask lie on the grid of a volume."""

import numpy as np

from data_prep.scan.geometry import canonical_axes, orient
from data_prep.scan.volume import Volume
from data_prep.system.errors import InputError

MAX_REGIONS = 255  # of a volume: a mask is uint8
# Fraction of the distance of pixels or slices: a shift by half a voxel must not be overlooked.
POSITION_TOLERANCE = 0.25


class MaskError(InputError):
    """A mask that cannot be used, in one line.

    The messages of `data_prep.masks.reading.read_mask` are published in rejected.csv, so they are
    free of names and identifiers.
    """


def corners_of(
    position: tuple[float, ...],
    orientation: tuple[float, ...],
    pixel_spacing: tuple[float, ...],
    shape: tuple[int, int],
) -> np.ndarray:
    """Three corners of a slice in canonical orientation, [3, 3] in mm, DICOM's patient space: the
    first pixel, the last pixel of its column, the last pixel of its row.

    The arguments are attributes of the stored slice; `shape` is (rows, columns).
    """
    rows, columns = (
        (shape[0] - 1) * np.array([[0, 0], [1, 1]]),
        (shape[1] - 1) * np.array([[0, 1], [0, 1]]),
    )
    down, right = (
        np.array(orientation[3:]) * pixel_spacing[0],
        np.array(orientation[:3]) * pixel_spacing[1],
    )
    points = np.array(position) + rows[..., None] * down + columns[..., None] * right  # [2, 2, 3]
    axes = canonical_axes(orientation)
    points = np.stack([orient(points[..., i], axes) for i in range(3)], axis=-1)
    return np.stack([points[0, 0], points[1, 0], points[0, 1]])


def volume_corners(volume: Volume) -> np.ndarray:
    """The corners of each slice, [S, 3, 3] (see `corners_of`)."""
    return np.stack(
        [
            corners_of(h.position, h.orientation, h.pixel_spacing, (h.rows, h.columns))
            for h in volume.headers
        ]
    )


def same_places(corners: np.ndarray, others: np.ndarray, volume: Volume) -> np.ndarray:
    """For each slice of `corners` [N, 3, 3] the index of the slice in `others` [M, 3, 3] at the
    same place, or -1; [N]."""
    normal = canonical_axes(volume.headers[0].orientation).normal
    nearest = np.abs((corners[:, None, 0] - others[None, :, 0]) @ normal).argmin(axis=1)
    difference = corners - others[nearest]
    along = difference @ normal  # [N, 3]
    within = np.linalg.norm(difference - along[..., None] * normal, axis=-1)
    fits = (np.abs(along) <= POSITION_TOLERANCE * volume.slice_spacing_mm) & (
        within <= POSITION_TOLERANCE * min(volume.pixel_spacing_mm)
    )
    return np.where(fits.all(axis=1), nearest, -1)
