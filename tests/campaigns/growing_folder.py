r"""Slices that come singly and shuffled, each in two halves, while `--watch` is ended by `kill -9`.

    python -m tests.campaigns.growing_folder --archive=SCANS --seconds=60 --num_kills=4 --seed=0
        [--commands=embed,predict]

All files below SCANS arrive in a folder, in an order of the seed, over so many seconds.
`ctssl embed --watch` and `ctssl predict --watch` are killed at random moments and started again,
until nothing comes any more. Then

- every scan of an undisturbed run over the whole folder has a result, and no other has one,
- the results equal the results of that run (embeddings, probabilities and masks to 1e-5), and the
  embeddings equal those of `ctssl embed` without --watch,
- no scan has two lines in the ledger, and no half of a result is left,
- a slice that comes afterwards is named, changes nothing, and the named remedy does the scan again.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.scan.archives import Source
from data_prep.scan.headers import Header, read_header
from tests.helpers.example_dataset import write_example_dataset
from tests.helpers.training_runs import save_untrained, tiny_recipe

PROJECT = Path(__file__).resolve().parents[2]
MOST_SECONDS = 1800  # of a command, on a busy machine
LEDGERS = {"embed": "z-audit/embeddings.jsonl", "predict": "p-audit/predictions.jsonl"}
_RULES = ("--min_slices=5", "--norequire_lung", "--max_slice_thickness_mm=10")


def make_runs(folder: Path, image_size: int = 32) -> dict[str, Path]:
    """A run for each command, of random numbers."""
    dataset = write_example_dataset(folder / "dataset", image_size=image_size, masks=True)
    runs = {"embed": folder / "rotation", "predict": folder / "nodules"}
    for workdir in runs.values():
        config = tiny_recipe(dataset, workdir.name, image_size=image_size)
        save_untrained(config, workdir)
    return runs


def command_line(command: str, run: Path, scans: Path, output: Path, key: Path) -> list[str]:
    """The command without --watch; its results are in `output` or beside it."""
    target = output / "z.npz" if command == "embed" else output / "p"
    flags = [f"--workdir={run}", f"--input={scans}", f"--output={target}"]
    flags += [f"--pseudonym_key_file={key}", *_RULES, "--num_workers=1"]
    return [sys.executable, "-m", "ctssl_jax", command, *flags]


def watching(settle_s: float, idle_exit_s: float) -> list[str]:
    return ["--watch", f"--settle_s={settle_s:g}", f"--idle_exit_s={idle_exit_s:g}"]


def run(line: Sequence[str]) -> str:
    """What a command prints; it must end by itself."""
    done = subprocess.run(line, cwd=PROJECT, capture_output=True, text=True, timeout=MOST_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def plan(scans: Path, seconds: float, rng: random.Random) -> tuple[list[tuple[float, Path]], float]:
    """When each file comes, and the longest pause between two files of an exam."""
    files = sorted(path for path in scans.rglob("*") if path.is_file())
    rng.shuffle(files)
    times = [seconds * i / max(1, len(files) - 1) for i in range(len(files))]
    last: dict[str, float] = {}
    pauses = [0.0]
    for when, path in zip(times, files, strict=True):
        header = read_header(scans, Source(str(path.relative_to(scans)), "", path.stat().st_size))
        if isinstance(header, Header):
            study = header.study_instance_uid
            pauses.append(when - last.get(study, when))
            last[study] = when
    return list(zip(times, files, strict=True)), max(pauses)


def deliver(arrivals: Sequence[tuple[float, Path]], scans: Path, target: Path) -> None:
    """Write the files when their time comes, each in two halves."""
    start = time.monotonic()
    for when, path in arrivals:
        time.sleep(max(0.0, start + when - time.monotonic()))
        place = target / path.relative_to(scans)
        place.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes()
        with open(place, "wb", buffering=0) as file:
            file.write(content[: len(content) // 2])
            time.sleep(0.02)
            file.write(content[len(content) // 2 :])


def killed_until_done(line: Sequence[str], moments: Sequence[float]) -> tuple[str, int]:
    """Start a command, kill its process group after so many seconds of each start, then let it end.

    Returns:
      What the last start printed, and the number of kills that met a living process.
    """
    kills = 0
    for moment in moments:
        process = subprocess.Popen(
            line,
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
    return run(line), kills


def results_of(command: str, output: Path) -> dict[str, dict[str, np.ndarray]]:
    """Pseudonym -> arrays of its result."""
    found = {}
    if command == "embed":
        for path in (output / "z.scans").glob("*.npz"):
            with np.load(path) as arrays:
                found[path.stem] = dict(arrays)
        return found
    for path in (output / "p").glob("*/prediction.json"):
        result = json.loads(path.read_text())
        names = ("highest_probability", "volume_ml", "num_regions", "num_foreground_voxels")
        found[path.parent.name] = {name: np.array(result[name]) for name in names if name in result}
    return found


def faults_of(
    command: str, expected: dict[str, dict[str, np.ndarray]], output: Path
) -> tuple[list[str], float]:
    """What differs from the undisturbed results, and the largest difference of a number."""
    found, faults, largest = results_of(command, output), [], 0.0
    if found.keys() != expected.keys():
        faults.append(f"{len(found)} scans, expected {len(expected)}")
    for name in found.keys() & expected.keys():
        for field, values in expected[name].items():
            if values.dtype.kind != "f":
                same = np.array_equal(found[name][field], values)
            else:
                difference = np.abs(found[name][field] - values).max(initial=0)
                largest = max(largest, float(difference))
                same = difference <= 1e-5 * max(1, np.abs(values).max(initial=0))
            faults += [] if same else [f"{name}: {field} differs"]
    names = [name for line in ledger(command, output) for name in line["volumes"]]
    if len(names) != len(set(names)):
        faults.append("a scan was taken twice")
    left = [path.name for path in output.rglob("*") if path.name.endswith((".partial", ".tmp"))]
    return faults + [f"left: {name}" for name in left], largest


def ledger(command: str, output: Path) -> list[dict]:
    path = output / LEDGERS[command]
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_command(
    command: str, scans: Path, work: Path, workdir: Path, seconds: float, num_kills: int, seed: int
) -> list[str]:
    """The campaign of one command; what went wrong."""
    rng, faults = random.Random(seed), []
    key, growing = work / "key", work / f"{command}-in"
    key.write_text("a key of this campaign, 32 characters")
    growing.mkdir()
    once, disturbed = work / f"{command}-once", work / f"{command}-killed"
    run(command_line(command, workdir, scans, once, key) + watching(0.5, 0.5))
    expected = results_of(command, once)
    if command == "embed":
        run(command_line(command, workdir, scans, work / "plain", key))
        with (
            np.load(work / "plain" / "z.npz") as plain,
            np.load(once / "z.npz") as watched,
        ):
            for name in plain.files:
                if name != "facts" and not (
                    np.allclose(plain[name], watched[name], rtol=1e-5, atol=1e-6)
                    if plain[name].dtype.kind == "f"
                    else np.array_equal(plain[name], watched[name])
                ):
                    faults.append(f"{name} is not that of embed without --watch")
    arrivals, pause = plan(scans, seconds, rng)
    settle_s = 1.5 * pause + 2
    line = command_line(command, workdir, growing, disturbed, key)
    sender = threading.Thread(target=deliver, args=(arrivals, scans, growing))
    sender.start()
    moments = sorted(rng.uniform(3, seconds + settle_s) for _ in range(num_kills))
    moments = [moment - before for before, moment in zip([0, *moments], moments, strict=False)]
    printed, kills = killed_until_done([*line, *watching(settle_s, settle_s)], moments)
    sender.join()
    wrong, largest = faults_of(command, expected, disturbed)
    faults += wrong + (["LATE was said"] if "LATE" in printed else [])

    # a late slice
    (_, path) = next(
        one for one in arrivals if _is_of_a_result(ledger(command, disturbed), one[1], scans)
    )
    shutil.copyfile(path, growing / path.relative_to(scans).parent / "late")
    printed = run([*line, *watching(0.5, 0.5)])
    if printed.count("LATE  ") != 1 or faults_of(command, expected, disturbed)[0]:
        faults.append("the late slice was not named, or changed a result")
    removed = Path(printed.split("remove ")[1].split(", and")[0])
    removed.unlink()
    run([*line, *watching(0.5, 0.5)])
    if not removed.exists():
        faults.append("the scan of the late slice was not done again")
    print(
        f"{command}: {len(arrivals)} files over {seconds:g} s, settled after {settle_s:.1f} s; "
        f"{kills} kills; {len(expected)} scans, largest difference {largest:.1e}; "
        f"{'; '.join(faults) or 'as it should be'}",
        flush=True,
    )
    return faults


def _is_of_a_result(lines: list[dict], path: Path, scans: Path) -> bool:
    name = str(path.relative_to(scans))
    return any(line["volumes"] and name in [file[0] for file in line["files"]] for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--num_kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default="embed,predict")
    options = parser.parse_args()
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        runs = make_runs(Path(folder) / "runs")
        for command in options.commands.split(","):
            faults += run_command(
                *(command, options.archive.resolve(), Path(folder), runs[command]),
                *(options.seconds, options.num_kills, options.seed),
            )
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
