"""Checks of a finished dataset: nothing is damaged, every record decodes, neighbours are
neighbours."""

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import (
    LABELS_FILE,
    LEVELS,
    MASK_AREA_COLUMN,
    REGIONS_FILE,
    SLICES_FILE,
    VOLUMES_FILE,
    Shard,
    split_shards,
    table_columns,
)
from data_prep.dataset.storage import decode_record, read_records
from data_prep.masks.grid import MAX_REGIONS
from data_prep.scan.geometry import measure_stack
from data_prep.system.errors import DatasetError
from data_prep.system.files import file_sha256
from data_prep.system.workers import Progress, WorkerDied, WorkerPool


def verify(dataset: Dataset, pool: WorkerPool) -> list[str]:
    """Problems of a dataset, each one line that names the file; [] if it is sound.

    Checks the checksums, and that:
    - the tables agree with the shards and with each other;
    - no volume occurs twice, and no patient in two splits;
    - the records of a volume are consecutive, with increasing positions, and `pair_valid` is false
      exactly at its gaps, jumps and end;
    - slices.csv lists the records in their order with the foreground of their masks, labels.csv the
      volumes, regions.csv all regions of the masks;
    - labels are classes that preparation.json names.
    """
    preparation, volumes = dataset.preparation, dataset.volumes()
    label_problems = list(_label_problems(dataset))
    problems = [*_table_problems(dataset), *label_problems]
    areas, regions = {}, {}
    if preparation["masks"] and not label_problems:
        for row in dataset.slices():
            areas.setdefault(row["volume_id"], []).append(row[MASK_AREA_COLUMN])
        for row in dataset.regions():
            regions.setdefault(row["volume_id"], set()).add(row["region"])
    size = preparation["image_size"]
    facts = ((size, size, preparation["channels"]), bool(preparation["masks"]))
    tasks = []
    for split in preparation["splits"]:
        first = 0
        rows = [row for row in volumes if row["split"] == split]
        for shard in split_shards(preparation, split):
            records = range(first, first + shard.num_records)
            inside = [row for row in rows if row["first_record"] in records]
            checksum = preparation["checksums"].get(shard.name, "")
            masks = {
                row["volume_id"]: (areas[row["volume_id"]], regions.get(row["volume_id"], set()))
                for row in inside
                if row["volume_id"] in areas
            }
            tasks.append((dataset.directory, *facts, shard, checksum, first, inside, masks))
            first = records.stop
    total = sum(task[3].num_records for task in tasks)
    with Progress("verifying", "slices", total) as progress:
        for task, result in pool.run(_shard_problems, tasks):
            name = task[3].name
            problems += (
                [f"{name}: reading it crashed"] if isinstance(result, WorkerDied) else result
            )
            progress.advance(task[3].num_records)
    return problems


def _table_problems(dataset: Dataset) -> Iterator[str]:
    preparation, volumes = dataset.preparation, dataset.volumes()
    yield from dataset.damaged_tables()
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
                yield (
                    f"volumes.csv: {name} of {split} is {number}, preparation.json says "
                    f"{facts[name]}"
                )
        expected = 0
        for row in rows:
            if row["first_record"] != expected:
                yield (
                    f"volumes.csv: volume {row['volume_id']} starts at {row['first_record']}, not "
                    f"{expected}"
                )
            expected = row["first_record"] + row["num_slices"]
    for row in volumes:
        if row["split"] not in preparation["splits"]:
            yield (
                f"volumes.csv: volume {row['volume_id']} is in split {row['split']!r}, which does "
                "not exist"
            )


def _label_problems(dataset: Dataset) -> Iterator[str]:
    """Problems that the tables of labels and regions alone show."""
    volumes = dataset.volumes()
    labels = dataset.preparation["labels"]
    try:
        slices, of_volumes = dataset.slices(), dataset.labels()
        regions = dataset.regions()
    except DatasetError as error:
        yield str(error)
        return
    columns = table_columns(dataset.preparation)
    if SLICES_FILE in columns:
        expected = [
            (row["volume_id"], index) for row in volumes for index in range(row["num_slices"])
        ]
        if [(row["volume_id"], row["slice_index"]) for row in slices] != expected:
            yield f"{SLICES_FILE}: its rows are not the records in their order"
    if LABELS_FILE in columns:
        if [row["volume_id"] for row in of_volumes] != [row["volume_id"] for row in volumes]:
            yield f"{LABELS_FILE}: its rows are not the volumes in the order of {VOLUMES_FILE}"
    patient_of = {row["volume_id"]: row["patient_id"] for row in volumes}
    for name, facts in labels.items():
        if facts["level"] not in LEVELS:
            yield (
                f"preparation.json: label {name} is of the level {facts['level']!r}, which does "
                "not exist"
            )
        of_slices = facts["level"] == "slice"
        table, rows = (SLICES_FILE, slices) if of_slices else (LABELS_FILE, of_volumes)
        strange = {row[name] for row in rows} - {None, *range(len(facts["classes"]))}
        if strange:
            yield (
                f"{table}: {name} holds {min(strange)}, which is not one of its "
                f"{len(facts['classes'])} classes"
            )
        if facts["level"] == "patient":
            classes = {(patient_of.get(row["volume_id"]), row[name]) for row in rows}
            if len(classes) > len({patient for patient, _ in classes}):
                yield f"{table}: {name} is a label of patients and differs between volumes of one"
    num_slices = {row["volume_id"]: row["num_slices"] for row in volumes}
    seen = collections.Counter((row["volume_id"], row["region"]) for row in regions)
    for row in regions:
        place = f"{REGIONS_FILE}: region {row['region']} of volume {row['volume_id']}"
        if row["volume_id"] not in num_slices:
            yield f"{place}: there is no such volume"
        elif not 0 <= row["first_slice"] <= row["last_slice"] < num_slices[row["volume_id"]]:
            yield f"{place}: its slices are not slices of the volume"
        if not 1 <= row["region"] <= MAX_REGIONS or seen[row["volume_id"], row["region"]] > 1:
            yield f"{place}: its number occurs twice or is not 1 to {MAX_REGIONS}"


def _shard_problems(
    dataset_dir: Path,
    image_shape: tuple[int, int, int],
    has_masks: bool,
    shard: Shard,
    checksum: str,
    first: int,
    rows: list[dict[str, Any]],
    masks: dict[str, tuple[list[int | None], set[int]]],
) -> list[str]:
    """Problems of one shard, whose first record is record `first` of its split. `masks`: of each
    volume, the foreground pixels of its slices, and its regions."""
    path = dataset_dir / shard.name
    if not path.is_file():
        return []  # `damaged_tables` names it
    problems = []
    if file_sha256(path) != checksum:
        problems.append(f"{shard.name}: checksum differs from preparation.json")
    try:
        records = [
            _without_pixels(decode_record(record, image_shape)) for record in read_records(path)
        ]
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        return [
            *problems,
            f"{shard.name}: a record does not decode ({' '.join(str(error).split())[:80]})",
        ]
    if len(records) != shard.num_records:
        return [
            *problems,
            f"{shard.name}: {len(records)} records, preparation.json says {shard.num_records}",
        ]
    at = 0
    for row in rows:
        if row["first_record"] - first != at:
            problems.append(
                f"{shard.name}: volume {row['volume_id']} does not follow the one before it"
            )
        part = records[at : at + row["num_slices"]]
        faults = [
            *_volume_faults(row, part),
            *_mask_faults(part, masks.get(row["volume_id"]), has_masks),
        ]
        problems += [f"{shard.name}: volume {row['volume_id']}: {fault}" for fault in faults]
        at += row["num_slices"]
    if at != len(records):
        problems.append(
            f"{shard.name}: {len(records) - at} records are not in a volume of volumes.csv"
        )
    return problems


def _without_pixels(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the area and the regions of its mask in place of the pixels."""
    rest = {name: value for name, value in record.items() if name not in ("image", "mask")}
    if "mask" in record:
        rest["mask_area"] = int(np.count_nonzero(record["mask"]))
        rest["regions"] = set(np.unique(record["mask"]).tolist()) - {0}
    return rest


def _mask_faults(
    records: list[dict[str, Any]], listed: tuple[list[int | None], set[int]] | None, has_masks: bool
) -> Iterator[str]:
    with_masks = sum("mask_area" in record for record in records)
    if with_masks != (len(records) if has_masks else 0):
        yield f"{with_masks} of {len(records)} records have a mask"
    elif listed is not None:
        areas, regions = listed
        if [record["mask_area"] for record in records] != [area or 0 for area in areas]:
            yield f"the foreground of its masks differs from {SLICES_FILE}"
        if strange := set().union(*(record["regions"] for record in records)) - regions:
            yield f"its masks hold region {min(strange)}, which {REGIONS_FILE} does not list"


def _volume_faults(row: dict[str, Any], records: list[dict[str, Any]]) -> Iterator[str]:
    if [record["volume_id"] for record in records] != [row["volume_id"]] * row["num_slices"]:
        yield "its records are missing or belong to another volume"
        return
    if [record["slice_index"] for record in records] != list(range(row["num_slices"])):
        yield "slice_index does not count 0, 1, 2, ..."
    positions = np.array([record["position_mm"] for record in records], dtype=np.float64)
    if np.any(np.diff(positions) <= 0):
        yield "positions do not increase"
        return
    pair_valid = np.array([record["pair_valid"] for record in records])
    expected = measure_stack(positions).pair_valid
    # positions along the normal do not show jumps of the origin to the side
    if "in_plane_jump" in row["notes"].split():
        expected &= pair_valid
    if not np.array_equal(pair_valid, expected):
        yield "pair_valid does not agree with the positions"
    gaps = " ".join(str(index) for index in np.flatnonzero(~pair_valid[:-1]))
    if gaps != row["gap_positions"] or pair_valid[-1]:
        yield "pair_valid does not agree with gap_positions"
