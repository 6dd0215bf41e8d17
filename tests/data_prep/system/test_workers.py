"""Worker processes that die."""

import os
import signal
import subprocess
import sys
import time

import pytest

from data_prep.system.workers import WorkerPool
from tests.helpers.training_runs import PROJECT


@pytest.fixture(scope="module", autouse=True)
def quick_workers() -> None:
    """Here they are spawned, as in the commands."""


def square(number: int, deadly: tuple[int, ...]) -> int:
    if number in deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    if number < 0:
        raise ValueError(f"{number} is negative")
    return number * number


DEADLY = """
from data_prep.system.workers import WorkerDied, WorkerPool
from tests.data_prep.system.test_workers import square

with WorkerPool(2) as pool:
    results = list(pool.run(square, ((number, (3,)) for number in range(8))))
    print([task[0] for task, _ in results])
    print(["died" if isinstance(r, WorkerDied) else r for _, r in results])
    print([result for _, result in pool.run(square, [(5, ())])])
"""


def test_results_come_in_order_and_a_deadly_task_takes_no_other_with_it():
    """In a process of its own, as a command: beside dozens of threads of other tests it ended the
    process of the tests now and then."""
    done = subprocess.run(
        [sys.executable, "-c", DEADLY], capture_output=True, text=True, cwd=PROJECT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "[0, 1, 2, 3, 4, 5, 6, 7]",
        "[0, 1, 4, 'died', 16, 25, 36, 49]",
        "[25]",
    ]


def test_exceptions_reach_the_caller():
    with WorkerPool(1) as pool, pytest.raises(ValueError, match="-1 is negative"):
        list(pool.run(square, [(2, ()), (-1, ()), (3, ())]))


def test_workers_end_with_a_killed_parent():
    program = (
        "import os, time\n"
        "from data_prep.system.workers import WorkerPool\n"
        "if __name__ == '__main__':\n"
        "    with WorkerPool(1) as pool:\n"
        "        [(_, pid)] = pool.run(os.getpid, [()])\n"
        "        print(pid, flush=True)\n"
        "        list(pool.run(time.sleep, [(600,)]))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(worker)


def _runs(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            # an orphan that nobody reaps is dead all the same
            return file.read().split(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


STOPPED_WHILE_STARTING = """
import multiprocessing.resource_tracker, multiprocessing.util, os, signal, threading, time
from data_prep.system.workers import WorkerPool

class Stopped(Exception):
    pass

def stop(signum, frame):
    raise Stopped

def start_and_be_stopped(*arguments):
    pid = started(*arguments)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    return pid

if __name__ == "__main__":
    multiprocessing.resource_tracker.ensure_running()
    started = multiprocessing.util.spawnv_passfds
    multiprocessing.util.spawnv_passfds = start_and_be_stopped
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    signal.signal(signal.SIGTERM, stop)
    try:
        with WorkerPool(1) as pool:
            list(pool.run(abs, [(-1,)]))
    except Stopped:
        print("stopped", signal.getsignal(signal.SIGTERM) is stop)
"""


def test_a_request_to_stop_while_a_worker_is_started_waits(tmp_path):
    """Also where another thread takes the signal, as those of numerical libraries do: they block
    nothing. In a process of its own, which a signal at another moment would end."""
    (tmp_path / "program.py").write_text(STOPPED_WHILE_STARTING)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped True\n", "")
