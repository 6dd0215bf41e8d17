"""The training step: gradients everywhere, the same curve on one device and on eight, exact
sums."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctssl_jax.data import slices as data
from ctssl_jax.data.batches import evaluation_batches, training_batches
from ctssl_jax.ops.corruptions import example_keys
from ctssl_jax.ops.trees import flatten
from ctssl_jax.parallel.mesh import make_mesh, to_devices
from ctssl_jax.runs.checkpoints import Checkpoints
from ctssl_jax.tasks.table import TASKS, get_task
from ctssl_jax.training.scoring import evaluate_split, render_pictures, score_batch
from ctssl_jax.training.state import (
    TrainingDiverged,
    TrainState,
    check_state,
    define,
    evaluation_keys,
    learning_rate_schedule,
    make_optimizer,
    resume,
)
from ctssl_jax.training.step import initial_state, make_program, run_step, take_report, train_step
from data_prep.dataset.reader import Dataset
from tests.helpers.training_runs import EMA, tiny_config


@pytest.fixture(scope="module")
def program_of():
    """Programs by (devices, settings), built once."""
    built = {}

    def build(config, num_devices=1, key=None):
        key = (num_devices, key)
        if key not in built:
            mesh = make_mesh(jax.devices()[:num_devices])
            built[key] = make_program(config, get_task(config.task), 1, mesh)
        return built[key]

    return build


def run(program, config, source, number):
    """The first steps of a run: the state, and the mean loss, scores and code counts after each."""
    state, reports = program.initial_state(), []
    batches = training_batches(
        source, config.batch_size, config.seed, microbatches=config.microbatches
    )
    for _ in range(number):
        state = run_step(program, state, [next(batches) for _ in range(config.microbatches)])
        state, report = take_report(program, state)
        reports.append((report.means, report.code_counts))
    return state, reports


@pytest.fixture(scope="module")
def source(tiny_dataset):
    return data.open_source(Dataset.open(tiny_dataset), "train", (0,), (0,))


@pytest.mark.parametrize("settings", [{}, EMA], ids=["gradient", "ema"])
def test_eight_devices_give_the_loss_curve_of_one(settings, tiny_dataset, source, program_of):
    """Sums over devices are added in another order: relative difference below 1e-4 within 8
    steps."""
    config = tiny_config(tiny_dataset, **settings)
    curves = []
    for num_devices in (1, 8):
        _, reports = run(program_of(config, num_devices, str(settings)), config, source, 8)
        curves.append(reports)
    for (one, one_counts), (eight, eight_counts) in zip(*curves, strict=True):
        for name in one:
            assert eight[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
        assert np.abs(one_counts - eight_counts).sum() <= 0.01 * one_counts.sum()
        assert one_counts.sum() == 8 * 4 * 4


def test_one_step_moves_every_parameter(tiny_dataset, source, program_of):
    """Named exceptions: biases before a batch normalisation are not trained, and codes that no
    latent chose stay."""
    config = tiny_config(tiny_dataset, optimizer="adamw", weight_decay=0.0)
    program = program_of(config, 1, "adamw")
    before = flatten(jax.device_get(program.initial_state().params))
    state, reports = run(program, config, source, 1)
    after = flatten(jax.device_get(state.params))
    unmoved = {name for name in before if np.array_equal(before[name], after[name])}
    assert unmoved == before.keys() - program.definition.trained
    assert {name.split("/")[-2] + "/" + name.split("/")[-1] for name in unmoved} == {"conv/bias"}
    assert any(name.startswith("encoder") for name in before) and any(
        name.startswith("decoder") for name in before
    )
    moved_codes = np.any(before["quantizer/codebook"] != after["quantizer/codebook"], axis=1)
    np.testing.assert_array_equal(moved_codes, reports[0][1] > 0)
    kernels = [name for name in before if name.endswith("kernel")]
    assert len(kernels) > 10
    for name in kernels:  # and not only some elements of each
        assert np.mean(before[name] != after[name]) > 0.5, name


def test_batch_statistics_and_ema_codebook_move_through_the_step(tiny_dataset, source, program_of):
    config = tiny_config(tiny_dataset, **EMA)
    program = program_of(config, 1, str(EMA))
    before = flatten(jax.device_get(program.initial_state().variables))
    state, _ = run(program, config, source, 1)
    after = flatten(jax.device_get(state.variables))
    assert "quantizer/codebook" in before and sum(name.endswith("norm/mean") for name in before) > 5
    assert not [name for name in before if np.array_equal(before[name], after[name])]


def test_step_and_scores_are_functions_of_a_state(tiny_dataset, source, program_of):
    """Called alone, without the compiled program of a run, they give the same numbers."""
    config = tiny_config(tiny_dataset)
    program = program_of(config, 1, "{}")
    definition = define(config, get_task(config.task), 1, make_mesh(jax.devices()[:1]))
    batch = next(training_batches(source, config.batch_size, config.seed))
    state = jax.jit(functools.partial(initial_state, definition))()
    slices, _, pictures = jax.jit(functools.partial(score_batch, definition))(state, batch)
    assert slices["scores"]["loss"].shape == (8,) and pictures["prediction"].shape == (8, 16, 16, 1)
    state = jax.jit(functools.partial(train_step, definition))(state, batch)
    expected = run_step(program, program.initial_state(), [to_devices(definition.mesh, batch)])
    for name, value in flatten(jax.device_get(expected)).items():
        np.testing.assert_allclose(flatten(state)[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_microbatches_add_up_to_the_gradient_of_the_batch(
    tiny_dataset, source, program_of, monkeypatch
):
    """With batch normalisation in use this holds only approximately, so the loss here is a plain
    mean of pixels."""
    pixels = TASKS["masked_region"]

    def apply(model, batch, keys, key, config, *, train):
        output = pixels.apply(model, batch, keys, key, config, train=False)
        return output._replace(loss=jnp.square(output.loss))

    task = pixels._replace(apply=apply)
    gradients = []
    for microbatches in (1, 4):
        config = tiny_config(tiny_dataset, microbatches=microbatches)
        program = make_program(config, task, 1, make_mesh(jax.devices()[:1]))
        state, total = program.initial_state(), program.zero_gradients()
        batches = training_batches(source, 8, 0, microbatches=microbatches)
        for _ in range(microbatches):
            part = to_devices(program.definition.mesh, next(batches))
            state, total = program.accumulate(state, total, part)
        assert float(state.sums["weight"]) == 8
        gradients.append(flatten(jax.device_get(total)))
    for name in gradients[0]:
        np.testing.assert_allclose(
            gradients[1][name], gradients[0][name], rtol=1e-3, atol=1e-6, err_msg=name
        )
    assert np.abs(gradients[0]["encoder/stem/conv/kernel"]).max() > 0


def test_scores_do_not_depend_on_the_batch_and_padding_counts_nothing(tiny_dataset, program_of):
    config = tiny_config(tiny_dataset)
    source = data.open_source(Dataset.open(tiny_dataset), "validation", (0,), (0,))
    scores, counts = {}, {}
    for num_devices, batch_size in ((1, 8), (1, 7), (1, 24), (8, 16)):
        program = program_of(config, num_devices, "{}")
        result = evaluate_split(
            program.scorer,
            program.initial_state(),
            evaluation_batches(source, batch_size, num_threads=1),
        )
        np.testing.assert_array_equal(result.record_index, np.arange(24))
        scores[batch_size], counts[batch_size] = result.scores, result.code_counts
    for batch_size in (7, 16, 24):
        np.testing.assert_array_equal(counts[batch_size], counts[8])
        for name, values in scores[8].items():
            np.testing.assert_allclose(scores[batch_size][name], values, atol=1e-6, err_msg=name)
    assert counts[8].sum() == 24 * 4 * 4


def test_corruption_depends_on_key_and_record_only(tiny_dataset, program_of, source):
    config = tiny_config(tiny_dataset)
    program = program_of(config, 1, "{}")
    state = program.initial_state()
    batch = next(iter(evaluation_batches(source, 8)))
    forwards = render_pictures(program.scorer, state, batch, 8)
    backwards = render_pictures(
        program.scorer, state, {name: value[::-1] for name, value in batch.items()}, 8
    )
    np.testing.assert_array_equal(forwards["input"], backwards["input"][::-1])
    assert len({image.tobytes() for image in (forwards["input"] == forwards["target"])}) > 1
    records = jnp.arange(4)
    keys = [
        jax.random.key_data(keys)
        for keys in (
            evaluation_keys(records),
            example_keys(jax.random.key(1), records),
            example_keys(jax.random.key(0), records, 0),
            example_keys(jax.random.key(0), records, 1),
        )
    ]
    assert len({np.asarray(key).tobytes() for key in keys}) == 4


def test_learning_rate_schedules(tiny_dataset):
    config = tiny_config(tiny_dataset, learning_rate=1.0, warmup_steps=4, num_steps=12)
    constant = learning_rate_schedule(config)
    np.testing.assert_allclose([constant(step) for step in (0, 2, 4, 11)], [0, 0.5, 1, 1])
    config.schedule = "cosine"
    cosine = learning_rate_schedule(config)
    np.testing.assert_allclose(
        [cosine(step) for step in (0, 2, 4, 8, 12)], [0, 0.5, 1, 0.5, 0], atol=1e-6
    )
    config.learning_rate_floor = 0.1
    for config.schedule in ("cosine", "linear"):
        lowered = learning_rate_schedule(config)
        np.testing.assert_allclose([lowered(step) for step in (4, 8, 12)], [1, 0.55, 0.1])
    config.warmup_steps = 0
    assert learning_rate_schedule(config)(0) == 1


def test_gradient_clipping_bounds_the_update(tiny_dataset):
    config = tiny_config(tiny_dataset, optimizer="adamw", gradient_clip=1e-3)
    optimizer = make_optimizer(config, encoder=())
    params = {"a": jnp.zeros(3)}
    state = optimizer.init(params)
    _, state = optimizer.update({"a": jnp.full(3, 1e6)}, state, params)
    momentum = next(leaf for leaf in jax.tree.leaves(state) if getattr(leaf, "shape", None) == (3,))
    assert float(jnp.linalg.norm(momentum)) == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_sums_of_another_version_begin_at_zero(tmp_path):
    """A run made before has no `annotated_slices`, and summed Dice over all slices."""
    sums = {"dice": jnp.float32(3), "weight": jnp.float32(8)}
    step, params = jnp.int32(5), {"kernel": jnp.ones(2)}
    state = TrainState(step, params, {}, {}, sums, jnp.int32(-1))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, state, {})
    checkpoints.close()
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    assert resume(tmp_path, 5, template).sums["dice"] == 3
    template.sums["annotated_slices"] = template.sums["weight"]
    resumed = resume(tmp_path, 5, template)
    assert resumed.step == 5 and resumed.params["kernel"].tolist() == [1, 1]
    assert resumed.sums == {"dice": 0, "weight": 0, "annotated_slices": 0}


@pytest.mark.parametrize("part", ["loss", "gradient", "parameters"])
def test_the_first_step_that_is_not_finite_is_kept(
    part, tiny_dataset, source, program_of, tmp_path
):
    config = tiny_config(tiny_dataset)
    program = program_of(config, 1, "{}")
    state, _ = run(program, config, source, 2)
    check_state(config, state, tmp_path, 0)
    zeros = program.zero_gradients()
    bad = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), zeros)
    if part == "loss":
        state = state.replace(sums=state.sums | {"loss": jnp.asarray(jnp.inf)})
    if part == "parameters":
        state = dataclasses.replace(
            state, params=jax.tree.map(lambda leaf: leaf * 1e38 * 1e38, state.params)
        )
    state = program.apply_gradients(state, bad if part == "gradient" else zeros)
    state = program.apply_gradients(state, program.zero_gradients())
    with pytest.raises(
        TrainingDiverged,
        match=r"not finite at step 3 of .*; there is no checkpoint; .* or set config.gradient_clip",
    ):
        check_state(config, state, tmp_path, None)
    clipped = tiny_config(tiny_dataset, gradient_clip=1.0)
    with pytest.raises(TrainingDiverged, match=r"learning_rate or lower config\.gradient_clip"):
        check_state(clipped, state, tmp_path, None)
