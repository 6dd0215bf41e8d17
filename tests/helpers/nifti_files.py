"""Small NIfTI files for tests: the thorax of the DICOM tests, along any axes and in any type."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
from nibabel import orientations

from data_prep.scan import nifti
from data_prep.scan.archives import list_sources
from data_prep.scan.headers import NotAnImage
from data_prep.scan.rules import Rules
from data_prep.scan.series import Rejection, plan_series
from data_prep.scan.volume import load_volume
from tests.helpers import dicom_files

NUM_SLICES = 21
# unlike, and as many columns as rows: a transposition shows in the spacing
ROW_MM, COLUMN_MM = 5.5, 5.0
ORIGIN = (-150.0, -170.0, -300.0)  # of DICOM's patient space
# the same, RAS+
AFFINE = np.array(
    [[-COLUMN_MM, 0, 0, 150], [0, -ROW_MM, 0, 170], [0, 0, 2.5, -300], [0, 0, 0, 1.0]]
)
THORAX = dicom_files.thorax(NUM_SLICES)


def image_of(
    values: np.ndarray, axes: str = "LPS", affine: np.ndarray = AFFINE
) -> nibabel.Nifti1Image:
    """`values` [S, H, W] in canonical orientation, stored along other axes, as they are (no
    scaling)."""
    turn = orientations.ornt_transform(
        orientations.axcodes2ornt("LPS"), orientations.axcodes2ornt(axes)
    )
    stored = orientations.apply_orientation(values.transpose(2, 1, 0), turn)
    affine = affine @ orientations.inv_ornt_aff(turn, values.shape[::-1])
    image = nibabel.Nifti1Image(stored, affine, dtype=stored.dtype)
    image.header.set_xyzt_units("mm")
    return image


def write(
    path: Path,
    values: np.ndarray = THORAX,
    axes: str = "LPS",
    scale: tuple[float, float] | None = None,
    **options,
) -> Path:
    """`scale`: the file's scl_slope and scl_inter (None: not set); the voxels are stored as they
    are."""
    image = image_of(values, axes, **options)
    image.header.set_slope_inter(*(scale or (1, 0)))
    content = bytearray(image.to_bytes())
    if not scale:  # nibabel always writes one
        content[112:116] = bytes(4)
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


def headers_of(folder: Path, table: Path | None = None) -> list:
    return [nifti.read_header(folder, source, table) for source in list_sources(folder)]


def load(folder: Path, table: Path | None = None, rules: Rules | None = None):
    """The volume or Rejection of the only file of a folder, or its `NotAnImage`."""
    (header,) = headers_of(folder, table)
    if isinstance(header, NotAnImage):
        return header
    (planned,) = plan_series([header], rules or Rules())
    return (
        planned
        if isinstance(planned, Rejection)
        else load_volume(folder, planned, rules or Rules())
    )


def write_table(path: Path, header: str, *rows: str) -> Path:
    path.write_text("\n".join(["VolumeName," + header, *rows, ""]))
    return path


def with_forms(sform: np.ndarray | None, qform: np.ndarray | None) -> nibabel.Nifti1Image:
    image = image_of(THORAX)
    image.header.set_sform(sform, code=0 if sform is None else 1)
    spacing = next((form for form in (qform, sform) if form is not None), AFFINE)
    image.header.set_qform(spacing, code=0 if qform is None else 1)
    return image


def save_as_it_is(image: nibabel.Nifti1Image, path: Path) -> None:
    """`to_filename` would write the image's affine over the forms of the header."""
    values = np.asarray(image.dataobj)
    image.header["magic"], image.header["vox_offset"] = b"n+1", 352
    path.write_bytes(image.header.binaryblock + bytes(4) + values.tobytes(order="F"))
