"""Scans of a folder that grows: each exam once, when all of its files are there.

    arrivals = Arrivals(folder, read, rules, key, ledger, has_result, settle_s=60)
    while True:
        found = arrivals.look()
        for exam in found.ready:        # its files have not changed for `settle_s` seconds
            ...                         # write its results, whole or not at all
            arrivals.finish(exam, volumes, refused)
        time.sleep(5)

A folder does not say when a series is complete: slices come singly, in any order, from a sender
that may pause. An exam is taken when none of its files has come or changed for `settle_s` seconds,
by this machine's clock (a share's may differ, and copies keep old times). A file beside them that
is no image yet, as half a file is, holds the exam up for another `settle_s` at most. The folder is
looked through again and again, since network shares do not tell of new files.
"""

import collections
import dataclasses
import os
import posixpath
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.privacy.pseudonyms import private_digest
from data_prep.raw.ledger import Ledger
from data_prep.raw.scans import read_all_headers
from data_prep.scan.archives import Source, Unreadable, list_file, walk_files
from data_prep.scan.headers import Header, NotAnImage
from data_prep.scan.loading import ReadHeader, plan_exams
from data_prep.scan.reasons import FAILED_FOR_NOW
from data_prep.scan.rules import Rules
from data_prep.scan.series import Rejection, SeriesCandidate
from data_prep.system.errors import InputError

TRIES = 3  # of an exam that cannot be read for now; the next start tries again
_NOT_FINAL = (FAILED_FOR_NOW, "no_metadata")  # such files are tried again by the next start


class Exam(NamedTuple):
    """An exam (with all reconstructions: a series) whose files are there.

    name: private.
    volumes: the candidates of each volume, the preferred one first; none where all are refused.
    rejections: series that are refused by their headers.
    sources: all files.
    """

    name: str
    volumes: list[list[SeriesCandidate]]
    rejections: list[Rejection]
    sources: list[Source]


class Late(NamedTuple):
    """Files of a finished exam that came or changed afterwards."""

    volumes: list[str]
    sources: list[Source]


class Found(NamedTuple):
    """What one look has found.

    ready: exams to be taken now, those first that have waited longest.
    late: named once.
    not_images: files without an image that have stopped changing; named once.
    waiting: number of files that wait for others.
    changed: a file came, changed or went since the last look.
    """

    ready: list[Exam]
    late: list[Late]
    not_images: list[NotAnImage | Unreadable]
    waiting: int
    changed: bool


@dataclasses.dataclass
class _File:
    """A file as it was when it was last looked at; no entries once it is dealt with."""

    stamp: tuple[int, int]  # bytes, time of change
    since: float  # when that was first seen
    entries: list[Header | NotAnImage | Unreadable]

    @property
    def failed(self) -> bool:
        return any(
            isinstance(entry, NotAnImage) and entry.reason == FAILED_FOR_NOW
            for entry in self.entries
        )


class Arrivals:
    """A folder under watch. In memory: 2 KB for each slice that waits, and less for each other
    file."""

    def __init__(
        self,
        folder: Path,
        read: ReadHeader,
        rules: Rules,
        key: bytes,
        ledger: Ledger,
        has_result: Callable[[str], bool],
        *,
        settle_s: float,
        num_workers: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Begin to watch.

        Args:
          folder: holds DICOM or NIfTI files, in any tree.
          read: `data_prep.raw.scans.header_reader_of(folder, ..., grows=True)`.
          rules: which series are taken.
          key: of the pseudonyms.
          ledger: what became of the scans of earlier runs.
          has_result: whether there is a result of this pseudonym; finished scans without one are
            done again.
          settle_s: seconds without a change after which an exam is complete.
          num_workers: processes that read headers where there are many.
          clock: seconds.

        Raises:
          InputError: not a folder.
        """
        if not folder.is_dir():
            raise InputError(
                f"--input={folder} is not a folder; --watch is for a folder that grows"
            )
        self._folder, self._rules, self.key, self._ledger = folder, rules, key, ledger
        self._read, self._has_result = read, has_result
        self._settle_s, self._num_workers, self._clock = settle_s, num_workers, clock
        self._files: dict[str, _File] = {}
        self._tries: collections.Counter[str] = collections.Counter()
        self._exams: list[Exam] = []
        self._not_images: list[NotAnImage | Unreadable] = []
        ledger.reopen(has_result, list(ledger.volumes))

    def look(self) -> Found:
        """Look through the folder.

        Raises:
          OSError: the folder went away.
        """
        now = self._clock()
        self._drop(self._ledger.reopen(self._has_result, list(self._ledger.late)))
        changed = self._read_changes(now)
        if changed:
            self._plan()
        ready, late, reopened = [], [], []
        for exam in self._quiet_exams(now):
            finished = self._ledger.volumes.get(exam.name)
            if finished is None:
                ready.append(exam)
            elif finished:
                self._ledger.add("late", exam.sources, exam.name)
                self._deal_with(exam.sources)
                late.append(Late(finished, exam.sources))
            else:  # nothing was made of it: now there may be enough slices
                reopened.append(exam.name)
        found = Found(ready, late, self._quiet_others(now), self._num_waiting(), changed)
        if reopened:
            self._drop(self._ledger.forget(reopened))
        return found

    def finish(
        self, exam: Exam, volumes: Sequence[str], refused: Sequence[tuple[str, str, str]]
    ) -> None:
        """Note that the results of an exam are written.

        Args:
          exam: as `look` gave it.
          volumes: pseudonyms of its finished volumes.
          refused: pseudonym, reason and detail of its refused series.
        """
        synthetic = any(
            header.quality_control_subject for one in exam.volumes for header in one[0].headers
        )
        self._ledger.add(
            "taken", exam.sources, exam.name, volumes=volumes, refused=refused, synthetic=synthetic
        )
        self._deal_with(exam.sources)

    def try_again(self, exam: Exam) -> bool:
        """An exam could not be read for now: it becomes ready again after another `settle_s`, but
        not more than `TRIES` times, unless a file of it changes.

        Returns:
          Whether it will be tried again.
        """
        self._tries[exam.name] += 1
        if self._tries[exam.name] >= TRIES:
            self._deal_with(exam.sources)
            return False
        for path in {source.path for source in exam.sources} & self._files.keys():
            self._files[path].since = self._clock()
        return True

    def _read_changes(self, now: float) -> bool:
        """Read the headers of files that are new or changed."""
        if not self._folder.is_dir():
            raise OSError(f"{self._folder}: the folder went away; run again to continue")
        before, self._files = self._files, {}
        entries: list[Source | Unreadable] = []
        changed = False
        for found in walk_files(self._folder):
            if isinstance(found, Unreadable):
                source, stamp = found.source, (0, 0)
            else:
                source, status = found
                stamp = (status.st_size, status.st_mtime_ns)
            known = before.pop(source.path, None)
            if known and known.stamp == stamp and not known.failed:
                self._files[source.path] = known
                continue
            same = known is not None and known.stamp == stamp
            changed |= not same
            self._files[source.path] = _File(stamp, known.since if known and same else now, [])
            listed = [found] if isinstance(found, Unreadable) else self._listed(source)
            entries += [one for one in listed if not self._ledger.knows(_source(one))]
        for entry in read_all_headers(self._folder, entries, self._read, self._num_workers):
            self._files[entry.source.path].entries.append(entry)
        return changed or bool(before) or bool(entries)

    def _listed(self, source: Source) -> list[Source | Unreadable]:
        try:
            return list(list_file(os.path.join(self._folder, source.path), source))
        except OSError as error:
            return [Unreadable(source, FAILED_FOR_NOW, error.strerror or str(error))]

    def _plan(self) -> None:
        """Sort the files that wait into exams."""
        entries = [entry for file in self._files.values() for entry in file.entries]
        planned = plan_exams(entries, self._rules)
        volumes, rejections = collections.defaultdict(list), collections.defaultdict(list)
        for candidates in planned.exams:
            volumes[self._name(candidates[0].headers[0], candidates[0].series_key)].append(
                candidates
            )
        for rejection in planned.rejections:
            rejections[self._name(rejection.headers[0], rejection.series_key)].append(rejection)
        self._exams = []
        for name in sorted({*volumes, *rejections}):
            candidates = [one for exam in volumes[name] for one in exam]
            headers = [
                header
                for one in candidates + rejections[name]
                for header in (one.all_headers if isinstance(one, SeriesCandidate) else one.headers)
            ]
            sources = sorted({header.source for header in headers})
            self._exams.append(Exam(name, volumes[name], rejections[name], sources))
        self._not_images = planned.not_images

    def _name(self, header: Header, series_key: str) -> str:
        """The private name of the exam or, where all reconstructions are taken, of the series."""
        parts = [header.patient_key, header.study_instance_uid or series_key]
        if self._rules.reconstructions == "all":
            parts.append(header.series_instance_uid or series_key)
        return private_digest(self.key, "arrival", *parts)

    def _quiet_exams(self, now: float) -> list[Exam]:
        held: dict[str, float] = {}  # folder -> when its youngest file without an image changed
        for entry in self._not_images:
            place = posixpath.dirname(entry.source.path)
            held[place] = max(held.get(place, 0.0), self._since([entry.source]))
        quiet = []
        for exam in self._exams:
            since = self._since(exam.sources)
            beside = [held.get(posixpath.dirname(source.path), 0.0) for source in exam.sources]
            until = max(since, min(max(beside), since + self._settle_s))
            if now - until >= self._settle_s:
                quiet.append((since, exam))
        return [exam for _, exam in sorted(quiet, key=lambda one: (one[0], one[1].name))]

    def _quiet_others(self, now: float) -> list[NotAnImage | Unreadable]:
        """Files without an image that have stopped changing."""
        quiet = [
            entry
            for entry in self._not_images
            if now - self._since([entry.source]) >= self._settle_s
        ]
        for entry in quiet:
            if entry.reason not in _NOT_FINAL:
                self._ledger.add("not_image", [entry.source])
        self._deal_with([entry.source for entry in quiet])
        return quiet

    def _since(self, sources: Iterable[Source]) -> float:
        return max(self._files[source.path].since for source in sources)

    def _num_waiting(self) -> int:
        return sum(bool(file.entries) for file in self._files.values())

    def _deal_with(self, sources: Iterable[Source]) -> None:
        """Let go what is known of the images in these files."""
        done = set(sources)
        for path in {source.path for source in done} & self._files.keys():
            file = self._files[path]
            file.entries = [entry for entry in file.entries if _source(entry) not in done]
        self._exams = [exam for exam in self._exams if done.isdisjoint(exam.sources)]
        self._not_images = [one for one in self._not_images if one.source not in done]

    def _drop(self, paths: Iterable[str]) -> None:
        """Let these files count as new."""
        for path in paths:
            self._files.pop(path, None)


def _source(entry: Source | Unreadable | Header | NotAnImage) -> Source:
    return entry if isinstance(entry, Source) else entry.source
