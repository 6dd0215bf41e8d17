"""Whole runs: exact resumption, interruptions, divergence, checkpoints kept, refusals."""

import json
import random
import signal
import time

import jax
import numpy as np
import pytest
from training_runs import (
    EMA,
    ask_to_stop_at,
    assert_same_state,
    command,
    losses,
    numbers,
    saved_state,
    start,
    tiny_config,
    train_on,
)

from ctssl_jax import checkpoint, data, reports
from ctssl_jax.command_line import InputError
from ctssl_jax.training import TrainingDiverged

VARIANTS = {
    "gradient": {},
    "ema, revival, microbatches": {**EMA, "microbatches": 2, "model.drop_rate": 0.1},
}


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda name: name.replace(", ", "-"))
def straight(request, tiny_dataset, tmp_path_factory, compilation_cache):
    """A run of 12 steps without interruption: 1.6 epochs of 60 slices, so that a batch spans the epoch's end."""
    overrides = VARIANTS[request.param]
    workdir = tmp_path_factory.mktemp("straight") / "run"
    assert train_on(tiny_config(tiny_dataset, **overrides), workdir)
    return workdir, overrides


def test_interrupted_run_equals_straight_run(straight, tiny_dataset, tmp_path, monkeypatch):
    expected, overrides = straight
    config, workdir = tiny_config(tiny_dataset, **overrides), tmp_path / "run"
    read = []
    original = data.NeighbourSource.__getitem__
    monkeypatch.setattr(data.NeighbourSource, "__getitem__", lambda self, i: read.append(i) or original(self, i))
    with monkeypatch.context() as patch:
        ask_to_stop_at(patch, 3)  # between reports, evaluations and checkpoints
        assert not train_on(config, workdir)
    assert checkpoint.choose_step(workdir, "last") == 3
    with monkeypatch.context() as patch:
        ask_to_stop_at(patch, 9)  # after a checkpoint, and in the second epoch
        assert not train_on(config, workdir)
    assert train_on(config, workdir)
    assert_same_state(workdir, expected)
    assert numbers(workdir) == numbers(expected)
    assert checkpoint.choose_step(workdir, "best") == checkpoint.choose_step(expected, "best")


def test_a_complete_run_is_left_alone_and_can_be_prolonged(straight, tiny_dataset, tmp_path, capsys):
    expected, overrides = straight
    workdir = tmp_path / "run"
    assert train_on(tiny_config(tiny_dataset, num_steps=6, **overrides), workdir)
    before = numbers(workdir)
    assert train_on(tiny_config(tiny_dataset, num_steps=6, **overrides), workdir)
    assert numbers(workdir) == before
    assert train_on(tiny_config(tiny_dataset, **overrides), workdir)
    assert_same_state(workdir, expected)
    assert numbers(workdir) == numbers(expected)


def test_run_directory_and_start_up_report(tiny_dataset, tmp_path, compilation_cache, capsys):
    config, workdir = tiny_config(tiny_dataset, num_steps=2, log_every=1, eval_every=1), tmp_path / "run"
    assert train_on(config, workdir)
    printed = capsys.readouterr().out
    for word in ("devices ", "trainable parameters", "GFLOP a slice", "microbatch", "XLA expects", "SYNTHETIC"):
        assert word in printed
    assert "slices/s" in printed and " left" in printed
    assert sorted(path.name for path in workdir.iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "patients.json", "pictures", "preparation.json", "tensorboard",
    ]  # fmt: skip
    assert json.loads((workdir / "config.json").read_text())["dataset"] == str(tiny_dataset)
    assert sorted(path.name for path in (workdir / "pictures").iterdir()) == [
        f"step_{step:08d}.png" for step in range(3)
    ]
    assert [line["step"] for line in reports.read_reports(workdir, "train")] == [1, 2]
    assert list((workdir / "tensorboard").iterdir())


def test_best_and_last_checkpoints_are_kept(tiny_dataset, tmp_path, compilation_cache):
    config = tiny_config(tiny_dataset, num_steps=8, eval_every=1, learning_rate=0.02)
    assert train_on(config, tmp_path / "run")
    validation = {line["step"]: line["loss"] for line in reports.read_reports(tmp_path / "run", "validation")}
    assert sorted(validation) == list(range(9))
    best = min(validation, key=validation.get)
    assert checkpoint.choose_step(tmp_path / "run", "best") == best
    assert checkpoint.choose_step(tmp_path / "run", "last") == 8
    kept = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == sorted({best, 7, 8})
    assert checkpoint.read_metadata(tmp_path / "run", best)["preparation"]["image_size"] == 16


@pytest.mark.parametrize("learning_rate", [1e30, 1e38])
def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(
    learning_rate, tiny_dataset, tmp_path, compilation_cache
):
    config = tiny_config(tiny_dataset, learning_rate=learning_rate)
    for _ in range(2):  # run again it says the same
        with pytest.raises(TrainingDiverged, match=r"not finite at step \d+ of .*run.* step 0 is kept; lower config"):
            train_on(config, tmp_path / "run")
        assert checkpoint.choose_step(tmp_path / "run", "last") == 0
    assert all(np.isfinite(value).all() for value in saved_state(tmp_path / "run").values())


def test_killed_and_terminated_processes_lose_nothing_saved(tiny_dataset, tmp_path, compilation_cache):
    overrides = dict(num_steps=400, log_every=1, eval_every=20)
    straight = tmp_path / "straight"
    process = start(command(tiny_dataset, straight, **overrides))
    output, errors = process.communicate()
    assert process.returncode == 0, errors

    workdir, saved_before = tmp_path / "run", 0
    arguments = command(tiny_dataset, workdir, **overrides)
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        process = start(arguments)
        wait_for_progress(process, workdir, saved_before + 20)
        time.sleep(random.random() / 2)
        process.send_signal(number)
        output, errors = process.communicate()
        saved = checkpoint.choose_step(workdir, "last")
        if number == signal.SIGTERM:
            assert process.returncode == 0, errors
            assert f"at step {saved:,}" in output
        assert saved >= saved_before
        saved_before = saved
    process = start(arguments)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert_same_state(workdir, straight)
    assert numbers(workdir) == numbers(straight)


def wait_for_progress(process, workdir, step):
    """Until the run has reported this step, or ended."""
    for _ in range(2400):
        lines = reports.read_reports(workdir, "train")
        if process.poll() is not None or (lines and lines[-1]["step"] >= step):
            return
        time.sleep(0.05)
    pytest.fail(process.communicate()[1])


def test_a_checkpoint_goes_on_with_other_numbers_of_devices(tiny_dataset, tmp_path, compilation_cache):
    for name, devices in (("split", (8, 2, 1)), ("one", (1, 1, 1))):
        for part, num_devices in enumerate(devices):
            config = tiny_config(tiny_dataset, num_steps=4 * (part + 1), log_every=2)
            assert train_on(config, tmp_path / name, num_devices)
    np.testing.assert_allclose(losses(tmp_path / "split"), losses(tmp_path / "one"), rtol=1e-4)


def test_error_from_the_command_line_is_one_line_and_exit_code(tiny_dataset, tmp_path, compilation_cache):
    for expected, arguments in (
        (2, command(tiny_dataset, tmp_path / "a", batch_size=7)),
        (1, command(tiny_dataset, tmp_path / "b", learning_rate=1e30)),
    ):
        process = start(arguments, num_devices=2)
        _, errors = process.communicate()
        assert process.returncode == expected, errors
        (line,) = [line for line in errors.splitlines() if line]
        assert line.startswith("error: ")
    assert not (tmp_path / "a").exists()


def test_nothing_is_started_by_a_signal_before_the_first_step(tiny_dataset, tmp_path, monkeypatch, compilation_cache):
    from ctssl_jax import training

    original = training.compile_step

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(training, "compile_step", interrupted)
    assert not train_on(tiny_config(tiny_dataset), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert signal.getsignal(signal.SIGTERM) is handler
    monkeypatch.undo()
    assert train_on(tiny_config(tiny_dataset, num_steps=1), tmp_path / "run")


def test_run_of_another_configuration_is_refused(straight, tiny_dataset):
    workdir, overrides = straight
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    with pytest.raises(InputError, match=r"config.learning_rate=0.001, not 0.5; use another --workdir"):
        train_on(tiny_config(tiny_dataset, learning_rate=0.5, **overrides), workdir)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    assert jax.process_count() == 1
