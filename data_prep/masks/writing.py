"""A mask on a volume -> NIfTI or DICOM segmentation in the geometry of the scan.

    # [N, N] -> [H, W]
    probabilities = resize_back(values, volume.hu.shape[1:], volume.pixel_spacing_mm)
    # mask: [S, H, W] bool
    mask_image(mask, volume, input_dir).to_filename("mask.nii.gz")
    dicom_segmentation(mask, volume, input_dir, segment).save_as("segmentation.dcm")

`data_prep.masks.reading.read_mask` reads both files back. The NIfTI file has only voxels and an
affine. The DICOM segmentation has the patient's name, identifiers and dates, as it must to be filed
with its scan.
"""

import io
import warnings
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import pydicom
from PIL import Image
from pydicom.sr.codedict import codes

from data_prep.masks.grid import POSITION_TOLERANCE
from data_prep.scan.archives import read_bytes
from data_prep.scan.geometry import RAS_TO_LPS, Axes, canonical_axes, canonical_origin
from data_prep.scan.headers import NIFTI
from data_prep.scan.nifti import nifti_header
from data_prep.scan.nifti_affine import frame_axes, read_affine, volume_shape
from data_prep.scan.volume import Volume
from data_prep.scan.window import needs_resize, resized_spacing_mm
from data_prep.system.errors import InputError

_SHEAR = 1e-4  # cosine between axes; from here on a quaternion cannot express the affine
_MILLIMETRE = 2  # in xyzt_units
_SERIES_NUMBER = 900  # beyond the scanner's own, as derived series are commonly numbered
_MAY_BE_EMPTY = (  # de-identified files often leave these out
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
)
_REPEATED = (
    "FrameOfReferenceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "SOPClassUID",
)


class MaskOutputError(InputError):
    """A mask that this kind of file cannot store, in one line without names and identifiers."""


# ---- the way back --------------------------------------------------------------------------------


def resize_back(
    values: np.ndarray, shape: tuple[int, int], pixel_spacing_mm: tuple[float, float]
) -> np.ndarray:
    """The inverse of `window.resize_slice`, for probabilities.

    The air that `resize_slice` padded with is cut off. The rest goes through the same filter.
    Slices that were never resized are returned unchanged, so that they lose no detail.

    Args:
        values: [N, N] float32, on the square field.
        shape: (H, W) of the slice before it was resized.
        pixel_spacing_mm: of the slice before it was resized, between rows and between columns.

    Returns:
        [H, W] float32.
    """
    size = len(values)
    if not needs_resize(shape, pixel_spacing_mm, size):
        return values
    edge_mm = resized_spacing_mm(shape, pixel_spacing_mm, size)
    height, width = (
        min(size, length * mm / edge_mm) for length, mm in zip(shape, pixel_spacing_mm, strict=True)
    )
    top, left = (size - height) / 2, (size - width) / 2
    image = Image.fromarray(np.ascontiguousarray(values, np.float32))
    box = (left, top, min(size, left + width), min(size, top + height))
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR, box=box))


def orient_back(image: np.ndarray, axes: Axes) -> np.ndarray:
    """The inverse of `geometry.orient`: a view of a canonical image [H, W] in the orientation of
    its file."""
    image = image[:: -1 if axes.flip_rows else 1, :: -1 if axes.flip_columns else 1]
    return image.T if axes.transpose else image


def stored_slices(mask: np.ndarray, volume: Volume) -> np.ndarray:
    """`mask` [S, H, W] in the orientation of the first slice's file, in the volume's order: [S,
    rows, columns] uint8."""
    axes = canonical_axes(volume.headers[0].orientation)
    return np.stack([orient_back(image, axes) for image in mask]).astype(np.uint8)


# ---- NIfTI ---------------------------------------------------------------------------------------


def mask_image(mask: np.ndarray, volume: Volume, input_dir: Path) -> nibabel.Nifti1Image:
    """The mask as NIfTI, 0 and 1.

    For a NIfTI scan it has the scan's shape, axes and affine. For DICOM slices the axes are columns
    and rows as stored, and slices towards superior, at the places from Image Position (Patient).
    Missing slices of the scan are empty. A gantry's tilt is a shear of the affine.

    Args:
        mask: [S, H, W] bool or 0 and 1, on `volume.hu`.
        volume: the scan.
        input_dir: the directory that the volume's sources are relative to.

    Raises:
        MaskOutputError: the slices are too irregular for an affine.
        OSError: the scan's file cannot be read.
    """
    stored = stored_slices(mask, volume).transpose(2, 1, 0)  # columns, rows, slices
    if volume.headers[0].transfer_syntax == NIFTI:
        return _like_the_scan(stored, volume, input_dir)
    affine, places = slice_grid(volume)
    voxels = np.zeros((*stored.shape[:2], places[-1] + 1), np.uint8)
    voxels[:, :, places] = stored
    image = nibabel.Nifti1Image(voxels, affine)
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    sheared = np.abs(directions.T @ directions - np.eye(3)).max() > _SHEAR
    image.set_qform(None if sheared else affine, code=0 if sheared else 1)
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm")
    return image


def slice_grid(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """The regular grid of DICOM slices.

    Returns:
        Affine [4, 4] float64 from (column, row, place) to right, anterior, superior in mm, and the
        place of each slice on the third axis, [S] int, from 0 on. Places without a slice are
        missing slices.

    Raises:
        MaskOutputError: a slice is off every place by more than a quarter of a voxel.
    """
    header = volume.headers[0]
    normal = canonical_axes(header.orientation).normal
    first = canonical_origin(header)
    origins = np.array([canonical_origin(other) - first for other in volume.headers])
    origins += header.position
    if len(origins) == 1:
        places, step = np.zeros(1, int), normal * volume.slice_thickness_mm
    else:
        steps = np.rint(np.diff(volume.position_mm) / volume.slice_spacing_mm)
        places = np.concatenate([[0], np.cumsum(np.maximum(1, steps))]).astype(int)
        step = (origins[-1] - origins[0]) / places[-1]
    off = origins - origins[0] - places[:, None] * step
    along = off @ normal
    within = np.linalg.norm(off - along[:, None] * normal, axis=1)
    astray = (np.abs(along) > POSITION_TOLERANCE * volume.slice_spacing_mm) | (
        within > POSITION_TOLERANCE * min(volume.pixel_spacing_mm)
    )
    if astray.any():
        raise MaskOutputError(
            f"{np.count_nonzero(astray)} of {len(origins)} slices lie off a regular grid by more "
            f"than {POSITION_TOLERANCE:g} of a voxel, which a NIfTI affine can't tell"
        )
    affine = np.eye(4)
    affine[:3, 0] = np.array(header.orientation[:3]) * header.pixel_spacing[1]
    affine[:3, 1] = np.array(header.orientation[3:]) * header.pixel_spacing[0]
    affine[:3, 2], affine[:3, 3] = step, origins[0]
    return RAS_TO_LPS @ affine, places


def _like_the_scan(stored: np.ndarray, volume: Volume, input_dir: Path) -> nibabel.Nifti1Image:
    """The mask on the voxels of a NIfTI scan, with axes in the scan's order. Only the affines of
    the scan's header and their unit are copied, since its texts may name the patient."""
    first = volume.headers[0]
    voxels = np.zeros((first.columns, first.rows, first.number_of_frames), np.uint8)
    voxels[:, :, [header.frame for header in volume.headers]] = stored
    scan = nifti_header(read_bytes(input_dir, first.source))
    order = frame_axes(read_affine(scan, volume_shape(scan), spacing_is_known=True))
    voxels = np.moveaxis(voxels, (2, 1, 0), order)
    (sform, sform_code), (qform, qform_code) = (
        scan.get_sform(coded=True),
        scan.get_qform(coded=True),
    )
    image = nibabel.Nifti1Image(voxels, sform if sform_code else qform)
    image.set_qform(qform, code=int(qform_code))
    image.set_sform(sform, code=int(sform_code))
    image.header["xyzt_units"] = int(scan["xyzt_units"]) & 7 or _MILLIMETRE
    return image


# ---- DICOM segmentation --------------------------------------------------------------------------


class Segment(NamedTuple):
    """The facts of a DICOM segmentation about its one segment and the model that drew it.

    label: Segment Label, up to 64 characters.
    nodule: coded as a nodule (SNOMED CT 27925004); otherwise as tissue (85756007), the least
      specific code.
    algorithm: Segment Algorithm Name.
    algorithm_version: its version.
    model: Manufacturer's Model Name: the recipe.
    serial_number: Device Serial Number: the name of the weights.
    """

    label: str
    nodule: bool
    algorithm: str
    algorithm_version: str
    model: str
    serial_number: str


def dicom_segmentation(
    mask: np.ndarray, volume: Volume, input_dir: Path, segment: Segment
) -> pydicom.Dataset:
    """The mask as a binary DICOM segmentation of the scan's slices, with the patient and study of
    the scan.

    Args:
        mask: [S, H, W] bool or 0 and 1, on `volume.hu`.
        volume: a DICOM scan.
        input_dir: the directory that the volume's sources are relative to.
        segment: its facts.

    Raises:
        ImportError: highdicom is not installed.
        MaskOutputError: a NIfTI scan, or headers without attributes that a segmentation repeats.
        OSError: a file of the scan cannot be read.
    """
    import highdicom

    if volume.headers[0].transfer_syntax == NIFTI:
        raise MaskOutputError(
            "a NIfTI scan has no DICOM headers that a segmentation could refer to"
        )
    axes = [canonical_axes(header.orientation) for header in volume.headers]
    if len({(one.transpose, one.flip_rows, one.flip_columns) for one in axes}) > 1:
        raise MaskOutputError(
            "some slices of the scan are stored turned, and a segmentation has one orientation; "
            "ask for NIfTI"
        )
    kind = (
        (codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Nodule)
        if segment.nodule
        else 2 * (codes.SCT.Tissue,)
    )
    description = highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label=segment.label,
        segmented_property_category=kind[0],
        segmented_property_type=kind[1],
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=segment.algorithm,
            family=codes.DCM.ArtificialIntelligence,
            version=segment.algorithm_version,
        ),
    )
    frames = stored_slices(mask, volume)
    sources = dict.fromkeys(header.source for header in volume.headers)
    images = [_header_of(read_bytes(input_dir, source)) for source in sources]
    if volume.headers[0].number_of_frames > 1:
        if len(images) > 1:
            raise MaskOutputError(
                f"the scan is {len(images)} multi-frame files, and a segmentation refers to one"
            )
        all_frames = np.zeros((volume.headers[0].number_of_frames, *frames.shape[1:]), np.uint8)
        all_frames[[header.frame for header in volume.headers]] = frames
        frames = all_frames
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return highdicom.seg.Segmentation(
                source_images=images,
                pixel_array=frames,
                segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=[description],
                series_instance_uid=highdicom.UID(),
                series_number=_SERIES_NUMBER,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer=segment.algorithm,
                manufacturer_model_name=segment.model,
                software_versions=segment.algorithm_version,
                device_serial_number=segment.serial_number,
                series_description=f"{segment.label} ({segment.algorithm}, automatic)"[:64],
                omit_empty_frames=bool(frames.any()),
            )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        missing = [name for name in _REPEATED if any(not image.get(name) for image in images)]
        detail = f"no {', '.join(missing)}" if missing else type(error).__name__
        raise MaskOutputError(
            f"the scan's headers lack what a segmentation must repeat ({detail})"
        ) from None


def _header_of(content: bytes) -> pydicom.Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True, force=True)
        for keyword in _MAY_BE_EMPTY:
            if keyword not in dataset:
                setattr(dataset, keyword, "")
        return dataset
