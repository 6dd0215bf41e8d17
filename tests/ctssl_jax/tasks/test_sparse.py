"""Sparse masked modelling: what masked pixels may change, the dense encoder, targets, exact
resumption, eight devices, evaluation, embedding, export, wrong recipes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ctssl_jax.evaluation.measure import evaluate
from ctssl_jax.inference.pretrained import load
from ctssl_jax.models.vqvae import Encoder, VQVAEConfig
from ctssl_jax.ops.images import normalize_blocks
from ctssl_jax.ops.trees import flatten
from ctssl_jax.runs import reports
from ctssl_jax.training import health
from data_prep.dataset.reader import Dataset
from data_prep.system.errors import InputError
from tests.helpers.training_runs import (
    ask_to_stop_at,
    assert_same_state,
    losses,
    numbers,
    randomised,
    step_on_one_and_eight_devices,
    tiny_recipe,
    train_on,
)

SIZES = VQVAEConfig(hidden=(4, 8), depth=2, embedding_dim=4)


def learning(dataset, /, **overrides):
    short = {"num_steps": 12, "log_every": 3, "eval_every": 12, "mask.block": 8, "warmup_steps": 0}
    return tiny_recipe(dataset, "spark", **(short | {"model.decoder_depth": 1} | overrides))


def visible_blocks():
    """[2, 32, 32, 1]: blocks of eight pixels, other ones in each image."""
    blocks = np.random.default_rng(0).integers(0, 2, (2, 4, 4)).astype(np.float32)
    return np.repeat(np.repeat(blocks, 8, axis=1), 8, axis=2)[..., None]


@pytest.fixture(scope="module")
def encoded():
    """(images, visible or None, train) -> latents and batch statistics; a scan gives the same."""

    def encode(images, visible, train, scan=False):
        encoder = Encoder(SIZES, rngs=nnx.Rngs(params=0))
        randomised(encoder)
        encoder.scan = scan

        graph, state = nnx.split(encoder)

        @jax.jit
        def apply(state, images, visible):
            model = nnx.merge(graph, state)
            latents = model(images, train=train, visible=visible)
            return latents, flatten(nnx.as_pure(nnx.state(model, nnx.BatchStat)))

        return jax.device_get(apply(state, images, visible))

    return encode


@pytest.mark.parametrize("train", [True, False])
def test_nothing_of_masked_pixels_reaches_the_encoder(train, encoded):
    visible = visible_blocks()
    images = np.random.default_rng(1).uniform(size=(2, 32, 32, 1)).astype(np.float32)
    other = np.where(visible > 0, images, 1 - images)
    latents, statistics = encoded(images, visible, train)
    others, of_others = encoded(other, visible, train)
    np.testing.assert_array_equal(latents, others)
    for name, value in statistics.items():
        np.testing.assert_array_equal(of_others[name], value)
    seen = visible[:, ::4, ::4, 0] > 0
    assert (latents[~seen] == 0).all() and (np.abs(latents[seen]).max(axis=-1) > 0).all()
    changed = np.where(visible > 0, 1 - images, images)  # the visible ones do
    assert np.abs(encoded(changed, visible, train)[0] - latents).max() > 1e-4


@pytest.mark.parametrize("train", [True, False])
def test_with_nothing_masked_it_is_the_dense_encoder(train, encoded):
    images = np.random.default_rng(1).uniform(size=(2, 32, 32, 1)).astype(np.float32)
    dense, of_dense = encoded(images, None, train)
    sparse, of_sparse = encoded(images, np.ones_like(images), train)
    np.testing.assert_allclose(sparse, dense, atol=2e-5)
    for name, value in of_dense.items():
        np.testing.assert_allclose(of_sparse[name], value, atol=1e-5)


def test_statistics_are_those_of_visible_positions(encoded):
    """A hidden image counts as one that is not in the batch; blocks in a loop give the same."""
    images = np.random.default_rng(1).uniform(size=(2, 32, 32, 1)).astype(np.float32)
    visible = np.ones_like(images)
    visible[1] = 0
    both, of_both = encoded(images, visible, True)
    alone, of_one = encoded(images[:1], None, True)
    np.testing.assert_allclose(both[:1], alone, atol=2e-5)
    for name, value in of_one.items():
        np.testing.assert_allclose(of_both[name], value, atol=1e-5)
    np.testing.assert_allclose(encoded(images, visible, True, scan=True)[0], both, atol=2e-5)


def test_targets_have_no_mean_and_unit_variance_in_each_block():
    images = np.random.default_rng(0).uniform(size=(2, 16, 16, 3)).astype(np.float32)
    images[0, :8, :8] = 0.25
    target, mean, deviation = jax.device_get(normalize_blocks(jnp.asarray(images), 8))
    blocks = target.reshape(2, 2, 8, 2, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(8, -1)
    np.testing.assert_allclose(blocks.mean(axis=1), 0, atol=1e-4)
    np.testing.assert_allclose(blocks.std(axis=1), [0, *[1] * 7], atol=1e-3)
    np.testing.assert_allclose(target * deviation + mean, images, atol=1e-5)
    assert mean.shape == deviation.shape == (2, 16, 16, 1)


@pytest.fixture(scope="module")
def straight(tiny_dataset, tmp_path_factory):
    """A run without interruption."""
    workdir = tmp_path_factory.mktemp("spark") / "run"
    assert train_on(learning(tiny_dataset), workdir)
    return workdir


def test_interrupted_run_equals_straight_run(straight, tiny_dataset, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        ask_to_stop_at(patch, 4)  # between reports
        assert not train_on(learning(tiny_dataset), tmp_path / "run")
    assert train_on(learning(tiny_dataset), tmp_path / "run")
    assert_same_state(tmp_path / "run", straight)
    assert numbers(tmp_path / "run") == numbers(straight)


def test_a_small_run_learns_and_is_healthy(straight, tiny_dataset):
    reported = losses(straight)
    assert reported[-1] < reported[0]
    (*_, last) = reports.read_reports(straight, "validation")
    assert health.warnings(learning(tiny_dataset), last | {"embedding_dim": 4}) == []


def test_a_collapse_is_said(tiny_dataset, tmp_path, capsys):
    """Weights that decay faster than they learn leave one feature for all slices."""
    config = learning(
        tiny_dataset, weight_decay=30.0, learning_rate=0.03, num_steps=20, eval_every=20
    )
    assert train_on(config, tmp_path / "run")
    assert "the encoder has collapsed" in capsys.readouterr().out


def test_a_step_on_eight_devices_is_that_of_one(straight, tiny_dataset):
    images = np.random.default_rng(0).integers(0, 255, (8, 1, 16, 16, 1), np.uint8)
    weight, records = np.ones(8, np.float32), np.arange(8, dtype=np.int32)
    batch = {"images": images, "record_index": records, "weight": weight}
    results = step_on_one_and_eight_devices(learning(tiny_dataset), batch)
    (one, variables), (eight, others) = results
    assert float(eight["loss"]) == pytest.approx(float(one["loss"]), rel=1e-4)
    for name, norm in one["layer_gradient_norms"].items():
        assert float(eight["layer_gradient_norms"][name]) == pytest.approx(norm, rel=2e-3), name
    for name, value in variables.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_evaluation_and_embedding_of_whole_slices(straight, tiny_dataset, tmp_path):
    result = evaluate(
        straight, tiny_dataset, "test", tmp_path / "r.json", batch_size=8, baselines=True
    )
    assert list(result["metrics"]) == ["block_mse"]
    # a block of a phantom's air has no variance, so that its mean is no error
    assert 0.5 < result["baselines"]["block_mean"]["block_mse"]["mean"] <= 1.001
    images = np.stack([r["image"] for r in Dataset.open(tiny_dataset).source("test")])[:4]
    model = load(straight)
    here = model.embed(images).slices
    np.testing.assert_allclose(here, model.latents(images).mean((1, 2)), atol=1e-5)
    torch = pytest.importorskip("torch")
    from ctssl_jax.release.exporting import export
    from ctssl_jax.torch_bridge import ctssl_torch

    manifest = export(straight, tmp_path / "model", ("torch",), "CC0-1.0")
    assert manifest["architecture"] == "JointEmbedding"
    given = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    np.testing.assert_allclose(ctssl_torch.load(tmp_path / "model").embed(given), here, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "mask.block",
            0,
            "config.mask.block=0: blocks of this task must be a multiple of the enco",
        ),
        (
            "mask.block",
            6,
            "config.mask.block=6: blocks of this task must be a multiple of the enco",
        ),
        ("mask.block", 12, "config.mask.block=12: blocks of 12 pixels do not tile an image of 16"),
        ("model.decoder_depth", -1, "config.model.decoder_depth=-1: must be 0 or more"),
        ("model.pooled", "mean", "config.model.pooled='mean': choose one of latents"),
        (
            "best_by",
            "masked_mse",
            "config.best_by='masked_mse': a validation of the task spark has",
        ),
    ],
)
def test_what_cannot_work_is_one_line(field, value, message, tiny_dataset, tmp_path):
    config = learning(tiny_dataset)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError) as raised:
        train_on(config, tmp_path / "run")
    assert message in str(raised.value) and "\n" not in str(raised.value)
