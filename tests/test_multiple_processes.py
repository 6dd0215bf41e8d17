"""Two processes on one machine train, save, restore and stop together."""

import signal
import socket

import jax
import numpy as np
import pytest
from training_runs import (
    EMA,
    command,
    losses,
    numbers,
    saved_state,
    start,
    tiny_config,
    train_on,
)

from ctssl_jax import checkpoint, reports

OVERRIDES = {**EMA, "microbatches": 2, "num_steps": 8, "log_every": 2, "eval_every": 4}


def start_two(dataset, workdir, **overrides):
    """Two processes with one simulated device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    joined = ["--distributed", f"--coordinator_address={address}", "--num_processes=2"]
    return [start(command(dataset, workdir, *joined, f"--process_id={number}", **overrides)) for number in range(2)]


def finish(processes, timeout=300):
    """Wait for both: [(exit code, stdout, stderr)] * 2."""
    outputs = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


@pytest.fixture(scope="module")
def two_processes(tiny_dataset, tmp_path_factory, compilation_cache):
    """Four steps by two processes, and four more by two new ones."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    printed = []
    for num_steps in (4, 8):
        results = finish(start_two(tiny_dataset, workdir, **{**OVERRIDES, "num_steps": num_steps}))
        for returncode, _, errors in results:
            assert returncode == 0, errors
        printed.append(results)
    return workdir, printed


def test_same_numbers_as_one_process(two_processes, tiny_dataset, tmp_path):
    workdir, _ = two_processes
    assert train_on(tiny_config(tiny_dataset, **OVERRIDES), tmp_path / "run", num_devices=2)
    expected = numbers(tmp_path / "run")
    for line, other in zip(numbers(workdir), expected, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            assert value == (other[name] if isinstance(value, str) else pytest.approx(other[name], rel=1e-4)), name
    one, two = saved_state(tmp_path / "run"), saved_state(workdir)
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-2, atol=1e-4, err_msg=name)


def test_only_the_first_process_prints_and_writes(two_processes):
    workdir, printed = two_processes
    assert "2 x cpu in 2 process(es)" in printed[0][0][1]
    assert "going on     from step 4" in printed[1][0][1]
    of_second = [line for results in printed for line in results[1][1].splitlines()]
    assert [line for line in of_second if not line.startswith("[Gloo]")] == []  # the transport's own greeting
    assert len(list((workdir / "pictures").iterdir())) == 3
    assert [line["step"] for line in reports.read_reports(workdir, "train")] == [2, 4, 6, 8]


def test_their_checkpoint_goes_on_in_one_process(two_processes, tiny_dataset, tmp_path):
    import shutil

    workdir = shutil.copytree(two_processes[0], tmp_path / "run")
    assert train_on(tiny_config(tiny_dataset, **{**OVERRIDES, "num_steps": 10}), workdir, num_devices=1)
    assert checkpoint.choose_step(workdir, "last") == 10
    assert np.isfinite(losses(workdir)).all()


def test_sigterm_to_one_stops_and_saves_both(tiny_dataset, tmp_path, compilation_cache):
    import time

    overrides = {**OVERRIDES, "num_steps": 100_000, "eval_every": 50_000}
    processes = start_two(tiny_dataset, tmp_path / "run", **overrides)
    for _ in range(2000):
        if losses_so_far(tmp_path / "run") or any(process.poll() is not None for process in processes):
            break
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    results = finish(processes)
    for returncode, _, errors in results:
        assert returncode == 0, errors
    last = checkpoint.choose_step(tmp_path / "run", "last")
    assert f"stopped     at step {last:,}" in results[0][1]
    assert last > 0


def losses_so_far(workdir):
    return (workdir / "metrics.jsonl").exists() and losses(workdir)


def test_a_refusal_reaches_both(tiny_dataset, tmp_path, compilation_cache):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    results = finish(start_two(tiny_dataset, tmp_path / "run", **OVERRIDES), timeout=120)
    assert [returncode for returncode, _, _ in results] == [2, 2]
    assert "holds files but no run" in results[0][2]
    assert "process 0 of 2 refused to start" in results[1][2]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    assert jax.process_count() == 1
