"""Mask files of a folder -> regions on the grid of a volume.

    masks = index_masks(masks_dir)          # {Series Instance UID or name of a NIfTI file: path}
    mask = read_mask(masks[key], volume)    # [S, H, W] uint8

A mask is placed by its coordinates in the patient's space, never by the order of its slices: a
NIfTI mask may be stored along any axes, the frames of a DICOM segmentation (SEG) in any order. A
mask that does not fit the volume's voxels is refused. Masks are never resampled.
"""

import re
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from nibabel import orientations
from pydicom.uid import SegmentationStorage

from data_prep.scan.geometry import RAS_TO_LPS, canonical_axes, orient
from data_prep.scan.nifti_metadata import EXTENSION, without_extension
from data_prep.scan.volume import Volume
from data_prep.system.errors import InputError

MAX_REGIONS = 255  # of a volume: a mask is uint8
# Fraction of the distance of pixels or slices: a shift by half a voxel must not be overlooked.
POSITION_TOLERANCE = 0.25

_SUFFIX = re.compile(r"[_-](mask|seg|label)$", re.IGNORECASE)


class MaskError(InputError):
    """A mask that cannot be used, in one line.

    The messages of `read_mask` are published in rejected.csv, so they are free of names and
    identifiers.
    """


def index_masks(masks_dir: Path) -> dict[str, Path]:
    """Mask files below `masks_dir` by the key of their scan; other files are skipped.

    The key of a DICOM-SEG file is the Series Instance UID of its Referenced Series Sequence. The
    key of a NIfTI file is its name without .nii or .nii.gz and without a last `_mask`, `_seg` or
    `_label`: the name of a NIfTI scan, or a Series Instance UID.

    Raises:
        MaskError: two masks belong to one scan, or a segmentation does not name one series.
        OSError: a file cannot be read.
    """
    masks: dict[str, Path] = {}
    for path in sorted(path for path in Path(masks_dir).rglob("*") if path.is_file()):
        if EXTENSION.search(path.name):
            key = _SUFFIX.sub("", without_extension(path.name))
        elif (key := _referenced_series(path)) is None:
            continue
        if masks.setdefault(key, path) != path:
            names = " and ".join(str(p.relative_to(masks_dir)) for p in (masks[key], path))
            raise MaskError(
                f"--masks_dir={masks_dir}: {names} are of one scan; merge them or leave one out"
            )
    return masks


def _referenced_series(path: Path) -> str | None:
    """The series that a segmentation refers to; None for other files."""
    with open(path, "rb") as file:
        if file.read(132)[128:] != b"DICM":
            return None
        file.seek(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tags = ["SOPClassUID", "ReferencedSeriesSequence"]
                dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
                if dataset.get("SOPClassUID") != SegmentationStorage:
                    return None
                series = {
                    str(item.SeriesInstanceUID)
                    for item in dataset.get("ReferencedSeriesSequence") or ()
                }
        except OSError:
            raise
        except Exception as error:  # pydicom raises a dozen kinds on damaged bytes
            raise MaskError(
                f"{path}: damaged ({type(error).__name__}); leave the file out"
            ) from None
    if len(series) != 1:
        raise MaskError(
            f"{path}: a segmentation that refers to {len(series)} series, not to one; "
            "leave the file out"
        )
    return series.pop()


def read_mask(path: Path, volume: Volume) -> np.ndarray:
    """[S, H, W] uint8: 0 background, else the region, on the voxels of `volume.hu`.

    Regions are the label values of a NIfTI file, or the segment numbers of a binary SEG, where the
    lowest of overlapping segments wins. The file may have empty slices that the volume lacks.

    Raises:
        MaskError: the matrix differs, voxels are off by more than `POSITION_TOLERANCE`, slices are
          missing or the volume lacks them, values are not whole numbers from 0 to 255, or the file
          is damaged.
        OSError: the file cannot be read.
    """
    return (_read_nifti if EXTENSION.search(path.name) else _read_segmentation)(path, volume)


# ---- the volume's grid ---------------------------------------------------------------------------


def _corners(
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


def _volume_corners(volume: Volume) -> np.ndarray:
    """The corners of each slice, [S, 3, 3] (see `_corners`)."""
    return np.stack(
        [
            _corners(h.position, h.orientation, h.pixel_spacing, (h.rows, h.columns))
            for h in volume.headers
        ]
    )


def _same_places(corners: np.ndarray, others: np.ndarray, volume: Volume) -> np.ndarray:
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


# ---- NIfTI ---------------------------------------------------------------------------------------


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
    places = _same_places(_volume_corners(volume), corners, volume)
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
    if (
        not has_affine
        or not np.isfinite(image.affine).all()
        or abs(np.linalg.det(image.affine[:3, :3])) < 1e-6
    ):
        raise MaskError("the mask has no affine (sform or qform)")
    axes, affine = orientations.io_orientation(image.affine), image.affine.copy()
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


# ---- DICOM segmentation --------------------------------------------------------------------------


def _read_segmentation(path: Path, volume: Volume) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path)
            if dataset.SOPClassUID != SegmentationStorage or dataset.SegmentationType != "BINARY":
                raise MaskError("no binary DICOM segmentation; give Segmentation Type BINARY")
            # [F, rows, columns] of 0 and 1
            frames = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
            geometry = [_frame_geometry(dataset, i) for i in range(len(frames))]
            series = {str(item.SeriesInstanceUID) for item in dataset.ReferencedSeriesSequence}
    except MaskError:
        raise
    except Exception as error:  # pydicom raises a dozen kinds on damaged or incomplete files
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise MaskError(
            f"the segmentation is damaged or incomplete ({type(error).__name__})"
        ) from None
    if volume.headers[0].series_instance_uid not in series:
        raise MaskError("the segmentation refers to another series")
    axes = [canonical_axes(orientation) for _, orientation, _, _ in geometry]
    if None in axes:
        raise MaskError("the segmentation's Image Orientation (Patient) is invalid")
    if any(not 1 <= segment <= MAX_REGIONS for *_, segment in geometry):
        raise MaskError(f"the segmentation has segment numbers that are not 1 to {MAX_REGIONS}")
    images = [orient(*pair) for pair in zip(frames, axes, strict=True)]
    if {image.shape for image in images} != {volume.hu.shape[1:]}:
        height, width = images[0].shape
        raise MaskError(
            f"the mask has {height} x {width} pixels, the scan {volume.hu.shape[1]} x "
            f"{volume.hu.shape[2]}"
        )
    corners = np.stack([_corners(*placed, frames.shape[1:]) for *placed, _ in geometry])
    slice_of_frame = _same_places(corners, _volume_corners(volume), volume)
    if any(place < 0 and image.any() for place, image in zip(slice_of_frame, images, strict=True)):
        raise MaskError(
            "the segmentation has regions on slices that the scan has not, or lies elsewhere by "
            f"more than {POSITION_TOLERANCE:g} of a voxel"
        )
    mask = np.zeros(volume.hu.shape, np.uint8)
    # The lowest segment is painted last, so that it wins.
    for i in sorted(range(len(images)), key=lambda i: -geometry[i][-1]):
        if slice_of_frame[i] >= 0:
            mask[slice_of_frame[i]][images[i] != 0] = geometry[i][-1]
    return mask


def _frame_geometry(
    dataset: pydicom.Dataset, frame: int
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...], int]:
    """Image Position and Orientation (Patient), Pixel Spacing and segment number of a frame."""
    per_frame = dataset.PerFrameFunctionalGroupsSequence[frame]
    shared = dataset.SharedFunctionalGroupsSequence[0]

    def macro(name: str) -> pydicom.Dataset:
        return (per_frame if name in per_frame else shared)[name][0]

    return (
        tuple(map(float, macro("PlanePositionSequence").ImagePositionPatient)),
        tuple(map(float, macro("PlaneOrientationSequence").ImageOrientationPatient)),
        tuple(map(float, macro("PixelMeasuresSequence").PixelSpacing)),
        int(macro("SegmentIdentificationSequence").ReferencedSegmentNumber),
    )
