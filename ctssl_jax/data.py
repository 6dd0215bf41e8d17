"""Slices from a dataset directory to the devices: grain reads, shuffles and batches; uint8 travels.

A batch item is a tuple of neighbouring slices of one volume, named by their offsets: (0,) for most tasks, (0, 1) for
next-slice prediction. The order of the slices depends on the seed alone: not on the number of hosts, devices or
reading threads.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from ctssl_jax.command_line import InputError
from data_prep import dataset as dataset_directory


def select_channels(preparation: dict, windows: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """Channels of a dataset that hold the wanted windows.

    Args:
      preparation: contents of `preparation.json`.
      windows: (level, width) pairs in HU; empty takes all channels.

    Raises:
      InputError: a window that the dataset was not prepared with.
    """
    prepared = [(float(window["level"]), float(window["width"])) for window in preparation["windows"]]
    if not windows:
        return tuple(range(len(prepared)))
    wanted = [(float(level), float(width)) for level, width in windows]
    for window in wanted:
        if window not in prepared:
            have = ", ".join(f"{level:g}/{width:g}" for level, width in prepared)
            flag = f"--window={window[0]:g},{window[1]:g}"
            raise InputError(
                f"config.windows asks for level/width {window[0]:g}/{window[1]:g}, but the dataset holds {have}; "
                f"prepare it again with {flag}, or change config.windows"
            )
    return tuple(prepared.index(window) for window in wanted)


def selected_windows(preparation: dict, channels: Sequence[int]) -> list[tuple[float, float]]:
    """(level, width) in HU of some channels of a dataset."""
    windows = [preparation["windows"][channel] for channel in channels]
    return [(float(window["level"]), float(window["width"])) for window in windows]


def neighbour_table(volumes: Sequence[dict], offsets: Sequence[int]) -> np.ndarray:
    """Record numbers of every tuple of neighbours that exists within one volume, across no gap.

    Args:
      volumes: rows of `volumes.csv` of one split (`first_record`, `num_slices`, and `gap_positions`: the slice
        indices, separated by blanks, whose next slice is missing).
      offsets: slice offsets, e.g. (0, 1).

    Returns:
      `[N, len(offsets)] int64`, in record order.
    """
    tables = []
    for volume in volumes:
        index = np.arange(volume["num_slices"])
        neighbours = index[:, None] + np.asarray(offsets)[None, :]
        starts = np.zeros(volume["num_slices"], np.int64)
        starts[np.array(volume["gap_positions"].split(), np.int64) + 1] = 1
        segment = np.cumsum(starts)
        inside = ((neighbours >= 0) & (neighbours < volume["num_slices"])).all(axis=1)
        neighbours = neighbours[inside]
        unbroken = (segment[neighbours] == segment[neighbours[:, :1]]).all(axis=1)
        tables.append(neighbours[unbroken] + volume["first_record"])
    return np.concatenate(tables) if tables else np.zeros((0, len(offsets)), np.int64)


class NeighbourSource:
    """Random access to tuples of neighbouring slices of one split.

    Item `i` is `{"images": uint8 [len(offsets), H, W, C], "record_index": int32, "weight": float32 1}`; the record
    index is that of the first slice of the tuple, counted within the split.
    """

    def __init__(self, dataset: str | Path, split: str, channels: Sequence[int], offsets: Sequence[int]):
        preparation = dataset_directory.read_preparation(dataset)
        self.volumes = dataset_directory.read_volumes(dataset, split)
        self.table = neighbour_table(self.volumes, offsets)
        self._records = dataset_directory.open_split(dataset, split) if len(self.table) else ()
        self._channels = None if tuple(channels) == tuple(range(preparation["channels"])) else list(channels)
        self._name = f"NeighbourSource({preparation['fingerprint'][:16]}, {split}, {channels}, {offsets})"

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, item: int) -> dict[str, np.ndarray]:
        records = self.table[item]
        images = [self._records[int(record)]["image"] for record in records]
        images = np.stack(images) if len(images) > 1 else images[0][None]  # a view: the batch copies it once anyway
        if self._channels is not None:
            images = images[..., self._channels]
        return {"images": images, "record_index": np.int32(records[0]), "weight": np.float32(1)}

    def __repr__(self) -> str:
        return self._name


def open_source(dataset: str | Path, split: str, channels: Sequence[int], offsets: Sequence[int]) -> NeighbourSource:
    """Open a split.

    Raises:
      InputError: the split is empty, or has no tuple of neighbours with these offsets.
    """
    source = NeighbourSource(dataset, split, channels, offsets)
    if not source.volumes:
        raise InputError(
            f"the dataset {dataset} has no {split} split; prepare it with --splits that give {split} a share "
            "(three patients or more)"
        )
    if not len(source):
        raise InputError(
            f"the {split} split of {dataset} has no slices with neighbours at offsets {tuple(offsets)}; choose a "
            "smaller distance, or prepare longer scans"
        )
    return source


def training_batches(
    source: NeighbourSource,
    batch_size: int,
    seed: int,
    *,
    microbatches: int = 1,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless shuffled batches, in `microbatches` parts each, reshuffled every epoch.

    Every process gets one run of consecutive items of each part: joined in the order of the processes they are the
    part that one process alone would get.

    Args:
      source: the slices.
      batch_size: global batch size, divisible by `microbatches * process_count`.
      seed: fixes the order of all epochs.
      microbatches: number of parts that make a batch.
      start_step: number of batches (not parts) already consumed: the iterator goes on exactly there.
      process_index: this process's number.
      process_count: number of processes.
      num_threads: reading threads.

    Returns:
      Iterator of parts `{"images": uint8 [b, K, H, W, C], "record_index": int32 [b], "weight": float32 [b]}` with
      b = batch_size / microbatches / process_count.
    """
    items = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)
    share = batch_size // microbatches // process_count
    parts = items.batch(share, drop_remainder=True)[process_index::process_count]  # endless: nothing is dropped
    iterator = iter(parts.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=8)))
    if start_step:
        iterator.set_state({"next_index": start_step * microbatches})
    return iterator


def evaluation_batches(
    source: NeighbourSource,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
) -> Iterator[dict[str, np.ndarray]]:
    """Every item once, in order; the last batch is padded with items of weight 0, so that all batches have one shape.

    All processes see the same number of batches. Arguments and items as in `training_batches`, with one part a batch.
    """
    padded = math.ceil(len(source) / batch_size) * batch_size

    def read(index: int) -> dict[str, Any]:
        item = source[min(index, len(source) - 1)]
        return item if index < len(source) else {**item, "weight": np.float32(0)}

    items = grain.MapDataset.range(padded).map(read)
    batches = items[process_index::process_count].batch(batch_size // process_count)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=8)))


def picture_batch(source: NeighbourSource, batch_size: int, number: int) -> dict[str, np.ndarray]:
    """One batch whose first `number` items are spread evenly over the split; the rest repeats the last one."""
    spread = [int((i + 0.5) * len(source) / number) for i in range(number)]
    items = [source[index] for index in (spread + spread[-1:] * batch_size)[:batch_size]]
    return {name: np.stack([item[name] for item in items]) for name in items[0]}
