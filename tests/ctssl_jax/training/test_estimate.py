"""`--estimate`: the cost of a run from timed steps, without any file."""

import os
import re

import jax
import pytest

from ctssl_jax.parallel import mesh
from ctssl_jax.runs.checkpoints import choose_step
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training import estimate as training_estimate
from ctssl_jax.training.estimate import estimate, lines, state_bytes
from ctssl_jax.training.step import make_program
from tests.helpers.training_runs import command, saved_state, start, tiny_config, train_on


def test_numbers_by_hand(tiny_dataset):
    config = tiny_config(tiny_dataset, num_steps=1000, batch_size=16)
    times = {
        "slices_per_second": 40.0,
        "seconds_a_step": 0.4,
        "waiting_for_data": 0.25,
        "num_timed_steps": 7,
    }
    speed, epoch, run, size = lines(times, config, 15_300_000, 3 * 2**30)
    assert "40.0 slices/s, 400 ms a step of 16 (7 timed; 25% waiting for data)" in speed
    assert "106.25 hours for 15,300,000 slices" in epoch
    assert "0.11 hours for 1,000 steps, 0.0 epochs" in run
    assert "3.00 GiB" in size


def test_it_times_real_steps_and_writes_nothing(tiny_dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training_estimate, "SECONDS", 0.1)
    config = tiny_config(tiny_dataset)
    estimate(config, jax.devices()[:1])
    printed = capsys.readouterr().out
    for pattern in (
        r"speed +[\d,.]+ slices/s",
        r"an epoch +0.00 hours for 60 slices",
        r"this run .* 12 steps, 1.6 epo",
    ):
        assert re.search(pattern, printed)
    assert not os.listdir(tmp_path)


def test_checkpoint_size_is_that_of_the_saved_state(tiny_dataset, tmp_path):
    config = tiny_config(tiny_dataset, num_steps=1, eval_every=1)
    assert train_on(config, tmp_path / "run")
    program = make_program(config, get_task(config.task), 1, mesh.make_mesh(jax.devices()[:1]))
    stored = sum(value.nbytes for value in saved_state(tmp_path / "run").values())
    assert state_bytes(program.template) == pytest.approx(stored, abs=8)
    assert choose_step(tmp_path / "run", "last") == 1


def test_command_line_needs_no_workdir(tiny_dataset, tmp_path):
    arguments = [
        part
        for part in command(tiny_dataset, tmp_path / "run", "--estimate")
        if "--workdir" not in part
    ]
    process = start(arguments)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "a checkpoint" in output and "slices/s" in output
    assert not (tmp_path / "run").exists()
