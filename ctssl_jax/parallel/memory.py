"""Memory of devices and of programs, and its end in one line instead of a traceback.

A device of the CPU has a share of what the host can still give: the smallest of free memory
(`MemAvailable`), of what is left in the control groups of this process (Slurm, Kubernetes, Docker),
and of `ulimit -v`. Some of it is left to compilers and checkpoints. Other devices say themselves
how much JAX may use.
"""

import contextlib
import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, Literal, Var

from ctssl_jax.parallel.meeting import gather
from data_prep.system.errors import InputError

GIB = 2**30
COMPILING_SECONDS = 1800.0  # one host may have kept a program that the others compile
OF_THE_HOST = GIB // 2  # is left to compilers and checkpoints, where the CPU computes
USABLE = 0.9  # of a device: the share that settings may need which are said to fit
# In errors of XLA, CUDA and their libraries. A full disk is RESOURCE_EXHAUSTED, too.
_SIGNS = ("out of memory", "out_of_memory", "resource_exhausted", "alloc_failed", "bad_alloc")
_OF_DISKS = ("no space left", "quota", "file too large")
_FILES = (  # limit and use in a control group of version 2, then 1
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


def device_memory(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that a program may take on each of these devices: the least of all, over all processes.

    Every process of a run must call it. None where a device does not say.
    """
    here = [device for device in devices if device.process_index == jax.process_index()]
    if devices[0].platform == "cpu":
        host = host_memory()
        left = None if host is None else host - min(OF_THE_HOST, host // 4)
        known = [] if left is None else [left // max(1, len(here))]
    else:
        statistics = [device.memory_stats() or {} for device in here]
        known = [each["bytes_limit"] for each in statistics if "bytes_limit" in each]
    least = min(known, default=0)
    return min(gather("the look at memory", least, COMPILING_SECONDS)) or None


def host_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still get from the host; None where the system does not say."""
    left = [*_free_memory(root), *_left_in_groups(root), *_left_of_address_space(root)]
    return max(0, min(left)) if left else None


def _free_memory(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield 1024 * int(line.split()[1])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Of each control group with a limit, from that of this process to the outermost."""
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, group = line.split(":", 2)
        base = root / "sys/fs/cgroup"
        if "memory" in controllers.split(","):
            base /= "memory"
        elif number != "0":
            continue
        folder = base / group.lstrip("/")
        # In a container the path is that of the host, and its own group is the root.
        for place in (folder, *(above for above in folder.parents if above.is_relative_to(base))):
            for limit, used, prefix in _FILES:
                yield from _left_in_group(place, limit, used, prefix)


def _left_in_group(folder: Path, limit: str, used: str, prefix: str) -> Iterator[int]:
    numbers = [_lines(folder / name)[:1] for name in (limit, used)]
    if all(number and number[0].isdigit() for number in numbers):
        # The cache of files counts as used, and is given back when memory is needed.
        cached = (f"{prefix}inactive_file", f"{prefix}active_file")
        statistics = (line.split() for line in _lines(folder / "memory.stat"))
        given_back = sum(int(words[1]) for words in statistics if words and words[0] in cached)
        yield int(numbers[0][0]) - max(0, int(numbers[1][0]) - given_back)


def _left_of_address_space(root: Path) -> Iterator[int]:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    pages = _lines(root / "proc/self/statm")
    if limit != resource.RLIM_INFINITY and pages:
        yield limit - int(pages[0].split()[0]) * resource.getpagesize()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # not Linux, or no such controller
        return []


def compiled_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes a device that XLA expects a compiled program to need, its arguments included."""
    memory = compiled.memory_analysis()
    parts = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    return sum(parts) - memory.alias_size_in_bytes


def peak_bytes(program: Jaxpr) -> int:
    """Bytes that a traced program needs if its operations run in their order, each alone.

    XLA joins operations and needs less: the real figures of a training step are 8 to 20 % below.
    """
    last_use: dict[Var, int] = {}
    for index, equation in enumerate(program.eqns):
        last_use |= {value: index for value in equation.invars if not isinstance(value, Literal)}
    last_use |= {value: len(program.eqns) for value in program.outvars if isinstance(value, Var)}
    kept = {*program.invars, *program.constvars}
    live = highest = _size(kept)
    for index, equation in enumerate(program.eqns):
        inner = max((peak_bytes(part) - _size(part.invars) for part in _parts(equation)), default=0)
        highest = max(highest, live + max(inner, _size(equation.outvars)))
        live += _size(value for value in equation.outvars if value in last_use)
        used = {value for value in equation.invars if isinstance(value, Var)}
        live -= _size(value for value in used - kept if last_use[value] == index)
    return highest


def _size(values: Iterable[Any]) -> int:
    return sum(
        int(np.prod(value.aval.shape)) * getattr(value.aval.dtype, "itemsize", 0)
        for value in values
        if hasattr(value.aval, "shape")
    )


def _parts(equation: Any) -> Iterator[Jaxpr]:
    """The programs inside an operation: of a loop, a condition, a compiled function."""
    for value in jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda value: hasattr(value, "jaxpr")
    ):
        inner = getattr(value, "jaxpr", value)
        if isinstance(inner, Jaxpr):
            yield inner


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a device or of the host; a full disk is another matter."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError)
        and any(sign in said for sign in _SIGNS)
        and not any(sign in said for sign in _OF_DISKS)
    )


@contextlib.contextmanager
def end_in_one_line(line: Callable[[], str]) -> Iterator[None]:
    """A block in which the end of memory is an `InputError` of this line.

    Args:
      line: the fault and the remedy; called when memory has run out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(line()) from error


def gib(number: float) -> str:
    """Bytes for people, in GiB."""
    return f"{number / GIB:,.2f} GiB" if number < 10 * GIB else f"{number / GIB:,.1f} GiB"
