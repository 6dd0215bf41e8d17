"""The autoencoder of `ctssl_jax.models.vqvae` and the loss of its training written in PyTorch, with the entry names of
the authors' weights.

For comparisons of speed and of numbers. Needs PyTorch (`pip install '.[torch]'`).
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ctssl_jax import metrics
from ctssl_jax.models.vqvae import VQVAEConfig


class ResidualBlock(nn.Module):
    """x + conv1(ReLU(norm(conv3(x)))); the encoder's blocks hold a dropout after the first convolution."""

    def __init__(self, features: int, drop_rate: float | None):
        super().__init__()
        layers = [nn.Conv2d(features, features, 3, padding=1, bias=False)]
        if drop_rate is not None:
            layers.append(nn.Dropout(drop_rate))
        layers += [nn.BatchNorm2d(features), nn.ReLU(), nn.Conv2d(features, features, 1, bias=False)]
        self.resblock = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.resblock(x)


class VectorQuantizer(nn.Module):
    """Nearest code with a straight-through gradient; the codebook is trained by its loss."""

    def __init__(self, num_codes: int, embedding_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(num_codes, embedding_dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[B, D, h, w] -> quantized [B, D, h, w], codes [B, h, w], codebook and commitment loss (scalars)."""
        channels_last = latents.permute(0, 2, 3, 1).float()
        vectors = channels_last.reshape(-1, channels_last.shape[-1])
        weight = self.embedding.weight
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):  # float32, as in the JAX model
            codes = torch.argmin(weight.square().sum(1) - 2 * vectors @ weight.T, dim=1)
        selected = self.embedding(codes).view(channels_last.shape)
        codebook_loss = functional.mse_loss(selected, channels_last.detach())
        commitment_loss = functional.mse_loss(channels_last, selected.detach())
        quantized = (channels_last + (selected - channels_last).detach()).permute(0, 3, 1, 2)
        return quantized, codes.view(channels_last.shape[:-1]), codebook_loss, commitment_loss


def _conv_norm(conv: nn.Module) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels)]


class VQVAE(nn.Module):
    """Encoder, quantizer and decoder for images [B, C, H, W]; entries named as in the authors' weights."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        first, second = config.hidden
        channels, latent = config.in_channels, config.embedding_dim
        self.output_activation = config.output_activation
        self.encoder = nn.Sequential(
            nn.Sequential(*_conv_norm(nn.Conv2d(channels, first, 4, stride=2, padding=1)), nn.LeakyReLU()),
            nn.Sequential(*_conv_norm(nn.Conv2d(first, second, 4, stride=2, padding=1)), nn.LeakyReLU()),
            nn.Sequential(*_conv_norm(nn.Conv2d(second, second, 3, padding=1)), nn.LeakyReLU()),
            *[ResidualBlock(second, config.drop_rate) for _ in range(config.depth)],
            nn.LeakyReLU(),
            nn.Sequential(*_conv_norm(nn.Conv2d(second, latent, 1)), nn.LeakyReLU()),
        )
        self.vq_layer = VectorQuantizer(config.num_codes, latent)
        self.decoder = nn.Sequential(
            nn.Sequential(*_conv_norm(nn.Conv2d(latent, second, 3, padding=1)), nn.LeakyReLU()),
            *[ResidualBlock(second, None) for _ in range(config.depth)],
            nn.LeakyReLU(),
            nn.Sequential(*_conv_norm(nn.ConvTranspose2d(second, first, 4, stride=2, padding=1)), nn.LeakyReLU()),
            nn.Sequential(*_conv_norm(nn.ConvTranspose2d(first, channels, 4, stride=2, padding=1)), nn.Tanh()),
        )

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """-> reconstruction [B, C, H, W], codes [B, h, w], codebook loss, commitment loss (scalars)."""
        quantized, codes, codebook_loss, commitment_loss = self.vq_layer(self.encoder(images))
        reconstruction = self.decoder(quantized).float()
        if self.output_activation == "unit_tanh":
            reconstruction = (reconstruction + 1) / 2
        return reconstruction, codes, codebook_loss, commitment_loss


def gaussian_band(size: int) -> torch.Tensor:
    """[size - 10, size] float32: row i averages positions i to i + 10 with Gaussian weights, as in `metrics.ssim`."""
    radius = metrics.SSIM_WINDOW // 2
    window = [math.exp(-0.5 * (offset / metrics.SSIM_SIGMA) ** 2) for offset in range(-radius, radius + 1)]
    weights = torch.tensor(window, dtype=torch.float64) / sum(window)
    band = torch.zeros(size - 2 * radius, size)
    for row in range(len(band)):
        band[row, row : row + metrics.SSIM_WINDOW] = weights.float()
    return band


def ssim(x: torch.Tensor, y: torch.Tensor, band: torch.Tensor) -> torch.Tensor:
    """`metrics.ssim` of square images [B, C, S, S] float32 in [0, 1], with `gaussian_band(S)`: -> [B] float32."""
    x, y = x - 0.5, y - 0.5
    moments = band @ (torch.stack([x, y, x * x, y * y, x * y]) @ band.T)
    mean_x, mean_y = moments[0], moments[1]
    variances = moments[2] - mean_x * mean_x + moments[3] - mean_y * mean_y
    covariance = moments[4] - mean_x * mean_y
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    c1, c2 = metrics.SSIM_K1**2, metrics.SSIM_K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return (luminance * structure).mean((1, 2, 3))


def to_torch_entries(leaves: dict[tuple, np.ndarray], depth: int) -> dict[str, torch.Tensor]:
    """Weights of `ctssl_jax.models.vqvae.VQVAE` (path -> array) as entries of the PyTorch model's
    `state_dict`.

    Raises:
        KeyError: a path that the PyTorch model has no place for.
    """
    modules = {
        ("encoder", "stem"): "encoder.2",
        ("encoder", "project"): f"encoder.{4 + depth}",
        ("decoder", "stem"): "decoder.0",
    }
    for index in range(2):
        modules["encoder", "downsample", index] = f"encoder.{index}"
        modules["decoder", "upsample", index] = f"decoder.{2 + depth + index}"
    layers = {}
    for module, name in modules.items():
        layers[*module, "conv"], layers[*module, "norm"] = f"{name}.0", f"{name}.1"
    for index in range(depth):
        for n, kind in ((0, "conv3"), (2, "norm"), (4, "conv1")):
            layers["encoder", "blocks", index, kind] = f"encoder.{3 + index}.resblock.{n}"
        for n, kind in ((0, "conv3"), (1, "norm"), (3, "conv1")):
            layers["decoder", "blocks", index, kind] = f"decoder.{1 + index}.resblock.{n}"
    fields = {
        "kernel": "weight",
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
    }
    entries = {}
    for path, value in leaves.items():
        if path == ("quantizer", "codebook"):
            entries["vq_layer.embedding.weight"] = torch.tensor(value)
            continue
        if path[-1] == "kernel":
            transposed = path[1] == "upsample"
            value = value[::-1, ::-1].transpose(2, 3, 0, 1) if transposed else value.transpose(3, 2, 0, 1)
        entries[f"{layers[path[:-1]]}.{fields[path[-1]]}"] = torch.tensor(np.ascontiguousarray(value))
    return entries
