"""The windowed order: each epoch shuffles the shards, and then the slices in windows of them.

So a process reads few shards at a time, in contrast to a global shuffle, whose batches touch all.
grain's own window shuffle does not know epochs: its last window would reach into the next one.
"""

import bisect
import functools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class _Epoch(NamedTuple):
    """What a stream reads in an epoch.

    shards: the shards that hold items, in this epoch's order.
    ends: number of items up to the end of each.
    begin, count: the stream's range of all these items.
    first: the stream's position of its first item.
    windows: number of windows, which differ by one item at most.
    """

    shards: list[int]
    ends: list[int]
    begin: int
    count: int
    first: int
    windows: int


class WindowedOrder:
    """The items of one stream, endless: `order[position]` is an item.

    In every epoch all streams together have each item exactly once. Each has a range of the
    shuffled shards; it begins the epoch within one item of the others, since the ranges' lengths
    take turns where the items cannot be divided equally. An item is found from its position alone,
    so a stream goes on anywhere at once.

    Args:
      items: [N] numbers of the items.
      shards: [N] the shard of each.
      seed: fixes the order of all epochs.
      window: largest number of items of a window, whose order is uniformly random.
      stream: this stream's number.
      num_streams: number of streams.
      begun: called with the shards of a window and of the next one when the window begins.
    """

    def __init__(
        self,
        items: np.ndarray,
        shards: np.ndarray,
        seed: int,
        window: int,
        stream: int = 0,
        num_streams: int = 1,
        begun: Callable[[list[int]], None] = lambda shards: None,
    ):
        by_shard = np.argsort(shards, kind="stable")
        self._items = np.asarray(items)[by_shard]
        self._shards, self._counts = np.unique(shards, return_counts=True)
        self._starts = np.cumsum(self._counts) - self._counts
        self._seed, self._window = seed, window
        self._stream, self._num_streams = stream, num_streams
        self._begun, self._current = begun, (-1, -1)
        self._epoch = functools.lru_cache(maxsize=4)(self._plan)
        self._order_of = functools.lru_cache(maxsize=4)(self._permutation)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, position: int) -> int:
        # Item n of the stream is the n * num_streams + stream-th of all streams together.
        number = (position * self._num_streams + self._stream) // len(self._items)
        epoch = self._epoch(number)
        within = position - epoch.first
        window = ((within + 1) * epoch.windows - 1) // epoch.count
        if self._current != (number, window):
            self._current = (number, window)
            self._begun(self._shards_of(epoch, window) + self._shards_after(number, window))
        begin, end = _bounds(epoch, window)
        order = self._order_of(end - begin, number, self._stream + 1, window)
        place = epoch.begin + begin + int(order[within - begin])
        slot = bisect.bisect_right(epoch.ends, place)
        shard = epoch.shards[slot]
        before = epoch.ends[slot - 1] if slot else 0
        return int(self._items[self._starts[shard] + place - before])

    def _plan(self, number: int) -> _Epoch:
        total, streams = len(self._items), self._num_streams
        order = self._permutation(len(self._shards), number, 0, 0).tolist()
        # the first position of each stream that belongs to this epoch, and to the next
        firsts = [-(-(number * total - stream) // streams) for stream in range(streams)]
        nexts = [-(-((number + 1) * total - stream) // streams) for stream in range(streams)]
        counts = [after - first for first, after in zip(firsts, nexts, strict=True)]
        count = counts[self._stream]
        return _Epoch(
            order,
            np.cumsum(self._counts[order]).tolist(),
            sum(counts[: self._stream]),
            count,
            firsts[self._stream],
            -(-count // self._window),
        )

    def _shards_of(self, epoch: _Epoch, window: int) -> list[int]:
        begin, end = _bounds(epoch, window)
        first = bisect.bisect_right(epoch.ends, epoch.begin + begin)
        last = bisect.bisect_right(epoch.ends, epoch.begin + end - 1)
        return self._shards[epoch.shards[first : last + 1]].tolist()

    def _shards_after(self, number: int, window: int) -> list[int]:
        epoch = self._epoch(number)
        if window + 1 < epoch.windows:
            return self._shards_of(epoch, window + 1)
        following = self._epoch(number + 1)
        return self._shards_of(following, 0) if following.count else []

    def _permutation(self, length: int, epoch: int, stream: int, window: int) -> np.ndarray:
        # NumPy keeps the numbers of RandomState for ever, in contrast to those of a Generator.
        random = np.random.RandomState([self._seed, epoch, stream, window])
        return random.permutation(length)


def _bounds(epoch: _Epoch, window: int) -> tuple[int, int]:
    begin, end = (epoch.count * edge // epoch.windows for edge in (window, window + 1))
    return begin, end


def most_shards(counts: Sequence[int], items: int) -> int:
    """The largest number of shards that so many items in a row can lie in.

    Args:
      counts: items of each shard.
      items: number of items in a row; they may reach from one epoch into the next.
    """
    held = sorted(count for count in counts if count)
    # An epoch's part of the row cuts two shards at most, and holds all those between them.
    whole = bisect.bisect_right(np.cumsum(held).tolist(), items)
    return min(len(held), whole + 4)
