"""DICOM masks: segmentations (binary or label map) and contours of structure sets (RTSTRUCT)."""

import warnings
from pathlib import Path

import numpy as np
import pydicom
from pydicom.pixels import pixel_array
from pydicom.uid import RTStructureSetStorage, SegmentationStorage

from data_prep.masks.grid import (
    MAX_REGIONS,
    POSITION_TOLERANCE,
    MaskError,
    corners_of,
    same_places,
    volume_corners,
)
from data_prep.scan.geometry import canonical_axes, orient
from data_prep.scan.headers import Header
from data_prep.scan.volume import Volume

LABEL_MAP_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"

_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")  # Contour Geometric Type (3006,0042)
_BODY = "EXTERNAL"  # RT ROI Interpreted Type (3006,00A4) of the outline of the whole patient


def referenced_series(dataset: pydicom.Dataset) -> set[str]:
    """The Series Instance UIDs that a segmentation or a structure set refers to."""
    if dataset.get("SOPClassUID") != RTStructureSetStorage:
        items = dataset.get("ReferencedSeriesSequence") or ()
    else:
        items = [
            series
            for frame in dataset.get("ReferencedFrameOfReferenceSequence") or ()
            for study in frame.get("RTReferencedStudySequence") or ()
            for series in study.get("RTReferencedSeriesSequence") or ()
        ]
    return {str(item.SeriesInstanceUID) for item in items}


def read_dicom_mask(path: Path, volume: Volume) -> np.ndarray:
    """`data_prep.masks.reading.read_mask` of a DICOM file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path)
            if volume.headers[0].series_instance_uid not in referenced_series(dataset):
                raise MaskError("the DICOM mask refers to another series")
            if dataset.SOPClassUID == RTStructureSetStorage:
                return _fill_contours(dataset, volume)
            return _place_frames(dataset, volume)
    except MaskError:
        raise
    except Exception as error:  # pydicom raises a dozen kinds on damaged or incomplete files
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise MaskError(
            f"the DICOM mask is damaged or incomplete ({type(error).__name__})"
        ) from None


# ---- segmentations -------------------------------------------------------------------------------


def _place_frames(dataset: pydicom.Dataset, volume: Volume) -> np.ndarray:
    is_label_map = dataset.SOPClassUID == LABEL_MAP_STORAGE
    expected = ("LABELMAP" if is_label_map else "BINARY",)
    if not is_label_map and dataset.SOPClassUID != SegmentationStorage:
        expected = ()
    if dataset.SegmentationType not in expected:
        raise MaskError(
            "no binary DICOM segmentation and no label map; give Segmentation Type BINARY or "
            "LABELMAP"
        )
    # [F, rows, columns], of 0 and 1, or of segment numbers
    frames = pixel_array(dataset, raw=True).reshape(-1, dataset.Rows, dataset.Columns)
    if is_label_map:
        frames = np.where(frames == dataset.get("PixelPaddingValue", 0), 0, frames)
    geometry = [_frame_geometry(dataset, i) for i in range(len(frames))]
    segments = [1 if is_label_map else _segment_of(dataset, i) for i in range(len(frames))]
    axes = [canonical_axes(orientation) for _, orientation, _ in geometry]
    if None in axes:
        raise MaskError("the segmentation's Image Orientation (Patient) is invalid")
    if not all(1 <= segment <= MAX_REGIONS for segment in segments) or frames.max() > MAX_REGIONS:
        raise MaskError(f"the segmentation has segment numbers that are not 1 to {MAX_REGIONS}")
    images = [orient(*pair) for pair in zip(frames, axes, strict=True)]
    if {image.shape for image in images} != {volume.hu.shape[1:]}:
        height, width = images[0].shape
        raise MaskError(
            f"the mask has {height} x {width} pixels, the scan {volume.hu.shape[1]} x "
            f"{volume.hu.shape[2]}"
        )
    corners = np.stack([corners_of(*placed, frames.shape[1:]) for placed in geometry])
    slice_of_frame = same_places(corners, volume_corners(volume), volume)
    if any(place < 0 and image.any() for place, image in zip(slice_of_frame, images, strict=True)):
        raise MaskError(
            "the segmentation has regions on slices that the scan has not, or lies elsewhere by "
            f"more than {POSITION_TOLERANCE:g} of a voxel"
        )
    mask = np.zeros(volume.hu.shape, np.uint8)
    # The lowest segment is painted last, so that it wins.
    for i in sorted(range(len(images)), key=lambda i: -segments[i]):
        if slice_of_frame[i] >= 0:
            inside = images[i] != 0
            mask[slice_of_frame[i]][inside] = (images[i] * segments[i])[inside]
    return mask


def _frame_geometry(
    dataset: pydicom.Dataset, frame: int
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Image Position and Orientation (Patient), and Pixel Spacing of a frame."""
    return (
        tuple(map(float, _macro(dataset, frame, "PlanePositionSequence").ImagePositionPatient)),
        tuple(
            map(float, _macro(dataset, frame, "PlaneOrientationSequence").ImageOrientationPatient)
        ),
        tuple(map(float, _macro(dataset, frame, "PixelMeasuresSequence").PixelSpacing)),
    )


def _segment_of(dataset: pydicom.Dataset, frame: int) -> int:
    return int(_macro(dataset, frame, "SegmentIdentificationSequence").ReferencedSegmentNumber)


def _macro(dataset: pydicom.Dataset, frame: int, name: str) -> pydicom.Dataset:
    per_frame = dataset.PerFrameFunctionalGroupsSequence[frame]
    return (per_frame if name in per_frame else dataset.SharedFunctionalGroupsSequence[0])[name][0]


# ---- contours ------------------------------------------------------------------------------------


def _fill_contours(dataset: pydicom.Dataset, volume: Volume) -> np.ndarray:
    """The pixels whose centres the contours of a region hold, by the even-odd rule over all
    contours of the region on a slice. The patient's outline (EXTERNAL) is no region."""
    outlines = {
        int(item.ReferencedROINumber)
        for item in dataset.get("RTROIObservationsSequence") or ()
        if item.get("RTROIInterpretedType") == _BODY
    }
    contours: dict[int, list[np.ndarray]] = {}
    for roi in dataset.ROIContourSequence:
        region = int(roi.ReferencedROINumber)
        for contour in (roi.get("ContourSequence") or ()) if region not in outlines else ():
            if contour.ContourGeometricType in _CLOSED:
                points = np.array(contour.ContourData, np.float64).reshape(-1, 3)
                contours.setdefault(region, []).append(points)
            elif contour.ContourGeometricType != "POINT":
                raise MaskError("the structure set has contours that are not closed")
    if not contours:
        raise MaskError("the structure set has no closed contour")
    if not all(1 <= region <= MAX_REGIONS for region in contours):  # numbered anew, in their order
        contours = {i: contours[region] for i, region in enumerate(sorted(contours), start=1)}
    if len(contours) > MAX_REGIONS:
        raise MaskError(f"the structure set has {len(contours)} ROIs, not 1 to {MAX_REGIONS}")
    slices = _slices_of([points for region in contours for points in contours[region]], volume)
    mask = np.zeros(volume.hu.shape, np.uint8)
    for region in sorted(contours, reverse=True):  # the lowest number is painted last
        inside: dict[int, np.ndarray] = {}
        for points in contours[region]:
            index = slices[id(points)]
            held = _held_pixels(points, volume.headers[index])
            inside[index] = inside[index] ^ held if index in inside else held
        for index, held in inside.items():
            axes = canonical_axes(volume.headers[index].orientation)
            mask[index][orient(held, axes)] = region
    return mask


def _slices_of(contours: list[np.ndarray], volume: Volume) -> dict[int, int]:
    """{id of the points: index of the slice} of contours [N, 3].

    Raises:
        MaskError: a contour is further from all slices than the tolerance, or not in one plane.
    """
    normal = canonical_axes(volume.headers[0].orientation).normal
    heights = np.array([header.position for header in volume.headers]) @ normal
    tolerance, slices, astray = POSITION_TOLERANCE * volume.slice_spacing_mm, {}, 0
    for points in contours:
        along = points @ normal
        index = int(np.abs(heights - along.mean()).argmin())
        slices[id(points)] = index
        astray += bool((np.abs(along - heights[index]) > tolerance).any())
    if astray:
        raise MaskError(f"{astray} of {len(contours)} contours lie on no slice of the scan")
    return slices


def _held_pixels(points: np.ndarray, header: Header) -> np.ndarray:
    """Whether the centre of each pixel lies within a closed contour [N, 3]: [rows, columns] bool in
    the orientation of the file, by the even-odd rule."""
    offset = points - np.array(header.position)
    columns = offset @ np.array(header.orientation[:3]) / header.pixel_spacing[1]
    rows = offset @ np.array(header.orientation[3:]) / header.pixel_spacing[0]
    # An edge turns over all pixels to its right, in the rows that it crosses.
    turns = np.zeros((header.rows, header.columns + 1), np.int64)
    for x0, y0, x1, y1 in zip(columns, rows, np.roll(columns, -1), np.roll(rows, -1), strict=True):
        first, last = np.clip(np.ceil(sorted((y0, y1))), 0, header.rows).astype(int)
        crossed = np.arange(first, last)
        if len(crossed):
            x = x0 + (crossed - y0) * (x1 - x0) / (y1 - y0)
            turns[crossed, np.clip(np.ceil(x), 0, header.columns).astype(int)] += 1
    return np.cumsum(turns, axis=1)[:, :-1] % 2 == 1
