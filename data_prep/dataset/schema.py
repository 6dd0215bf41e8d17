"""The dataset directory: the contract between preparation and training.

::

    DIR/train.array_record-00000 ...  ArrayRecord shards, one record = one slice; also validation.*
                                      and test.*
    DIR/volumes.csv                   one row a volume (`VOLUME_COLUMNS`)
    DIR/rejected.csv                  one row a series that was not taken (`REJECTED_COLUMNS`)
    DIR/slices.csv                    one row a slice: its labels, foreground of its mask (if the
                                      dataset has any)
    DIR/labels.csv                    one row a volume: labels of the volume or the patient (if the
                                      dataset has any)
    DIR/regions.csv                   one row a region (nodule) of the masks (if it has masks)
    DIR/dataset_info.json             TFDS metadata, with features.json:
                              `tfds.builder_from_directory(DIR).as_data_source("train[:50%]")`
    DIR/preparation.json              how it was made, with checksums of all files and its own
                                      (`sha256`); written last: its presence means "complete"

The shards of a view (`data_prep.merge`) are links to the shards of the datasets that
preparation.json lists as `parts`.

A record is a serialised `tf.train.Example` with the features `image` (uint8, [H, W, C] in C order),
`volume_id`, `slice_index` (int32, counts within the volume), `position_mm` (float32, along the
slice normal, grows towards superior) and `pair_valid` (the next record is the neighbouring slice of
the same volume, no gap between). The slices of a volume are consecutive records, ordered towards
superior. Image rows run to posterior, columns to the patient's left. `first_record` in
`volumes.csv` counts within the split.

Where a dataset has masks, every record has the feature `mask` (uint8, [H, W]): 0 is background, k
the region k of this volume in `regions.csv`. A label is a class: its cell is the index into the
`classes` that preparation.json lists under `labels` with the `level` ("slice", "volume" or
"patient"). An empty cell is a missing label.

`data_prep.dataset.reader` and TFDS (without TensorFlow) read it.
"""

import collections
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.scan.rules import VERSION, changes_since
from data_prep.system.errors import DatasetError
from data_prep.system.files import write_file

FORMAT_VERSION = 2
SPLITS = ("train", "validation", "test")
PREPARATION_FILE = "preparation.json"
VOLUMES_FILE = "volumes.csv"
REJECTED_FILE = "rejected.csv"
SLICES_FILE = "slices.csv"
LABELS_FILE = "labels.csv"
REGIONS_FILE = "regions.csv"

# Name -> type of the columns of volumes.csv. An empty cell reads as None ("" in text columns).
VOLUME_COLUMNS: dict[str, type] = {
    "volume_id": str,
    "patient_id": str,
    "exam_id": str,
    "split": str,
    "first_record": int,  # within the split
    "num_slices": int,
    "num_files": int,  # source files of the slices
    "num_dropped_files": int,  # files of the same series that are not in the volume
    "source_rows": int,  # matrix before resizing
    "source_columns": int,
    "pixel_spacing_row_mm": float,  # of the source, in the orientation of the dataset
    "pixel_spacing_column_mm": float,
    "slice_thickness_mm": float,
    "slice_spacing_mm": float,  # median
    "gap_positions": str,  # "12 57": no pair between slices 12 and 13, nor between 57 and 58
    "gantry_tilt_degrees": float,
    "manufacturer": str,
    "kernel": str,
    "tube_voltage_kvp": float,
    "contrast": bool,  # an agent is named in the headers; empty: they say nothing
    "age": int,  # whole years, 90 stands for everything above 89
    "sex": str,  # F, M, O
    "ethnic_group": str,
    "synthetic": bool,  # a phantom, not a person
    "middle_slice": int,
    "first_lung_slice": int,
    "last_lung_slice": int,
    # "top left bottom right" of the lungs over all slices, pixels of the dataset's images
    "lung_box": str,
    "notes": str,  # names of `NOTES` (scan/reasons.py), separated by a blank
}
REJECTED_COLUMNS = ("series_id", "num_files", "reason", "detail")
LEVELS = ("slice", "volume", "patient")  # of labels
# of slices.csv: foreground pixels of the stored mask; empty: the scan has none, so it is unknown
MASK_AREA_COLUMN = "mask_area_px"
REGION_COLUMNS: dict[str, type] = {
    "volume_id": str,
    "region": int,  # its number in the masks of the volume
    "first_slice": int,
    "last_slice": int,
    "volume_mm3": float,
    "diameter_mm": float,  # of the sphere of this volume
}
LIDC_REGION_COLUMNS: dict[str, type] = REGION_COLUMNS | {
    "malignancy": int,  # 1 .. 5, median of the readers, the higher of two
    "num_readers": int,
}
_VERSIONED = ("numpy", "scipy", "pydicom", "imagecodecs", "array_record", "tensorflow-datasets")


# ---- columns and shards --------------------------------------------------------------------------


def table_columns(preparation: Mapping[str, Any]) -> dict[str, dict[str, type]]:
    """Columns (name -> type) of the tables of slices, labels and regions, by file name.

    A table that the dataset lacks is left out. Only `labels` and `masks` of preparation.json are
    needed.
    """
    labels, masks = preparation["labels"], preparation["masks"]
    slice_labels = [name for name, facts in labels.items() if facts["level"] == "slice"]
    other_labels = [name for name in labels if name not in slice_labels]
    area = {MASK_AREA_COLUMN: int} if masks else {}
    columns = {}
    if slice_labels or masks:
        columns[SLICES_FILE] = (
            {"volume_id": str, "slice_index": int} | area | dict.fromkeys(slice_labels, int)
        )
    if other_labels:
        columns[LABELS_FILE] = {"volume_id": str} | dict.fromkeys(other_labels, int)
    if masks:
        columns[REGIONS_FILE] = (
            LIDC_REGION_COLUMNS if masks["source"] == "lidc_idri" else REGION_COLUMNS
        )
    return columns


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard file as preparation.json lists it."""

    name: str
    num_records: int


def shard_name(split: str, index: int) -> str:
    """No total count in the name: a grown archive appends shards without renaming any."""
    return f"{split}.array_record-{index:05d}"


def split_shards(preparation: Mapping[str, Any], split: str) -> list[Shard]:
    """The shards of a split in order. Raises DatasetError if there is no such split."""
    if split not in preparation["splits"]:
        raise DatasetError(
            f"split {split!r} is not in this dataset (it has {', '.join(preparation['splits'])}); "
            "prepare it with other --splits or --holdout_volumes"
        )
    lengths = preparation["splits"][split]["shard_lengths"]
    return [Shard(shard_name(split, index), length) for index, length in enumerate(lengths)]


# ---- preparation.json ----------------------------------------------------------------------------


def dataset_fingerprint(checksums: Mapping[str, str]) -> str:
    """SHA-256 over the checksums of the shards and of the tables of volumes, slices, labels and
    regions: equal fingerprints mean equal data."""
    tables = (VOLUMES_FILE, SLICES_FILE, LABELS_FILE, REGIONS_FILE)
    names = sorted(name for name in checksums if ".array_record-" in name or name in tables)
    return hashlib.sha256(
        "".join(f"{name} {checksums[name]}\n" for name in names).encode()
    ).hexdigest()


def preparation_sha256(preparation: Mapping[str, Any]) -> str:
    """SHA-256 over the content of preparation.json but its `sha256` itself."""
    content = {name: value for name, value in preparation.items() if name != "sha256"}
    content = json.loads(json.dumps(content))  # as it reads: tuples are lists, all keys texts
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_preparation(dataset_dir: Path) -> dict[str, Any]:
    """preparation.json of a complete dataset, without its checksum of itself.

    Raises DatasetError if the directory is absent, incomplete, damaged or of another format
    version.
    """
    if not dataset_dir.is_dir():
        raise DatasetError(f"{dataset_dir}: no such directory; make one with ctssl prepare")
    path = dataset_dir / PREPARATION_FILE
    if not path.is_file():
        raise DatasetError(
            f"{dataset_dir}: not a complete dataset (no {PREPARATION_FILE}); "
            "run ctssl prepare, again if it was stopped"
        )
    if (dataset_dir / "checkpoints").is_dir():  # which keeps a copy of that file
        raise DatasetError(
            f"{dataset_dir}: a run directory, not a dataset; give the directory of ctssl prepare"
        )
    return parse_preparation(path.read_bytes(), str(path))


def parse_preparation(content: bytes, name: str) -> dict[str, Any]:
    """A preparation.json. Raises DatasetError, by `name`, if it is damaged or of another format
    version."""
    try:
        preparation = json.loads(content)
    except ValueError as error:
        raise DatasetError(f"{name}: damaged ({error}); prepare the dataset again") from None
    version = preparation.get("format_version") if isinstance(preparation, dict) else None
    if version != FORMAT_VERSION:
        raise DatasetError(
            f"{name}: format_version {version}, this program reads {FORMAT_VERSION}; prepare the "
            "dataset again"
        )
    # older datasets lack it
    if preparation.get("sha256", own := preparation_sha256(preparation)) != own:
        raise DatasetError(
            f"{name}: damaged (its checksum of itself differs); copy the dataset again"
        )
    preparation.pop("sha256", None)
    return preparation


def linked_parts(
    dataset_dir: Path, preparation: Mapping[str, Any]
) -> Iterator[tuple[Mapping[str, Any], Path, dict[str, str]]]:
    """The parts of a view (`data_prep.merge`) whose shards are symbolic links.

    Yields the facts of each part, its directory, and {name of a shard in the view: name in the
    part}. Yields nothing for other datasets.
    """
    num_before = dict.fromkeys(SPLITS, 0)
    for part in preparation.get("parts", ()):
        names = {}
        for split, number in part["num_shards"].items():
            names |= {
                shard_name(split, num_before[split] + index): shard_name(split, index)
                for index in range(number)
            }
            num_before[split] += number
        link = dataset_dir / next(iter(names))
        if link.is_symlink():
            yield part, (dataset_dir / link.readlink().parent).resolve(), names


def make_preparation(
    *,
    archive: str,
    windows: Sequence[Mapping[str, float]],
    image_size: int,
    volumes: Iterable[Mapping[str, Any]],
    shard_lengths: Mapping[str, list[int]],
    labels: Mapping[str, Mapping[str, Any]],
    masks: Mapping[str, Any] | None,
    key_fingerprint: str,
    options: Mapping[str, Any],
    versions: Mapping[str, str],
    counts: Mapping[str, Any],
    rules: Mapping[str, int] | None = None,
    parts: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The content of preparation.json, still without fingerprint and checksums: `tfds.complete`
    adds them.

    Args:
        archive: kind of the source.
        windows: `level` and `width` in HU of each channel.
        image_size: pixels of a side.
        volumes: rows of volumes.csv, read once.
        shard_lengths: records of each shard, by split.
        labels: `level` and `classes` of each label.
        masks: how the masks were made; None: the dataset has no masks.
        key_fingerprint: of the pseudonym key.
        options: of the preparation.
        versions: of the packages that the bytes depend on.
        counts: files of the archive by outcome, and cells of labels by class.
        rules: number of volumes by the version of the rules (`data_prep.scan.rules`) that read
            them; None: this one.
        parts: facts of the datasets that a view links to.
    """
    patients: dict[str, collections.Counter[str]] = {
        split: collections.Counter() for split in shard_lengths
    }
    kinds = set()
    for row in volumes:
        patients[row["split"]][row["patient_id"]] += 1
        kinds.add(row["synthetic"])
    num_volumes = sum(of_split.total() for of_split in patients.values())
    rules = {str(VERSION): num_volumes} if rules is None else dict(rules)
    return {
        "format_version": FORMAT_VERSION,
        "archive": archive,
        "synthetic": any(kinds),
        **({"partly_synthetic": True} if len(kinds) == 2 else {}),
        "windows": list(windows),
        "image_size": image_size,
        "channels": len(windows),
        "splits": {
            split: {
                "num_volumes": patients[split].total(),
                "num_patients": len(patients[split]),
                "num_slices": sum(lengths),
                "shard_lengths": lengths,
            }
            for split, lengths in shard_lengths.items()
        },
        "labels": labels,
        "masks": masks,
        "key_fingerprint": key_fingerprint,
        "fingerprint": "",
        **({"parts": list(parts)} if parts else {}),
        "options": options,
        "rules": {"version": max(map(int, rules), default=VERSION), "volumes": rules},
        "versions": versions,
        "counts": counts,
        "checksums": {},
    }


def rules_of(preparation: Mapping[str, Any], num_volumes: int) -> dict[str, int]:
    """Number of volumes by the version of the rules that read them, as text: a dataset of a program
    before version 2 does not name it."""
    return preparation["rules"]["volumes"] if "rules" in preparation else {"1": num_volumes}


def rules_lines(preparation: Mapping[str, Any]) -> list[str]:
    """For the user: the volumes that were read by earlier versions of the rules, and the
    difference; [] if there are none."""
    num_volumes = sum(facts["num_volumes"] for facts in preparation["splits"].values())
    return [
        f"{number:>8} volumes were read by version {version} of the rules and stay as they are; "
        f"version {VERSION}, which reads new scans: {changes_since(int(version))}"
        for version, number in rules_of(preparation, num_volumes).items()
        if int(version) < VERSION
    ]


def notes_on_rules(trained_on: Mapping[str, Any], read: Mapping[str, Any] | None) -> list[str]:
    """For the user of a model: its data were read by other versions of the rules than its input.

    Args:
        trained_on: preparation.json of the model's data; of imported weights it may name no
            version, which leaves nothing to say.
        read: preparation.json of the dataset that it is applied to; None: scans, read by this
            program.
    """
    learned = set(rules_of(trained_on, 0))
    of_input = set(rules_of(read, 0)) if read else {str(VERSION)}
    if not learned or learned == of_input:
        return []
    versions = [" and ".join(sorted(numbers, key=int)) for numbers in (learned, of_input)]
    oldest = min(map(int, learned | of_input))
    return [
        f"the model learned from scans that version {versions[0]} of the rules read; this input "
        f"was read by version {versions[1]}; since version {oldest}: {changes_since(oldest)}"
    ]


def synthetic_text(preparation: Mapping[str, Any]) -> str:
    """Whether all or some volumes are of computer-made patients, in words; "" if none is."""
    if not preparation["synthetic"]:
        return ""
    return "PARTLY SYNTHETIC" if preparation.get("partly_synthetic") else "SYNTHETIC"


def description(preparation: Mapping[str, Any]) -> str:
    """A line on the images, for TFDS."""
    windows = ", ".join(
        f"{window['level']:g}/{window['width']:g}" for window in preparation["windows"]
    )
    kind = " ".join(filter(None, (synthetic_text(preparation), "chest CT slices")))
    kind = kind[0].upper() + kind[1:]
    return f"{kind}, windowed (level/width in HU: {windows}). Not for clinical use."


def summary_text(preparation: Mapping[str, Any], changed: bool, dataset_dir: Path) -> str:
    """The state and the splits of a dataset, for the user. `changed`: this run wrote it."""
    state = "is complete" if changed else "is complete already: nothing to do"
    synthetic = synthetic_text(preparation)
    lines = [f"{dataset_dir} {state}{f' ({synthetic} data)' if synthetic else ''}."]
    for split, facts in preparation["splits"].items():
        volumes, patients, slices = (
            facts[f"num_{name}"] for name in ("volumes", "patients", "slices")
        )
        lines.append(f"  {split}: {volumes} volumes of {patients} patients, {slices} slices")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the bytes of a dataset."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in _VERSIONED
    }


def write_preparation(dataset_dir: Path, preparation: Mapping[str, Any]) -> None:
    """Writes preparation.json, the last file of a dataset, with its checksum of itself."""
    preparation = {**preparation, "sha256": preparation_sha256(preparation)}
    write_file(dataset_dir / PREPARATION_FILE, (json.dumps(preparation, indent=2) + "\n").encode())
