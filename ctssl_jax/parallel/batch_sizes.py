"""Slices at a time where nothing is learned (evaluation, embeddings, probes, predictions): by the
memory of a device, and by how many there are. Results depend on it by rounding alone.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ctssl_jax.parallel.memory import USABLE, device_memory, end_in_one_line, gib, peak_bytes
from data_prep.system.errors import InputError

# Pixels at a time that keep a device busy: 16 slices of 512 x 512, and of 64 x 64 on a CPU, where
# larger batches are not faster.
PIXELS, PIXELS_ON_CPU = 2**22, 2**16
_TOO_HIGH = 2  # `peak_bytes` of a program without gradients is at most so many times XLA's figure


def choose(
    asked: int,
    number: int | None,
    image_size: int,
    devices: Sequence[jax.Device],
    trace: Callable[[int], jax.stages.Traced],
    state: Any,
) -> int:
    """Slices at a time on all devices together, a multiple of their number.

    Args:
      asked: `--batch_size`; 0 chooses.
      number: slices that there are; None if this is not known.
      image_size: side of the slices in pixels.
      devices: of this program.
      trace: slices at a time -> the traced program.
      state: its arrays that each device holds.

    Raises:
      InputError: more slices than fit are asked for.
    """
    available, kept = device_memory(devices), _bytes(state)

    def needed(slices: int) -> int:
        return kept + max(0, peak_bytes(trace(slices).jaxpr.jaxpr) - kept) // len(devices)

    pixels = PIXELS_ON_CPU if devices[0].platform == "cpu" else PIXELS
    on_each = 2 ** (max(1, pixels // image_size**2).bit_length() - 1)
    size = (-(-asked // len(devices)) if asked else on_each) * len(devices)
    if number is not None:
        size = evenly(number, size, len(devices))
    if available is None:
        return size
    limit, fits = (_TOO_HIGH if asked else USABLE) * available, size
    while fits > len(devices) and needed(fits) > limit:
        fits, limit = -(-fits // (2 * len(devices))) * len(devices), USABLE * available
    if asked and fits < size:
        raise InputError(
            f"--batch_size={asked}: {size:,} slices at a time need about {gib(needed(size))} of "
            f"memory on each device ({devices[0].device_kind}), and {gib(available)} can be used; "
            f"give --batch_size={fits}, or leave it out"
        )
    return fits


def _bytes(tree: Any) -> int:
    return sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def evenly(number: int, most: int, num_devices: int) -> int:
    """One batch size for so many slices: as few batches as `most` allows, with little padding.

    Args:
      number: of slices.
      most: slices at a time, a multiple of the devices.
      num_devices: divides the batch size.
    """
    batches = -(-number // most)
    return -(-number // (batches * num_devices)) * num_devices


def in_few_sizes(number: int, most: int, num_devices: int) -> list[int]:
    """Batch sizes for the slices of one volume, of few different ones for all volumes together.

    They depend on this volume alone: `most` at a time, and for the rest the smallest half, quarter,
    ... of it that holds them, where whole batches would be padded by more than an eighth.

    Args:
      number, most, num_devices: as `evenly`.
    """
    whole, rest = divmod(number, most)
    last = most
    while (half := -(-last // (2 * num_devices)) * num_devices) < last and half >= rest:
        last = half
    sizes = [most] * whole
    if rest:
        sizes.append(last if 8 * (most - rest) > number else most)
    return sizes


def end_of_memory(batch_size: int) -> contextlib.AbstractContextManager[None]:
    """A block of a command with the flag `--batch_size` in which the end of memory is an
    `InputError` with a remedy.

    Args:
      batch_size: slices at a time.
    """

    def line() -> str:
        device = jax.local_devices()[0].device_kind
        smaller = f"give --batch_size={batch_size // 2}" if batch_size > 1 else "stop it"
        return (
            f"memory ran out with {batch_size:,} slices at a time ({device}; another program may "
            f"use it, too); {smaller}"
        )

    return end_in_one_line(line)
