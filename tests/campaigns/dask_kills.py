r"""`kill -9` of workers, scheduler and client of a Dask cluster: the bytes of one local run.

    python -m tests.campaigns.dask_kills --num_kills=100 --seed=0 --workdir=FOLDER
        [--faults=all] [--forget] [--report]

A scheduler and three workers with their nannies run on addresses of their own. `prepare
--runner=dask` converts tiny exams, each some tenths of a second longer than it needs, and is
disturbed again and again until it is complete:

    worker      a worker is killed; its nanny starts it again
    machine     a worker is killed with its nanny and starts again later
    scheduler   the scheduler is killed: the client must end in one line; the cluster starts again
    client      the client is killed with its processes and starts again at once

Then the dataset and the audit directory are compared with those of an undisturbed local run, byte
by byte. A log that no part of the engine writes (tests/campaigns/dask_start) counts the
conversions of each exam: an exam whose note was there at a kill must not be begun again, and no
more conversions may be lost than workers were lost.

--faults: workers that cannot do the work (FAULTS), one run each. --forget: the self-check: finished
exams are not known again, so the campaign must fail. The campaign goes on in its folder; --report
prints what is there. It needs the extra dask; no_room and no_rights also root on Linux.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaigns.kills import PROJECT, contents, differences
from tests.helpers.dask_processes import Cluster

START = Path(__file__).resolve().parent / "dask_start"
TARGETS = {"worker": 0.62, "machine": 0.15, "scheduler": 0.08, "client": 0.15}
FAULTS = ("no_room", "no_rights", "slow", "memory", "allowed_failures", "no_workers", "other")
NUM_WORKERS, NUM_EXAMS, NUM_SLICES = 3, 24, 21
MOST_SECONDS = 1200  # of an attempt on a busy machine; more is a hang
PHASES = (
    ("starting", "*"),
    ("planning", "dataset-audit/work/listing"),
    ("converting", "dataset-audit/work/conversion.pickle"),
    ("deciding", "dataset-audit/work/sources.csv"),
    ("writing shards", "dataset-audit/work/frozen.json"),
    ("tidying up", "dataset/preparation.json"),
)


def command(folder: Path, archive: Path, *options: str) -> list[str]:
    """The preparation of the campaign into a folder."""
    return [
        *(sys.executable, "-m", "data_prep.prepare", f"--input_dir={archive}"),
        *(f"--output_dir={folder / 'dataset'}", f"--pseudonym_key_file={archive.parent / 'key'}"),
        *("--image_size=48", "--shard_size_mb=0.05", "--num_workers=1", *options),
    ]


class Run:
    """One dataset, the cluster that prepares it, and the log of conversions."""

    def __init__(self, folder: Path, archive: Path, seconds: float, *, forget: bool = False):
        self.folder, self.archive = folder, archive
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.seconds, self.forget = seconds, forget
        self.log = folder / "conversions.log"
        self.settings = {"CONVERSIONS": str(self.log), "SECONDS": str(seconds), "PYTHONPATH": ""}
        self.settings["PYTHONPATH"] = os.pathsep.join(map(str, (START, PROJECT)))
        self.settings |= {"FORGET": "1"} if forget else {}
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.cluster = Cluster(folder / "cluster", port)
        self.client: subprocess.Popen | None = None
        self.begin("result")

    def begin(self, name: str) -> None:
        """A new dataset, on the same cluster."""
        self.dataset, self.began = self.folder / name, time.monotonic()
        self.dataset.mkdir()
        self.snapshots: list[tuple[float, set[str]]] = []  # time, exams that had their note then
        self.lines: list[str] = []  # the last one of each attempt that failed

    def start_cluster(self, num_workers: int = NUM_WORKERS) -> None:
        """A new scheduler, and workers."""
        self.cluster.start_scheduler(**self.settings)
        for number in range(1, num_workers + 1):
            self.start_worker(number)

    def start_worker(self, number: int, *options: str, **settings: Any) -> None:
        """A worker whose conversions are logged under its number."""
        named = self.settings | {"WORKER": str(number)}
        self.cluster.start_worker(number, *options, **(named | settings))

    def start_client(self) -> None:
        """Begins an attempt."""
        self.output = open(self.folder / "client.log", "w+")
        options = ("--runner=dask", f"--dask_scheduler={self.cluster.address}")
        self.client = subprocess.Popen(
            command(self.dataset, self.archive, *options),
            cwd=PROJECT,
            env=os.environ | self.settings,
            stdout=self.output,
            stderr=self.output,
            start_new_session=True,
        )

    def kill_client(self) -> None:
        """Ends the client and all its processes."""
        assert self.client
        os.killpg(self.client.pid, signal.SIGKILL)
        self.client.wait()

    def end(self, seconds: float = MOST_SECONDS) -> tuple[int, list[str]]:
        """Waits for the client: its exit code, and what is wrong with its end. An end with an
        error is right if it is one line."""
        assert self.client
        try:
            code = self.client.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill_client()
            return -9, ["hang"]
        self.output.seek(0)
        text = self.output.read()
        self.output.close()
        if code == -signal.SIGKILL:
            return code, []
        errors = [line for line in text.splitlines() if line.startswith("error:")]
        wrong = ["traceback on the screen"] if "Traceback" in text else []
        if code:
            self.lines += errors[-1:]
            wrong += [] if len(errors) == 1 and code in (1, 2) else [f"code {code}: {errors}"]
        return code, wrong

    def notes(self) -> set[str]:
        """The exams that are finished while they are converted."""
        return {path.stem for path in self.dataset.glob("dataset-audit/work/notes/*.json")}

    def phase(self) -> str:
        """What the client is doing, by its files."""
        present = [name for name, pattern in PHASES if any(self.dataset.glob(pattern))]
        return present[-1] if present else "starting"

    def snapshot(self) -> None:
        """Remembers which exams are finished."""
        finished = self.notes()
        self.snapshots.append((time.monotonic(), finished))

    def conversions(self) -> list[tuple[float, str, str, str]]:
        """Time, "begin" or "end", exam, worker."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        found = [(float(at), *rest) for at, *rest in map(str.split, lines)]
        return [one for one in found if one[0] > self.began]

    def done_again(self) -> list[str]:
        """Finished exams that were begun after a kill at which they were finished."""
        begun = [(at, key) for at, word, key, _ in self.conversions() if word == "begin"]
        return sorted({
            key for at, key in begun for then, finished in self.snapshots
            if at > then and key in finished
        })  # fmt: skip

    def result(self, expected: dict[str, Any], num_lost: int) -> tuple[dict[str, Any], list[str]]:
        """Numbers of the conversions, and faults of a complete run; `num_lost`: conversions that
        the kills may have cost."""
        wrong = differences(expected, contents(self.dataset))
        begun = collections.Counter(
            key for _, word, key, _ in self.conversions() if word == "begin"
        )
        again = self.done_again()
        wrong += [f"{len(again)} finished exams were done again"] if again else []
        extra = sum(begun.values()) - len(begun)
        if extra > num_lost:
            wrong.append(f"{extra} conversions more than exams, {num_lost} in flight at the kills")
        numbers = {"exams": len(begun), "begun": sum(begun.values()), "most": max(begun.values())}
        return numbers | {"lost_at_most": num_lost}, wrong

    def close(self) -> None:
        """Ends all processes."""
        if self.client and self.client.poll() is None:
            self.kill_client()
        self.cluster.__exit__()


# ---- kills ---------------------------------------------------------------------------------------


def worker_process(run: Run, name: str) -> int | None:
    """The worker below a nanny: the child of the nanny that listens (it logs its number)."""
    tasks = Path(f"/proc/{run.cluster.processes[name].pid}/task")
    children = " ".join(path.read_text() for path in tasks.glob("*/children")).split()
    for child in children:
        arguments = Path(f"/proc/{child}/cmdline").read_bytes()
        if b"spawn_main" in arguments:
            return int(child)
    return None


def kill(run: Run, target: str, rng: random.Random) -> int:
    """Kills once. Returns how many conversions may be lost by it; -1: there was nothing to kill."""
    names = [name for name in run.cluster.processes if name.startswith("worker")]
    if target == "worker":
        try:
            process = worker_process(run, rng.choice(names))
            if process is None:
                return -1
            os.kill(process, signal.SIGKILL)
        except (OSError, IndexError):
            return -1
        return 1
    if target == "machine":
        name = rng.choice(names)
        run.cluster.kill(name)
        time.sleep(rng.uniform(0, 2))
        run.start_worker(int(name.split("-")[1]))
        return 1
    if target == "client":
        assert run.client
        if run.client.poll() is not None:
            return -1
        run.kill_client()
        return 0  # tasks at work go on
    run.cluster.kill("scheduler")
    return NUM_WORKERS


def disturbed(
    run: Run, expected: dict[str, Any], num_kills: int, rng: random.Random
) -> dict[str, Any]:
    """A run under fire, until it is complete: its kills, numbers and faults."""
    kills: list[dict[str, str]] = []
    wrong: list[str] = []
    lost = attempts = 0
    if not run.cluster.processes:
        run.start_cluster()
    while attempts < 4 * num_kills + 8:
        attempts += 1
        run.start_client()
        assert run.client
        gone = False
        while len(kills) < num_kills and run.client.poll() is None and not gone:
            _wait_for_a_moment(run, rng)
            target = rng.choices(list(TARGETS), list(TARGETS.values()))[0]
            phase = run.phase()
            if run.client.poll() is not None:
                break
            cost = kill(run, target, rng)
            if cost < 0:
                continue
            run.snapshot()
            lost += cost
            kills.append({"target": target, "phase": phase})
            print(f"    {target} killed while {phase}", flush=True)
            gone = target in ("client", "scheduler")
        code, faults = run.end()
        wrong += faults
        if code == 0:
            break
        if "scheduler" not in run.cluster.processes or not _answers(run):
            for name in list(run.cluster.processes):
                run.cluster.kill(name)
            run.start_cluster()
        if faults:
            break
        run.snapshot()
        lost += NUM_WORKERS if code > 0 else 0  # a client that fails leaves what is at work
    numbers, faults = run.result(expected, lost)
    wrong += faults if code == 0 else [f"not complete after {attempts} attempts: {run.lines[-3:]}"]
    return {
        "kills": kills, "wrong": wrong, "attempts": attempts, "lines": sorted(set(run.lines)),
        **numbers,
    }  # fmt: skip


def _wait_for_a_moment(run: Run, rng: random.Random) -> None:
    """Most kills shall hit the conversion, which begins late in an attempt."""
    assert run.client
    deadline = time.monotonic() + 120
    if rng.random() < 0.9:
        began = len(run.conversions())
        while run.client.poll() is None and time.monotonic() < deadline:
            if run.phase() == "converting" and len(run.conversions()) > began:
                break
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 3))
    else:
        time.sleep(rng.uniform(0, 15))


def _answers(run: Run) -> bool:
    return run.cluster.processes["scheduler"].poll() is None


# ---- faults --------------------------------------------------------------------------------------


def attempt(run: Run) -> tuple[int, str, list[str]]:
    """One attempt to its end: exit code, error line, faults."""
    run.start_client()
    num_lines = len(run.lines)
    code, wrong = run.end()
    return code, run.lines[-1] if len(run.lines) > num_lines else "", wrong


def expect(run: Run, words: str) -> list[str]:
    """An attempt that must end in one line with these words."""
    code, line, wrong = attempt(run)
    print(f"    {code}: {line}", flush=True)
    return wrong if code and words in line else [*wrong, f"no line with {words!r}: {code} {line}"]


def complete(run: Run) -> list[str]:
    """An attempt that must succeed."""
    code, line, wrong = attempt(run)
    return wrong if code == 0 else [*wrong, f"exit code {code}: {line}"]


def no_room(run: Run) -> list[str]:
    """One worker has no room where staged volumes go; the others do its work."""
    records = run.dataset / "dataset" / ".work"
    records.mkdir(parents=True)
    run.start_cluster(2)
    mount = f'mount -t tmpfs -o size=4k tmpfs {records} && exec "$@"'
    named = run.settings | {"WORKER": "3"}
    run.cluster.start_worker(3, before=("unshare", "-m", "sh", "-c", mount, "sh"), **named)
    wait_for_workers(run, 3)
    wrong = complete(run)
    if not any(worker == "3" for *_, worker in run.conversions()):
        wrong.append("the worker without room was never tried")
    return wrong


def no_rights(run: Run) -> list[str]:
    """One worker may not write: it is named before any work; without it all is well."""
    run.start_cluster(2)
    mount = f"mount --bind {run.dataset} {run.dataset} && "
    mount += f'mount -o remount,bind,ro {run.dataset} && exec "$@"'
    named = run.settings | {"WORKER": "3"}
    run.cluster.start_worker(3, before=("unshare", "-m", "sh", "-c", mount, "sh"), **named)
    wait_for_workers(run, 3)
    wrong = expect(run, "Read-only file system; give it the same paths and rights")
    run.cluster.kill("worker-3")
    return wrong + complete(run)


def slow(run: Run) -> list[str]:
    """One worker takes 20 seconds an exam: the end waits for its own exam alone."""
    run.start_cluster(2)
    run.start_worker(3, SECONDS="20")
    wait_for_workers(run, 3)
    wrong = complete(run)
    begun = [(at, worker) for at, word, _, worker in run.conversions() if word == "begin"]
    last_of_others = max(at for at, worker in begun if worker != "3")
    late = [at for at, worker in begun if worker == "3" and at > last_of_others]
    num_slow = sum(worker == "3" for _, worker in begun)
    print(f"    the slow worker's: {num_slow} of {len(begun)}, begun last: {len(late)}", flush=True)
    return wrong + ([f"the slow worker kept {len(late)} exams"] if len(late) > 1 else [])


def memory(run: Run) -> list[str]:
    """One worker takes too much memory with each exam, and its nanny ends it again and again."""
    run.start_cluster(2)
    run.start_worker(3, "--memory-limit=700MB", HOG="900000000")
    wait_for_workers(run, 3)
    code, line, wrong = attempt(run)
    if code:  # it may have had the same exam again and again
        print(f"    {line}", flush=True)
        wrong += [] if "allowed-failures" in line else [f"exit code {code}: {line}"]
        wrong += complete(run)
    ended = run.cluster.log("worker-3").count("exceeded 95% memory budget")
    print(f"    the nanny ended its worker {ended} times", flush=True)
    return wrong if ended else [*wrong, "the nanny ended no worker"]


def allowed_failures(run: Run) -> list[str]:
    """A task ends more workers than Dask allows: one line, and the next run continues."""
    run.settings["DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES"] = "0"
    run.start_cluster(2)
    wait_for_workers(run, 2)
    run.start_client()
    while not run.conversions() and run.client and run.client.poll() is None:
        time.sleep(0.02)
    worker = run.conversions()[-1][3]
    process = worker_process(run, f"worker-{worker}")
    assert process
    os.kill(process, signal.SIGKILL)
    run.snapshot()
    code, wrong = run.end()
    print(f"    {code}: {run.lines[-1:]}", flush=True)
    if code != 1 or "allowed-failures is 0" not in run.lines[-1]:
        wrong.append(f"{code} {run.lines[-1:]}")
    run.snapshot()
    return wrong + complete(run)


def no_workers(run: Run) -> list[str]:
    """All machines of the workers are lost, then there are none, then no scheduler."""
    run.start_cluster(2)
    run.start_client()
    while not run.notes() and run.client and run.client.poll() is None:
        time.sleep(0.05)
    for number in (1, 2):
        run.cluster.kill(f"worker-{number}")
    run.snapshot()
    code, wrong = run.end()
    print(f"    {code}: {run.lines[-1:]}", flush=True)
    wrong += (
        [] if code == 1 and "no workers left" in run.lines[-1] else [f"{code} {run.lines[-1:]}"]
    )
    wrong += expect(run, "the cluster has no workers; start some: dask worker")
    run.cluster.kill("scheduler")
    wrong += expect(run, "no Dask scheduler answers within")
    run.start_cluster(2)
    return wrong + complete(run)


def other(run: Run) -> list[str]:
    """Workers with another program, and workers that may start no processes."""
    copy = run.folder / "copy" / "data_prep"
    shutil.copytree(PROJECT / "data_prep", copy)
    with open(copy / "scan" / "rules.py", "a") as file:
        file.write("# other rules\n")
    run.start_cluster(1)
    run.start_worker(2, PYTHONPATH=f"{copy.parent}{os.pathsep}{run.settings['PYTHONPATH']}")
    wait_for_workers(run, 2)
    wrong = expect(run, "has data_prep ")
    run.cluster.kill("worker-2")
    run.start_worker(2, DASK_DISTRIBUTED__WORKER__DAEMON="True")
    wait_for_workers(run, 2)
    wrong += expect(run, "may start no processes")
    run.cluster.kill("worker-2")
    return wrong + complete(run)


def wait_for_workers(run: Run, number: int) -> None:
    """Until so many are registered."""
    deadline = time.monotonic() + 300
    names = [f"worker-{one}" for one in range(1, number + 1)]
    while not all(" Registered to:" in run.cluster.log(name).rpartition("Start worker at")[2]
                  for name in names):  # fmt: skip
        assert time.monotonic() < deadline, "workers do not start"
        time.sleep(0.1)


SCENARIOS: dict[str, Callable[[Run], list[str]]] = {name: globals()[name] for name in FAULTS}


# ---- the whole -----------------------------------------------------------------------------------


def prepare_inputs(work: Path) -> tuple[Path, dict[str, Any]]:
    """The archive, and the result of an undisturbed local run."""
    archive, local = work / "archive", work / "local"
    if not (local / "dataset" / "preparation.json").exists():
        shutil.rmtree(local, ignore_errors=True)
        (work / "key").write_text("0123456789abcdef0123456789abcdef")
        phantom = [sys.executable, "-m", "data_prep.phantom", f"--output_dir={archive}"]
        phantom += [f"--num_patients={NUM_EXAMS}", f"--num_slices={NUM_SLICES}", "--image_size=48"]
        for line in ([*phantom, "--seed=0"], command(local, archive)):
            subprocess.run(line, cwd=PROJECT, check=True, capture_output=True)
    return archive, contents(local)


def report(state: dict[str, Any]) -> str:
    """Kills by target and phase, runs, conversions, faults."""
    runs = [*state["runs"].values()]
    kills = [one for run in runs for one in run["kills"]]
    by_target = collections.Counter(one["target"] for one in kills)
    by_phase = collections.Counter(one["phase"] for one in kills)
    lines = [
        f"{len(kills)} kills in {len(runs)} runs and {sum(run['attempts'] for run in runs)} "
        "attempts",
        *(f"  {number:4} {name}" for name, number in by_target.most_common()),
        *(f"  {number:4} while {name}" for name, number in by_phase.most_common()),
        f"{sum(run['exams'] for run in runs)} exams, {sum(run['begun'] for run in runs)} "
        f"conversions begun ({sum(run['lost_at_most'] for run in runs)} may have been in flight)",
        "lines of failed attempts:",
        *sorted({f"  {line[:300]}" for run in runs for line in run["lines"]}),
        *(f"fault {name}: {'right' if not wrong else wrong}"
          for name, wrong in state["faults"].items()),
    ]  # fmt: skip
    wrong = [fault for run in runs for fault in run["wrong"]]
    wrong += [fault for faults in state["faults"].values() for fault in faults]
    return "\n".join([*lines, *(f"WRONG: {fault}" for fault in wrong), f"{len(wrong)} wrong"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_kills", type=int, default=100)
    parser.add_argument("--kills_per_run", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=4.0, help="that an exam takes longer")
    parser.add_argument("--faults", default="", help=f"all, or some of {','.join(FAULTS)}")
    parser.add_argument("--forget", action="store_true", help="the self-check")
    parser.add_argument("--report", action="store_true", help="print the report of --workdir")
    parser.add_argument("--workdir", type=Path, help="to go on in (default: a temporary folder)")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # the cluster ends with the campaign
        signal.signal(number, lambda *_: sys.exit("stopped; the same command continues"))
    with tempfile.TemporaryDirectory(prefix="dask-kills-") as scratch:
        work = (arguments.workdir or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        state_file = work / "state.json"
        state = {"runs": {}, "faults": {}}
        if state_file.exists():
            state = json.loads(state_file.read_text())
        if not arguments.report:
            archive, expected = prepare_inputs(work)
            names = FAULTS if arguments.faults == "all" else arguments.faults.split(",")
            _run_faults([name for name in names if name], archive, expected, state, state_file)
            _run_kills(arguments, archive, expected, state, state_file)
        text = report(state)
        print(text)
        return 0 if text.endswith("\n0 wrong") else 1


def _run_kills(arguments, archive, expected, state, state_file) -> None:
    def spent() -> int:
        return sum(len(run["kills"]) for run in state["runs"].values())

    if spent() >= arguments.num_kills:
        return
    folder = state_file.parent / "runs"
    run = Run(folder, archive, arguments.seconds, forget=arguments.forget)
    number = 0
    try:
        while spent() < arguments.num_kills:
            name, number = f"{arguments.seed}-{number}", number + 1
            if name in state["runs"]:
                continue
            wanted = min(arguments.kills_per_run, arguments.num_kills - spent())
            started = time.monotonic()
            run.begin(name)
            found = disturbed(run, expected, wanted, random.Random(name))
            state["runs"][name] = found
            state_file.write_text(json.dumps(state, indent=1))
            seconds, outcome = time.monotonic() - started, found["wrong"] or "right"
            print(f"  run {name}: {spent()} kills in all, {seconds:.0f} s, {outcome}", flush=True)
            if found["wrong"]:
                run.dataset.rename(state_file.parent / f"wrong-{name}")
                if arguments.forget:
                    return
    finally:
        run.close()


def _run_faults(names, archive, expected, state, state_file) -> None:
    for name in names:
        if name in state["faults"]:
            continue
        print(f"  {name}", flush=True)
        run = Run(state_file.parent / f"fault-{name}", archive, 1.0)
        try:
            wrong = SCENARIOS[name](run)
            again = run.done_again()
            wrong += [f"{len(again)} finished exams were done again"] if again else []
            wrong += differences(expected, contents(run.dataset))
        finally:
            run.close()
        state["faults"][name] = wrong
        state_file.write_text(json.dumps(state, indent=1))
        print(f"  {name}: {wrong or 'right'}", flush=True)
        if not wrong:
            shutil.rmtree(run.folder)


if __name__ == "__main__":
    sys.exit(main())
