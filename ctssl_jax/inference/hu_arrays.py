"""Arrays of HU in any orientation (nibabel, SimpleITK), prepared as `data_prep` prepares scans."""

import types
from collections.abc import Sequence

import numpy as np

from data_prep.raw.scans import PreparedVolume
from data_prep.scan.anatomy import summarise
from data_prep.scan.geometry import RAS_TO_LPS, canonical_axes, field_fault, orient
from data_prep.scan.hounsfield import PlausibilityCount, to_hu
from data_prep.scan.slice_scale import slices_on_another_scale
from data_prep.scan.window import lung_box, prepare_images
from data_prep.system.errors import InputError

_VALUES_ARE_HU = types.SimpleNamespace(
    rescale_slope=1.0,
    rescale_intercept=0.0,
    pixel_representation=1,
    padding_value=None,
    padding_limit=None,
)


def prepare_array(
    array: np.ndarray, affine: np.ndarray, windows: Sequence[tuple[float, float]], image_size: int
) -> PreparedVolume:
    """The input of a model for an array of HU, which has no gaps.

    Args:
      array, affine: the volume, see `canonical_volume`.
      windows: (level, width) in HU, a channel each.
      image_size: height and width of the slices in pixels.

    Raises:
      InputError: as `canonical_volume`.
    """
    hu, pixel_spacing_mm, slice_spacing_mm = canonical_volume(array, affine)
    chest = summarise(hu, pixel_spacing_mm, slice_spacing_mm)
    return PreparedVolume(
        prepare_images(hu, pixel_spacing_mm, windows, image_size),
        lung_box=lung_box(chest, hu.shape[1:], pixel_spacing_mm, image_size),
    )


def canonical_volume(
    array: np.ndarray, affine: np.ndarray
) -> tuple[np.ndarray, tuple[float, float], float]:
    """HU in any orientation -> slices towards superior, rows to posterior, columns to the left.

    The axis that is closest to the patient's long axis counts the slices. Values below -1500 HU
    become air, as in `data_prep`.

    Args:
      array: 3-D, HU.
      affine: [4, 4], array indices -> mm towards right, anterior, superior.

    Returns:
      HU [S, H, W] int16 or float32, pixel spacing (between rows, between columns) and slice spacing
      in mm.

    Raises:
      InputError: not 3-D, an unusable affine, an oblique volume, or values that are not HU.
    """
    affine = np.asarray(affine, np.float64)
    if (
        affine.shape != (4, 4)
        or not np.isfinite(affine).all()
        or abs(np.linalg.det(affine[:3, :3])) < 1e-6
    ):
        raise InputError(
            "the affine is not an invertible 4 x 4 matrix of finite numbers; give nibabel's "
            "image.affine"
        )
    if array.ndim != 3 or array.dtype.kind not in "iuf" or not min(array.shape):
        raise InputError(f"HU of {array.dtype} {list(array.shape)}; give a 3-D array of numbers")
    steps = (RAS_TO_LPS @ affine)[:3, :3]
    spacing_mm = np.linalg.norm(steps, axis=0)
    along = int(np.argmax(np.abs(steps[2]) / spacing_mm))
    column, row = (axis for axis in range(3) if axis != along)
    axes = canonical_axes(tuple((steps / spacing_mm)[:, [column, row]].T.ravel().tolist()))
    if axes is None:
        raise InputError(
            "the affine shears the slices; give a volume whose rows and columns are at right angles"
        )
    if not axes.axial:
        raise InputError(
            "the volume is oblique: its slices are not axial; resample it along the patient's axes"
        )
    array = array.astype(array.dtype.newbyteorder("="), copy=False)  # NIfTI files may be big-endian
    frames = np.moveaxis(array, (along, row, column), (0, 1, 2))
    if steps[:, along] @ axes.normal < 0:
        frames = frames[::-1]
    hu = _to_hu([orient(frame, axes) for frame in frames])
    between_rows, between_columns = spacing_mm[[row, column]].tolist()
    pixel_spacing_mm = (
        (between_columns, between_rows) if axes.transpose else (between_rows, between_columns)
    )
    if fault := field_fault(*hu.shape[1:], pixel_spacing_mm):
        raise InputError(f"{fault} give an affine in mm")
    return hu, pixel_spacing_mm, float(abs(steps[:, along] @ axes.normal))


def _to_hu(frames: Sequence[np.ndarray]) -> np.ndarray:
    """Stored values -> HU [S, H, W] as in `load_volume`; refuses values that are not HU."""
    if frames[0].dtype == np.float16:
        frames = [frame.astype(np.float32) for frame in frames]
    if not all(np.isfinite(frame).all() for frame in frames):
        raise InputError(
            "the volume has values that are not finite; replace them, outside the patient by -1024"
        )
    plausibility = PlausibilityCount()
    for frame in frames:
        plausibility.add(frame, _VALUES_ARE_HU)
    if fault := plausibility.fault():
        lowest, highest = min(frame.min() for frame in frames), max(frame.max() for frame in frames)
        raise InputError(
            f"values from {lowest:g} to {highest:g} are not HU ({fault}); give HU, stored values x "
            "Rescale Slope + Intercept, or slices of a prepared dataset as uint8 [S, H, W, C] "
            "without an affine"
        )
    hu = np.stack([to_hu(frame, _VALUES_ARE_HU) for frame in frames])
    if odd := slices_on_another_scale(hu, [_VALUES_ARE_HU] * len(hu), frames):
        raise InputError(
            f"{len(odd)} of {len(hu)} slices are on another scale than the slices around them, or "
            "blank; give HU in all slices, or leave these out"
        )
    return hu
