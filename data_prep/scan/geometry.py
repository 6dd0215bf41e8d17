"""Slice geometry: how an image lies in the patient, and how regular the slices of a stack are."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Protocol

import numpy as np
from scipy import ndimage

AIR_HU = -1000
MAX_ROTATION_DEGREES = 5.0  # within the plane; images that are turned further are refused
SAME_POSITION_MM = 0.05  # slices that are closer lie at one position
# affine from NIfTI's patient space to DICOM's, and back
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

_AXIAL_COSINE = math.cos(math.radians(35))  # gantries tilt by up to 30 degrees
_FIELD_MM = (50, 1000)  # scanners have up to 850 mm
_GAP_FACTOR = 1.5  # of the local spacing
_UNEVEN_FRACTION = 0.1  # of the local spacing
_JUMP_MM = 1.0  # beside the line through the slices
_CROWDED_FACTOR = 0.55  # of the local spacing: half of it, give or take rounding
_SPARSE_FACTOR, _SPARSE_MM = 3.0, 5.0  # of the thickness, and at least


@dataclasses.dataclass(frozen=True)
class Axes:
    """How to bring an image to rows towards posterior and columns towards the patient's left.

    First transpose, then flip. The vectors are unit vectors in the patient's coordinates (x left, y
    posterior, z superior): `left` along the columns and `posterior` along the rows of the image
    that results, `normal` to superior.
    """

    transpose: bool
    flip_rows: bool
    flip_columns: bool
    axial: bool
    normal: np.ndarray  # [3] float64
    left: np.ndarray  # [3] float64
    posterior: np.ndarray  # [3] float64

    @property
    def rotation_degrees(self) -> float:
        """Angle, 0 to 45 degrees, by which the image is turned within its plane against the
        patient's left. A tilt of the gantry is no such turn."""
        level = np.array([1.0, 0.0, 0.0]) - self.normal[0] * self.normal
        cosine = float(self.left @ level / np.linalg.norm(self.left) / np.linalg.norm(level))
        return math.degrees(math.acos(min(1.0, cosine)))


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
    axial = bool(normal[2] >= _AXIAL_COSINE)
    return Axes(bool(transpose), flip_rows, flip_columns, axial, normal, left, posterior)


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


class Stored(Protocol):
    """What a header says about the place of its image (`data_prep.scan.headers.Header`)."""

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    pixel_spacing: tuple[float, ...]
    rows: int
    columns: int


def canonical_origin(image: Stored) -> np.ndarray:
    """[3] in mm: the centre of the pixel that comes first once the image is oriented. Image
    Position is the pixel that comes first as stored."""
    axes = canonical_axes(image.orientation)
    turned = axes.flip_columns, axes.flip_rows
    along_columns, along_rows = turned[::-1] if axes.transpose else turned
    origin = np.array(image.position)
    if along_columns:
        origin += np.array(image.orientation[:3]) * image.pixel_spacing[1] * (image.columns - 1)
    if along_rows:
        origin += np.array(image.orientation[3:]) * image.pixel_spacing[0] * (image.rows - 1)
    return origin


@dataclasses.dataclass(frozen=True)
class StackMeasure:
    """Spacing, gaps and tilt of a stack of slices."""

    spacing_mm: float  # median step; 0 for a single slice
    # [S] bool: the next slice is the neighbour; False at the end, before a gap or jump, in an
    # irregular part, and where the slices are sparse
    pair_valid: np.ndarray
    missing: int  # slices that fit into the gaps
    uneven: bool  # some step is neither the spacing nor a gap
    tilt_degrees: float  # angle between the normal and the line through the slices
    jumps: bool  # a step leaves that line
    crowded: int  # steps of half the local spacing or less: something else lies between the slices
    irregular: bool  # there are crowded steps, or a part of half the spacing
    sparse: bool  # the slices lie far apart for their thickness, as in high-resolution CT


def measure_stack(
    position_mm: np.ndarray,
    origin_mm: np.ndarray | None = None,
    thickness_mm: float | None = None,
) -> StackMeasure:
    """Measures the steps of a stack.

    A step is a gap if it passes 1.5 times the local spacing, the median of the seven steps around
    it. So a lasting change of the spacing is not a row of gaps. The line through the slices has the
    median direction of the steps. A step that ends more than 1 mm beside it is a jump within the
    plane. A step of half the local spacing or less is crowded; it and the odd steps beside it are
    no pairs and no gaps. A part of half the spacing between parts of the whole spacing holds the
    slices of two passes and no pairs. Slices are sparse if the spacing passes three times their
    thickness and 5 mm.

    Args:
        position_mm: [S], along the slice normal, increasing.
        origin_mm: [S, 3], `canonical_origin`, or Image Position (Patient) of slices that are all
            stored alike. None: tilt and jumps are not measured.
        thickness_mm: Slice Thickness. None: the slices are not sparse.
    """
    steps = np.diff(position_mm)
    pair_valid = np.zeros(len(position_mm), dtype=bool)
    if len(steps) == 0:
        return StackMeasure(0.0, pair_valid, 0, False, 0.0, False, 0, False, False)
    local = local_spacing(steps)
    crowded = steps <= _CROWDED_FACTOR * local
    unlike = np.abs(steps - local) > _UNEVEN_FRACTION * local
    irregular = crowded | (ndimage.binary_dilation(crowded) & unlike) | _doubled(steps)
    gap = (steps > _GAP_FACTOR * local) & ~irregular
    tilt, jump = (
        (0.0, np.zeros(len(steps), dtype=bool))
        if origin_mm is None
        else _tilt_and_jumps(steps, origin_mm)
    )
    sparse = thickness_mm is not None and np.median(steps) > max(
        _SPARSE_MM, _SPARSE_FACTOR * thickness_mm
    )
    pair_valid[:-1] = ~gap & ~jump & ~irregular & (not sparse)
    missing = int(np.maximum(1, np.rint(steps[gap] / local[gap]) - 1).sum())
    median = float(np.median(steps))
    uneven = bool(np.any(np.abs(steps[~gap] - median) > _UNEVEN_FRACTION * median))
    return StackMeasure(
        median,
        pair_valid,
        missing,
        uneven,
        tilt,
        bool(jump.any()),
        int(crowded.sum()),
        bool(irregular.any()),
        bool(sparse),
    )


def local_spacing(steps: np.ndarray) -> np.ndarray:
    """[S-1] in mm: for each step the median of the seven steps around it, fewer at the ends."""
    local = np.empty(len(steps))
    if len(steps) > 6:
        local[3:-3] = np.median(np.lib.stride_tricks.sliding_window_view(steps, 7), axis=1)
    for i in {*range(min(3, len(steps))), *range(max(0, len(steps) - 3), len(steps))}:
        local[i] = np.median(steps[max(0, i - 3) : i + 4])
    return local


def _doubled(steps: np.ndarray) -> np.ndarray:
    """[S-1] bool: steps of a run of even steps with three steps of twice the length on either side,
    as where two passes overlap by half a step. A single one is a gap."""
    found = np.zeros(len(steps), dtype=bool)
    changes = np.abs(np.diff(steps)) > _UNEVEN_FRACTION * np.minimum(steps[1:], steps[:-1])
    edges = np.flatnonzero(changes) + 1
    for start, end in itertools.pairwise(edges):
        around = np.concatenate([steps[max(0, start - 3) : start], steps[end : end + 3]])
        twice = 2 * np.median(steps[start:end])
        even = np.abs(around - twice) <= _UNEVEN_FRACTION * twice
        found[start:end] = len(even) == 6 and even.all()
    return found


def is_regular(position_mm: np.ndarray) -> bool:
    """Whether increasing positions [S] are those of one stack: none twice, no crowded step, and
    nearly all steps like those around them. Gaps and lasting changes of the spacing are allowed."""
    steps = np.diff(position_mm)
    if len(steps) == 0:
        return True
    local = local_spacing(steps)
    if steps.min() < SAME_POSITION_MM or np.any(steps <= _CROWDED_FACTOR * local):
        return False
    return bool(np.mean(np.abs(steps - local) <= 0.2 * local) >= 0.8)


def _tilt_and_jumps(steps: np.ndarray, origin_mm: np.ndarray) -> tuple[float, np.ndarray]:
    """Tilt in degrees and jumps [S-1] bool; `steps` [S-1] are the origins' shifts along the
    normal, in mm."""
    shifts = np.diff(origin_mm, axis=0)
    # 1 mm along the normal, the rest within the plane
    direction = np.median(shifts / steps[:, None], axis=0)
    tilt = math.degrees(math.acos(min(1.0, 1 / float(np.linalg.norm(direction)))))
    return tilt, np.linalg.norm(shifts - steps[:, None] * direction, axis=1) > _JUMP_MM
