"""Training steps that do not fit: one line with settings that do, before anything is read."""

import dataclasses
import re

import jax
import pytest

from ctssl_jax.parallel.mesh import make_mesh
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training import fitting, loop, setup
from ctssl_jax.training import step as training_step
from ctssl_jax.training.step import compile_step, make_program
from data_prep.system.errors import InputError
from tests.helpers.training_runs import tiny_config, train_on


def available(monkeypatch, number):
    for module in (fitting, training_step):
        monkeypatch.setattr(module, "device_memory", lambda devices: number)


def program_of(config, num_devices=1):
    mesh = make_mesh(jax.devices()[:num_devices], config.fsdp_devices)
    return make_program(config, get_task(config.task), 1, mesh)


def checked(config, num_devices=1):
    return fitting.check_fits(*compile_step(program_of(config, num_devices)))


def test_settings_that_fit_are_named_before_anything_is_read(tiny_dataset, tmp_path, monkeypatch):
    """XLA is asked for two small steps; the step of 100,000 slices is not compiled."""
    read = []
    monkeypatch.setattr(setup, "training_batches", lambda *args, **kwargs: read.append(1))
    monkeypatch.setattr(setup, "compile_step", lambda program: compile_step(program))
    available(monkeypatch, 1_500_000)
    config = tiny_config(tiny_dataset, batch_size=100_000)
    with pytest.raises(InputError) as error:
        train_on(config, tmp_path / "run")
    assert not read and not (tmp_path / "run").exists()
    line = str(error.value)
    assert line.startswith("config.batch_size=100000: a training step needs about ")
    remedies = dict(re.findall(r"--config\.(\w+)=(\d+)", line))
    assert set(remedies) == {"microbatches", "batch_size"}
    largest = int(remedies["batch_size"])
    assert largest / 4 <= 100_000 // int(remedies["microbatches"]) <= largest
    config.batch_size = largest
    checked(config)


def linear(program, **_):
    """`compile_step` of a program that needs 1,000 bytes and 100 for each slice of a part."""
    return program, 1000 + 100 * fitting._slices_of_a_device(program)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (dict(batch_size=1024), r"--config.microbatches=8 .*--config.batch_size=136$"),
        (dict(batch_size=1031), r"give --config.batch_size=136$"),  # a prime number
        (dict(batch_size=1024, microbatches=2), r"microbatches=8 .*--config.batch_size=272$"),
    ],
)
def test_the_largest_part_that_fits(tiny_dataset, monkeypatch, settings, remedy):
    available(monkeypatch, 17_000)
    for name, value in {
        "compile_step": linear,
        "_bytes_read_ahead": lambda program: 0,
        "_changed": changed,
    }.items():
        monkeypatch.setattr(fitting, name, value)
    program = program_of(tiny_config(tiny_dataset, **settings))
    with pytest.raises(InputError, match=remedy):
        fitting.check_fits(*linear(program))


def changed(program, **fields):
    config = program.definition.config.copy_and_resolve_references()
    config.update(fields)
    definition = dataclasses.replace(program.definition, config=config)
    return dataclasses.replace(program, definition=definition)


def test_on_an_accelerator_switches_are_named_if_they_are_enough(tiny_dataset, monkeypatch):
    monkeypatch.setattr(fitting, "reckoned_bytes", lambda program, traced: 0)
    monkeypatch.setattr(
        fitting,
        "compile_step",
        lambda program, **_: (program, 3 if program.definition.config.remat else 9),
    )
    device = type("Device", (), {"platform": "tpu", "process_index": 0})()
    monkeypatch.setattr(fitting, "_devices", lambda program: [device])
    named = list(fitting._switches(program_of(tiny_config(tiny_dataset)), 5))
    assert named == ["--config.remat=True"]


def test_slices_that_are_read_ahead_count(tiny_dataset, monkeypatch):
    config = tiny_config(tiny_dataset, reading_threads=64)
    program = program_of(config)
    monkeypatch.setattr(fitting, "host_memory", lambda: 100_000)
    with pytest.raises(InputError, match=r"read ahead need .* fewer --config.reading_threads"):
        fitting.check_fits(program, 0)


@pytest.mark.parametrize("where", ["run_step", "evaluate_split"])
def test_memory_that_ends_later_is_one_line(tiny_dataset, tmp_path, monkeypatch, where):
    def end(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(loop, where, end)
    with pytest.raises(InputError, match=r"ran out with 8 slices.*--config.batch_size=4$"):
        train_on(tiny_config(tiny_dataset, num_steps=1, eval_every=1), tmp_path / "run")


def test_an_estimate_names_the_largest_batch(tiny_dataset, monkeypatch):
    available(monkeypatch, 17_000)
    for name, value in {
        "compile_step": linear,
        "_bytes_read_ahead": lambda program: 0,
        "_changed": changed,
    }.items():
        monkeypatch.setattr(fitting, name, value)
    program = program_of(tiny_config(tiny_dataset, microbatches=2))
    line = fitting.memory_line(*linear(program))
    assert "the largest batch that fits is about 272 (136 slices a device and microbatch)" in line
    available(monkeypatch, None)
    assert "not known" in fitting.memory_line(program, 5)
