"""Where the voxels of a NIfTI file lie: its sform, qform, pixdim and unit of length, and which of
its axes counts the slices."""

import math
from typing import Any

import numpy as np
from nibabel.spatialimages import HeaderDataError

from data_prep.scan.geometry import RAS_TO_LPS, canonical_axes
from data_prep.scan.nifti_metadata import Metadata

SPACING_TOLERANCE = 0.01  # relative, between two statements about one spacing
AFFINE_TOLERANCE_MM = 0.1  # between sform and qform, at the corners of the volume

_MM_OF_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown, metre, millimetre, micron
_THICK_PIXEL = 2.0  # times as long as wide: slices of another plane


class NiftiError(ValueError):
    """A file that cannot be used. `reason` is a name of `data_prep.scan.reasons.REASONS`; the
    message is the detail."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def volume_shape(nifti: Any) -> tuple[int, int, int]:
    """The length of the three axes of a header's volume; further axes of length 1 are left out.

    Raises:
        NiftiError: fewer axes, or several volumes (4-D).
    """
    shape = tuple(int(length) for length in nifti.get_data_shape())
    volumes = math.prod(max(1, length) for length in shape[3:])
    if volumes > 1:
        raise NiftiError("several_volumes", f"{len(shape)} dimensions, {volumes} volumes")
    if len(shape) < 3 or min(shape[:3]) < 1:
        raise NiftiError("unreadable", f"{len(shape)} dimensions, not 3")
    return shape[:3]


def unit_in_mm(nifti: Any) -> float:
    """The unit of length of a header's affines; mm where it names none.

    Raises:
        NiftiError: NIfTI does not know the unit.
    """
    unit = int(nifti["xyzt_units"]) & 7
    if unit not in _MM_OF_UNIT:
        raise NiftiError("unknown_affine", "the unit of length is none that NIfTI knows")
    return _MM_OF_UNIT[unit]


def read_affine(nifti: Any, shape: tuple[int, int, int], spacing_is_known: bool) -> np.ndarray:
    """[4, 4] float64, from voxel indices to mm towards left, posterior, superior: the sform, or the
    qform where only the qform is set.

    A qform cannot hold the shear of a tilted gantry; so it may be a rotation that belongs to the
    sform: the closest one, or that of the slices' plane. Otherwise the two must agree, and so must
    pixdim, unless it was never set (1 or 0) or `spacing_is_known` from elsewhere.

    Raises:
        NiftiError: the file says nothing, or two different things.
    """
    to_mm = np.diag([unit_in_mm(nifti)] * 3 + [1.0])
    try:
        sform, qform = nifti.get_sform(coded=True)[0], nifti.get_qform(coded=True)[0]
    except (ValueError, HeaderDataError):
        raise NiftiError("unknown_affine", "the quaternion of the qform is none") from None
    affines = []
    for form in (sform, qform):
        if form is None:
            continue
        if not np.isfinite(form).all() or abs(np.linalg.det((to_mm @ form)[:3, :3])) < 1e-6:
            raise NiftiError("unknown_affine", "no invertible matrix")
        affines.append(to_mm @ form)
    if not affines:
        raise NiftiError("unknown_affine", "neither sform nor qform is set")
    if len(affines) == 2:
        distance = _distance_mm(*affines, shape)
        rotations = [_distance_mm(form, affines[1], shape) for form in _unsheared(affines[0])]
        if min(distance, *rotations) > AFFINE_TOLERANCE_MM:
            raise NiftiError("unknown_affine", f"sform and qform differ by up to {distance:.3g} mm")
    elif sform is not None and not spacing_is_known:
        _check_pixdim(affines[0], np.abs(np.array(nifti["pixdim"][1:4], np.float64)), to_mm[0, 0])
    return RAS_TO_LPS @ affines[0]


def _distance_mm(a: np.ndarray, b: np.ndarray, shape: tuple[int, int, int]) -> float:
    """The largest distance of a corner of the volume between two affines."""
    corners = [[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])]
    return float(np.linalg.norm(np.array(corners) @ (a - b).T, axis=1).max())


def _unsheared(affine: np.ndarray) -> list[np.ndarray]:
    """The affine without its shear, in the ways that programs write it into a qform: the closest
    rotation (polar decomposition), and the plane of the slices with its normal, along which they
    keep the length of their step or their distance."""
    matrix = affine[:3, :3]
    steps = np.linalg.norm(matrix, axis=0)
    left, _, right = np.linalg.svd(matrix / steps)
    slices, *in_plane = frame_axes(affine)
    normal = np.cross(*matrix[:, in_plane].T)
    normal /= np.linalg.norm(normal)
    distance = float(normal @ matrix[:, slices])
    forms = [affine.copy() for _ in range(3)]
    forms[0][:3, :3] = left @ right * steps
    forms[1][:3, slices] = distance * normal
    forms[2][:3, slices] = np.copysign(steps[slices], distance) * normal
    return forms


def _check_pixdim(sform: np.ndarray, pixdim: np.ndarray, unit_mm: float) -> None:
    """Raises NiftiError if pixdim is set and is not the spacing of the sform.

    Of sheared slices it may be their distance or the step along the shear.
    """
    if not np.isfinite(pixdim).all() or (pixdim == 1).all() or (pixdim == 0).all():
        return
    matrix = sform[:3, :3]
    steps = np.linalg.norm(matrix, axis=0)
    distances = 1 / np.linalg.norm(np.linalg.inv(matrix), axis=1)
    stated = pixdim * unit_mm
    wrong = [np.abs(stated / spacing - 1) > SPACING_TOLERANCE for spacing in (steps, distances)]
    if np.any(wrong[0] & wrong[1]):
        said, given = (" x ".join(f"{value:.4g}" for value in v) for v in (stated, steps))
        raise NiftiError(
            "unknown_affine", f"pixdim and sform differ: spacing {said} mm, {given} mm"
        )


def frame_axes(affine: np.ndarray) -> tuple[int, int, int]:
    """Which axes of the voxels count the slices, rows and columns.

    The axis closest to the patient's long axis counts the slices, in whatever order a program
    stores them. In thick sagittal or coronal slices, whose pixels would be more than twice as long
    as wide, it is the last axis, so that they are refused as not axial.

    Args:
        affine: [4, 4] as of `read_affine`.
    """
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    slices = int(np.argmax(np.abs(affine[2, :3]) / steps))
    first, second = (axis for axis in range(3) if axis != slices)
    if slices != 2 and not 1 / _THICK_PIXEL <= steps[first] / steps[second] <= _THICK_PIXEL:
        slices, first, second = 2, 0, 1
    return slices, second, first


def with_spacing(affine: np.ndarray, metadata: Metadata) -> tuple[np.ndarray, tuple[str, ...]]:
    """An affine of columns, rows and slices with the spacing of the table where the two differ, and
    the note about it.

    Directions stay the same.
    """
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    wanted = steps.copy()
    if metadata.xy_spacing is not None:
        between_rows, between_columns = metadata.xy_spacing
        axes = canonical_axes(tuple((affine[:3, :2] / steps[:2]).T.ravel()))
        transposed = axes is not None and axes.transpose
        wanted[:2] = (
            (between_rows, between_columns) if transposed else (between_columns, between_rows)
        )
    if metadata.z_spacing is not None:
        wanted[2] = metadata.z_spacing
    if np.all(np.abs(wanted / steps - 1) <= SPACING_TOLERANCE):
        return affine, ()
    corrected = affine.copy()
    corrected[:3, :3] *= wanted / steps
    return corrected, ("spacing_from_metadata",)
