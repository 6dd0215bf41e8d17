"""Residual blocks run as one loop (scan) give what the unrolled ones give, under the same names."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ctssl_jax.models.classifier import Classifier, ClassifierConfig
from ctssl_jax.models.vqvae import VQVAE, VQVAEConfig

TINY = {"hidden": (4, 8), "depth": 2, "embedding_dim": 4, "num_codes": 8}
IMAGES = jax.random.uniform(jax.random.key(0), (4, 16, 16, 1))


@functools.partial(jax.jit, static_argnums=0)
def training_step(graph, params, variables):
    """Output, new variables and gradients of one training pass with dropout, if the model has
    any."""

    def loss_of(params):
        model = nnx.merge(graph, params, variables, copy=True)
        output = model(IMAGES, train=True, key=jax.random.key(1))
        prediction = jax.tree.leaves(output)[0]  # the reconstruction or the logits
        return jnp.mean(jnp.square(prediction)), (output, nnx.state(model, nnx.Not(nnx.Param)))

    gradients, (output, variables) = jax.grad(loss_of, has_aux=True)(params)
    return output, variables, gradients


@functools.partial(jax.jit, static_argnums=0)
def evaluated(graph, params, variables):
    return nnx.merge(graph, params, variables)(IMAGES, train=False)


def build(kind: str, **settings):
    """Graph, parameters and other variables of a tiny model with the same weights whatever the
    switches."""
    if kind == "autoencoder":
        model = VQVAE(VQVAEConfig(**{**TINY, **settings}), rngs=nnx.Rngs(0))
    else:
        sizes = {name: value for name, value in TINY.items() if name != "num_codes"}
        model = Classifier(ClassifierConfig(4, **{**sizes, **settings}), rngs=nnx.Rngs(0))
    return nnx.split(model, nnx.Param, ...)


def assert_close(first, second, tolerance: float) -> None:
    """Equal structure, names and, to a share of each array's largest value, numbers."""
    pairs = zip(jax.tree.leaves_with_path(first), jax.tree.leaves_with_path(second), strict=True)
    for (path, a), (other, b) in pairs:
        assert path == other and a.dtype == b.dtype
        scale = max(float(np.max(np.abs(a), initial=0)), 1e-6)
        np.testing.assert_allclose(
            np.asarray(b) / scale, np.asarray(a) / scale, atol=tolerance, err_msg=str(path)
        )


@pytest.mark.parametrize(
    ("kind", "remat"), [("autoencoder", False), ("autoencoder", True), ("classifier", False)]
)
def test_scan_trains_as_the_unrolled_blocks_do(kind, remat):
    output, variables, gradients = training_step(*build(kind, drop_rate=0.3, remat=remat))
    scanned = training_step(*build(kind, drop_rate=0.3, remat=remat, scan=True))
    assert_close(output, scanned[0], 1e-6)
    assert_close(variables, scanned[1], 1e-6)
    # The true gradient of a bias before a normalisation is 0: what is there is rounding.
    for tree in (gradients, scanned[2]):
        for path, leaf in nnx.to_flat_state(tree):
            if path[-2:] == ("conv", "bias"):
                leaf[...] = jnp.zeros_like(leaf[...])
    assert_close(gradients, scanned[2], 1e-5)


@pytest.mark.parametrize("depth", [0, 2])
def test_scan_evaluates_as_the_unrolled_blocks_do(depth):
    assert_close(
        evaluated(*build("autoencoder", depth=depth)),
        evaluated(*build("autoencoder", depth=depth, scan=True)),
        1e-6,
    )


def test_scan_changes_no_name_and_no_shape():
    plain, scanned = build("autoencoder"), build("autoencoder", scan=True)
    names = [
        [(path, leaf[...].shape) for state in states[1:] for path, leaf in nnx.to_flat_state(state)]
        for states in (plain, scanned)
    ]
    assert names[0] == names[1]
    assert ("encoder", "blocks", 1, "conv3", "kernel") in dict(names[1])


def test_scan_keeps_types_in_bfloat16():
    graph, *state = build("autoencoder", dtype="bfloat16")
    plain = jax.eval_shape(functools.partial(training_step, graph), *state)
    graph, *state = build("autoencoder", dtype="bfloat16", scan=True)
    assert jax.eval_shape(functools.partial(training_step, graph), *state) == plain


@pytest.mark.parametrize("scan", [False, True])
def test_recomputation_takes_no_statistics_again(scan):
    """On many devices it would wait for all of them again. Convolutions and norms are repeated."""
    counts = []
    for remat in (False, True):
        graph, *state = build("autoencoder", remat=remat, scan=scan)
        lowered = training_step.trace(graph, *state).lower(lowering_platforms=("tpu",))
        operations = re.findall(r"stablehlo\.(\w+)", lowered.as_text())
        counts.append([operations.count(name) for name in ("convolution", "rsqrt", "reduce")])
    (convolutions, norms, sums), again = counts
    blocks = 2 if scan else 4  # of encoder and decoder, two each
    assert again == [convolutions + blocks, norms + blocks, sums]
