"""The processes of a run: settings of JAX, and joining."""

import os
import re
import signal
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import jax
from absl import flags
from jax._src import clusters
from orbax.checkpoint._src.multihost import multihost as orbax_multihost
from orbax.checkpoint.experimental.v1._src.synchronization import multihost as orbax_v1_multihost

from ctssl_jax.parallel import lost_host, meeting, rendezvous
from data_prep.system import early_stop, silence
from data_prep.system.command_line import EXIT_INPUT
from data_prep.system.errors import InputError

_COMPILING = "/jax/core/compile/"  # the events of JAX's phases: trace, lower, compile
_PROGRAMS = {
    "train_step": "the training step",
    "accumulate": "the training step",
    "initial_state": "the first weights",
    "score_batch": "the scores",
}
_named: list[bool] = []  # once a process


def configure_jax() -> None:
    """Settings of every command line: faster convolutions on CPU, a cache of compiled programs, and
    a line on stderr for each compilation that takes long.

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
    name_compilations()


def name_compilations() -> None:
    """Long compilations are named on stderr, see `silence`: JAX reports the begin of each of their
    phases as a number, its end as a duration."""

    def begun(event: str, value: float, *, fun_name: str = "", **more: Any) -> None:
        if event.startswith(_COMPILING):
            silence.begin(_work(fun_name))

    def ended(event: str, seconds: float, *, fun_name: str = "", **more: Any) -> None:
        if event.startswith(_COMPILING):
            silence.end(_work(fun_name))

    if not _named:
        _named.append(True)
        jax.monitoring.register_scalar_listener(begun)
        jax.monitoring.register_event_duration_secs_listener(ended)


def _work(fun_name: str) -> str:
    """`train_step` or `jit(train_step)` -> `compiling    the training step`."""
    name = re.sub(r"^jit[(_]|[)]$", "", fun_name)
    return f"compiling    {_PROGRAMS.get(name, 'a program')}"


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
    `ctssl_jax.parallel.lost_host`). Processes that do not come within two minutes are named.

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
    if all(explicit) and process_id >= num_processes:
        raise InputError(
            f"--process_id={process_id}: numbers of {num_processes} processes are 0 to "
            f"{num_processes - 1}"
        )
    try:
        # JAX's own detection; what is given stays. Each is None if it finds no cluster.
        address, number, process, devices = (
            clusters.ClusterEnv.auto_detect_unset_distributed_params(
                coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS"),
                num_processes or None,
                process_id if process_id >= 0 else None,
                None,
                None,
                int(meeting.WAIT_SECONDS),
            )
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(_not_joined(str(error).splitlines()[0])) from error
    if address is None or number is None or process is None:
        raise InputError(_not_joined("no TPU pod, Slurm or MPI was found"))
    rendezvous.meet(address, number, process)
    lost_host.at_abort(
        lambda: f"error: {_not_joined('one of them was lost while all joined')}\n", EXIT_INPUT
    )
    jax.config.update("jax_check_proxy_envs", False)  # `rendezvous` leads around a proxy
    try:
        jax.distributed.initialize(
            address,
            number,
            process,
            local_device_ids=_devices_to_use(devices),
            cluster_detection_method="deactivate",
            initialization_timeout=int(meeting.WAIT_SECONDS),
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            shutdown_timeout_seconds=int(meeting.WAIT_SECONDS),
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(_not_joined(str(error).splitlines()[0])) from error
    # JAX has set a handler of its own, which would hold a request to stop until the first step.
    early_stop.leave_at_once()
    bound_waits_of_orbax(0)
    # joined: from here on `lost_host.ending_together` handles an abort
    signal.signal(signal.SIGABRT, signal.SIG_DFL)


def bound_waits_of_orbax(checkpoint_bytes: int) -> None:
    """Where processes meet for a checkpoint, Orbax waits two minutes, and a second for 10 MB.

    Args:
      checkpoint_bytes: size of a checkpoint. One process may write it while the others wait.
    """
    for module in (orbax_multihost, orbax_v1_multihost):
        module._DEFAULT_BARRIER_TIMEOUT = int(meeting.WAIT_SECONDS + checkpoint_bytes / 1e7)
    if flags.FLAGS.is_parsed():  # by the coordinator: nothing bounds a wait for devices
        flags.FLAGS.experimental_orbax_use_distributed_barrier = True


def _not_joined(why: str) -> str:
    return (
        f"--distributed: could not join the other processes ({why}); outside TPU pods and Slurm "
        "give --coordinator_address=HOST:PORT --num_processes=N --process_id=I"
    )


def _devices_to_use(chosen: Sequence[int] | None) -> Sequence[int] | None:
    """`local_device_ids` for JAX, which under Slurm uses the GPU with the task's number on a node.

    Args:
      chosen: by JAX.

    Returns:
      [] for all visible devices, where JAX's choice would be wrong: Slurm runs one task a node, or
      shows each task its own GPU only (`--gpus-per-task=1`). None for `$JAX_LOCAL_DEVICE_IDS`.
    """
    tasks, nodes = os.environ.get("SLURM_STEP_NUM_TASKS"), os.environ.get("SLURM_STEP_NUM_NODES")
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    return [] if tasks is not None and (tasks == nodes or len(seen) == 1) else chosen
