"""Grey values in [0, 1] and the structural similarity of images: pure functions, usable in jit."""

import math

import jax
import jax.numpy as jnp

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1 = 0.01
SSIM_K2 = 0.03
BLOCK_EPSILON = 1e-6  # added to the variance of a block, as in MAE


def _gaussian_band(size: int) -> jax.Array:
    """[size - 10, size] float32: row i averages positions i to i + 10 with Gaussian weights (sum
    1).

    Computed from iotas while the program runs: as a constant it would add megabytes to the compiled
    program.
    """
    radius = SSIM_WINDOW // 2
    total = sum(
        math.exp(-0.5 * (offset / SSIM_SIGMA) ** 2) for offset in range(-radius, radius + 1)
    )
    shape = (size - 2 * radius, size)
    offset = (
        jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        - jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        - radius
    )
    weights = jnp.exp(-0.5 * jnp.square(offset.astype(jnp.float32) / SSIM_SIGMA)) / total
    return jnp.where(jnp.abs(offset) <= radius, weights, 0.0)


def ssim(x: jax.Array, y: jax.Array) -> jax.Array:
    """Structural similarity of two batches of images whose values lie in [0, 1] (Wang et al. 2004).

    Gaussian window 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, data range 1, population
    covariance, averaged over the pixels whose whole window lies inside the image and over the
    channels. Agrees to 1e-5 with `structural_similarity` of scikit-image (gaussian_weights=True,
    sigma=1.5, use_sample_covariance=False, data_range=1).
    The window is separable and linear, so it is applied as two banded matrix products, which are
    faster than convolutions.

    Args:
        x, y: [B, H, W, C]; computed in float32.

    Returns:
        [B] float32 in [-1, 1].

    Raises:
        ValueError: an image side is shorter than the window.
    """
    _, height, width, _ = x.shape
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs images of at least {SSIM_WINDOW} pixels a side, got {height} x {width}"
        )
    # Variances do not change when both images are shifted; values around 0 lose fewer digits.
    x = x.astype(jnp.float32).transpose(0, 3, 1, 2) - 0.5
    y = y.astype(jnp.float32).transpose(0, 3, 1, 2) - 0.5
    rows, columns = _gaussian_band(height), _gaussian_band(width)

    moments = jnp.stack([x, y, x * x, y * y, x * y])
    moments = jnp.einsum("mbchw,vw->mbchv", moments, columns, precision="highest")
    moments = jnp.einsum("mbchv,uh->mbcuv", moments, rows, precision="highest")
    mean_x, mean_y = moments[0], moments[1]
    variance_x = moments[2] - mean_x * mean_x
    variance_y = moments[3] - mean_y * mean_y
    covariance = moments[4] - mean_x * mean_y

    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def to_unit_range(images: jax.Array, *, rescale: bool = False) -> jax.Array:
    """Bring predictions into [0, 1] before they are compared: [B, H, W, C] -> [B, H, W, C] float32.

    Args:
        rescale: False clips; True stretches each image from its minimum to its maximum, as the
            authors' release does before SSIM (a constant image becomes 0).
    """
    images = images.astype(jnp.float32)
    if not rescale:
        return jnp.clip(images, 0.0, 1.0)
    low = jnp.min(images, axis=(1, 2, 3), keepdims=True)
    high = jnp.max(images, axis=(1, 2, 3), keepdims=True)
    return (images - low) / jnp.maximum(high - low, 1e-8)


def to_unit_images(images: jax.Array, channels: int, normalize: str) -> jax.Array:
    """Grey values to the model's input range.

    Args:
      images: [B, H, W, C] uint8, windowed: 0 is the lower end of the window, 255 the upper.
      channels: channels of the model; a single grey channel is copied to all of them.
      normalize: `window` keeps the affine map from HU, the same for every slice; `slice_minmax`
        stretches each slice from its own minimum to its own maximum (the authors' release).

    Returns:
      [B, H, W, channels] float32 in [0, 1].
    """
    unit = images.astype(jnp.float32) / 255
    if normalize == "slice_minmax":
        unit = to_unit_range(unit, rescale=True)
    return jnp.broadcast_to(unit, (*unit.shape[:-1], channels)) if unit.shape[-1] == 1 else unit


def normalize_blocks(images: jax.Array, side: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Images whose blocks have mean 0 and variance 1, over all channels (MAE, arXiv 2111.06377,
    section 4.1); in a block of one grey value all is 0.

    Args:
        images: [B, H, W, C] float32.
        side: of a block in pixels; it divides H and W.

    Returns:
        The images, and the mean and standard deviation of the block of each pixel, [B, H, W, 1].
    """
    number, height, width, channels = images.shape
    rows, columns = height // side, width // side
    blocks = images.reshape(number, rows, side, columns, side, channels)
    mean = jnp.mean(blocks, axis=(2, 4, 5))
    centred = blocks - mean[:, :, None, :, None, None]
    deviation = jnp.sqrt(jnp.mean(jnp.square(centred), axis=(2, 4, 5)) + BLOCK_EPSILON)

    def of_pixels(values: jax.Array) -> jax.Array:
        return jnp.repeat(jnp.repeat(values, side, axis=1), side, axis=2)[..., None]

    mean, deviation = of_pixels(mean), of_pixels(deviation)
    return (images - mean) / deviation, mean, deviation
