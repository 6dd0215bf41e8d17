r"""Speed of preparation before and after a change, alternately in one run.

    python -m tests.campaigns.preparation_speed --before=CHECKOUT --archive=SCANS [--repeats=5]

Runs `data_prep.prepare` with one worker on SCANS, in turn by the code of another checkout and by
this one, and prints the CPU seconds of all their processes and the medians' ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def cpu_seconds(checkout: Path, archive: Path, options: list[str]) -> float:
    """CPU seconds of one preparation with all its processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "data_prep.prepare", f"--input_dir={archive}"),
            *(f"--output_dir={folder}/dataset", "--num_workers=1", "--splits=1,0,0", *options),
        ]
        environment = os.environ | {"PYTHONPATH": str(checkout), "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert process.stderr
        message = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{checkout}: {message.decode(errors='replace')[-2000:]}")
        return usage.ru_utime + usage.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="checkout of the old code")
    parser.add_argument("--archive", type=Path, required=True, help="folder of DICOM scans")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--option", action="append", default=[], help="of data_prep.prepare")
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {"before": [], "after": []}
    for _ in range(arguments.repeats):
        for name, checkout in (("before", arguments.before.resolve()), ("after", PROJECT)):
            times[name].append(cpu_seconds(checkout, arguments.archive, arguments.option))
            print(f"{name:7} {times[name][-1]:8.2f} s", flush=True)
    before, after = (statistics.median(times[name]) for name in ("before", "after"))
    print(f"medians: before {before:.2f} s, after {after:.2f} s: {after / before:.3f} times")
    return 0


if __name__ == "__main__":
    sys.exit(main())
