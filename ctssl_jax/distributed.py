"""Devices, hosts and interruptions: the mesh, how arrays lie on it, and stopping at a step that all hosts share.

Parameters are replicated and batches split along the one mesh axis `data`; under `jit` gradients, losses and
BatchNorm statistics are then global sums that XLA inserts, so that N devices compute what one device computes.
"""

import contextlib
import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ctssl_jax.command_line import InputError


def initialize(distributed: bool, coordinator_address: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Join the processes of a multi-host run; does nothing when `distributed` is false.

    On TPU pods and under Slurm or MPI the three last arguments are found by JAX itself; elsewhere all three are
    needed (`host:port` of process 0, the number of processes, this process's number).

    Raises:
      InputError: the explicit settings are incomplete, or the cluster could not be detected or joined.
    """
    explicit = (bool(coordinator_address), num_processes > 0, process_id >= 0)
    if not distributed:
        if any(explicit):
            raise InputError("--coordinator_address, --num_processes and --process_id need --distributed")
        return
    if any(explicit) and not all(explicit):
        raise InputError("--coordinator_address, --num_processes and --process_id are given together or not at all")
    try:
        if all(explicit):
            jax.distributed.initialize(coordinator_address, num_processes, process_id)
        else:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise InputError(
            f"--distributed: could not join the other processes ({first_line}); outside TPU pods and Slurm give "
            "--coordinator_address=HOST:PORT --num_processes=N --process_id=I"
        ) from error


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """One-axis mesh (`data`) over `devices`, by default all devices of all hosts."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_along_batch(mesh: Mesh) -> NamedSharding:
    """The first axis is split over the devices of the mesh."""
    return NamedSharding(mesh, PartitionSpec("data"))


def to_devices(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Put this process's share of a batch on its devices, as part of one global batch.

    Args:
      mesh: the device mesh.
      batch: arrays `[B / processes, ...]`; every process passes equal shapes.

    Returns:
      Global arrays `[B, ...]`, split along the first axis.
    """
    sharding = split_along_batch(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


@contextlib.contextmanager
def refusing_together() -> Iterator[None]:
    """A block of checks that ends with an error on all processes if it does on one, so that none waits for another.

    Raises:
      InputError: another process refused; its own message says why.
    """
    error = None
    try:
        yield
    except Exception as caught:  # whatever it is, the others must not wait; it is raised again below
        error = caught
    if jax.process_count() > 1:
        refused = multihost_utils.process_allgather(np.asarray(error is not None))
        if error is None and refused.any():
            raise InputError(f"process {int(np.argmax(refused))} of {len(refused)} refused to start; see its message")
    if error is not None:
        raise error


def require_agreement(what: str, content: Any) -> None:
    """All processes of a run must hold equal settings; otherwise collectives hang or mix different models.

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
            f"process {differing[0]} has another {what} than process 0; start all with the same flags and files"
        )


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Listen for SIGTERM (preemption, `scancel`, `kill`) and SIGINT (Ctrl-C) within a block of the main thread.

    Yields:
      `should_stop(step)`, to be called at every step: true when this process, or in a multi-host run any process,
      was asked to stop; all hosts get the answer true at the same step. A second Ctrl-C interrupts at once.
    """
    several = jax.process_count() > 1  # then SIGTERM is JAX's own preemption notice, and reaches all hosts
    asked = []

    def note(signal_number: int, frame: object) -> None:
        if asked and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signal_number)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.signal(number, note) for number in [signal.SIGINT] + [signal.SIGTERM] * (not several)}
    try:
        yield multihost_utils.reached_preemption_sync_point if several else lambda step: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
