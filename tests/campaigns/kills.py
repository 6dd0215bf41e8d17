r"""`kill -9` at random moments, run again until complete: the result equals an undisturbed run.

    python -m tests.campaigns.kills --num_kills=200 --seed=0
        [--stages=prepare,train,chain,embed,report,quickstart]

Every stage first runs undisturbed, twice, for the result and the duration. Then its command is
started again and again in the same folder, and its whole process group is killed after a random
part of that duration, until an attempt gets through. Its result is compared and the folder removed,
until all kills are spent. The files in the folder show the phase of a kill.

All files are compared byte by byte, except for times and for files of one attempt: in a run
directory the checkpoints (the last one tensor by tensor, and the choice of the best one),
`metrics.jsonl` (every line without its times, so that no line is lost or doubled) and the
TensorBoard files (not compared); in a study `seconds/`; in the quickstart its seconds, also in
report.html. No other file may remain, also no partial file.
"""

import argparse
import collections
import os
import queue
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers import example_dataset, training_runs

PROJECT = Path(__file__).resolve().parents[2]
# of kills
SHARES = {
    "prepare": 0.6,
    "train": 0.12,
    "chain": 0.05,
    "embed": 0.1,
    "report": 0.1,
    "quickstart": 0.03,
}
MOST_SECONDS = 1800  # of an attempt, on a busy machine; more is a hang
_XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_NOT_COMPARED = (
    *("checkpoints", "tensorboard", "metrics.jsonl", "seconds", "seconds.json"),
    "training.lock",  # the process that trained
)
_SMALL_MODEL = (
    "model.hidden=(4,8)",
    "model.depth=1",
    "model.embedding_dim=4",
    "model.num_codes=8",
    "batch_size=8",
    "log_every=4",
    "eval_every=6",
    "num_pictures=2",
    "reading_threads=2",
)


class Stage(NamedTuple):
    """A command under fire.

    commands: run one after the other, each a command line; they write into their folder alone.
    phases: (name, pattern of files): the last pattern with a file names the phase.
    """

    commands: list[list[str]]
    phases: tuple[tuple[str, str], ...]


class Outcome(NamedTuple):
    """The result of a stage: kills by phase, number of completed runs, and faults (empty: all is
    well)."""

    kills: collections.Counter
    completed: int
    wrong: list[str]


def python(module: str, *arguments: str) -> list[str]:
    """A command line."""
    return [sys.executable, "-m", module, *arguments]


def key_of(archive: Path) -> str:
    """The option for a fixed key of pseudonyms, which lies beside the archive: a random one would
    change every run."""
    key = archive.parent / "pseudonym_key"
    if not key.exists():
        key.write_text("0123456789abcdef0123456789abcdef")
    return f"--pseudonym_key_file={key}"


# ---- The stages ----------------------------------------------------------------------------------


def prepare_stage(folder: Path, archive: Path) -> Stage:
    """DICOM archive -> dataset, several small shards."""
    command = python(
        "data_prep.prepare",
        f"--input_dir={archive}",
        f"--output_dir={folder / 'dataset'}",
        key_of(archive),
        "--image_size=48",
        "--shard_size_mb=0.03",
        "--num_workers=1",
    )
    phases = (
        ("starting", "dataset*"),
        ("listing, reading headers", "dataset-audit/work"),
        ("planning", "dataset-audit/work/plan/*.plan"),
        ("converting", "dataset-audit/work/notes/*.json"),
        ("deciding", "dataset-audit/work/sources.csv"),
        ("writing shards", "dataset-audit/work/frozen.json"),
        ("writing tables", "dataset/volumes.csv"),
        ("tidying up", "dataset/preparation.json"),
    )
    return Stage([command], phases)


def train_stage(folder: Path, dataset: Path) -> Stage:
    """A tiny training that saves six checkpoints."""
    overrides = {"num_steps": 50, "eval_every": 10}
    phases = (
        ("run directory", "run"),
        ("from scratch", "run/checkpoints"),
        ("step 10 and on", "run/checkpoints/10"),
        ("step 30 and on", "run/checkpoints/30"),
        ("last step saved", "run/checkpoints/50"),
        ("within a save", "run/checkpoints/*tmp*"),
    )
    return Stage([training_runs.command(dataset, folder / "run", **overrides)], phases)


def chain_stage(folder: Path, dataset: Path) -> Stage:
    """Four trainings, each from the one before, each evaluated; a table."""
    overrides = [f"--override={setting}" for setting in _SMALL_MODEL]
    command = python(
        "experiments.chain",
        f"--dataset={dataset}",
        f"--workdir={folder / 'study'}",
        "--num_steps=12",
    )
    cells = [f"mask_{percent}" for percent in ("05", "10", "20", "33")]
    phases = [("settings", "study")]
    for cell in cells:
        phases += [
            (f"{cell}: training", f"study/runs/{cell}"),
            (f"{cell}: done", f"study/results/{cell}.json"),
        ]
    return Stage(
        [[*command, *overrides]], (*phases, ("within a save", "study/runs/*/checkpoints/*tmp*"))
    )


def embed_stage(folder: Path, archive: Path, run: Path) -> Stage:
    """Raw scans -> Parquet and npz, with the audit folder."""
    commands = [
        python(
            "ctssl_jax.embed",
            f"--workdir={run}",
            f"--input={archive}",
            f"--output={folder / name}",
            key_of(archive),
            "--num_workers=1",
        )
        for name in ("slices.parquet", "arrays.npz")
    ]
    phases = (
        ("headers read", "slices-audit/sources.csv"),
        ("embedding", "slices.parts/*.npz"),
        ("Parquet done", "slices.parquet"),
        ("second: headers read", "arrays-audit/sources.csv"),
        ("second: embedding", "arrays.parts/*.npz"),
        ("npz done", "arrays.npz"),
    )
    return Stage(commands, phases)


def report_stage(folder: Path, dataset: Path, run: Path) -> Stage:
    """Description of a dataset, then the evaluation of a run."""
    commands = [
        python(
            "data_prep.describe",
            f"--dataset={dataset}",
            f"--output_dir={folder / 'cohort'}",
            "--verify",
        ),
        python(
            "ctssl_jax.evaluate",
            f"--workdir={run}",
            f"--output={folder / 'result.json'}",
            "--baselines",
        ),
    ]
    phases = (
        ("describing", "cohort"),
        ("contact sheet", "cohort/cohort.csv"),
        ("evaluating", "cohort/contact_sheet.png"),
        ("writing results", "result.csv"),
        ("done", "result.json"),
    )
    return Stage(commands, phases)


def quickstart_stage(folder: Path) -> Stage:
    """The whole path: phantom, preparation, description, training, evaluation, report."""
    command = python(
        "experiments.quickstart",
        f"--output_dir={folder / 'quick'}",
        "--num_patients=6",
        "--num_slices=21",
        "--num_steps=8",
        key_of(folder),
    )
    phases = (
        ("making scans", "quick/dicom"),
        ("preparing", "quick/dataset"),
        ("describing", "quick/dataset/preparation.json"),
        ("training", "quick/cohort/contact_sheet.png"),
        ("evaluating", "quick/run/checkpoints/8"),
        ("report", "quick/result.json"),
        ("done", "quick/report.html"),
    )
    return Stage([command], phases)


# ---- Results -------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, Any]:
    """What a run must leave behind, name -> bytes or numbers."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.name == "checkpoints":
            found |= in_time(_run_contents, path.parent, str(name.parent))
        if path.is_file() and not set(name.parts) & set(_NOT_COMPARED):
            found[str(name)] = (
                _without_times(path.read_bytes()) if path.suffix == ".html" else path.read_bytes()
            )
    return found


def in_time(
    function: Callable[..., Any], *arguments: Any, seconds: float = 120, tries: int = 3
) -> Any:
    """The result of a function, which is tried again if it takes too long: in a long process that
    reads many checkpoints, Orbax once waited for ever."""
    for _ in range(tries):
        results: queue.Queue = queue.Queue()
        thread = threading.Thread(
            target=lambda results=results: results.put(function(*arguments)), daemon=True
        )
        thread.start()
        try:
            return results.get(timeout=seconds)
        except queue.Empty:
            print(
                f"  {function.__name__} took more than {seconds:g} s and is tried again", flush=True
            )
    raise TimeoutError(f"{function.__name__}{arguments}")


def _run_contents(workdir: Path, name: str) -> dict[str, Any]:
    from ctssl_jax.runs.checkpoints import choose_step

    state = training_runs.saved_state(workdir)
    found = {
        f"{name}/last checkpoint/{tensor}": (str(v.dtype), v.shape, v.tobytes())
        for tensor, v in state.items()
    }
    found[f"{name}/steps"] = [choose_step(workdir, which) for which in ("best", "last")]
    return found | {f"{name}/metrics.jsonl": training_runs.numbers(workdir)}


def _without_times(page: bytes) -> bytes:
    return re.sub(rb"\d+ s\b", b"", page)


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """A line for each file that is missing, left over, or different."""
    lines = [f"missing: {name}" for name in expected.keys() - found.keys()]
    lines += [f"left over: {name}" for name in found.keys() - expected.keys()]
    lines += [
        f"differs: {name}"
        for name in expected.keys() & found.keys()
        if expected[name] != found[name]
    ]
    return sorted(lines)


# ---- Killing -------------------------------------------------------------------------------------


def environment(cache: Path) -> dict[str, str]:
    """Variables of all attempts: one device, a cache of compiled programs, quick compilation."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": _XLA_FLAGS,
        "MPLBACKEND": "Agg",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")]),
    }


def attempt(stage: Stage, cache: Path, seconds: float = MOST_SECONDS) -> tuple[bool, list[str]]:
    """Runs the commands of a stage; the whole process group is killed after some seconds.

    Returns whether it was killed, and its faults: an exit code, a traceback.
    """
    line = " && ".join(shlex.join(command) for command in stage.commands)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            ["sh", "-c", line],
            cwd=PROJECT,
            env=environment(cache),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        killed = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            killed = True
        finally:
            if killed or process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        text = output.read()
    last = (text.strip().splitlines() or [""])[-1]
    if "Traceback" in text:
        return killed, [f"traceback: {last}"]
    if killed:
        return True, ["hang"] if seconds == MOST_SECONDS else []
    return False, [f"exit code {process.returncode}: {last}"] if process.returncode else []


def phase(stage: Stage, folder: Path) -> str:
    """The phase of a run, by its files."""
    present = [name for name, pattern in stage.phases if any(folder.glob(pattern))]
    return present[-1] if present else "nothing written yet"


def campaign(
    make_stage: Callable[[Path], Stage],
    work: Path,
    cache: Path,
    num_kills: int,
    rng: random.Random,
    *,
    warm_up: int = 1,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Kills a stage so many times: see the text of the module. `work`/run is its folder; folders of
    failed attempts stay beside it.

    `warm_up`: undisturbed runs before the measured run, so that its programs are compiled.
    """
    folder = work / "run"

    def fresh() -> Stage:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return make_stage(folder)

    kills, completed, wrong = collections.Counter(), 0, []
    for _ in range(warm_up + 1):
        stage, started = fresh(), time.monotonic()
        _, faults = attempt(stage, cache)
        if faults:
            return Outcome(kills, 0, [f"undisturbed run: {fault}" for fault in faults])
        duration = time.monotonic() - started
    expected = contents(folder)
    say(f"  undisturbed: {duration:.1f} s, {len(expected)} files and tensors")
    stage, from_scratch = fresh(), True
    while True:
        spent, started = sum(kills.values()) >= num_kills, time.monotonic()
        killed, faults = attempt(stage, cache, MOST_SECONDS if spent else rng.uniform(0, duration))
        if not killed and from_scratch:  # the machine may have more or less to do than before
            duration = 1.1 * (time.monotonic() - started)
        from_scratch = False
        if killed:
            kills[phase(stage, folder)] += 1
        else:
            completed += not faults
            faults += differences(expected, contents(folder)) if not faults else []
        if faults:
            wrong += faults
            kept = work / f"wrong-{len(wrong)}"
            folder.rename(kept)
            say(f"  WRONG: {faults[:5]}; kept in {kept}")
        if not killed or faults:
            say(f"  {sum(kills.values())} kills, {completed} runs completed, {len(wrong)} wrong")
            if sum(kills.values()) >= num_kills:
                return Outcome(kills, completed, wrong)
            stage, from_scratch = fresh(), True


def table(outcomes: dict[str, Outcome]) -> str:
    """Stage, kills, completed runs, faults; then kills by phase."""
    lines = [f"{'stage':12}{'kills':>7}{'completed':>11}{'wrong':>7}"]
    for name, (kills, completed, wrong) in outcomes.items():
        lines.append(f"{name:12}{sum(kills.values()):7}{completed:11}{len(wrong):7}")
    total = [sum(sum(outcome.kills.values()) for outcome in outcomes.values())]
    total += [
        sum(outcome.completed for outcome in outcomes.values()),
        sum(len(o.wrong) for o in outcomes.values()),
    ]
    lines += [f"{'all':12}{total[0]:7}{total[1]:11}{total[2]:7}", "", "kills by phase"]
    for name, outcome in outcomes.items():
        lines += [f"{name:12}{number:7}  {where}" for where, number in outcome.kills.most_common()]
    return "\n".join(
        [*lines, *(f"WRONG {name}: {fault}" for name, o in outcomes.items() for fault in o.wrong)]
    )


# ---- Inputs --------------------------------------------------------------------------------------


def make_archive(folder: Path) -> Path:
    """Eight synthetic patients as DICOM."""
    archive = folder / "archive"
    phantom = python(
        "data_prep.phantom",
        f"--output_dir={archive}",
        "--num_patients=8",
        "--num_slices=22",
        "--image_size=96",
        "--seed=0",
    )
    subprocess.run(
        phantom, cwd=PROJECT, env=environment(folder), check=True, stdout=subprocess.DEVNULL
    )
    return archive


def make_stages(names: list[str], work: Path, cache: Path) -> dict[str, Callable[[Path], Stage]]:
    """The stages with their inputs: an archive, datasets, a trained run."""
    archive = make_archive(work) if {"prepare", "embed"} & set(names) else work
    tiny = example_dataset.write_example_dataset(work / "tiny", image_size=16)
    run = work / "trained" / "run"
    if {"embed", "report"} & set(names):
        _, faults = attempt(train_stage(run.parent, tiny), cache)
        if faults:
            raise RuntimeError(f"no model to embed and evaluate with: {faults[0]}")
    makers: dict[str, Callable[[Path], Stage]] = {
        "prepare": lambda folder: prepare_stage(folder, archive),
        "train": lambda folder: train_stage(folder, tiny),
        "chain": lambda folder: chain_stage(folder, work / "larger"),
        "embed": lambda folder: embed_stage(folder, archive, run),
        "report": lambda folder: report_stage(folder, tiny, run),
        "quickstart": quickstart_stage,
    }
    if "chain" in names:
        example_dataset.write_example_dataset(work / "larger", image_size=64)
    return {name: makers[name] for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_kills", type=int, default=200, help="of all stages together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default=",".join(SHARES), help="of these kinds")
    parser.add_argument(
        "--workdir", type=Path, help="folder for the runs (default: a temporary one)"
    )
    arguments = parser.parse_args()
    names = arguments.stages.split(",")
    if unknown := sorted(set(names) - set(SHARES)):
        parser.error(f"--stages: no {unknown[0]}; choose from {', '.join(SHARES)}")
    whole = sum(SHARES[name] for name in names)
    with tempfile.TemporaryDirectory(
        dir=arguments.workdir, prefix="kills-", ignore_cleanup_errors=True
    ) as scratch:
        work, outcomes, started = Path(scratch), {}, time.monotonic()
        cache = work / "compiled"
        for name, maker in make_stages(names, work, cache).items():
            number = max(1, round(arguments.num_kills * SHARES[name] / whole))
            print(f"{name}: {number} kills", flush=True)
            rng = random.Random(f"{arguments.seed} {name}")
            outcomes[name] = campaign(
                maker, work / name, cache, number, rng, say=lambda line: print(line, flush=True)
            )
        print(f"\n{table(outcomes)}\n{time.monotonic() - started:.0f} s")
        if wrong := any(outcome.wrong for outcome in outcomes.values()):
            kept = Path(tempfile.mkdtemp(dir=arguments.workdir, prefix="kills-wrong-"))
            for path in work.glob("*/wrong-*"):
                shutil.move(path, kept / f"{path.parent.name}-{path.name}")
            print(f"what went wrong is kept in {kept}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
