"""DICOM archive -> dataset directory: the steps, in order, each of which can be killed and run again.

    list files -> read headers -> plan exams -> convert each exam (staged) -> freeze all decisions -> shards, tables

The private audit directory holds what links pseudonyms to the archive: the key, the split of each patient,
`sources.csv` (what became of each file), and the notes that a grown archive is compared with.
"""

import collections
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep import label_staging
from data_prep.archives import ArchiveDirectory, RemoteArchive
from data_prep.dataset import Dataset
from data_prep.dataset__schema import PREPARATION_FILE, VOLUMES_FILE
from data_prep.labels import LabelSources
from data_prep.pipeline import convert, splits
from data_prep.pipeline.accounting import Account
from data_prep.pipeline.assemble import Frozen, assemble, can_be_assembled, freeze, keep_notes
from data_prep.pipeline.known_splits import KnownSplits, read_known_splits, refuse_other_key, refuse_other_splits
from data_prep.pipeline.known_volumes import KnownVolumes
from data_prep.pipeline.notes import Conversion, exam_key, is_converted, note_path, read_note, write_note
from data_prep.planning import all_headers, list_archive, plan_archive, read_plan
from data_prep.privacy import pseudonyms
from data_prep.privacy.pseudonyms import KEY_FILE, rejected_row
from data_prep.scan.loading import header_reader
from data_prep.scan.reasons import FAILED_FOR_NOW
from data_prep.scan.rules import Rules
from data_prep.system.errors import InputError
from data_prep.system.files import PARTIAL, lock_directory, make_folder, remove_tree, sync_directory, write_file
from data_prep.workers import Progress, WorkerDied, WorkerPool, usable_cores

_VIOLATIONS_FILE = "label_violations.csv"  # private: exams whose labels break a rule of the archive
_BOUND_FILE = "archive.json"  # of which archive and which dataset an audit directory is


@dataclasses.dataclass(frozen=True)
class Options:
    """What the bytes of a dataset depend on, besides the archive and the pseudonym key."""

    archive: str = "dicom"
    windows: tuple[tuple[float, float], ...] = ((50.0, 350.0),)  # (level, width) in HU, a channel each
    image_size: int = 512
    rules: Rules = dataclasses.field(default_factory=Rules)
    splits: tuple[float, float, float] = (0.8, 0.1, 0.1)  # fractions of patients
    holdout_volumes: int = 0  # test volumes; 0: go by `splits`
    shard_size_mb: float = 1024.0
    masks: dict[str, Any] | None = None  # `LabelSources.mask_facts`
    tables: tuple[tuple[str, str], ...] = ()  # (option, keyed digest) of each file of labels and attributes
    same_splits_as: tuple[str, ...] = ()  # fingerprints of other datasets, as they were when splits were decided

    def as_dict(self) -> dict[str, Any]:
        """Flat and in the types that JSON gives back."""
        fields = dataclasses.asdict(self)
        fields = fields | fields.pop("rules")
        if not self.same_splits_as:
            del fields["same_splits_as"]
        return json.loads(json.dumps(fields))

    def conversion_digest(self) -> str:
        """Of the options that the conversion of an exam depends on: with other splits its result can stay."""
        relevant = (self.archive, self.windows, self.image_size, dataclasses.astuple(self.rules))
        return hashlib.sha256(repr((*relevant, self.masks, self.tables)).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Places:
    """The directories of a preparation."""

    input_dir: ArchiveDirectory
    output_dir: Path
    audit_dir: Path

    @property
    def records_dir(self) -> Path:  # staged volumes: as public as the dataset, and as large
        return self.output_dir / ".work"

    @property
    def work_dir(self) -> Path:  # what names source files
        return self.audit_dir / "work"

    @property
    def listing(self) -> Path:
        return self.work_dir / "listing"

    @property
    def notes_dir(self) -> Path:
        return self.work_dir / "notes"

    @property
    def kept_notes_dir(self) -> Path:
        return self.audit_dir / "notes"

    @property
    def frozen_file(self) -> Path:
        return self.work_dir / "frozen.json"


def check_places(places: Places) -> None:
    """Raises InputError for directories that contain one another, are missing or are used otherwise."""
    remote = isinstance(places.input_dir, RemoteArchive)
    if remote:
        places.input_dir.check("--input_dir")
    elif places.input_dir.is_file():
        raise InputError(f"--input_dir={places.input_dir}: is a file; give the folder of the scans")
    elif not places.input_dir.is_dir():
        raise InputError(f"--input_dir={places.input_dir}: no such directory; give the folder of the scans")
    named = {"--output_dir": places.output_dir, "--audit_dir": places.audit_dir}
    named |= {} if remote else {"--input_dir": places.input_dir}
    for (a, path_a), (b, path_b) in itertools.permutations(named.items(), 2):
        if path_a.resolve().is_relative_to(path_b.resolve()):
            raise InputError(f"{a}={path_a} lies inside {b}={path_b}; choose a directory beside it")
    for path in (places.output_dir, places.audit_dir):
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: is a file; choose another directory")
    ours = (PREPARATION_FILE, VOLUMES_FILE, places.records_dir.name)
    if places.output_dir.is_dir() and not any((places.output_dir / name).exists() for name in ours):
        if any(places.output_dir.iterdir()):
            raise InputError(f"--output_dir={places.output_dir}: holds other files; choose a new directory")


def prepare(
    options: Options,
    places: Places,
    *,
    sources: LabelSources | None = None,
    num_workers: int | None = None,
    pseudonym_key_file: Path | None = None,
    same_splits_as: Sequence[Path] = (),
    beam_options: Sequence[str] | None = None,
) -> tuple[dict[str, Any], bool]:
    """Prepares a dataset, or carries on with it, or adds what came to the archive.

    `sources` says where labels, masks and attributes come from (default: what the archive brings along); its `masks`
    and `tables` of `options` follow from it. `same_splits_as`: datasets of the same pseudonym key, whose patients keep
    the split that they have there. `beam_options`: convert and write shards under Apache Beam, with these arguments of
    its own (`pipeline.beam`); None: on worker processes here. Returns the content of its preparation.json, and
    whether there was anything to do.

    Raises:
        InputError, ValueError: unusable directories or options, too few patients.
        OSError: the archive went away or the output can't be written.
    """
    check_places(places)
    sources = sources or LabelSources(options.archive)
    label_staging.check(sources, places.input_dir)
    num_workers = num_workers or usable_cores()
    beam_arguments = None
    if beam_options is not None:
        beam_arguments = _beam_arguments(beam_options, num_workers)
        places, sources = _with_absolute_paths(places), _with_absolute_paths(sources)
    key = pseudonyms.read_key(pseudonym_key_file) if pseudonym_key_file else None
    elsewhere = read_known_splits(same_splits_as)
    if elsewhere:
        refuse_other_key(elsewhere, pseudonym_key_file, places.audit_dir)
        options = dataclasses.replace(options, same_splits_as=elsewhere.fingerprints)
    make_folder(places.output_dir, "--output_dir")
    make_folder(places.audit_dir, "--audit_dir", mode=0o700)
    with lock_directory(places.output_dir), lock_directory(places.audit_dir), WorkerPool(num_workers) as pool:
        places.audit_dir.chmod(0o700)
        _refuse_audit_dir_of_another(places)
        if key is None:
            key = pseudonyms.make_key(places.audit_dir / KEY_FILE)
        if elsewhere:
            refuse_other_splits(elsewhere, _read_splits(places))
        digests = label_staging.input_digests(sources, places.input_dir)
        tables = tuple((name, pseudonyms.private_digest(key, "table", digest)) for name, digest in digests)
        options = dataclasses.replace(options, masks=sources.mask_facts(), tables=tables)
        changed = False
        if places.frozen_file.exists():  # an earlier run was killed in its last act
            frozen = Frozen.load(places.frozen_file)
            if can_be_assembled(frozen, places.output_dir, places.records_dir):
                _refuse_other_options(frozen.options, frozen.key_fingerprint, options, key, places.output_dir)
                _finish(frozen, places, pool, beam_arguments)
                changed = True
            else:
                places.frozen_file.unlink()
        listed = list_archive(places.input_dir, places.listing)
        preparation = _complete_preparation(options, key, places)
        if preparation and _bound(places)["digest"] == listed[1] and not num_failed_for_now(preparation["counts"]):
            _clean(places)
            return preparation, changed
        frozen = _convert_and_freeze(
            options, sources, key, places, preparation, elsewhere, listed, pool, beam_arguments
        )
        return _finish(frozen, places, pool, beam_arguments), True


def _beam_arguments(beam_options: Sequence[str], num_workers: int) -> list[str]:
    if importlib.util.find_spec("apache_beam") is None:
        raise InputError("--runner=beam needs the package apache-beam: pip install 'ctssl_jax[beam]'")
    logging.disable(logging.WARNING)  # Beam complains that its own extras are not there
    from data_prep.pipeline import beam

    logging.disable(logging.NOTSET)
    return beam.pipeline_arguments(beam_options, num_workers)


def _with_absolute_paths(paths: Any) -> Any:
    """The same Places or LabelSources for workers that may have another working directory."""

    def absolute(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(absolute(item) for item in value)
        return value.absolute() if isinstance(value, Path) else value

    fields = [field.name for field in dataclasses.fields(paths)]
    return dataclasses.replace(paths, **{name: absolute(getattr(paths, name)) for name in fields})


def _complete_preparation(options: Options, key: bytes, places: Places) -> dict[str, Any] | None:
    """preparation.json of a dataset that an earlier run completed and this one may add to; None if there is none."""
    if not (places.output_dir / PREPARATION_FILE).exists():
        return None
    preparation = Dataset.open(places.output_dir).preparation
    _refuse_other_options(preparation["options"], preparation["key_fingerprint"], options, key, places.output_dir)
    if _bound(places)["fingerprint"] != preparation["fingerprint"]:
        raise InputError(
            f"{places.audit_dir}: not the audit directory of {places.output_dir}; "
            "give --audit_dir as it was when the dataset was made"
        )
    return preparation


def _refuse_other_options(
    made_with: dict[str, Any], fingerprint: str, options: Options, key: bytes, output_dir: Path
) -> None:
    asked = options.as_dict()
    if made_with.get("tables") != asked["tables"]:
        differs = [name for name, _ in made_with.get("tables", []) + asked["tables"]]
        raise InputError(
            f"{output_dir}: was prepared with other labels or attributes ({', '.join(dict.fromkeys(differs))}); give "
            "the same files in the same order, or another --output_dir"
        )
    if made_with.get("same_splits_as") and "same_splits_as" not in asked:
        raise InputError(
            f"{output_dir}: was prepared with --same_splits_as; give it again: patients who come may be known there"
        )
    for name in asked:
        if name != "same_splits_as" and made_with.get(name) != asked[name]:  # those datasets may grow, too
            raise InputError(
                f"{output_dir}: was prepared with {name}={_option_text(made_with.get(name))}, "
                f"not {_option_text(asked[name])}; give the same options or another --output_dir"
            )
    if fingerprint != pseudonyms.key_fingerprint(key):
        raise InputError(
            f"{output_dir}: was prepared with another pseudonym key; give that --pseudonym_key_file or --audit_dir"
        )


def _option_text(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}:{_option_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return (
            " ".join(_option_text(v) for v in value)
            if value and isinstance(value[0], list)
            else ",".join(f"{number:g}" for number in value)
        )
    return f"{value:g}" if isinstance(value, float) else str(value)


def _bound(places: Places) -> dict[str, str]:
    """The archive's `digest`, the dataset's `fingerprint` and its `output_dir` from here; all "" at first."""
    path = places.audit_dir / _BOUND_FILE
    return {"digest": "", "fingerprint": "", "output_dir": ""} | (json.loads(path.read_text()) if path.exists() else {})


def _relative_output_dir(places: Places) -> str:
    return os.path.relpath(places.output_dir.resolve(), places.audit_dir.resolve())


def _refuse_audit_dir_of_another(places: Places) -> None:
    """An audit directory is of one dataset: the one that lies where it lay, or has its fingerprint."""
    bound = _bound(places)
    if bound["output_dir"] in ("", _relative_output_dir(places)):
        return
    if (places.output_dir / PREPARATION_FILE).exists():
        if Dataset.open(places.output_dir).preparation["fingerprint"] == bound["fingerprint"]:
            return
    raise InputError(
        f"{places.audit_dir}: is the audit directory of another dataset, not of {places.output_dir}; give another "
        "--audit_dir, and to share the pseudonyms --pseudonym_key_file with its key file"
    )


def num_failed_for_now(counts: dict[str, Any]) -> int:
    """Series and files that the next run tries again."""
    return sum(counts[name].get(FAILED_FOR_NOW, 0) for name in ("series_rejected", "files_not_images"))


def _convert_and_freeze(
    options: Options,
    sources: LabelSources,
    key: bytes,
    places: Places,
    preparation: dict[str, Any] | None,
    elsewhere: KnownSplits | None,
    listed: tuple[int, str],
    pool: WorkerPool,
    beam_arguments: list[str] | None,
) -> Frozen:
    _remove_partial_files(places)
    places.notes_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    places.records_dir.mkdir(exist_ok=True)
    for stale in [*places.records_dir.glob("*.done"), *_unlisted_shards(places.output_dir, preparation)]:
        stale.unlink()
    old_volumes = Dataset.open(places.output_dir).volumes() if preparation else []
    volumes_of_exam = collections.defaultdict(list)
    for row in old_volumes:
        volumes_of_exam[row["exam_id"]].append(row["volume_id"])
    known = KnownVolumes(places.kept_notes_dir, key, volumes_of_exam, options.rules.reconstructions == "one_per_study")
    staged = label_staging.stage(
        sources, places.input_dir, places.work_dir / "labels.sqlite", places.work_dir / _VIOLATIONS_FILE
    )
    run = Conversion(
        input_dir=places.input_dir,
        notes_dir=places.notes_dir,
        records_dir=places.records_dir,
        rules=options.rules,
        windows=options.windows,
        image_size=options.image_size,
        key=key,
        labels=staged,
        options_digest=options.conversion_digest(),
    )
    num_files, digest = listed
    read = header_reader(sources.archive, sources.metadata_csv)
    plans = plan_archive(
        places.input_dir, places.work_dir / "plan", options.rules, num_files, pool, read, places.listing
    )
    label_counts = label_staging.match(staged, all_headers(plans))
    known_splits = _read_splits(places)
    patients = {row["patient_id"] for row in old_volumes}
    expected_slices, expected_volumes = 0, len(old_volumes)
    for plan in map(read_plan, plans):
        for exam in plan.exams:
            patients.add(pseudonyms.patient_pseudonym(key, exam[0].patient_key))
            if known.outcome(exam) is None:
                expected_volumes += 1
                expected_slices += len(exam[0].headers)
    if elsewhere:
        known_splits = {p: split for p, split in elsewhere.split_of.items() if p in patients} | known_splits
    if patients:
        splits.check_numbers(len(patients), expected_volumes, options.splits, options.holdout_volumes)
    _convert(run, plans, known, expected_slices, pool, places.work_dir, beam_arguments)
    new_volumes: dict[str, tuple[dict[str, Any], int]] = {}
    with open(places.work_dir / "sources.csv", "w", newline="", errors="backslashreplace") as file:
        account = Account(file)
        for plan in map(read_plan, plans):
            outcomes = []
            for rejection in plan.rejections:
                outcomes += known.outcome_of_rejection(rejection, rejected_row(key, rejection))
            for exam in plan.exams:
                notes = known.outcome(exam)
                if notes is None:
                    notes = [read_note(note_path(run, exam_key(run, exam)))]
                    new_volumes |= {note.key: (note.volume, note.record_bytes) for note in notes if note.volume}
                outcomes += notes
            account.add(outcomes, plan.not_images)
        file.flush()
        os.fsync(file.fileno())
    counts = account.counts(num_files) | label_counts
    counts["volumes_without_files"] = len({row["volume_id"] for row in old_volumes} - account.volumes)
    if not (new_volumes or old_volumes):
        reasons = [f"{number} {reason}" for reason, number in counts["series_rejected"].items()]
        reasons += [f"{number} files {reason}" for reason, number in counts["files_not_images"].items()]
        raise InputError(
            f"--input_dir={places.input_dir}: no usable chest CT in {num_files} files ({', '.join(reasons)}); "
            f"the reason of each file is in {places.work_dir / 'sources.csv'}"
        )
    frozen = freeze(
        options=options.as_dict(),
        key=key,
        archive_digest=digest,
        new_volumes=new_volumes,
        old_volumes=old_volumes,
        old_preparation=preparation,
        known_splits=known_splits,
        rejected=account.rejected,
        counts=counts,
        labels=staged.facts,
    )
    frozen.save(places.frozen_file)
    return frozen


def _convert(
    run: Conversion,
    plans: list[Path],
    known: KnownVolumes,
    expected_slices: int,
    pool: WorkerPool,
    work_dir: Path,
    beam_arguments: list[str] | None,
) -> None:
    """Converts every exam that has no note yet."""
    with Progress("converting", "slices", expected_slices) as progress:

        def todo() -> Iterator[tuple[Path, int, list]]:
            for path in plans:
                for position, exam in enumerate(read_plan(path).exams):
                    if known.outcome(exam) is not None:
                        continue
                    if is_converted(run, exam):
                        progress.advance(len(exam[0].headers), already_there=True)
                    else:
                        yield path, position, exam

        if beam_arguments is not None:
            from data_prep.pipeline import beam

            exams_of_plan, num_slices = collections.defaultdict(list), 0
            for path, position, exam in todo():
                exams_of_plan[path].append(position)
                num_slices += len(exam[0].headers)
            beam.convert(run, exams_of_plan, work_dir, beam_arguments)
            progress.advance(num_slices)
            return
        tasks = ((run, exam) for _, _, exam in todo())
        for (_, exam), result in pool.run(convert.convert_exam, tasks):
            if isinstance(result, WorkerDied):
                write_note(run, convert.note_of_crash(run, exam))
            progress.advance(len(exam[0].headers))


def _finish(frozen: Frozen, places: Places, pool: WorkerPool, beam_arguments: list[str] | None) -> dict[str, Any]:
    _remove_partial_files(places)
    if beam_arguments is not None:  # `assemble` then finds the shards written
        from data_prep.pipeline import beam

        beam.write_shards(frozen, places.frozen_file, places.output_dir, places.records_dir, beam_arguments)
    preparation = assemble(frozen, places.output_dir, places.records_dir, places.notes_dir, places.kept_notes_dir, pool)
    _write_private(places.audit_dir / "splits.json", frozen.splits)
    keep_notes(frozen, places.notes_dir, places.kept_notes_dir)
    for name in ("sources.csv", _VIOLATIONS_FILE):
        if (places.work_dir / name).exists():
            os.replace(places.work_dir / name, places.audit_dir / name)
    bound = {
        "digest": frozen.archive_digest,
        "fingerprint": preparation["fingerprint"],
        "output_dir": _relative_output_dir(places),
    }
    _write_private(places.audit_dir / _BOUND_FILE, bound)
    places.frozen_file.unlink()
    sync_directory(places.work_dir)
    _clean(places)
    return preparation


def _write_private(path: Path, content: dict[str, str]) -> None:
    write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def _read_splits(places: Places) -> dict[str, str]:
    path = places.audit_dir / "splits.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _clean(places: Places) -> None:
    remove_tree(places.records_dir)
    remove_tree(places.work_dir)


def _remove_partial_files(places: Places) -> None:
    for directory in (places.output_dir, places.records_dir, places.audit_dir, places.work_dir, places.notes_dir):
        for stale in directory.glob(f"*{PARTIAL}"):
            if stale.is_dir():  # of a task under Beam
                remove_tree(stale)
            else:
                stale.unlink(missing_ok=True)


def _unlisted_shards(output_dir: Path, preparation: dict[str, Any] | None) -> list[Path]:
    """Shards of a run that was killed and whose decisions are gone."""
    listed = preparation["checksums"] if preparation else {}
    return [path for path in output_dir.glob("*.array_record-*") if path.name not in listed]
