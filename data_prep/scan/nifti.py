"""NIfTI archives: a .nii or .nii.gz file is read as a multi-frame image, so that later steps treat
it like DICOM.

    header = read_header(input_dir, source, metadata_csv)   # Header or NotAnImage
    frames = read_frames(content, header)                   # [slices, rows, columns], stored values

The affine says where all voxels lie (`data_prep.scan.nifti_affine`). The axis along the patient
counts the slices, wherever it is stored; the other two are their rows and columns. The affine,
which points to right, anterior, superior (RAS+), becomes Image Position and Orientation in DICOM's
left, posterior, superior. A file without an axis along the patient is refused as not axial.

A table of metadata (--metadata_csv) overrides the file, as CT-RATE needs it. Its Rescale Slope and
Intercept apply to the stored values, never on top of the file's own, nor to values that are HU
already (CT-RATE's second version repeats the table of the first). Its spacing replaces the spacing
of an affine that differs.
"""

import functools
import logging
import math
import posixpath
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError
from scipy import ndimage

from data_prep.scan.archives import (
    MAX_FILE_BYTES,
    ArchiveDirectory,
    Source,
    open_source,
    read_bytes,
)
from data_prep.scan.headers import MAX_FRAMES, NIFTI, Frame, Header, NotAnImage
from data_prep.scan.nifti_affine import (
    NiftiError,
    frame_axes,
    read_affine,
    volume_shape,
    with_spacing,
)
from data_prep.scan.nifti_metadata import Metadata, read_metadata, volume_name, without_extension

_HEADER_BYTES = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
_CT_RATE = re.compile(r"(?P<study>(?P<patient>(?:train|valid|test)_\d+)_[a-z]+)_\d+")
_PAIR = "half of a pair .hdr and .img; convert the pair to one .nii file"
_GZIP = b"\x1f\x8b"
_MAX_EXTENSION_BYTES = 1 << 26  # between header and voxels
_PADDING_HU = -2000.0  # becomes air, as DICOM's padding does
_SAMPLE_STEP = 8  # pixels and slices; see `_are_hu`
_SILENT = logging.getLogger(__name__)
_SILENT.setLevel(logging.CRITICAL)  # serious faults are raised


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
        pair = posixpath.basename(source.member or source.path).lower().endswith((".hdr", ".img"))
        return NotAnImage(source, "not_nifti", _PAIR if pair else "")
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
    declared = float(header["vox_offset"])
    if not (declared >= _first_voxel(header) and declared.is_integer()):
        header["vox_offset"] = 0  # unknown: `_data_offset` looks for it
    elif declared > _first_voxel(header) + _MAX_EXTENSION_BYTES:
        raise NiftiError("unreadable", "the voxels are said to begin far behind the header")
    header.check_fix(logger=_SILENT, error_level=40)
    return header


def _header(nifti: Any, source: Source, name: str, row: Metadata | None) -> Header:
    metadata = row or Metadata()
    shape = volume_shape(nifti)
    spacing_is_known = None not in (metadata.xy_spacing, metadata.z_spacing)
    affine = read_affine(nifti, shape, spacing_is_known)
    order = frame_axes(affine)
    slices, rows, columns = (shape[axis] for axis in order)
    dtype = nifti.get_data_dtype()
    if slices > MAX_FRAMES or math.prod(shape) * dtype.itemsize > MAX_FILE_BYTES:
        raise NiftiError("too_large", f"{columns} x {rows} x {slices} voxels")
    affine, notes = with_spacing(affine[:, [*order[::-1], 3]], metadata)
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    slope, intercept, from_table = _rescale(nifti.get_slope_inter(), metadata)
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
        contrast_agent="",
        age=metadata.age,
        sex=metadata.sex,
        ethnic_group="",
        number_of_frames=slices,
        frames=tuple(Frame(**shared, position=tuple(position)) for position in positions.tolist()),
        notes=notes,
        rescale_from_table=from_table,
        **shared,
    )


def _rescale(
    file_rescale: tuple[float | None, float | None], metadata: Metadata
) -> tuple[float | None, float | None, bool]:
    """Slope and intercept from stored values to HU, both None where file and table lack them; and
    whether the table alone says so."""
    table_rescale = (metadata.rescale_slope, metadata.rescale_intercept)
    if table_rescale == (None, None):
        return *file_rescale, False
    if file_rescale in ((None, None), (1.0, 0.0)):
        return *table_rescale, None not in table_rescale and table_rescale != (1.0, 0.0)
    if None in table_rescale or not np.allclose(file_rescale, table_rescale, rtol=1e-5, atol=1e-5):
        raise NiftiError(
            "ambiguous_rescale", "the slope and intercept of the file are not those of the table"
        )
    return *table_rescale, False


# ---- voxels --------------------------------------------------------------------------------------


def read_frames(content: bytes, header: Header) -> np.ndarray:
    """The stored values [slices, rows, columns] of a whole file, in its data type; read-only.

    Raises:
        NiftiError: the file is damaged, cut off, or not the file of `header`.
    """
    try:
        nifti = nifti_header(content)
        stored = volume_shape(nifti)
        order = frame_axes(read_affine(nifti, stored, spacing_is_known=True))
        shape = tuple(stored[axis] for axis in order)
        if shape != (header.number_of_frames, header.rows, header.columns):
            raise NiftiError("undecodable_pixels", "the file has another shape than its header had")
        dtype = nifti.get_data_dtype()
        size = math.prod(shape) * dtype.itemsize
        offset = _data_offset(content, nifti, size)
        # One byte more: zlib compares the checksum only at the end.
        data = _unpacked(content, offset + size + 1)
    except (HeaderDataError, zlib.error) as error:
        raise NiftiError("undecodable_pixels", type(error).__name__) from None
    if len(data) < offset + size:
        raise NiftiError("truncated_pixel_data", f"{max(0, len(data) - offset)} of {size} bytes")
    values = np.frombuffer(data, dtype, math.prod(shape), offset).reshape(stored, order="F")
    values = np.ascontiguousarray(values.transpose(order))  # no copy where slices come last
    return values.astype(dtype.newbyteorder("="), copy=False)


def _first_voxel(nifti: Any) -> int:
    """The smallest offset of voxels: behind the header and the four bytes that tell whether
    extensions follow."""
    return int(nifti["sizeof_hdr"]) + 4


def _data_offset(content: bytes, nifti: Any, size: int) -> int:
    """Where the `size` bytes of voxels begin.

    The header tells. Where it gives no usable offset, or one among the extensions, the voxels begin
    behind the last extension, or behind the header if the file ends that early.
    """
    first, declared = _first_voxel(nifti), int(nifti["vox_offset"])
    has_extensions = _unpacked(content, first)[first - 4 : first - 3] not in (b"", b"\0")
    if declared and not has_extensions:
        return declared
    data = _unpacked(content, first + size + _MAX_EXTENSION_BYTES)
    if not declared and len(data) == first - 4 + size:
        return first - 4
    end, order = first, nifti.endianness
    while has_extensions and end + 8 <= len(data):
        length, code = struct.unpack(order + "ii", data[end : end + 8])
        if length < 16 or length % 16 or code < 0 or code % 2 or end + length + size > len(data):
            break
        end += length
    return max(declared, end)


def with_padding(values: np.ndarray, header: Header) -> np.ndarray:
    """A slice of stored values [rows, columns] whose NaN lie at the edge, where programs that
    resample leave them: they become padding, which is air in HU.

    Raises:
        NiftiError: values that are infinite, or NaN within the image.
    """
    missing = np.isnan(values)
    regions, _ = ndimage.label(missing, np.ones((3, 3)))
    at_edge = np.unique([*regions[0], *regions[-1], *regions[:, 0], *regions[:, -1]])
    if np.isinf(values).any() or not np.isin(regions[missing], at_edge).all():
        raise NiftiError("undecodable_pixels", "infinite values, or NaN within the image")
    slope, intercept = header.rescale_slope or 1.0, header.rescale_intercept or 0.0
    return np.where(missing, values.dtype.type((_PADDING_HU - intercept) / slope), values)


def are_hu(frames: np.ndarray, header: Header) -> bool:
    """Whether stored values [slices, rows, columns] are HU as they stand and would not be with the
    rescale of the metadata table.

    Raises:
        NiftiError: they look like HU both ways, or neither way.
    """
    sample = frames[len(frames) % _SAMPLE_STEP // 2 :: _SAMPLE_STEP, ::_SAMPLE_STEP, ::_SAMPLE_STEP]
    sample = sample.astype(np.float64)
    as_they_stand = _look_like_hu(sample)
    if as_they_stand == _look_like_hu(sample * header.rescale_slope + header.rescale_intercept):
        raise NiftiError(
            "ambiguous_rescale",
            f"the stored values look like HU {'both' if as_they_stand else 'neither'} with and "
            "without the slope and intercept of the table",
        )
    return as_they_stand


def _look_like_hu(values: np.ndarray) -> bool:
    """Whether some values are air or lung, many are soft tissue and few are dense, as in every CT
    of the body, apart from padding."""
    image = values[values >= -1500]
    air = np.count_nonzero((image >= -1100) & (image < -500))
    soft = np.count_nonzero((image >= -200) & (image < 300))
    dense = np.count_nonzero(image > 700)
    return air > 0.002 * image.size and soft > 0.05 * image.size and dense < 0.15 * image.size
