"""Slice geometry: how an image lies in the patient, and how regular the slices of a stack are."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

AIR_HU = -1000
# affine from NIfTI's patient space to DICOM's, and back
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

_AXIAL_COSINE = math.cos(math.radians(35))  # gantries tilt by up to 30 degrees
_FIELD_MM = (50, 1000)  # scanners have up to 850 mm
_GAP_FACTOR = 1.5  # of the local spacing
_UNEVEN_FRACTION = 0.1  # of the local spacing
_JUMP_MM = 1.0  # beside the line through the slices


@dataclasses.dataclass(frozen=True)
class Axes:
    """How to bring an image to rows towards posterior and columns towards the patient's left.

    First transpose, then flip. `normal` points to superior, in the patient's coordinates (x left, y
    posterior, z superior).
    """

    transpose: bool
    flip_rows: bool
    flip_columns: bool
    axial: bool
    normal: np.ndarray  # [3] float64


@functools.lru_cache(maxsize=256)
def canonical_axes(orientation: tuple[float, ...]) -> Axes | None:
    """Axes of Image Orientation (Patient), or None if the six cosines are not two orthogonal unit
    vectors."""
    along_columns, along_rows = np.array(orientation[:3]), np.array(orientation[3:])
    lengths = np.linalg.norm(along_columns), np.linalg.norm(along_rows)
    if (
        abs(lengths[0] - 1) > 0.01
        or abs(lengths[1] - 1) > 0.01
        or abs(along_columns @ along_rows) > 0.01
    ):
        return None
    transpose = abs(along_columns[0]) < abs(along_columns[1])
    if transpose:
        along_columns, along_rows = along_rows, along_columns
    flip_columns, flip_rows = bool(along_columns[0] < 0), bool(along_rows[1] < 0)
    left = -along_columns if flip_columns else along_columns
    posterior = -along_rows if flip_rows else along_rows
    normal = np.cross(left, posterior)
    normal /= np.linalg.norm(normal)
    return Axes(bool(transpose), flip_rows, flip_columns, bool(normal[2] >= _AXIAL_COSINE), normal)


def field_fault(rows: int, columns: int, pixel_spacing_mm: tuple[float, ...]) -> str | None:
    """Why an image cannot be as large as its Pixel Spacing (0028,0030; between rows, between
    columns) says, in words; or None."""
    size = max(rows * pixel_spacing_mm[0], columns * pixel_spacing_mm[1])
    if _FIELD_MM[0] <= size <= _FIELD_MM[1]:
        return None
    shown = f"{size:,.0f}" if size >= 100 else f"{size:.3g}"
    return (
        f"a field of view of {shown} mm, not {_FIELD_MM[0]:g} to {_FIELD_MM[1]:g} mm: is the "
        "pixel spacing in another unit than mm?"
    )


def orient(image: np.ndarray, axes: Axes) -> np.ndarray:
    """A view of `image` [H, W] in canonical orientation."""
    if axes.transpose:
        image = image.T
    return image[:: -1 if axes.flip_rows else 1, :: -1 if axes.flip_columns else 1]


@dataclasses.dataclass(frozen=True)
class StackMeasure:
    """Spacing, gaps and tilt of a stack of slices."""

    spacing_mm: float  # median step; 0 for a single slice
    # [S] bool: the next slice is the neighbour; False at the end and before a gap or jump
    pair_valid: np.ndarray
    missing: int  # slices that fit into the gaps
    uneven: bool  # some step is neither the spacing nor a gap
    tilt_degrees: float  # angle between the normal and the line through the slices
    jumps: bool  # a step leaves that line


def measure_stack(position_mm: np.ndarray, origin_mm: np.ndarray | None = None) -> StackMeasure:
    """Measures the steps of a stack.

    A step is a gap if it passes 1.5 times the local spacing, the median of the seven steps around
    it. So a lasting change of the spacing is not a row of gaps. The line through the slices has the
    median direction of the steps. A step that ends more than 1 mm beside it is a jump within the
    plane.

    Args:
        position_mm: [S], along the slice normal, increasing.
        origin_mm: [S, 3], Image Position (Patient). None: tilt and jumps are not measured.
    """
    steps = np.diff(position_mm)
    pair_valid = np.zeros(len(position_mm), dtype=bool)
    if len(steps) == 0:
        return StackMeasure(0.0, pair_valid, 0, False, 0.0, False)
    local = np.array([np.median(steps[max(0, i - 3) : i + 4]) for i in range(len(steps))])
    gap = steps > _GAP_FACTOR * local
    tilt, jump = (
        (0.0, np.zeros(len(steps), dtype=bool))
        if origin_mm is None
        else _tilt_and_jumps(steps, origin_mm)
    )
    pair_valid[:-1] = ~gap & ~jump
    missing = int(np.maximum(1, np.rint(steps[gap] / local[gap]) - 1).sum())
    median = float(np.median(steps))
    uneven = bool(np.any(np.abs(steps[~gap] - median) > _UNEVEN_FRACTION * median))
    return StackMeasure(median, pair_valid, missing, uneven, tilt, bool(jump.any()))


def _tilt_and_jumps(steps: np.ndarray, origin_mm: np.ndarray) -> tuple[float, np.ndarray]:
    """Tilt in degrees and jumps [S-1] bool; `steps` [S-1] are the origins' shifts along the
    normal, in mm."""
    shifts = np.diff(origin_mm, axis=0)
    # 1 mm along the normal, the rest within the plane
    direction = np.median(shifts / steps[:, None], axis=0)
    tilt = math.degrees(math.acos(min(1.0, 1 / float(np.linalg.norm(direction)))))
    return tilt, np.linalg.norm(shifts - steps[:, None] * direction, axis=1) > _JUMP_MM
