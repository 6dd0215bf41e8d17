r"""Speed and memory of the inventory: listing, reading headers and planning of archives of growing
size.

    python -m experiments.benchmark_inventory --input_dir=SCANS --num_files=10000,100000,1000000

Makes files of the headers of a few CT images of SCANS (real or phantom) without their pixels, of
other patients, 100 files a series, in --scratch_dir (once, if it is given); plans them as prepare
does; and reads the headers again as after a kill at the last moment, when all are staged. Each size
is measured in processes of its own: files a second of each step, what a file takes of all cores
together (which other work on the machine hardly changes), the peak of memory of the main process
and of the largest worker. Linux only (it reads /proc).
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pydicom
from absl import flags

from data_prep.pipeline.plan import all_headers, list_archive, plan_buckets, read_plan, scan_headers
from data_prep.scan.archives import Source, list_sources, read_bytes
from data_prep.scan.headers import Header, read_header
from data_prep.scan.rules import Rules
from data_prep.system import command_line
from data_prep.system.errors import InputError, RunFailed
from data_prep.system.files import PARTIAL, folder_written_whole
from data_prep.system.workers import WorkerPool, usable_cores

FLAGS = flags.FLAGS

_FILES_PER_SERIES = 100
_SERIES_PER_FOLDER = 100
_NUM_TEMPLATES = 4
_STUDY, _IMAGE = "1.2.826.0.1.3680043.8.498.1{:012d}", "1.2.826.0.1.3680043.8.498.1{:012d}.1{:05d}"
_PATIENT, _HEIGHT = "patient{:012d}", "{:+010.2f}"
_MARKS = (10**11 + 7, 10**4 + 7)  # series and image of a template: nothing else holds these texts


class Measured(NamedTuple):
    """Of one size."""

    num_files: int
    seconds: dict[str, tuple[float, float]]  # step -> on the clock; of all cores that worked
    staged_bytes: int
    main_memory_mb: float
    worker_memory_mb: float


def texts(series: int, image: int) -> list[str]:
    """What tells a file from others, each of fixed length: image, series and study UID, patient,
    position."""
    return [
        _IMAGE.format(series, image),
        _STUDY.format(series) + ".1",
        _STUDY.format(series),
        _PATIENT.format(series // 2),
        _HEIGHT.format(image * 2.5),
    ]


def templates(input_dir: Path) -> list[bytes]:
    """Files of one header each, without pixels and private elements, with the texts of `_MARKS`.

    Raises InputError if there is no CT image.
    """
    found: dict[str, bytes] = {}
    for source in list_sources(input_dir):
        if len(found) == _NUM_TEMPLATES:
            break
        header = read_header(input_dir, source) if isinstance(source, Source) else None
        if (
            isinstance(header, Header)
            and _is_usable(header)
            and header.series_instance_uid not in found
        ):
            found[header.series_instance_uid] = _template(read_bytes(input_dir, source))
    if not found:
        raise InputError(
            f"--input_dir={input_dir}: no CT image of thin slices in it; give other scans"
        )
    return list(found.values())


def _is_usable(header: Header) -> bool:
    thin = (
        header.slice_thickness is not None
        and header.slice_thickness <= Rules().max_slice_thickness_mm
    )
    return (
        header.modality == "CT"
        and thin
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
    """Writes the files, each as large as the template that it is made from."""
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
    for series in range(-(-num_files // _FILES_PER_SERIES)):
        yield series, range(min(_FILES_PER_SERIES, num_files - series * _FILES_PER_SERIES))


def measure(folder: Path, plan_dir: Path, num_workers: int, connection) -> None:
    """Sends a `Measured`; to be run in a process of its own."""
    seconds = {}

    def timed(name: str, function, *arguments):
        start, start_of_cores = time.perf_counter(), _core_seconds()
        result = function(*arguments)
        seconds[name] = time.perf_counter() - start, _core_seconds() - start_of_cores
        return result

    with WorkerPool(num_workers) as pool:
        # the start of the workers is not measured
        for _ in pool.run(time.sleep, [(1,)] * num_workers):
            pass
        num_files, _ = timed("listing", list_archive, folder, plan_dir / "listing")
        arguments = (folder, plan_dir, num_files, pool, read_header, plan_dir / "listing")
        timed("headers", scan_headers, *arguments)
        timed("headers staged", scan_headers, *arguments)
        plans = timed("planning", plan_buckets, plan_dir, Rules(), pool)
        exams, in_plans = timed("reading plans", _walk, plans)
        workers = max(_peak_memory_mb(process.pid) for process in multiprocessing.active_children())
    if exams != -(-num_files // _FILES_PER_SERIES) or in_plans != num_files:
        raise RuntimeError(f"{exams} exams of {in_plans} files were planned, of {num_files} files")
    staged = sum(path.stat().st_size for path in (plan_dir / "staged").iterdir())
    connection.send(Measured(num_files, seconds, staged, _peak_memory_mb("self"), workers))


def _core_seconds() -> float:
    """Of this process and of its workers."""
    ticks = 0
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user, system
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _walk(plans: list[Path]) -> tuple[int, int]:
    """Number of exams and files, read as prepare reads them."""
    return sum(len(read_plan(path).exams) for path in plans), sum(1 for _ in all_headers(plans))


def _peak_memory_mb(process: int | str) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def measure_size(headers: list[bytes], scratch: Path, num_files: int, num_workers: int) -> Measured:
    archive = scratch / f"archive_{num_files}"
    if not archive.exists():
        with folder_written_whole(archive, archive.with_suffix(PARTIAL)) as temporary:
            make_archive(headers, temporary, num_files)
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(dir=scratch) as plan_dir:
        process = context.Process(
            target=measure, args=(archive, Path(plan_dir), num_workers, sending)
        )
        process.start()
        sending.close()
        try:
            return receiving.recv()
        except EOFError:
            raise RunFailed(f"the measurement of {num_files} files failed") from None
        finally:
            process.join()


def main(argv: list[str]) -> None:
    headers = templates(Path(FLAGS.input_dir))
    num_workers = FLAGS.num_workers or usable_cores()
    print(
        f"{len(headers)} headers of {[len(content) for content in headers]} bytes; {num_workers} "
        "workers"
    )
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(FLAGS.scratch_dir or folder)
        scratch.mkdir(parents=True, exist_ok=True)
        for row, number in enumerate(FLAGS.num_files):
            found = measure_size(headers, scratch, int(number), num_workers)
            cells = {"files": f"{found.num_files:,}"}
            for step, (seconds, of_cores) in found.seconds.items():
                cells[f"{step}: files/s, core us a file"] = (
                    f"{found.num_files / seconds:,.0f}, {of_cores / found.num_files * 1e6:,.0f}"
                )
            cells["staged bytes a file"] = f"{found.staged_bytes / found.num_files:,.0f}"
            cells["peak MB, main"] = f"{found.main_memory_mb:.0f}"
            cells["peak MB, largest worker"] = f"{found.worker_memory_mb:.0f}"
            if not row:
                print("| " + " | ".join(cells) + " |\n|" + "---|" * len(cells))
            print("| " + " | ".join(cells.values()) + " |", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("input_dir", None, "Directory of DICOM files.", required=True)
    flags.DEFINE_list("num_files", ["10000", "100000"], "Sizes of the archives.")
    flags.DEFINE_string(
        "scratch_dir",
        None,
        "Where they are made, about 6 kB a file, and stay (default: a temporary one).",
    )
    flags.DEFINE_integer(
        "num_workers", None, "Worker processes (default: the usable cores).", lower_bound=1
    )
    command_line.run(main)
