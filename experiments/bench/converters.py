"""Converters of scans that are timed: their floor, `prepare` and its steps, and other packages."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import imagecodecs
import numpy as np
import pydicom
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import pixel_array

from data_prep.dataset.storage import encode_record, read_records, write_records
from data_prep.labels import staging
from data_prep.labels.lookup import LabelSources
from data_prep.pipeline.convert import convert_exam
from data_prep.pipeline.notes import Conversion
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.prepare import prepare
from data_prep.scan.archives import Source, list_sources
from data_prep.scan.decoders import COMPRESSED_SYNTAXES, decode
from data_prep.scan.headers import read_header
from data_prep.scan.loading import plan_exams
from data_prep.scan.series import SeriesCandidate
from data_prep.scan.volume import load_volume
from data_prep.scan.window import window_to_uint8
from data_prep.system.errors import InputError
from data_prep.system.files import file_sha256

OPTIONS = Options(splits=(1.0, 0.0, 0.0))

EXPLICIT = "1.2.840.10008.1.2.1"

RLE = "1.2.840.10008.1.2.5"


class Syntax(NamedTuple):
    """A transfer syntax and how to write a frame [H, W] uint16 in it."""

    uid: str
    encode: Callable[[np.ndarray], bytes] | None


SYNTAXES = {
    "uncompressed": Syntax(EXPLICIT, None),
    "RLE": Syntax(RLE, None),  # written by pydicom
    "JPEG-LS": Syntax("1.2.840.10008.1.2.4.80", imagecodecs.jpegls_encode),
    "JPEG lossless": Syntax(
        "1.2.840.10008.1.2.4.70", lambda frame: imagecodecs.ljpeg_encode(frame, bitspersample=16)
    ),
    "JPEG 2000": Syntax(
        "1.2.840.10008.1.2.4.90",
        lambda frame: imagecodecs.jpeg2k_encode(frame, level=0, reversible=True, codecformat="j2k"),
    ),
}


def exams_of(input_dir: Path) -> list[list[SeriesCandidate]]:
    """The exams that `prepare` would try to convert."""
    sources = (entry for entry in list_sources(input_dir) if isinstance(entry, Source))
    return plan_exams((read_header(input_dir, source) for source in sources), OPTIONS.rules).exams


def write_archive(input_dir: Path, folder: Path, syntax: Syntax, copies: int) -> int:
    """Write the first series of `input_dir` in a transfer syntax, as `copies` patients.

    Returns:
        the slices of one patient.

    Raises:
        InputError: `prepare` refuses all its series, or the matrix is not 512 x 512.
    """
    exams = exams_of(input_dir)
    volume = load_volume(input_dir, exams[0][0], OPTIONS.rules) if exams else None
    if not hasattr(volume, "hu"):
        raise InputError(
            f"--input_dir={input_dir}: no series that prepare takes; give one CT series"
        )
    if volume.hu.shape[1:] != (512, 512):
        raise InputError(
            f"--input_dir={input_dir}: slices of {volume.hu.shape[1:]}; give 512 x 512"
        )
    frames = (volume.hu.astype(np.int32) + 1024).clip(0, 65535).astype(np.uint16)
    for index, (header, frame) in enumerate(zip(volume.headers, frames, strict=True)):
        ds = pydicom.dcmread(input_dir / header.source.path)
        ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
            if keyword in ds:
                del ds[keyword]
        ds.PixelData = frame.tobytes()
        ds["PixelData"].VR = "OW"
        ds.file_meta.TransferSyntaxUID = EXPLICIT
        if syntax.uid == RLE:
            ds.compress(RLE, generate_instance_uid=False)
        elif syntax.encode:
            ds.PixelData = encapsulate([syntax.encode(frame)])
            ds["PixelData"].VR = "OB"
            ds["PixelData"].is_undefined_length = True
            ds.file_meta.TransferSyntaxUID = syntax.uid
        study, series = ds.StudyInstanceUID[:58], ds.SeriesInstanceUID[:58]
        for copy in range(copies):
            ds.PatientID, ds.StudyInstanceUID, ds.SeriesInstanceUID = (
                f"copy{copy}",
                f"{study}.{copy}",
                f"{series}.{copy}",
            )
            (folder / f"{copy}").mkdir(parents=True, exist_ok=True)
            ds.save_as(folder / f"{copy}" / f"{index:05d}.dcm")
    return len(frames)


def floor(paths: list[Path]) -> Iterator[bytes]:
    """Records of bare decoding and windowing."""
    for index, path in enumerate(paths):
        ds = pydicom.dcmread(path)
        syntax = ds.file_meta.TransferSyntaxUID
        if syntax in COMPRESSED_SYNTAXES:
            frame = get_frame(ds.PixelData, 0)
            stored = decode(frame, ds.Rows, ds.Columns, ds.BitsAllocated // 8).values
        else:
            stored = pixel_array(ds, raw=True)
        yield _record(stored.astype(np.int16) + np.int16(-1024), index)


def simple_itk(folders: list[Path]) -> Iterator[bytes]:
    """Records from SimpleITK's series reader."""
    import SimpleITK

    for folder in folders:
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        hu = SimpleITK.GetArrayFromImage(reader.Execute())
        yield from (_record(image.astype(np.int16), index) for index, image in enumerate(hu))


def dicom2nifti_nibabel(folders: list[Path]) -> Iterator[bytes]:
    """Records from dicom2nifti, then nibabel on its file."""
    import dicom2nifti
    import nibabel

    for folder in folders:
        with tempfile.TemporaryDirectory() as scratch:
            volume = f"{scratch}/volume.nii"
            dicom2nifti.dicom_series_to_nifti(str(folder), volume, reorient_nifti=False)
            hu = np.asanyarray(nibabel.load(volume).dataobj)
        yield from (_record(hu[..., i].T.astype(np.int16), i) for i in range(hu.shape[2]))


def _record(hu: np.ndarray, index: int) -> bytes:
    return encode_record(window_to_uint8(hu, OPTIONS.windows), "volume", index, float(index), True)


def steps(archive: Path, folder: Path) -> dict[str, Callable[[], None]]:
    """The steps of `prepare`, each to be called after the one before."""
    notes, records = folder / "notes", folder / "records"
    notes.mkdir(parents=True)
    records.mkdir()
    labels = staging.stage(
        LabelSources("dicom"), archive, folder / "labels.sqlite", folder / "violations.csv"
    )
    run = Conversion(
        archive,
        notes,
        records,
        OPTIONS.rules,
        OPTIONS.windows,
        OPTIONS.image_size,
        b"0" * 16,
        labels,
    )
    exams = exams_of(archive)

    def convert() -> None:
        for exam in exams:
            convert_exam(run, exam)

    def write_shards() -> None:
        staged = (
            record
            for path in sorted(records.glob("*.array_record"))
            for record in read_records(path)
        )
        write_records(folder / "shard", staged)
        file_sha256(folder / "shard")

    return {
        "headers, plan": lambda: exams_of(archive),
        "convert, stage": convert,
        "shards": write_shards,
    }


def prepare_quietly(archive: Path, num_workers: int = 1) -> None:
    """`prepare` into a temporary directory, without its messages."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(open(os.devnull, "w")):
        where = Directories(archive, Path(folder) / "dataset", Path(folder) / "audit")
        prepare(OPTIONS, where, num_workers=num_workers)
