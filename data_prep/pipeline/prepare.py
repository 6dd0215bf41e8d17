"""Archive of scans -> dataset directory: the steps in order. A killed step can run again.

    clean -> stage labels -> plan exams -> check splits -> convert exams -> account for files ->
    freeze -> write

A dry run is the same steps in a temporary directory, with expected notes in place of the
conversion and without the last two.

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
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import PREPARATION_FILE, rules_of
from data_prep.labels import staging
from data_prep.labels.lookup import Labels, LabelSources
from data_prep.pipeline import convert
from data_prep.pipeline.accounting import (
    REFUSED_FILE,
    SOURCES_FILE,
    DryRunRefused,
    FileAccount,
    num_failed_for_now,
)
from data_prep.pipeline.assemble import FrozenPlan, assemble, can_be_assembled, freeze, keep_notes
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
    is_converted,
    note_path,
    read_note,
    write_note,
)
from data_prep.pipeline.options import (
    Directories,
    Options,
    refuse_other_classes,
    refuse_other_options,
    with_absolute_paths,
)
from data_prep.pipeline.plan import (
    all_headers,
    list_archive,
    plan_archive,
    read_patients,
    read_plan,
)
from data_prep.pipeline.splits import (
    KnownSplits,
    check_numbers,
    read_known_splits,
    refuse_other_key,
    refuse_other_splits,
)
from data_prep.privacy.pseudonyms import (
    Rejected,
    make_key,
    patient_pseudonym,
    private_digest,
    read_key,
    rejected_row,
    sources_of,
)
from data_prep.scan.loading import header_reader
from data_prep.scan.patients import Patients, merged
from data_prep.scan.rules import VERSION
from data_prep.scan.series import SeriesCandidate
from data_prep.system.errors import InputError
from data_prep.system.extras import require
from data_prep.system.files import PARTIAL, lock_directory, remove_tree, sync_directory
from data_prep.system.workers import Progress, WorkerDied, WorkerPool, usable_cores

_VIOLATIONS_FILE = "label_violations.csv"  # private: exams whose labels break a rule of the archive
_LEFT_OUT_FILE = "label_files.csv"  # private: files of masks and annotations that are not used
_BYTES_PER_PIXEL = 0.34  # zstd-1 on windowed CT slices, measured


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


# ---- commands ----------------------------------------------------------------------------------


def prepare(
    options: Options,
    directories: Directories,
    *,
    sources: LabelSources | None = None,
    num_workers: int | None = None,
    pseudonym_key_file: Path | None = None,
    same_splits_as: Sequence[Path] = (),
    beam_options: Sequence[str] | None = None,
) -> tuple[dict[str, Any], bool]:
    """Prepares a dataset, continues a killed run, or adds scans that came to the archive.

    Args:
        options: their `masks` and `tables` follow from `sources`.
        directories: of the archive, the dataset and the private audit.
        sources: where labels, masks and attributes come from (default: the archive itself).
        num_workers: processes; None: the usable cores.
        pseudonym_key_file: None: the key is made in the audit directory.
        same_splits_as: datasets of the same pseudonym key, whose patients keep the split that they
            have there.
        beam_options: convert and write shards under Apache Beam with these arguments
            (`data_prep.pipeline.beam`); None: on worker processes of this machine.

    Returns:
        The content of preparation.json, and whether this run changed the dataset.

    Raises:
        InputError: unusable directories or options, too few patients.
        OSError: the archive went away or the output can't be written.
        RunFailed: a worker was killed, or the Beam pipeline failed.
    """
    directories.check()
    sources = sources or LabelSources(options.archive)
    staging.check(sources, directories.input_dir)
    num_workers = num_workers or usable_cores()
    beam_arguments = None
    if beam_options is not None:
        beam_arguments = _import_beam().pipeline_arguments(beam_options, num_workers)
        directories, sources = with_absolute_paths(directories), with_absolute_paths(sources)
    key = read_key(pseudonym_key_file) if pseudonym_key_file else None
    elsewhere = read_known_splits(same_splits_as)
    if elsewhere:
        refuse_other_key(elsewhere, pseudonym_key_file or directories.key_file)
        options = dataclasses.replace(options, same_splits_as=elsewhere.fingerprints)
    directories.make()
    with (
        lock_directory(directories.output_dir),
        lock_directory(directories.audit_dir),
        WorkerPool(num_workers) as pool,
    ):
        dataset = _complete_dataset(directories)
        directories.refuse_audit_dir_of_another(dataset)
        key = key or make_key(directories.key_file)
        if elsewhere:
            refuse_other_splits(elsewhere, directories.splits())
        digests = staging.input_digests(sources, directories.input_dir)
        tables = tuple((name, private_digest(key, "table", digest)) for name, digest in digests)
        options = dataclasses.replace(options, masks=sources.mask_facts(), tables=tables)
        changed = _finish_killed_run(options, key, directories, pool, beam_arguments)
        if changed:
            dataset = _complete_dataset(directories)
        num_files, digest = list_archive(directories.input_dir, directories.listing)
        if dataset:
            _refuse_other_dataset(dataset, options, key, directories)
            same_archive = directories.bound()["digest"] == digest
            if same_archive and not num_failed_for_now(dataset.preparation["counts"]):
                _remove_work(directories)
                return dataset.preparation, changed
        run = Preparation(options, directories, sources, key, num_files, digest, pool)
        run = dataclasses.replace(
            run, dataset=dataset, elsewhere=elsewhere, beam_arguments=beam_arguments
        )
        return run_steps(run), True


def dry_run(
    options: Options,
    directories: Directories,
    *,
    sources: LabelSources | None = None,
    num_workers: int | None = None,
    same_splits_as: Sequence[Path] = (),
) -> dict[str, Any]:
    """The expected result of `prepare`, from the headers. Writes temporary files only.

    `prepare` may refuse more scans, for their pixels. The content of the output directory makes no
    difference.

    Returns:
        The counts of preparation.json with the expected `exams`, `patients`, `slices` and `bytes`.

    Raises:
        DryRunRefused: too few patients or volumes for the splits.
        InputError: unusable directories, or no files.
    """
    directories.check()
    sources = sources or LabelSources(options.archive)
    staging.check(sources, directories.input_dir)
    read_known_splits(same_splits_as)
    with tempfile.TemporaryDirectory() as folder, WorkerPool(num_workers or usable_cores()) as pool:
        temporary = Directories(
            directories.input_dir, Path(folder) / "dataset", Path(folder) / "audit"
        )
        num_files, digest = list_archive(temporary.input_dir, temporary.listing)
        preparation = Preparation(options, temporary, sources, b"", num_files, digest, pool)
        labels, plans = survey(preparation)
        account, _ = account_for_files(preparation, plans, _expected_note)
    pixels = plans.num_slices * options.image_size**2 * len(options.windows)
    expected = {
        "exams": plans.num_exams,
        "series": plans.num_series,
        "patients": len(plans.patients),
        "slices": plans.num_slices,
        "label_classes": {
            f"{name} of a {facts['level']}": facts["classes"]
            for name, facts in labels.facts.items()
        },
        "bytes": int(pixels * _BYTES_PER_PIXEL),
    }
    people = people_counts(b"", plans.several_names, ())
    counts = account.counts(num_files) | people | plans.label_counts | expected
    try:
        check_splits(preparation, plans)
    except InputError as error:
        raise DryRunRefused(str(error), counts) from None
    return counts


# ---- steps -------------------------------------------------------------------------------------


def run_steps(preparation: Preparation) -> dict[str, Any]:
    """All steps. Returns the content of preparation.json."""
    labels, plans = survey(preparation)
    check_splits(preparation, plans)
    options, directories = preparation.options, preparation.directories
    conversion = Conversion(
        input_dir=directories.input_dir,
        notes_dir=directories.notes_dir,
        records_dir=directories.records_dir,
        rules=options.rules,
        windows=options.windows,
        image_size=options.image_size,
        key=preparation.key,
        labels=labels,
        options_digest=options.conversion_digest(),
    )
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
    with Progress("converting", "slices", plans.num_slices) as progress:

        def unconverted() -> Iterator[tuple[Path, int, list[SeriesCandidate]]]:
            for path, position, exam in plans.new_exams():
                if is_converted(conversion, exam):
                    progress.advance(len(exam[0].headers), already_there=True)
                else:
                    yield path, position, exam

        if preparation.beam_arguments is not None:
            exams_of_plan, num_slices = collections.defaultdict(list), 0
            for path, position, exam in unconverted():
                exams_of_plan[path].append(position)
                num_slices += len(exam[0].headers)
            _import_beam().convert_exams(
                conversion,
                exams_of_plan,
                preparation.directories.work_dir,
                preparation.beam_arguments,
            )
            progress.advance(num_slices)
            return
        tasks = ((conversion, exam) for _, _, exam in unconverted())
        for (_, exam), result in preparation.pool.run(convert.convert_exam, tasks):
            if isinstance(result, WorkerDied):
                write_note(conversion, convert.note_of_crash(conversion, exam))
            progress.advance(len(exam[0].headers))


def account_for_files(
    preparation: Preparation, plans: Plans, note_of: Callable[[list[SeriesCandidate]], ExamNote]
) -> tuple[FileAccount, dict[str, tuple[dict[str, Any], int]]]:
    """The outcome of every file, which goes to `sources.csv` and `refused.csv`, too.

    Args:
        preparation: the inputs of the run.
        plans: the exams of its archive.
        note_of: returns the outcome of a new exam.

    Returns:
        The account, and {key of the note: (row of volumes.csv, bytes of the records)} of the new
        volumes.
    """
    known, new_volumes = plans.known, {}
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(open(path, "w", newline="", errors="backslashreplace"))
            for path in (
                preparation.directories.work_dir / name for name in (SOURCES_FILE, REFUSED_FILE)
            )
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
                    if note.volume:
                        new_volumes[note.key] = (note.volume, note.record_bytes)
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
    new_volumes: Mapping[str, tuple[dict[str, Any], int]],
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
            f"--input_dir={directories.input_dir}: no usable chest CT in {preparation.num_files} "
            f"files ({', '.join(reasons)}); {account.commonest_in_words()}; the reason of each "
            f"file is in {directories.work_dir / SOURCES_FILE}"
        )
    known_splits, elsewhere = directories.splits(), preparation.elsewhere
    known_patients = KnownPatients.of(directories.patients())
    chosen = chosen_pseudonyms(plans.pseudonyms, known_splits, elsewhere)
    same_pixels = sharing_pixels(directories, old_volumes, new_volumes, chosen)
    chosen = chosen_pseudonyms(merged([*plans.pseudonyms, *same_pixels]), known_splits, elsewhere)
    new_volumes = {
        name: (under_one_pseudonym(row, chosen, same_pixels), size)
        for name, (row, size) in new_volumes.items()
    }
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
        old_volumes=old_volumes,
        old_preparation=preparation.dataset.preparation if preparation.dataset else None,
        known_splits=known_splits,
        rejected=account.rejected,
        counts=counts,
        labels=labels.facts,
        known_patients=known_patients.as_dict(),
    )
    frozen.save(directories.frozen_file)
    return frozen


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
        _import_beam().write_shards(
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
    _remove_work(directories)
    return preparation


# ---- details -----------------------------------------------------------------------------------


def _complete_dataset(directories: Directories) -> Dataset | None:
    """The dataset of the output directory; None until a run has completed it."""
    complete = (directories.output_dir / PREPARATION_FILE).exists()
    return Dataset.open(directories.output_dir) if complete else None


def _refuse_other_dataset(
    dataset: Dataset, options: Options, key: bytes, directories: Directories
) -> None:
    """Raises InputError unless this run may add to the dataset."""
    newest = max(map(int, rules_of(dataset.preparation, 0)))
    if newest > VERSION:
        raise InputError(
            f"{directories.output_dir}: was read by version {newest} of the rules, this program "
            f"has version {VERSION}; update the program, or give another --output_dir"
        )
    stored, fingerprint = (dataset.preparation[name] for name in ("options", "key_fingerprint"))
    refuse_other_options(stored, fingerprint, options, key, directories.output_dir)
    if directories.bound()["fingerprint"] != dataset.fingerprint:
        raise InputError(
            f"{directories.audit_dir}: not the audit directory of {directories.output_dir}; "
            "give --audit_dir as it was when the dataset was made"
        )


def _finish_killed_run(
    options: Options,
    key: bytes,
    directories: Directories,
    pool: WorkerPool,
    beam_arguments: Sequence[str] | None,
) -> bool:
    """Writes the dataset of a run that was killed after it had frozen its plan. False: there was no
    such run."""
    if not directories.frozen_file.exists():
        return False
    frozen = FrozenPlan.load(directories.frozen_file)
    if not can_be_assembled(frozen, directories.output_dir, directories.records_dir):
        directories.frozen_file.unlink()
        return False
    refuse_other_options(
        frozen.options, frozen.key_fingerprint, options, key, directories.output_dir
    )
    write_dataset(frozen, directories, pool, beam_arguments)
    return True


def _expected_note(exam: list[SeriesCandidate]) -> ExamNote:
    """The note of an exam whose first candidate becomes a volume, as far as the headers tell."""
    first, *others = exam
    dropped = [(header.source, reason) for header, reason in first.dropped]
    dropped += [
        (header.source, "duplicate_slice") for group in first.duplicates for header in group
    ]
    rejected = [
        Rejected("", "other_reconstruction", "", sources_of(other.all_headers)) for other in others
    ]
    return ExamNote("", None, 0, sources_of(first.headers), dropped, rejected)


def _import_beam() -> ModuleType:
    """`data_prep.pipeline.beam`. Raises InputError if the extra is not installed."""
    require("apache_beam", "--runner=beam", "beam")
    logging.disable(logging.WARNING)  # Beam warns that its own extras are missing
    from data_prep.pipeline import beam

    logging.disable(logging.NOTSET)
    return beam


def _remove_work(directories: Directories) -> None:
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
