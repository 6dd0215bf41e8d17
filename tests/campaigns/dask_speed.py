r"""Speed of preparation on a Dask cluster of one and two workers, beside the local runner.

    python -m tests.campaigns.dask_speed --archive=SCANS [--repeats=3]

Each prepares SCANS in turn, the local runner with one and two processes. Seconds, and CPU seconds
of all processes that took part (of workers and scheduler what they spent in the meantime). The
cluster has run once before it is measured, so that its workers have imported what they need.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.dask_processes import PROJECT, Cluster

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(sessions: set[int]) -> float:
    """CPU seconds of the processes of these sessions, and of their children that have ended."""
    ticks = 0
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) in sessions:
            ticks += sum(map(int, fields[11:15]))
    return ticks / TICKS


def measured(options: list[str], cluster: Cluster | None) -> tuple[float, float]:
    """Seconds and CPU seconds of a preparation into a folder that is then removed."""
    sessions = {process.pid for process in cluster.processes.values()} if cluster else set()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "data_prep.prepare", f"--output_dir={folder}/dataset"]
        started, before = time.monotonic(), cpu_seconds(sessions)
        process = subprocess.Popen(
            [*command, *options], cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert process.stderr
        message = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(message.decode(errors="replace")[-2000:])
        spent = usage.ru_utime + usage.ru_stime + cpu_seconds(sessions) - before
        return time.monotonic() - started, spent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--archive", type=Path, required=True, help="folder of DICOM scans")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--option", action="append", default=[], help="of data_prep.prepare")
    arguments = parser.parse_args()
    shared = [f"--input_dir={arguments.archive}", "--splits=1,0,0", *arguments.option]
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        clusters = {}
        try:
            for number in (1, 2):
                with socket.create_server(("127.0.0.1", 0)) as server:
                    port = server.getsockname()[1]
                clusters[number] = cluster = Cluster(Path(folder) / str(number), port)
                cluster.start_scheduler()
                for worker in range(1, number + 1):
                    cluster.start_worker(worker)
            for repeat in range(arguments.repeats + 1):
                for number, cluster in clusters.items():
                    dask = ["--runner=dask", f"--dask_scheduler={cluster.address}"]
                    for name, options, of in (
                        (f"local, {number}", [f"--num_workers={number}"], None),
                        (f"dask, {number}", [f"--num_workers={number}", *dask], cluster),
                    ):
                        seconds = measured([*shared, *options], of)
                        if repeat:
                            found.setdefault(name, []).append(seconds)
                            print(
                                f"{name:10}{seconds[0]:8.1f} s{seconds[1]:8.1f} CPU s", flush=True
                            )
        finally:
            for cluster in clusters.values():
                cluster.__exit__()
    for name, numbers in found.items():
        wall, cpu = (statistics.median(values) for values in zip(*numbers, strict=True))
        print(f"median {name:10}{wall:8.1f} s{cpu:8.1f} CPU s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
