"""Devices, hosts and interruptions: the mesh, how arrays lie on it, and stopping at a step that all
hosts share.

The mesh has two axes, `data` and `fsdp`, and a batch is split along both; under `jit` gradients,
losses and BatchNorm statistics are then global sums that XLA inserts, so that N devices compute
what one device computes. Parameters and optimizer state are replicated along `data` and split along
`fsdp`, which has one device by default.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ctssl_jax.parallel import lost_host
from data_prep.system.command_line import EXIT_INPUT, STOP_SIGNALS, stop_signals_handled_by
from data_prep.system.errors import InputError

SMALLEST_SPLIT_ARRAY = 4096


def initialize(
    distributed: bool,
    coordinator_address: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    heartbeat_timeout_seconds: int = 100,
) -> None:
    """Join the processes of a multi-host run; does nothing when `distributed` is false.

    On TPU pods and under Slurm or MPI the address and the numbers are found by JAX itself;
    elsewhere all three are needed (`host:port` of process 0, the number of processes, this
    process's number). A process that is silent for `heartbeat_timeout_seconds` is lost, and ends
    the others (see `ctssl_jax.parallel.lost_host`). JAX waits five minutes for processes that do
    not come; then this one ends with a line and exit code 2.

    Raises:
      InputError: the explicit settings are incomplete, or the cluster could not be detected or
        joined.
    """
    explicit = (bool(coordinator_address), num_processes > 0, process_id >= 0)
    if not distributed:
        if any(explicit):
            raise InputError(
                "--coordinator_address, --num_processes and --process_id need --distributed"
            )
        return
    if any(explicit) and not all(explicit):
        raise InputError(
            "--coordinator_address, --num_processes and --process_id are given together or not at "
            "all"
        )
    lost_host.at_abort(
        lambda: f"error: {_not_joined('not all of them came, or one was lost')}\n", EXIT_INPUT
    )
    # else it would wait for the others to come; then it is JAX's own
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    given = (coordinator_address, num_processes, process_id) if all(explicit) else ()
    try:
        jax.distributed.initialize(
            *given,
            local_device_ids=_devices_to_use(),
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(_not_joined(str(error).splitlines()[0])) from error
    # joined; from here on see `lost_host.ending_together`
    signal.signal(signal.SIGABRT, signal.SIG_DFL)


def _not_joined(why: str) -> str:
    return (
        f"--distributed: could not join the other processes ({why}); outside TPU pods and Slurm "
        "give --coordinator_address=HOST:PORT --num_processes=N --process_id=I"
    )


def _devices_to_use() -> list[int] | None:
    """For `local_device_ids` of JAX, which under Slurm takes one GPU a task: that of the task's
    number on its node.

    Returns:
      Empty, for all devices that this process sees, where that would be wrong: Slurm runs one task
      a node, or shows every task its own GPU only (`--gpus-per-task=1`). None leaves the choice to
      JAX (and `$JAX_LOCAL_DEVICE_IDS`).
    """
    tasks, nodes = os.environ.get("SLURM_STEP_NUM_TASKS"), os.environ.get("SLURM_STEP_NUM_NODES")
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if tasks is None or os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    return [] if tasks == nodes or len(seen) == 1 else None


def make_mesh(devices: Sequence[jax.Device] | None = None, fsdp_devices: int = 1) -> Mesh:
    """Mesh with the axes `data` and `fsdp`.

    Args:
      devices: by default all devices of all hosts.
      fsdp_devices: devices that share one copy of parameters and optimizer state; divides the
        number of devices. Neighbours share: on several hosts a host's own devices, if it has as
        many.
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
    """How parameters, gradients or optimizer state lie on the mesh: every large array is split
    along `fsdp`.

    An array is split along its longest axis that the number of devices divides; arrays of less than
    `SMALLEST_SPLIT_ARRAY` elements (biases, batch normalisation) stay whole, since fetching them
    costs more than they take.

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
    """Whole parameters on each device for as long as it uses them; their gradients are summed and
    split again.

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
    """Put this process's share of a batch on its devices, as part of one global batch.

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


@contextlib.contextmanager
def refusing_together() -> Iterator[None]:
    """A block of checks that ends with an error on all processes if it does on one, so that none
    waits for another.

    Raises:
      InputError: another process refused; its own message says why.
    """
    error = None
    try:
        yield
    # whatever it is, the others must not wait; it is raised again below
    except Exception as caught:
        error = caught
    if jax.process_count() > 1:
        refused = multihost_utils.process_allgather(np.asarray(error is not None))
        if error is None and refused.any():
            raise InputError(
                f"process {int(np.argmax(refused))} of {len(refused)} refused to start; see its "
                "message"
            )
    if error is not None:
        raise error


def require_agreement(what: str, content: Any) -> None:
    """All processes of a run must hold equal settings; otherwise collectives hang or mix different
    models.

    Args:
      what: names the content in the message.
      content: anything that JSON takes.

    Raises:
      InputError: on every process, if one differs from process 0.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    differing = np.flatnonzero((digests != digests[0]).any(axis=1))
    if len(differing):
        raise InputError(
            f"process {differing[0]} has another {what} than process 0; start all with the same "
            "flags and files"
        )


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Listen for SIGTERM (preemption, `scancel`, `kill`), SIGINT (Ctrl-C) and SIGHUP within a block
    of the main thread.

    Yields:
      `should_stop(step)`, to be called at every step: true when this process, or in a multi-host
      run any process, was asked to stop; all hosts get the answer true at the same step. A second
      Ctrl-C interrupts at once.
    """
    # then SIGTERM is JAX's own preemption notice, and reaches all hosts
    several = jax.process_count() > 1
    asked = []

    def note(signal_number: int, frame: object) -> None:
        if asked and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signal_number)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    with stop_signals_handled_by(
        note, [number for number in STOP_SIGNALS if not several or number != signal.SIGTERM]
    ):
        yield multihost_utils.reached_preemption_sync_point if several else lambda step: bool(asked)
