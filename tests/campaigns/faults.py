r"""Faults of disk, files and clock: one clear line, an exit code, then the undisturbed result.

    python -m tests.campaigns.faults [--faults=...]
        [--commands=prepare,train,embed,evaluate,describe,export,chain]

Every command runs undisturbed, then under each fault, then again without the fault:

    file_limit   no file may grow beyond a part of the largest file of the command (RLIMIT_FSIZE)
    disk_full    a file system (tmpfs) with room for a part of the output
    read_only    a file system that is mounted read-only
    turned       a file system that turns read-only in the middle of the work
    below_file   the output lies below a file
    clock        the wall clock jumps by ten years back and forth, every few calls
    unreadable   a scan cannot be read (EIO), in prepare and embed

Under a fault a command must either succeed with the undisturbed result or end with an exit code and
one line that begins with "error:" (no traceback). Without the fault it must end with the result of
the undisturbed run, as `tests.campaigns.kills` compares it. A scan that cannot be read does not end
a run: the run leaves it out and says so, and the next run takes it, into a further shard of a
dataset. Mounting needs root on Linux; otherwise these faults are skipped with a line. Files that
change while they are read: see tests/campaigns/test_campaigns.py.
"""

import argparse
import contextlib
import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.campaigns import kills
from tests.campaigns.kills import PROJECT, python
from tests.helpers import example_dataset

FAULTS = ("file_limit", "disk_full", "read_only", "turned", "below_file", "clock", "unreadable")
COMMANDS = ("prepare", "train", "embed", "evaluate", "describe", "export", "chain")
START = Path(__file__).resolve().parent / "faulty_start"


class Ended(NamedTuple):
    """How a command ended: its exit code, and its output."""

    code: int
    text: str


def run(
    command: list[str], cache: Path, *, file_limit: int | None = None, **variables: str
) -> Ended:
    """Runs a command line to its end, with a limit on the size of files and with the faults of
    `faulty_start` if they are given."""
    environment = kills.environment(cache) | variables
    if variables:
        environment["PYTHONPATH"] = os.pathsep.join([str(START), environment["PYTHONPATH"]])

    def limit() -> None:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    try:
        ended = subprocess.run(
            command,
            cwd=PROJECT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=limit,
            timeout=kills.MOST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Ended(-9, "hang")
    return Ended(ended.returncode, ended.stdout)


def faults_of_message(ended: Ended) -> list[str]:
    """Faults in the end of a command that could not do its work."""
    lines = [line for line in ended.text.splitlines() if line.startswith("error:")]
    # what a chain says of a command of it
    lines = [line for line in lines if "its message stands above" not in line]
    wrong = ["traceback on the screen"] if "Traceback" in ended.text else []
    wrong += [f"killed by signal {-ended.code}"] if ended.code < 0 else []
    wrong += [f"{len(lines)} lines begin with error:"] if ended.code and len(lines) != 1 else []
    return wrong + [f"a line of {len(line)} characters" for line in lines if len(line) > 700]


def check(command: list[str], folder: Path, cache: Path, expected: dict, ended: Ended) -> list[str]:
    """Faults of a disturbed run and of the undisturbed run after it."""
    wrong = faults_of_message(ended)
    left_out = "read for now" in ended.text
    if ended.code == 0 and not left_out:
        return wrong + kills.differences(expected, kills.contents(folder))
    again = run(command, cache)
    if again.code:
        wrong += [
            f"run again: exit code {again.code}: {(again.text.strip().splitlines() or [''])[-1]}"
        ]
    wrong += ["run again: traceback"] if "Traceback" in again.text else []
    if left_out and (folder / "dataset").is_dir():
        lost = volume_ids(expected["dataset/volumes.csv"]) ^ volume_ids(
            kills.contents(folder)["dataset/volumes.csv"]
        )
        return wrong + [
            f"run again: volume {name} is lost or there in addition" for name in sorted(lost)
        ]
    return wrong + [
        f"run again: {line}" for line in kills.differences(expected, kills.contents(folder))
    ]


def volume_ids(table: bytes) -> set[str]:
    """The volume ids in volumes.csv."""
    return {row["volume_id"] for row in csv.DictReader(table.decode().splitlines())}


# ---- File systems --------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of this size at `folder`. Raises PermissionError where none can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={max(num_bytes // 4096, 2) * 4096}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def _mount(*arguments: str) -> None:
    for _ in range(60):
        try:
            ended = subprocess.run(["mount", *arguments], capture_output=True, text=True)
        except FileNotFoundError:
            raise PermissionError("no command `mount` here") from None
        if "busy" not in ended.stderr:  # a process that was killed may still be about to end
            break
        time.sleep(0.5)
    if ended.returncode:
        raise PermissionError(f"cannot mount: {ended.stderr.strip()}")


def size_of(folder: Path) -> tuple[int, int]:
    """Bytes of the largest file, and of all files as a tmpfs holds them."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    places = sum(1 for _ in folder.rglob("*"))
    return max(sizes), sum(-(-size // 4096) * 4096 for size in sizes) + 2048 * places


# ---- One fault after the other -------------------------------------------------------------------


def try_fault(
    fault: str,
    make_command,
    folder: Path,
    cache: Path,
    expected: dict,
    sizes: tuple[int, int],
    seconds: float,
    parts: list[float],
) -> Iterator[tuple[str, str, list[str]]]:
    """Yields (fault, how the command ended, what was wrong) for every strength of a fault.

    Args:
      fault: of `FAULTS`.
      make_command: folder of the output -> command line.
      folder: an empty or absent folder.
      expected: `kills.contents` of an undisturbed run in the same folder.
      sizes: of the output of that run, as `size_of`.
      seconds: duration of that run.
      parts: of the largest file, or of all bytes, that may be written.
    """
    command, (largest, total) = make_command(folder), sizes

    def line(name: str, ended: Ended) -> tuple[str, str, list[str]]:
        told = (
            line
            for line in ended.text.splitlines()
            if line.startswith("error:") or "read for now" in line
        )
        last = next(told, "succeeded")
        return (
            name,
            f"exit code {ended.code}: {last}",
            check(command, folder, cache, expected, ended),
        )

    if fault == "file_limit":
        for part in parts:
            empty(folder)
            yield line(
                f"file_limit {part:.0%}", run(command, cache, file_limit=int(part * largest))
            )
    elif fault == "disk_full":
        for part in parts:
            empty(folder)
            with mounted(folder, int(part * total)):
                ended = run(command, cache)
                _mount("-o", f"remount,size={8 * total + (1 << 20)}", str(folder))
                yield line(f"disk_full {part:.0%}", ended)
    elif fault in ("read_only", "turned"):
        empty(folder)
        with mounted(folder, 8 * total + (1 << 20)):
            if fault == "turned":
                kills.attempt(kills.Stage([command], ()), cache, 0.6 * seconds)
            _mount("-o", "remount,ro", str(folder))
            ended = run(command, cache)
            _mount("-o", "remount,rw", str(folder))
            yield line(fault, ended)
    elif fault == "below_file":
        empty(folder)
        (folder / "file").write_text("not a folder")
        ended = run(make_command(folder / "file" / "output"), cache)
        (folder / "file").unlink()
        yield line(fault, ended)
    elif fault == "clock":
        empty(folder)
        yield line(fault, run(command, cache, FAULT_CLOCK="1"))
    elif fault == "unreadable":
        scans = [
            Path(word.split("=", 1)[1])
            for word in command
            if word.startswith(("--input_dir=", "--input="))
        ]
        if scans:
            empty(folder)
            one = sorted(
                path for path in scans[0].rglob("*") if path.suffix != ".json" and path.is_file()
            )[10]
            yield line(fault, run(command, cache, FAULT_READ=one.name))


def empty(folder: Path) -> None:
    """Makes an empty folder, or empties it."""
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    folder.mkdir(parents=True)


def make_commands(names: list[str], work: Path, cache: Path) -> dict:
    """Name -> (folder -> command line). Makes their inputs."""
    tiny = example_dataset.write_example_dataset(work / "tiny", image_size=16)
    archive = kills.make_archive(work) if {"prepare", "embed"} & set(names) else work
    run_dir = work / "trained" / "run"
    if {"embed", "evaluate", "export"} & set(names):
        _, wrong = kills.attempt(kills.train_stage(run_dir.parent, tiny), cache)
        if wrong:
            raise RuntimeError(f"no model: {wrong[0]}")
    if "chain" in names:
        example_dataset.write_example_dataset(work / "larger", image_size=64)
    commands = {
        "prepare": lambda folder: kills.prepare_stage(folder, archive).commands[0],
        "train": lambda folder: kills.train_stage(folder, tiny).commands[0],
        "embed": lambda folder: kills.embed_stage(folder, archive, run_dir).commands[0],
        "evaluate": lambda folder: kills.report_stage(folder, tiny, run_dir).commands[1],
        "describe": lambda folder: kills.report_stage(folder, tiny, run_dir).commands[0],
        "export": lambda folder: python(
            "ctssl_jax.export",
            f"--workdir={run_dir}",
            f"--output_dir={folder / 'model'}",
            "--format=safetensors",
            "--license=Apache-2.0",
        ),
        "chain": lambda folder: kills.chain_stage(folder, work / "larger").commands[0],
    }
    return {name: commands[name] for name in names}


def campaign(
    commands: dict, faults: list[str], parts: list[float], work: Path, cache: Path
) -> tuple[int, dict[str, list[str]]]:
    """Tries the faults on the commands; returns the number of cases, and the failures by case."""
    number, wrong = 0, {}
    for name, make_command in commands.items():
        folder = work / name / "output"
        for _ in range(2):  # the second time programs are compiled
            empty(folder)
            started = time.monotonic()
            ended = run(make_command(folder), cache)
            seconds = time.monotonic() - started
        if ended.code:
            raise RuntimeError(f"{name}, undisturbed: {ended.text[-500:]}")
        expected, sizes = kills.contents(folder), size_of(folder)
        print(f"{name}: undisturbed {seconds:.1f} s, {sizes[1] / 1e6:.1f} MB", flush=True)
        for fault in faults:
            try:
                for case, outcome, found in try_fault(
                    fault, make_command, folder, cache, expected, sizes, seconds, parts
                ):
                    number += 1
                    print(f"  {case:16} {'WRONG ' * bool(found)}{outcome}", flush=True)
                    for text in found[:6]:
                        print(f"      {text}", flush=True)
                    wrong |= {f"{name}, {case}": found} if found else {}
            except PermissionError as error:
                print(f"  {fault:16} skipped: {error}", flush=True)
    return number, wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument(
        "--parts", default="0.02,0.3,0.7,0.97", help="limits, as parts of what a command writes"
    )
    parser.add_argument(
        "--workdir", type=Path, help="folder for the runs (default: a temporary one)"
    )
    arguments = parser.parse_args()
    names, faults = arguments.commands.split(","), arguments.faults.split(",")
    parts = [float(part) for part in arguments.parts.split(",")]
    if unknown := [*sorted(set(names) - set(COMMANDS)), *sorted(set(faults) - set(FAULTS))]:
        parser.error(f"no such command or fault: {unknown[0]}")
    with tempfile.TemporaryDirectory(
        dir=arguments.workdir, prefix="faults-", ignore_cleanup_errors=True
    ) as scratch:
        work = Path(scratch)
        cache = work / "compiled"
        number, wrong = campaign(make_commands(names, work, cache), faults, parts, work, cache)
    print(f"\n{number} cases, {len(wrong)} wrong")
    for case, found in wrong.items():
        print(f"WRONG {case}: {'; '.join(found)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
