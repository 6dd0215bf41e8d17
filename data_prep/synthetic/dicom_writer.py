"""Writes rendered phantom volumes as CT Image Storage series with the tag habits of four
manufacturers."""

import dataclasses
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

COMMENT = "SYNTHETIC phantom, not a patient"


@dataclasses.dataclass(frozen=True)
class Vendor:
    """How one manufacturer's scanners fill in the attributes that differ between manufacturers.

    `intercept` is Rescale Intercept in HU, `outside` the stored value beyond the circular field of
    view (None: the reconstruction fills the square), `padding` tells whether Pixel Padding Value is
    written, `collimations` lists (slice thickness, slice spacing) in mm.
    """

    name: str
    models: tuple[str, ...]
    soft_kernels: tuple[str, ...]
    sharp_kernels: tuple[str, ...]
    signed: bool
    bits_stored: int
    intercept: int
    outside: int | None
    padding: bool
    image_type: tuple[str, ...]
    collimations: tuple[tuple[float, float], ...]
    tube_voltages: tuple[int, ...]
    superior_first: bool


VENDORS = (
    Vendor(
        name="SIEMENS",
        models=("Sensation 64", "SOMATOM Definition AS+", "Biograph 40"),
        soft_kernels=("B30f", "B31f", "B40f", "I31f\\3"),
        sharp_kernels=("B60f", "B70f"),
        signed=False,
        bits_stored=12,
        intercept=-1024,
        outside=0,
        padding=False,
        image_type=("ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"),
        collimations=((3.0, 3.0), (3.0, 2.5), (2.0, 2.0)),
        tube_voltages=(100, 120),
        superior_first=True,
    ),
    Vendor(
        name="GE MEDICAL SYSTEMS",
        models=("LightSpeed16", "LightSpeed VCT", "Discovery CT750 HD"),
        soft_kernels=("STANDARD", "SOFT"),
        sharp_kernels=("LUNG", "BONE"),
        signed=True,
        bits_stored=16,
        intercept=-1024,
        outside=-2000,
        padding=True,
        image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
        collimations=((2.5, 2.5), (2.5, 3.0)),
        tube_voltages=(120, 140),
        superior_first=True,
    ),
    Vendor(
        name="TOSHIBA",
        models=("Aquilion", "Aquilion ONE"),
        soft_kernels=("FC08", "FC13", "FC18"),
        sharp_kernels=("FC51", "FC86"),
        signed=True,
        bits_stored=16,
        intercept=0,
        outside=-2000,
        padding=True,
        image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
        collimations=((3.0, 3.0), (2.0, 2.0)),
        tube_voltages=(120, 135),
        superior_first=True,
    ),
    Vendor(
        name="Philips",
        models=("Brilliance 64", "iCT 256", "Ingenuity CT"),
        soft_kernels=("B", "C"),
        sharp_kernels=("L", "YC"),
        signed=False,
        bits_stored=12,
        intercept=-1000,
        outside=None,
        padding=False,
        image_type=("ORIGINAL", "PRIMARY", "AXIAL", "HELIX"),
        collimations=((3.0, 3.0), (3.0, 2.5)),
        tube_voltages=(100, 120),
        superior_first=False,
    ),
)

# Transfer syntaxes with their shares in percent; the fast ones are the common ones. JPEG-LS and
# JPEG 2000 are written by vendors with unsigned pixels only.
SYNTAXES_SIGNED = (
    (ExplicitVRLittleEndian, 50),
    (ImplicitVRLittleEndian, 32),
    (RLELossless, 12),
    (DeflatedExplicitVRLittleEndian, 6),
)
SYNTAXES_UNSIGNED = (
    (ExplicitVRLittleEndian, 40),
    (ImplicitVRLittleEndian, 27),
    (JPEGLSLossless, 18),
    (RLELossless, 8),
    (JPEG2000Lossless, 7),
)


@dataclasses.dataclass(frozen=True)
class Series:
    """One series to write: `hu` [S, H, W] int16 with slices to superior, rows to posterior, columns
    to the left.

    `position_mm` is (x, y, z) of the centre of the first voxel of slice 0 in the patient coordinate
    system; `outside` [H, W] bool marks pixels that the scanner did not reconstruct.
    `patient_position` is (0018,5100); `mirrored` writes the columns to the patient's right, as some
    feet-first scans have it.
    """

    hu: np.ndarray
    position_mm: tuple[float, float, float]
    pixel_spacing_mm: float
    slice_spacing_mm: float
    slice_thickness_mm: float
    outside: np.ndarray
    vendor: Vendor
    transfer_syntax: str
    patient_position: str
    mirrored: bool
    attributes: dict[str, object]
    entropy: tuple[str, ...]
    instance_uids: tuple[str, ...] | None = None  # by slice; made from `entropy` if None


def choose_transfer_syntax(vendor: Vendor, rng: np.random.Generator) -> str:
    """One of the transfer syntaxes that the vendor's pixel format allows, by the shares above."""
    syntaxes = SYNTAXES_SIGNED if vendor.signed else SYNTAXES_UNSIGNED
    shares = np.array([share for _, share in syntaxes], dtype=float)
    return str(syntaxes[rng.choice(len(syntaxes), p=shares / shares.sum())][0])


def series_uid(entropy: tuple[str, ...]) -> str:
    """The UID that these words name: the same words always give the same UID."""
    return generate_uid(entropy_srcs=list(entropy))


def stored_values(hu: np.ndarray, outside: np.ndarray, vendor: Vendor) -> np.ndarray:
    """HU int16 [..., H, W] -> stored pixel values in the vendor's format, `outside` [H, W] filled
    its way."""
    low, high = (-32768, 32767) if vendor.signed else (0, 2**vendor.bits_stored - 1)
    stored = np.clip(hu.astype(np.int32) - vendor.intercept, low, high)
    if vendor.outside is not None:
        stored[..., outside] = vendor.outside
    return stored.astype(np.int16 if vendor.signed else np.uint16)


def encode_frame(pixels: np.ndarray, transfer_syntax: str, bits_stored: int) -> bytes:
    """[H, W] int16 or uint16 -> Pixel Data bytes under a transfer syntax (encapsulated where it is
    compressed)."""
    if transfer_syntax == RLELossless:
        return encapsulate([_rle(pixels)])
    if transfer_syntax == JPEGLSLossless:
        return encapsulate([imagecodecs.jpegls_encode(pixels)])
    if transfer_syntax == JPEG2000Lossless:
        frame = imagecodecs.jpeg2k_encode(
            pixels, codecformat="j2k", reversible=True, level=0, bitspersample=bits_stored
        )
        return encapsulate([frame])
    return pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()


def _rle(pixels: np.ndarray) -> bytes:
    """DICOM RLE (PS3.5 annex G): the high bytes, then the low bytes, each row packed by itself."""
    planes = np.ascontiguousarray(pixels).astype("<u2", casting="unsafe").view(np.uint8)
    planes = planes.reshape(*pixels.shape, 2)
    segments = []
    for plane in (planes[..., 1], planes[..., 0]):
        segment = imagecodecs.packbits_encode(np.ascontiguousarray(plane))
        segments.append(segment + b"\0" * (len(segment) % 2))
    header = np.zeros(16, "<u4")
    header[:3] = 2, 64, 64 + len(segments[0])
    return header.tobytes() + b"".join(segments)


def as_written(series: Series, pixels: np.ndarray) -> np.ndarray:
    """Pixels [..., H, W] of the patient's orientation in the rows and columns of the written
    images."""
    column, row, _ = _orientation(series)
    return pixels[..., :: row[1], :: column[0]]


def instance_uid(series: Series, index: int) -> str:
    """SOP Instance UID of slice `index`."""
    if series.instance_uids is not None:
        return series.instance_uids[index]
    return series_uid((*series.entropy, "instance", str(index)))


def slice_height(series: Series, index: int) -> float:
    """z of Image Position (Patient) of slice `index`, mm."""
    return round(series.position_mm[2] + index * series.slice_spacing_mm, 4)


def write_series(series: Series, paths: list[Path]) -> None:
    """Writes slice i of the series to `paths[i]`; the folders must exist."""
    count = len(series.hu)
    pixels = stored_values(series.hu, series.outside, series.vendor)
    pixels = as_written(series, pixels)
    column, row, origin = _orientation(series)
    dataset = _series_dataset(series)
    dataset.ImageOrientationPatient = [*column, *row]
    for index in range(count):
        instance = count - index if series.vendor.superior_first else index + 1
        position = (origin[0], origin[1], slice_height(series, index))
        dataset.SOPInstanceUID = instance_uid(series, index)
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.InstanceNumber = instance
        dataset.ImagePositionPatient = [round(value, 4) for value in position]
        dataset.SliceLocation = round(position[2], 4)
        save(dataset, pixels[index], series.transfer_syntax, paths[index])


def write_localizer(series: Series, path: Path) -> None:
    """Writes the series' frontal projection, as the scout image that a scanner takes first."""
    projection = series.hu.astype(np.float32).clip(-1000, 1500).mean(axis=1)[::-1]
    repeats = max(1, round(series.slice_spacing_mm / series.pixel_spacing_mm))
    pixels = stored_values(
        np.repeat(projection, repeats, axis=0).astype(np.int16),
        np.zeros((1, 1), bool),
        dataclasses.replace(series.vendor, outside=None),
    )
    dataset = _series_dataset(series)
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    dataset.SeriesDescription = "Scout"
    dataset.SOPInstanceUID = series_uid((*series.entropy, "localizer"))
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.SeriesInstanceUID = series_uid((*series.entropy, "localizer series"))
    dataset.SeriesNumber = 1
    dataset.InstanceNumber = 1
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    top = series.position_mm[2] + (len(series.hu) - 1) * series.slice_spacing_mm
    dataset.ImagePositionPatient = [round(series.position_mm[0], 4), 0, round(top, 4)]
    dataset.PixelSpacing = [
        round(series.slice_spacing_mm / repeats, 6),
        round(series.pixel_spacing_mm, 6),
    ]
    dataset.Rows, dataset.Columns = pixels.shape
    save(dataset, pixels, series.transfer_syntax, path)


def _orientation(series: Series) -> tuple[list[int], list[int], tuple[float, float, float]]:
    """Direction cosines of the columns and rows as written, and the position of the first written
    voxel."""
    x, y, z = series.position_mm
    extent = (series.hu.shape[1] - 1) * series.pixel_spacing_mm
    prone = series.patient_position.endswith("P")
    column = [-1, 0, 0] if prone or series.mirrored else [1, 0, 0]
    row = [0, -1, 0] if prone else [0, 1, 0]
    return column, row, (x + extent if column[0] < 0 else x, y + extent if prone else y, z)


def _series_dataset(series: Series) -> Dataset:
    """All attributes that the slices of a series share."""
    vendor = series.vendor
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.TransferSyntaxUID = series.transfer_syntax
    meta.ImplementationClassUID = pydicom.uid.PYDICOM_IMPLEMENTATION_UID
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SpecificCharacterSet = "ISO_IR 100"
    dataset.ImageType = list(vendor.image_type)
    dataset.SOPClassUID = CTImageStorage
    dataset.Modality = "CT"
    dataset.Manufacturer = vendor.name
    dataset.QualityControlSubject = "YES"
    dataset.ImageComments = COMMENT
    dataset.BodyPartExamined = "CHEST"
    dataset.PatientPosition = series.patient_position
    dataset.SliceThickness = series.slice_thickness_mm
    dataset.GantryDetectorTilt = 0
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = series.hu.shape[1:]
    dataset.PixelSpacing = [round(series.pixel_spacing_mm, 6)] * 2
    dataset.BitsAllocated = 16
    dataset.BitsStored = vendor.bits_stored
    dataset.HighBit = vendor.bits_stored - 1
    dataset.PixelRepresentation = int(vendor.signed)
    if vendor.padding:
        dataset.PixelPaddingValue = vendor.outside
    dataset.RescaleIntercept = vendor.intercept
    dataset.RescaleSlope = 1
    dataset.RescaleType = "HU"
    dataset.WindowCenter = 40
    dataset.WindowWidth = 400
    for keyword, value in series.attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def save(dataset: Dataset, pixels: np.ndarray, transfer_syntax: str, path: Path) -> None:
    """Writes one image [H, W] as a DICOM file with preamble and file meta information."""
    data = encode_frame(pixels, transfer_syntax, dataset.BitsStored)
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OW"
    compressed = pydicom.uid.UID(transfer_syntax).is_encapsulated
    dataset["PixelData"].is_undefined_length = compressed
    if compressed:
        dataset["PixelData"].VR = "OB"
    with path.open("wb") as file:
        pydicom.dcmwrite(file, dataset, enforce_file_format=True)
