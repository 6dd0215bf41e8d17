"""Tiny training runs and what they leave behind."""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from ctssl_jax.ops.trees import flatten
from ctssl_jax.parallel.mesh import make_mesh, to_devices
from ctssl_jax.runs import reports
from ctssl_jax.runs.checkpoints import Checkpoints, choose_step, restore
from ctssl_jax.runs.damage import write_sums
from ctssl_jax.runs.run import flat, open_workdir, to_json
from ctssl_jax.runs.scores import make_score
from ctssl_jax.tasks.interface import Task
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training import loop, setup, warm_start
from ctssl_jax.training.loop import train
from ctssl_jax.training.step import Program, compile_step, make_program, run_step
from data_prep.dataset.reader import Dataset

PROJECT = Path(__file__).resolve().parents[2]
TINY = {
    "image_size": 16,
    "model.hidden": (4, 8),
    "model.depth": 1,
    "model.embedding_dim": 4,
    "model.num_codes": 8,
    "batch_size": 8,
    "num_steps": 12,
    "log_every": 4,
    "eval_every": 6,
    "num_pictures": 2,
    "reading_threads": 2,
}
# fields that only some recipes have
TINY_VIEWS = {
    "views.global_size": 16,
    "views.local_size": 8,
    "model.projector": (8, 4),
    "regulariser.directions": 16,
    "warmup_steps": 0,
}
EMA = {"model.vq_update": "ema", "model.vq_init": "data", "model.vq_revive_every": 3}


def tiny_recipe(dataset: Path, task: str, /, **overrides) -> ml_collections.ConfigDict:
    """The recipe of a task at the size of a test; `model__depth=2` sets `config.model.depth`."""
    config = importlib.import_module(f"configs.{task}").get_config()
    sized = TINY | TINY_VIEWS if "views" in config else TINY
    tiny = {name: value for name, value in sized.items() if name in flat(to_json(config))}
    if config.model.get("num_prototypes"):
        tiny |= {"model.num_prototypes": 12, "teacher.frozen_steps": 2, "teacher.warmup_steps": 4}
    overrides = {name.replace("__", "."): value for name, value in overrides.items()}
    config.update_from_flattened_dict({"dataset": str(dataset), **tiny, **overrides})
    return config


def tiny_config(dataset: Path, /, **overrides) -> ml_collections.ConfigDict:
    """The default recipe at the size of a test."""
    return tiny_recipe(dataset, "masked_region", **overrides)


def command(dataset: Path, workdir: Path, /, *flags: str, **overrides) -> list[str]:
    """The command line of the same run."""
    settings = {**TINY, **{name.replace("__", "."): value for name, value in overrides.items()}}
    given = [f"--config.{name}={value}" for name, value in settings.items()]
    named = [f"--config.dataset={dataset}", f"--workdir={workdir}"]
    return [
        sys.executable,
        "-m",
        "ctssl_jax.train",
        "--config=configs/masked_region.py",
        *named,
        *given,
        *flags,
    ]


def command_ended_at(
    step: int, number: int, arguments: list[str], seconds: float = 0.0
) -> list[str]:
    """A command line of `command` that sends itself this signal once it has taken this step;
    after this step and each later one it rests for so many seconds."""
    program = (
        "from tests.helpers.training_runs import run_until; "
        f"run_until({step}, {int(number)}, {seconds})"
    )
    return [sys.executable, "-c", program, *arguments[3:]]


def run_until(step: int, number: int, seconds: float) -> None:
    """The program of `command_ended_at`."""
    loop.run_step = signalling(step, number, seconds)
    runpy.run_module("ctssl_jax.train", run_name="__main__")


def signalling(step: int, number: int, seconds: float = 0.0) -> Callable:
    """`run_step`, which sends this process a signal after this step, and rests from there on."""

    def run_step_and_signal(program, state, microbatches):
        state = run_step(program, state, microbatches)
        if int(state.step) == step:
            os.kill(os.getpid(), number)
        if seconds and int(state.step) >= step:
            time.sleep(seconds)
        return state

    return run_step_and_signal


def start(arguments: list[str], num_devices: int = 1) -> subprocess.Popen:
    """Start a command line at the project's root with so many simulated devices; output is caught
    as text."""
    kept = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    flags = " ".join([*kept, f"--xla_force_host_platform_device_count={num_devices}"])
    return subprocess.Popen(
        arguments,
        cwd=PROJECT,
        env={**os.environ, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_on(
    config: ml_collections.ConfigDict, workdir: Path, num_devices: int = 1, **options
) -> bool:
    """`train` on the first few simulated devices, with its options.

    A program that was compiled before in this process, for the same model and devices, is taken
    again.
    """
    with pytest.MonkeyPatch.context() as patch:
        if setup.compile_step is compile_step:  # else a test replaced it
            patch.setattr(setup, "make_program", program_made_once)
            patch.setattr(setup, "compile_step", program_compiled_once)
        patch.setattr(warm_start, "begin", _begin_and_keep(str(workdir)))
        return train(config, workdir, jax.devices()[:num_devices], **options)


_begun: dict[str, dict[str, np.ndarray]] = {}


def begun_state(workdir: Path) -> dict[str, np.ndarray]:
    """Every array, by name, of the state before the first step of a run of `train_on`."""
    return _begun[str(workdir)]


def _begin_and_keep(workdir: str) -> Callable:
    begin = warm_start.begin

    def begin_and_keep(*arguments):
        state = begin(*arguments)
        _begun[workdir] = jax.device_get(flatten(state))
        return state

    return begin_and_keep


_NOT_OF_THE_PROGRAM = (
    *("dataset", "train_fraction", "init_from", "init_checkpoint", "init_weights", "leakage"),
    *("log_every", "eval_every", "validation_slices", "best_by", "num_pictures", "reading_threads"),
    *("shuffle", "shuffle_window", "shuffle_streams", "shards_gb"),
)
_programs: dict[str, Program] = {}
_compiled: dict[int, tuple[Program, int]] = {}


def program_made_once(
    config: ml_collections.ConfigDict, task: Task, channels: int, mesh: Mesh
) -> Program:
    """`make_program`; a second call for the same model and devices returns the first program."""
    fields = {
        name: value for name, value in to_json(config).items() if name not in _NOT_OF_THE_PROGRAM
    }
    if config.schedule == "constant":
        del fields["num_steps"]
    key = json.dumps(
        [fields, channels, mesh.devices.shape, [device.id for device in mesh.devices.flat]]
    )
    if key not in _programs:
        _programs[key] = make_program(config, task, channels, mesh)
    return _programs[key]


def program_compiled_once(program: Program) -> tuple[Program, int]:
    """`compile_step` of a program of `program_made_once`."""
    if id(program) not in _compiled:
        _compiled[id(program)] = compile_step(program)
    return _compiled[id(program)]


def step_on_one_and_eight_devices(
    config: ml_collections.ConfigDict,
    batch: dict[str, np.ndarray],
    on_eight: dict[str, Any] | None = None,
) -> list[tuple[dict, dict[str, np.ndarray]]]:
    """The sums and the model's other variables after one step from one state, on one device and on
    eight; `on_eight`: fields of the recipe that differ there."""
    start, results = None, []
    for num_devices, fields in ((1, {}), (8, on_eight or {})):
        config = config.copy_and_resolve_references()
        config.update_from_flattened_dict(fields)
        mesh = make_mesh(jax.devices()[:num_devices], config.fsdp_devices)
        made = program_made_once(config, get_task(config.task), 1, mesh)
        program, _ = program_compiled_once(made)
        start = jax.device_get(program.initial_state()) if start is None else start
        state = jax.tree.map(
            lambda leaf, like: jax.device_put(leaf, like.sharding), start, program.template
        )
        state = program.train_step(state, to_devices(mesh, batch))
        results.append(jax.device_get((state.sums, flatten(state.variables))))
    return results


def ask_to_stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The next run gets SIGTERM while it takes this step."""
    monkeypatch.setattr(loop, "run_step", signalling(step, signal.SIGTERM))


def saved_state(workdir: Path, step: int | str = "last") -> dict[str, np.ndarray]:
    """Every array of a checkpoint by name."""
    step = choose_step(workdir, str(step))
    stored = ocp.checkpointables_metadata((workdir / "checkpoints" / str(step)).resolve()).metadata[
        "state"
    ]
    sharding = SingleDeviceSharding(jax.devices()[0])
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for name, leaf in stored.items()
    }
    return jax.device_get(restore(workdir, step, like))


def assert_same_state(workdir: Path, other: Path, step: int | str = "last") -> None:
    """Two runs' checkpoints are equal bit for bit."""
    one, two = saved_state(workdir, step), saved_state(other, step)
    assert one.keys() == two.keys()
    different = [name for name in one if not np.array_equal(one[name], two[name])]
    assert not different


def numbers(workdir: Path) -> list[dict]:
    """All reports of a run without what a clock says."""
    clocks = ("time", "slices_per_second", "waiting_for_data")
    lines = [
        line
        for kind in ("train", "gradient_norm", "validation")
        for line in reports.read_reports(workdir, kind)
    ]
    return [{name: value for name, value in line.items() if name not in clocks} for line in lines]


def losses(workdir: Path) -> list[float]:
    """The training losses that a run reported."""
    return [line["loss"] for line in reports.read_reports(workdir, "train")]


def save_untrained(
    config: ml_collections.ConfigDict, workdir: Path, step: int = 2, seed: int = 1
) -> None:
    """A run directory as training leaves it, but of a model with random weights: no training step
    is compiled.

    Its batch statistics are random, too, so that a wrong one shows in any output.
    """
    preparation = Dataset.open(config.dataset).preparation
    patients = {
        split: [volume["patient_id"] for volume in Dataset.open(config.dataset).volumes(split)]
        for split in ("train", "validation")
    }
    open_workdir(workdir, config, preparation, patients)
    model = randomised(get_task(config.task).build(config, nnx.Rngs(params=seed)), seed)
    _, params, variables = nnx.split(model, nnx.Param, ...)
    save_scored(
        workdir,
        {step: ({"params": nnx.as_pure(params), "variables": nnx.as_pure(variables)}, 0.5)},
    )


def save_scored(
    workdir: Path, states: dict[int, tuple[Any, float | None]], metadata: dict | None = None
) -> None:
    """Checkpoints of states by step, each with its validation error; None leaves it unscored."""
    checkpoints = Checkpoints(workdir)
    for step, (state, error) in states.items():
        checkpoints.save(step, state, metadata or {})
        if error is not None:
            checkpoints.score(make_score("mse", False, {"mse": error}))
    checkpoints.close()


def renew_sums(workdir: Path) -> None:
    """The checksums of all checkpoints, after a test changed a file of the run."""
    for folder in (workdir / "checkpoints").iterdir():
        write_sums(workdir, int(folder.name))


def randomised(model: nnx.Module, seed: int = 0) -> nnx.Module:
    """The model with random batch statistics, scales, biases and codes."""
    rng = np.random.default_rng(seed)
    for path, variable in nnx.iter_graph(model):
        if not isinstance(variable, nnx.Variable):
            continue
        shape, name = variable[...].shape, path[-1]
        if name in ("var", "scale"):
            variable[...] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        elif name in ("mean", "bias"):
            variable[...] = rng.normal(0, 0.1, shape).astype(np.float32)
        elif name == "codebook":
            variable[...] = rng.normal(0, 0.3, shape).astype(np.float32)
    return model
