"""The last step of a preparation: staged volumes -> shards, tables, metadata.

All decisions (splits, order, the shard of each volume) are frozen in one file before the first
shard is written. From then on a killed run can be continued: sidecars mark the finished shards.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.dataset.schema import (
    LABELS_FILE,
    PREPARATION_FILE,
    REGIONS_FILE,
    REJECTED_COLUMNS,
    REJECTED_FILE,
    SLICES_FILE,
    SPLITS,
    VOLUME_COLUMNS,
    VOLUMES_FILE,
    make_preparation,
    rules_of,
    shard_name,
    table_columns,
    versions,
)
from data_prep.dataset.storage import read_records, write_records, write_table, writing_table
from data_prep.dataset.tfds import complete
from data_prep.pipeline.notes import ExamNote, read_note, records_path
from data_prep.pipeline.splits import assign_splits, cut_into_shards, running_totals
from data_prep.privacy import pseudonyms
from data_prep.scan.rules import VERSION
from data_prep.system.errors import InputError, RunFailed
from data_prep.system.files import (
    file_sha256,
    sync_directory,
    unique_name,
    write_file,
    written_whole,
)
from data_prep.system.workers import Progress, WorkerDied, WorkerPool

_MEGABYTE = 1_000_000


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of volumes.csv that are made anew each time they are read: a million do not fit into
    memory."""

    make: Callable[[], Iterator[dict[str, Any]]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.make()


@dataclasses.dataclass(frozen=True, slots=True)
class NewVolume:
    """What decides about a volume that this run adds."""

    volume_id: str
    patient_id: str
    num_slices: int
    record_bytes: int  # of the staged volume


@dataclasses.dataclass(frozen=True)
class FrozenPlan:
    """All decisions about a dataset. Stored in the private work directory: a line of JSON for each
    field, `[name, value]`, then one for each volume."""

    archive_digest: str
    options: dict[str, Any]
    key_fingerprint: str
    splits: dict[str, str]  # patient -> split, also of patients whose scans are gone
    volumes: Iterable[dict[str, Any]]  # rows of volumes.csv in their order
    rejected: list[dict[str, Any]]
    counts: dict[str, Any]
    labels: dict[str, Any]  # of preparation.json
    shard_lengths: dict[str, list[int]]
    new_shards: list[dict[str, Any]]  # name, num_records, staged: keys of the staged files in order
    kept_notes: dict[str, str]  # volume_id -> key of its note, for new volumes
    old_checksums: dict[str, str]
    rules: dict[str, int]  # volumes by the version of the rules
    patients: dict[str, Any]  # `KnownPatients.as_dict`

    def save(self, path: Path) -> "FrozenPlan":
        """Writes the file that `load` reads; returns the same plan, whose rows are read from it."""
        with (
            written_whole(path, unique_name(path)) as temporary,
            open(temporary, "x", encoding="utf-8") as file,
        ):
            for name, value in vars(self).items():
                if name != "volumes":
                    file.write(json.dumps([name, value]) + "\n")
            start = file.tell()
            for row in self.volumes:
                file.write(json.dumps(row) + "\n")
        rows = Rows(functools.partial(_rows_from, path, start))
        return dataclasses.replace(self, volumes=rows)

    @staticmethod
    def load(path: Path) -> "FrozenPlan":
        """Raises InputError if the file is damaged."""
        try:
            with open(path, encoding="utf-8") as file:
                first = json.loads(file.readline())
                if isinstance(first, dict):  # of a program that wrote all as one object
                    # before version 2 of the rules
                    before = {"rules": {"1": len(first["volumes"])}, "patients": {}}
                    return FrozenPlan(**before | first)
                fields = [first]
                while len(fields) < len(dataclasses.fields(FrozenPlan)) - 1:
                    fields.append(json.loads(file.readline()))
                stored, start = dict(fields), file.tell()
            return FrozenPlan(**stored, volumes=Rows(functools.partial(_rows_from, path, start)))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path} is damaged ({str(error).splitlines()[0]}); remove it and run again"
            ) from None


def _rows_from(path: Path, start: int) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        file.seek(start)
        for line in file:
            yield json.loads(line)


def freeze(
    *,
    options: dict[str, Any],
    key: bytes,
    archive_digest: str,
    new_volumes: Mapping[str, NewVolume],
    row_of: Callable[[str], dict[str, Any]],
    old_volumes: list[dict[str, Any]],
    old_preparation: dict[str, Any] | None,
    known_splits: dict[str, str],
    rejected: list[dict[str, Any]],
    counts: dict[str, Any],
    labels: dict[str, Any],
    known_patients: dict[str, Any],
) -> FrozenPlan:
    """Decides splits, order and shards.

    `new_volumes`: by key of the staged file; `row_of` such a key: the row of volumes.csv, without
    split and first_record. New volumes are in the order of their keyed hash, after the volumes of
    earlier runs.

    Raises:
        InputError: too few patients for the splits.
        RuntimeError: a volume would be in the dataset twice (a bug).
    """

    def by_hash(pseudonym: str) -> str:
        return pseudonyms.shuffling_number(key, pseudonym)

    names = [row["volume_id"] for row in old_volumes]
    names += [volume.volume_id for volume in new_volumes.values()]
    if len(set(names)) < len(names):
        name, number = collections.Counter(names).most_common(1)[0]
        raise RuntimeError(
            f"volume {name} would be in the dataset {number} times; please report this"
        )
    patients = collections.Counter(row["patient_id"] for row in old_volumes)
    patients.update(volume.patient_id for volume in new_volumes.values())
    volumes_per_patient = {patient: patients[patient] for patient in sorted(patients, key=by_hash)}
    splits = known_splits | assign_splits(
        volumes_per_patient, options["splits"], options["holdout_volumes"], known_splits
    )
    new_shards, shard_lengths = [], {}
    # of each split: rows that are there, keys of the added ones, record that each begins with
    parts: list[tuple[str, list[dict[str, Any]], list[str], list[int]]] = []
    for split in SPLITS:
        present = [row for row in old_volumes if row["split"] == split]
        added = [name for name, volume in new_volumes.items() if splits[volume.patient_id] == split]
        added.sort(key=lambda name: by_hash(new_volumes[name].volume_id))
        if not present and not added:
            continue
        old_splits = old_preparation["splits"] if old_preparation else {}
        lengths = list(old_splits[split]["shard_lengths"]) if split in old_splits else []
        slices = [new_volumes[name].num_slices for name in added]
        before = sum(lengths)
        parts.append((split, present, added, [before + n for n in running_totals(slices)]))
        sizes = [new_volumes[name].record_bytes for name in added]
        for part in cut_into_shards(sizes, int(options["shard_size_mb"] * _MEGABYTE)):
            num_records = sum(slices[part.start : part.stop])
            shard = shard_name(split, len(lengths))
            staged = added[part.start : part.stop]
            new_shards.append({"name": shard, "num_records": num_records, "staged": staged})
            lengths.append(num_records)
        shard_lengths[split] = lengths

    def rows() -> Iterator[dict[str, Any]]:
        for split, present, added, firsts in parts:
            yield from present
            for name, first in zip(added, firsts, strict=True):
                yield row_of(name) | {"split": split, "first_record": first}

    return FrozenPlan(
        archive_digest=archive_digest,
        options=options,
        key_fingerprint=pseudonyms.key_fingerprint(key),
        splits=dict(sorted(splits.items())),
        volumes=Rows(rows),
        rejected=sorted(rejected, key=lambda row: tuple(str(value) for value in row.values())),
        counts=counts,
        labels=labels,
        shard_lengths=shard_lengths,
        new_shards=new_shards,
        kept_notes={volume.volume_id: name for name, volume in new_volumes.items()},
        old_checksums=dict(old_preparation["checksums"]) if old_preparation else {},
        rules=_rules(old_preparation, len(old_volumes), len(new_volumes)),
        patients=known_patients,
    )


def _rules(old_preparation: Mapping[str, Any] | None, num_old: int, num_new: int) -> dict[str, int]:
    """Volumes by the version of the rules that read them."""
    rules = dict(rules_of(old_preparation, num_old)) if old_preparation else {}
    if num_new:
        rules[str(VERSION)] = rules.get(str(VERSION), 0) + num_new
    return rules


def can_be_assembled(frozen: FrozenPlan, output_dir: Path, records_dir: Path) -> bool:
    """Whether each shard is written or has its staged volumes; False if someone removed them."""
    old_shards = [name for name in frozen.old_checksums if ".array_record-" in name]
    return all((output_dir / name).exists() for name in old_shards) and all(
        (
            sidecar_path(records_dir, shard["name"]).exists()
            and (output_dir / shard["name"]).exists()
        )
        or all(records_path(records_dir, key).exists() for key in shard["staged"])
        for shard in frozen.new_shards
    )


def assemble(
    frozen: FrozenPlan,
    output_dir: Path,
    records_dir: Path,
    notes_dir: Path,
    kept_notes_dir: Path,
    pool: WorkerPool,
) -> dict[str, Any]:
    """Writes the missing files of a frozen dataset, preparation.json last, and returns its content.

    The notes of the volumes hold their labels. They are in `notes_dir`, or in `kept_notes_dir` once
    `keep_notes` has moved them.

    Raises:
        OSError: the output can't be written.
    """
    (output_dir / PREPARATION_FILE).unlink(missing_ok=True)  # incomplete until the end
    sync_directory(output_dir)
    checksums = {n: c for n, c in frozen.old_checksums.items() if ".array_record-" in n}
    checksums |= _write_shards(frozen, output_dir, records_dir, pool)
    write_table(output_dir / VOLUMES_FILE, VOLUME_COLUMNS, frozen.volumes)
    write_table(output_dir / REJECTED_FILE, REJECTED_COLUMNS, frozen.rejected)
    tables, label_counts = _write_label_tables(frozen, output_dir, notes_dir, kept_notes_dir)
    preparation = make_preparation(
        archive=frozen.options["archive"],
        windows=[{"level": level, "width": width} for level, width in frozen.options["windows"]],
        image_size=frozen.options["image_size"],
        volumes=frozen.volumes,
        shard_lengths=frozen.shard_lengths,
        labels=frozen.labels,
        masks=frozen.options["masks"],
        key_fingerprint=frozen.key_fingerprint,
        options=frozen.options,
        versions=versions(),
        counts=frozen.counts | ({"labels": label_counts} if label_counts else {}),
        rules=frozen.rules,
    )
    return complete(output_dir, preparation, (VOLUMES_FILE, REJECTED_FILE, *tables), checksums)


def _write_label_tables(
    frozen: FrozenPlan, output_dir: Path, notes_dir: Path, kept_notes_dir: Path
) -> tuple[list[str], dict[str, dict[str, int]]]:
    """Writes the tables of labels and regions that the dataset has.

    Returns:
        Their file names, and the number of rows (of slices.csv or labels.csv) by class of each of
        their labels, and `missing`.
    """
    columns = table_columns({"labels": frozen.labels, "masks": frozen.options["masks"]})
    numbers = {name: collections.Counter() for name in frozen.labels}
    with contextlib.ExitStack() as stack:
        write_row = {
            name: stack.enter_context(writing_table(output_dir / name, types))
            for name, types in columns.items()
        }
        for row in frozen.volumes if columns else ():
            labels = _note_of(row["volume_id"], frozen, notes_dir, kept_notes_dir).labels
            volume = {"volume_id": row["volume_id"]}
            by_slice = [
                dict(zip(labels["slices"], c, strict=True))
                for c in zip(*labels["slices"].values(), strict=True)
            ]
            rows = {
                SLICES_FILE: [
                    volume | {"slice_index": i} | cells for i, cells in enumerate(by_slice)
                ],
                LABELS_FILE: [volume | labels["volume"]],
                REGIONS_FILE: [volume | region for region in labels["regions"]],
            }
            for name in columns:
                for cells in rows[name]:
                    write_row[name](cells)
                    for label in numbers.keys() & cells.keys():
                        numbers[label][cells[label]] += 1
    counts = {}
    for label in (label for types in columns.values() for label in types if numbers.get(label)):
        classes = enumerate(frozen.labels[label]["classes"])
        by_class = {text: numbers[label][index] for index, text in classes}
        counts[label] = by_class | {"missing": numbers[label][None]}
    return list(columns), counts


def _note_of(volume_id: str, frozen: FrozenPlan, notes_dir: Path, kept_notes_dir: Path) -> ExamNote:
    new = notes_dir / f"{frozen.kept_notes.get(volume_id, '')}.json"
    return read_note(new if new.exists() else kept_notes_dir / f"{volume_id}.json")


def _write_shards(
    frozen: FrozenPlan, output_dir: Path, records_dir: Path, pool: WorkerPool
) -> dict[str, str]:
    checksums = {}
    tasks = []
    total = sum(shard["num_records"] for shard in frozen.new_shards)
    with Progress("writing shards", "slices", total) as progress:
        for shard in frozen.new_shards:
            sidecar = sidecar_path(records_dir, shard["name"])
            if sidecar.exists() and (output_dir / shard["name"]).exists():
                checksums[shard["name"]] = sidecar.read_text()
                progress.advance(shard["num_records"], already_there=True)
            else:
                tasks.append(
                    (output_dir / shard["name"], records_dir, shard["staged"], shard["num_records"])
                )
        for (path, _, _, num_records), checksum in pool.run(write_shard, tasks):
            if isinstance(checksum, WorkerDied):
                raise RunFailed(
                    f"{path}: writing the shard was killed; check memory and disk, then run again"
                )
            checksums[path.name] = checksum
            progress.advance(num_records)
    return checksums


def write_shard(path: Path, records_dir: Path, staged: list[str], num_records: int) -> str:
    """Writes a shard of staged exams, then its sidecar, then removes the staged files; returns the
    SHA-256 of the shard.

    Raises:
        OSError: it cannot be written.
        RunFailed: the exams hold another number of records.
    """
    written = write_records(path, _staged_records(records_dir, staged))
    if written != num_records:
        raise RunFailed(
            f"{path}: {written} records instead of {num_records}; prepare into a new directory"
        )
    checksum = file_sha256(path)
    write_file(sidecar_path(records_dir, path.name), checksum.encode())
    for key in staged:
        records_path(records_dir, key).unlink(missing_ok=True)
    return checksum


def _staged_records(records_dir: Path, staged: list[str]) -> Iterator[bytes]:
    for key in staged:
        yield from read_records(records_path(records_dir, key))


def sidecar_path(records_dir: Path, shard: str) -> Path:
    """The file whose presence means that a shard is finished. It holds the SHA-256 of the shard."""
    return records_dir / f"{shard}.done"


def keep_notes(frozen: FrozenPlan, notes_dir: Path, kept_notes_dir: Path) -> None:
    """Moves the notes of the new volumes to the directory in which later runs look for them."""
    kept_notes_dir.mkdir(mode=0o700, exist_ok=True)
    for volume, key in frozen.kept_notes.items():
        note = notes_dir / f"{key}.json"
        if note.exists():
            os.replace(note, kept_notes_dir / f"{volume}.json")
    sync_directory(kept_notes_dir)
