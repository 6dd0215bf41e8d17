"""Long runs: validations on a budget, a run that is prolonged, a trace of some steps."""

import functools
import importlib
import json
import shutil

import jax
import numpy as np
import pytest

from ctssl_jax.runs.reports import read_reports
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training import profiling, progress
from ctssl_jax.training.setup import check
from ctssl_jax.training.state import learning_rate_schedule
from ctssl_jax.training.validation_share import reckoned_share
from tests.ctssl_jax.training.test_recipes import ALL_SIZES
from tests.helpers.training_runs import (
    ask_to_stop_at,
    assert_same_state,
    saved_state,
    tiny_config,
    train_on,
)


def test_share_of_a_validation_by_hand():
    config = importlib.import_module("configs.masked_region").get_config()
    config.num_steps, config.eval_every, config.batch_size = 4_001, 2_000, 10
    # three validations of 11 batches and one for the pictures, against three passes a slice
    assert reckoned_share(config, get_task(config.task), 101) == 360 / (360 + 120_030)
    config.microbatches = 5
    assert reckoned_share(config, get_task(config.task), 101) == 312 / (312 + 120_030)


@pytest.mark.parametrize("name", ALL_SIZES)
def test_validations_take_a_twentieth_of_the_time_at_most(name):
    """With a training split of 0.1, 1 or 12 million slices, of 80, 10 and 10 %."""
    recipe, size = name.split(":")
    config = importlib.import_module(f"configs.{recipe}").get_config(size)
    frozen = config.copy_and_resolve_references()
    frozen.encoder_learning_rate_factor = 0.0
    for training_slices in (100_000, 1_000_000, 12_000_000):
        scored = min(config.validation_slices, training_slices // 8)
        shares = [reckoned_share(one, get_task(config.task), scored) for one in (config, frozen)]
        assert 0 < shares[0] <= shares[1] <= 0.05


def test_the_measured_share_and_the_time_that_is_left(monkeypatch, capsys):
    now = iter([10, 14, 20, 30, 50, 60])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    clock = progress.Clock(100, 100, 0)
    with clock.pausing():  # 4 seconds of the start
        pass
    assert clock.lap(104) == (4, 16)
    assert clock.validation_share == 0
    with clock.validating():  # 20 seconds
        pass
    clock.say_share(106)  # 20 seconds of steps more
    assert "took 35.7% of the time since step 100" in capsys.readouterr().out
    # 36 seconds for 6 steps; validations after the steps 110, 120 and 125
    assert clock.left(125, 10) == 19 * 6 + 3 * 20


def test_the_share_is_said_and_how_to_make_it_smaller(tiny_dataset):
    def said(**fields):
        job = check(tiny_config(tiny_dataset, num_steps=600, **fields), None, jax.devices()[:1])
        (line,) = [line for line in job.description() if line.startswith("validation")]
        return line

    assert said(validation_slices=8, eval_every=60) == (
        "validation   8 of 24 slices, of 2 of 2 patients, every 60 steps: about 1.1% of the time"
    )
    assert said(validation_slices=0, eval_every=20) == (
        "validation   24 of 24 slices, of 2 of 2 patients, every 20 steps: about 6.2% of the time; "
        "--config.validation_slices=16 makes it 4.8%"
    )


def test_a_validation_reads_its_slices_and_shows_those_of_the_whole_split(tiny_dataset):
    job = check(tiny_config(tiny_dataset, validation_slices=9), None, jax.devices()[:1])
    read = [record for batch in job.validation_batches() for record in batch["record_index"]]
    assert len(job.validation_items) == 9
    assert sorted(set(read)) == job.validation_source.table[job.validation_items, 0].tolist()
    assert job.picture_slices["record_index"][:2].tolist() == [6, 18]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rate_of_a_prolonged_run(schedule, tiny_dataset):
    def rates(num_steps, prolonged=()):
        config = tiny_config(tiny_dataset, schedule=schedule, warmup_steps=3)
        config.num_steps, config.prolonged = num_steps, prolonged
        return np.array([float(learning_rate_schedule(config)(step)) for step in range(40)])

    twice = rates(40, ((10, 12), (24, 24)))
    np.testing.assert_array_equal(twice[:10], rates(12)[:10])
    np.testing.assert_array_equal(twice[10:24], rates(24)[10:24])
    np.testing.assert_array_equal(twice[24:], rates(40)[24:])
    assert twice[24] > 0 and twice[24] > twice[23]


def cosine(dataset, num_steps, **fields):
    return tiny_config(dataset, schedule="cosine", num_steps=num_steps, eval_every=4, **fields)


def test_a_finished_run_is_prolonged(tiny_dataset, tmp_path, monkeypatch, capsys):
    """Stopped and resumed in its second part, it equals the one that was not, to the bit; its
    record makes a new run that equals both but for rounding, since its first steps are of another
    program."""

    config = functools.partial(cosine, tiny_dataset)
    assert train_on(config(4), tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "resumed")
    assert train_on(config(12), tmp_path / "first")
    assert (
        "cosine over 4 steps up to step 4, where the run was prolonged" in capsys.readouterr().out
    )
    ask_to_stop_at(monkeypatch, 6)
    assert not train_on(config(12), tmp_path / "resumed")
    monkeypatch.undo()
    assert train_on(config(12), tmp_path / "resumed")
    assert train_on(config(12, prolonged=((4, 4),)), tmp_path / "new")
    assert_same_state(tmp_path / "first", tmp_path / "resumed")
    new = saved_state(tmp_path / "new", "last")
    for name, value in saved_state(tmp_path / "first", "last").items():
        np.testing.assert_allclose(new[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    for name in ("resumed", "new"):
        stored = json.loads((tmp_path / name / "config.json").read_text())
        assert (stored["num_steps"], stored["prolonged"]) == (12, [[4, 4]])
    losses = [
        [line["loss"] for line in read_reports(tmp_path / name, "validation")]
        for name in ("first", "resumed", "new")
    ]
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-5) and len(losses[0]) == 3
    weights = [saved_state(tmp_path / "first", step) for step in (8, 12)]
    assert any(not np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_steps_are_traced(tiny_dataset, tmp_path, capsys):
    config = cosine(tiny_dataset, 12, prolonged=((4, 4),))
    train_on(config, tmp_path, profile_steps=4)
    said = capsys.readouterr().out
    # five steps to warm up; the validation after step 8 comes before the trace, not into it
    assert f"profile      steps 9 to 12 in {tmp_path / 'profile'}" in said
    assert "convolutions run in threads of a library that the trace does not see" in said
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    steps = [
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert steps == [9, 10, 11, 12]
    assert profiling.seconds_with_operations(trace) > 0
    train_on(config, tmp_path, profile_steps=4)
    assert "no step is left to trace" in capsys.readouterr().out


def test_a_trace_that_cannot_be_written_is_said(tmp_path, capsys):
    (tmp_path / "profile").write_text("")
    trace = profiling.StepTrace(tmp_path, 1, 0, 1, 1)
    with trace.step(0, jax.numpy.zeros(2)):
        pass
    trace.end(1, jax.numpy.zeros(2))
    said = capsys.readouterr().out
    assert said.startswith("WARNING") and "profile cannot be written (" in said
    trace.end(1, jax.numpy.zeros(2), at_once=True)
    assert capsys.readouterr().out == ""
