"""What tasks leave of the entries of a manifest, and how one preparation gathers it.

A task fetches an entry, reads its headers, and converts **every** acceptable stack, each as if it
were an exam by itself, since only the whole archive tells which reconstruction is preferred and who
is the same patient. It leaves staged volumes with their notes, as any preparation does, and last
one file: the headers, or the reason why the entry failed.

The gathering preparation plans from all headers, and makes the note of each exam of the notes of
its stacks. A stack whose name or patient turns out otherwise is converted again from its files.
"""

import collections
import dataclasses
import functools
import hashlib
import pickle
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from data_prep.pipeline import convert
from data_prep.pipeline.downloads import Downloads, FetchFailed, fetched, list_entry
from data_prep.pipeline.manifest import Entry, Manifest, in_words
from data_prep.pipeline.notes import (
    Conversion,
    ExamNote,
    exam_key,
    is_converted,
    note_path,
    read_note,
    records_path,
    write_note,
)
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.plan import header_version
from data_prep.privacy.pseudonyms import (
    Rejected,
    private_digest,
    rejected,
    series_pseudonym,
    volume_id,
)
from data_prep.scan.headers import Header, NotAnImage
from data_prep.scan.loading import (
    SOURCES_PER_TASK,
    ReadHeader,
    chunks,
    plan_exams,
    read_headers,
    read_headers_one_by_one,
    source_of,
)
from data_prep.scan.packed_files import Source, Unreadable
from data_prep.scan.reasons import FAILED_FOR_NOW
from data_prep.scan.series import SeriesCandidate
from data_prep.system.errors import InputError, RunFailed
from data_prep.system.files import publish, write_file
from data_prep.system.workers import Progress, WorkerDied, WorkerPool

_SHOWN = 3  # series that a message names


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of an entry."""

    version: str  # of the options and the program
    failed: str = ""  # why there are no files; names lines only
    again: bool = False  # something could not be read for now, so that the next task tries again
    num_files: int = 0
    digest: str = ""  # of names and sizes of the files
    num_volumes: int = 0
    rejected: Mapping[str, int] = dataclasses.field(default_factory=dict)  # stacks by reason


@dataclasses.dataclass(frozen=True)
class Staging:
    """Where tasks leave what they made of the entries."""

    folder: Path  # private: it holds headers
    version: str  # of the options and the program, on which it depends besides the files
    key: bytes = dataclasses.field(repr=False)  # of the pseudonyms

    @staticmethod
    def of(directories: Directories, options: Options, read: ReadHeader, key: bytes) -> "Staging":
        version = f"{options.conversion_digest()} {header_version(read)}"
        return Staging(directories.staged_entries_dir, version, key)

    def name(self, entry: Entry) -> str:
        """The name of what is staged of an entry."""
        return private_digest(self.key, "entry", entry.facts)

    def path(self, entry: Entry) -> Path:
        return self.folder / self.name(entry)

    def outcome(self, entry: Entry) -> Outcome | None:
        """What a task with the same options left of an entry; None: nothing."""
        try:
            with open(self.path(entry), "rb") as file:
                outcome = pickle.load(file)
        except FileNotFoundError:
            return None
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError):
            return None  # of another version of the program, or damaged
        return outcome if outcome.version == self.version else None

    def is_done(self, entry: Entry) -> bool:
        """Whether a task need not take the entry."""
        outcome = self.outcome(entry)
        return outcome is not None and not (outcome.failed or outcome.again)


@dataclasses.dataclass(frozen=True)
class Job:
    """The inputs of the tasks of a manifest."""

    staging: Staging
    conversion: Conversion  # its `input_dir` is of no use
    read: ReadHeader
    downloads: Downloads


def read_staged(path: Path) -> list[Header | NotAnImage | Unreadable]:
    """The headers of an entry.

    Raises:
        RunFailed: the file is damaged.
    """
    with open(path, "rb") as file:
        pickle.load(file)
        digest, content = file.read(32), file.read()
    if hashlib.sha256(content).digest() != digest:
        raise RunFailed(f"{path}: is damaged; remove it and run the tasks again")
    return pickle.loads(content)


def _write_staged(
    path: Path, outcome: Outcome, headers: Sequence[Header | NotAnImage | Unreadable]
) -> None:
    content = pickle.dumps(list(headers), pickle.HIGHEST_PROTOCOL)
    head = pickle.dumps(outcome, pickle.HIGHEST_PROTOCOL)
    write_file(path, head + hashlib.sha256(content).digest() + content)


# ---- a task --------------------------------------------------------------------------------------


def stage_entry(job: Job, entry: Entry, pool: WorkerPool | None = None) -> Outcome:
    """Fetches an entry and converts its stacks.

    With `pool`, each file and each stack is read in a process of its own, so that one that kills
    its process costs no other.

    Raises:
        OSError: the outcome cannot be written.
    """
    try:
        with fetched(entry, job.staging.name(entry), job.downloads) as files:
            outcome, headers = _convert_all(job, entry, files, pool)
    except FetchFailed as error:
        outcome, headers = Outcome(job.staging.version, failed=str(error)), []
    _write_staged(job.staging.path(entry), outcome, headers)
    return outcome


def _convert_all(
    job: Job, entry: Entry, files: Path, pool: WorkerPool | None
) -> tuple[Outcome, list[Header | NotAnImage | Unreadable]]:
    headers: list[Header | NotAnImage | Unreadable] = []
    for chunk in chunks(list_entry(entry, files), SOURCES_PER_TASK):
        reading = read_headers if pool is None else read_headers_one_by_one
        headers += reading(files, chunk, job.read)
    plan = plan_exams(headers, job.conversion.rules)
    reasons = collections.Counter(rejection.reason for rejection in plan.rejections)
    failed = [
        one for one in headers if isinstance(one, NotAnImage) and one.reason == FAILED_FOR_NOW
    ]
    num_volumes = 0
    for candidate in (candidate for exam in plan.exams for candidate in exam):
        note = _convert(dataclasses.replace(job.conversion, input_dir=files), candidate, pool)
        num_volumes += note.volume is not None
        reasons.update(row.reason for row in note.rejected)
    sources = sorted(map(source_of, headers))
    digest = hashlib.sha256(repr(sources).encode("utf-8", "backslashreplace")).hexdigest()
    outcome = Outcome(
        job.staging.version,
        again=bool(failed) or FAILED_FOR_NOW in reasons,
        num_files=len(sources),
        digest=digest,
        num_volumes=num_volumes,
        rejected=dict(sorted(reasons.items())),
    )
    return outcome, headers


def _convert(
    conversion: Conversion, candidate: SeriesCandidate, pool: WorkerPool | None
) -> ExamNote:
    exam = [candidate]
    if not is_converted(conversion, exam):
        if pool is None:
            convert.convert_exam(conversion, exam)
        else:
            for _, result in pool.run(convert.convert_exam, [(conversion, exam)]):
                if isinstance(result, WorkerDied):
                    write_note(conversion, convert.note_of_crash(conversion, exam))
    return read_note(note_path(conversion, exam_key(conversion, exam)))


def stage_entries(
    job: Job, entries: Sequence[Entry], pool: WorkerPool
) -> Iterator[tuple[Entry, Outcome]]:
    """`stage_entry` of entries on the workers of a pool. An entry that kills its worker is taken
    again in pieces."""
    for (_, entry), result in pool.run(stage_entry, ((job, entry) for entry in entries)):
        if isinstance(result, WorkerDied):
            with WorkerPool(1) as alone:
                result = stage_entry(job, entry, alone)
        yield entry, result


# ---- the gathering preparation -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gathering:
    """The entries of a manifest, and what tasks left of them.

    present: entries with files.
    missing: entries that no task has taken.
    failed: entries of which the last task had no files, with the reason.
    num_files, num_volumes: of all entries together; a series counts if it can be a volume.
    rejected: stacks by reason.
    digest: of names and sizes of all files, whatever the order of the manifest.
    """

    manifest: Manifest
    staging: Staging
    read: ReadHeader
    downloads: Downloads
    present: Sequence[Entry]
    missing: Sequence[Entry]
    failed: Sequence[tuple[Entry, str]]
    num_files: int
    num_volumes: int
    rejected: Mapping[str, int]
    digest: str

    @staticmethod
    def of(
        manifest: Manifest, staging: Staging, read: ReadHeader, downloads: Downloads
    ) -> "Gathering":
        present, missing, failed, digests = [], [], [], []
        num_files = num_volumes = 0
        rejected: collections.Counter[str] = collections.Counter()
        with Progress("looking", "entries", len(manifest.entries)) as progress:
            for entry in manifest.entries:
                outcome = staging.outcome(entry)
                if outcome is None:
                    missing.append(entry)
                elif outcome.failed:
                    failed.append((entry, outcome.failed))
                else:
                    present.append(entry)
                    digests.append(outcome.digest)
                    num_files += outcome.num_files
                    num_volumes += outcome.num_volumes
                    rejected.update(outcome.rejected)
                progress.advance(1)
        digests.sort()
        return Gathering(
            manifest,
            staging,
            read,
            downloads,
            present,
            missing,
            failed,
            num_files,
            num_volumes,
            rejected,
            hashlib.sha256(repr(digests).encode()).hexdigest(),
        )

    def listed(self) -> tuple[int, str]:
        """Number of files and a digest of their names and sizes, as `plan.list_archive`.

        Raises:
            InputError: there are no files.
        """
        if not self.num_files:
            raise InputError(
                f"--manifest={self.manifest.path}: no task left a file; run the tasks again"
            )
        return self.num_files, self.digest

    def staged_files(self) -> list[Path]:
        return [self.staging.path(entry) for entry in self.present]

    def refuse_spread_series(self, buckets: Iterable[Iterable[Header]], key: bytes) -> None:
        """Raises InputError if files of one series come from several entries: no task saw it whole.

        Args:
            buckets: all images, those of a study in one bucket.
            key: of the pseudonyms.
        """
        spread: dict[tuple[str, ...], set[int]] = {}
        for headers in buckets:
            entries: dict[tuple[str, ...], set[int]] = collections.defaultdict(set)
            for header in headers:
                if header.series_instance_uid:
                    name = (
                        header.patient_key,
                        header.study_instance_uid,
                        header.series_instance_uid,
                    )
                    entries[name].add(self.entry_of(header.source).number)
            spread |= {name: numbers for name, numbers in entries.items() if len(numbers) > 1}
        if not spread:
            return
        shown = []
        for name, numbers in sorted(spread.items(), key=lambda of: min(of[1]))[:_SHOWN]:
            of_entries = [self.manifest.entries[number].places for number in sorted(numbers)]
            lines = in_words(sorted(places[0].line for places in of_entries))
            shown.append(f"series {series_pseudonym(key, *name)} ({lines})")
        more = f" and {len(spread) - _SHOWN} more" * (len(spread) > _SHOWN)
        raise InputError(
            f"--manifest={self.manifest.path}: {', '.join(shown)}{more} lie in several entries of "
            "the manifest; give a .csv manifest in which their lines have one name in the column "
            "series, and run the tasks again"
        )

    def entry_of(self, source: Source) -> Entry:
        """The entry of a file."""
        path = source.path
        while path not in self._entry_of_path and path:
            path = posixpath.dirname(path)
        return self.manifest.entries[self._entry_of_path[path]]

    @functools.cached_property
    def _entry_of_path(self) -> dict[str, int]:
        return {place.path: one.number for one in self.manifest.entries for place in one.places}

    def gather(self, conversion: Conversion, exam: list[SeriesCandidate]) -> list[SeriesCandidate]:
        """Writes the note of an exam from the notes of its stacks, in the order of preference, and
        names its staged volume by it.

        Returns:
            Stacks that no task converted; while there are any, nothing is written.
        """
        notes: list[ExamNote] = []
        for candidate in exam:
            note = _note_alone(conversion, candidate, exam)
            if note is None:
                return [candidate]
            notes.append(note)
            if note.volume is not None or note.failed_for_now:
                break
        if len(exam) > 1:
            _write_exam(conversion, exam, notes)
        return []

    def convert_again(
        self, conversion: Conversion, exams: Sequence[list[SeriesCandidate]], pool: WorkerPool
    ) -> None:
        """Converts stacks (each an exam by itself) that the tasks saw under another name.

        Raises:
            RunFailed: their files cannot be fetched.
        """
        by_entry: dict[int, list[SeriesCandidate]] = collections.defaultdict(list)
        for (candidate,) in exams:
            entry = self.entry_of(candidate.headers[0].source)
            by_entry[entry.number].append(candidate)
        job = Job(self.staging, conversion, self.read, self.downloads)
        tasks = ((job, self.manifest.entries[number], of) for number, of in by_entry.items())
        with Progress("converting again", "entries", len(by_entry)) as progress:
            for (_, entry, candidates), result in pool.run(_convert_again, tasks):
                if isinstance(result, WorkerDied):
                    with WorkerPool(1) as alone:
                        result = _convert_again(job, entry, candidates, alone)
                if result:
                    raise RunFailed(f"--manifest={self.manifest.path}, {result}; run again")
                progress.advance(1)


def _convert_again(
    job: Job, entry: Entry, candidates: Sequence[SeriesCandidate], pool: WorkerPool | None = None
) -> str:
    """Why the files cannot be fetched; "" if all is done."""
    try:
        with fetched(entry, job.staging.name(entry), job.downloads) as files:
            for candidate in candidates:
                _convert(dataclasses.replace(job.conversion, input_dir=files), candidate, pool)
    except FetchFailed as error:
        return str(error)
    return ""


def _note_alone(
    conversion: Conversion, candidate: SeriesCandidate, exam: list[SeriesCandidate]
) -> ExamNote | None:
    """The note of a stack as an exam by itself; None: it is to be converted."""
    key = exam_key(conversion, [candidate])
    path = note_path(conversion, key)
    if not path.exists():
        return None
    note = read_note(path)
    of_exam = records_path(conversion.records_dir, exam_key(conversion, exam))
    records = records_path(conversion.records_dir, key)
    return note if note.volume is None or records.exists() or of_exam.exists() else None


def _write_exam(
    conversion: Conversion, exam: list[SeriesCandidate], notes: Sequence[ExamNote]
) -> None:
    """The note of an exam, as `convert.convert_exam` writes it.

    Args:
        conversion: of the run.
        exam: all stacks.
        notes: of the first stacks, up to the one that becomes the volume or failed for now.
    """
    last = notes[-1]
    key = exam_key(conversion, exam)
    if last.failed_for_now:
        detail = last.rejected[0].detail
        rows = [_rejected(conversion, one, FAILED_FOR_NOW, detail) for one in exam]
    else:
        rows = [row for note in notes for row in note.rejected]
        rows += [_rejected(conversion, one, "other_reconstruction") for one in exam[len(notes) :]]
    if last.volume is not None:
        records = records_path(conversion.records_dir, last.key)
        if records.exists():  # else a run that was killed here gave it its name
            publish(records, records_path(conversion.records_dir, key))
    write_note(conversion, dataclasses.replace(last, key=key, rejected=rows))
    for candidate in exam:  # not preferred
        other = exam_key(conversion, [candidate])
        records_path(conversion.records_dir, other).unlink(missing_ok=True)


def _rejected(
    conversion: Conversion, candidate: SeriesCandidate, reason: str, detail: str = ""
) -> Rejected:
    return rejected(volume_id(conversion.key, candidate), candidate.rejected(reason, detail))
