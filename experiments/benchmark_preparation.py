r"""Speed of `prepare` beside its floor and beside other converters, by transfer syntax, on one
core.

    python -m experiments.benchmark_preparation --input_dir=SCAN

SCAN holds one CT series as plain DICOM files. Its slices are written anew in each of --syntaxes,
--copies times as other patients, and each archive is measured with a warm page cache:

    floor         reading the files (pydicom, with our decoders), windowing, writing one ArrayRecord
    file: nothing else prepare       `data_prep.pipeline.prepare.prepare` with one worker, from its
                  first process to the last table; its steps one after the other in this process,
                  too
    SimpleITK, dicom2nifti + nibabel (where installed; dicom2nifti writes NIfTI without compression)
                  the same slices through them, then our windowing and one ArrayRecord file

and the uncompressed one with a cold page cache. Numbers are slices per second of CPU time, of all
threads and processes, the median of --repeats; those of a cold cache are of wall time.
"""

import contextlib
import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import imagecodecs
import numpy as np
import pydicom
from absl import flags
from pydicom.encaps import encapsulate
from pydicom.pixels import pixel_array

from data_prep.dataset.storage import encode_record, read_records, write_records
from data_prep.labels import staging
from data_prep.labels.lookup import LabelSources
from data_prep.pipeline.convert import convert_exam
from data_prep.pipeline.notes import Conversion
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.prepare import prepare
from data_prep.scan.archives import Source, list_sources
from data_prep.scan.decoders import DECODER_DEPENDENCIES, decode
from data_prep.scan.headers import Header, read_header
from data_prep.scan.series import SeriesCandidate, plan_series, select_reconstructions
from data_prep.scan.volume import load_volume
from data_prep.scan.window import window_to_uint8
from data_prep.system import command_line
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
    """What `prepare` would try to convert."""
    headers = [
        read_header(input_dir, source)
        for source in list_sources(input_dir)
        if isinstance(source, Source)
    ]
    planned = plan_series(
        [header for header in headers if isinstance(header, Header)], OPTIONS.rules
    )
    return select_reconstructions(
        [p for p in planned if isinstance(p, SeriesCandidate)], OPTIONS.rules
    )


def write_archive(input_dir: Path, folder: Path, syntax: Syntax, copies: int) -> int:
    """Writes the first series of `input_dir` in a transfer syntax, as `copies` patients; returns
    the slices of one.

    Raises:
        InputError: there is no series that `prepare` takes, or its matrix is not 512 x 512.
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


# ---- what is measured ----------------------------------------------------------------------------


def floor(paths: list[Path], shard: Path) -> None:
    """Bare decoding, windowing and compression."""

    def records() -> Iterator[bytes]:
        for index, path in enumerate(paths):
            ds = pydicom.dcmread(path)
            syntax = ds.file_meta.TransferSyntaxUID
            if syntax in DECODER_DEPENDENCIES:
                stored = decode(ds, syntax, 0)
            else:
                stored = pixel_array(ds, raw=True)
            yield _record(stored.astype(np.int16) + np.int16(-1024), index)

    write_records(shard, records())


def simple_itk(folders: list[Path], shard: Path) -> None:
    """SimpleITK's series reader."""
    import SimpleITK

    def records() -> Iterator[bytes]:
        for folder in folders:
            reader = SimpleITK.ImageSeriesReader()
            reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
            hu = SimpleITK.GetArrayFromImage(reader.Execute())
            yield from (_record(image.astype(np.int16), index) for index, image in enumerate(hu))

    write_records(shard, records())


def dicom2nifti_nibabel(folders: list[Path], shard: Path) -> None:
    """dicom2nifti, and nibabel on what it wrote."""
    import dicom2nifti
    import nibabel

    def records() -> Iterator[bytes]:
        for folder in folders:
            with tempfile.TemporaryDirectory() as scratch:
                dicom2nifti.dicom_series_to_nifti(
                    str(folder), f"{scratch}/volume.nii", reorient_nifti=False
                )
                hu = np.asanyarray(nibabel.load(f"{scratch}/volume.nii").dataobj)
            yield from (_record(hu[..., i].T.astype(np.int16), i) for i in range(hu.shape[2]))

    write_records(shard, records())


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


def cpu_seconds() -> float:
    """Of this process, its threads, and the children that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def median_seconds(
    function: Callable[[], object], repeats: int, clock: Callable[[], float] = cpu_seconds
) -> float:
    """Of some calls."""
    times = []
    for _ in range(repeats):
        start = clock()
        function()
        times.append(clock() - start)
    return statistics.median(times)


def evict(folder: Path) -> None:
    """Drops the files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def prepare_anew(archive: Path, num_workers: int = 1) -> None:
    """Into a temporary directory, silently."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(open(os.devnull, "w")):
        where = Directories(archive, Path(folder) / "dataset", Path(folder) / "audit")
        prepare(OPTIONS, where, num_workers=num_workers)


def measure(name: str, archive: Path, copies: int, repeats: int, scratch: Path) -> None:
    """Prints the rows of one archive."""
    folders = [archive / str(copy) for copy in range(copies)]
    paths = [path for folder in folders for path in sorted(folder.iterdir())]
    shard = scratch / "shard"

    def row(what: str, seconds: float, beside: float | None = None) -> None:
        share = "" if beside is None else f"{beside / seconds:7.2f}"
        print(f"{name:<16}{what:<40}{len(paths) / seconds:9.0f}{share}", flush=True)

    least = median_seconds(lambda: floor(paths, shard), repeats)
    row("floor: decode, window, compress", least)
    row(
        "prepare, one worker, all of it",
        median_seconds(lambda: prepare_anew(archive), repeats),
        least,
    )
    total = 0.0
    for number, (step, function) in enumerate(steps(archive, scratch / f"steps {name}").items()):
        seconds = median_seconds(function, repeats)
        total += seconds
        row(f"  {'+ ' * bool(number)}{step}", seconds)
    row("  these steps together", total, least)
    for package, function in (("SimpleITK", simple_itk), ("dicom2nifti", dicom2nifti_nibabel)):
        if importlib.util.find_spec(package) is None:
            print(f"{name:<16}{package}: not installed", flush=True)
            continue
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(open(os.devnull, "w")):
                warnings.simplefilter("ignore")
                seconds = median_seconds(
                    lambda function=function: function(folders, shard), repeats
                )
        except Exception as error:  # of any kind: some cannot read some of the syntaxes
            print(f"{name:<16}{package}: failed ({type(error).__name__})", flush=True)
            continue
        row(package, seconds, least)


def measure_cold(archive: Path, num_slices: int, repeats: int) -> None:
    """Prints wall times of `prepare` with a warm and a cold page cache, and of reading alone."""

    def read() -> None:
        for path in sorted(archive.rglob("*.dcm")):
            path.read_bytes()

    def cold(function: Callable[[], None]) -> float:
        times = []
        for _ in range(repeats):
            evict(archive)
            times.append(median_seconds(function, 1, time.perf_counter))
        return statistics.median(times)

    for what, seconds in (
        ("reading the files one by one, cold", cold(read)),
        (
            "prepare, one worker, warm",
            median_seconds(lambda: prepare_anew(archive), repeats, time.perf_counter),
        ),
        ("prepare, one worker, cold", cold(lambda: prepare_anew(archive))),
    ):
        print(f"{'wall time':<16}{what:<40}{num_slices / seconds:9.0f}", flush=True)


def main(argv: list[str]) -> int:
    """Command line."""
    chosen = flags.FLAGS
    unknown = set(chosen.syntaxes) - set(SYNTAXES)
    if unknown:
        raise InputError(f"--syntaxes: no {', '.join(unknown)}; choose from {','.join(SYNTAXES)}")
    # numpy's threads would blur what one core does
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        return subprocess.call(
            [sys.executable, "-m", "experiments.benchmark_preparation", *sys.argv[1:]],
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
    print(f"{'':56}{'slices/s':>9}{'of the floor':>14}")
    for name in chosen.syntaxes:
        with tempfile.TemporaryDirectory() as folder:
            archive, scratch = Path(folder) / "archive", Path(folder) / "scratch"
            scratch.mkdir()
            num_slices = (
                write_archive(Path(chosen.input_dir), archive, SYNTAXES[name], chosen.copies)
                * chosen.copies
            )
            measure(name, archive, chosen.copies, chosen.repeats, scratch)
            if name == "uncompressed":
                measure_cold(archive, num_slices, chosen.repeats)
    return 0


if __name__ == "__main__":
    flags.DEFINE_string(
        "input_dir", None, "Directory of one DICOM series of 512 x 512 slices.", required=True
    )
    flags.DEFINE_list(
        "syntaxes", list(SYNTAXES), "Transfer syntaxes to measure, separated by commas."
    )
    flags.DEFINE_integer("copies", 4, "Patients of each archive.", lower_bound=1)
    flags.DEFINE_integer("repeats", 3, "The median of so many runs counts.", lower_bound=1)
    command_line.run(main)
