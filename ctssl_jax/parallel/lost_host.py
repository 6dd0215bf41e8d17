"""The end of a run of several processes when one is lost: in bounded time, with one line.

A process that ends by an error tells the others, which end with its exit code and name it. A
process that is lost without a word is noticed by JAX, by missing heartbeats (process 0 at once):
JAX ends the others by `abort()` in a thread of its own, for a process that waits for its devices
gets no Python exception. If a connection breaks first, there is an exception. Either becomes one
line with the remedy on stderr and exit code 75. No checkpoint is saved then. The last one is whole,
since a checkpoint gets its name when it is complete.
"""

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from ctssl_jax.parallel import meeting
from ctssl_jax.runs.damage import CHECKPOINTS
from data_prep.system import early_stop, stores
from data_prep.system.command_line import LEAVING_SECONDS, exit_code
from data_prep.system.early_stop import EXIT_START_AGAIN
from data_prep.system.errors import InputError, RunFailed

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_FOR_ITS_OWN_ERROR = 3.0  # of a process whose neighbour has announced its end
# In messages of errors. The last one is NCCL's.
SIGNS = ("Gloo", "UNAVAILABLE", "CoordinationService", "remote process exited")

_handlers = []  # C keeps only their addresses
_workdirs: list[str | Path] = []  # the run directory, in a block of `ending_together`
_over = threading.Event()
_raised = threading.Event()  # the error has left that block: its message will be printed


def at_abort(line: Callable[[], str], exit_code: int = EXIT_START_AGAIN) -> None:
    """From now on `abort()` in any thread writes a line and ends the process with an exit code.

    A handler of Python's `signal` would run too late: the process would be gone before.
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
    """From the start of the block to the end of the process, a lost process ends all others.

    A process that raises its own error leaves after at most `LEAVING_SECONDS`, so that the others
    notice. In a run of one process the block has no effect.

    Args:
      workdir: the run directory; the line names its last checkpoint.
    """
    if jax.process_count() == 1:
        yield
        return
    _workdirs[:] = [workdir]
    at_abort(lambda: _lost_line(workdir))
    early_stop.tell_before_leaving(_tell_of_the_signal)
    threading.Thread(target=_follow, name="lost hosts", daemon=True).start()
    try:
        yield
    except BaseException as error:
        _raised.set()
        leave_soon(error)
        raise
    finally:
        _over.set()


def leave_soon(error: BaseException) -> None:
    """In a block of `ending_together`: tell the others of this error, and leave in time.

    For a process that still has something to close, which may wait for the others. Where the error
    says that another process is lost, this one leaves at once. In a run of one process, and
    outside such a block, this has no effect.
    """
    if not _workdirs or _over.is_set():
        return
    _over.set()
    if sign := _sign_of_loss(error):
        deadline = time.monotonic() + _SECONDS_BETWEEN_LOOKS + 1
        while time.monotonic() < deadline:  # perhaps it has said why it goes
            with contextlib.suppress(RuntimeError):
                if ended := meeting.ended():
                    _end_as(ended)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        os.write(2, _lost_line(_workdirs[0], f" ({sign})").encode())
        os._exit(EXIT_START_AGAIN)
    meeting.announce_end(exit_code(error), meeting.text_of(error))
    at_abort(lambda: "", exit_code(error))  # its own message is the one to read
    _leave_in_time(error)


def _leave_in_time(error: BaseException) -> None:
    leave = threading.Timer(LEAVING_SECONDS, _leave, [error])
    leave.daemon = True
    leave.start()


def _leave(error: BaseException) -> None:
    if not _raised.is_set():  # the main thread still closes something, and has said nothing
        os.write(2, f"error: {meeting.text_of(error)}\n".encode())
    os._exit(exit_code(error))


def _tell_of_the_signal() -> None:
    meeting.announce_end(EXIT_START_AGAIN, "it was asked to stop before the first step")
    if jax.process_index() == 0:  # the others could not read it without the coordinator
        time.sleep(2 * _SECONDS_BETWEEN_LOOKS)


def _follow() -> None:
    """End this process, too, if another one has announced its end."""
    while not _over.wait(_SECONDS_BETWEEN_LOOKS):
        try:
            ended = meeting.ended()
        except RuntimeError:
            return  # the coordinator is gone: JAX ends this process
        if ended and not _over.wait(_SECONDS_FOR_ITS_OWN_ERROR):
            _end_as(ended)


def _end_as(ended: tuple[int, int, str]) -> None:
    process, code, message = ended
    line = f"process {process} of {jax.process_count()} ended: {message}"
    os.write(2, f"{'' if code == EXIT_START_AGAIN else 'error: '}{line}\n".encode())
    os._exit(code)


def _sign_of_loss(error: BaseException | None, signs: tuple[str, ...] = SIGNS) -> str:
    """The message of a broken connection to another process, of an error or of its causes; ""
    if the error is another one."""
    if error is None or isinstance(error, InputError):
        return ""
    # of a checkpoint that could not be saved: storage, too, may be UNAVAILABLE
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
    if stores.is_url(workdir):  # no network in a signal handler
        kept = "the last checkpoint is the newest complete one"
    return (
        f"error: another process of this run was lost{sign}; {kept} of {workdir}; start all "
        "processes again with the same command to go on\n"
    )
