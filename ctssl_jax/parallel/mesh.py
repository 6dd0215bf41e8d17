"""The mesh of devices, and the sharding of arrays on it.

The mesh has two axes, `data` and `fsdp`, and a batch is split along both; under `jit` gradients,
losses and BatchNorm statistics are then global sums that XLA inserts, so that N devices compute
what one device computes. Parameters and optimizer state are replicated along `data` and split along
`fsdp`, which has one device by default.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

SMALLEST_SPLIT_ARRAY = 4096


def make_mesh(devices: Sequence[jax.Device] | None = None, fsdp_devices: int = 1) -> Mesh:
    """Mesh with the axes `data` and `fsdp`.

    Args:
      devices: by default all devices of all hosts.
      fsdp_devices: devices that share one copy of parameters and optimizer state; divides the
        number of devices. Neighbours share one, so devices of one host if it has enough.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = (len(devices) // fsdp_devices, fsdp_devices)
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_along_batch(mesh: Mesh) -> NamedSharding:
    """The first axis is split over all devices of the mesh."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def split_parameters(mesh: Mesh, tree: Any) -> Any:
    """Shardings of parameters, gradients or optimizer state: large arrays are split along `fsdp`.

    An array is split along its longest axis that the number of devices divides. Arrays of less than
    `SMALLEST_SPLIT_ARRAY` elements (biases, batch normalisation) stay whole, since to fetch them
    takes longer than the memory is worth.

    Args:
      mesh: from `make_mesh`.
      tree: arrays or shapes.

    Returns:
      The same tree of `NamedSharding`.
    """
    devices = mesh.shape["fsdp"]

    def sharding(leaf: Any) -> NamedSharding:
        axes = [axis for axis, length in enumerate(leaf.shape) if length % devices == 0]
        if devices == 1 or not axes or math.prod(leaf.shape) < SMALLEST_SPLIT_ARRAY:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(sharding, tree)


def fetch_parameters(mesh: Mesh, params: Any) -> Any:
    """Whole parameters on each device while it uses them; gradients are summed and split again.

    For use within a compiled function.
    """
    return params if mesh.shape["fsdp"] == 1 else _fetch(mesh, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fetch(mesh: Mesh, params: Any) -> Any:
    return jax.lax.with_sharding_constraint(params, replicated(mesh))


def _fetch_forward(mesh: Mesh, params: Any) -> tuple[Any, None]:
    return _fetch(mesh, params), None


def _fetch_backward(mesh: Mesh, _: None, gradients: Any) -> tuple[Any]:
    return (jax.lax.with_sharding_constraint(gradients, split_parameters(mesh, gradients)),)


_fetch.defvjp(_fetch_forward, _fetch_backward)


def to_devices(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Put this process's slices of a batch on its devices, as part of one global batch.

    Args:
      mesh: the device mesh.
      batch: arrays `[B / processes, ...]`; every process passes equal shapes.

    Returns:
      Global arrays `[B, ...]`, split along the first axis.
    """
    sharding = split_along_batch(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
