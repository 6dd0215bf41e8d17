"""Checks of a finished dataset: nothing is damaged, every record decodes, neighbours are neighbours."""

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import dataset
from data_prep.geometry import measure_stack
from data_prep.workers import Progress, WorkerDied, WorkerPool


def verify(dataset_dir: Path, pool: WorkerPool) -> list[str]:
    """Problems of a dataset, each one line that names the file; [] if it is sound.

    Checksums; the tables agree with the shards and with each other; no volume is there twice, no patient in two splits;
    the records of a volume are consecutive, their positions increase, and `pair_valid` is false exactly at its gaps,
    jumps and end.
    """
    preparation = dataset.read_preparation(dataset_dir)
    volumes = dataset.read_volumes(dataset_dir)
    problems = list(_table_problems(dataset_dir, preparation, volumes))
    tasks = []
    for split in preparation["splits"]:
        first = 0
        rows = [row for row in volumes if row["split"] == split]
        for shard in dataset.split_shards(preparation, split):
            records = range(first, first + shard.num_records)
            inside = [row for row in rows if row["first_record"] in records]
            checksum = preparation["checksums"].get(shard.name, "")
            tasks.append((dataset_dir, preparation, shard, checksum, first, inside))
            first = records.stop
    total = sum(task[2].num_records for task in tasks)
    with Progress("verifying", "slices", total) as progress:
        for task, result in pool.run(_shard_problems, tasks):
            name = task[2].name
            problems += [f"{name}: reading it crashed"] if isinstance(result, WorkerDied) else result
            progress.advance(task[2].num_records)
    return problems


def _table_problems(dataset_dir: Path, preparation: dict[str, Any], volumes: list[dict[str, Any]]) -> Iterator[str]:
    for name, checksum in preparation["checksums"].items():
        path = dataset_dir / name
        if not path.is_file():
            yield f"{name}: missing"
        elif ".array_record-" not in name and dataset.file_sha256(path) != checksum:
            yield f"{name}: checksum differs from preparation.json"
    if dataset.dataset_fingerprint(preparation["checksums"]) != preparation["fingerprint"]:
        yield "preparation.json: the fingerprint is not that of the checksums"
    for volume, number in collections.Counter(row["volume_id"] for row in volumes).items():
        if number > 1:
            yield f"volumes.csv: volume {volume} is there {number} times"
    splits_of_patient: dict[str, set[str]] = {}
    for row in volumes:
        splits_of_patient.setdefault(row["patient_id"], set()).add(row["split"])
    for patient, splits in splits_of_patient.items():
        if len(splits) > 1:
            yield f"volumes.csv: patient {patient} is in the splits {', '.join(sorted(splits))}"
    for split, facts in preparation["splits"].items():
        rows = [row for row in volumes if row["split"] == split]
        counted = {
            "num_volumes": len(rows),
            "num_patients": len({row["patient_id"] for row in rows}),
            "num_slices": sum(row["num_slices"] for row in rows),
        }
        for name, number in counted.items():
            if facts[name] != number:
                yield f"volumes.csv: {name} of {split} is {number}, preparation.json says {facts[name]}"
        expected = 0
        for row in rows:
            if row["first_record"] != expected:
                yield f"volumes.csv: volume {row['volume_id']} starts at {row['first_record']}, not {expected}"
            expected = row["first_record"] + row["num_slices"]
    for row in volumes:
        if row["split"] not in preparation["splits"]:
            yield f"volumes.csv: volume {row['volume_id']} is in split {row['split']!r}, which does not exist"


def _shard_problems(
    dataset_dir: Path,
    preparation: dict[str, Any],
    shard: dataset.Shard,
    checksum: str,
    first: int,
    rows: list[dict[str, Any]],
) -> list[str]:
    """Problems of one shard, whose first record is record `first` of its split."""
    path = dataset_dir / shard.name
    if not path.is_file():
        return []  # named already
    problems = []
    if dataset.file_sha256(path) != checksum:
        problems.append(f"{shard.name}: checksum differs from preparation.json")
    shape = (preparation["image_size"], preparation["image_size"], preparation["channels"])
    try:
        records = [_without_image(dataset.decode_record(r, shape)) for r in dataset.read_records(path)]
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        return [*problems, f"{shard.name}: a record does not decode ({' '.join(str(error).split())[:80]})"]
    if len(records) != shard.num_records:
        return [*problems, f"{shard.name}: {len(records)} records, preparation.json says {shard.num_records}"]
    at = 0
    for row in rows:
        if row["first_record"] - first != at:
            problems.append(f"{shard.name}: volume {row['volume_id']} does not follow the one before it")
        part = records[at : at + row["num_slices"]]
        problems += [f"{shard.name}: volume {row['volume_id']}: {fault}" for fault in _volume_faults(row, part)]
        at += row["num_slices"]
    if at != len(records):
        problems.append(f"{shard.name}: {len(records) - at} records belong to no volume of volumes.csv")
    return problems


def _without_image(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "image"}


def _volume_faults(row: dict[str, Any], records: list[dict[str, Any]]) -> Iterator[str]:
    if [record["volume_id"] for record in records] != [row["volume_id"]] * row["num_slices"]:
        yield "its records are missing or another volume's"
        return
    if [record["slice_index"] for record in records] != list(range(row["num_slices"])):
        yield "slice_index does not count 0, 1, 2, ..."
    positions = np.array([record["position_mm"] for record in records], dtype=np.float64)
    if np.any(np.diff(positions) <= 0):
        yield "positions do not increase"
        return
    pair_valid = np.array([record["pair_valid"] for record in records])
    expected = measure_stack(positions).pair_valid
    if "in_plane_jump" in row["notes"].split():  # positions along the normal do not show where the origin jumps aside
        expected &= pair_valid
    if not np.array_equal(pair_valid, expected):
        yield "pair_valid does not agree with the positions"
    gaps = " ".join(str(index) for index in np.flatnonzero(~pair_valid[:-1]))
    if gaps != row["gap_positions"] or pair_valid[-1]:
        yield "pair_valid does not agree with gap_positions"
