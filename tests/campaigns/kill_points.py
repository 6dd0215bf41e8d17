r"""`kill -9` or a full disk at every system call of save, score and retention, then run again.

    python -m tests.campaigns.kill_points --num_kills=300 --num_full=100 --seed=0

`kill_points.c` is compiled and loaded into the process (LD_PRELOAD). It counts the system calls, of
all threads together, that change a file below RUN/checkpoints (below RUN in a fifth of the
attempts). At a call with a drawn number it kills the process, after half of it if it is a write; or
this call and all later ones that need room fail with ENOSPC. The attempts begin from a new run,
from a run that got SIGTERM at a due step (saved, without a score), and from one that was stopped
between two due steps.

The training loop, the checks before it, Orbax, score, retention and reports are those of
`ctssl_jax.train`. Model and step are numpy: no program is compiled, so an attempt takes a second.
Attempts are forked from a process that has imported everything.

After each attempt: the newest checkpoint is not older than the newest one that was complete before;
every checkpoint in the list is undamaged; the best one has the lowest error of all steps that were
validated so far. The same command is then run to its end: it must give the bytes of the parameters,
the reports, the best checkpoint and the list of files of the undisturbed run.
"""

import argparse
import collections
import contextlib
import ctypes
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ctssl_jax.runs.checkpoints import choose
from ctssl_jax.runs.damage import is_damaged, step_numbers
from ctssl_jax.runs.strips import Legend
from ctssl_jax.training import loop, progress, setup
from ctssl_jax.training.pictures import Setting
from ctssl_jax.training.scoring import SplitScores
from ctssl_jax.training.state import TrainState
from ctssl_jax.training.step import Report
from data_prep.system.errors import InputError, RunFailed
from data_prep.system.files import explain
from tests.helpers import example_dataset, training_runs

EVAL_EVERY, NUM_STEPS = 2, 12
STOPPED, DONE, FAILED = 75, 0, 1
SOURCE = Path(__file__).resolve().with_suffix(".c")
# Of the validated steps. Neither the first nor the last is the best, and the best changes thrice.
ERRORS = {2: 0.5, 4: 0.3, 6: 0.4, 8: 0.2, 10: 0.25, 12: 0.6}
BUG = 99  # exit code of an attempt that ended in a traceback


# ---- A training without a compiled program -------------------------------------------------------


def error_of(step: int) -> float:
    """The validation error of a step."""
    return ERRORS.get(step, 0.45)


def first_state() -> TrainState:
    """A state of a few thousand numbers."""
    numbers = np.random.default_rng(0)
    weights = {name: numbers.random((40, 30), np.float32) for name in ("encoder", "decoder")}
    state = TrainState(
        step=np.zeros((), np.int32),
        params=weights,
        variables={},
        optimizer={"mean": np.zeros((40, 30), np.float32)},
        sums={"loss": np.zeros((), np.float32)},
        nonfinite_step=np.full((), -1, np.int32),
    )
    return jax.device_put(state)


def next_state(state: TrainState) -> TrainState:
    """The state after a step: numpy alone, so that equal states give equal bytes."""
    state = jax.device_get(state)
    mean = (0.9 * state.optimizer["mean"] + 0.1 * state.params["encoder"]).astype(np.float32)
    params = {
        name: (value * np.float32(0.75) + mean + np.float32(state.step) / 64).astype(np.float32)
        for name, value in state.params.items()
    }
    return jax.device_put(
        state.replace(
            step=np.asarray(state.step + 1, np.int32), params=params, optimizer={"mean": mean}
        )
    )


class _Feed:
    waited, parts = 0.0, ()

    def __init__(self, *arguments: Any):
        pass

    def advance(self, running: Any) -> None:
        pass


def _scores(
    scorer: Any, state: TrainState, batches: Iterator[Any], **options: Any
) -> SplitScores | None:
    batches = list(batches)
    if not batches:
        return None
    (number,) = batches
    error = np.full(number, error_of(int(state.step)))
    return SplitScores(
        record_index=np.arange(number),
        scores={"loss": error, "masked_mse": error},
        classes=None,
        embedding=np.ones((number, 2)),
        code_counts=None,
        embedding_moments={"weight": 2.0, "first": np.ones(2), "second": np.eye(2)},
    )


def _pictures(*arguments: Any) -> dict[str, np.ndarray]:
    return dict.fromkeys(("input", "target", "prediction"), np.zeros((1, 4, 4, 1), np.float32))


def train_without_compiling(dataset: Path, workdir: Path, stop_at: int | None) -> bool:
    """`loop.train` with a numpy step, which sends SIGTERM to itself after the step `stop_at`. Once
    a process, which then ends."""

    def step(program: Any, state: TrainState, parts: Any) -> TrainState:
        state = next_state(state)
        if int(state.step) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return state

    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), first_state()
    )
    program = types.SimpleNamespace(template=template, initial_state=first_state, scorer=None)
    setup.abstract_model = lambda *arguments: (None, {}, {})
    setup.Job.compile = lambda job: (program, 0)
    setup.training_batches = lambda *arguments, **options: iter(())
    setup.evaluation_batches = lambda source, *arguments, **options: iter([len(source)])
    setup.picture_batch = lambda *arguments: {"record_index": np.zeros(1, np.int32)}
    setup.pictures.setting = lambda *arguments: Setting(Legend(), (), None)
    progress.render_pictures = _pictures
    loop.Feed, loop.run_step, loop.evaluate_split = _Feed, step, _scores
    setup.Job.validation_places = None  # they would be read by threads that a fork does not have
    loop.feature_scores = lambda *arguments: {}
    means = dict.fromkeys(("loss", "mse", "masked_mse", "ssim"), 0.0)
    loop.take_report = lambda program, state: (state, Report(dict(means), None, {}))
    config = training_runs.tiny_config(
        dataset, num_steps=NUM_STEPS, eval_every=EVAL_EVERY, log_every=3, num_pictures=1
    )
    return loop.train(config, workdir)


def contents(workdir: Path) -> dict[str, Any]:
    """What a complete run leaves: parameters of its last checkpoint, reports, choices, files."""
    state = training_runs.saved_state(workdir)
    names = [path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file()]
    kept = [str(name) for name in names if name.parts[0] not in ("checkpoints", "tensorboard")]
    chosen = choose(workdir, "best")
    return {
        "parameters": {name: value.tobytes() for name, value in state.items()},
        "reports": training_runs.numbers(workdir),
        "best": [chosen.step, chosen.why],
        "files": sorted(kept),
        "leftovers": [
            path.name
            for path in (workdir / "checkpoints").iterdir()
            if not (path.name.isdigit() and path.is_dir())
        ],
    }


def faults_of_checkpoints(workdir: Path, newest_before: int) -> list[str]:
    """What is wrong with the checkpoints that an attempt left."""
    steps = step_numbers(workdir)
    wrong = [f"checkpoint {step} is damaged" for step in steps if is_damaged(workdir, step)]
    if max(steps, default=0) < newest_before:
        wrong.append(f"checkpoint {newest_before} was complete, the newest is {steps[-1:]}")
    if steps:
        chosen, scored = choose(workdir, "best"), [s for s in steps if is_scored(workdir, s)]
        if scored:
            expected = min((s for s in ERRORS if s <= scored[-1]), key=lambda s: (ERRORS[s], -s))
            if chosen.step != expected:
                wrong.append(f"the best is {chosen.step} instead of {expected}")
    return wrong


def is_scored(workdir: Path, step: int) -> bool:
    """Whether a checkpoint has a score that can be read."""
    return choose(workdir, str(step)).score is not None


# ---- Attempts in processes of their own ----------------------------------------------------------


class Attempt(NamedTuple):
    """One disturbed run.

    start: name of the run that it begins from.
    at: number of the system call.
    full: a full disk instead of a kill.
    below: the folder whose calls count, below the run directory; "" is the run directory.
    """

    start: str
    at: int
    full: bool
    below: str


class Ended(NamedTuple):
    """How a forked process ended: its exit code (negative: a signal), its output, its result."""

    code: int
    text: str
    result: Any


def forked(
    function: Callable[[], Any], scratch: Path, points: tuple[Path, int, bool, Path] | None = None
) -> Ended:
    """Run a function in a fork of this process, which must not have used JAX.

    points: folder, number of the call, whether the disk is full, and the log of `kill_points.c`.
    """
    output, result = scratch / "output", scratch / "result"
    result.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        code = BUG
        try:
            with open(output, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if points is not None:
                folder, at, full, log = points
                library = ctypes.CDLL(None)
                library.kill_points_begin(
                    os.fsencode(folder), ctypes.c_long(at), int(full), os.fsencode(log)
                )
            value = function()
            result.write_bytes(pickle.dumps(value))
            code = STOPPED if value is False else DONE
        except (InputError, RunFailed) as error:
            print(f"error: {error}", flush=True)
            code = FAILED
        except OSError as error:
            print(f"error: {explain(error)}", flush=True)
            code = FAILED
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    deadline, status = time.monotonic() + 900, 0
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    status = os.waitstatus_to_exitcode(ended[1])
    return Ended(
        status,
        output.read_text(errors="replace"),
        pickle.loads(result.read_bytes()) if result.exists() else None,
    )


def compiled_library(folder: Path) -> Path:
    """`kill_points.c` as a shared library."""
    library = folder / "kill_points.so"
    command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return library


def completed_in(log: Path) -> int:
    """The newest checkpoint that got its name in an attempt; 0 if none did."""
    lines = log.read_text().splitlines() if log.exists() else []
    # A call is logged before it is made, so the last line may not have happened.
    found = [re.fullmatch(r"\d+ rename (?:/checkpoints)?/(\d+)", line) for line in lines[:-1]]
    return max((int(match[1]) for match in found if match), default=0)


class Campaign:
    """Attempts on copies of a few runs that begin them."""

    def __init__(
        self,
        work: Path,
        train: Callable[[Path, Path, int | None], bool] = train_without_compiling,
        read: Callable[[Path], dict[str, Any]] = contents,
        check: Callable[[Path, int], list[str]] = faults_of_checkpoints,
    ):
        self.work, self.train, self.read, self.check = work, train, read, check
        self.dataset = example_dataset.write_example_dataset(work / "dataset", image_size=16)
        self.starts = {"new": [], "stopped at a due step": [4], "stopped between": [5]}
        for name, stops in self.starts.items():
            (work / name).mkdir()
            for stop in stops:
                self._require(self._run(work / name, stop), STOPPED)
        straight = work / "straight"
        self._require(self._run(straight), DONE)
        self.expected = self._read(straight)
        self.num_calls = {
            (name, below): self._count(name, below)
            for name in self.starts
            for below in ("checkpoints", "")
        }

    def _run(self, run: Path, stop_at: int | None = None, points: tuple | None = None) -> Ended:
        return forked(lambda: self.train(self.dataset, run, stop_at), self.work, points)

    def _read(self, run: Path) -> dict[str, Any]:
        return self._require(forked(lambda: self.read(run), self.work), DONE).result

    def _require(self, ended: Ended, code: int) -> Ended:
        if ended.code != code:
            raise RuntimeError(f"exit code {ended.code} instead of {code}: {ended.text[-2000:]}")
        return ended

    def _count(self, start: str, below: str) -> int:
        run, log = self._fresh(start), self.work / "log"
        self._require(self._run(run, None, (run / below, -2, False, log)), DONE)
        return len(log.read_text().splitlines())

    def _fresh(self, start: str) -> Path:
        run = self.work / "run"
        shutil.rmtree(run, ignore_errors=True)
        (self.work / "log").unlink(missing_ok=True)
        return shutil.copytree(self.work / start, run)

    def draw(self, random_numbers: random.Random, full: bool) -> Attempt:
        """A start and a point of it."""
        start = random_numbers.choice(list(self.starts))
        below = "" if random_numbers.random() < 0.2 else "checkpoints"
        return Attempt(start, random_numbers.randint(1, self.num_calls[start, below]), full, below)

    def make(self, attempt: Attempt) -> tuple[str, list[str]]:
        """The system call that was reached ("" if it was not), and what is wrong."""
        run, log = self._fresh(attempt.start), self.work / "log"
        before = max((int(path.name) for path in (run / "checkpoints").glob("[0-9]*")), default=0)
        ended = self._run(run, None, (run / attempt.below, attempt.at, attempt.full, log))
        lines = log.read_text().splitlines() if log.exists() else []
        reached = lines[attempt.at - 1].split()[1] if len(lines) >= attempt.at else ""
        wrong = []
        if attempt.full:
            if ended.code not in (DONE, FAILED):
                wrong.append(f"exit code {ended.code}: {ended.text[-500:]}")
            elif ended.code == FAILED and ended.text.count("error: ") != 1:
                wrong.append(f"not one line: {ended.text[-500:]}")
        elif ended.code != (-signal.SIGKILL if reached else DONE):
            wrong.append(f"exit code {ended.code}: {ended.text[-500:]}")
        newest = max(before, completed_in(log))

        def check_and_run_again() -> tuple[list[str], bool, dict[str, Any]]:
            faults = self.check(run, newest)
            return faults, self.train(self.dataset, run, None), self.read(run)

        again = forked(check_and_run_again, self.work)
        if again.code != DONE:
            return reached, [*wrong, f"run again: exit code {again.code}: {again.text[-500:]}"]
        faults, _, found = again.result
        wrong += faults
        differing = [name for name in found if found[name] != self.expected[name]]
        wrong += [f"run again: {name} differs" for name in differing]
        return reached, wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_kills", type=int, default=300)
    parser.add_argument("--num_full", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    return campaign(arguments.num_kills, arguments.num_full, arguments.seed)


def campaign(num_kills: int, num_full: int, seed: int, **adapted: Callable) -> int:
    """All attempts; prints a table, and returns the exit code."""
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kill-points-")))
        if shutil.which("cc") is None:
            print("no C compiler on this machine: nothing was tried")
            return 0
        if not hasattr(ctypes.CDLL(None), "kill_points_begin"):
            os.environ["LD_PRELOAD"] = str(compiled_library(work))
            return subprocess.run([sys.executable, *sys.orig_argv[1:]]).returncode
        os.environ.pop("LD_PRELOAD", None)
        attempts, numbers = Campaign(work, **adapted), random.Random(seed)
        for (start, below), calls in attempts.num_calls.items():
            print(f"{calls:6} calls of an undisturbed run below /{below}: {start}", flush=True)
        calls: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        num_wrong = 0
        for number in range(num_kills + num_full):
            attempt = attempts.draw(numbers, full=number >= num_kills)
            reached, wrong = attempts.make(attempt)
            kind = "full disk" if attempt.full else "kill"
            calls[kind][reached or "not reached"] += 1
            if wrong:
                num_wrong += 1
                print(f"WRONG {attempt} at {reached}: {'; '.join(wrong)}", flush=True)
            if number % 20 == 19:
                print(f"  {number + 1} attempts, {num_wrong} wrong", flush=True)
        for kind, reached_calls in calls.items():
            listed = ", ".join(f"{name} {count}" for name, count in reached_calls.most_common())
            print(f"{kind}: {sum(reached_calls.values())} attempts at {listed}")
        print(f"{num_wrong} wrong")
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
