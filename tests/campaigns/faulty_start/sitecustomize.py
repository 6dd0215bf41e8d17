"""Faults of the machine, for `tests.campaigns.faults`: Python runs this file at the start of every
process whose PYTHONPATH names its folder, worker processes included.

    FAULT_CLOCK=1       the wall clock jumps by ten years, back and forth, every few times that it
    is asked FAULT_READ=NAME     reading a file of this name fails (EIO), but for its first 4096
    bytes
"""

import builtins
import errno
import io
import itertools
import os
import time

_TEN_YEARS = 10 * 365 * 86400


def _jumping(clock, unit: int):
    calls = itertools.count()
    return lambda: clock() + _TEN_YEARS * unit * (next(calls) // 5 % 3 - 1)


class _FailingFile(io.FileIO):
    def _check(self, size: int) -> None:
        if size < 0 or self.tell() + size > 4096:
            raise OSError(errno.EIO, os.strerror(errno.EIO), self.name)

    def read(self, size=-1):
        self._check(-1 if size is None else size)
        return super().read(size)

    def readall(self):
        self._check(-1)

    def readinto(self, buffer):
        self._check(len(buffer))
        return super().readinto(buffer)


def _open(file, mode="r", buffering=-1, *arguments, **options):
    if (
        isinstance(file, str | os.PathLike)
        and os.path.basename(file) == os.environ["FAULT_READ"]
        and mode == "rb"
    ):
        raw = _FailingFile(file)
        return io.BufferedReader(raw, 4096) if buffering else raw
    return _real_open(file, mode, buffering, *arguments, **options)


if os.environ.get("FAULT_CLOCK"):
    time.time, time.time_ns = _jumping(time.time, 1), _jumping(time.time_ns, 10**9)
if os.environ.get("FAULT_READ"):
    _real_open, builtins.open = builtins.open, _open
