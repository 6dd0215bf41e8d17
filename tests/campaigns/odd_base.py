"""A small sound chest scan to which one oddness is added (`odd_headers`, `odd_files`,
`odd_bodies`), and the statement of its right outcome.

The stored values are made from rendered phantoms (`data_prep.synthetic`), with noise of their own,
so that no two scans hold the same pixels. The right HU follow from the stored values in a few lines
here that share nothing with the code under test.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import imagecodecs
import numpy as np
import pydicom
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from data_prep.synthetic.dicom_writer import VENDORS, Vendor, encode_frame
from data_prep.synthetic.exam import Options, render_series, sample_exam
from tests.helpers.dicom_files import to_bytes

AIR_HU = -1000
NUM_PATIENTS = 12
Orientation = tuple[bool, bool, bool]  # stored transposed, rows to anterior, columns to the right


@dataclasses.dataclass(frozen=True)
class Right:
    """One right volume.

    hu: [S, H, W] int16 or float32; rows to posterior, columns to the left, slices to superior.
    spacing_mm, pixel_mm: between slices; between rows and between columns.
    pairs: slices whose next slice is their neighbour.
    lost: reason -> slices that are dropped beside the volume.
    """

    hu: np.ndarray
    spacing_mm: float
    pixel_mm: tuple[float, float]
    pairs: int
    lost: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class OddScan:
    """The files of one or more exams of one patient, and what is right.

    files: path -> content.
    exams: for each exam its right volumes, any one of which may be taken.
    refusal: a reason for which it is right to refuse the scan, too; "": it must be taken.
    """

    kind: str
    files: dict[str, bytes]
    exams: tuple[tuple[Right, ...], ...]
    refusal: str = ""


@functools.lru_cache(maxsize=2 * NUM_PATIENTS)
def _rendered(seed: int, patient: int, size: int) -> tuple[np.ndarray, float, np.ndarray]:
    """HU [S, size, size] >= -1000 of a whole chest, pixel spacing in mm, pixels outside the
    circular field of view."""
    options = Options(seed=seed, image_size=size, num_slices=0, slice_spacing_mm=4.5)
    exam, rng = sample_exam(patient, options)
    series, _ = render_series(exam, "soft", 2, rng)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    return np.maximum(series.hu, AIR_HU), series.pixel_spacing_mm, np.hypot(x, y) > 1


class Sound:
    """A sound scan of random habits. A kind changes its fields, asks for data sets, and changes
    these."""

    def __init__(self, seed: int, number: int, kind: str, size: int = 0):
        self.rng = rng = np.random.default_rng([seed, number])
        self.kind, self.names = kind, (f"odd {seed}", str(number))
        self.vendor: Vendor = VENDORS[int(rng.integers(len(VENDORS)))]
        size = size or int(rng.choice([64, 80, 96], p=[0.6, 0.2, 0.2]))
        patient = int(rng.integers(NUM_PATIENTS)) if size == 64 else int(rng.integers(3))
        hu, self.pixel_mm, self.outside = _rendered(seed, patient, size)
        count = int(rng.integers(22, 42))
        start = int(len(hu) * 0.4) - count // 2 + int(rng.integers(-3, 4))
        start = int(np.clip(start, 0, len(hu) - count))
        hu = hu[start : start + count].copy()
        hu += rng.integers(-5, 6, hu.shape, dtype=np.int16)
        self.hu = np.clip(hu, AIR_HU, 3000)
        self.spacing_mm = float(rng.choice([0.625, 0.75, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0]))
        self.thickness_mm = float(min(3.0, self.spacing_mm * rng.choice([1, 1.25])))
        self.orientation: Orientation = (False, False, False)
        if rng.random() < 0.15:
            self.orientation = (False, True, True)  # prone
        self.tilt_degrees = self.rotation_degrees = 0.0
        self.origin = tuple(
            round(float(v), 3) for v in (*rng.uniform(-260, -150, 2), *rng.uniform(-900, 300, 1))
        )
        self.syntax = str(
            rng.choice([ExplicitVRLittleEndian, ImplicitVRLittleEndian], p=[0.75, 0.25])
        )

    # ---- data sets -------------------------------------------------------------------------

    def axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors to the patient's left and to posterior, tilted and rotated as the scan."""
        tilt, turn = np.radians([self.tilt_degrees, self.rotation_degrees])
        left = np.array([np.cos(turn), np.sin(turn), 0.0])
        posterior = np.array([-np.sin(turn), np.cos(turn), 0.0])
        cos, sin = np.cos(tilt), np.sin(tilt)
        lean = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])
        return lean @ left, lean @ posterior

    def place(self, ds: Dataset, index: int, orientation: Orientation | None = None) -> None:
        """Image Orientation, Position and Pixel Spacing of slice `index`."""
        transposed, flip_rows, flip_columns = orientation or self.orientation
        left, posterior = self.axes()
        rows, columns = self.hu.shape[1:]
        origin = np.add(self.origin, (0, 0, index * self.spacing_mm))
        origin = origin + flip_columns * left * (columns - 1) * self.pixel_mm
        origin = origin + flip_rows * posterior * (rows - 1) * self.pixel_mm
        across, down = (-left if flip_columns else left), (-posterior if flip_rows else posterior)
        if transposed:
            across, down = down, across
        ds.ImageOrientationPatient = [f"{value:.9g}" for value in (*across, *down)]
        ds.ImagePositionPatient = [f"{value:.9g}" for value in origin]
        ds.SliceLocation = f"{origin[2]:.9g}"
        ds.PixelSpacing = [f"{self.pixel_mm:.9g}"] * 2

    def stored(self, hu: np.ndarray) -> np.ndarray:
        """HU [..., H, W] as the vendor stores them, int32; its own value outside the field."""
        values = hu.astype(np.int32) - self.vendor.intercept
        low, high = (-32768, 32767) if self.vendor.signed else (0, 2**self.vendor.bits_stored - 1)
        assert values.min() >= low and values.max() <= high
        if self.vendor.outside is not None:
            values[..., self.outside] = self.vendor.outside
        return values

    def datasets(
        self, hu: np.ndarray | None = None, *, series: int = 2, study: int = 1
    ) -> list[Dataset]:
        """One data set for each slice of `hu` (this scan's), in its order."""
        hu = self.hu if hu is None else hu
        datasets = []
        for index, values in enumerate(self.stored(hu)):
            ds = Dataset()
            ds.file_meta = FileMetaDataset()
            ds.file_meta.TransferSyntaxUID = UID(self.syntax)
            ds.SpecificCharacterSet = "ISO_IR 100"
            ds.ImageType = list(self.vendor.image_type)
            ds.SOPClassUID = CTImageStorage
            ds.SOPInstanceUID = self.uid("instance", study, series, index)
            ds.StudyInstanceUID = self.uid("study", study)
            ds.SeriesInstanceUID = self.uid("series", study, series)
            ds.FrameOfReferenceUID = self.uid("frame of reference", study)
            ds.Modality, ds.Manufacturer = "CT", self.vendor.name
            ds.PatientID, ds.PatientName = "-".join(self.names), "ODD^SOUND"
            ds.PatientSex, ds.PatientAge = "F", "061Y"
            ds.StudyDate, ds.StudyTime = f"2019{study:02d}07", "101500"
            ds.AcquisitionDate, ds.AcquisitionTime = ds.StudyDate, "101733.25"
            ds.BodyPartExamined, ds.PatientPosition, ds.KVP = "CHEST", "HFS", "120"
            ds.SliceThickness = f"{self.thickness_mm:g}"
            ds.ConvolutionKernel = self.vendor.soft_kernels[0].split("\\")
            ds.AcquisitionNumber, ds.SeriesNumber, ds.InstanceNumber = 1, series, index + 1
            if self.vendor.superior_first:
                ds.InstanceNumber = len(hu) - index
            self.place(ds, index)
            ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
            bits = self.vendor.bits_stored
            ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, bits, bits - 1
            ds.PixelRepresentation = int(self.vendor.signed)
            if self.vendor.padding:
                ds.PixelPaddingValue = self.vendor.outside
            ds.RescaleIntercept, ds.RescaleSlope = str(self.vendor.intercept), "1"
            ds.RescaleType = "HU"
            set_stored(ds, self.lay(values))
            datasets.append(ds)
        return datasets

    def lay(self, image: np.ndarray, orientation: Orientation | None = None) -> np.ndarray:
        """An upright image [H, W] in the rows and columns that are stored."""
        transposed, flip_rows, flip_columns = orientation or self.orientation
        image = image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
        return image.T if transposed else image

    def uid(self, *names: object) -> str:
        return generate_uid(entropy_srcs=[*self.names, *map(str, names)])

    # ---- the end ---------------------------------------------------------------------------

    def right(
        self,
        hu: np.ndarray | None = None,
        *,
        lost: Mapping[str, int] | None = None,
        pairs: int | None = None,
    ) -> Right:
        """The volume of `hu` (this scan's): what is stored, padding and less than -1500 as air."""
        values = self.stored(self.hu if hu is None else hu) + self.vendor.intercept
        values[values < -1500] = AIR_HU
        if self.vendor.padding:
            values[..., self.outside] = AIR_HU
        spacing = self.spacing_mm * float(np.cos(np.radians(self.tilt_degrees)))
        pairs = len(values) - 1 if pairs is None else pairs
        return Right(values.astype(np.int16), spacing, (self.pixel_mm,) * 2, pairs, lost or {})

    def odd(
        self,
        files: Sequence[Dataset] | dict[str, bytes],
        *exams: Right | Sequence[Right],
    ) -> OddScan:
        """The finished scan; data sets are written under usual names. Without `exams` this scan
        is right as it is."""
        if not isinstance(files, dict):
            files = self.named([to_bytes(ds) for ds in files])
        choices = exams or (self.right(),)
        return OddScan(
            self.kind, files, tuple((e,) if isinstance(e, Right) else tuple(e) for e in choices)
        )

    def named(self, contents: Sequence[bytes], folder: str = "") -> dict[str, bytes]:
        """The contents under names that scanners and archives use, in random order."""
        style = int(self.rng.integers(4))
        order = self.rng.permutation(len(contents))
        names = (
            "DICOM/SE00002/IM{:05d}",
            "{:06d}.dcm",
            "CT.2.{:d}.img",
            "1.3.12.2.1107.5.1.4.{:d}.IMA",
        )
        return {
            folder + names[style].format(int(n) + 1): data
            for n, data in zip(order, contents, strict=True)
        }

    def choice(self, values: Sequence[Any]) -> Any:
        return values[int(self.rng.integers(len(values)))]


# ---- kinds ------------------------------------------------------------------------------------

Kind = Callable[[Sound], OddScan]
KINDS: dict[str, tuple[Kind, int]] = {}  # name -> (kind, matrix; 0: any)


def kind(function: Kind | None = None, *, size: int = 0) -> Any:
    """Registers a kind of oddness under its function's name."""
    if function is None:
        return functools.partial(kind, size=size)
    KINDS[function.__name__] = (function, size)
    return function


def make(seed: int, number: int, size: int = 0) -> OddScan:
    """Scan `number` of the archive of a seed; the kinds take turns. `size` is the matrix where the
    kind does not choose it, 0 a random one."""
    name = list(KINDS)[number % len(KINDS)]
    function, own_size = KINDS[name]
    with pydicom.config.disable_value_validation():
        return function(Sound(seed, number, name, own_size or size))


# ---- changes of data sets ---------------------------------------------------------------------


def put(datasets: Sequence[Dataset], keyword: str, value: Any) -> None:
    """Sets an element in all slices; a function gets the slice's number."""
    for index, ds in enumerate(datasets):
        setattr(ds, keyword, value(index) if callable(value) else value)


def drop(datasets: Sequence[Dataset], *keywords: str) -> None:
    for ds in datasets:
        for keyword in keywords:
            if keyword in ds:
                delattr(ds, keyword)


def raw(ds: Dataset, keyword: str, value: bytes, vr: str = "") -> None:
    """Sets the bytes of an element as they are, under any VR; little endian."""
    tag = Tag(tag_for_keyword(keyword))
    value += b"\0" * (len(value) % 2)
    implicit = ds.file_meta.TransferSyntaxUID.is_implicit_VR
    vr = None if implicit else vr or dictionary_VR(tag)
    ds[tag] = RawDataElement(tag, vr, len(value), value, 0, implicit, True)


def stored_dtype(ds: Dataset, order: str = "<") -> str:
    return f"{order}{'i' if ds.PixelRepresentation else 'u'}{ds.BitsAllocated // 8}"


def set_stored(ds: Dataset, values: np.ndarray) -> None:
    """Stored values [H, W] in the byte order of the data set's syntax."""
    ds.Rows, ds.Columns = values.shape
    big = ds.file_meta.TransferSyntaxUID == ExplicitVRBigEndian
    ds.PixelData = values.astype(stored_dtype(ds, ">" if big else "<")).tobytes()
    ds["PixelData"].VR = "OW"


def get_stored(ds: Dataset) -> np.ndarray:
    return np.frombuffer(ds.PixelData, stored_dtype(ds)).reshape(ds.Rows, ds.Columns)


def compressed_frame(ds: Dataset, syntax: str) -> bytes:
    """The slice's little endian pixels as one compressed frame."""
    values = get_stored(ds)
    if syntax == JPEG2000Lossless:
        return imagecodecs.jpeg2k_encode(
            values, codecformat="j2k", reversible=True, level=0, bitspersample=ds.BitsStored
        )
    if syntax == JPEGLosslessSV1:
        return imagecodecs.ljpeg_encode(values.view(np.uint16), bitspersample=16)
    if syntax == JPEGLSLossless:
        return imagecodecs.jpegls_encode(values.view(np.uint16))
    assert syntax == RLELossless
    return encode_frame(values, RLELossless, 16)


def compress(ds: Dataset, syntax: str, behind: bytes = b"", **options: Any) -> None:
    """Replaces little endian pixels by one encapsulated frame with some bytes behind it."""
    frame = compressed_frame(ds, syntax)
    data = frame if syntax == RLELossless else encapsulate([frame + behind], **options)
    ds.PixelData = data
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = UID(syntax)
