"""Archives of CT headers without pixels, of any size, from a few real or synthetic images."""

from collections.abc import Iterator
from pathlib import Path

import pydicom

from data_prep.scan.archives import Source, list_sources, read_bytes
from data_prep.scan.headers import Header, read_header
from data_prep.scan.rules import Rules
from data_prep.system.errors import InputError

FILES_PER_SERIES = 100
_SERIES_PER_FOLDER = 100
_NUM_TEMPLATES = 4
_STUDY, _IMAGE = "1.2.826.0.1.3680043.8.498.1{:012d}", "1.2.826.0.1.3680043.8.498.1{:012d}.1{:05d}"
_PATIENT, _HEIGHT = "patient{:012d}", "{:+010.2f}"
_MARKS = (10**11 + 7, 10**4 + 7)  # series and image of a template: texts that occur nowhere else


def texts(series: int, image: int) -> list[str]:
    """The texts that identify a file, each of fixed length: image UID, series UID, study UID,
    patient, position."""
    return [
        _IMAGE.format(series, image),
        _STUDY.format(series) + ".1",
        _STUDY.format(series),
        _PATIENT.format(series // 2),
        _HEIGHT.format(image * 2.5),
    ]


def templates(input_dir: Path) -> list[bytes]:
    """Files of one header each, without pixels and private elements, with the texts of `_MARKS`.

    Raises:
        InputError: there is no CT image.
    """
    by_series: dict[str, bytes] = {}
    for source in list_sources(input_dir):
        if len(by_series) == _NUM_TEMPLATES:
            break
        header = read_header(input_dir, source) if isinstance(source, Source) else None
        if (
            isinstance(header, Header)
            and _is_usable(header)
            and header.series_instance_uid not in by_series
        ):
            by_series[header.series_instance_uid] = _template(read_bytes(input_dir, source))
    if not by_series:
        raise InputError(
            f"--input_dir={input_dir}: no CT image of thin slices in it; give other scans"
        )
    return list(by_series.values())


def _is_usable(header: Header) -> bool:
    thickness = header.slice_thickness
    return (
        header.modality == "CT"
        and thickness is not None
        and thickness <= Rules().max_slice_thickness_mm
        and header.position is not None
        and header.number_of_frames == 1
    )


def _template(content: bytes) -> bytes:
    ds = pydicom.dcmread(pydicom.filebase.DicomBytesIO(content), stop_before_pixels=True)
    ds.remove_private_tags()
    image, series, study, patient, height = texts(*_MARKS)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = image
    ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.PatientID = series, study, patient
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.ImagePositionPatient = ["-170", "-170", height]
    ds.add_new("PixelData", "OW", b"\0\0")
    buffer = pydicom.filebase.DicomBytesIO()
    ds.save_as(buffer, implicit_vr=False, little_endian=True)
    return buffer.getvalue()


def make_archive(headers: list[bytes], folder: Path, num_files: int) -> None:
    """Write the files, each as large as its template."""
    marks = [text.encode() for text in texts(*_MARKS)]
    for series, of_series in _series(num_files):
        path = folder / f"{series // _SERIES_PER_FOLDER:05d}" / f"{series % _SERIES_PER_FOLDER:02d}"
        path.mkdir(parents=True)
        for image in of_series:
            content = headers[series % len(headers)]
            for mark, text in zip(marks, texts(series, image), strict=True):
                content = content.replace(mark, text.encode())
            (path / f"IM{image:04d}").write_bytes(content)


def _series(num_files: int) -> Iterator[tuple[int, range]]:
    for series in range(-(-num_files // FILES_PER_SERIES)):
        yield series, range(min(FILES_PER_SERIES, num_files - series * FILES_PER_SERIES))
