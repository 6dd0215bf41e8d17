"""Datasets with other splits: folds, in which every patient is tested once.

A few patients are too few for one test split. Of N folds each takes another part of the patients as
its test split, so that all results together are of all patients. Records are copied as they are;
only splits, order and tables change.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.dataset.merge import merge
from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import (
    PREPARATION_FILE,
    REJECTED_COLUMNS,
    REJECTED_FILE,
    SPLITS,
    VOLUME_COLUMNS,
    VOLUMES_FILE,
    make_preparation,
    shard_name,
    split_shards,
    table_columns,
)
from data_prep.dataset.storage import read_records, write_records, write_table
from data_prep.dataset.tfds import complete
from data_prep.system.errors import InputError
from data_prep.system.files import file_sha256, make_folder, publish

VALIDATION_SHARE = 1 / 8  # of the patients that a fold does not test


def fold_splits(patients: Sequence[str], num_folds: int, fold: int) -> dict[str, str]:
    """The split of every patient in a fold.

    Patients are taken in the order of their pseudonyms, which a keyed hash makes: the folds depend
    on the key and the patients alone.

    Args:
      patients: pseudonyms, in any order.
      num_folds: parts; each patient is in the test split of one fold.
      fold: in [0, num_folds).

    Returns:
      patient -> split; of the patients that are not tested an eighth, rounded up, is validation.

    Raises:
      InputError: fewer than two folds, or too few patients.
    """
    ordered = sorted(set(patients))
    if num_folds < 2 or len(ordered) < max(num_folds, 3):
        raise InputError(
            f"--folds={num_folds}: {len(ordered)} patients can be cut into 2 to "
            f"{len(ordered)} folds of three patients or more in all"
        )
    tested = ordered[fold::num_folds]
    others = [patient for patient in ordered if patient not in tested]
    if len(others) < 2:
        raise InputError(f"--folds={num_folds}: no patient is left for training; give more folds")
    # those that the next fold tests come first: another validation split in every fold
    others.sort(key=lambda patient: (ordered.index(patient) - fold - 1) % num_folds)
    validation = others[: math.ceil(VALIDATION_SHARE * len(others))]
    splits = dict.fromkeys(ordered, "train") | dict.fromkeys(tested, "test")
    return splits | dict.fromkeys(validation, "validation")


def write_folds(parts: Sequence[Dataset], output_dir: Path, num_folds: int) -> list[Path]:
    """Makes the datasets `output_dir`/fold_0 ..., each in full or not at all; keeps those that are
    there.

    Args:
      parts: datasets that `merge` would make one of.
      output_dir: folder of the folds.
      num_folds: number of them.

    Returns:
      The directories of the folds.

    Raises:
      InputError: datasets that do not go together, too few patients, or folds of other data.
      DatasetError: a dataset is damaged.
      OSError: they cannot be written.
    """
    whole = parts[0]
    if len(parts) > 1:
        view = output_dir / "all"
        merge(parts, view)
        whole = Dataset.open(view)
    whole.check_tables()
    patients = [volume["patient_id"] for volume in whole.volumes()]
    of_folds = [fold_splits(patients, num_folds, fold) for fold in range(num_folds)]
    folders = [output_dir / f"fold_{fold}" for fold in range(num_folds)]
    for folder, splits in zip(folders, of_folds, strict=True):
        if not (folder / PREPARATION_FILE).exists():
            _write(whole, folder, splits)
            continue
        written = {row["patient_id"]: row["split"] for row in Dataset.open(folder).volumes()}
        if written != splits:
            raise InputError(
                f"{folder}: is a fold of other patients or of another number of folds; choose a "
                "new --output_dir"
            )
    return folders


def _write(whole: Dataset, folder: Path, splits: dict[str, str]) -> None:
    """Writes the dataset with these splits (patient -> split)."""
    building = folder.with_name(f".{folder.name}.building")
    make_folder(building, "--output_dir")
    for stale in building.iterdir():  # of a run that was killed
        stale.unlink()
    records = _records_of_volumes(whole)
    volumes, checksums, shard_lengths = [], {}, {}
    for split in SPLITS:
        rows = [row for row in whole.volumes() if splits[row["patient_id"]] == split]
        first = 0
        for row in rows:
            volumes.append(row | {"split": split, "first_record": first})
            first += row["num_slices"]
        name = shard_name(split, 0)
        write_records(
            building / name, (record for row in rows for record in records[row["volume_id"]])
        )
        checksums[name], shard_lengths[split] = file_sha256(building / name), [first]
    facts = whole.preparation
    tables = {
        VOLUMES_FILE: (VOLUME_COLUMNS, volumes),
        REJECTED_FILE: (REJECTED_COLUMNS, _texts(whole, REJECTED_FILE)),
    }
    for name, columns in table_columns(facts).items():
        tables[name] = (columns, _in_order(_texts(whole, name), volumes))
    for name, (columns, rows) in tables.items():
        write_table(building / name, columns, rows)
    preparation = make_preparation(
        volumes=volumes,
        shard_lengths=shard_lengths,
        rules=facts["rules"]["volumes"],
        **{
            name: facts[name]
            for name in (
                *("archive", "windows", "image_size", "labels", "masks"),
                *("key_fingerprint", "options", "versions", "counts"),
            )
        },
    )
    complete(building, preparation, tables, checksums)
    publish(building, folder)


def _records_of_volumes(whole: Dataset) -> dict[str, list[bytes]]:
    """volume -> its records in order."""
    records = {}
    for split in whole.preparation["splits"]:
        of_split = [
            record
            for shard in split_shards(whole.preparation, split)
            for record in read_records(whole.directory / shard.name)
        ]
        for row in whole.volumes(split):
            first = row["first_record"]
            records[row["volume_id"]] = of_split[first : first + row["num_slices"]]
    return records


def _texts(whole: Dataset, name: str) -> list[dict[str, str]]:
    with open(whole.directory / name, newline="") as file:
        return list(csv.DictReader(file))


def _in_order(rows: list[dict[str, str]], volumes: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Rows of slices, labels or regions in the order of these volumes."""
    of_volume: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        of_volume.setdefault(row["volume_id"], []).append(row)
    return [row for volume in volumes for row in of_volume.get(volume["volume_id"], ())]
