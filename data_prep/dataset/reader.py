"""Reading a dataset: the handle `Dataset`, and random access to its slices."""

import bisect
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

from data_prep.dataset import cache
from data_prep.dataset.schema import (
    LABELS_FILE,
    PREPARATION_FILE,
    REGIONS_FILE,
    SLICES_FILE,
    VOLUME_COLUMNS,
    VOLUMES_FILE,
    dataset_fingerprint,
    linked_parts,
    read_preparation,
    split_shards,
    table_columns,
)
from data_prep.dataset.storage import READER_OPTIONS, decode_record, read_table
from data_prep.system import stores
from data_prep.system.errors import DatasetError
from data_prep.system.files import file_sha256


class LinkedPart(NamedTuple):
    """A dataset whose shards a view (`data_prep.merge`) links to."""

    directory: Path
    merged: str  # its fingerprint when it was merged
    now: str | None  # its fingerprint now; None: it is not a complete dataset


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A complete dataset, opened: the handle by which all readers share it.

    preparation.json is read and checked once, at `open`. Each table is read at its first use and
    kept. All readers share its rows, so do not change them. A pickled handle leaves the tables out.

    Attributes:
        name: the path or URL that the user typed.
        directory: on this machine.
        preparation: content of preparation.json, without its checksum of itself.
        parts: the datasets of a view (`data_prep.merge`).
    """

    name: str
    directory: Path
    preparation: dict[str, Any]
    parts: tuple[LinkedPart, ...] = ()
    # file name -> rows of the tables that were read
    _tables: dict[str, list[dict[str, Any]]] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )

    @classmethod
    def open(cls, path_or_url: str | os.PathLike, splits: Sequence[str] = ()) -> "Dataset":
        """Opens a directory, or the copy on this machine of a dataset on an object store.

        Args:
            path_or_url: the dataset directory or its URL.
            splits: the splits whose shards are fetched now if the dataset is on a store; `source`
                fetches the others.

        Raises:
            DatasetError: the directory is absent, incomplete, damaged or of another format version,
                or the store cannot be read.
        """
        name = os.fspath(path_or_url)
        if stores.is_url(name):
            directory, preparation = cache.fetch(name, splits)
        else:
            directory = stores.local_path(name)
            preparation = read_preparation(directory)
        return cls(name, directory, preparation, tuple(_open_parts(directory, preparation)))

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints mean equal data."""
        return self.preparation["fingerprint"]

    def volumes(self, split: str | None = None) -> list[dict[str, Any]]:
        """The rows of volumes.csv (of one split, if named), typed by `VOLUME_COLUMNS`; empty cells
        are None."""
        return [row for row in self._rows(VOLUMES_FILE) if split is None or row["split"] == split]

    def slices(self, split: str | None = None) -> list[dict[str, Any]]:
        """The rows of slices.csv (of one split, if named), one a record, in the order of the
        records.

        `volume_id`, `slice_index`, with masks `mask_area_px`, and the class of each slice label
        (None: missing). [] if the dataset has neither slice labels nor masks.
        """
        if split is None:
            return self._rows(SLICES_FILE)
        volume_ids = {volume["volume_id"] for volume in self.volumes(split)}
        return [row for row in self._rows(SLICES_FILE) if row["volume_id"] in volume_ids]

    def labels(self) -> list[dict[str, Any]]:
        """The rows of labels.csv in the order of volumes.csv: `volume_id` and the class of each
        label of volume or patient (None: missing). [] if the dataset has no such labels."""
        return self._rows(LABELS_FILE)

    def regions(self) -> list[dict[str, Any]]:
        """The rows of regions.csv (`REGION_COLUMNS` or `LIDC_REGION_COLUMNS`). [] if the dataset
        has no masks."""
        return self._rows(REGIONS_FILE)

    def source(self, split: str) -> "SliceSource":
        """Random access to the decoded records of a split. Raises DatasetError if there is no such
        split."""
        self.fetch((split,))
        return SliceSource(self, split)

    def fetch(self, splits: Iterable[str]) -> None:
        """Fetches the missing shards of some splits if the dataset is on a store."""
        if stores.is_url(self.name):
            cache.fetch(self.name, tuple(splits))

    def check_tables(self) -> None:
        """Raises DatasetError if `damaged_tables` names a file.

        Records are checked as they are read. `open` checked the copy of a dataset on a store.
        """
        if stores.is_url(self.name):
            return
        if problems := self.damaged_tables():
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise DatasetError(
                f"{self.name}: {problems[0]}{more}; copy the dataset again, or prepare it again"
            )

    def damaged_tables(self) -> list[str]:
        """A line for each missing file and each table that differs from preparation.json."""
        problems = []
        for name, checksum in self.preparation["checksums"].items():
            path = self.directory / name
            if not path.is_file():
                problems.append(f"{name}: missing")
            elif ".array_record-" not in name and file_sha256(path) != checksum:
                problems.append(f"{name}: checksum differs from preparation.json")
        if dataset_fingerprint(self.preparation["checksums"]) != self.fingerprint:
            problems.append("preparation.json: its fingerprint differs from its checksums")
        return problems

    def _rows(self, name: str) -> list[dict[str, Any]]:
        if name not in self._tables:
            is_volumes = name == VOLUMES_FILE
            columns = VOLUME_COLUMNS if is_volumes else table_columns(self.preparation).get(name)
            self._tables[name] = read_table(self.directory / name, columns) if columns else []
        return self._tables[name]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": {}}


def _open_parts(directory: Path, preparation: Mapping[str, Any]) -> Iterator[LinkedPart]:
    """Raises DatasetError if a shard of the view is no longer the shard that was merged."""
    for part, part_dir, names in linked_parts(directory, preparation):
        # a run extends the part now, or it was moved or removed
        if not (part_dir / PREPARATION_FILE).is_file():
            yield LinkedPart(part_dir, part["fingerprint"], None)
            continue
        opened = Dataset.open(part_dir)
        checksums = opened.preparation["checksums"]
        if any(
            preparation["checksums"][name] != checksums.get(own_name)
            for name, own_name in names.items()
        ):
            raise DatasetError(
                f"{directory}: its part {part_dir} was prepared again since they were merged; "
                "merge again into a new directory"
            )
        yield LinkedPart(part_dir, part["fingerprint"], opened.fingerprint)


class SliceSource:
    """Random access to the slices of a split: `source[n]` is the decoded record n.

    Files are opened at first use, so that a source is cheap to make and can be pickled.
    Thread-safe. The repr holds the dataset's fingerprint and nothing of the machine.
    """

    def __init__(self, dataset: Dataset, split: str):
        preparation = dataset.preparation
        self._shards = split_shards(preparation, split)
        self._directory = dataset.directory
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
        """`image` [H, W, C] uint8, `mask` [H, W] uint8 if the dataset has masks, and the scalars
        `volume_id`, `slice_index`, `position_mm`, `pair_valid`.

        Raises:
            IndexError: there is no record of this number.
            DatasetError: the record cannot be read or is another slice.
        """
        index = index.__index__()
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        within = index - (self._ends[shard - 1] if shard else 0)
        try:
            record = decode_record(self._reader(shard).read([within])[0], self.image_shape)
        except DatasetError:
            raise
        # ArrayRecord raises several types on damaged bytes, and so does decoding them
        except Exception as error:
            raise self._damaged(
                shard, f"record {within} cannot be read, {type(error).__name__}"
            ) from None
        volume = bisect.bisect_right(self._first_records, index) - 1
        expected = (
            (self._volume_ids[volume], index - self._first_records[volume]) if volume >= 0 else None
        )
        if (record["volume_id"], record["slice_index"]) != expected:
            raise self._damaged(shard, f"record {within} is another slice than volumes.csv says")
        return record

    def _damaged(self, shard: int, problem: str) -> DatasetError:
        path = self._directory / self._shards[shard].name
        return DatasetError(
            f"{path}: damaged ({problem}); search all files by ctssl describe "
            "--verify, and copy it again"
        )

    def _reader(self, shard: int) -> Any:
        reader = self._readers.get(shard)
        if reader is None:
            path = self._directory / self._shards[shard].name
            if not path.is_file():
                raise DatasetError(
                    f"{path}: a shard is missing; copy the dataset again or prepare it again"
                )
            opened = array_record_module.ArrayRecordReader(str(path), options=READER_OPTIONS)
            if opened.num_records() != self._shards[shard].num_records:
                raise self._damaged(shard, f"{opened.num_records()} records")
            # two threads may open it: the first one stays
            reader = self._readers.setdefault(shard, opened)
        return reader

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}

    def __repr__(self) -> str:
        return self._repr
