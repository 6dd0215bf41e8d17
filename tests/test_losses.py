"""Loss terms, one value an example."""

import jax
import jax.numpy as jnp
import numpy as np

from ctssl_jax import losses


def test_mse_averages_each_example_by_itself():
    prediction = jnp.stack([jnp.zeros((4, 4, 2)), jnp.full((4, 4, 2), 0.5)])
    np.testing.assert_allclose(losses.mse(prediction, jnp.zeros_like(prediction)), [0, 0.25])


def test_masked_mse_counts_masked_pixels_only():
    rng = np.random.default_rng(0)
    prediction, target = rng.random((2, 3, 8, 8, 3), np.float32)
    mask = np.zeros((3, 8, 8, 1), np.float32)
    mask[0, 2:5, 1:4] = 1
    mask[1] = 1
    expected = [np.mean((prediction[0] - target[0])[2:5, 1:4] ** 2), np.mean((prediction[1] - target[1]) ** 2), 0]
    np.testing.assert_allclose(losses.masked_mse(prediction, target, mask), expected, rtol=1e-5)
    gradient = jax.grad(lambda p: losses.masked_mse(p, target, mask).sum())(prediction)
    assert np.all(np.isfinite(gradient)) and np.all((gradient != 0) == (mask != 0))


def test_losses_are_float32_for_bfloat16_predictions():
    prediction = jnp.full((1, 4, 4, 1), 0.1, jnp.bfloat16)
    assert losses.mse(prediction, jnp.zeros((1, 4, 4, 1))).dtype == jnp.float32


def test_vector_quantization_loss_weights_the_commitment():
    total = losses.vector_quantization_loss(jnp.array([1.0, 0.0]), jnp.array([2.0, 4.0]), beta=0.25)
    np.testing.assert_allclose(total, [1.5, 1.0])
