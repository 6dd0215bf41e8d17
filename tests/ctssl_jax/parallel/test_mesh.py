"""Meshes of devices that this machine does not have: many GPU hosts, TPU pods, several slices."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctssl_jax.parallel.mesh import arrange_devices, fetch_parameters, make_mesh, to_devices
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training.step import make_program
from data_prep.system.errors import InputError
from tests.helpers.training_runs import tiny_config


@dataclasses.dataclass(frozen=True)
class Device:
    """What JAX says of a device, as far as a mesh depends on it."""

    platform: str
    device_kind: str
    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def gpus(num_hosts, gpus_per_host=8):
    """As JAX lists them: each host is a slice."""
    return [
        Device("gpu", "NVIDIA H100 80GB HBM3", host * gpus_per_host + gpu, host, host)
        for host, gpu in itertools.product(range(num_hosts), range(gpus_per_host))
    ]


def tpus(kind, topology, num_slices=1, chips_per_host=4):
    """Chips of a pod, x fastest, as JAX lists them."""
    x, y, z = (*topology, 1)[:3]
    chips = list(itertools.product(range(z), range(y), range(x)))
    return [
        Device("tpu", kind, number, number // chips_per_host, part, coords[::-1])
        for number, (part, coords) in enumerate(itertools.product(range(num_slices), chips))
    ]


DEVICES = {
    "16 H100 of 2 hosts": gpus(2),
    "64 H100 of 8 hosts": gpus(8),
    "v4 2x2x4": tpus("TPU v4", (2, 2, 4)),
    "v4 4x4x4": tpus("TPU v4", (4, 4, 4)),
    "v5e 4x4": tpus("TPU v5 lite", (4, 4)),
    "v5e 16x16": tpus("TPU v5 lite", (16, 16)),
    "v5p 2x2x4": tpus("TPU v5p", (2, 2, 4)),
    "v5p 4x4x8": tpus("TPU v5p", (4, 4, 8)),
    "v6e 4x4": tpus("TPU v6 lite", (4, 4)),
    "two slices of v5e 4x4": tpus("TPU v5 lite", (4, 4), num_slices=2),
    "two slices of v4 2x2x4": tpus("TPU v4", (2, 2, 4), num_slices=2),
}


@pytest.mark.parametrize("fsdp_devices", [1, 2, 4, 8])
@pytest.mark.parametrize("name", DEVICES)
def test_every_device_has_one_place_and_copies_lie_together(name, fsdp_devices):
    devices = DEVICES[name]
    # in any order
    shuffled = [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]
    mesh = arrange_devices(shuffled, fsdp_devices)
    assert mesh.shape == (len(devices) // fsdp_devices, fsdp_devices)
    assert sorted(device.id for device in mesh.flat) == list(range(len(devices)))
    for copy in mesh:  # a host has 8 GPUs: copies of the parameters stay within, as within a slice
        assert len({device.slice_index for device in copy}) == 1
    # The slow network between slices is crossed along the first axis alone, in whole blocks.
    slices = [row[0].slice_index for row in mesh]
    assert slices == sorted(slices)


def test_a_copy_of_the_parameters_in_two_slices_is_refused():
    with pytest.raises(
        InputError, match=r"fsdp_devices=32: .* 2 TPU slices .*; give 1, 2, 4, 8, 16$"
    ):
        arrange_devices(DEVICES["two slices of v5e 4x4"], 32)


def test_a_step_on_two_groups_of_devices_is_that_of_one_device(tiny_dataset):
    """What XLA compiles for GPUs and TPUs, on simulated devices; each group shares one copy."""
    shuffled = [jax.devices()[i] for i in np.random.default_rng(1).permutation(8)]
    images = np.random.default_rng(0).integers(0, 255, (8, 1, 16, 16, 1), np.uint8)
    numbers, weight = np.arange(8, dtype=np.int32), np.ones(8, np.float32)
    batch = {"images": images, "record_index": numbers, "weight": weight}
    start, results = None, []
    for devices, fsdp_devices in ((jax.devices()[:1], 1), (shuffled, 4)):
        mesh = make_mesh(devices, fsdp_devices)
        config = tiny_config(
            tiny_dataset, **{"model.hidden": (16, 32), "fsdp_devices": fsdp_devices}
        )
        program = make_program(config, get_task(config.task), 1, mesh)
        start = jax.device_get(program.initial_state()) if start is None else start
        state = jax.tree.map(
            lambda leaf, like: jax.device_put(leaf, like.sharding), start, program.template
        )
        state = program.train_step(state, to_devices(mesh, batch))
        results.append(jax.device_get((state.sums["loss"], state.sums["layer_gradient_norms"])))
    (one_loss, one), (loss, norms) = results
    assert loss == pytest.approx(one_loss, rel=1e-5)
    assert norms == {name: pytest.approx(norm, rel=1e-3) for name, norm in one.items()}


def test_large_kernels_travel_in_the_dtype_of_convolutions():
    mesh = make_mesh(fsdp_devices=4)
    params = {
        "kernel": jnp.full((3, 3, 32, 32), 1 / 3),
        "codebook": jnp.full((64, 64), 1 / 3),
        "head": jnp.full((1, 1, 8, 1), 1 / 3),
    }

    def total(params):
        fetched = fetch_parameters(mesh, params, jnp.dtype("bfloat16"))
        types = {name: value.dtype.name for name, value in fetched.items()}
        assert types == {"kernel": "bfloat16", "codebook": "float32", "head": "float32"}
        return sum(jnp.sum(value.astype(jnp.float32)) for value in fetched.values())

    gradients = jax.jit(jax.grad(total))(params)
    assert all(np.all(leaf == 1) and leaf.dtype == jnp.float32 for leaf in gradients.values())
    assert gradients["kernel"].sharding.shard_shape((3, 3, 32, 32)) == (3, 3, 8, 32)
