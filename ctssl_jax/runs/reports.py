"""Where a run's numbers go: lines on the screen, `metrics.jsonl`, TensorBoard event files. Only
process 0 writes."""

import json
import sys
import tempfile
import time
from pathlib import Path

import jax

from data_prep.system.errors import InputError
from data_prep.system.files import write_text

_SECONDS_BETWEEN_FLUSHES = 10  # of the event file
_SECONDS_BETWEEN_UPLOADS = 60  # of both files, which an object store takes as a whole


def say(line: str) -> None:
    """Print a line once a run, whatever the number of processes."""
    if jax.process_index() == 0:
        print(line, flush=True)


def duration(seconds: float) -> str:
    """Seconds as `1:23:45` or `4:05`."""
    hours, rest = divmod(int(seconds + 0.5), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Reports:
    """`metrics.jsonl` and `tensorboard/` of a run directory.

    A run that resumes at `start_step` first drops the later lines of its interrupted attempt. One
    that starts from scratch (-1) drops all lines. `validates_again`: the validation of the step
    itself was not complete, so its line is dropped, too.

    Objects of `gs://` cannot grow. There both files are written on this machine, and uploaded as a
    whole at most once a minute, before each checkpoint and after each validation.
    """

    def __init__(self, workdir: Path, start_step: int, *, validates_again: bool = False):
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self._workdir = workdir
        path = workdir / "metrics.jsonl"
        kept = []
        for line in _complete_lines(path):
            report = _parsed(path, line)
            last = start_step - (validates_again and report["kind"] == "validation")
            if report["step"] <= last:
                kept.append(line)
        write_text(path, "".join(kept))
        self._scratch = None
        if not isinstance(workdir, Path):
            self._scratch = tempfile.TemporaryDirectory()
            path = Path(self._scratch.name) / "metrics.jsonl"
            path.write_text("".join(kept))
        self._file = open(path, "a")
        self._events = _EventFile(path.parent / "tensorboard", start_step + 1)
        self._uploaded = time.monotonic()

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Add one report, e.g. kind `train` or `validation`.

        Raises:
          OSError: it cannot be written.
        """
        if not self._writes:
            return
        try:
            self._file.write(
                json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **values})
                + "\n"
            )
            self._file.flush()
            self._events.add({f"{kind}/{name}": value for name, value in values.items()}, step)
        except OSError as error:
            error.filename = str(self._workdir)  # a full disk does not say it
            raise
        if kind == "validation" or time.monotonic() - self._uploaded > _SECONDS_BETWEEN_UPLOADS:
            self.flush()

    def flush(self) -> None:
        """Bring to `gs://` what was written. A run resumes at a checkpoint, so its lines are there
        before it is."""
        if self._writes and self._scratch is not None:
            self._events.flush()
            self._upload()

    def _upload(self) -> None:
        if self._scratch is None:
            return
        folder = Path(self._scratch.name)
        for path in (folder / "metrics.jsonl", *(folder / "tensorboard").iterdir()):
            (self._workdir / path.relative_to(folder)).write_bytes(path.read_bytes())
        self._uploaded = time.monotonic()

    def close(self) -> None:
        """Flush and close the files."""
        if not self._writes:
            return
        try:
            self._file.close()
            self._events.close()
        except OSError as error:
            error.filename = str(self._workdir)
            raise
        self._upload()


class _EventFile:
    """A TensorBoard event file that the run itself writes.

    tensorboardX's `SummaryWriter` writes in a thread, which ends when the disk is full or the clock
    is set back by a month. The run would then wait for it for ever.
    """

    def __init__(self, folder: Path, purge_step: int):
        # tensorboardX would import torch, which takes seconds
        hides_torch = sys.modules.setdefault("torch", None) is None
        try:
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
        finally:
            if hides_torch:
                del sys.modules["torch"]

        folder.mkdir(exist_ok=True)
        self._event, self._scalar = Event, summary.scalar
        self._writer = EventsWriter(str(folder / "events"))
        # TensorBoard drops the points that earlier files have from this step on
        restart = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(step=purge_step, session_log=restart, wall_time=time.time()))
        self._flushed = time.monotonic()

    def add(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            summary = self._scalar(name, value)
            self._writer.write_event(self._event(step=step, summary=summary, wall_time=time.time()))
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def _complete_lines(path: Path) -> list[str]:
    """Lines of a JSON-lines file, without a last line that was cut by a kill."""
    if not path.exists():
        return []
    return [
        line
        for line in path.read_bytes().decode(errors="replace").splitlines(keepends=True)
        if line.endswith("\n")
    ]


def _parsed(path: Path, line: str) -> dict:
    try:
        report = json.loads(line)
        return {"kind": report["kind"], "step": report["step"] + 0, **report}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged at {line[:40]!r}; remove that line") from None


def read_reports(workdir: Path, kind: str) -> list[dict]:
    """The reports of one kind, in order."""
    path = workdir / "metrics.jsonl"
    lines = (_parsed(path, line) for line in _complete_lines(path))
    return [line for line in lines if line["kind"] == kind]
