"""Whole runs: exact resumption, interruptions, divergence, checkpoints kept, refusals."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from ctssl_jax.runs import reports
from ctssl_jax.runs.checkpoints import choose, choose_step, read_metadata
from ctssl_jax.training import loop
from ctssl_jax.training.scoring import evaluate_split
from ctssl_jax.training.state import TrainingDiverged
from ctssl_jax.training.step import run_step
from data_prep.system.errors import InputError
from tests.helpers.opened_files import listed, listing, opened_files
from tests.helpers.training_runs import (
    EMA,
    PROJECT,
    ask_to_stop_at,
    assert_same_state,
    command,
    command_ended_at,
    losses,
    numbers,
    saved_state,
    start,
    tiny_config,
    train_on,
)

VARIANTS = {
    "gradient": {},
    "ema, revival, microbatches": {**EMA, "microbatches": 2, "model.drop_rate": 0.1},
}


@pytest.fixture(scope="module")
def straight(tiny_dataset, tmp_path_factory):
    """Runs of 12 steps without interruption: 1.6 epochs of 60 slices, so that a batch spans the
    epoch's end."""
    finished = {}

    def run(variant):
        if variant not in finished:
            finished[variant] = tmp_path_factory.mktemp("straight") / "run"
            assert train_on(tiny_config(tiny_dataset, **VARIANTS[variant]), finished[variant])
        return finished[variant]

    return run


@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_run_equals_straight_run(
    variant, straight, tiny_dataset, tmp_path, monkeypatch
):
    expected, config, workdir = (
        straight(variant),
        tiny_config(tiny_dataset, **VARIANTS[variant]),
        tmp_path / "run",
    )
    with monkeypatch.context() as patch:
        ask_to_stop_at(patch, 3)  # between reports, evaluations and checkpoints
        assert not train_on(config, workdir)
    assert choose_step(workdir, "last") == 3
    with monkeypatch.context() as patch:
        ask_to_stop_at(patch, 9)  # after a checkpoint, and in the second epoch
        assert not train_on(config, workdir)
    assert train_on(config, workdir)
    assert_same_state(workdir, expected)
    assert numbers(workdir) == numbers(expected)
    assert choose_step(workdir, "best") == choose_step(expected, "best")


def test_a_complete_run_can_be_prolonged(straight, tiny_dataset, tmp_path):
    expected, workdir = straight("gradient"), tmp_path / "run"
    for num_steps in (6, 12):
        assert train_on(tiny_config(tiny_dataset, num_steps=num_steps), workdir)
    assert_same_state(workdir, expected)
    assert numbers(workdir) == numbers(expected)


def test_run_directory_and_start_up_report(tiny_dataset, tmp_path, capsys):
    config, workdir = (
        tiny_config(tiny_dataset, num_steps=2, log_every=1, eval_every=1),
        tmp_path / "run",
    )
    assert train_on(config, workdir)
    printed = capsys.readouterr().out
    for word in (
        "devices ",
        " trained",
        "GFLOP a slice",
        "microbatch",
        "XLA expects",
        "SYNTHETIC",
    ):
        assert word in printed
    assert "slices/s" in printed and " left" in printed
    assert sorted(path.name for path in workdir.iterdir()) == [
        "ancestors.json", "checkpoints", "config.json", "metrics.jsonl", "patients.json",
        "pictures", "preparation.json", "tensorboard", "training.lock", "training_data.json",
        "transplant.json",
    ]  # fmt: skip
    assert json.loads((workdir / "config.json").read_text())["dataset"] == str(tiny_dataset)
    assert sorted(path.name for path in (workdir / "pictures").iterdir()) == [
        f"step_{step:08d}.png" for step in range(3)
    ]
    assert [line["step"] for line in reports.read_reports(workdir, "train")] == [1, 2]
    assert list((workdir / "tensorboard").iterdir())


def test_best_and_last_checkpoints_are_kept(tiny_dataset, tmp_path):
    config = tiny_config(tiny_dataset, num_steps=8, eval_every=1, learning_rate=0.02)
    assert train_on(config, tmp_path / "run")
    validation = {
        line["step"]: line["masked_mse"]
        for line in reports.read_reports(tmp_path / "run", "validation")
    }
    assert sorted(validation) == list(range(1, 9))
    best = min(validation, key=validation.get)
    assert choose_step(tmp_path / "run", "best") == best
    assert choose_step(tmp_path / "run", "last") == 8
    kept = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == sorted({best, 7, 8})
    assert read_metadata(tmp_path / "run", best)["preparation"]["image_size"] == 16


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(
    tiny_dataset, tmp_path, monkeypatch
):
    def diverging(program, state, microbatches):
        if int(state.step) == 3:
            state = state.replace(params=jax.tree.map(lambda leaf: leaf * np.inf, state.params))
        return run_step(program, state, microbatches)

    monkeypatch.setattr(loop, "run_step", diverging)
    message = r"not finite at step 4 of .*run: .* the checkpoint of step 3 is kept; lower "
    for _ in range(2):  # run again, it says the same
        with pytest.raises(TrainingDiverged, match=message):
            train_on(tiny_config(tiny_dataset, eval_every=3), tmp_path / "run")
    assert choose_step(tmp_path / "run", "last") == choose_step(tmp_path / "run", "best") == 3
    assert all(np.isfinite(value).all() for value in saved_state(tmp_path / "run").values())


def test_killed_and_terminated_processes_lose_nothing_saved(tiny_dataset, tmp_path):
    """Ended at random moments by `tests/campaigns/kills.py`; here between a checkpoint and a
    report."""
    overrides = dict(num_steps=60, log_every=1, eval_every=10)
    process = start(command(tiny_dataset, tmp_path / "straight", **overrides))
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    workdir, saved_before = tmp_path / "run", 0
    arguments = command(tiny_dataset, workdir, **overrides)
    for number in (signal.SIGKILL, signal.SIGTERM):
        step = saved_before + 13 + random.randrange(7)
        process = start(command_ended_at(step, number, arguments))
        output, errors = process.communicate()
        saved = choose_step(workdir, "last")
        if number == signal.SIGTERM:
            assert process.returncode == 75, errors
            assert f"at step {saved:,}" in output and saved == step
        else:
            assert process.returncode == -signal.SIGKILL, errors
            assert saved % 10 == 0
        saved_before = saved
    process = start([*listing("config.json", "preparation.json"), *arguments[2:]])
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    files = [workdir / "config.json", workdir / "preparation.json"]
    assert listed(errors) == sorted(map(str, [*files, tiny_dataset / "preparation.json"]))
    assert_same_state(workdir, tmp_path / "straight")
    assert numbers(workdir) == numbers(tmp_path / "straight")


def test_a_checkpoint_goes_on_with_other_numbers_of_devices(straight, tiny_dataset, tmp_path):
    expected = straight("gradient")
    for num_steps, num_devices in ((4, 8), (8, 2), (12, 1)):
        assert train_on(
            tiny_config(tiny_dataset, num_steps=num_steps), tmp_path / "run", num_devices
        )
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(expected), rtol=1e-4)


def test_a_request_to_stop_does_not_wait_for_a_validation(
    straight, tiny_dataset, tmp_path, monkeypatch
):
    """SIGTERM within the validation of step 6, which is saved before: validated when the run goes
    on, before the next step."""
    expected = straight("gradient")

    def signal_during_the_second(scorer, state, batches, **options):
        def signalling():
            for number, batch in enumerate(batches):
                if int(state.step) == 6 and number == 0:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        return evaluate_split(scorer, state, signalling(), **options)

    monkeypatch.setattr(loop, "evaluate_split", signal_during_the_second)
    workdir = tmp_path / "run"
    assert not train_on(tiny_config(tiny_dataset), workdir)
    assert reports.read_reports(workdir, "validation") == []
    chosen = choose(workdir, "best")
    assert chosen.step == choose_step(workdir, "last") == 6 and "unscored" in chosen.why
    monkeypatch.undo()
    assert train_on(tiny_config(tiny_dataset), workdir)
    assert_same_state(workdir, expected)
    assert numbers(workdir) == numbers(expected)
    assert choose_step(workdir, "best") == choose_step(expected, "best")


def test_nothing_is_started_by_a_signal_before_the_first_step(tiny_dataset, tmp_path):
    program = (
        "import pathlib, signal, sys, time\n"
        "from data_prep.system import early_stop\n"
        "early_stop.leave_at_once()\n"
        "from ctssl_jax.training import setup\n"
        "from tests.helpers.training_runs import tiny_config, train_on\n"
        "def interrupted(*arguments):\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    time.sleep(60)\n"
        "setup.compile_step = interrupted\n"
        "train_on(tiny_config(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tiny_dataset), str(tmp_path / "run")],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 75, result.stderr
    assert result.stderr.endswith("stopped; run the same command again to continue\n")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_wall_clock_that_jumps_shows_in_no_speed(tiny_dataset, tmp_path, monkeypatch):
    wall_clock, calls = time.time, itertools.count()

    def jumping() -> float:
        # not for Orbax, which waits by it: a save would be given up
        ours = sys._getframe(1).f_globals.get("__name__", "").startswith(("ctssl_jax", "data_prep"))
        return wall_clock() + 60 * (next(calls) % 3 - 1) * ours

    monkeypatch.setattr(time, "time", jumping)
    assert train_on(
        tiny_config(tiny_dataset, num_steps=4, log_every=1, eval_every=2), tmp_path / "run"
    )
    lines = reports.read_reports(tmp_path / "run", "train")
    assert len(lines) == 4
    assert all(
        1e-3 < line["slices_per_second"] < 1e6 and 0 <= line["waiting_for_data"] <= 1
        for line in lines
    )


def test_each_folder_is_opened_once(straight, tiny_dataset, tmp_path):
    """The dataset, the run that resumes, and the run of a warm start."""
    names = ("config.json", "preparation.json")
    workdir = shutil.copytree(straight("gradient"), tmp_path / "run")
    with opened_files(*names) as opened:
        assert train_on(tiny_config(tiny_dataset, num_steps=13), workdir)
    assert sorted(opened) == sorted(
        [str(tiny_dataset / names[1]), *(str(workdir / name) for name in names)]
    )
    with opened_files(*names) as opened:
        assert train_on(
            tiny_config(tiny_dataset, init_from=str(workdir), num_steps=1), tmp_path / "next"
        )
    assert sorted(opened) == sorted(
        [str(tiny_dataset / names[1]), *(str(workdir / name) for name in names)]
    )


def test_run_of_another_configuration_is_refused(straight, tiny_dataset):
    workdir = straight("gradient")
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    with pytest.raises(
        InputError,
        match=r"config.learning_rate=0.001, not 0.5; use another --workdir",
    ):
        train_on(tiny_config(tiny_dataset, learning_rate=0.5), workdir)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
