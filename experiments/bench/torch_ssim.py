"""Structural similarity in PyTorch, equal to `ctssl_jax.ops.images`, for comparisons of speed."""

import math

import torch

from ctssl_jax.ops import images


def gaussian_band(size: int) -> torch.Tensor:
    """[size - 10, size] float32: row i averages positions i to i + 10 with Gaussian weights, as in
    `images.ssim`."""
    radius = images.SSIM_WINDOW // 2
    window = [
        math.exp(-0.5 * (offset / images.SSIM_SIGMA) ** 2) for offset in range(-radius, radius + 1)
    ]
    weights = torch.tensor(window, dtype=torch.float64) / sum(window)
    band = torch.zeros(size - 2 * radius, size)
    for row in range(len(band)):
        band[row, row : row + images.SSIM_WINDOW] = weights.float()
    return band


def ssim(x: torch.Tensor, y: torch.Tensor, band: torch.Tensor) -> torch.Tensor:
    """`images.ssim` of square images [B, C, S, S] float32 in [0, 1], with `gaussian_band(S)`: ->
    [B] float32."""
    x, y = x - 0.5, y - 0.5
    moments = band @ (torch.stack([x, y, x * x, y * y, x * y]) @ band.T)
    mean_x, mean_y = moments[0], moments[1]
    variances = moments[2] - mean_x * mean_x + moments[3] - mean_y * mean_y
    covariance = moments[4] - mean_x * mean_y
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    c1, c2 = images.SSIM_K1**2, images.SSIM_K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return (luminance * structure).mean((1, 2, 3))
