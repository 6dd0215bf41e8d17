"""Progress of a conversion in one place, wherever the exams are converted."""

import collections
import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_prep.pipeline.notes import read_note
from data_prep.system.workers import Progress

_SECONDS_BETWEEN_LOOKS = 1.0
_SHARE_OF_LOOKING = 20  # looking takes at most one part in so many of the time


class ExamProgress:
    """Slices with their rate and the time left, exams, and the refused ones by reason. Use as a
    context manager."""

    def __init__(self, num_exams: int, num_slices: int):
        self._num_exams, self._num_done = num_exams, 0
        self._refused: collections.Counter[str] = collections.Counter()
        self._progress = Progress("converting", "slices", num_slices, self._exams)

    def advance(self, num_slices: int, refusal: str, *, already_there: bool = False) -> None:
        """One exam is done; `refusal` is that of its note."""
        self._num_done += 1
        if refusal:
            self._refused[refusal] += 1
        self._progress.advance(num_slices, already_there=already_there)

    def _exams(self) -> str:
        text = f"{self._num_done} of {self._num_exams} exams"
        reasons = ", ".join(f"{number} {reason}" for reason, number in self._refused.most_common())
        return f"{text}, refused: {reasons}" if reasons else text

    @contextlib.contextmanager
    def following(self, notes_dir: Path, expected: Mapping[str, int]) -> Iterator[dict[str, int]]:
        """Moves on with the notes that appear in a directory while the block works.

        Args:
            notes_dir: of the notes.
            expected: the slices of each exam of the block, by the key of its note.

        Yields:
            The exams of `expected` that have no new note: after the block, those left out.
        """
        missing, before = dict(expected), _inodes(notes_dir, expected)
        stop = threading.Event()

        def look() -> None:
            for key, inode in _inodes(notes_dir, missing).items():
                if inode != before.get(key):
                    refusal = read_note(notes_dir / f"{key}.json").refusal
                    self.advance(missing.pop(key), refusal)

        def look_again_and_again() -> None:
            seconds = _SECONDS_BETWEEN_LOOKS
            while not stop.wait(seconds):
                started = time.monotonic()
                with contextlib.suppress(OSError):
                    look()
                spent = time.monotonic() - started
                seconds = max(_SECONDS_BETWEEN_LOOKS, _SHARE_OF_LOOKING * spent)

        thread = threading.Thread(target=look_again_and_again, daemon=True)
        thread.start()
        try:
            yield missing
        finally:
            stop.set()
            thread.join()
            look()

    def __enter__(self) -> "ExamProgress":
        self._progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(*error)


def _inodes(directory: Path, keys: Mapping[str, int]) -> dict[str, int]:
    """The notes of these keys that are there, and what tells an old one from its successor."""
    with os.scandir(directory) as entries:
        found = ((entry.name.removesuffix(".json"), entry) for entry in entries)
        return {key: entry.inode() for key, entry in found if key in keys}
