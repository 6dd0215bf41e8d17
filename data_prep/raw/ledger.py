"""What became of each scan of a folder that grows: a file of one JSON line a scan, in an audit
directory, since it holds the names of files.

    kind      `taken`: scans were finished, or refused; `late`: files came after that; `not_image`;
              `again`: what was written of this exam before does not count any more
    exam      private name of an exam (with all reconstructions: of a series)
    volumes   pseudonyms of the finished volumes
    refused   [pseudonym, reason, detail] of each refused series
    files     [path, member, bytes], relative to the folder that grows

A line is appended after its results are written whole, so that a kill between the two repeats one
scan and loses none.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from data_prep.scan.archives import Source
from data_prep.system.errors import InputError


class Ledger:
    """The lines of the file, and what they say together.

    Attributes:
      volumes: exam -> pseudonyms of its finished volumes; empty where all were refused.
      refused: exam -> its refused series.
      late: exams of which files came too late, which are not in the results.
      synthetic: whether a finished scan was of a phantom.
    """

    def __init__(self, path: Path):
        """Open the file; the rest of a line that a kill cut off is removed.

        Raises:
          InputError: a line is damaged.
        """
        self.path = path
        self.volumes: dict[str, list[str]] = {}
        self.refused: dict[str, list[tuple[str, str, str]]] = {}
        self.late: set[str] = set()
        self.synthetic = False
        self._files: dict[tuple[str, str], tuple[int, str]] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._apply(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(
                    f"{path} is damaged in line {number}; remove that line, and its scan is done "
                    "again"
                ) from None

    def knows(self, source: Source) -> bool:
        """Whether a file of this name and size has its line."""
        size, _ = self._files.get((source.path, source.member), (-1, ""))
        return size == source.size

    def add(
        self,
        kind: str,
        files: Iterable[Source],
        exam: str = "",
        *,
        volumes: Sequence[str] = (),
        refused: Sequence[tuple[str, str, str]] = (),
        synthetic: bool = False,
    ) -> None:
        """Append a line; it is on the disk when this returns.

        Raises:
          OSError: the disk is full, or cannot be written.
        """
        line = {"kind": kind, "exam": exam, "volumes": list(volumes), "refused": list(refused)}
        line |= {"synthetic": synthetic, "files": list(files)}
        with open(self.path, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._apply(line)

    def reopen(self, has_result: Callable[[str], bool], exams: Iterable[str]) -> set[str]:
        """Forget those of some exams that lack a result, and that were not refused as a whole.

        Returns:
          Paths of their files, which count as new.
        """
        lost = {
            exam
            for exam in exams
            if self.volumes.get(exam) and not all(map(has_result, self.volumes[exam]))
        }
        return self.forget(lost)

    def forget(self, exams: Iterable[str]) -> set[str]:
        """Forget what became of exams; the paths of their files."""
        exams = set(exams)
        if not exams:  # at each look
            return set()
        paths = {path for (path, _), (_, exam) in self._files.items() if exam in exams and exam}
        for exam in sorted(exams):
            self.add("again", (), exam)
        return paths

    def _apply(self, line: dict[str, Any]) -> None:
        kind, exam = line["kind"], line["exam"]
        if kind == "again":
            self.volumes.pop(exam, None)
            self.refused.pop(exam, None)
            self.late.discard(exam)
            self._files = {name: value for name, value in self._files.items() if value[1] != exam}
            return
        if kind == "taken":
            self.volumes[exam] = line["volumes"]
            self.refused[exam] = [
                (name, reason, detail) for name, reason, detail in line["refused"]
            ]
            self.synthetic |= line["synthetic"]
        if kind == "late":
            self.late.add(exam)
        for path, member, size in line["files"]:
            self._files[path, member] = (size, exam)
