"""The processes of a run speak with each other: through JAX's coordinator, not through devices.

So an exchange ends in bounded time, and says for whom it waits, also where a device or the network
between devices hangs.
"""

import contextlib
import hashlib
import itertools
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed

from data_prep.system.command_line import EXIT_INPUT, exit_code
from data_prep.system.errors import InputError, RunFailed

WAIT_SECONDS = 120.0
SAY_AFTER_SECONDS = 10.0
# A host may learn of a new file on shared storage only when its cache expires.
_SECONDS_TO_SEE_A_FILE = 20.0
# More than a full disk still takes into the place of a file's name.
_PROBE_BYTES = 65536
_ENDED = "ctssl/ended"

_numbers = itertools.count()


def client() -> Any:
    """JAX's client of the coordinator, which also keeps short texts under names."""
    return distributed.global_state.client


def gather(what: str, content: Any = None, seconds: float = WAIT_SECONDS) -> list[Any]:
    """Exchange JSON content; all processes call this in the same order.

    Args:
      what: is done before, for the line that is printed after ten seconds of waiting.
      content: of this process.
      seconds: to wait for the others.

    Returns:
      The content of every process.

    Raises:
      RunFailed: names the processes that did not come.
    """
    if jax.process_count() == 1:
        return [content]
    return exchange(next_key(), what, content, seconds)


def next_key() -> str:
    """A key that is new, and the same on all processes that ask for keys in the same order."""
    return str(next(_numbers))


def exchange(key: str, what: str, content: Any, seconds: float = WAIT_SECONDS) -> list[Any]:
    """`gather` under a key of its own, for any thread."""
    number, began, say_at, pause = jax.process_count(), time.monotonic(), SAY_AFTER_SECONDS, 0.01
    client().key_value_set(f"ctssl/{key}/{jax.process_index()}", json.dumps(content))
    while True:
        entries = client().key_value_dir_get(f"ctssl/{key}/")
        came = {int(name.rpartition("/")[2]): json.loads(value) for name, value in entries}
        if len(came) == number:
            return [came[process] for process in range(number)]
        missing = [process for process in range(number) if process not in came]
        waited = time.monotonic() - began
        if waited > seconds:
            raise RunFailed(
                f"{name_processes(missing, number)} did not complete {what} within "
                f"{seconds:.0f} s; look at the messages and the storage of that host"
            )
        if waited > say_at and jax.process_index() == min(came):
            say_at *= 2
            print(
                f"waiting      for {name_processes(missing, number)}: {what} ({waited:.0f} s)",
                flush=True,
            )
        time.sleep(pause)
        pause = min(1.5 * pause, 0.5)


def name_processes(numbers: Sequence[int], of: int) -> str:
    """`process 3 of 4` or `processes 1, 3 of 4`; many are counted."""
    named = ", ".join(map(str, numbers[:8])) + (
        f" and {len(numbers) - 8} more" * (len(numbers) > 8)
    )
    return f"process{'es' * (len(numbers) > 1)} {named} of {of}"


@contextlib.contextmanager
def refusing_together(what: str, seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """A block of checks: an error on one process ends the block on all, so that no process waits.

    Args:
      what: the block does.
      seconds: that a process waits for the others at the end of the block.

    Raises:
      InputError, RunFailed: another process refused; the message says which, and why.
    """
    error = None
    try:
        yield
    except Exception as caught:  # raised again below, once the others know
        error = caught
    refusals = gather(what, None if error is None else [exit_code(error), text_of(error)], seconds)
    if error is not None:
        raise error
    for process, refusal in enumerate(refusals):
        if refusal is not None:
            kind = InputError if refusal[0] == EXIT_INPUT else RunFailed
            raise kind(f"process {process} of {len(refusals)} refused: {refusal[1]}")


def text_of(error: BaseException) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split())[:500] or type(error).__name__


def require_agreement(name: str, content: Any) -> None:
    """Refuse processes with different settings: collectives would hang or mix different models.

    Args:
      name: of the content, for the message.
      content: JSON content.

    Raises:
      InputError: on every process, if one differs from process 0.
    """
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    digests = gather(f"comparing the {name}", digest)
    for process, other in enumerate(digests):
        if other != digests[0]:
            raise InputError(
                f"process {process} has another {name} than process 0; start all with the same "
                "flags and files"
            )


def require_shared(workdir: Path) -> None:
    """Refuse a run directory that one of the processes does not share with process 0, or cannot
    write.

    Args:
      workdir: the folder, which process 0 has made.

    Raises:
      InputError: on every process; names the process, its host and --workdir.
    """
    if jax.process_count() == 1:
        return
    this = jax.process_index()
    name = gather("opening --workdir", uuid.uuid4().hex)[0]
    marker, own = workdir / f".process-0-{name}", workdir / f".process-{this}-{name}"
    remedy = "give a folder on storage that all processes share and may write"
    try:
        with refusing_together("writing in --workdir"):
            if this == 0:
                _write(own, f"--workdir={workdir} cannot be written", remedy)
        with refusing_together("looking into --workdir"):
            began = time.monotonic()
            while not marker.exists():
                if time.monotonic() - began > _SECONDS_TO_SEE_A_FILE:
                    raise InputError(
                        f"--workdir={workdir} is another folder on process {this} "
                        f"({socket.gethostname()}) than on process 0; {remedy}"
                    )
                time.sleep(0.5)
                with contextlib.suppress(OSError):
                    os.listdir(workdir)  # asks a network file system again
            if this != 0:
                where = f"process {this} ({socket.gethostname()})"
                _write(own, f"--workdir={workdir} cannot be written by {where}", remedy)
    finally:
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)


def require_writable(workdir: Path) -> None:
    """Refuse to go on to a checkpoint that one of the processes cannot write.

    Raises:
      RunFailed: on every process; names the process, its host and the run directory.
    """
    if jax.process_count() == 1:
        return  # the save itself tells
    this = jax.process_index()
    own = workdir / f".process-{this}"
    with refusing_together(f"writing in {workdir}"):
        try:
            own.write_bytes(bytes(_PROBE_BYTES))
        except OSError as error:
            raise RunFailed(
                f"process {this} ({socket.gethostname()}) cannot write in {workdir} "
                f"({error.strerror}); make room or permit writing there and run again: it resumes "
                "from the last complete checkpoint"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                own.unlink(missing_ok=True)


def _write(path: Path, fault: str, remedy: str) -> None:
    try:
        path.write_bytes(bytes(_PROBE_BYTES))
    except OSError as error:
        raise InputError(f"{fault} ({error.strerror}); {remedy}") from None


def announce_end(code: int, message: str) -> None:
    """Tell the other processes that this one ends before the run does, and why."""
    with contextlib.suppress(RuntimeError):  # the coordinator may be gone
        client().key_value_set(
            f"{_ENDED}/{jax.process_index()}", json.dumps([code, message]), allow_overwrite=True
        )


def ended() -> tuple[int, int, str] | None:
    """Number, exit code and message of another process that has announced its end; of several the
    one with the smallest code, since an error counts more than a request to stop."""
    entries = client().key_value_dir_get(f"{_ENDED}/")
    others = [
        (*json.loads(value), int(name.rpartition("/")[2]))
        for name, value in entries
        if int(name.rpartition("/")[2]) != jax.process_index()
    ]
    if not others:
        return None
    code, message, process = min(others, key=lambda other: other[0])
    return process, code, message
