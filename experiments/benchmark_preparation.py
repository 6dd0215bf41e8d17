r"""Speed of `prepare`, its floor and other converters on one core, by transfer syntax.

    ctssl benchmark_preparation --input_dir=SCAN

SCAN holds one CT series as plain DICOM files. Its slices are written again in each of --syntaxes,
--copies times as other patients. Each archive is measured with a warm page cache, the uncompressed
archive also with a cold one:

    floor                   read the files (pydicom, with our decoders), window them, write one
                            ArrayRecord file, and nothing else
    prepare                 `data_prep.pipeline.prepare.prepare` with one worker, from its first
                            process to the last table; and its steps one by one in this process
    SimpleITK               the same slices, then our windowing and one ArrayRecord file; if it is
                            installed
    dicom2nifti + nibabel   the same, if they are installed; dicom2nifti does not compress

Numbers are slices per second of CPU time, of all threads and processes, the median of --repeats.
With a cold cache they are per second of wall time.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

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
from collections.abc import Callable
from pathlib import Path

from absl import flags

from data_prep.dataset.storage import write_records
from data_prep.system import command_line
from data_prep.system.errors import InputError

from .bench.converters import (
    SYNTAXES,
    dicom2nifti_nibabel,
    floor,
    prepare_quietly,
    simple_itk,
    steps,
    write_archive,
)


def cpu_seconds() -> float:
    """CPU seconds of this process, its threads, and its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def median_seconds(
    function: Callable[[], object], repeats: int, clock: Callable[[], float] = cpu_seconds
) -> float:
    """The median time of some calls."""
    times = []
    for _ in range(repeats):
        start = clock()
        function()
        times.append(clock() - start)
    return statistics.median(times)


def evict(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(name: str, archive: Path, copies: int, repeats: int, scratch: Path) -> None:
    """Print the rows of one archive."""
    folders = [archive / str(copy) for copy in range(copies)]
    paths = [path for folder in folders for path in sorted(folder.iterdir())]
    shard = scratch / "shard"

    def row(title: str, seconds: float, beside: float | None = None) -> None:
        share = "" if beside is None else f"{beside / seconds:7.2f}"
        print(f"{name:<16}{title:<40}{len(paths) / seconds:9.0f}{share}", flush=True)

    least = median_seconds(lambda: write_records(shard, floor(paths)), repeats)
    row("floor: decode, window, compress", least)
    row(
        "prepare, one worker, all of it",
        median_seconds(lambda: prepare_quietly(archive), repeats),
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
                    lambda function=function: write_records(shard, function(folders)), repeats
                )
        except Exception as error:  # of any kind: some cannot read some of the syntaxes
            print(f"{name:<16}{package}: failed ({type(error).__name__})", flush=True)
            continue
        row(package, seconds, least)


def measure_cold(archive: Path, num_slices: int, repeats: int) -> None:
    """Print wall times of `prepare` with a warm and a cold page cache, and of reading alone."""

    def read() -> None:
        for path in sorted(archive.rglob("*.dcm")):
            path.read_bytes()

    def cold(function: Callable[[], None]) -> float:
        times = []
        for _ in range(repeats):
            evict(archive)
            times.append(median_seconds(function, 1, time.perf_counter))
        return statistics.median(times)

    for title, seconds in (
        ("reading the files one by one, cold", cold(read)),
        (
            "prepare, one worker, warm",
            median_seconds(lambda: prepare_quietly(archive), repeats, time.perf_counter),
        ),
        ("prepare, one worker, cold", cold(lambda: prepare_quietly(archive))),
    ):
        print(f"{'wall time':<16}{title:<40}{num_slices / seconds:9.0f}", flush=True)


def main(argv: list[str]) -> int:
    """Command line."""
    chosen = flags.FLAGS
    unknown = set(chosen.syntaxes) - set(SYNTAXES)
    if unknown:
        raise InputError(f"--syntaxes: no {', '.join(unknown)}; choose from {','.join(SYNTAXES)}")
    # numpy's threads would blur what one core does
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        return subprocess.call(
            [sys.executable, "-m", f"{__package__}.benchmark_preparation", *sys.argv[1:]],
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
    command_line.suggest("benchmark_loader", aside=True)
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
