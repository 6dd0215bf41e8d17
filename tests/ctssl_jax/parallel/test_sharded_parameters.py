"""Parameters and optimizer state split over devices: the same numbers as replicated, less memory a
device."""

import shutil

import jax
import numpy as np
import pytest

from ctssl_jax.ops.trees import flatten
from ctssl_jax.parallel.mesh import SMALLEST_SPLIT_ARRAY, make_mesh
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training.step import compile_step, make_program
from data_prep.system.errors import InputError
from tests.helpers.training_runs import (
    EMA,
    ask_to_stop_at,
    assert_same_state,
    begun_state,
    losses,
    numbers,
    saved_state,
    tiny_config,
    train_on,
)

# the 3 x 3 kernels are large enough to be split
WIDE = {"model.hidden": (16, 32), "model.embedding_dim": 8}
SHORT = {
    **{
        **WIDE,
        **EMA,
        "microbatches": 2,
        "batch_size": 16,
        "num_steps": 4,
        "log_every": 1,
        "eval_every": 4,
    },
    # RAdam hardly moves in four steps
    **{"optimizer": "adamw", "learning_rate": 0.001, "gradient_clip": 1.0},
}


def built(config, num_devices=8):
    """The program of a configuration and the memory that XLA expects a device to need, in bytes."""
    mesh = make_mesh(jax.devices()[:num_devices], config.fsdp_devices)
    program = make_program(config, get_task(config.task), 1, mesh)
    return compile_step(program)


@pytest.fixture(scope="module")
def runs(tiny_dataset, tmp_path_factory):
    """Four steps on eight devices: each with all parameters, and two groups of four that share a
    copy."""
    folder = tmp_path_factory.mktemp("runs")
    for fsdp_devices in (1, 4):
        config = tiny_config(tiny_dataset, **SHORT, fsdp_devices=fsdp_devices)
        assert train_on(config, folder / str(fsdp_devices), num_devices=8)
    return folder


def test_the_numbers_are_those_of_replicated_parameters(runs):
    """Sums are added in another order: relative difference of a loss below 1e-4 within 4 steps."""
    assert losses(runs / "4") == pytest.approx(losses(runs / "1"), rel=1e-4)
    for one, two in zip(numbers(runs / "1"), numbers(runs / "4"), strict=True):
        assert one.keys() == two.keys()
        # validation by few slices: one latent between two codes changes it by more
        for name in one:
            loose = 1e-2 if one["kind"] == "validation" else 1e-3
            assert two[name] == (
                one[name] if name == "kind" else pytest.approx(one[name], rel=loose)
            ), name
    one, two, start = saved_state(runs / "1"), saved_state(runs / "4"), begun_state(runs / "4")
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith("kernel") and name.startswith("params"):
            moved = np.abs(one[name] - start[name]).max()
            assert np.abs(two[name] - one[name]).max() < 0.1 * moved, name


def test_every_device_holds_its_part(tiny_dataset):
    config = tiny_config(tiny_dataset, **WIDE, fsdp_devices=8)
    program, memory = built(config)
    _, memory_replicated = built(tiny_config(tiny_dataset, **WIDE))
    assert any(
        leaf.addressable_shards[0].data.size == leaf.size // 8
        for leaf in jax.tree.leaves(program.zero_gradients())
    )
    state = program.initial_state()
    leaves = flatten({"params": state.params, "optimizer": state.optimizer})
    split = {
        name for name, leaf in leaves.items() if leaf.addressable_shards[0].data.size < leaf.size
    }
    assert split == {name for name, leaf in leaves.items() if leaf.size >= SMALLEST_SPLIT_ARRAY}
    assert {name.split("/")[0] for name in split} == {"params", "optimizer"}
    for name in split:
        assert leaves[name].addressable_shards[0].data.size == leaves[name].size // 8
    total = sum(leaf.nbytes for leaf in leaves.values())
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves.values())
    assert held < 0.4 * total  # biases and first layers stay whole
    assert memory < memory_replicated - 0.5 * (total - held)


def test_interrupted_run_is_exact_and_goes_on_with_another_split(
    runs, tiny_dataset, tmp_path, monkeypatch
):
    config = tiny_config(tiny_dataset, **SHORT, fsdp_devices=4)
    with monkeypatch.context() as patch:
        ask_to_stop_at(patch, 3)
        assert not train_on(config, tmp_path / "again", num_devices=8)
    shutil.copytree(tmp_path / "again", tmp_path / "otherwise")
    assert train_on(config, tmp_path / "again", num_devices=8)
    assert_same_state(tmp_path / "again", runs / "4")
    config.fsdp_devices = 1
    assert train_on(config, tmp_path / "otherwise", num_devices=8)
    assert losses(tmp_path / "otherwise") == pytest.approx(losses(runs / "1"), rel=1e-4)


def test_a_number_that_does_not_divide_is_refused(tiny_dataset, tmp_path):
    with pytest.raises(
        InputError,
        match=r"config.fsdp_devices=3 does not divide the 8 devices; choose a divisor",
    ):
        train_on(tiny_config(tiny_dataset, fsdp_devices=3), tmp_path / "run", num_devices=8)
    assert not (tmp_path / "run").exists()
