"""Two processes on one machine train, save, restore and stop together; one that is lost ends the
other."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from ctssl_jax.parallel.processes import _devices_to_use, initialize
from ctssl_jax.runs import reports
from ctssl_jax.runs.checkpoints import choose_step
from tests.helpers.training_runs import (
    EMA,
    PROJECT,
    begun_state,
    command,
    command_ended_at,
    losses,
    numbers,
    save_untrained,
    saved_state,
    start,
    tiny_config,
    train_on,
)

OVERRIDES = {**EMA, "microbatches": 2, "num_steps": 8, "log_every": 2, "eval_every": 4}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_two(dataset, workdir, end=None, **overrides):
    """Two processes with one simulated device each; `end`: step and signal that the second sends
    itself, and the seconds that it rests from then on, after each step."""
    joined = [
        "--distributed",
        f"--coordinator_address=127.0.0.1:{free_port()}",
        "--num_processes=2",
    ]
    commands = [
        command(dataset, workdir, *joined, f"--process_id={number}", **overrides)
        for number in range(2)
    ]
    if end:
        step, number, *seconds = end
        commands[1] = command_ended_at(step, number, commands[1], *seconds)
    return [start(arguments) for arguments in commands]


def slurm_variables(task, tasks=2, port=0):
    """Variables of a task under `srun --nodes=TASKS` with one task a node; every node is this
    machine."""
    return {
        "JAX_COORDINATOR_PORT": str(port),
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_NUM_NODES": str(tasks),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_NTASKS": str(tasks),
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": "0",
    }


def start_two_as_slurm_does(dataset, workdir, **overrides):
    """The same two processes. JAX reads the settings from the variables of Slurm."""
    port, processes = free_port(), []
    for task in range(2):
        with pytest.MonkeyPatch.context() as environment:
            for name, value in slurm_variables(task, port=port).items():
                environment.setenv(name, value)
            processes.append(start(command(dataset, workdir, "--distributed", **overrides)))
    return processes


def finish(processes, timeout=300):
    """Wait for both: [(exit code, stdout, stderr)] * 2."""
    outputs = [process.communicate(timeout=timeout) for process in processes]
    return [
        (process.returncode, *output) for process, output in zip(processes, outputs, strict=True)
    ]


class Ran(NamedTuple):
    """A run of 8 steps by two processes, of which the second gets SIGTERM after step 3, and by two
    new ones, which a simulated Slurm starts.

    stopped_at: the step that both saved after SIGTERM.
    asked, went_on: of both times, exit code, stdout and stderr of each process.
    """

    workdir: Path
    stopped_at: int
    asked: list[tuple[int, str, str]]
    went_on: list[tuple[int, str, str]]


@pytest.fixture(scope="module")
def two_processes(tiny_dataset, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "run"
    # both look for requests every half second: without rests the last step may come before
    asked = finish(start_two(tiny_dataset, workdir, (3, signal.SIGTERM, 1.0), **OVERRIDES))
    step = choose_step(workdir, "last")
    went_on = finish(start_two_as_slurm_does(tiny_dataset, workdir, **OVERRIDES))
    return Ran(workdir, step, asked, went_on)


def test_sigterm_to_one_stops_and_saves_both(two_processes):
    for returncode, _, errors in two_processes.asked:
        assert returncode == 75, errors
    assert f"stopped     at step {two_processes.stopped_at:,}" in two_processes.asked[0][1]
    assert 3 <= two_processes.stopped_at < 8
    for returncode, _, errors in two_processes.went_on:
        assert returncode == 0, errors
    assert choose_step(two_processes.workdir, "last") == 8


def test_a_killed_process_ends_the_other_with_one_clear_line(two_processes, tiny_dataset, tmp_path):
    workdir = shutil.copytree(two_processes.workdir, tmp_path / "run")
    endless = {**OVERRIDES, "num_steps": 100_000}
    lost = finish(start_two(tiny_dataset, workdir, (9, signal.SIGKILL), **endless), timeout=100)
    assert [returncode for returncode, _, _ in lost] == [75, -signal.SIGKILL]
    assert "resuming     from step 8" in lost[0][1]
    last_line = lost[0][2].splitlines()[-1]
    assert last_line.startswith("error: another process of this run was lost")
    assert f"the last checkpoint is step 8 of {workdir}; start all processes again" in last_line
    assert choose_step(workdir, "last") == 8
    assert "Traceback" not in lost[0][2]


def test_only_the_first_process_prints_and_writes(two_processes):
    workdir, stopped_at, asked, went_on = two_processes
    assert "2 x cpu in 2 process(es)" in asked[0][1]
    assert f"resuming     from step {stopped_at}" in went_on[0][1]
    of_second = [*asked[1][1].splitlines(), *went_on[1][1].splitlines()]
    # the transport's own greeting
    assert [line for line in of_second if not line.startswith("[Gloo]")] == []
    assert len(list((workdir / "pictures").iterdir())) == 3
    assert [line["step"] for line in reports.read_reports(workdir, "train")] == [2, 4, 6, 8]


def test_same_numbers_as_one_process(two_processes, tiny_dataset, tmp_path):
    workdir = two_processes.workdir
    assert train_on(tiny_config(tiny_dataset, **OVERRIDES), tmp_path / "run", num_devices=2)
    expected = numbers(tmp_path / "run")
    for line, other in zip(numbers(workdir), expected, strict=True):
        assert line.keys() == other.keys()
        # a latent between two codes may go to either
        tolerance = 1e-2 if line["kind"] == "validation" else 1e-4
        for name, value in line.items():
            expected_value = (
                other[name] if isinstance(value, str) else pytest.approx(other[name], rel=tolerance)
            )
            assert value == expected_value, name
    one, two = saved_state(tmp_path / "run"), saved_state(workdir)
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-2, atol=1e-4, err_msg=name)


def test_their_checkpoint_goes_on_in_one_process(two_processes, tiny_dataset, tmp_path):
    workdir = shutil.copytree(two_processes.workdir, tmp_path / "run")
    config = tiny_config(tiny_dataset, **{**OVERRIDES, "num_steps": 10})
    assert train_on(config, workdir, num_devices=1)
    assert choose_step(workdir, "last") == 10
    assert np.isfinite(losses(workdir)).all()


WAITING = """
import sys, time
import numpy as np
from jax.experimental import multihost_utils
from ctssl_jax.parallel import lost_host, processes
address, number, workdir, end = sys.argv[1:]
processes.initialize(True, address, 2, int(number), heartbeat_timeout_seconds=4)
with lost_host.ending_together(workdir):
    multihost_utils.process_allgather(np.zeros(1))
    print("joined", flush=True)
    if end == "full disk" and number == "0":
        raise OSError("no space left on device")
    if end == "full disk" or number == "1":
        time.sleep(100)
    multihost_utils.process_allgather(np.zeros(1))
"""


@pytest.mark.parametrize("end", ["silent", "killed first", "full disk"])
def test_a_process_that_waits_for_a_lost_one_ends(end, tmp_path):
    """It is blocked where no exception may come: it ends by missing heartbeats, or with the
    coordinator."""
    address = f"127.0.0.1:{free_port()}"
    program = [sys.executable, "-c", WAITING, address]
    processes = [start([*program, str(number), str(tmp_path / "run"), end]) for number in range(2)]
    for process in processes:
        assert "joined\n" in iter(process.stdout.readline, "")
    clock = time.monotonic()
    survivor = 0 if end == "silent" else 1
    if end != "full disk":
        processes[1 - survivor].send_signal(signal.SIGSTOP if end == "silent" else signal.SIGKILL)
    _, errors = processes[survivor].communicate(timeout=60)
    assert time.monotonic() - clock < 30
    if end != "full disk":  # a stopped process does not end by itself
        processes[1 - survivor].kill()
    _, of_lost = processes[1 - survivor].communicate(timeout=60)
    last_line = errors.splitlines()[-1]
    if end == "full disk":  # an error that is announced: the other ends in the same way
        assert [process.returncode for process in processes] == [1, 1]
        assert of_lost.splitlines()[-1] == "OSError: no space left on device"
        assert last_line == "error: process 0 of 2 ended: no space left on device"
        return
    assert processes[survivor].returncode == 75
    assert last_line.startswith(
        "error: another process of this run was lost; there is no checkpoint"
    )


def test_slurm_jobs_see_their_devices(monkeypatch):
    """JAX alone would give a task only the GPU of its number on its node."""
    for name, value in slurm_variables(0, tasks=2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _devices_to_use([0]) == []  # one task a node: all GPUs of the node
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    # one task a GPU, which sees all GPUs of the node: JAX chooses
    assert _devices_to_use([0]) == [0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert _devices_to_use([0]) == []  # one task a GPU, which sees no other
    initialize(False)  # a single-process task, e.g. of a job array, joins nothing
    assert not jax.distributed.is_initialized()


def test_a_slurm_job_of_one_task_uses_all_devices():
    program = (
        "import jax; from ctssl_jax.parallel import processes; "
        "processes.initialize(True); print(jax.process_count(), jax.device_count(), "
        "jax.config.read('jax_cuda_visible_devices'))"
    )
    environment = {**os.environ, **slurm_variables(0, tasks=1, port=free_port())}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.split() == ["1", str(jax.device_count()), "all"], result.stderr


def test_a_refusal_reaches_both(tiny_dataset, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    results = finish(start_two(tiny_dataset, tmp_path / "run", **OVERRIDES), timeout=120)
    assert [returncode for returncode, _, _ in results] == [2, 2]
    assert "holds files but no run" in results[0][2]
    assert "process 0 of 2 refused: " in results[1][2]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    assert jax.process_count() == 1


def test_weights_of_another_run_and_parameters_that_no_process_holds_whole(tiny_dataset, tmp_path):
    wide = {"model.hidden": (16, 32), "num_steps": 3, "log_every": 1, "eval_every": 3}
    donor = tmp_path / "donor"
    save_untrained(tiny_config(tiny_dataset, **wide), donor, step=1)
    settings = {**wide, "init_from": str(donor), "init_checkpoint": "last", "fsdp_devices": 2}
    for returncode, _, errors in finish(start_two(tiny_dataset, tmp_path / "two", **settings)):
        assert returncode == 0, errors
    assert train_on(tiny_config(tiny_dataset, **settings), tmp_path / "one", num_devices=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    kernel = "params/encoder/stem/conv/kernel"
    np.testing.assert_array_equal(
        begun_state(tmp_path / "one")[kernel], saved_state(donor, 1)[kernel]
    )
