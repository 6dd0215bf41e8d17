"""Loss terms, one value an example."""

import jax
import jax.numpy as jnp
import numpy as np

from ctssl_jax.ops import losses


def test_mse_averages_each_example_by_itself():
    prediction = jnp.stack([jnp.zeros((4, 4, 2)), jnp.full((4, 4, 2), 0.5)])
    np.testing.assert_allclose(losses.mse(prediction, jnp.zeros_like(prediction)), [0, 0.25])


def test_masked_mse_counts_masked_pixels_only():
    rng = np.random.default_rng(0)
    prediction, target = rng.random((2, 3, 8, 8, 3), np.float32)
    mask = np.zeros((3, 8, 8, 1), np.float32)
    mask[0, 2:5, 1:4] = 1
    mask[1] = 1
    expected = [
        np.mean((prediction[0] - target[0])[2:5, 1:4] ** 2),
        np.mean((prediction[1] - target[1]) ** 2),
        0,
    ]
    np.testing.assert_allclose(losses.masked_mse(prediction, target, mask), expected, rtol=1e-5)
    gradient = jax.grad(lambda p: losses.masked_mse(p, target, mask).sum())(prediction)
    assert np.all(np.isfinite(gradient)) and np.all((gradient != 0) == (mask != 0))


def test_losses_are_float32_for_bfloat16_predictions():
    prediction = jnp.full((1, 4, 4, 1), 0.1, jnp.bfloat16)
    assert losses.mse(prediction, jnp.zeros((1, 4, 4, 1))).dtype == jnp.float32


def test_vector_quantization_loss_weights_the_commitment():
    total = losses.vector_quantization_loss(jnp.array([1.0, 0.0]), jnp.array([2.0, 4.0]), beta=0.25)
    np.testing.assert_allclose(total, [1.5, 1.0])


def test_cross_entropy_is_the_negative_log_probability_of_the_label():
    logits, labels = np.array([[1.0, 2.0, -1.0], [0.0, 0.0, 500.0]], np.float32), np.array([0, 1])
    probability = np.exp(1) / (np.exp(1) + np.exp(2) + np.exp(-1))
    np.testing.assert_allclose(
        losses.cross_entropy(logits, labels), [-np.log(probability), 500], rtol=1e-6
    )
    gradient = jax.grad(lambda values: losses.cross_entropy(values, labels).sum())(logits)
    np.testing.assert_allclose(gradient[1], [0, -1, 1], atol=1e-6)


def test_double_softmax_has_the_floor_of_the_papers_table():
    for num_classes, floor in ((4, 0.7437), (3, 0.5514)):
        certain = 1000 * jnp.eye(num_classes)
        values = losses.double_softmax_cross_entropy(certain, jnp.arange(num_classes))
        np.testing.assert_allclose(values, np.log(np.e + num_classes - 1) - 1, rtol=1e-5)
        np.testing.assert_allclose(values, floor, atol=5e-5)


def test_masked_l1_counts_masked_pixels_alone():
    prediction, target = (
        jnp.zeros((1, 2, 2, 1)),
        jnp.array([1.0, -3.0, 5.0, 7.0]).reshape(1, 2, 2, 1),
    )
    mask = jnp.array([1.0, 1.0, 0.0, 0.0]).reshape(1, 2, 2, 1)
    assert float(losses.masked_l1(prediction, target, mask)[0]) == 2
    assert float(losses.masked_l1(prediction, target, 0 * mask)[0]) == 0
