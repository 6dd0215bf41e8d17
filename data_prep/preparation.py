"""DICOM archive -> dataset directory: the steps, in order, each of which can be killed and run again.

    list files -> read headers -> plan exams -> convert each exam (staged) -> freeze all decisions -> shards, tables

The private audit directory holds what links pseudonyms to the archive: the key, the split of each patient,
`sources.csv` (what became of each file), and the notes that a grown archive is compared with.
"""

import collections
import contextlib
import csv
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep import conversion, dataset, deidentify, splits
from data_prep.assembly import Frozen, assemble, freeze, keep_notes, remove_tree
from data_prep.dicom import Rules
from data_prep.growth import KnownVolumes
from data_prep.planning import list_archive, plan_archive, read_plan
from data_prep.workers import Progress, WorkerDied, WorkerPool, usable_cores

_SOURCE_COLUMNS = ("path", "member", "outcome", "pseudonym", "reason", "detail")
_FINGERPRINT_FILE = "archive.json"
_BYTES_PER_PIXEL = 0.34  # zstd-1 on windowed CT slices, measured


class PreparationError(ValueError):
    """Something that the user gave cannot work, or the archive changed; one line with the remedy."""


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

    def as_dict(self) -> dict[str, Any]:
        """Flat and in the types that JSON gives back."""
        fields = dataclasses.asdict(self)
        fields = fields | fields.pop("rules")
        return json.loads(json.dumps(fields))

    def conversion_digest(self) -> str:
        """Of the options that the conversion of an exam depends on: with other splits its result can stay."""
        relevant = (self.archive, self.windows, self.image_size, dataclasses.astuple(self.rules))
        return hashlib.sha256(repr(relevant).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Places:
    """The directories of a preparation."""

    input_dir: Path
    output_dir: Path
    audit_dir: Path

    @property
    def records_dir(self) -> Path:  # staged volumes: as public as the dataset, and as large
        return self.output_dir / ".work"

    @property
    def work_dir(self) -> Path:  # what names source files
        return self.audit_dir / "work"

    @property
    def notes_dir(self) -> Path:
        return self.work_dir / "notes"

    @property
    def kept_notes_dir(self) -> Path:
        return self.audit_dir / "notes"

    @property
    def frozen_file(self) -> Path:
        return self.work_dir / "frozen.json"


def default_audit_dir(output_dir: Path) -> Path:
    return output_dir.with_name(output_dir.name + "-audit")


def check_places(places: Places) -> None:
    """Raises PreparationError for directories that contain one another, are missing or are used otherwise."""
    if not places.input_dir.is_dir():
        raise PreparationError(f"--input_dir={places.input_dir}: no such directory; give the folder of the scans")
    named = {"--input_dir": places.input_dir, "--output_dir": places.output_dir, "--audit_dir": places.audit_dir}
    for (a, path_a), (b, path_b) in itertools.permutations(named.items(), 2):
        if path_a.resolve().is_relative_to(path_b.resolve()):
            raise PreparationError(f"{a}={path_a} lies inside {b}={path_b}; choose a directory beside it")
    for path in (places.output_dir, places.audit_dir):
        if path.exists() and not path.is_dir():
            raise PreparationError(f"{path}: is a file; choose another directory")
    ours = (dataset.PREPARATION_FILE, dataset.VOLUMES_FILE, places.records_dir.name)
    if places.output_dir.is_dir() and not any((places.output_dir / name).exists() for name in ours):
        if any(places.output_dir.iterdir()):
            raise PreparationError(f"--output_dir={places.output_dir}: holds other files; choose a new directory")


def prepare(
    options: Options,
    places: Places,
    *,
    num_workers: int | None = None,
    pseudonym_key_file: Path | None = None,
) -> tuple[dict[str, Any], bool]:
    """Prepares a dataset, or carries on with it, or adds what came to the archive.

    Returns the content of its preparation.json, and whether there was anything to do.

    Raises:
        PreparationError, ValueError: unusable directories or options, too few patients.
        OSError: the archive went away or the output can't be written.
    """
    check_places(places)
    num_workers = num_workers or usable_cores()
    key = deidentify.read_key(pseudonym_key_file) if pseudonym_key_file else None
    for directory, mode in ((places.audit_dir, 0o700), (places.output_dir, 0o777)):
        try:
            directory.mkdir(mode=mode, parents=True, exist_ok=True)
        except OSError as error:
            raise PreparationError(f"{directory}: cannot make this directory: {error.strerror}") from None
    with _lock(places.output_dir), _lock(places.audit_dir), WorkerPool(num_workers) as pool:
        places.audit_dir.chmod(0o700)
        if key is None:
            key = deidentify.make_key(places.audit_dir / "pseudonym_key")
        listed = list_archive(places.input_dir)
        if places.frozen_file.exists():  # an earlier run was killed in its last act
            frozen = Frozen.load(places.frozen_file)
            _refuse_other_options(frozen.options, frozen.key_fingerprint, options, key, places.output_dir)
            preparation, changed = _finish(frozen, places, pool), True
        else:
            preparation, changed = _complete_preparation(options, key, places), False
        if preparation and _known_archive(places) == listed[1]:
            _clean(places)
            return preparation, changed
        frozen = _convert_and_freeze(options, key, places, preparation, listed, pool)
        return _finish(frozen, places, pool), True


def dry_run(options: Options, places: Places, *, num_workers: int | None = None) -> dict[str, Any]:
    """What the headers say of an archive; writes nothing but temporary files, which it removes.

    Returns counts as in preparation.json, with `exams`, `patients`, `slices` and `bytes` expected: pixels may refuse
    more.
    """
    check_places(places)
    num_files, _ = list_archive(places.input_dir)
    tally = {name: collections.Counter() for name in ("dropped", "rejected", "not_images", "series")}
    files = exams = slices = 0
    patients = set()
    with tempfile.TemporaryDirectory() as folder, WorkerPool(num_workers or usable_cores()) as pool:
        for path in plan_archive(places.input_dir, Path(folder), options.rules, num_files, pool):
            plan = read_plan(path)
            for rejection in plan.rejections:
                tally["series"][rejection.reason] += 1
                tally["rejected"][rejection.reason] += len({header.source for header in rejection.headers})
            for exam in plan.exams:
                accounted = {header.source for header in exam[0].headers}
                exams, slices, files = exams + 1, slices + len(exam[0].headers), files + len(accounted)
                patients.add(exam[0].patient_key)
                dropped = {header.source: reason for header, reason in exam[0].dropped}
                dropped |= {h.source: "duplicate_slice" for group in exam[0].duplicates for h in group}
                tally["dropped"].update(reason for source, reason in dropped.items() if source not in accounted)
                accounted |= set(dropped)
                for other in exam[1:]:
                    others = {header.source for header in other.all_headers} - accounted
                    accounted |= others
                    tally["series"]["other_reconstruction"] += 1
                    tally["rejected"]["other_reconstruction"] += len(others)
            tally["not_images"].update(entry.reason for entry in plan.not_images)
    counts = _counts(num_files, files, tally)
    size = slices * options.image_size**2 * len(options.windows) * _BYTES_PER_PIXEL
    return counts | {"exams": exams, "patients": len(patients), "slices": slices, "bytes": int(size)}


def _counts(num_files: int, files_in_volumes: int, tally: dict[str, collections.Counter]) -> dict[str, Any]:
    counts = {
        "files": num_files,
        "files_in_volumes": files_in_volumes,
        "files_dropped": dict(sorted(tally["dropped"].items())),
        "files_rejected": dict(sorted(tally["rejected"].items())),
        "files_not_images": dict(sorted(tally["not_images"].items())),
        "series_rejected": dict(sorted(tally["series"].items())),
    }
    check_counts(counts)
    return counts


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """An advisory lock on the directory itself, which ends with the process, however it ends."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise PreparationError(
            f"{directory}: another data_prep.prepare is at work in it; wait for it or stop it"
        ) from None
    finally:
        os.close(descriptor)


def _complete_preparation(options: Options, key: bytes, places: Places) -> dict[str, Any] | None:
    """preparation.json of a dataset that an earlier run completed and this one may add to; None if there is none."""
    if not (places.output_dir / dataset.PREPARATION_FILE).exists():
        return None
    preparation = dataset.read_preparation(places.output_dir)
    _refuse_other_options(preparation["options"], preparation["key_fingerprint"], options, key, places.output_dir)
    if _known_archive(places) is None:
        raise PreparationError(
            f"{places.audit_dir}: not the audit directory of {places.output_dir}; "
            "give --audit_dir as it was when the dataset was made"
        )
    return preparation


def _refuse_other_options(
    made_with: dict[str, Any], fingerprint: str, options: Options, key: bytes, output_dir: Path
) -> None:
    asked = options.as_dict()
    for name in asked:
        if made_with.get(name) != asked[name]:
            raise PreparationError(
                f"{output_dir}: was prepared with {name}={_option_text(made_with.get(name))}, "
                f"not {_option_text(asked[name])}; give the same options or another --output_dir"
            )
    if fingerprint != deidentify.key_fingerprint(key):
        raise PreparationError(
            f"{output_dir}: was prepared with another pseudonym key; give that --pseudonym_key_file or --audit_dir"
        )


def _option_text(value: Any) -> str:
    if isinstance(value, list):
        return (
            " ".join(_option_text(v) for v in value)
            if value and isinstance(value[0], list)
            else ",".join(f"{number:g}" for number in value)
        )
    return f"{value:g}" if isinstance(value, float) else str(value)


def _known_archive(places: Places) -> str | None:
    path = places.audit_dir / _FINGERPRINT_FILE
    return json.loads(path.read_text())["digest"] if path.exists() else None


def _convert_and_freeze(
    options: Options,
    key: bytes,
    places: Places,
    preparation: dict[str, Any] | None,
    listed: tuple[int, str],
    pool: WorkerPool,
) -> Frozen:
    _remove_partial_files(places)
    places.notes_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    places.records_dir.mkdir(exist_ok=True)
    for stale in [*places.records_dir.glob("*.done"), *_unlisted_shards(places.output_dir, preparation)]:
        stale.unlink()
    old_volumes = dataset.read_volumes(places.output_dir) if preparation else []
    volumes_of_exam = collections.defaultdict(list)
    for row in old_volumes:
        volumes_of_exam[row["exam_id"]].append(row["volume_id"])
    known = KnownVolumes(places.kept_notes_dir, key, volumes_of_exam, options.rules.reconstructions == "one_per_study")
    run = conversion.Conversion(
        input_dir=places.input_dir,
        notes_dir=places.notes_dir,
        records_dir=places.records_dir,
        rules=options.rules,
        windows=options.windows,
        image_size=options.image_size,
        key=key,
        options_digest=options.conversion_digest(),
    )
    num_files, digest = listed
    plans = plan_archive(places.input_dir, places.work_dir / "plan", options.rules, num_files, pool)
    known_splits = _read_splits(places)
    patients = {row["patient_id"] for row in old_volumes}
    expected_slices = 0
    for plan in map(read_plan, plans):
        for exam in plan.exams:
            patients.add(deidentify.patient_pseudonym(key, exam[0].patient_key))
            expected_slices += 0 if known.outcome(exam) else len(exam[0].headers)
    if patients:
        splits.check_patients(len(patients), options.splits, options.holdout_volumes)
    _convert(run, plans, known, expected_slices, pool)
    new_volumes, rejected, counts = _collect(run, plans, known, places, num_files)
    if not (new_volumes or old_volumes):
        raise PreparationError(_nothing_taken(places.input_dir, counts))
    frozen = freeze(
        options=options.as_dict(),
        key=key,
        archive_digest=digest,
        new_volumes=new_volumes,
        old_volumes=old_volumes,
        old_preparation=preparation,
        known_splits=known_splits,
        rejected=rejected,
        counts=counts,
    )
    frozen.save(places.frozen_file)
    return frozen


def _nothing_taken(input_dir: Path, counts: dict[str, Any]) -> str:
    reasons = [f"{number} {reason}" for reason, number in counts["series_rejected"].items()]
    reasons += [f"{number} files {reason}" for reason, number in counts["files_not_images"].items()]
    return f"--input_dir={input_dir}: no usable chest CT in {counts['files']} files ({', '.join(reasons) or 'empty'})"


def _convert(
    run: conversion.Conversion, plans: list[Path], known: KnownVolumes, expected_slices: int, pool: WorkerPool
) -> None:
    """Converts every exam that has no note yet."""
    with Progress("converting", "slices", expected_slices) as progress:

        def tasks() -> Iterator[tuple]:
            for plan in map(read_plan, plans):
                for exam in plan.exams:
                    if known.outcome(exam):
                        continue
                    if _is_converted(run, exam):
                        progress.advance(len(exam[0].headers), already_there=True)
                    else:
                        yield run, exam

        for (_, exam), result in pool.run(conversion.convert_exam, tasks()):
            if isinstance(result, WorkerDied):
                conversion.write_note(run, conversion.note_of_crash(run, exam))
            progress.advance(len(exam[0].headers))


def _is_converted(run: conversion.Conversion, exam: list) -> bool:
    key = conversion.exam_key(run, exam)
    path = conversion.note_path(run, key)
    if not path.exists():
        return False
    taken = conversion.read_note(path).volume is not None
    return not taken or conversion.records_path(run.records_dir, key).exists()


def _collect(
    run: conversion.Conversion, plans: list[Path], known: KnownVolumes, places: Places, num_files: int
) -> tuple[dict[str, tuple[dict[str, Any], int]], list[dict[str, Any]], dict[str, Any]]:
    """What became of everything: new volumes by staged file, rows of rejected.csv, counts. Writes sources.csv.

    Raises:
        RuntimeError: a file is not accounted for, or twice.
    """
    new_volumes, rejected = {}, []
    tally = {name: collections.Counter() for name in ("dropped", "rejected", "not_images", "series")}
    in_volumes = total = 0
    with open(places.work_dir / "sources.csv", "w", newline="", errors="backslashreplace") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_SOURCE_COLUMNS)
        for plan in map(read_plan, plans):
            rows = []
            outcomes = [
                known.outcome_of_rejection(rejection, conversion.rejected_row(run.key, rejection))
                for rejection in plan.rejections
            ]
            for exam in plan.exams:
                note = known.outcome(exam)
                if note is None:
                    note = conversion.read_note(conversion.note_path(run, conversion.exam_key(run, exam)))
                    if note.volume is not None:
                        new_volumes[note.key] = (note.volume, note.record_bytes)
                outcomes.append(note)
            for note in outcomes:
                volume = note.volume["volume_id"] if note.volume else ""
                rows += [(*source[:2], "volume", volume, "", "") for source in note.taken]
                rows += [(*source[:2], "dropped", volume, reason, "") for source, reason in note.dropped]
                in_volumes += len(note.taken)
                tally["dropped"].update(reason for _, reason in note.dropped)
                for row in note.rejected:
                    rows += [(*source[:2], "rejected", row.series_id, row.reason, row.detail) for source in row.sources]
                    tally["rejected"][row.reason] += len(row.sources)
                    tally["series"][row.reason] += 1
                    rejected.append(
                        {
                            "series_id": row.series_id,
                            "num_files": len(row.sources),
                            "reason": row.reason,
                            "detail": row.detail,
                        }
                    )
            for entry in plan.not_images:
                rows.append((*entry.source[:2], "not_an_image", "", entry.reason, entry.detail))
                tally["not_images"][entry.reason] += 1
            if len({row[:2] for row in rows}) != len(rows):
                twice = collections.Counter(row[:2] for row in rows).most_common(1)[0][0]
                raise RuntimeError(f"{'/'.join(twice)} is accounted for twice; please report this")
            writer.writerows(sorted(rows))
            total += len(rows)
        file.flush()
        os.fsync(file.fileno())
    if total != num_files:
        raise PreparationError(
            f"--input_dir={places.input_dir}: {num_files} files were listed and {total} read; "
            "if files come and go, run again when the archive is at rest"
        )
    return new_volumes, rejected, _counts(num_files, in_volumes, tally)


def check_counts(counts: dict[str, Any]) -> None:
    """Raises RuntimeError unless the files in volumes, dropped, rejected and without image are all files."""
    parts = [sum(counts[name].values()) for name in ("files_dropped", "files_rejected", "files_not_images")]
    if counts["files_in_volumes"] + sum(parts) != counts["files"]:
        raise RuntimeError(f"{counts['files']} files, but {counts['files_in_volumes']} + {parts} are accounted for")


def _finish(frozen: Frozen, places: Places, pool: WorkerPool) -> dict[str, Any]:
    _remove_partial_files(places)
    preparation = assemble(frozen, places.output_dir, places.records_dir, pool)
    _write_private(places.audit_dir / "splits.json", frozen.splits)
    keep_notes(frozen, places.notes_dir, places.kept_notes_dir)
    sources = places.work_dir / "sources.csv"
    if sources.exists():
        os.replace(sources, places.audit_dir / "sources.csv")
    _write_private(places.audit_dir / _FINGERPRINT_FILE, {"digest": frozen.archive_digest})
    places.frozen_file.unlink()
    dataset.sync_directory(places.work_dir)
    _clean(places)
    return preparation


def _write_private(path: Path, content: dict[str, str]) -> None:
    dataset.write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def _read_splits(places: Places) -> dict[str, str]:
    path = places.audit_dir / "splits.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _clean(places: Places) -> None:
    remove_tree(places.records_dir)
    remove_tree(places.work_dir)


def _remove_partial_files(places: Places) -> None:
    for directory in (places.output_dir, places.records_dir, places.audit_dir, places.work_dir, places.notes_dir):
        for stale in directory.glob(f"*{dataset.PARTIAL}"):
            stale.unlink(missing_ok=True)


def _unlisted_shards(output_dir: Path, preparation: dict[str, Any] | None) -> list[Path]:
    """Shards of a run that was killed and whose decisions are gone."""
    listed = preparation["checksums"] if preparation else {}
    return [path for path in output_dir.glob("*.array_record-*") if path.name not in listed]
