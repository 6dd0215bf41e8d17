"""Array jobs over a manifest: tasks on any machines, in any order and number, then one gathering
preparation.

    run_task(..., task_index=0, task_count=2)       # and 1
    assemble(...)                                   # decides duplicates, patients, splits, shards

The dataset is that of one `prepare` over the same files, to the byte, whatever the number of tasks.
All write into one dataset directory and one audit directory: entries that are staged are skipped,
and each file appears whole or not at all.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.labels import staging
from data_prep.labels.lookup import LabelSources
from data_prep.pipeline.downloads import Downloads, discard
from data_prep.pipeline.manifest import Manifest, in_words
from data_prep.pipeline.notes import Conversion
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.prepare import complete_dataset, prepare, refuse_other_dataset
from data_prep.pipeline.staged_series import Gathering, Job, Staging, stage_entries
from data_prep.privacy.pseudonyms import private_digest, read_key
from data_prep.scan.loading import header_reader
from data_prep.system.errors import InputError, RunFailed
from data_prep.system.files import lock_directory
from data_prep.system.workers import Progress, WorkerPool, usable_cores

_FLAGS = (
    *("anonymous", "assemble", "download_dir", "endpoint_url", "read_timeout"),
    *("remove_downloads", "task_count", "task_index"),
)


@dataclasses.dataclass(frozen=True)
class Array:
    """An array job: the inputs that all its tasks and the gathering preparation share."""

    manifest: Manifest
    options: Options
    directories: Directories
    sources: LabelSources
    downloads: Downloads
    pseudonym_key_file: Path

    def check(self) -> None:
        """Raises InputError for what does not go with a manifest, and for unusable files."""
        kind, named = self.options.archive, f"--manifest={self.manifest.path}"
        if not self.pseudonym_key_file.is_file():
            raise InputError(
                f"--pseudonym_key_file={self.pseudonym_key_file}: no such file; give that of all "
                "tasks, or make one before the first of them: `openssl rand -hex 32 > KEY`"
            )
        if kind not in ("dicom", "nifti"):
            raise InputError(
                f"{named}: --archive={kind} has tables among the scans; give the scans as dicom, "
                "and --labels_csv or --masks_dir"
            )
        if self.sources.metadata_csv:
            raise InputError(f"{named}: --metadata_csv needs a local copy, as --input_dir")
        self.directories.check()
        folder, dataset = self.downloads.folder, self.directories.output_dir
        if folder.resolve().is_relative_to(dataset.resolve()):
            raise InputError(
                f"--download_dir={folder} lies inside --output_dir={dataset}, which is published; "
                "choose a private directory"
            )
        staging.check(self.sources, None)

    def with_tables(self, key: bytes) -> Options:
        """The options with digests of the tables, as `prepare` completes them."""
        digests = staging.input_digests(self.sources, None)
        tables = tuple((name, private_digest(key, "table", digest)) for name, digest in digests)
        return dataclasses.replace(self.options, masks=self.sources.mask_facts(), tables=tables)


def run_task(
    array: Array, task_index: int, task_count: int, num_workers: int | None = None
) -> tuple[int, int]:
    """Stages the entries of one task, but for those that are staged.

    Args:
        array: what all tasks share.
        task_index: from 0.
        task_count: number of tasks.
        num_workers: processes; None: the usable cores. At most so many entries are downloaded at a
            time.

    Returns:
        Number of entries of the task, and of those that an earlier run had staged.

    Raises:
        InputError: unusable directories or options.
        RunFailed: some entries failed for now; all others are staged.
        OSError: the output can't be written.
    """
    if not 0 <= task_index < task_count:
        raise InputError(
            f"--task_index={task_index}: is one of 0 to {task_count - 1}, for "
            f"--task_count={task_count}"
        )
    array.check()
    key = read_key(array.pseudonym_key_file)
    directories = array.directories
    directories.make()
    with contextlib.ExitStack() as stack:
        for directory in (directories.output_dir, directories.audit_dir):
            stack.enter_context(lock_directory(directory, shared=True))
        dataset = complete_dataset(directories)
        directories.refuse_audit_dir_of_another(dataset)
        options = array.with_tables(key)
        if dataset:
            refuse_other_dataset(dataset, options, key, directories)
        for private in (directories.notes_dir, directories.staged_entries_dir):
            private.mkdir(mode=0o700, parents=True, exist_ok=True)
        directories.records_dir.mkdir(parents=True, exist_ok=True)
        database = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "labels.sqlite"
        read = header_reader(array.sources.archive)
        labels = staging.stage(array.sources, None, database)
        conversion = Conversion.of(options, directories, key, labels)
        staged = Staging.of(directories, options, read, key)
        job = Job(staged, conversion, read, array.downloads)
        entries = array.manifest.of_task(task_index, task_count)
        failed: list[str] = []
        title = f"task {task_index} of {task_count}"
        progress = stack.enter_context(Progress(title, "entries", len(entries)))
        missing = []
        for entry in entries:
            if staged.is_done(entry):
                progress.advance(1, already_there=True)
            else:
                missing.append(entry)
                if array.downloads.remove:
                    discard(staged.name(entry), array.downloads)
        pool = stack.enter_context(WorkerPool(num_workers or usable_cores()))
        for entry, outcome in stage_entries(job, missing, pool):
            if outcome.failed:
                failed.append(outcome.failed)
            elif outcome.again:
                failed.append(f"{entry.named}: a file or series could not be read for now")
            progress.advance(1)
    if failed:
        raise RunFailed(
            f"--manifest={array.manifest.path}: {len(failed)} of {len(entries)} entries of the "
            f"task failed ({'; '.join(failed)}); the others are staged; run the task again"
        )
    return len(entries), len(entries) - len(missing)


def assemble(
    array: Array,
    *,
    task_count: int | None = None,
    num_workers: int | None = None,
    same_splits_as: Sequence[Path] = (),
) -> tuple[dict[str, Any], bool, Gathering]:
    """The dataset of all entries that tasks have staged, as `prepare` returns it.

    Entries whose files could not be had are left out, as if they were not in the manifest; the
    `Gathering` tells them. Once a task has got them, the next call adds them.

    Raises:
        InputError: a task is missing, which is named with `task_count`, or as of `prepare`.
    """
    array.check()
    gathering = _gathering(array)
    if missing := gathering.missing:
        tasks = ""
        if task_count:
            numbers = sorted({entry.number % task_count for entry in missing})
            tasks = f" (--task_index={','.join(map(str, numbers))} of --task_count={task_count})"
        lines = in_words(sorted(entry.places[0].line for entry in missing))
        raise InputError(
            f"--manifest={array.manifest.path}: no task with these options has taken "
            f"{len(missing)} of {len(array.manifest.entries)} entries ({lines}); "
            f"{_of_others(gathering)}run the missing tasks{tasks}, then --assemble again"
        )
    prepared, changed = prepare(
        array.options,
        array.directories,
        sources=array.sources,
        num_workers=num_workers,
        pseudonym_key_file=array.pseudonym_key_file,
        same_splits_as=same_splits_as,
        gathering=gathering,
    )
    return prepared, changed, gathering


def _of_others(gathering: Gathering) -> str:
    """What tasks left that this call does not know, for the user."""
    folder = gathering.staging.folder
    number = len(list(folder.iterdir())) if folder.is_dir() else 0
    number -= len(gathering.present) + len(gathering.failed)
    text = f"{number} that are there have another key, other options or other lines; "
    return text if number else ""


def _gathering(array: Array) -> Gathering:
    key = read_key(array.pseudonym_key_file)
    read = header_reader(array.sources.archive)
    staged = Staging.of(array.directories, array.with_tables(key), read, key)
    return Gathering.of(array.manifest, staged, read, array.downloads)


def progress_text(array: Array) -> str:
    """How far the tasks are, for the user."""
    array.check()
    gathering = _gathering(array)
    rejected = sorted(gathering.rejected.items())
    lines = [
        f"{len(array.manifest.entries):>8} entries of the manifest",
        f"{len(gathering.present):>8} staged: {gathering.num_files} files, "
        f"{gathering.num_volumes} series that can be volumes",
        *(f"{number:>16} series {reason}" for reason, number in rejected),
        f"{len(gathering.missing):>8} not taken yet",
    ]
    return "\n".join([*lines, failed_text(gathering)]).rstrip()


def failed_text(gathering: Gathering) -> str:
    """A line on each entry without files, for the user; "" if there are none."""
    failed = gathering.failed
    lines = [
        f"{len(failed):>8} failed for now and are left out; run their tasks again, and assemble"
    ]
    lines += [f"{'':16} {reason}" for _, reason in failed]
    return "\n".join(lines) + "\n" if failed else ""


def check_flags(flags: Any) -> None:
    """Raises InputError for flags of `ctssl prepare` that contradict each other."""
    given = {name for name in _FLAGS if flags[name].present}
    if not flags.manifest:
        if given:
            raise InputError(
                f"--{min(given)} goes with --manifest; add it or leave --{min(given)} out"
            )
        if not flags.input_dir:
            raise InputError("give --input_dir, the folder of the scans, or --manifest")
        return
    if flags.runner != "local" or flags.beam_options:
        raise InputError("--manifest goes with --runner=local: its tasks are the spreading")
    if not flags.pseudonym_key_file:
        raise InputError(
            "--manifest needs --pseudonym_key_file, the same for all tasks: `openssl rand -hex 32 "
            "> KEY` makes one"
        )
    if flags.assemble and flags.task_index is not None:
        raise InputError("--assemble is no task; leave --task_index out")
    if flags.dry_run and not flags.assemble:
        raise InputError(
            "--manifest: --dry_run goes with --assemble, and shows how far the tasks are"
        )
    if not flags.assemble and None in (flags.task_index, flags.task_count):
        raise InputError("--manifest needs --task_index and --task_count, or --assemble")
