"""NIfTI archives: a .nii or .nii.gz file is read as a multi-frame image, so that later steps treat
it like DICOM.

    header = read_header(input_dir, source, metadata_csv)   # Header or NotAnImage
    frames = read_frames(content, header)                   # [slices, rows, columns], stored values

The first two axes of the voxel array are columns and rows of the slices, the third counts the
slices. The affine, which points to right, anterior, superior (RAS+), becomes Image Position and
Orientation in DICOM's left, posterior, superior. A file whose third axis does not run along the
patient is refused as not axial, like a sagittal DICOM series.

A table of metadata (--metadata_csv) overrides the file, as CT-RATE needs it. Its Rescale Slope and
Intercept apply to the stored values, never on top of the file's own. Its spacing replaces the
spacing of an affine that differs.
"""

import functools
import logging
import math
import posixpath
import re
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError

from data_prep.scan.archives import (
    MAX_FILE_BYTES,
    ArchiveDirectory,
    Source,
    open_source,
    read_bytes,
)
from data_prep.scan.geometry import RAS_TO_LPS, canonical_axes
from data_prep.scan.headers import MAX_FRAMES, NIFTI, Frame, Header, NotAnImage
from data_prep.scan.nifti_metadata import Metadata, read_metadata, volume_name, without_extension

SPACING_TOLERANCE = 0.01  # relative; the spacing of an affine that differs more is replaced
AFFINE_TOLERANCE_MM = 0.1  # between sform and qform, at the corners of the volume

_HEADER_BYTES = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
_CT_RATE = re.compile(r"(?P<study>(?P<patient>(?:train|valid|test)_\d+)_[a-z]+)_\d+")
_GZIP = b"\x1f\x8b"
_MILLIMETRES = ("mm", "unknown")
_SILENT = logging.getLogger(__name__)
_SILENT.setLevel(logging.CRITICAL)  # serious faults are raised


class NiftiError(ValueError):
    """A file that cannot be used. `reason` is a name of `data_prep.scan.reasons.REASONS`; the
    message is the detail."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


# ---- headers -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _read_once(path: Path, mtime_ns: int) -> dict[str, Metadata]:
    return read_metadata(path)


def read_header(
    input_dir: ArchiveDirectory, source: Source, metadata_csv: Path | None = None
) -> Header | NotAnImage:
    """The header of one source, without its voxels. Never raises for the content of the file.

    The patient is PatientID of the table. Without a table, a name such as CT-RATE's `train_1_a_2`
    means patient `train_1` and exam `train_1_a`. Otherwise the patient is unknown, and the file is
    an exam by itself.

    Raises:
        OSError: the file cannot be read.
        InputError: the table cannot be used.
    """
    name = volume_name(source)
    if not name:
        return NotAnImage(source, "not_nifti", "")
    row = None
    if metadata_csv is not None:
        row = _read_once(metadata_csv, metadata_csv.stat().st_mtime_ns).get(name)
        if row is None:
            return NotAnImage(source, "no_metadata", "")
    try:
        nifti = _parse_header(_start_of(input_dir, source))
        return _header(nifti, source, name, row)
    except NiftiError as error:
        return NotAnImage(source, error.reason, str(error))
    except (HeaderDataError, EOFError, zlib.error) as error:
        return NotAnImage(source, "unreadable", f"{type(error).__name__} while reading the header")
    except OSError as error:
        if error.errno is not None:  # from the disk
            raise
        return NotAnImage(source, "unreadable", "damaged")


def _start_of(input_dir: ArchiveDirectory, source: Source) -> bytes:
    length = max(_HEADER_BYTES)
    if source.member:
        return _unpacked(read_bytes(input_dir, source), length)
    with open_source(input_dir, source) as file:
        return _unpacked(file.read(64 * length), length)


def _unpacked(content: bytes, length: int) -> bytes:
    """The first `length` bytes of a file that may be compressed; fewer if it ends earlier."""
    if content[:2] != _GZIP:
        return content[:length]
    parts, left = [], length
    while content[:2] == _GZIP and left:  # a gzip file may have several members
        decompressor = zlib.decompressobj(wbits=31)
        parts.append(decompressor.decompress(content, left))
        left -= len(parts[-1])
        content = decompressor.unused_data
        if not decompressor.eof:
            break
    return parts[0] if len(parts) == 1 else b"".join(parts)


def nifti_header(content: bytes) -> nibabel.Nifti1Header | nibabel.Nifti2Header:
    """The header of a whole file, which may be compressed.

    Raises:
        NiftiError: it is not a single NIfTI file.
        HeaderDataError, zlib.error: it is damaged.
    """
    return _parse_header(_unpacked(content, max(_HEADER_BYTES)))


def _parse_header(start: bytes) -> nibabel.Nifti1Header | nibabel.Nifti2Header:
    size = next(
        (s for s in _HEADER_BYTES if start[:4] in (s.to_bytes(4, "little"), s.to_bytes(4, "big"))),
        0,
    )
    if not size or len(start) < size:
        raise NiftiError("not_nifti", "no NIfTI header")
    header = _HEADER_BYTES[size](start[:size], check=False)
    if header["magic"].item()[:3] not in (b"n+1", b"n+2"):
        raise NiftiError(
            "not_nifti", "voxels in another file, or Analyze 7.5; give single .nii files"
        )
    header.check_fix(logger=_SILENT, error_level=40)
    return header


def _header(nifti: Any, source: Source, name: str, row: Metadata | None) -> Header:
    metadata = row or Metadata()
    shape = nifti.get_data_shape()
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 1:
        raise NiftiError("unreadable", f"{len(shape)} dimensions, not 3")
    columns, rows, slices = shape
    dtype = nifti.get_data_dtype()
    if slices > MAX_FRAMES or math.prod(shape) * dtype.itemsize > MAX_FILE_BYTES:
        raise NiftiError("too_large", f"{columns} x {rows} x {slices} voxels")
    affine, notes = _with_spacing(RAS_TO_LPS @ _affine(nifti, shape), metadata)
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    slope, intercept = _rescale(nifti.get_slope_inter(), metadata)
    shared = {
        "image_type": (),
        "acquisition_number": None,
        "orientation": tuple((affine[:3, :2] / steps[:2]).T.ravel().tolist()),
        "pixel_spacing": (float(steps[1]), float(steps[0])),
        "slice_thickness": metadata.slice_thickness,
        "gantry_tilt": None,
        "rescale_slope": slope,
        "rescale_intercept": intercept,
        "rescale_type": "",
        "kernel": metadata.kernel,
    }
    positions = affine[:3, 3] + np.arange(slices)[:, None] * affine[:3, 2]
    parts = _CT_RATE.fullmatch(name)
    path = posixpath.join(source.path, source.member) if source.member else source.path
    # A name is unique: `nifti_metadata.check` refuses tables whose names recur.
    series = name if row else without_extension(path)
    bits = 8 * dtype.itemsize
    return Header(
        source=source,
        transfer_syntax=NIFTI,
        pixel_data_offset=None,
        sop_class_uid="",
        sop_instance_uid="",
        study_instance_uid=parts["study"] if parts else series,
        series_instance_uid=series,
        patient_id=metadata.patient_id or (parts["patient"] if parts else ""),
        patient_id_before=None,
        modality="CT",
        body_part="",
        rows=rows,
        columns=columns,
        position=None,
        patient_position="",
        samples_per_pixel=1 if dtype.kind in "iuf" else 3,  # colour or complex numbers
        photometric="",
        bits_allocated=bits,
        bits_stored=bits,
        high_bit=bits - 1,
        pixel_representation=int(dtype.kind != "u"),
        padding_value=None,
        padding_limit=None,
        overlay_bits=(),
        burned_in_annotation=False,
        quality_control_subject=metadata.synthetic,
        manufacturer=metadata.manufacturer,
        kvp=None,
        contrast_agent="",
        age=metadata.age,
        sex=metadata.sex,
        ethnic_group="",
        number_of_frames=slices,
        frames=tuple(Frame(**shared, position=tuple(position)) for position in positions.tolist()),
        notes=notes,
        **shared,
    )


def _affine(nifti: Any, shape: tuple[int, ...]) -> np.ndarray:
    """[4, 4] float64, RAS+ in mm: the sform, or the qform where only the qform is set. Both must
    agree."""
    unit = nifti.get_xyzt_units()[0]
    if unit not in _MILLIMETRES:
        raise NiftiError("unknown_affine", f"the unit of space is {unit}, not mm")
    try:
        sform, qform = nifti.get_sform(coded=True)[0], nifti.get_qform(coded=True)[0]
    except (ValueError, HeaderDataError):
        raise NiftiError("unknown_affine", "the quaternion of the qform is none") from None
    affines = [affine for affine in (sform, qform) if affine is not None]
    if not affines:
        raise NiftiError("unknown_affine", "neither sform nor qform is set")
    for affine in affines:
        if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
            raise NiftiError("unknown_affine", "no invertible matrix")
    if len(affines) == 2:
        corners = np.array(
            [[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])]
        )
        distance = float(np.linalg.norm(corners @ (sform - qform).T, axis=1).max())
        if distance > AFFINE_TOLERANCE_MM:
            raise NiftiError("unknown_affine", f"sform and qform differ by up to {distance:.3g} mm")
    return np.array(affines[0], np.float64)


def _with_spacing(affine: np.ndarray, metadata: Metadata) -> tuple[np.ndarray, tuple[str, ...]]:
    """`affine` with the spacing of the table where the two differ, and the note about it.

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


def _rescale(
    file_rescale: tuple[float | None, float | None], metadata: Metadata
) -> tuple[float | None, float | None]:
    """Slope and intercept from stored values to HU; both None where file and table lack them."""
    table_rescale = (metadata.rescale_slope, metadata.rescale_intercept)
    if table_rescale == (None, None):
        return file_rescale
    if file_rescale in ((None, None), (1.0, 0.0)):
        return table_rescale
    if None in table_rescale or not np.allclose(file_rescale, table_rescale, rtol=1e-5, atol=1e-5):
        raise NiftiError(
            "ambiguous_rescale", "the slope and intercept of the file are not those of the table"
        )
    return table_rescale


# ---- voxels --------------------------------------------------------------------------------------


def read_frames(content: bytes, header: Header) -> np.ndarray:
    """The stored values [slices, rows, columns] of a whole file, in its data type; read-only.

    Raises:
        NiftiError: the file is damaged, cut off, or not the file of `header`.
    """
    try:
        nifti = nifti_header(content)
        shape = (header.number_of_frames, header.rows, header.columns)
        dtype, offset = nifti.get_data_dtype(), nifti.get_data_offset()
        if math.prod(nifti.get_data_shape()) != math.prod(shape):
            raise NiftiError("undecodable_pixels", "the file has another shape than its header had")
        expected = offset + math.prod(shape) * dtype.itemsize
        # One byte more: zlib compares the checksum only at the end.
        data = _unpacked(content, expected + 1)
    except (HeaderDataError, zlib.error) as error:
        raise NiftiError("undecodable_pixels", type(error).__name__) from None
    if len(data) < expected:
        raise NiftiError(
            "truncated_pixel_data", f"{max(0, len(data) - offset)} of {expected - offset} bytes"
        )
    values = np.frombuffer(data, dtype, math.prod(shape), offset).reshape(shape)
    return values.astype(dtype.newbyteorder("="), copy=False)
