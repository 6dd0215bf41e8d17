"""SSIM against scikit-image, and the range of images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctssl_jax.ops.images import ssim, to_unit_range


def image_pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    noise = rng.random((3, 40, 56, 1))
    smooth = 0.5 + 0.5 * np.sin(
        np.arange(40)[:, None, None] / 7
        + np.arange(56)[:, None] / 11
        + np.arange(3)[:, None, None, None]
    )
    return {
        "noise": (noise, rng.random(noise.shape)),
        "slightly different": (
            smooth,
            np.clip(smooth + 0.02 * rng.standard_normal(smooth.shape), 0, 1),
        ),
        "flat and bright": (1 - 0.01 * noise, 1 - 0.01 * rng.random(noise.shape)),
        "constant": (np.zeros((1, 16, 16, 1)), np.full((1, 16, 16, 1), 0.1)),
        "three channels": (rng.random((2, 32, 32, 3)), rng.random((2, 32, 32, 3))),
        "smallest": (rng.random((2, 11, 11, 1)), rng.random((2, 11, 11, 1))),
    }


@pytest.mark.parametrize("name", image_pairs())
def test_ssim_agrees_with_scikit_image(name):
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    first, second = (images.astype(np.float32) for images in image_pairs()[name])
    expected = [
        structural_similarity(
            x.astype(np.float64),
            y.astype(np.float64),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=-1,
        )
        for x, y in zip(first, second, strict=True)
    ]
    np.testing.assert_allclose(jax.jit(ssim)(first, second), expected, atol=1e-5)


def test_ssim_of_equal_images_is_one_and_its_gradient_is_finite():
    x = jax.random.uniform(jax.random.key(0), (2, 16, 16, 1))
    np.testing.assert_allclose(jax.jit(ssim)(x, x), 1, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: ssim(x, jnp.zeros_like(x)).sum()))(x)
    assert np.all(np.isfinite(gradient)) and np.any(gradient != 0)


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match="at least 11"):
        ssim(jnp.zeros((1, 10, 16, 1)), jnp.zeros((1, 10, 16, 1)))


def test_ssim_adds_no_large_constants_to_the_program():
    shape = jax.ShapeDtypeStruct((1, 512, 512, 1), jnp.float32)
    assert len(jax.jit(ssim).lower(shape, shape).as_text()) < 50_000


def test_unit_range_clips_or_rescales():
    images = jnp.array([[-1.0, 0.0], [1.0, 3.0]]).reshape(1, 2, 2, 1)
    np.testing.assert_allclose(to_unit_range(images).ravel(), [0, 0, 1, 1])
    np.testing.assert_allclose(to_unit_range(images, rescale=True).ravel(), [0, 0.25, 0.5, 1])
    assert np.all(to_unit_range(jnp.full((1, 4, 4, 1), 7.0), rescale=True) == 0)
