"""The steps of a preparation in order. A killed step can run again.

    clean -> stage labels -> plan exams -> check splits -> convert exams -> account for files ->
    freeze -> write

The private audit directory links pseudonyms to the archive: it holds the key, the split of each
patient, `sources.csv` (the outcome of each file), `refused.csv` (each series that was not taken,
with the element that decided and a small picture), and the notes with which a grown archive is
compared.
"""

import collections
import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from data_prep.dataset.reader import Dataset
from data_prep.labels import staging
from data_prep.labels.lookup import Labels, LabelSources
from data_prep.pipeline import convert
from data_prep.pipeline.accounting import REFUSED_FILE, SOURCES_FILE, FileAccount
from data_prep.pipeline.assemble import FrozenPlan, NewVolume, assemble, freeze, keep_notes
from data_prep.pipeline.known_patients import (
    KnownPatients,
    chosen_pseudonyms,
    other_spellings,
    people_counts,
    pseudonym_groups,
    sharing_pixels,
    under_one_pseudonym,
)
from data_prep.pipeline.known_volumes import KnownVolumes
from data_prep.pipeline.notes import (
    Conversion,
    ExamNote,
    exam_key,
    final_note,
    is_converted,
    note_path,
    read_note,
    write_note,
)
from data_prep.pipeline.options import Directories, Options, refuse_other_classes
from data_prep.pipeline.plan import (
    all_headers,
    headers_in,
    plan_archive,
    plan_staged,
    read_patients,
    read_plan,
)
from data_prep.pipeline.progress import ExamProgress
from data_prep.pipeline.splits import KnownSplits, check_numbers
from data_prep.pipeline.staged_series import Gathering, read_staged
from data_prep.privacy.pseudonyms import patient_pseudonym, rejected_row
from data_prep.scan.loading import header_reader
from data_prep.scan.patients import Patients, merged
from data_prep.scan.series import SeriesCandidate
from data_prep.system.errors import InputError
from data_prep.system.extras import require
from data_prep.system.files import PARTIAL, remove_tree, sync_directory
from data_prep.system.workers import Progress, WorkerDied, WorkerPool

_VIOLATIONS_FILE = "label_violations.csv"  # private: exams whose labels break a rule of the archive
_LEFT_OUT_FILE = "label_files.csv"  # private: files of masks and annotations that are not used


@dataclasses.dataclass(frozen=True)
class Preparation:
    """The inputs of every step of a run."""

    options: Options
    directories: Directories
    sources: LabelSources
    key: bytes = dataclasses.field(repr=False)  # of the pseudonyms
    num_files: int  # of the archive, as `list_archive` counts them
    archive_digest: str
    pool: WorkerPool
    dataset: Dataset | None = None  # of an earlier run; this run adds to it
    elsewhere: KnownSplits | None = None  # of --same_splits_as
    beam_arguments: Sequence[str] | None = None  # None: on worker processes of this machine
    gathering: Gathering | None = None  # of a manifest, in place of an archive

    @property
    def named(self) -> str:
        """The flag that names the scans."""
        if self.gathering:
            return f"--manifest={self.gathering.manifest.path}"
        return f"--input_dir={self.directories.input_dir}"

    @property
    def old_volumes(self) -> list[dict[str, Any]]:
        """Rows of volumes.csv of earlier runs."""
        return self.dataset.volumes() if self.dataset else []


@dataclasses.dataclass(frozen=True)
class Plans:
    """The exams of an archive, from its headers."""

    files: list[Path]  # of `plan_archive`
    label_counts: dict[str, Any]  # rows, annotations and masks without a match
    known: KnownVolumes
    patients: set[str]  # pseudonyms, also of volumes of earlier runs
    num_exams: int  # to convert; as many volumes, unless their pixels are refused
    num_series: int  # candidates of these exams
    num_slices: int  # of these exams
    several_names: Patients  # the patients of the archive that have several keys
    pseudonyms: list[set[str]]  # of each patient that may have several, also by earlier runs

    def new_exams(self) -> Iterator[tuple[Path, int, list[SeriesCandidate]]]:
        """The exams to convert: file, position in its `exams`, candidates."""
        for path in self.files:
            for position, exam in enumerate(read_plan(path).exams):
                if self.known.outcome(exam) is None:
                    yield path, position, exam


def run_steps(preparation: Preparation) -> dict[str, Any]:
    """All steps. Returns the content of preparation.json."""
    labels, plans = survey(preparation)
    check_splits(preparation, plans)
    options, directories = preparation.options, preparation.directories
    conversion = Conversion.of(options, directories, preparation.key, labels)
    convert_exams(preparation, plans, conversion)

    def note_of(exam: list[SeriesCandidate]) -> ExamNote:
        return read_note(note_path(conversion, exam_key(conversion, exam)))

    account, new_volumes = account_for_files(preparation, plans, note_of)
    frozen = freeze_plan(preparation, plans, labels, account, new_volumes)
    return write_dataset(frozen, directories, preparation.pool, preparation.beam_arguments)


def survey(preparation: Preparation) -> tuple[Labels, Plans]:
    """The steps before the conversion, also of a dry run."""
    clean(preparation)
    labels = stage_labels(preparation)
    return labels, plan_exams(preparation, labels)


def clean(preparation: Preparation) -> None:
    """Removes useless files of a killed run, and makes the working directories."""
    directories, dataset = preparation.directories, preparation.dataset
    _remove_partial_files(directories)
    directories.notes_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    directories.records_dir.mkdir(parents=True, exist_ok=True)
    listed = dataset.preparation["checksums"] if dataset else {}
    shards = directories.output_dir.glob("*.array_record-*")
    # without the frozen plan nobody knows their records
    unlisted = [path for path in shards if path.name not in listed]
    for stale in [*directories.records_dir.glob("*.done"), *unlisted]:
        stale.unlink()


def stage_labels(preparation: Preparation) -> Labels:
    """Reads the tables of labels, annotations and masks."""
    directories, dataset = preparation.directories, preparation.dataset
    labels = staging.stage(
        preparation.sources,
        directories.input_dir,
        directories.work_dir / "labels.sqlite",
        directories.work_dir / _VIOLATIONS_FILE,
        directories.work_dir / _LEFT_OUT_FILE,
    )
    if dataset:
        refuse_other_classes(dataset.preparation["labels"], labels.facts, directories.output_dir)
    return labels


def plan_exams(preparation: Preparation, labels: Labels) -> Plans:
    """Reads all headers and plans which series become volumes."""
    directories, sources = preparation.directories, preparation.sources
    rules, old_volumes = preparation.options.rules, preparation.old_volumes
    known_patients = KnownPatients.of(directories.patients())
    if preparation.gathering:
        files = plan_staged(
            preparation.gathering.staged_files(),
            directories.work_dir / "plan",
            rules,
            preparation.num_files,
            preparation.pool,
            read_staged,
            known_patients.keys,
        )
        preparation.gathering.refuse_spread_series(
            map(headers_in, map(read_plan, files)), preparation.key
        )
    else:
        files = plan_archive(
            directories.input_dir,
            directories.work_dir / "plan",
            rules,
            preparation.num_files,
            preparation.pool,
            header_reader(sources.archive, sources.metadata_csv),
            directories.listing,
            known_patients.keys,
        )
    several_names = read_patients(directories.work_dir / "plan")
    label_counts = staging.match(labels, all_headers(files))
    volumes_of_exam = collections.defaultdict(list)
    for row in old_volumes:
        volumes_of_exam[row["exam_id"]].append(row["volume_id"])
    known = KnownVolumes(
        directories.kept_notes_dir,
        preparation.key,
        volumes_of_exam,
        one_per_study=rules.reconstructions == "one_per_study",
        keys_of=several_names.keys_of,
    )
    keys: set[str] = set()
    num_exams = num_series = num_slices = 0
    for plan in map(read_plan, files):
        for exam in plan.exams:
            keys.add(exam[0].patient_key)
            if known.outcome(exam) is None:
                num_exams += 1
                num_series += len(exam)
                num_slices += len(exam[0].headers)
    own, elsewhere = directories.splits(), preparation.elsewhere
    groups = pseudonym_groups(preparation.key, several_names, known_patients)
    known_names = {*own, *(elsewhere.split_of if elsewhere else ())}
    groups = merged([*groups, *other_spellings(preparation.key, keys, known_names)])
    chosen = chosen_pseudonyms(groups, own, elsewhere)
    names = (patient_pseudonym(preparation.key, key) for key in keys)
    patients = {row["patient_id"] for row in old_volumes} | {chosen.get(p, p) for p in names}
    numbers = (num_exams, num_series, num_slices)
    return Plans(files, label_counts, known, patients, *numbers, several_names, groups)


def check_splits(preparation: Preparation, plans: Plans) -> None:
    """Raises InputError if there are too few patients or volumes for the splits, before the long
    conversion."""
    options = preparation.options
    if plans.patients:
        num_volumes = len(preparation.old_volumes) + plans.num_exams
        check_numbers(len(plans.patients), num_volumes, options.splits, options.holdout_volumes)


def convert_exams(preparation: Preparation, plans: Plans, conversion: Conversion) -> None:
    """Converts every exam that has no note yet."""
    if preparation.gathering:
        gather_exams(preparation, preparation.gathering, plans, conversion)
        return
    with ExamProgress(plans.num_exams, plans.num_slices) as progress:

        def unconverted() -> Iterator[tuple[Path, int, list[SeriesCandidate]]]:
            for path, position, exam in plans.new_exams():
                if note := final_note(conversion, exam_key(conversion, exam)):
                    progress.advance(len(exam[0].headers), note.refusal, already_there=True)
                else:
                    yield path, position, exam

        if preparation.beam_arguments is not None:
            exams_of_plan, expected = collections.defaultdict(list), {}
            for path, position, exam in unconverted():
                exams_of_plan[path].append(position)
                expected[exam_key(conversion, exam)] = len(exam[0].headers)
            import_beam().convert_exams(
                conversion,
                exams_of_plan,
                expected,
                preparation.directories.work_dir,
                preparation.beam_arguments,
                progress,
            )
            return
        tasks = ((conversion, exam) for _, _, exam in unconverted())
        for (_, exam), refusal in preparation.pool.run(convert.convert_exam, tasks):
            if isinstance(refusal, WorkerDied):
                note = convert.note_of_crash(conversion, exam)
                write_note(conversion, note)
                refusal = note.refusal
            progress.advance(len(exam[0].headers), refusal)


def gather_exams(
    preparation: Preparation, gathering: Gathering, plans: Plans, conversion: Conversion
) -> None:
    """Makes the note of every exam of the notes that tasks left of its stacks."""
    lacking = []
    with Progress("gathering", "slices", plans.num_slices) as progress:
        for _, _, exam in plans.new_exams():
            if not is_converted(conversion, exam) and gathering.gather(conversion, exam):
                lacking.append(exam)
            progress.advance(len(exam[0].headers))
    while lacking:  # the first stack of an exam may be refused, and its next one lacking, too
        stacks = [gathering.gather(conversion, exam) for exam in lacking]
        gathering.convert_again(conversion, stacks, preparation.pool)
        lacking = [exam for exam in lacking if gathering.gather(conversion, exam)]


def account_for_files(
    preparation: Preparation, plans: Plans, note_of: Callable[[list[SeriesCandidate]], ExamNote]
) -> tuple[FileAccount, dict[str, NewVolume]]:
    """The outcome of every file, which goes to `sources.csv` and `refused.csv`, too.

    Args:
        preparation: the inputs of the run.
        plans: the exams of its archive.
        note_of: returns the outcome of a new exam.

    Returns:
        The account, and the new volumes by the keys of their notes.
    """
    known, new_volumes = plans.known, {}
    work_dir = preparation.directories.work_dir
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(open(path, "w", newline="", errors="backslashreplace"))
            for path in (work_dir / SOURCES_FILE, work_dir / REFUSED_FILE)
        ]
        account = FileAccount(*files)
        for plan in map(read_plan, plans.files):
            outcomes = []
            for rejection in plan.rejections:
                outcomes += known.outcome_of_rejection(
                    rejection, rejected_row(preparation.key, rejection)
                )
            for exam in plan.exams:
                notes = known.outcome(exam)
                if notes is None:
                    note = note_of(exam)
                    notes = [note]
                    if row := note.volume:
                        facts = (row["volume_id"], row["patient_id"], row["num_slices"])
                        new_volumes[note.key] = NewVolume(*facts, note.record_bytes)
                outcomes += notes
            account.add(outcomes, plan.not_images)
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    return account, new_volumes


def freeze_plan(
    preparation: Preparation,
    plans: Plans,
    labels: Labels,
    account: FileAccount,
    new_volumes: Mapping[str, NewVolume],
) -> FrozenPlan:
    """Decides splits, order and shards, and writes the decisions to the disk.

    Raises:
        InputError: no volume, or too few patients for the splits.
    """
    directories, old_volumes = preparation.directories, preparation.old_volumes
    counts = account.counts(preparation.num_files) | plans.label_counts
    counts["volumes_without_files"] = len(
        {row["volume_id"] for row in old_volumes} - account.volumes
    )
    if not (new_volumes or old_volumes):
        reasons = [f"{number} {reason}" for reason, number in counts["series_rejected"].items()]
        reasons += [
            f"{number} files {reason}" for reason, number in counts["files_not_images"].items()
        ]
        raise InputError(
            f"{preparation.named}: no usable chest CT in {preparation.num_files} "
            f"files ({', '.join(reasons)}); {account.commonest_in_words()}; the reason of each "
            f"file is in {directories.work_dir / SOURCES_FILE}"
        )
    known_splits, elsewhere = directories.splits(), preparation.elsewhere
    known_patients = KnownPatients.of(directories.patients())
    chosen = chosen_pseudonyms(plans.pseudonyms, known_splits, elsewhere)
    same_pixels = sharing_pixels(directories, old_volumes, new_volumes, chosen)
    chosen = chosen_pseudonyms(merged([*plans.pseudonyms, *same_pixels]), known_splits, elsewhere)
    new_volumes = {
        name: dataclasses.replace(volume, patient_id=chosen[volume.patient_id])
        if volume.patient_id in chosen
        else volume
        for name, volume in new_volumes.items()
    }

    def row_of(name: str) -> dict[str, Any]:
        row = read_note(directories.notes_dir / f"{name}.json").volume
        return under_one_pseudonym(row, chosen, same_pixels)

    known_patients = known_patients.after(plans.several_names, same_pixels)
    counts |= people_counts(preparation.key, plans.several_names, known_patients.pseudonyms)
    if elsewhere:
        patients = {chosen.get(name, name) for name in plans.patients}
        of_others = {p: split for p, split in elsewhere.split_of.items() if p in patients}
        known_splits = of_others | known_splits
    frozen = freeze(
        options=preparation.options.as_dict(),
        key=preparation.key,
        archive_digest=preparation.archive_digest,
        new_volumes=new_volumes,
        row_of=row_of,
        old_volumes=old_volumes,
        old_preparation=preparation.dataset.preparation if preparation.dataset else None,
        known_splits=known_splits,
        rejected=account.rejected,
        counts=counts,
        labels=labels.facts,
        known_patients=known_patients.as_dict(),
    )
    return frozen.save(directories.frozen_file)


def write_dataset(
    frozen: FrozenPlan,
    directories: Directories,
    pool: WorkerPool,
    beam_arguments: Sequence[str] | None,
) -> dict[str, Any]:
    """Writes the frozen dataset: shards, tables, preparation.json, then the private files. Returns
    the content of preparation.json."""
    _remove_partial_files(directories)
    output_dir, records_dir = directories.output_dir, directories.records_dir
    notes_dir, kept_notes_dir = directories.notes_dir, directories.kept_notes_dir
    if beam_arguments is not None:  # `assemble` then finds the shards written
        import_beam().write_shards(
            frozen, directories.frozen_file, output_dir, records_dir, beam_arguments
        )
    preparation = assemble(frozen, output_dir, records_dir, notes_dir, kept_notes_dir, pool)
    directories.write_splits(frozen.splits)
    directories.write_patients(frozen.patients)
    keep_notes(frozen, notes_dir, kept_notes_dir)
    for name in (SOURCES_FILE, REFUSED_FILE, _VIOLATIONS_FILE, _LEFT_OUT_FILE):
        if (directories.work_dir / name).exists():
            os.replace(directories.work_dir / name, directories.audit_dir / name)
    directories.bind(frozen.archive_digest, preparation["fingerprint"])
    directories.frozen_file.unlink()
    sync_directory(directories.work_dir)
    remove_work(directories)
    return preparation


def import_beam() -> ModuleType:
    """`data_prep.pipeline.beam`. Raises InputError if the extra is not installed."""
    require("apache_beam", "--runner=beam", "beam")
    logging.disable(logging.WARNING)  # Beam warns that its own extras are missing
    from data_prep.pipeline import beam

    logging.disable(logging.NOTSET)
    return beam


def remove_work(directories: Directories) -> None:
    remove_tree(directories.records_dir)
    remove_tree(directories.work_dir)


def _remove_partial_files(directories: Directories) -> None:
    public = (directories.output_dir, directories.records_dir)
    for directory in (*public, directories.audit_dir, directories.work_dir, directories.notes_dir):
        for stale in directory.glob(f"*{PARTIAL}"):
            if stale.is_dir():  # of a task under Beam
                remove_tree(stale)
            else:
                stale.unlink(missing_ok=True)
