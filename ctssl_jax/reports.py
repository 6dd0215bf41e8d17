"""Where a run's numbers go: lines on the screen, `metrics.jsonl`, TensorBoard event files. Only process 0 writes."""

import json
import time
from pathlib import Path

import jax

from ctssl_jax.checkpoint import write_text
from ctssl_jax.command_line import InputError


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

    A run that goes on at `start_step` first drops what an interrupted attempt wrote beyond it; one that starts from
    scratch (-1) drops everything.
    """

    def __init__(self, workdir: Path, start_step: int):
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        kept = [line for line in _complete_lines(path) if _parsed(path, line)["step"] <= start_step]
        write_text(path, "".join(kept))
        self._file = open(path, "a")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1, flush_secs=10)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Add one report, e.g. kind `train` or `validation`."""
        if not self._writes:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush everything."""
        if self._writes:
            self._file.close()
            self._events.close()


def _complete_lines(path: Path) -> list[str]:
    """Lines of a JSON-lines file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    return [line for line in path.read_text(errors="replace").splitlines(keepends=True) if line.endswith("\n")]


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
