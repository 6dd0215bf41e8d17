"""Mask files -> regions on the grid of a volume.

    masks = index_masks(masks_dir)           # {Series Instance UID or name of a NIfTI file: paths}
    mask = read_masks(masks[key], volume)    # [S, H, W] uint8

A mask is placed by its coordinates in the patient's space, never by the order of its slices: a
NIfTI mask may be stored along any axes, the frames of a DICOM segmentation (SEG) and the contours
of a structure set (RTSTRUCT) in any order. A mask that does not fit the volume's voxels is refused.
Masks are never resampled.
"""

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from nibabel import orientations

from data_prep.masks.dicom_masks import read_dicom_mask
from data_prep.masks.grid import (
    MAX_REGIONS,
    POSITION_TOLERANCE,
    MaskError,
    same_places,
    volume_corners,
)
from data_prep.scan.geometry import RAS_TO_LPS
from data_prep.scan.nifti_affine import NiftiError, unit_in_mm
from data_prep.scan.nifti_metadata import EXTENSION
from data_prep.scan.volume import Volume


def read_masks(paths: Sequence[Path], volume: Volume) -> np.ndarray:
    """The masks of all files of one scan, merged: [S, H, W] uint8 as of `read_mask`.

    A region that shares voxels with regions of the files before it becomes part of the one that it
    shares most with: readers who drew the same nodule. Any other region keeps its number if that is
    free, else it gets the next number.

    Raises:
        MaskError: as `read_mask`, or more than `MAX_REGIONS` regions.
        OSError: a file cannot be read.
    """
    mask = read_mask(paths[0], volume)
    for path in paths[1:]:
        other = read_mask(path, volume)
        for region in np.unique(other[other > 0]).tolist():
            inside = other == region
            shared = np.bincount(mask[inside], minlength=MAX_REGIONS + 1)[1:]
            if shared.any():
                region = 1 + int(shared.argmax())
            elif (mask == region).any():
                region = int(mask.max()) + 1
            if region > MAX_REGIONS:
                raise MaskError(f"its {len(paths)} files have more than {MAX_REGIONS} regions")
            mask[inside & (mask == 0)] = region
    return mask


def read_mask(path: Path, volume: Volume) -> np.ndarray:
    """[S, H, W] uint8: 0 background, else the region, on the voxels of `volume.hu`.

    Regions are the label values of a NIfTI file, the segment numbers of a SEG (binary or label
    map), or the ROI numbers of an RTSTRUCT (1, 2, 3 ... if one is beyond 255). Where segments or
    ROIs overlap, the lowest number wins.
    The file may have empty slices that the volume lacks.

    Raises:
        MaskError: the matrix differs, voxels are off by more than `POSITION_TOLERANCE`, slices are
          missing or the volume lacks them, values are not whole numbers from 0 to 255, or the file
          is damaged.
        OSError: the file cannot be read.
    """
    return (_read_nifti if EXTENSION.search(path.name) else read_dicom_mask)(path, volume)


def _read_nifti(path: Path, volume: Volume) -> np.ndarray:
    row_mm, column_mm = volume.pixel_spacing_mm
    corrected = "spacing_from_metadata" in volume.notes
    values, corners = _canonical_nifti(
        path, (column_mm, row_mm, volume.slice_spacing_mm) if corrected else None
    )
    num_slices, height, width = volume.hu.shape
    if values.shape[1:] != (height, width) or (corrected and len(values) != num_slices):
        stored = " x ".join(map(str, values.shape))
        raise MaskError(
            f"the mask has {stored} voxels (slices, rows, columns), the scan {num_slices} x "
            f"{height} x {width}"
        )
    places = same_places(volume_corners(volume), corners, volume)
    if (places < 0).any():
        raise MaskError(
            f"the mask lies elsewhere: {np.count_nonzero(places < 0)} of {num_slices} slices of "
            f"the scan have none of it within {POSITION_TOLERANCE:g} of a voxel; it needs the "
            f"affine of the scan"
        )
    outside = np.setdiff1d(np.arange(len(values)), places)
    if values[outside].any():
        raise MaskError("the mask has regions on slices that the scan has not")
    return np.ascontiguousarray(values[places])


def _canonical_nifti(
    path: Path, spacing_mm: tuple[float, float, float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Regions [M, H, W] uint8 with rows to posterior, columns to left, slices to superior, and
    corners [M, 3, 3].

    `spacing_mm` (of columns, rows, slices) replaces the spacing of the affine: a mask shares the
    wrong spacing of its scan's file, and is corrected in the same way.
    """
    with open(path, "rb"):  # nibabel would call a file damaged that cannot be opened
        pass
    try:
        image = nibabel.load(path)
        stored = np.asarray(image.dataobj)
        has_affine = image.header["sform_code"] > 0 or image.header["qform_code"] > 0
    except Exception as error:  # nibabel and the decompressors raise a dozen kinds on damaged bytes
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise MaskError(f"the NIfTI file is damaged ({type(error).__name__})") from None
    while stored.ndim > 3 and stored.shape[-1] == 1:
        stored = stored[..., 0]
    if stored.ndim != 3 or stored.dtype.kind not in "biuf":
        raise MaskError(
            f"the mask has {stored.ndim} dimensions of {stored.dtype}, not 3 of whole numbers"
        )
    if not has_affine or not np.isfinite(image.affine).all():
        raise MaskError("the mask has no affine (sform or qform)")
    try:
        affine = np.diag([unit_in_mm(image.header)] * 3 + [1.0]) @ image.affine
    except NiftiError as error:
        raise MaskError(f"the mask lies anywhere: {error}") from None
    if abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise MaskError("the mask has no affine (sform or qform)")
    axes = orientations.io_orientation(affine)
    if spacing_mm is not None:
        affine[:3, :3] *= np.array(spacing_mm)[axes[:, 0].astype(int)] / np.linalg.norm(
            affine[:3, :3], axis=0
        )
    to_canonical = orientations.ornt_transform(axes, orientations.axcodes2ornt(("L", "P", "S")))
    affine = affine @ orientations.inv_ornt_aff(to_canonical, stored.shape)
    values = _as_regions(orientations.apply_orientation(stored, to_canonical).transpose(2, 1, 0))
    num_slices, height, width = values.shape
    ends = np.array([[0, 0], [0, height - 1], [width - 1, 0]])  # of columns and rows
    points = [
        affine[:3, :2] @ end + affine[:3, 3] + k * affine[:3, 2]
        for k in range(num_slices)
        for end in ends
    ]
    return values, np.reshape(points, (num_slices, 3, 3)) * RAS_TO_LPS.diagonal()[:3]


def _as_regions(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f" and not (
        np.isfinite(values).all() and np.array_equal(values, np.rint(values))
    ):
        raise MaskError(
            "the mask has values that are no whole numbers; give labels, not probabilities"
        )
    if values.min() < 0 or values.max() > MAX_REGIONS:
        raise MaskError(
            f"the mask has values from {values.min():g} to {values.max():g}, not 0 to {MAX_REGIONS}"
        )
    return values.astype(np.uint8)
