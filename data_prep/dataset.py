"""The dataset directory: the contract between preparation and training.

::

    DIR/train.array_record-00000 ...  ArrayRecord shards, one record = one slice, also validation.* and test.*
    DIR/volumes.csv                   one row a volume (`VOLUME_COLUMNS`)
    DIR/rejected.csv                  one row a series that was not taken (`REJECTED_COLUMNS`)
    DIR/slices.csv                    one row a slice: its labels, foreground of its mask (if there are any)
    DIR/labels.csv                    one row a volume: labels of the volume or the patient (if there are any)
    DIR/regions.csv                   one row a region (nodule) of the masks (if there are masks)
    DIR/dataset_info.json             TFDS metadata, with features.json:
                                      `tfds.builder_from_directory(DIR).as_data_source("train[:50%]")`
    DIR/preparation.json              how it was made, with checksums of all files and its own (`sha256`); written last:
                                      its presence means "complete"

The shards of a view (`data_prep.merge`) are links to those of the datasets that preparation.json lists as `parts`.

A record is a serialised `tf.train.Example` with the features `image` (uint8, [H, W, C] in C order),
`volume_id`, `slice_index` (int32, counts within the volume), `position_mm` (float32, along the slice normal,
grows towards superior) and `pair_valid` (the next record is the neighbouring slice of the same volume, no
gap between). The slices of a volume are consecutive records, ordered towards superior. Image rows run to
posterior, columns to the patient's left. `first_record` in `volumes.csv` counts within the split.

Where a dataset has masks, every record has the feature `mask` (uint8, [H, W]): 0 is background, k the region that is
number k of this volume in `regions.csv`. A label is a class: its cell is the index into the `classes` that
preparation.json lists under `labels` with the `level` ("slice", "volume" or "patient"), or empty where it is missing.

Here are its schema and its readers; `data_prep.dataset_writer` writes it. TFDS reads it, too; TensorFlow is needed
nowhere.
"""

import bisect
import csv
import dataclasses
import functools
import hashlib
import json
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep import stores
from data_prep.system.errors import DatasetError
from data_prep.system.files import file_sha256

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
    "num_files": int,  # source files that the slices came from
    "num_dropped_files": int,  # of the same series and not in the volume (duplicates, ...)
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
    "contrast": bool,  # an agent is named in the headers
    "age": int,  # whole years, 90 stands for everything above 89
    "sex": str,  # F, M, O
    "ethnic_group": str,
    "synthetic": bool,  # a phantom, not a person
    "middle_slice": int,
    "first_lung_slice": int,
    "last_lung_slice": int,
    "lung_box": str,  # "top left bottom right" of the lungs over all slices, pixels of the dataset's images
    "notes": str,  # names of what is unusual, separated by a blank
}
REJECTED_COLUMNS = ("series_id", "num_files", "reason", "detail")
LEVELS = ("slice", "volume", "patient")  # of labels
MASK_AREA_COLUMN = "mask_area_px"  # of slices.csv: foreground pixels of the stored mask
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


# ---- records and shards ------------------------------------------------------------------------------------


def _payload(record: bytes, at: int) -> tuple[int, int]:
    """Where the payload of the length-delimited field at this place begins and ends."""
    if record[at] & 7 != 2:
        raise DatasetError("a record is damaged: unexpected field type; run data_prep.describe --verify")
    size, shift = 0, 0
    while True:
        at += 1
        size |= (record[at] & 0x7F) << shift
        shift += 7
        if record[at] < 0x80:
            return at + 1, at + 1 + size


def decode_record(record: bytes, image_shape: Sequence[int]) -> dict[str, Any]:
    """The inverse of `dataset_writer.encode_record`: `image` is a read-only [H, W, C] uint8 view, and so is `mask`
    [H, W] where the record has one; the rest are scalars."""
    features = {}
    at, end = _payload(record, 0)
    while at < end:
        entry, at = _payload(record, at)  # of the map of features: a name, and a list of one kind that holds one value
        name, after = _payload(record, entry)
        values, _ = _payload(record, _payload(record, after)[0])
        features[record[name:after]] = _payload(record, values)
    slice_index = 0
    for place, byte in enumerate(record[slice(*features[b"slice_index"])]):
        slice_index |= (byte & 0x7F) << 7 * place

    def pixels(name: bytes, shape: Sequence[int]) -> np.ndarray:
        begin, end = features[name]
        return np.frombuffer(record, np.uint8, end - begin, begin).reshape(shape)

    return {
        "image": pixels(b"image", image_shape),
        **({"mask": pixels(b"mask", image_shape[:2])} if b"mask" in features else {}),
        "volume_id": record[slice(*features[b"volume_id"])].decode(),
        "slice_index": slice_index,
        "position_mm": struct.unpack_from("<f", record, features[b"position_mm"][0])[0],
        "pair_valid": record[features[b"pair_valid"][0]] == 1,
    }


def read_records(path: Path) -> Iterable[bytes]:
    """The records of an ArrayRecord file in order, a few in memory at a time."""
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(path), options="readahead_buffer_size:0")
    try:
        for index in range(reader.num_records()):
            yield reader.read([index])[0]
    finally:
        reader.close()


def shard_name(split: str, index: int) -> str:
    """No total count in the name: a grown archive appends shards without renaming any."""
    return f"{split}.array_record-{index:05d}"


def dataset_fingerprint(checksums: Mapping[str, str]) -> str:
    """SHA-256 over the checksums of the shards and of the tables of volumes, slices, labels and regions: equal
    fingerprints mean equal data."""
    tables = (VOLUMES_FILE, SLICES_FILE, LABELS_FILE, REGIONS_FILE)
    names = sorted(name for name in checksums if ".array_record-" in name or name in tables)
    return hashlib.sha256("".join(f"{name} {checksums[name]}\n" for name in names).encode()).hexdigest()


def preparation_sha256(preparation: Mapping[str, Any]) -> str:
    """SHA-256 over the content of preparation.json but its `sha256` itself."""
    content = {name: value for name, value in preparation.items() if name != "sha256"}
    content = json.loads(json.dumps(content))  # as it reads: tuples are lists, all keys texts
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---- tables ------------------------------------------------------------------------------------------------


def local_directory(dataset_dir: str | os.PathLike, splits: Sequence[str] = ()) -> Path:
    """The directory; of a dataset that is named by a URL, its copy on this machine, where the shards of `splits` are
    fetched to if they are not there (`data_prep.dataset_cache`). All readers here take either name.

    Raises DatasetError if the store cannot give it.
    """
    if not stores.is_url(dataset_dir):
        return stores.local_path(dataset_dir)
    from data_prep import dataset_cache  # not earlier: it needs this module

    return dataset_cache.fetch(os.fspath(dataset_dir), splits)


def read_preparation(dataset_dir: str | os.PathLike) -> dict[str, Any]:
    return Dataset.open(dataset_dir).preparation


def read_preparation_file(dataset_dir: Path) -> dict[str, Any]:
    """preparation.json of a complete dataset, without its checksum of itself.

    Raises DatasetError if the directory is absent, incomplete, damaged or of another format version.
    """
    if not dataset_dir.is_dir():
        raise DatasetError(f"{dataset_dir}: no such directory; make one with python -m data_prep.prepare")
    path = dataset_dir / PREPARATION_FILE
    if not path.is_file():
        raise DatasetError(
            f"{dataset_dir}: not a complete dataset (no {PREPARATION_FILE}); "
            "run data_prep.prepare, again if it was stopped"
        )
    return parse_preparation(path.read_bytes(), str(path))


def parse_preparation(content: bytes, name: str) -> dict[str, Any]:
    """A preparation.json. Raises DatasetError, by `name`, if it is damaged or of another format version."""
    try:
        preparation = json.loads(content)
    except ValueError as error:
        raise DatasetError(f"{name}: damaged ({error}); prepare the dataset again") from None
    version = preparation.get("format_version") if isinstance(preparation, dict) else None
    if version != FORMAT_VERSION:
        raise DatasetError(
            f"{name}: format_version {version}, this program reads {FORMAT_VERSION}; prepare the dataset again"
        )
    if preparation.get("sha256", own := preparation_sha256(preparation)) != own:  # absent in datasets from before it
        raise DatasetError(f"{name}: damaged (its checksum of itself is another); copy the dataset again")
    preparation.pop("sha256", None)
    return preparation


def linked_parts(
    dataset_dir: Path, preparation: Mapping[str, Any]
) -> Iterable[tuple[Mapping[str, Any], Path, dict[str, str]]]:
    """Of a view (`data_prep.merge`) whose shards are symbolic links: the facts of each part, its directory, and the
    part's name of each of the view's shards that is the part's. Nothing of another dataset."""
    num_before = dict.fromkeys(SPLITS, 0)
    for part in preparation.get("parts", ()):
        names = {}
        for split, number in part["num_shards"].items():
            names |= {shard_name(split, num_before[split] + index): shard_name(split, index) for index in range(number)}
            num_before[split] += number
        link = dataset_dir / next(iter(names))
        if link.is_symlink():
            yield part, (dataset_dir / link.readlink().parent).resolve(), names


def damaged_tables(dataset_dir: str | os.PathLike, preparation: Mapping[str, Any]) -> list[str]:
    """Files that are missing or not as preparation.json says, a line each; of the shards only whether
    they are there. [] if there are none."""
    problems = []
    for name, checksum in preparation["checksums"].items():
        path = Path(dataset_dir) / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif ".array_record-" not in name and file_sha256(path) != checksum:
            problems.append(f"{name}: checksum differs from preparation.json")
    if dataset_fingerprint(preparation["checksums"]) != preparation["fingerprint"]:
        problems.append("preparation.json: the fingerprint is not that of the checksums")
    return problems


def check_tables(dataset_dir: str | os.PathLike, preparation: Mapping[str, Any]) -> None:
    """Raises DatasetError if `damaged_tables` finds any; the shards are checked record by record as they are read.
    The copy of a dataset that is named by a URL was checked when it was opened (`data_prep.dataset_cache`)."""
    if stores.is_url(dataset_dir):
        return
    if problems := damaged_tables(dataset_dir, preparation):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DatasetError(f"{dataset_dir}: {problems[0]}{more}; copy the dataset again, or prepare it again")


def read_volumes(dataset_dir: str | os.PathLike, split: str | None = None) -> list[dict[str, Any]]:
    """The rows of volumes.csv (of one split, if named), typed by `VOLUME_COLUMNS`; empty cells are None."""
    volumes = _read_table(local_directory(dataset_dir) / VOLUMES_FILE, VOLUME_COLUMNS)
    return [volume for volume in volumes if split is None or volume["split"] == split]


def slice_columns(labels: Mapping[str, Mapping[str, Any]], masks: bool) -> dict[str, type]:
    """Name -> type of the columns of slices.csv; {} if the dataset has no such table. `labels`: of preparation.json."""
    names = [name for name, facts in labels.items() if facts["level"] == "slice"]
    if not (names or masks):
        return {}
    area = {MASK_AREA_COLUMN: int} if masks else {}
    return {"volume_id": str, "slice_index": int} | area | dict.fromkeys(names, int)


def label_columns(labels: Mapping[str, Mapping[str, Any]]) -> dict[str, type]:
    """Name -> type of the columns of labels.csv; {} if the dataset has no such table. `labels`: of preparation.json."""
    names = [name for name, facts in labels.items() if facts["level"] != "slice"]
    return {"volume_id": str} | dict.fromkeys(names, int) if names else {}


def region_columns(masks: Mapping[str, Any] | None) -> dict[str, type]:
    """Name -> type of the columns of regions.csv; {} if the dataset has no such table. `masks`: of preparation.json."""
    if not masks:
        return {}
    return LIDC_REGION_COLUMNS if masks["source"] == "lidc_idri" else REGION_COLUMNS


def read_slices(dataset_dir: str | os.PathLike, split: str | None = None) -> list[dict[str, Any]]:
    return Dataset.open(dataset_dir).slices(split)


def read_labels(dataset_dir: str | os.PathLike) -> list[dict[str, Any]]:
    return Dataset.open(dataset_dir).labels()


def read_regions(dataset_dir: str | os.PathLike) -> list[dict[str, Any]]:
    return Dataset.open(dataset_dir).regions()


def _read_table(path: Path, columns: Mapping[str, type]) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DatasetError(f"{path}: no such file; run data_prep.prepare, again if it was stopped")
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            return [{name: _value(row[name], kind) for name, kind in columns.items()} for row in reader]
        except (KeyError, ValueError, TypeError, csv.Error) as error:
            line = reader.line_num + isinstance(error, UnicodeDecodeError)
            what = f"line {line}: damaged ({type(error).__name__}: {error})"
    raise DatasetError(f"{path}, {what}; copy it again, or prepare the dataset again")


def _value(cell: str, kind: type) -> Any:
    if kind is str:
        return sys.intern(cell)  # a table repeats each volume_id for all its slices
    if cell == "":
        return None
    return {"yes": True, "no": False}[cell] if kind is bool else kind(cell)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard file as preparation.json lists it."""

    name: str
    num_records: int


def split_shards(preparation: Mapping[str, Any], split: str) -> list[Shard]:
    """The shards of a split in order."""
    if split not in preparation["splits"]:
        raise DatasetError(
            f"split {split!r} is not in this dataset (it has {', '.join(preparation['splits'])}); "
            "prepare it with other --splits or --holdout_volumes"
        )
    lengths = preparation["splits"][split]["shard_lengths"]
    return [Shard(shard_name(split, index), length) for index, length in enumerate(lengths)]


class LinkedPart(NamedTuple):
    """A dataset whose shards a view (`data_prep.merge`) links to."""

    directory: Path
    merged: str  # its fingerprint when it was merged
    now: str | None  # its fingerprint now; None: it is not a complete dataset


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A complete dataset, opened: the handle by which all readers share it.

    preparation.json is read and checked once, at `open`. Each table is read at its first use and kept: the rows belong
    to all readers and are not to be changed. A pickled handle holds no tables.
    """

    name: str  # the path or URL that the user typed
    directory: Path  # on this machine
    preparation: dict[str, Any]  # content of preparation.json, without its checksum of itself
    parts: tuple[LinkedPart, ...] = ()  # of a view

    @classmethod
    def open(cls, path_or_url: str | os.PathLike, splits: Sequence[str] = ()) -> "Dataset":
        """Opens a directory, or the copy on this machine of a dataset on an object store.

        Args:
            path_or_url: the dataset directory or its URL.
            splits: their shards are fetched now if the dataset is named by a URL; `source` fetches others.

        Raises:
            DatasetError: the directory is absent, incomplete, damaged or of another format version, or the store
                cannot be read.
        """
        name = os.fspath(path_or_url)
        directory = local_directory(path_or_url, splits)
        preparation = read_preparation_file(directory)
        return cls(name, directory, preparation, tuple(_open_parts(directory, preparation)))

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints mean equal data."""
        return self.preparation["fingerprint"]

    def volumes(self, split: str | None = None) -> list[dict[str, Any]]:
        """The rows of volumes.csv (of one split, if named), typed by `VOLUME_COLUMNS`; empty cells are None."""
        return [row for row in self._volumes if split is None or row["split"] == split]

    def slices(self, split: str | None = None) -> list[dict[str, Any]]:
        """The rows of slices.csv (of one split, if named), one a record, in the order of the records.

        `volume_id`, `slice_index`, with masks `mask_area_px`, and the class of each slice label (None: missing).
        [] if the dataset has neither slice labels nor masks.
        """
        if split is None:
            return self._slices
        volume_ids = {volume["volume_id"] for volume in self.volumes(split)}
        return [row for row in self._slices if row["volume_id"] in volume_ids]

    def labels(self) -> list[dict[str, Any]]:
        """The rows of labels.csv in the order of volumes.csv: `volume_id` and the class of each label of volume or
        patient (None: missing). [] if the dataset has no such labels."""
        return self._labels

    def regions(self) -> list[dict[str, Any]]:
        """The rows of regions.csv (`REGION_COLUMNS` or `LIDC_REGION_COLUMNS`). [] if the dataset has no masks."""
        return self._regions

    def source(self, split: str) -> "SliceSource":
        """Random access to the decoded records of a split. Raises DatasetError if there is no such split."""
        return SliceSource(self, split)

    def check_tables(self) -> None:
        """Raises DatasetError if `damaged_tables` finds any; the shards are checked record by record as they are read.
        The copy of a dataset that is named by a URL was checked when it was opened (`data_prep.dataset_cache`)."""
        check_tables(self.name, self.preparation)

    @functools.cached_property
    def _volumes(self) -> list[dict[str, Any]]:
        return _read_table(self.directory / VOLUMES_FILE, VOLUME_COLUMNS)

    @functools.cached_property
    def _slices(self) -> list[dict[str, Any]]:
        return self._optional_table(SLICES_FILE, slice_columns(self.preparation["labels"], self._has_masks))

    @functools.cached_property
    def _labels(self) -> list[dict[str, Any]]:
        return self._optional_table(LABELS_FILE, label_columns(self.preparation["labels"]))

    @functools.cached_property
    def _regions(self) -> list[dict[str, Any]]:
        return self._optional_table(REGIONS_FILE, region_columns(self.preparation["masks"]))

    @property
    def _has_masks(self) -> bool:
        return bool(self.preparation["masks"])

    def _optional_table(self, name: str, columns: Mapping[str, type]) -> list[dict[str, Any]]:
        return _read_table(self.directory / name, columns) if columns else []

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def _open_parts(directory: Path, preparation: Mapping[str, Any]) -> Iterator[LinkedPart]:
    """Raises DatasetError if a shard of the view is no longer the shard that was merged."""
    for part, part_dir, names in linked_parts(directory, preparation):
        if not (part_dir / PREPARATION_FILE).is_file():  # the part is being extended, moved or removed
            yield LinkedPart(part_dir, part["fingerprint"], None)
            continue
        opened = Dataset.open(part_dir)
        checksums = opened.preparation["checksums"]
        if any(preparation["checksums"][name] != checksums.get(own_name) for name, own_name in names.items()):
            raise DatasetError(
                f"{directory}: its part {part_dir} was prepared again since they were merged; merge again into a new "
                "directory"
            )
        yield LinkedPart(part_dir, part["fingerprint"], opened.fingerprint)


class SliceSource:
    """Random access to the slices of a split: `source[n]` is the decoded record n.

    Files are opened at first use, so that a source is cheap to make and can be pickled. Thread-safe. The repr
    holds the dataset's fingerprint and nothing of the machine.
    """

    def __init__(self, dataset: Dataset, split: str):
        preparation = dataset.preparation
        self._shards = split_shards(preparation, split)
        self._dataset_dir = local_directory(dataset.name, (split,))  # the shards are fetched if they are on a store
        self._ends = np.cumsum([shard.num_records for shard in self._shards]).tolist()
        size, channels = preparation["image_size"], preparation["channels"]
        self.image_shape = (size, size, channels)
        self._repr = f"SliceSource({split!r}, fingerprint={dataset.fingerprint!r})"
        self._readers: dict[int, Any] = {}
        volumes = dataset.volumes(split)
        self._first_records = [volume["first_record"] for volume in volumes]
        self._volume_ids = [volume["volume_id"] for volume in volumes]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`image` [H, W, C] uint8, `mask` [H, W] uint8 if the dataset has masks, and the scalars `volume_id`,
        `slice_index`, `position_mm`, `pair_valid`. Raises DatasetError if it cannot be read or is another slice."""
        index = index.__index__()
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        within = index - (self._ends[shard - 1] if shard else 0)
        try:
            record = decode_record(self._reader(shard).read([within])[0], self.image_shape)
        except DatasetError:
            raise
        except Exception as error:  # ArrayRecord raises several types on damaged bytes, and so does decoding them
            raise self._damaged(shard, f"record {within} cannot be read, {type(error).__name__}") from None
        volume = bisect.bisect_right(self._first_records, index) - 1
        expected = (self._volume_ids[volume], index - self._first_records[volume]) if volume >= 0 else None
        if (record["volume_id"], record["slice_index"]) != expected:
            raise self._damaged(shard, f"record {within} is another slice than volumes.csv says")
        return record

    def _damaged(self, shard: int, what: str) -> DatasetError:
        path = self._dataset_dir / self._shards[shard].name
        return DatasetError(
            f"{path}: damaged ({what}); find what else is by python -m data_prep.describe --verify, and copy it again"
        )

    def _reader(self, shard: int) -> Any:
        reader = self._readers.get(shard)
        if reader is None:
            from array_record.python import array_record_module

            path = self._dataset_dir / self._shards[shard].name
            if not path.is_file():
                raise DatasetError(f"{path}: a shard is missing; copy the dataset again or prepare it again")
            opened = array_record_module.ArrayRecordReader(str(path), options="readahead_buffer_size:0")
            if opened.num_records() != self._shards[shard].num_records:
                raise self._damaged(shard, f"{opened.num_records()} records")
            reader = self._readers.setdefault(shard, opened)  # two threads may open it: the first one stays
        return reader

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}

    def __repr__(self) -> str:
        return self._repr


def open_split(dataset_dir: str | os.PathLike, split: str) -> SliceSource:
    """Random access to the decoded records of a split. Raises DatasetError if there is no such split."""
    return Dataset.open(dataset_dir).source(split)
