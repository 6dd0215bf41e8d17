"""Small DICOM series for tests: a coarse thorax whose attributes can be changed, and the whole path
from a folder to volumes."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian

from data_prep.scan.archives import list_sources
from data_prep.scan.headers import Header, NotAnImage, read_header
from data_prep.scan.reasons import NOTES, REASONS
from data_prep.scan.rules import Rules
from data_prep.scan.series import Rejection, SeriesCandidate, plan_series
from data_prep.scan.volume import Volume, load_volume

SPACING_MM = 2.5
PIXEL_MM = 5.5
_ROOT = "1.2.826.0.1.3680043.8.498"


def uid(*numbers: int) -> str:
    """A UID that depends on the numbers alone."""
    return ".".join([_ROOT, *(str(number) for number in numbers)])


def thorax(num_slices: int = 24, size: int = 64, seed: int = 0) -> np.ndarray:
    """[S, H, W] int16 HU in canonical orientation (rows to posterior, columns to left, slices to
    superior): body, two lungs, the heart on the left, the spine behind, noise. All slices and their
    mirror images differ."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    hu = np.full((num_slices, size, size), -1000.0)
    body = (x / 0.85) ** 2 + (y / 0.62) ** 2 < 1
    hu[:, body] = 40
    for side in (-1, 1):
        hu[:, ((x - 0.4 * side) / 0.27) ** 2 + (y / 0.42) ** 2 < 1] = -850
    hu[:, ((x - 0.2) / 0.2) ** 2 + ((y + 0.15) / 0.2) ** 2 < 1] = 60
    hu[:, (x / 0.1) ** 2 + ((y - 0.42) / 0.1) ** 2 < 1] = 600
    hu += rng.normal(0, 8, hu.shape)
    hu[:, ~body] = -1000
    hu[:, 2, 2] = -900 + np.arange(num_slices)  # the slice's number
    return np.rint(hu).astype(np.int16)


def slices(
    hu: np.ndarray,
    *,
    series: int = 1,
    study: int = 1,
    patient: str = "patient-1",
    spacing: float = SPACING_MM,
    intercept: int = -1024,
    signed: bool = False,
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
    origin: tuple[float, float, float] = (-170.0, -160.0, -300.0),
) -> list[Dataset]:
    """One data set for each slice of `hu` [S, H, W], in the order of `hu`, stacked along +z."""
    datasets = []
    for i, image in enumerate(hu):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID = CTImageStorage
        ds.SOPInstanceUID = uid(study, series, i + 1)
        ds.StudyInstanceUID, ds.SeriesInstanceUID = uid(study), uid(study, series)
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.Modality, ds.Manufacturer, ds.ConvolutionKernel = "CT", "Example Scanners", "STANDARD"
        ds.PatientID, ds.PatientName, ds.PatientSex, ds.PatientAge = (
            patient,
            "Doe^Jane",
            "F",
            "061Y",
        )
        ds.AcquisitionNumber, ds.InstanceNumber = 1, i + 1
        ds.KVP, ds.SliceThickness = "120", str(spacing)
        ds.ImageOrientationPatient = [f"{value:.8g}" for value in orientation]
        ds.ImagePositionPatient = [
            f"{value:.10g}" for value in (*origin[:2], origin[2] + spacing * i)
        ]
        ds.PixelSpacing = [str(PIXEL_MM), str(PIXEL_MM)]
        ds.RescaleSlope, ds.RescaleIntercept = "1", str(intercept)
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.Rows, ds.Columns = image.shape
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = (
            16,
            16,
            15,
            int(signed),
        )
        set_pixels(ds, image.astype(np.int32) - intercept)
        datasets.append(ds)
    return datasets


def set_pixels(ds: Dataset, stored: np.ndarray) -> None:
    """Stored values, little endian, in the data set's bits and sign."""
    dtype = f"<{'i' if ds.PixelRepresentation else 'u'}{ds.BitsAllocated // 8}"
    ds.Rows, ds.Columns = stored.shape[-2:]
    ds.PixelData = stored.astype(dtype).tobytes()
    ds["PixelData"].VR = "OW"


def stored(ds: Dataset) -> np.ndarray:
    """The stored values [rows, columns], as int32."""
    dtype = f"<{'i' if ds.PixelRepresentation else 'u'}{ds.BitsAllocated // 8}"
    return np.frombuffer(ds.PixelData, dtype).reshape(ds.Rows, ds.Columns).astype(np.int32)


def compress(ds: Dataset, syntax: str, encode: Callable[[np.ndarray], bytes]) -> None:
    """Replaces uncompressed pixel data by one encapsulated frame."""
    dtype = f"<{'i' if ds.PixelRepresentation else 'u'}{ds.BitsAllocated // 8}"
    image = np.frombuffer(ds.PixelData, dtype).reshape(ds.Rows, ds.Columns)
    ds.PixelData = pydicom.encaps.encapsulate([encode(image)])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = UID(syntax)


def to_bytes(ds: Dataset, *, preamble: bool = True) -> bytes:
    """The data set as the bytes of a DICOM file; without the preamble also without file meta
    information."""
    syntax = ds.file_meta.TransferSyntaxUID
    buffer = io.BytesIO()
    if preamble:
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
        ds.file_meta.MediaStorageSOPInstanceUID = ds.get("SOPInstanceUID", uid(9))
        pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    else:
        pydicom.dcmwrite(
            buffer, _without_meta(ds), implicit_vr=syntax.is_implicit_VR, little_endian=True
        )
    return buffer.getvalue()


def _without_meta(ds: Dataset) -> Dataset:
    bare = Dataset()
    bare.update(ds)
    return bare


def write(folder: Path, datasets: list[Dataset], *, seed: int = 0, preamble: bool = True) -> Path:
    """Writes one file for each data set, in random order, under names without extension that
    continue the names in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = sum(1 for _ in folder.iterdir())
    order = np.random.default_rng(seed).permutation(len(datasets))
    for number, i in enumerate(order):
        (folder / f"IM{taken + number:04d}").write_bytes(to_bytes(datasets[i], preamble=preamble))
    return folder


def enhanced(
    hu: np.ndarray, *, intercepts: list[int], order: list[int], series: int = 1
) -> Dataset:
    """One enhanced multi-frame CT of `hu` [S, H, W]: the frames in this order, with an intercept
    for each slice."""
    plain = slices(hu, series=series)
    ds = Dataset()
    ds.update(plain[0])
    ds.file_meta = plain[0].file_meta
    for keyword in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "SliceThickness",
        "RescaleSlope",
        "RescaleIntercept",
        "AcquisitionNumber",
    ):
        delattr(ds, keyword)
    ds.SOPClassUID = EnhancedCTImageStorage
    ds.NumberOfFrames = len(order)
    shared = Dataset()
    shared.PixelMeasuresSequence = [_picked(plain[0], "PixelSpacing", "SliceThickness")]
    shared.PlaneOrientationSequence = [_picked(plain[0], "ImageOrientationPatient")]
    ds.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for i in order:
        frame = Dataset()
        frame.PlanePositionSequence = [_picked(plain[i], "ImagePositionPatient")]
        rescale = Dataset()
        rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = (
            "1",
            str(intercepts[i]),
            "HU",
        )
        frame.PixelValueTransformationSequence = [rescale]
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = frames
    set_pixels(ds, np.stack([hu[i].astype(np.int32) - intercepts[i] for i in order]))
    return ds


def _picked(ds: Dataset, *keywords: str) -> Dataset:
    picked = Dataset()
    for keyword in keywords:
        setattr(picked, keyword, ds[keyword].value)
    return picked


@dataclasses.dataclass
class Outcome:
    """The volumes and refusals of a folder."""

    volumes: list[Volume]
    rejections: list[Rejection]
    not_images: list[NotAnImage]
    candidates: list[SeriesCandidate]


def planned(
    folder: Path, datasets: list[Dataset], rules: Rules | None = None
) -> list[SeriesCandidate | Rejection]:
    """Write data sets and plan their series by their headers alone."""
    write(folder, datasets)
    headers = [read_header(folder, source) for source in list_sources(folder)]
    return plan_series(headers, rules or Rules())


def convert(folder: Path, rules: Rules | None = None) -> Outcome:
    """Runs the whole path over a folder and checks that every slice is in the outcome exactly
    once."""
    rules = rules or Rules()
    read = [read_header(folder, source) for source in list_sources(folder)]
    headers = [header for header in read if isinstance(header, Header)]
    planned = plan_series(headers, rules)
    candidates = [entry for entry in planned if isinstance(entry, SeriesCandidate)]
    results = [
        entry if isinstance(entry, Rejection) else load_volume(folder, entry, rules)
        for entry in planned
    ]
    volumes = [result for result in results if not isinstance(result, Rejection)]
    rejections = [result for result in results if isinstance(result, Rejection)]
    seen = [(h.source, h.frame) for v in volumes for h in (*v.headers, *(h for h, _ in v.dropped))]
    seen += [(h.source, h.frame) for r in rejections for h in r.headers]
    assert len(seen) == len(set(seen)) == sum(header.number_of_frames for header in headers)
    reasons = [r.reason for r in rejections] + [reason for v in volumes for _, reason in v.dropped]
    assert set(reasons) <= set(REASONS)
    assert {note for v in volumes for note in v.notes} <= set(NOTES)
    return Outcome(
        volumes, rejections, [entry for entry in read if isinstance(entry, NotAnImage)], candidates
    )


def only_volume(outcome: Outcome) -> Volume:
    assert [r.reason for r in outcome.rejections] == []
    (volume,) = outcome.volumes
    return volume


def only_rejection(outcome: Outcome) -> Rejection:
    assert outcome.volumes == []
    (rejection,) = outcome.rejections
    return rejection
