"""Tasks on worker processes that may die, and a progress display."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import tqdm

from data_prep.system.command_line import stop_signals_handled_by
from data_prep.system.early_stop import STOP_SIGNALS

_SECONDS_BETWEEN_LINES = 15


class WorkerDied:
    """Stands for the result of a task whose worker process was killed, also when it ran alone."""


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerPool:
    """Worker processes that outlive their tasks. Use as a context manager."""

    def __init__(self, num_workers: int):
        self.num_workers = num_workers
        self._executor = _new_executor(num_workers)

    def run(
        self, function: Callable[..., Any], tasks: Iterable[tuple]
    ) -> Iterator[tuple[tuple, Any]]:
        """Yields (task, function(*task)) in the order of the tasks.

        `tasks` is read as workers become free. When a worker is killed (out of memory, a fault in a
        decoder), the tasks that were under way are run again one by one; the one that kills its
        worker again yields `WorkerDied()`. Exceptions of `function` are raised here.
        """
        tasks = iter(tasks)
        under_way: collections.deque[tuple[tuple, concurrent.futures.Future]] = collections.deque()
        while True:
            while len(under_way) < 2 * self.num_workers and (task := next(tasks, None)) is not None:
                under_way.append((task, _submit(self._executor, function, task)))
            if not under_way:
                return
            task, future = under_way[0]
            try:
                result = future.result()
            except BrokenProcessPool:
                self._executor.shutdown()
                yield from _run_one_by_one(function, under_way)
                under_way.clear()
                self._executor = _new_executor(self.num_workers)
                continue
            under_way.popleft()
            yield task, result

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(cancel_futures=True)  # waits for the tasks under way


def _run_one_by_one(function, under_way) -> Iterator[tuple[tuple, Any]]:
    executor = _new_executor(1)
    try:
        for task, future in under_way:
            if isinstance(future.exception(), BrokenProcessPool):
                future = _submit(executor, function, task)
            try:
                yield task, future.result()
            except BrokenProcessPool:
                executor.shutdown()
                executor = _new_executor(1)
                yield task, WorkerDied()
    finally:
        executor.shutdown(cancel_futures=True)


def _submit(executor, function, task) -> concurrent.futures.Future:
    with _requests_to_stop_wait():
        try:
            return executor.submit(function, *task)
        except BrokenProcessPool as error:
            future = concurrent.futures.Future()
            future.set_exception(error)
            return future


@contextlib.contextmanager
def _requests_to_stop_wait() -> Iterator[None]:
    """A request to stop waits until a worker that is being started has its setup: otherwise the
    worker would print a traceback.

    The worker inherits the blocked signals. Blocking is not enough for this process, since another
    thread (such as a thread of a numerical library) takes the signal and the main thread then runs
    the handler.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread only
        return
    received: list[int] = []
    try:
        with stop_signals_handled_by(lambda number, frame: received.append(number)):
            before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            try:
                yield
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
    finally:
        for number in received:
            signal.raise_signal(number)


def _new_executor(num_workers: int) -> concurrent.futures.ProcessPoolExecutor:
    """Spawned, not forked: a forked worker would hold the parent's locks and pipes open after the
    parent is killed."""
    return concurrent.futures.ProcessPoolExecutor(
        num_workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )


def _start_worker() -> None:
    # Ctrl-C reaches the whole process group: the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # a worker inherits the blocked signals
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


class Progress:
    """Progress on stderr: a bar on a terminal, else a line now and then. Use as a context
    manager.

    `detail`: its text ends each line.
    """

    def __init__(
        self, title: str, unit: str, total: int | None, detail: Callable[[], str] = lambda: ""
    ):
        self._title, self._unit, self._total, self._detail = title, unit, total, detail
        self._stream = sys.stderr  # others may turn stderr away while they work
        self._done, self._worked = 0, 0
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(
                desc=title, unit=f" {unit}", total=total, dynamic_ncols=True, smoothing=0.05
            )

    def advance(self, number: int, *, already_there: bool = False) -> None:
        """`already_there`: an earlier run did it, so it counts for the position, not the speed."""
        self._done += number
        self._worked += 0 if already_there else number
        if self._bar is not None:
            self._bar.set_postfix_str(self._detail(), refresh=False)
            if already_there:
                self._bar.initial += number
                self._bar.n += number
            else:
                self._bar.update(number)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        speed = self._worked / max(self._last_line - self._start, 1e-9)
        line = f"{self._title}: {self._done}"
        if self._total is not None:
            line += f" of {self._total}"
        line += f" {self._unit}, {speed:.0f}/s"
        if self._total is not None and speed:
            left = int(max(self._total - self._done, 0) / speed)
            line += f", {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        detail = self._detail()
        print(f"{line}; {detail}" if detail else line, file=self._stream, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif error[0] is None:
            self._print_line()
