"""The processes of a run: settings of JAX, joining, agreement, and requests to stop."""

import contextlib
import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ctssl_jax.parallel import lost_host
from data_prep.system.command_line import EXIT_INPUT, STOP_SIGNALS, stop_signals_handled_by
from data_prep.system.errors import InputError


def configure_jax() -> None:
    """Settings of every command line: faster convolutions on CPU, and a cache of compiled programs.

    Must run before JAX is first used. jaxlib 0.10 and 0.11 send the weight gradients of
    convolutions on CPU to a library that uses one core. The flag turns that off: a training step on
    two cores takes two thirds of the time (0.11: four fifths). Other versions of jaxlib end at
    flags that they do not know, so they get no flag.
    """
    flag = "--xla_cpu_experimental_ynn_fusion_type"
    if version("jaxlib").startswith(("0.10.", "0.11.")) and flag not in os.environ.get(
        "XLA_FLAGS", ""
    ):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}=".strip()
    _use_compilation_cache()


def _use_compilation_cache() -> None:
    """Keep compiled programs between runs (in `$JAX_COMPILATION_CACHE_DIR`, else in the user's
    cache folder)."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "ctssl_jax", "compiled"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)


def initialize(
    distributed: bool,
    coordinator_address: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    heartbeat_timeout_seconds: int = 100,
) -> None:
    """Join the processes of a run, if `distributed`.

    On TPU pods and under Slurm or MPI, JAX detects the address and the numbers. Elsewhere all three
    are needed: `host:port` of process 0, the number of processes, this process's number.

    A process that is silent for `heartbeat_timeout_seconds` is lost, and ends the others (see
    `ctssl_jax.parallel.lost_host`). JAX waits five minutes for processes that do not come. Then
    this process ends with one line and exit code 2.

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
    # Python's handler would not run while JAX waits for the others. Afterwards JAX has its own.
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
    # joined: from here on `lost_host.ending_together` handles an abort
    signal.signal(signal.SIGABRT, signal.SIG_DFL)


def _not_joined(why: str) -> str:
    return (
        f"--distributed: could not join the other processes ({why}); outside TPU pods and Slurm "
        "give --coordinator_address=HOST:PORT --num_processes=N --process_id=I"
    )


def _devices_to_use() -> list[int] | None:
    """`local_device_ids` for JAX, which under Slurm uses the GPU with the task's number on a node.

    Returns:
      [] for all visible devices, where JAX's choice would be wrong: Slurm runs one task a node, or
      shows each task its own GPU only (`--gpus-per-task=1`). None leaves the choice to JAX and
      `$JAX_LOCAL_DEVICE_IDS`.
    """
    tasks, nodes = os.environ.get("SLURM_STEP_NUM_TASKS"), os.environ.get("SLURM_STEP_NUM_NODES")
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if tasks is None or os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    return [] if tasks == nodes or len(seen) == 1 else None


@contextlib.contextmanager
def refusing_together() -> Iterator[None]:
    """A block of checks: an error on one process ends the block on all, so that no process waits.

    Raises:
      InputError: another process refused; its own message says why.
    """
    error = None
    try:
        yield
    except Exception as caught:  # raised again below, once the others know
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


def require_agreement(name: str, content: Any) -> None:
    """Refuse processes with different settings: collectives would hang or mix different models.

    Args:
      name: of the content, for the message.
      content: JSON content.

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
            f"process {differing[0]} has another {name} than process 0; start all with the same "
            "flags and files"
        )


def from_process_0(content: Any) -> Any:
    """JSON content of process 0, on every process; the others' is not looked at."""
    if jax.process_count() == 1:
        return content
    text = json.dumps(content).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = np.frombuffer(text.ljust(length)[:length], np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(sent).tobytes())


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Listen for SIGTERM (preemption, `scancel`, `kill`), SIGINT (Ctrl-C) and SIGHUP within a block
    of the main thread.

    Yields:
      `should_stop(step)`, to be called at every step: true once any process of the run got a
      signal, on all processes at the same step. A second Ctrl-C interrupts at once.
    """
    # In a run of several processes SIGTERM is JAX's own preemption notice, and reaches all hosts.
    several = jax.process_count() > 1
    received = []

    def note(signal_number: int, frame: object) -> None:
        if received and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal_number)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    with stop_signals_handled_by(
        note, [number for number in STOP_SIGNALS if not several or number != signal.SIGTERM]
    ):
        yield (
            multihost_utils.reached_preemption_sync_point
            if several
            else lambda step: bool(received)
        )
