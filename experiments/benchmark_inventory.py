r"""Speed and memory of the inventory of archives of growing size: listing, headers, planning.

    ctssl benchmark_inventory --input_dir=SCANS --num_files=10000,100000,1000000

Makes archives in --scratch_dir (once, if the folder stays): files with the headers of a few CT
images of SCANS (real or phantom), without their pixels, of other patients, 100 files a series.
Plans them as prepare does, then reads the headers again as after a kill at the last moment, when
all are staged.

Each size is measured in processes of its own: files a second of each step, the time of all cores
together that a file takes (which other work on the machine hardly changes), and the peak memory of
the main process and of the largest worker. Linux only (it reads /proc).
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from absl import flags

from data_prep.pipeline.plan import all_headers, list_archive, plan_buckets, read_plan, scan_headers
from data_prep.scan.headers import read_header
from data_prep.scan.rules import Rules
from data_prep.system import command_line
from data_prep.system.errors import RunFailed
from data_prep.system.files import PARTIAL, folder_written_whole
from data_prep.system.workers import WorkerPool, usable_cores

from .bench.header_archive import FILES_PER_SERIES, make_archive, templates

FLAGS = flags.FLAGS


class Measured(NamedTuple):
    """The measurements of one size."""

    num_files: int
    seconds: dict[str, tuple[float, float]]  # step -> seconds by the clock, and of all cores
    staged_bytes: int
    main_memory_mb: float
    worker_memory_mb: float


def measure(folder: Path, plan_dir: Path, num_workers: int, connection) -> None:
    """Send a `Measured`; runs in a process of its own."""
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
    if exams != -(-num_files // FILES_PER_SERIES) or in_plans != num_files:
        raise RuntimeError(f"{exams} exams of {in_plans} files were planned, of {num_files} files")
    staged = sum(path.stat().st_size for path in (plan_dir / "staged").iterdir())
    connection.send(Measured(num_files, seconds, staged, _peak_memory_mb("self"), workers))


def _core_seconds() -> float:
    """Seconds that this process and its workers have computed."""
    ticks = 0
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user, system
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _walk(plans: list[Path]) -> tuple[int, int]:
    """Number of exams and of files, read as prepare reads them."""
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
            measured = measure_size(headers, scratch, int(number), num_workers)
            cells = {"files": f"{measured.num_files:,}"}
            for step, (seconds, core_seconds) in measured.seconds.items():
                speed, cost = measured.num_files / seconds, core_seconds / measured.num_files
                cells[f"{step}: files/s, core us a file"] = f"{speed:,.0f}, {cost * 1e6:,.0f}"
            cells["staged bytes a file"] = f"{measured.staged_bytes / measured.num_files:,.0f}"
            cells["peak MB, main"] = f"{measured.main_memory_mb:.0f}"
            cells["peak MB, largest worker"] = f"{measured.worker_memory_mb:.0f}"
            if not row:
                print("| " + " | ".join(cells) + " |\n|" + "---|" * len(cells))
            print("| " + " | ".join(cells.values()) + " |", flush=True)
    command_line.suggest("benchmark_preparation", "--input_dir=SERIES", aside=True)


if __name__ == "__main__":
    flags.DEFINE_string("input_dir", None, "Directory of DICOM files.", required=True)
    flags.DEFINE_list("num_files", ["10000", "100000"], "Sizes of the archives.")
    flags.DEFINE_string(
        "scratch_dir",
        None,
        "Folder of the archives, which stay, about 6 kB a file (default: a temporary one).",
    )
    flags.DEFINE_integer(
        "num_workers", None, "Worker processes (default: the usable cores).", lower_bound=1
    )
    command_line.run(main)
