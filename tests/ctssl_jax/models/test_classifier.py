"""The classifier: shapes, sizes, the autoencoder's encoder by name, operations counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ctssl_jax.models.classifier import Classifier, ClassifierConfig, flops_per_slice
from ctssl_jax.models.vqvae import VQVAE, VQVAEConfig
from ctssl_jax.ops.trees import flatten

TINY = dict(hidden=(4, 8), depth=1, embedding_dim=4)


def abstract_parameters(make):
    params = nnx.as_pure(nnx.state(nnx.eval_shape(make), nnx.Param))
    return {name: leaf.shape for name, leaf in flatten(params).items()}


@pytest.mark.parametrize("num_classes", [3, 4])
@pytest.mark.parametrize("size", [16, 20])
def test_one_logit_a_class(num_classes, size):
    model = Classifier(ClassifierConfig(num_classes, **TINY), rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    apply = jax.jit(lambda images: nnx.merge(graph, state)(images, train=False))
    images = jax.random.uniform(jax.random.key(0), (5, size, size, 1))
    logits, latents = apply(images)
    assert logits.shape == (5, num_classes) and logits.dtype == jnp.float32
    assert (
        latents.shape == (5, size // 4, size // 4, model.config.embedding_dim)
        and latents.dtype == jnp.float32
    )
    # examples do not mix in evaluation
    np.testing.assert_allclose(apply(images[3:4]).logits, logits[3:4], atol=1e-5)


def test_reference_size():
    shapes = abstract_parameters(
        lambda: Classifier(ClassifierConfig(4, in_channels=3), rngs=nnx.Rngs(0))
    )
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    assert sum(size for name, size in sizes.items() if name.startswith("encoder/")) == 51_709_888
    assert shapes["compression/0/conv/kernel"] == (3, 3, 64, 128)
    assert shapes["compression/1/conv/kernel"] == (3, 3, 128, 256)
    assert shapes["classification/kernel"] == (256, 4)
    assert (
        sum(sizes.values())
        == 51_709_888 + (9 * 64 + 1 + 2) * 128 + (9 * 128 + 1 + 2) * 256 + 256 * 4 + 4
    )


def test_encoder_has_the_names_and_shapes_of_the_autoencoders():
    of_classifier = abstract_parameters(
        lambda: Classifier(ClassifierConfig(4, **TINY), rngs=nnx.Rngs(0))
    )
    of_autoencoder = abstract_parameters(
        lambda: VQVAE(VQVAEConfig(num_codes=8, **TINY), rngs=nnx.Rngs(0))
    )
    shared = {name: shape for name, shape in of_autoencoder.items() if name.startswith("encoder/")}
    assert shared and shared == {
        name: shape for name, shape in of_classifier.items() if name.startswith("encoder/")
    }


def test_training_updates_statistics_and_gradients_reach_every_parameter():
    model = Classifier(ClassifierConfig(4, **TINY, drop_rate=0.2), rngs=nnx.Rngs(0))
    graph, params, variables = nnx.split(model, nnx.Param, ...)
    images = jax.random.uniform(jax.random.key(0), (6, 16, 16, 1))

    @jax.jit
    def gradient(params, variables):
        def loss(params):
            model = nnx.merge(graph, params, variables, copy=True)
            value = jnp.sum(jnp.square(model(images, train=True, key=jax.random.key(1)).logits))
            return value, nnx.split(model, nnx.Param, ...)[2]

        return jax.grad(loss, has_aux=True)(params)

    gradients, moved = gradient(nnx.as_pure(params), nnx.as_pure(variables))
    for name, value in flatten(gradients).items():
        # batch normalisation removes these biases
        assert name.endswith("conv/bias") or np.any(value != 0), name
    before, after = flatten(nnx.as_pure(variables)), flatten(nnx.as_pure(moved))
    assert "compression/1/norm/mean" in before
    assert not [name for name in before if np.array_equal(before[name], after[name])]


def test_operations_are_those_that_xla_counts():
    config = ClassifierConfig(4, hidden=(16, 32), depth=2, embedding_dim=16)
    graph, state = nnx.split(Classifier(config, rngs=nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct((1, 256, 256, 1), jnp.float32)
    lowered = jax.jit(lambda state, images: nnx.merge(graph, state)(images, train=False)).lower(
        state, images
    )
    # XLA leaves out products with padding and adds normalisation and activations.
    assert flops_per_slice(config, 256) == pytest.approx(lowered.cost_analysis()["flops"], rel=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"compression": ()}, "compression must be one or more positive widths"),
        ({"depth": -1}, "depth must not be negative"),
        ({"dtype": "float16"}, "dtype must be one of"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ClassifierConfig(**{"num_classes": 4, **settings})
