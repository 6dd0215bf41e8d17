"""Whether a training step fits into memory, and settings with which it would: one line before the
first step, and wherever memory ends all the same.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import jax
import ml_collections

from ctssl_jax.data.batches import batches_read_ahead
from ctssl_jax.parallel.memory import USABLE, device_memory, end_in_one_line, gib, host_memory
from ctssl_jax.training.state import abstract_batch, slices_of_a_device
from ctssl_jax.training.step import (
    HOPELESS,
    Program,
    compile_step,
    make_program,
    reckoned_bytes,
    trace_step,
)
from data_prep.system.errors import InputError

P, R = ParamSpec("P"), TypeVar("R")
_SHARE_OF_GPU = 0.75  # that JAX takes unless $XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
_LARGEST_SHARE_OF_GPU = 0.95


class Need(NamedTuple):
    """Memory of a training step by the slices of a microbatch on a device: a straight line.

    fixed: bytes without a slice: parameters, gradients, the state of the optimizer.
    a_slice: bytes that each slice adds; on a CPU with those of the slices that are read ahead.
    """

    fixed: float
    a_slice: float

    def most_slices(self, available: int) -> int:
        """Slices of a microbatch for which a device has room, a tenth of it left free; 0 if there
        are none."""
        most = max(0, int((USABLE * available - self.fixed) // max(self.a_slice, 1)))
        return most - most % 8 if most > 16 else most


def check_fits(program: Program, needed: int) -> tuple[Program, int]:
    """Refuse a training step that needs more memory than there is.

    Args:
      program, needed: from `compile_step`.

    Returns:
      The same; if the step was not compiled and fits nevertheless, compiled.

    Raises:
      InputError: names settings that fit.
    """
    available = device_memory(_devices(program))
    if available is not None and needed > available:
        sizes = _small_sizes(program, needed, available)
        need = _line_through(program, sizes[0], _bytes_of(program, sizes[0]), sizes[1])
        if needed > HOPELESS * available:  # reckoned, not compiled
            needed = int(need.fixed + need.a_slice * _slices_of_a_device(program))
            if needed <= available:
                program, needed = compile_step(program, hopeless=math.inf)
        available = device_memory(_devices(program)) or available  # compilers, too, take memory
        if needed > available:
            raise InputError(_refusal(program, needed, available, need))
    _check_reading(program)
    return program, needed


def _check_reading(program: Program) -> None:
    config, free = program.definition.config, host_memory()
    here = sum(device.process_index == jax.process_index() for device in _devices(program))
    ahead = here * _slices_of_a_device(program) * _bytes_read_ahead(program)
    if free is not None and ahead > free:
        raise InputError(
            f"config.batch_size={config.batch_size}: the slices that are read ahead need "
            f"{gib(ahead)} of this machine's memory, and {gib(free)} are free; give more "
            "--config.microbatches, a smaller --config.batch_size or fewer --config.reading_threads"
        )


def memory_line(program: Program, needed: int) -> str:
    """The line of an estimate about memory.

    Args:
      program, needed: of a step that fits, from `compile_step`.
    """
    available = device_memory(_devices(program))
    if available is None:
        return f"memory       {gib(needed)} a device, as XLA expects; how much it has is not known"
    config, part = program.definition.config, _slices_of_a_device(program)
    most = _line_through(program, part, needed, max(1, part // 2) if part > 1 else 2).most_slices(
        available
    )
    batch = most * program.definition.mesh.size * config.microbatches
    return (
        f"memory       {gib(needed)} of {gib(available)} a device, as XLA expects; the largest "
        f"batch that fits is about {batch:,} ({most:,} slices a device and microbatch)"
    )


def with_end_of_memory(function: Callable[P, R]) -> Callable[P, R]:
    """A function of a configuration and more, in which the end of memory is an `InputError` with a
    remedy."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        config = cast(ml_collections.ConfigDict, args[0] if args else kwargs["config"])
        with end_in_one_line(lambda: _line_of_the_end(config)):
            return function(*args, **kwargs)

    return run


def _line_of_the_end(config: ml_collections.ConfigDict) -> str:
    remedies = [f"--config.microbatches={2 * config.microbatches}"]
    if config.batch_size % (2 * config.microbatches * jax.device_count()):
        remedies = [f"--config.batch_size={max(1, config.batch_size // 2)}"]
    device = jax.local_devices()[0]
    if device.platform != "cpu":  # there they save nothing
        remedies += ["--config.dtype=bfloat16"] * (config.dtype == "float32")
        remedies += ["--config.remat=True"] * (not config.remat)
    part = config.batch_size // config.microbatches
    return (
        f"config.batch_size={config.batch_size}: memory ran out with {part:,} slices at a time "
        f"({device.device_kind}; another program may use it, too); give {' or '.join(remedies)}"
    )


def _refusal(program: Program, needed: int, available: int, need: Need) -> str:
    config, device = program.definition.config, _devices(program)[0]
    remedies = [*_switches(program, available), *_smaller_parts(program, need, available)]
    if not remedies:
        remedies = [
            f"a smaller config.model or image size (one slice needs {gib(sum(need))})",
        ]
    share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", _SHARE_OF_GPU))
    if device.platform == "gpu" and needed <= _LARGEST_SHARE_OF_GPU / share * available:
        remedies.append(f"XLA_PYTHON_CLIENT_MEM_FRACTION={_LARGEST_SHARE_OF_GPU}")
    return (
        f"config.batch_size={config.batch_size}: a training step needs about {gib(needed)} of "
        f"memory on each device ({device.device_kind}), and {gib(available)} can be used; give "
        f"{' or '.join(remedies)}"
    )


def _switches(program: Program, available: int) -> Iterator[str]:
    """Settings with which XLA expects the same batch to fit. On a CPU they save nothing."""
    config, devices = program.definition.config, _devices(program)
    if devices[0].platform == "cpu":
        return
    choices: list[dict[str, Any]] = []
    if config.dtype == "float32":
        choices.append({"dtype": "bfloat16"})
    if not config.remat:
        choices.append({"remat": True})
    if len(choices) > 1:
        choices.append(choices[0] | choices[1])
    in_a_process = sum(device.process_index == devices[0].process_index for device in devices)
    if config.fsdp_devices == 1 and in_a_process > 1:
        choices.append({"fsdp_devices": in_a_process})
    found = False
    for choice in choices:
        if (len(choice) == 1 or not found) and _fits(_changed(program, **choice), available):
            found = True
            yield " ".join(f"--config.{name}={value}" for name, value in choice.items())


def _fits(program: Program, available: int) -> bool:
    if reckoned_bytes(program, trace_step(program)) > available:  # in seconds
        return False
    return compile_step(program, to_run=False)[1] <= available


def _smaller_parts(program: Program, need: Need, available: int) -> Iterator[str]:
    """The fewest microbatches of this batch that fit, and the largest batch."""
    config, num_devices = program.definition.config, program.definition.mesh.size
    most, of_a_device = need.most_slices(available), config.batch_size // num_devices
    parts = (n for n in range(1, of_a_device + 1) if of_a_device % n == 0)
    number = next((n for n in parts if of_a_device // n <= most), None)
    # BatchNorm sees each part by itself, so parts of a few slices would be another training.
    if number is not None and 4 * (of_a_device // number) >= most:
        yield f"--config.microbatches={number} (of {config.batch_size // number:,} slices)"
    if most:
        yield f"--config.batch_size={most * num_devices * config.microbatches}"


def _small_sizes(program: Program, needed: int, available: int) -> tuple[int, int]:
    """Slices a device of two steps that surely fit: on a GPU XLA runs convolutions of that size."""
    part = _slices_of_a_device(program)
    most = min(part, part * available // (2 * needed))
    larger = 2 ** max(1, most.bit_length() - 1)
    return larger // 2, larger


def _line_through(program: Program, slices: int, needed: int, other: int) -> Need:
    """The line through two sizes of a step, of which one is known: XLA's memory grows evenly."""
    a_slice = (_bytes_of(program, other) - needed) / (other - slices)
    fixed = max(0.0, needed - slices * a_slice)
    if _devices(program)[0].platform == "cpu":
        a_slice += _bytes_read_ahead(program)
    return Need(fixed, a_slice)


def _bytes_of(program: Program, slices: int) -> int:
    """Bytes a device of the same step with so many slices of a microbatch on each device."""
    definition = program.definition
    number = slices * definition.mesh.size * definition.config.microbatches
    return compile_step(_changed(program, batch_size=number), to_run=False)[1]


def _changed(program: Program, **fields: Any) -> Program:
    definition = program.definition
    config = definition.config.copy_and_resolve_references()
    with config.unlocked():
        config.update(fields)
    return make_program(config, definition.task, definition.channels, definition.mesh)


def _devices(program: Program) -> list[jax.Device]:
    return list(program.definition.mesh.devices.flat)


def _slices_of_a_device(program: Program) -> int:
    return slices_of_a_device(program.definition.config, program.definition.mesh)


def _bytes_read_ahead(program: Program) -> int:
    """Bytes on the host of the batches that are read ahead, for each slice of a microbatch."""
    config = program.definition.config
    arrays = abstract_batch(program.definition).values()
    a_batch = sum(array.dtype.itemsize * array.size for array in arrays)
    a_slice = a_batch // (config.batch_size // config.microbatches)
    return a_slice * batches_read_ahead(config.reading_threads)
