"""Archive of scans -> dataset directory: a preparation and its dry run.

A dry run is the steps of `data_prep.pipeline.steps` in a temporary directory, with expected notes
in place of the conversion and without the last two.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import PREPARATION_FILE, rules_of
from data_prep.labels import staging
from data_prep.labels.lookup import LabelSources
from data_prep.pipeline.accounting import DryRunRefused, num_failed_for_now
from data_prep.pipeline.assemble import FrozenPlan, can_be_assembled
from data_prep.pipeline.known_patients import people_counts
from data_prep.pipeline.notes import ExamNote
from data_prep.pipeline.options import (
    Directories,
    Options,
    refuse_other_options,
    with_absolute_paths,
)
from data_prep.pipeline.plan import list_archive
from data_prep.pipeline.splits import read_known_splits, refuse_other_key, refuse_other_splits
from data_prep.pipeline.staged_series import Gathering
from data_prep.pipeline.steps import (
    Preparation,
    account_for_files,
    check_splits,
    import_beam,
    remove_work,
    run_steps,
    survey,
    write_dataset,
)
from data_prep.privacy.pseudonyms import Rejected, make_key, private_digest, read_key, sources_of
from data_prep.scan.rules import VERSION
from data_prep.scan.series import SeriesCandidate
from data_prep.system.errors import InputError
from data_prep.system.files import lock_directory
from data_prep.system.workers import WorkerPool, usable_cores

_BYTES_PER_PIXEL = 0.34  # zstd-1 on windowed CT slices, measured


def prepare(
    options: Options,
    directories: Directories,
    *,
    sources: LabelSources | None = None,
    num_workers: int | None = None,
    pseudonym_key_file: Path | None = None,
    same_splits_as: Sequence[Path] = (),
    beam_options: Sequence[str] | None = None,
    gathering: Gathering | None = None,
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
        gathering: what tasks left of a manifest (`data_prep.pipeline.array`), in place of an
            archive.

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
        beam_arguments = import_beam().pipeline_arguments(beam_options, num_workers)
        import_beam().check_cluster(beam_arguments)
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
        if beam_arguments is not None:
            import_beam().check_directories(beam_arguments, directories)
        dataset = complete_dataset(directories)
        directories.refuse_audit_dir_of_another(dataset)
        key = key or make_key(directories.key_file)
        if elsewhere:
            refuse_other_splits(elsewhere, directories.splits())
        digests = staging.input_digests(sources, directories.input_dir)
        tables = tuple((name, private_digest(key, "table", digest)) for name, digest in digests)
        options = dataclasses.replace(options, masks=sources.mask_facts(), tables=tables)
        changed = _finish_killed_run(options, key, directories, pool, beam_arguments)
        if changed:
            dataset = complete_dataset(directories)
        if gathering:
            num_files, digest = gathering.listed()
        else:
            num_files, digest = list_archive(directories.input_dir, directories.listing)
        if dataset:
            refuse_other_dataset(dataset, options, key, directories)
            same_archive = directories.bound()["digest"] == digest
            if same_archive and not num_failed_for_now(dataset.preparation["counts"]):
                remove_work(directories)
                return dataset.preparation, changed
        run = Preparation(options, directories, sources, key, num_files, digest, pool)
        run = dataclasses.replace(
            run,
            dataset=dataset,
            elsewhere=elsewhere,
            beam_arguments=beam_arguments,
            gathering=gathering,
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


# ---- details -----------------------------------------------------------------------------------


def complete_dataset(directories: Directories) -> Dataset | None:
    """The dataset of the output directory; None until a run has completed it."""
    complete = (directories.output_dir / PREPARATION_FILE).exists()
    return Dataset.open(directories.output_dir) if complete else None


def refuse_other_dataset(
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
