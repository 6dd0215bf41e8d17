"""The end of a run of several processes when one of them is lost: in bounded time, with one line
that says what to do.

JAX notices a lost process by missing heartbeats (at once if it was process 0) and then ends the
others by `abort()`, from a thread of its own: a process that waits for its devices gets no Python
exception. Where a connection breaks first, an exception does come. Either becomes one line on
stderr and exit code 75. Nothing is saved then: checkpoints appear under their names only when they
are complete, so the last one is whole.
"""

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from ctssl_jax.runs.damage import CHECKPOINTS
from data_prep.system.command_line import EXIT_START_AGAIN, exit_code
from data_prep.system.errors import InputError, RunFailed

# for a process that failed: the others may be about to end by the same error, and say so
LEAVING_SECONDS = 5.0
# the last one is NCCL's
SIGNS = ("Gloo", "UNAVAILABLE", "CoordinationService", "remote process exited")

_handlers = []  # C keeps only their addresses


def at_abort(line: Callable[[], str], exit_code: int = EXIT_START_AGAIN) -> None:
    """From now on `abort()` in this process, by whatever thread, writes a line and ends it with an
    exit code.

    A handler of Python's `signal` would run too late: when it returned to Python, the process would
    be gone.
    """

    def end(signal_number: int) -> None:
        try:
            os.write(2, line().encode())
        finally:
            os._exit(exit_code)

    _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(end))
    ctypes.CDLL(None).signal(signal.SIGABRT, _handlers[-1])


@contextlib.contextmanager
def ending_together(workdir: str | Path) -> Iterator[None]:
    """A block, and what follows until the process ends, in which no process of a run outlives
    another that was lost.

    A process that raises an error of its own does not wait for the others for longer than
    `LEAVING_SECONDS`; they then miss it. Does nothing in a run of one process.

    Args:
      workdir: the run directory, whose last checkpoint is named.
    """
    if jax.process_count() == 1:
        yield
        return
    at_abort(lambda: _lost_line(workdir))
    try:
        yield
    except BaseException as error:
        sign = _sign_of_loss(error)
        if sign:
            os.write(2, _lost_line(workdir, f" ({sign})").encode())
            os._exit(EXIT_START_AGAIN)
        at_abort(lambda: "", exit_code(error))  # its own message is the one to read
        leave = threading.Timer(LEAVING_SECONDS, os._exit, [exit_code(error)])
        leave.daemon = True
        leave.start()
        raise


def _sign_of_loss(error: BaseException | None, signs: tuple[str, ...] = SIGNS) -> str:
    """What an error, or one that led to it, says of a broken connection to another process; empty
    if it does not."""
    if error is None or isinstance(error, InputError):
        return ""
    # a checkpoint that could not be saved: storage, too, may be UNAVAILABLE
    if isinstance(error, RunFailed):
        signs = tuple(sign for sign in signs if sign != "UNAVAILABLE")
    said = " ".join(str(error).split())
    if any(sign in said for sign in signs):
        return said.removeprefix("INTERNAL: ").replace("Error dispatching computation: ", "")[:300]
    return _sign_of_loss(error.__cause__, signs) or _sign_of_loss(error.__context__, signs)


def _lost_line(workdir: str | Path, sign: str = "") -> str:
    folder = Path(workdir) / CHECKPOINTS
    steps = [int(name) for name in os.listdir(folder) if name.isdigit()] if folder.is_dir() else []
    kept = f"the last checkpoint is step {max(steps):,}" if steps else "there is no checkpoint"
    return (
        f"error: another process of this run was lost{sign}; {kept} of {workdir}; start all "
        "processes again with the same command to go on\n"
    )
