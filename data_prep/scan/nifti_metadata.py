"""The table beside a NIfTI archive (--metadata_csv), with facts that the files lack, in the format
of CT-RATE."""

import collections
import math
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from data_prep.scan.archives import Source, Unreadable, list_sources
from data_prep.scan.demographics import parse_age, parse_sex
from data_prep.system.errors import InputError
from data_prep.system.spreadsheets import is_missing, read_names, read_rows

EXTENSION = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_NUMBER = r"[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?"
_SPACING = re.compile(rf"[\[(]?\s*({_NUMBER})\s*(?:[,;\\ ]\s*({_NUMBER}))?\s*[\])]?")
_NUMBER_COLUMNS = ("RescaleSlope", "RescaleIntercept", "ZSpacing", "SliceThickness")
_POSITIVE_COLUMNS = ("ZSpacing", "SliceThickness")
_COLUMNS = (
    *("VolumeName", "PatientID", "PatientSex", "PatientAge", "Manufacturer", "ConvolutionKernel"),
    *("QualityControlSubject", "XYSpacing", *_NUMBER_COLUMNS),
)


class Metadata(NamedTuple):
    """A row of the metadata table; a missing cell is None, or "" for text."""

    patient_id: str = ""
    sex: str = ""  # "M", "F", "O" or ""
    age: int | None = None  # whole years, > 89 is 90
    manufacturer: str = ""
    kernel: str = ""
    synthetic: bool = False  # QualityControlSubject is YES
    rescale_slope: float | None = None
    rescale_intercept: float | None = None
    xy_spacing: tuple[float, float] | None = None  # mm between rows, between columns
    z_spacing: float | None = None  # mm
    slice_thickness: float | None = None  # mm


def volume_name(source: Source) -> str:
    """Name of a NIfTI file without .nii or .nii.gz; "" for other files."""
    name = posixpath.basename(source.member or source.path)
    return without_extension(name) if EXTENSION.search(name) else ""


def without_extension(name: str) -> str:
    """`name` without .nii or .nii.gz, as text that can be stored: bytes that are no UTF-8 become
    escapes."""
    return EXTENSION.sub("", name).encode("utf-8", "backslashreplace").decode()


def check(input_dir: Path, metadata_csv: Path) -> None:
    """Reads the whole table and looks for the files that it names, before long work starts.

    Raises:
        InputError: see `read_metadata`; or the table names no file of the archive, or two files
          have one name.
    """
    metadata = read_metadata(metadata_csv)
    names = (
        volume_name(entry) for entry in list_sources(input_dir) if not isinstance(entry, Unreadable)
    )
    num_files = collections.Counter(name for name in names if name in metadata)
    if not num_files:
        raise InputError(
            f"--metadata_csv={metadata_csv}: none of its {len(metadata)} volumes is in "
            f"{input_dir}; VolumeName is the name of a .nii or .nii.gz file"
        )
    if several := sum(count > 1 for count in num_files.values()):
        raise InputError(
            f"--metadata_csv={metadata_csv}: {several} of its volumes have more than one file in "
            f"{input_dir}; leave the copies out or rename the files"
        )


def read_metadata(path: Path) -> dict[str, Metadata]:
    """Rows by VolumeName, which may end in .nii or .nii.gz. Columns that `Metadata` lacks are
    skipped.

    RescaleSlope, RescaleIntercept, PatientID, PatientSex, PatientAge (both as
    `data_prep.scan.demographics` reads them), Manufacturer, ConvolutionKernel, SliceThickness and
    QualityControlSubject are the DICOM attributes of the same names. XYSpacing is Pixel Spacing
    (`[0.7, 0.7]` or one number), ZSpacing the distance of the slices, both in mm.

    Raises:
        InputError: the file or its column VolumeName is missing, a cell is not a number, an age
          or a sex, or one volume has two different rows.
    """
    names = read_names(path, "--metadata_csv")
    if "VolumeName" not in names:
        raise InputError(f"--metadata_csv={path}: no column VolumeName; give it the files' names")
    columns = [name for name in _COLUMNS if name in names]
    metadata: dict[str, Metadata] = {}
    for line, row in read_rows(path, columns):
        cells = dict.fromkeys(_COLUMNS, "") | dict(zip(columns, row, strict=True))
        name = without_extension(cells["VolumeName"])
        entry = _metadata(cells, f"{path}, line {line}")
        if name and metadata.setdefault(name, entry) != entry:
            raise InputError(
                f"{path}, line {line}: a second row of one volume that says other things; leave "
                "one of the two out"
            )
    return metadata


def _metadata(cells: Mapping[str, str], place: str) -> Metadata:
    numbers = {}
    for column in _NUMBER_COLUMNS:
        try:
            value = math.nan if is_missing(cells[column]) else float(cells[column])
        except ValueError:
            value = math.inf
        if math.isinf(value) or (column in _POSITIVE_COLUMNS and value <= 0):
            kind = "a number above 0" if column in _POSITIVE_COLUMNS else "a number"
            raise InputError(f"{place}: {column} is not {kind}; correct the cell or leave it empty")
        numbers[column] = None if math.isnan(value) else value
    spacing = None
    if not is_missing(cells["XYSpacing"]):
        match = _SPACING.fullmatch(cells["XYSpacing"])
        spacing = (float(match[1]), float(match[2] or match[1])) if match else (0.0, 0.0)
        if not min(spacing) > 0:
            raise InputError(
                f"{place}: XYSpacing is not like [0.7, 0.7]; correct the cell or leave it empty"
            )
    people = {}
    for column, parse in (("PatientSex", parse_sex), ("PatientAge", parse_age)):
        try:
            people[column] = parse(cells[column])
        except ValueError as error:
            raise InputError(
                f"{place}: {column} {error}; correct the cell or leave it empty"
            ) from None
    return Metadata(
        patient_id=cells["PatientID"],
        sex=people["PatientSex"],
        age=people["PatientAge"],
        manufacturer=cells["Manufacturer"],
        kernel=cells["ConvolutionKernel"],
        synthetic=cells["QualityControlSubject"].upper() == "YES",
        rescale_slope=numbers["RescaleSlope"],
        rescale_intercept=numbers["RescaleIntercept"],
        xy_spacing=spacing,
        z_spacing=numbers["ZSpacing"],
        slice_thickness=numbers["SliceThickness"],
    )
