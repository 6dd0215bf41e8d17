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
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from data_prep.system.errors import InputError

SMALLEST_SPLIT_ARRAY = 4096


def make_mesh(devices: Sequence[jax.Device] | None = None, fsdp_devices: int = 1) -> Mesh:
    """Mesh with the axes `data` and `fsdp`.

    Args:
      devices: by default all devices of all hosts.
      fsdp_devices: devices that share one copy of parameters and optimizer state; divides the
        number of devices.

    Raises:
      InputError: as `arrange_devices`.
    """
    devices = jax.devices() if devices is None else list(devices)
    types = (AxisType.Auto,) * 2
    return Mesh(arrange_devices(devices, fsdp_devices), ("data", "fsdp"), axis_types=types)


def arrange_devices(devices: Sequence[jax.Device], fsdp_devices: int) -> np.ndarray:
    """The devices as a mesh: [devices / fsdp_devices, fsdp_devices] objects.

    Neighbours share one copy of the parameters. On GPUs and CPUs these are devices of one host, if
    it has enough (JAX calls each host a slice there). On TPUs JAX lays both axes along the links
    between chips, and no copy is shared by two slices, whose network is slow.

    Raises:
      InputError: devices that no such mesh can be made of; names the values that work.
    """
    shape = (len(devices) // fsdp_devices, fsdp_devices)
    if devices[0].platform != "tpu":
        return np.array(sorted(devices, key=lambda d: (d.process_index, d.id))).reshape(shape)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % num_slices:
        in_slice = len(devices) // num_slices
        divisors = [str(n) for n in range(1, in_slice + 1) if in_slice % n == 0]
        raise InputError(
            f"config.fsdp_devices={fsdp_devices}: the devices of one copy of the parameters must "
            f"lie in one of {num_slices} TPU slices of {in_slice} chips; give {', '.join(divisors)}"
        )
    if num_slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        (shape[0] // num_slices, fsdp_devices),
        (num_slices, 1),
        devices,
        allow_split_physical_axes=True,
    )


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


def fetch_parameters(mesh: Mesh, params: Any, dtype: jnp.dtype) -> Any:
    """Whole parameters on each device while it uses them; gradients are summed and split again.

    For use within a compiled function. Kernels of convolutions, which have four axes, travel in the
    dtype of convolutions, in which alone they are used; their gradients become float32 again.
    """
    return params if mesh.shape["fsdp"] == 1 else _fetch(mesh, dtype, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fetch(mesh: Mesh, dtype: jnp.dtype, params: Any) -> Any:
    shardings = split_parameters(mesh, params)

    def cast(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        if leaf.ndim != 4 or sharding.is_fully_replicated:
            return leaf
        # Where the parts lie: without the constraint XLA may fetch first and cast then.
        return jax.lax.with_sharding_constraint(leaf.astype(dtype), sharding)

    params = jax.tree.map(cast, params, shardings)
    return jax.lax.with_sharding_constraint(params, replicated(mesh))


def _fetch_forward(mesh: Mesh, dtype: jnp.dtype, params: Any) -> tuple[Any, None]:
    return _fetch(mesh, dtype, params), None


def _fetch_backward(mesh: Mesh, dtype: jnp.dtype, _: None, gradients: Any) -> tuple[Any]:
    gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients)
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
