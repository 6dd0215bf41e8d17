"""A Dask cluster under the pipelines of Beam: can it do the work, and does it stay?

Beam's DaskRunner makes tasks of the elements and leaves the rest to Dask. What this file adds:

- before any work one line about a cluster that is not there, has no workers, has other versions,
  may start no processes, or does not reach the directories;
- tasks that an ended run left at work are waited for;
- tasks that fail are tried again on workers on which none failed: Dask alone may try them on the
  worker without room on its disk until it gives up;
- a cluster that loses its scheduler or all its workers ends the run: Beam alone calls the pipeline
  done in the first case, and waits for ever in the second.

`distributed` is imported inside functions: its extra may be missing.
"""

import collections
import contextlib
import hashlib
import importlib.metadata
import logging
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.dataset.schema import versions
from data_prep.system.errors import InputError, RunFailed
from data_prep.system.files import PARTIAL
from data_prep.system.workers import WorkerPool

RUNNER = "apache_beam.runners.dask.dask_runner.DaskRunner"
ADDRESS_OPTION = "--dask_client_address="  # of Beam
TRIES = 4  # of a task that raises an error; for a worker that dies Dask has `allowed-failures`
# At a time: 100,000 cost the process that sends them 1.1 GB and 38 CPU seconds, measured.
_MOST_TASKS = 50_000
_BACK_OFF_SECONDS = 10.0  # that a worker rests whose task failed
_CONNECT_SECONDS = 15
_WORKER_SECONDS = 30.0  # that a cluster may take to get its first worker
_ALONE_SECONDS = 60.0  # that a cluster may be without workers, e.g. while nannies start them again
_LEFTOVER_SECONDS = 900.0  # that tasks of an ended run may take
_IDLE_SECONDS = 30.0  # that a process waits for the next exam
_GONE = "the Dask scheduler at {} is gone; start the cluster"
_PACKAGES = ("apache-beam", "cloudpickle", "dask", "distributed")  # must be equal everywhere
_PROGRAM = Path(__file__).resolve().parents[1]

_at_work: collections.Counter[str] = collections.Counter()  # in a worker: tasks by directory
_idle: dict[WorkerPool, threading.Timer] = {}  # in a worker
_lock = threading.Lock()


def beam_arguments(address: str) -> list[str]:
    """Arguments of Beam for a scheduler: one element a partition, since Dask moves whole
    partitions."""
    return [f"--runner={RUNNER}", f"{ADDRESS_OPTION}{address}", "--dask_partition_size=1"]


# ---- in the workers ------------------------------------------------------------------------------


class Failure(NamedTuple):
    """A task that raised an error."""

    element: Any
    worker: str  # its address
    reason: str  # in one line


@contextlib.contextmanager
def at_work(directory: str) -> Iterator[None]:
    """A task that writes below `directory`."""
    with _lock:
        _at_work[directory] += 1
    try:
        yield
    finally:
        with _lock:
            _at_work[directory] -= 1


def failure(element: Any, reason: str) -> Failure:
    """The output of a task that raised an error. Its worker rests first, so that one that cannot do
    the work does not take all of it."""
    from distributed import get_worker

    time.sleep(_BACK_OFF_SECONDS)
    return Failure(element, get_worker().address, reason)


@contextlib.contextmanager
def lasting_pool() -> Iterator[WorkerPool]:
    """A pool of one process that is kept for the next exam, since a process takes a second to
    start; it ends some time after the last one."""
    with _lock:
        pool, timer = _idle.popitem() if _idle else (None, None)
    if timer:
        timer.cancel()
    pool = pool or WorkerPool(1)
    try:
        yield pool
    finally:
        timer = threading.Timer(_IDLE_SECONDS, _close_idle, [pool])
        timer.daemon = True
        with _lock:
            _idle[pool] = timer
        timer.start()


def _close_idle(pool: WorkerPool) -> None:
    with _lock:
        is_idle = _idle.pop(pool, None)
    if is_idle:
        pool.__exit__()


def _num_at_work(directory: str) -> int:
    return _at_work[directory]


def _facts() -> dict[str, str]:
    """What must be equal in all processes of the cluster."""
    digest = hashlib.sha256()
    for path in sorted(_PROGRAM.rglob("*.py")):
        digest.update(path.relative_to(_PROGRAM).as_posix().encode() + path.read_bytes())
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return versions() | packages | {"data_prep": digest.hexdigest()[:12]}


def _facts_of_worker() -> tuple[dict[str, str], bool]:
    """`_facts`, and whether this process may start others."""
    return _facts(), not multiprocessing.current_process().daemon


def _fault_of_paths(readable: Sequence[str], writable: Sequence[str]) -> str:
    """Why this process can't list or write these directories; "" if it can."""
    path = ""
    try:
        for path in readable:
            os.listdir(path)
        for path in writable:
            with tempfile.NamedTemporaryFile(dir=path, suffix=PARTIAL) as file:
                file.write(bytes(4096))
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return ""


# ---- before the work -----------------------------------------------------------------------------


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """A client of the cluster. Raises InputError if no scheduler answers, RunFailed if it is lost
    in the block."""
    import distributed

    for name in ("distributed", "asyncio", "tornado"):  # what they say, the caller says in one line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        client = distributed.Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except Exception as error:  # of any type: an old scheduler, another program on that port
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, OSError):
            reason = f"no Dask scheduler answers within {_CONNECT_SECONDS} s"
        raise InputError(
            f"--dask_scheduler={address}: {reason}; start one (dask scheduler), or give its address"
        ) from None
    try:
        yield client
    except OSError:  # of its connections
        raise RunFailed(f"{_GONE.format(address)}, and run the same command again") from None
    finally:
        with contextlib.suppress(Exception):  # it is lost already
            client.close(timeout=5)


def check_cluster(address: str) -> None:
    """Refuses a cluster that can't do the work.

    Raises:
        InputError: no scheduler answers, there are no workers, they have other versions of this
            program or its packages, or may start no processes.
    """
    flag = f"--dask_scheduler={address}"
    here = _facts()
    with _connected(address) as client:
        deadline = time.monotonic() + _WORKER_SECONDS
        while not client.nthreads():
            if time.monotonic() > deadline:
                raise InputError(
                    f"{flag}: the cluster has no workers; start some: dask worker {address}"
                )
            time.sleep(0.2)
        try:
            found = client.run_on_scheduler(_facts)
        except Exception as error:  # of any type: it unpickles what it is sent
            found = error
        _refuse_other_facts(f"{flag}: the scheduler", found, here)
        for worker, found in client.run(_facts_of_worker, on_error="return").items():
            if isinstance(found, OSError):  # it ended in this moment
                continue
            place = f"{flag}: the worker {worker}"
            facts, may_start = found if isinstance(found, tuple) else (found, True)
            _refuse_other_facts(place, facts, here)
            if not may_start:
                raise InputError(
                    f"{place} may start no processes, and each scan is read in one of its own; "
                    "start workers with DASK_DISTRIBUTED__WORKER__DAEMON=False in their environment"
                )


def _refuse_other_facts(place: str, found: Any, here: dict[str, str]) -> None:
    remedy = "install the same on all machines, and start the scheduler and the workers again"
    if not isinstance(found, dict):  # an error
        reason = str(found).splitlines()[0] if str(found) else type(found).__name__
        raise InputError(f"{place} can't run this program ({reason}); {remedy}")
    for name, version in here.items():
        if found.get(name) != version:
            raise InputError(f"{place} has {name} {found.get(name)}, not {version}; {remedy}")


def check_directories(
    address: str, readable: Sequence[Path], writable: Sequence[Path], records_dir: Path
) -> None:
    """Refuses a cluster of which a worker does not reach the directories, and waits for the tasks
    that an ended run left at work below `records_dir`: Dask drops its other tasks by itself.

    Raises:
        InputError: a worker can't read or write one of them.
        RunFailed: the tasks do not end.
    """
    with _connected(address) as client:
        faults = client.run(
            _fault_of_paths, [*map(str, readable)], [*map(str, writable)], on_error="ignore"
        )
        for worker, fault in faults.items():
            if fault:
                raise InputError(
                    f"--dask_scheduler={address}: the worker {worker} can't use {fault}; give it "
                    "the same paths and rights as this machine, or stop it"
                )
        deadline, said = time.monotonic() + _LEFTOVER_SECONDS, False
        while busy := [
            worker
            for worker, number in client.run(
                _num_at_work, str(records_dir), on_error="ignore"
            ).items()
            if number
        ]:
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"--dask_scheduler={address}: the worker {busy[0]} does not end a task of an "
                    "earlier run; start it again, then run the same command again"
                )
            if not said:
                print(f"waiting for tasks of an ended run on {len(busy)} workers", file=sys.stderr)
            said = True
            time.sleep(0.5)


# ---- during the work -----------------------------------------------------------------------------


def run_tasks(elements: Sequence[Any], start: Callable[[Sequence[Any]], Any], address: str) -> None:
    """Runs a task for each element, a part of them at a time. Those that fail run again, on workers
    on which none failed.

    Args:
        elements: of the tasks.
        start: returns the result of `run` of a pipeline that ends in the failures of its elements.
        address: of the scheduler.

    Raises:
        RunFailed: tasks fail on all workers or again and again, or the cluster is gone.
    """
    for first in range(0, len(elements), _MOST_TASKS):
        _run_part(elements[first : first + _MOST_TASKS], start, address)


def _run_part(elements: Sequence[Any], start: Callable[[Sequence[Any]], Any], address: str) -> None:
    import dask

    options: dict[str, Any] = {"retries": TRIES}  # of errors of Dask or Beam themselves
    failing: set[str] = set()
    for _ in range(TRIES):
        try:
            with dask.annotate(**options):
                result = start(elements)
        except OSError:
            raise RunFailed(_GONE.format(address)) from None
        failures, workers = wait_until_finish(result, address)
        if not failures:
            return
        failing |= {one.worker for one in failures}
        elements = [one.element for one in failures]
        fit = sorted(workers - failing)
        if not fit:
            break
        options |= {"workers": fit, "allow_other_workers": True}  # they may end, too
    worker, reason = failures[0][1:]
    raise RunFailed(f"{len(failures)} tasks failed, one of them on the worker {worker}: {reason}")


def wait_until_finish(result: Any, address: str) -> tuple[list[Failure], set[str]]:
    """The failures of a Beam pipeline at its end, and the workers that are there then.

    Args:
        result: of `run` of the pipeline.
        address: of the scheduler.

    Raises:
        RunFailed: the scheduler or all workers are gone, or a task has ended too many workers.
        Exception: of any type, of Dask or Beam themselves.
    """
    from distributed import CancelledError, KilledWorker

    client, futures = result.client, result.futures
    alone_since = None
    try:
        while True:
            try:
                result.wait_until_finish(duration=2_000)
                if any(future.status != "finished" for future in futures):
                    raise CancelledError  # without its scheduler Beam calls the pipeline done
                return [one for future in futures for one in future.result()], {*client.nthreads()}
            except TimeoutError:
                if any(future.status not in ("pending", "finished") for future in futures):
                    raise
            if client.status != "running":
                continue  # it tries to connect again; if it can't, the futures are cancelled
            if client.nthreads():
                alone_since = None
            else:
                alone_since = alone_since or time.monotonic()
                if time.monotonic() - alone_since > _ALONE_SECONDS:
                    raise RunFailed(
                        f"the Dask cluster at {address} has no workers left; start some (dask "
                        f"worker {address})"
                    )
    except KilledWorker as error:
        raise RunFailed(
            "too many workers of the Dask cluster ended during the same task (its "
            f"allowed-failures is {error.allowed_failures}), the last of them "
            f"{error.last_worker.address}: see its log, and give workers more memory"
        ) from None
    except RunFailed:
        raise
    except Exception as error:
        if client.status == "running" and not isinstance(error, CancelledError):
            raise
        raise RunFailed(_GONE.format(address)) from None
    finally:
        with contextlib.suppress(Exception):
            client.close(timeout=5)
