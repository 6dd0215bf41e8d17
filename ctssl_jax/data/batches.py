"""Batches of slices for the devices: grain shuffles and reads them. The images stay uint8.

The order of the slices depends on the seed alone, not on the number of hosts, devices or reading
threads. A windowed order depends on the number of its streams, too.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from ctssl_jax.data.slices import NeighbourSource
from ctssl_jax.data.windowed import WindowedOrder, most_shards


class Windows(NamedTuple):
    """A windowed order in place of the global shuffle, see `ctssl_jax.data.windowed`.

    size: largest number of slices of a window.
    num_streams: streams that each give an equal part of every batch; a multiple of the number of
      processes, which share them.
    """

    size: int
    num_streams: int


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
    windows: Windows | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless shuffled batches, in `microbatches` parts each, reshuffled every epoch.

    Every process gets consecutive items of each part. Joined in the order of the processes they are
    the part that a single process would get.

    Args:
      source: the slices.
      batch_size: global batch size, divisible by `microbatches * process_count`, and by
        `microbatches * windows.num_streams`.
      seed: fixes the order of all epochs.
      microbatches: number of parts that make a batch.
      start_step: number of batches (not parts) that were used before; the iterator continues there.
      process_index: this process's number.
      process_count: number of processes.
      num_threads: reading threads.
      windows: a windowed order; None shuffles globally.

    Returns:
      Iterator of parts with the arrays of `NeighbourSource.read`, b = batch_size / microbatches /
      process_count items each.
    """
    part_size = batch_size // microbatches // process_count
    # endless, so no remainder is dropped
    if windows is None:
        items = _kinds_mixed(
            source,
            lambda kind: grain.MapDataset.source(kind).seed(seed).shuffle().repeat(None),
        )
        parts = items.batch(part_size, drop_remainder=True)[process_index::process_count]
    else:
        own = windows.num_streams // process_count
        streams = [
            _stream(source, seed, windows, process_index * own + number, part_size // own)
            for number in range(own)
        ]
        parts = grain.MapDataset.range(sys.maxsize).map(
            lambda number: np.concatenate([stream[number] for stream in streams])
        )
    iterator = iter(parts.map(source.read).to_iter_dataset(_reading(num_threads)))
    if start_step:
        iterator.set_state({"next_index": start_step * microbatches})
    return iterator


def _stream(
    source: NeighbourSource, seed: int, windows: Windows, number: int, part_size: int
) -> grain.MapDataset:
    """The parts of a stream of a windowed order: [part_size] items each."""

    def order(kind: np.ndarray) -> grain.MapDataset:
        return grain.MapDataset.source(
            WindowedOrder(
                kind,
                source.shards[kind],
                seed,
                windows.size,
                number,
                windows.num_streams,
                source.fetch_ahead,
            )
        )

    return _kinds_mixed(source, order).batch(part_size, drop_remainder=True)


def _kinds(source: NeighbourSource) -> list[np.ndarray]:
    """Items with and without a positive label or foreground, if batches have a share of each; else
    all in one."""
    if source.targets.positive_share:
        return [np.flatnonzero(kind) for kind in (source.positive, ~source.positive)]
    return [np.arange(len(source))]


def _kinds_mixed(
    source: NeighbourSource, order: Callable[[np.ndarray], grain.MapDataset]
) -> grain.MapDataset:
    """Endless items, each kind in an order of its own."""
    orders = [order(kind) for kind in _kinds(source)]
    share = source.targets.positive_share
    return grain.MapDataset.mix(orders, [share, 1 - share]) if share else orders[0]


def bytes_of_windows(
    source: NeighbourSource,
    shard_bytes: Sequence[int],
    windows: Windows,
    part_size: int,
    num_threads: int,
    process_count: int = 1,
) -> int:
    """Bytes of the shards that a process needs at a time at most, so that none is fetched twice in
    an epoch: those of the window that ends, of the one that is read, and of the next one.

    Args:
      source: the slices.
      shard_bytes: size of each shard of the split.
      windows: the order.
      part_size: slices of a part of a batch in this process.
      num_threads: reading threads.
      process_count: number of processes.
    """
    items = 3 * max(windows.size, batches_read_ahead(num_threads) * part_size)
    streams = windows.num_streams // process_count
    number = sum(
        streams * most_shards(np.bincount(source.shards[kind]).tolist(), items)
        for kind in _kinds(source)
    )
    return sum(sorted(shard_bytes)[-number:])


def evaluation_batches(
    source: NeighbourSource,
    batch_size: int,
    *,
    items: np.ndarray | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
) -> Iterator[dict[str, np.ndarray]]:
    """Every item once, in order. The last batch is padded with items of weight 0, the first ones
    again: a loss that compares the items of a batch counts them, and copies of one would be far
    from a sample.

    So all batches have one shape, and all processes get the same number of batches. Arguments as in
    `training_batches`; a batch is one part. `items` names the items of a part of the split, see
    `subset.spread_items`; by default all are read.
    """
    chosen = np.arange(len(source)) if items is None else items
    padded = math.ceil(len(chosen) / batch_size) * batch_size

    def read(places: np.ndarray) -> dict[str, np.ndarray]:
        batch = source.read(chosen[places % len(chosen)])
        return batch | {"weight": (places < len(chosen)).astype(np.float32)}

    places = grain.MapDataset.range(padded)
    batches = places[process_index::process_count].batch(batch_size // process_count)
    return iter(batches.map(read).to_iter_dataset(_reading(num_threads)))


def picture_batch(source: NeighbourSource, batch_size: int, number: int) -> dict[str, np.ndarray]:
    """A batch whose first `number` items are spread evenly over the split, or over its slices with
    foreground if the task has masks. All others repeat the last one."""
    candidates = np.arange(len(source))
    if source.targets.mask and source.positive.any():
        candidates = np.flatnonzero(source.positive)
    spread = [candidates[int((i + 0.5) * len(candidates) / number)] for i in range(number)]
    items = [source[index] for index in (spread + spread[-1:] * batch_size)[:batch_size]]
    return {name: np.stack([item[name] for item in items]) for name in items[0]}


def batches_read_ahead(num_threads: int) -> int:
    """Batches that are in memory at the same time: in the buffer, on their way, and in use."""
    return _buffer_size(num_threads) + 2


def _reading(num_threads: int) -> grain.ReadOptions:
    """Each thread makes whole batches."""
    return grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=_buffer_size(num_threads)
    )


def _buffer_size(num_threads: int) -> int:
    """The buffer must have room for one batch of each thread."""
    return max(8, num_threads)
