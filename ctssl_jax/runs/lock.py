"""One training at a time in a run directory: `training.lock` names the process that trains.

On a mounted file system the process holds an advisory lock (`flock`) on that file. The lock ends
with the process, however it ends, and a requeued job takes it at once. The file stays.

- NFSv4: a lock of the server. It ends with the process. If the whole host is lost, it ends when the
  server notices (its lease time, 90 s by default), which is before Slurm requeues (300 s).
- NFSv3: a lock of the server's lockd. If the whole host is lost, it stays until that host starts
  again, or until somebody removes `training.lock`.
- A mount with `nolock` or `local_lock` notices only trainings on the same host. A file system
  without locks is reported in a line, and the training goes on.

On `gs://` the lock is the object itself. It is written under a precondition on its generation, so
that one of two writers fails, and renewed every 15 s. Who finds it watches it: if it is renewed,
the training is refused; if it is not renewed for 60 s, or its process ran on this machine and is
gone, it is taken over. A process whose lock was taken over (it was suspended or cut off for a
minute) ends at its next renewal and saves nothing.

Commands that only read a run take no lock.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import jax

from data_prep.system.command_line import EXIT_FAILED
from data_prep.system.errors import InputError
from data_prep.system.files import explain

FILE = "training.lock"
RENEWAL_SECONDS = 15.0
LOST_SECONDS = 60.0  # without a renewal


class TrainingLock:
    """The right to train in a run directory, until the end of the block. Only process 0 takes it.

    Raises:
      InputError: by its methods: another process holds it.
    """

    def __init__(self) -> None:
        self._held: _FileLock | _ObjectLock | None = None

    def __enter__(self) -> "TrainingLock":
        return self

    def __exit__(self, *error: object) -> None:
        if self._held:
            self._held.release()

    def take_if_there(self, workdir: Path) -> None:
        """Take a lock that was made before: nothing is written where no run is."""
        self._take(workdir, make=False)

    def take(self, workdir: Path) -> None:
        """Take the lock, and make the directory for it."""
        self._take(workdir, make=True)

    def _take(self, workdir: Path, make: bool) -> None:
        if jax.process_index() > 0:
            return
        if self._held is None:
            kind = _FileLock if isinstance(workdir, Path) else _ObjectLock
            self._held = kind.taken(workdir, make)
        if make and isinstance(self._held, _FileLock):
            self._held.sign()


def _this_process() -> dict[str, Any]:
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": _machine(),
        "birth": _birth(os.getpid()),
        "holder": uuid.uuid4().hex,
    }


def _machine() -> str:
    """Equal for processes that see each other's process numbers."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _birth(process: int) -> str:
    """When a process of this machine began, in clock ticks; "" if there is none."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _is_alive(holder: dict[str, Any]) -> bool | None:
    """Whether the process still runs; None if it is not one of this machine."""
    if not holder.get("machine") or holder["machine"] != _machine():
        return None
    return holder.get("birth") == _birth(holder.get("process", 0))


def _parsed(content: str | bytes) -> dict[str, Any]:
    try:
        holder = json.loads(content)
    except ValueError:  # just made
        return {}
    return holder if isinstance(holder, dict) else {}


def _held(workdir: Path, holder: dict[str, Any], remedy: str = "") -> InputError:
    who = "another process"
    if holder:
        who = f"process {holder.get('process')} on {holder.get('host')}"
        who += f" (started {holder.get('started')})"
    return InputError(
        f"--workdir={workdir}: {who} trains in it; wait for it or stop it, or give another "
        f"--workdir{remedy}"
    )


class _FileLock:
    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    @classmethod
    def taken(cls, workdir: Path, make: bool) -> "_FileLock | None":
        path = workdir / FILE
        while True:
            try:
                if make:
                    workdir.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if make else 0), 0o666)
            except OSError as error:
                if isinstance(error, FileNotFoundError) and not make:
                    return None
                raise InputError(
                    f"--workdir={workdir} cannot be written ({error.strerror}); choose another "
                    "folder"
                ) from None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _parsed(os.pread(descriptor, 4096, 0))
                os.close(descriptor)
                if _is_alive(holder) is False:  # the next one has not signed yet
                    holder = {}
                elsewhere = holder.get("host", socket.gethostname()) != socket.gethostname()
                remedy = f"; if that host is gone, remove {path}" if elsewhere else ""
                raise _held(workdir, holder, remedy) from None
            except OSError as error:
                print(
                    f"{workdir}: no locks on this file system ({explain(error)}); let no two "
                    "trainings write here",
                    file=sys.stderr,
                )
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    break
            os.close(descriptor)  # somebody removed the file meanwhile
        return cls(descriptor)

    def sign(self) -> None:
        """Write the name of this process: not before a run is written, so that a refused command
        changes nothing."""
        with contextlib.suppress(OSError):  # a full disk: the name is for the message alone
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{json.dumps(_this_process())}\n".encode(), 0)

    def release(self) -> None:
        os.close(self._descriptor)


class _ObjectLock:
    def __init__(self, blob: Any, content: bytes):
        self._blob, self._content, self._generation = blob, content, blob.generation
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="training lock", daemon=True)
        self._thread.start()

    @classmethod
    def taken(cls, workdir: Path, make: bool) -> "_ObjectLock | None":
        blob, content = _blob(workdir), f"{json.dumps(_this_process())}\n".encode()
        generation, watched_until = 0, None
        while True:
            found = _read(blob)
            if found is None:
                if not make:
                    return None
                generation = 0
            elif (alive := _is_alive(found)) is not None:
                if alive:
                    raise _held(workdir, found)
                generation = blob.generation
            elif watched_until is None or blob.generation == generation:
                if watched_until is None:
                    generation, watched_until = blob.generation, time.monotonic() + LOST_SECONDS
                    print(
                        f"waiting      up to {LOST_SECONDS:.0f} s: process {found.get('process')} "
                        f"on {found.get('host')} trains in {workdir}, or was lost",
                        flush=True,
                    )
                if time.monotonic() < watched_until:
                    time.sleep(min(1.0, RENEWAL_SECONDS / 4))
                    continue
            else:
                raise _held(workdir, found)
            if _write(blob, content, generation):
                return cls(blob, content)
            raise _held(workdir, _read(blob) or {})

    def _renew(self) -> None:
        while not self._ended.wait(RENEWAL_SECONDS):
            try:
                if not _write(self._blob, self._content, self._generation):
                    break
                self._generation = self._blob.generation
            except Exception:  # the network; the next renewal tells whose the lock is
                continue
        if not self._ended.is_set():
            os.write(2, b"error: another process took over this training; this one ends unsaved\n")
            os._exit(EXIT_FAILED)

    def release(self) -> None:
        self._ended.set()
        self._thread.join(timeout=10)
        with contextlib.suppress(Exception):  # it is lost in a minute, too
            self._blob.delete(if_generation_match=self._generation)


def _blob(workdir: Path) -> Any:
    from google.cloud import storage

    bucket, _, folder = str(workdir / FILE).removeprefix("gs://").partition("/")
    return storage.Client().bucket(bucket).blob(folder)


def _read(blob: Any) -> dict[str, Any] | None:
    """The holder of a lock object, whose generation is then in `blob`; None if there is none."""
    from google.api_core.exceptions import NotFound

    with contextlib.suppress(NotFound):
        content = blob.download_as_bytes()
        blob.reload()
        return _parsed(content)
    return None


def _write(blob: Any, content: bytes, generation: int) -> bool:
    """Replace one generation of a lock object (0: none); False if another one is there."""
    from google.api_core.exceptions import PreconditionFailed

    try:
        blob.upload_from_string(content, if_generation_match=generation)
    except PreconditionFailed:
        # A write that was answered too late and tried again is its own competitor.
        found = blob.download_as_bytes() if blob.exists() else b""
        if found != content:
            return False
        blob.reload()
    return True
