"""Batches of slices for the devices: grain shuffles and reads them. The images stay uint8.

The order of the slices depends on the seed alone, not on the number of hosts, devices or reading
threads.
"""

import math
from collections.abc import Iterator

import grain
import numpy as np

from ctssl_jax.data.slices import NeighbourSource


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

    Every process gets consecutive items of each part. Joined in the order of the processes they are
    the part that a single process would get.

    Args:
      source: the slices.
      batch_size: global batch size, divisible by `microbatches * process_count`.
      seed: fixes the order of all epochs.
      microbatches: number of parts that make a batch.
      start_step: number of batches (not parts) that were used before; the iterator continues there.
      process_index: this process's number.
      process_count: number of processes.
      num_threads: reading threads.

    Returns:
      Iterator of parts with the arrays of `NeighbourSource.read`, b = batch_size / microbatches /
      process_count items each.
    """
    positive_share = source.targets.positive_share
    if positive_share:
        kinds = [
            grain.MapDataset.source(np.flatnonzero(kind)).seed(seed).shuffle().repeat(None)
            for kind in (source.positive, ~source.positive)
        ]
        items = grain.MapDataset.mix(kinds, [positive_share, 1 - positive_share])
    else:
        items = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None)
    part_size = batch_size // microbatches // process_count
    # endless, so no remainder is dropped
    parts = items.batch(part_size, drop_remainder=True)[process_index::process_count]
    iterator = iter(parts.map(source.read).to_iter_dataset(_reading(num_threads)))
    if start_step:
        iterator.set_state({"next_index": start_step * microbatches})
    return iterator


def evaluation_batches(
    source: NeighbourSource,
    batch_size: int,
    *,
    items: np.ndarray | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
) -> Iterator[dict[str, np.ndarray]]:
    """Every item once, in order. The last batch is padded with items of weight 0.

    So all batches have one shape, and all processes get the same number of batches. Arguments as in
    `training_batches`; a batch is one part. `items` names the items of a part of the split, see
    `subset.spread_items`; by default all are read.
    """
    chosen = np.arange(len(source)) if items is None else items
    padded = math.ceil(len(chosen) / batch_size) * batch_size

    def read(places: np.ndarray) -> dict[str, np.ndarray]:
        batch = source.read(chosen[np.minimum(places, len(chosen) - 1)])
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
