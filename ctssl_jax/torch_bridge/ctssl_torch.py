"""Chest CT encoders, autoencoders, classifiers and U-Nets in PyTorch: the code for a folder of
exported weights.

    import ctssl_torch

    model = ctssl_torch.load("FOLDER")               # a torch.nn.Module in evaluation mode
    hu, affine = ctssl_torch.read_dicom("SCAN")      # or nibabel: image.get_fdata(), image.affine
    images = model.preprocess(hu, affine)            # [S, C, H, W] float32 in [0, 1], feet to head
    z = model.embed(images)                          # [S, D]; z.mean(0) is the scan's embedding

Needs torch and numpy; `preprocess` needs Pillow, `read_dicom` pydicom, and weights as .safetensors
the package safetensors. `python ctssl_torch.py FOLDER` computes the outputs of the stored test
input again and prints how far they are from the stored outputs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import math
import re
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

FORMAT_VERSION = 1
LEAKY_SLOPE = 0.01
AIR_HU = -1000
_BELOW_ANY_TISSUE_HU = -1500
_TISSUE_HU = (-900, 4000)
_AXIAL_COSINE = math.cos(math.radians(35))  # gantries tilt by up to 30 degrees
_MANIFEST_BYTES = 16 << 20


# ---- Models: entries are named as in the authors' weights where these have them ------------------


def _check_sides(images: Tensor, stride: int) -> None:
    height, width = images.shape[-2:]
    if height % stride or width % stride:
        raise ValueError(f"image sides must be divisible by {stride}, got {height} x {width}")


def _conv_norm(
    in_features: int,
    out_features: int,
    size: int,
    *,
    stride: int = 1,
    activation: type[nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    layers = [
        nn.Conv2d(in_features, out_features, size, stride, (size - 1) // 2),
        nn.BatchNorm2d(out_features),
    ]
    return nn.Sequential(*layers, *([] if activation is None else [activation()]))


def _transposed_conv_norm(
    in_features: int, out_features: int, activation: nn.Module
) -> nn.Sequential:
    convolution = nn.ConvTranspose2d(in_features, out_features, 4, stride=2, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_features), activation)


class ResidualBlock(nn.Module):
    """x + conv1(ReLU(norm(conv3(x)))); in the encoder with a dropout after conv3."""

    def __init__(self, features: int, drop_rate: float | None):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(features, features, 3, padding=1, bias=False)]
        if drop_rate is not None:
            layers.append(nn.Dropout(drop_rate))
        layers += [
            nn.BatchNorm2d(features),
            nn.ReLU(),
            nn.Conv2d(features, features, 1, bias=False),
        ]
        self.resblock = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, F, H, W] -> the same shape."""
        return x + self.resblock(x)


class Encoder(nn.Sequential):
    """Images [B, C, H, W] in [0, 1], sides divisible by 4 -> latents [B, D, H / 4, W / 4].

    With `compression_only` it has only the three layers before the residual blocks.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        hidden: Sequence[int],
        depth: int,
        embedding_dim: int,
        drop_rate: float = 0.0,
        compression_only: bool = False,
    ):
        first, second = hidden
        layers: list[nn.Module] = [
            _conv_norm(in_channels, first, 4, stride=2, activation=nn.LeakyReLU),
            _conv_norm(first, second, 4, stride=2, activation=nn.LeakyReLU),
            _conv_norm(second, second, 3, activation=nn.LeakyReLU),
        ]
        if not compression_only:
            layers += [ResidualBlock(second, drop_rate) for _ in range(depth)]
            layers += [
                nn.LeakyReLU(),
                _conv_norm(second, embedding_dim, 1, activation=nn.LeakyReLU),
            ]
        super().__init__(*layers)
        self.widths = (first, second, embedding_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Raises ValueError if a side is not divisible by 4."""
        _check_sides(images, 4)
        return super().forward(images)

    def compress(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The first layer's features [B, F1, H / 2, W / 2], the third's [B, F2, H / 4, W / 4].

        Raises ValueError if a side is not divisible by 4.
        """
        _check_sides(images, 4)
        half = self[0](images)
        return half, self[2](self[1](half))

    def refine(self, compressed: Tensor) -> Tensor:
        """Residual blocks and projection: the last output of `compress` -> latents."""
        for layer in list(self)[3:]:
            compressed = layer(compressed)
        return compressed


class VectorQuantizer(nn.Module):
    """Nearest code with a straight-through gradient."""

    def __init__(self, num_codes: int, embedding_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(num_codes, embedding_dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)

    def distances(self, latents: Tensor) -> Tensor:
        """Squared distances to all codes, without the term that all share.

        [B, D, h, w] -> [B h w, K] float32.
        """
        vectors = latents.permute(0, 2, 3, 1).float()
        vectors = vectors.reshape(-1, vectors.shape[-1])
        weight = self.embedding.weight.float()
        return weight.square().sum(1) - 2 * vectors @ weight.T

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents [B, D, h, w] -> quantized [B, D, h, w], codes [B, h, w] int64, codebook loss and
        commitment loss (scalars).
        """
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            codes = torch.argmin(self.distances(latents), dim=1)
        latents = latents.float()
        codes = codes.view(latents.shape[0], *latents.shape[2:])
        selected = self.lookup(codes)
        codebook_loss = functional.mse_loss(selected, latents.detach())
        commitment_loss = functional.mse_loss(latents, selected.detach())
        # Exactly the selected codes, since the difference is 0, with the gradient of the latents.
        return (
            selected.detach() + (latents - latents.detach()),
            codes,
            codebook_loss,
            commitment_loss,
        )

    def lookup(self, codes: Tensor) -> Tensor:
        """[B, h, w] -> [B, D, h, w]."""
        return self.embedding(codes).permute(0, 3, 1, 2)


class ExportedModel(nn.Module):
    """Preprocessing and embeddings, which all models have.

    Attributes:
        manifest: contents of the folder's manifest.json; empty for a model that was not loaded.
    """

    offsets: tuple[int, ...] = (0,)  # slices of one input, relative to each other, as its channels
    stride: int = 4  # the sides of images are multiples of it

    def __init__(self):
        super().__init__()
        self.manifest: dict[str, Any] = {}

    def embedding(self, images: Tensor) -> Tensor:
        """One vector for each input: [B, C, H, W] in [0, 1] -> [B, D]."""
        raise NotImplementedError

    def preprocess(self, hu: np.ndarray, affine: np.ndarray) -> Tensor:
        """`preprocess` as this model was trained."""
        return preprocess(hu, affine, self.manifest["preprocessing"], len(self.offsets))

    def lung_box(self, hu: np.ndarray, affine: np.ndarray) -> tuple[int, int, int, int]:
        """`lung_box` in pixels of what `preprocess` returns, for `inputs` and `embed`."""
        return lung_box(hu, affine, self.manifest["preprocessing"]["image_size"])

    def inputs(self, images: Tensor, numbers: Tensor, box: Sequence[float] | None = None) -> Tensor:
        """What `forward` takes for some slices of a scan.

        A model of adjacent slices gets each slice with its neighbours as channels, stretched
        together if it was trained so. A model of cropped slices gets the box, enlarged.

        Args:
            images: [S, C, H, W] float32 in [0, 1], all slices that `preprocess` returns.
            numbers: [B] int64, numbers of the slices.
            box: (top, left, bottom, right) of the lungs in pixels of `images`, bottom and right
                behind the last row and column; one box for all slices of a scan. Only for a model
                that was trained on cropped slices, which needs it.

        Returns:
            [B, K C, H, W] float32 in [0, 1] for K adjacent slices.

        Raises:
            ValueError: the box is missing, lies outside of the slices, or the model takes none.
        """
        preprocessing = self.manifest.get("preprocessing", {})
        batch = neighbours(images, numbers, self.offsets)
        if len(self.offsets) > 1 and preprocessing.get("normalize") == "slice_minmax":
            batch = _stretched(batch)
        cropped = preprocessing.get("crop", "none") != "none"
        if cropped and box is None:
            raise ValueError(
                "this model was trained on slices cropped to the lungs; give "
                "box=(top, left, bottom, right), the bounding box of the scan's lungs in pixels of "
                "the preprocessed slices: lung_box(hu, affine) finds it"
            )
        if not cropped and box is not None:
            raise ValueError("this model was trained on whole slices; give no box")
        return batch if box is None else crop_to_box(batch, box)

    @torch.no_grad()
    def embed(
        self, images: Tensor, batch_size: int = 8, *, box: Sequence[float] | None = None
    ) -> Tensor:
        """Embeddings of a scan's slices.

        Args:
            images: [S, C, H, W] float32 in [0, 1], the adjacent slices that `preprocess` returns.
                A model that reads several adjacent slices takes each slice's neighbours itself;
                ends are repeated.
            batch_size: slices at a time.
            box: see `inputs`.

        Returns:
            [S, D] float32, on the CPU.

        Raises:
            ValueError: a module of the model is in training mode, the images are not
                [S, C, H, W] in [0, 1], or as `inputs`.
        """
        if any(module.training for module in self.modules()):
            raise ValueError(
                "the model is in training mode, in which embeddings depend on the batch; call "
                "eval()"
            )
        if (
            images.ndim != 4
            or not len(images)
            or not 0 <= float(images.min()) <= float(images.max()) <= 1
        ):
            raise ValueError(
                "give images [S, C, H, W] in [0, 1]; preprocess makes them from Hounsfield units"
            )
        first = next(self.parameters())
        parts = []
        for start in range(0, len(images), batch_size):
            numbers = torch.arange(start, min(start + batch_size, len(images)))
            batch = self.inputs(images, numbers, box).to(first.device, first.dtype)
            parts.append(self.embedding(batch).float().cpu())
        return torch.cat(parts)


def neighbours(images: Tensor, numbers: Tensor, offsets: Sequence[int]) -> Tensor:
    """Adjacent slices as channels: [S, C, H, W], [B], K offsets -> [B, K C, H, W]; ends repeat."""
    last = len(images) - 1
    return torch.cat([images[(numbers + offset).clamp(0, last)] for offset in offsets], dim=1)


def crop_to_box(images: Tensor, box: Sequence[float]) -> Tensor:
    """A box of the images, enlarged to their size, bilinear; height and width are stretched
    independently.

    Args:
        images: [B, C, H, W] float32.
        box: (top, left, bottom, right) in pixels, bottom and right behind the last row and column.
            Parts outside of the images are left out.

    Returns:
        [B, C, H, W] float32.

    Raises:
        ValueError: the box has not four finite numbers, or less than a pixel of it lies inside.
    """
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise ValueError(f"box={tuple(box)}: give (top, left, bottom, right) in pixels")
    weights = []
    for size, start, end in zip(images.shape[-2:], box[:2], box[2:], strict=True):
        start, end = max(0.0, float(start)), min(float(size), float(end))
        if end - start < 1:
            raise ValueError(
                f"box={tuple(box)}: less than a pixel of it lies in slices of "
                f"{images.shape[-2]} x {images.shape[-1]} pixels"
            )
        # Sampled at pixel centres, and never half a pixel beyond the box's border, where the
        # pixels are left out.
        centres = start + (torch.arange(size) + 0.5) * ((end - start) / size) - 0.5
        at = centres.clamp(start, end - 1)
        distance = (at[:, None] - torch.arange(size)[None]).abs()
        weights.append((1 - distance).clamp_min(0).to(images.device, images.dtype))
    rows, columns = weights
    return rows @ images @ columns.T


def _stretched(images: Tensor) -> Tensor:
    """Each image from its own minimum to its own maximum: [B, C, H, W] -> the same shape."""
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return (images - low) / (high - low).clamp_min(1e-8)


class VQVAEOutput(NamedTuple):
    """reconstruction [B, C, H, W], latents and quantized [B, D, h, w], codes [B, h, w], two scalar
    losses.
    """

    reconstruction: Tensor
    latents: Tensor
    quantized: Tensor
    codes: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


class VQVAE(ExportedModel):
    """Vector-quantized autoencoder."""

    def __init__(
        self,
        *,
        in_channels: int,
        hidden: Sequence[int],
        depth: int,
        embedding_dim: int,
        num_codes: int,
        drop_rate: float = 0.0,
        output_activation: str = "unit_tanh",
    ):
        super().__init__()
        first, second = hidden
        self.output_activation = output_activation
        self.encoder = Encoder(
            in_channels=in_channels,
            hidden=hidden,
            depth=depth,
            embedding_dim=embedding_dim,
            drop_rate=drop_rate,
        )
        self.vq_layer = VectorQuantizer(num_codes, embedding_dim)
        self.decoder = nn.Sequential(
            _conv_norm(embedding_dim, second, 3, activation=nn.LeakyReLU),
            *[ResidualBlock(second, None) for _ in range(depth)],
            nn.LeakyReLU(),
            _transposed_conv_norm(second, first, nn.LeakyReLU()),
            _transposed_conv_norm(first, in_channels, nn.Tanh()),
        )

    def forward(self, images: Tensor) -> VQVAEOutput:
        """Images [B, C, H, W] in [0, 1], sides divisible by 4."""
        latents = self.encoder(images)
        quantized, codes, codebook_loss, commitment_loss = self.vq_layer(latents)
        return VQVAEOutput(
            self.decode(quantized), latents, quantized, codes, codebook_loss, commitment_loss
        )

    def decode(self, quantized: Tensor) -> Tensor:
        """[B, D, h, w] -> images [B, C, 4h, 4w] in [0, 1], with "tanh" in [-1, 1]."""
        image = self.decoder(quantized.to(self.decoder[0][0].weight.dtype)).float()
        return (image + 1) / 2 if self.output_activation == "unit_tanh" else image

    def embedding(self, images: Tensor) -> Tensor:
        return self.encoder(images).mean((2, 3))


class ClassifierOutput(NamedTuple):
    """logits [B, K], latents [B, D, h, w]."""

    logits: Tensor
    latents: Tensor


class Classifier(ExportedModel):
    """Encoder, strided convolutions on its latents, mean over pixels, linear layer."""

    def __init__(
        self,
        *,
        num_classes: int,
        compression: Sequence[int],
        in_channels: int,
        hidden: Sequence[int],
        depth: int,
        embedding_dim: int,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.encoder = Encoder(
            in_channels=in_channels,
            hidden=hidden,
            depth=depth,
            embedding_dim=embedding_dim,
            drop_rate=drop_rate,
        )
        self.compression = nn.Sequential(
            *[
                _conv_norm(before, after, 3, stride=2, activation=nn.LeakyReLU)
                for before, after in itertools.pairwise((embedding_dim, *compression))
            ]
        )
        self.classification = nn.Linear(compression[-1], num_classes)

    def forward(self, images: Tensor) -> ClassifierOutput:
        """Images [B, C, H, W] in [0, 1], sides divisible by 4."""
        latents = self.encoder(images)
        return ClassifierOutput(
            self.classification(self.compression(latents).mean((2, 3))), latents
        )

    def embedding(self, images: Tensor) -> Tensor:
        return self.encoder(images).mean((2, 3))


class JointEmbeddingOutput(NamedTuple):
    """latents [B, D, h, w], embedding [B, F]."""

    latents: Tensor
    embedding: Tensor


class _Neck(nn.Module):
    """Between the encoder's features and the feature of a slice: attention over pixels, or two
    convolutions with stride 2 and a mean."""

    def __init__(self, kind: str, width: int):
        super().__init__()
        if kind == "attention":
            self.attention = nn.Conv2d(width, width, 1, bias=False)
        else:
            self.stages = nn.Sequential(
                *[_conv_norm(width, width, 3, stride=2, activation=nn.LeakyReLU) for _ in range(2)]
            )
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """[B, F, h, w] -> [B, F]."""
        if self.kind == "attention":
            weights = torch.softmax(self.attention(x).flatten(2), dim=2)
            return (weights * x.flatten(2)).sum(2)
        return self.stages(x).mean((2, 3))


class JointEmbedding(ExportedModel):
    """Encoder, and the feature of a slice: the mean of the latents, of the map before the
    projection to latents, or of both (`pooled`), or what a `neck` makes of them."""

    def __init__(
        self,
        *,
        pooled: str,
        in_channels: int,
        hidden: Sequence[int],
        depth: int,
        embedding_dim: int,
        drop_rate: float = 0.0,
        neck: str = "none",
    ):
        super().__init__()
        self.encoder = Encoder(
            in_channels=in_channels,
            hidden=hidden,
            depth=depth,
            embedding_dim=embedding_dim,
            drop_rate=drop_rate,
        )
        self.pooled = pooled
        widths = {"latents": embedding_dim, "map": hidden[1], "both": embedding_dim + hidden[1]}
        self.neck = None if neck == "none" else _Neck(neck, widths[pooled])

    def forward(self, images: Tensor) -> JointEmbeddingOutput:
        """Images [B, C, H, W] in [0, 1], sides divisible by 4."""
        _check_sides(images, 4)
        *layers, project = self.encoder
        features = functools.reduce(lambda x, layer: layer(x), layers, images)
        latents = project(features)
        chosen = {"latents": (latents,), "map": (features,), "both": (features, latents)}
        if self.neck is not None:
            return JointEmbeddingOutput(latents, self.neck(torch.cat(chosen[self.pooled], 1)))
        means = [part.mean((2, 3)) for part in chosen[self.pooled]]
        return JointEmbeddingOutput(latents, torch.cat(means, 1))

    def embedding(self, images: Tensor) -> Tensor:
        return self(images).embedding


class _Up(nn.Module):
    def __init__(self, in_features: int, skip_features: int, out_features: int):
        super().__init__()
        self.upsample = _transposed_conv_norm(in_features, out_features, nn.ReLU())
        self.convolutions = _two_convolutions(out_features + skip_features, out_features)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.convolutions(torch.cat([skip, self.upsample(x)], dim=1))


def _two_convolutions(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(
        _conv_norm(in_features, out_features, 3), _conv_norm(out_features, out_features, 3)
    )


def _up_branch(widths: Sequence[int], skips: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(
        [
            _Up(below, skip, here)
            for here, below, skip in zip(widths[:-1], widths[1:], skips, strict=True)
        ]
    )


def _decode(
    up: nn.ModuleList, head: nn.Module, bottom: Tensor, skips: Sequence[Tensor]
) -> UNetOutput:
    x = bottom
    for stage, skip in zip(reversed(up), reversed(skips), strict=True):
        x = stage(x, skip)
    return UNetOutput(head(x)[:, 0], bottom.float().mean((2, 3)))


class UNetOutput(NamedTuple):
    """logits [B, H, W], above 0 where foreground is more likely; embedding [B, D]."""

    logits: Tensor
    embedding: Tensor


class UNet(ExportedModel):
    """U-Net whose down branch is the encoder."""

    stride = 16

    def __init__(
        self,
        *,
        in_channels: int,
        hidden: Sequence[int],
        depth: int,
        embedding_dim: int,
        widths: Sequence[int],
        residual_stack: bool,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        first, second = hidden
        self.residual_stack = residual_stack
        self.encoder = Encoder(
            in_channels=in_channels,
            hidden=hidden,
            depth=depth,
            embedding_dim=embedding_dim,
            drop_rate=drop_rate,
            compression_only=not residual_stack,
        )
        self.stem = _two_convolutions(in_channels, widths[0])
        deepest = embedding_dim if residual_stack else second
        self.pooled = nn.ModuleList(
            [
                _two_convolutions(before, after)
                for before, after in itertools.pairwise((deepest, *widths[3:]))
            ]
        )
        self.up = _up_branch(widths, (widths[0], first, second, widths[3]))
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, images: Tensor) -> UNetOutput:
        """Images [B, C, H, W] in [0, 1], sides divisible by 16, else a ValueError."""
        _check_sides(images, self.stride)
        half, quarter = self.encoder.compress(images)
        deepest = self.encoder.refine(quarter) if self.residual_stack else quarter
        eighth = self.pooled[0](functional.max_pool2d(deepest, 2))
        bottom = self.pooled[1](functional.max_pool2d(eighth, 2))
        return _decode(self.up, self.head, bottom, [self.stem(images), half, quarter, eighth])

    def embedding(self, images: Tensor) -> Tensor:
        return self(images).embedding


class StandardUNet(ExportedModel):
    """U-Net with two 3 x 3 convolutions a level and four max-poolings."""

    stride = 16

    def __init__(self, *, in_channels: int, widths: Sequence[int]):
        super().__init__()
        self.down = nn.ModuleList(
            [
                _two_convolutions(before, after)
                for before, after in itertools.pairwise((in_channels, *widths))
            ]
        )
        self.up = _up_branch(widths, widths[:-1])
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, images: Tensor) -> UNetOutput:
        """Images [B, C, H, W] in [0, 1], sides divisible by 16, else a ValueError."""
        _check_sides(images, self.stride)
        levels = [self.down[0](images)]
        for layers in self.down[1:]:
            levels.append(layers(functional.max_pool2d(levels[-1], 2)))
        return _decode(self.up, self.head, levels[-1], levels[:-1])

    def embedding(self, images: Tensor) -> Tensor:
        return self(images).embedding


class _SqueezeExcitation(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.fc1 = nn.Conv2d(features, features // 16, 1)
        self.fc2 = nn.Conv2d(features // 16, features, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class _Bottleneck(nn.Module):
    def __init__(self, in_features: int, inner: int, out_features: int, stride: int, groups: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_features, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = (
            nn.Conv2d(inner, out_features, 1, bias=False),
            nn.BatchNorm2d(out_features),
        )
        self.se = _SqueezeExcitation(out_features)
        self.downsample = None
        if stride > 1 or in_features != out_features:
            convolution = nn.Conv2d(in_features, out_features, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(out_features))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.se(self.bn3(self.conv3(y)))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class SEResNeXtOutput(NamedTuple):
    """logits [B, K], embedding [B, D]."""

    logits: Tensor
    embedding: Tensor


class SEResNeXt(ExportedModel):
    """SE-ResNeXt on three adjacent slices; entries are named as timm's `seresnext50_32x4d`."""

    offsets = (-1, 0, 1)
    stride = 1

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        layers: Sequence[int],
        width: int,
        groups: int,
        pooling: str,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = (
            nn.MaxPool2d(3, 2, padding=1)
            if pooling == "timm"
            else nn.MaxPool2d(3, 2, ceil_mode=True)
        )
        before = width
        for stage, depth in enumerate(layers):
            inner, after = 2 * width << stage, 4 * width << stage
            blocks = []
            for index in range(depth):
                blocks.append(
                    _Bottleneck(before, inner, after, 2 if stage > 0 and index == 0 else 1, groups)
                )
                before = after
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.num_stages = len(layers)
        self.fc = nn.Linear(before, num_classes)

    def stages(self, images: Tensor) -> list[Tensor]:
        """Features after each stage, at 1/4, 1/8, 1/16 and 1/32 of the resolution."""
        x = self.pool(torch.relu(self.bn1(self.conv1(images))))
        features = []
        for stage in range(self.num_stages):
            x = getattr(self, f"layer{stage + 1}")(x)
            features.append(x)
        return features

    def forward(self, images: Tensor) -> SEResNeXtOutput:
        """Images [B, C, H, W] in [0, 1], channels: the slice below, the slice, the slice above."""
        embedding = self.embedding(images)
        return SEResNeXtOutput(self.fc(embedding), embedding)

    def embedding(self, images: Tensor) -> Tensor:
        return self.stages(images)[-1].mean((2, 3))


ARCHITECTURES: dict[str, type[ExportedModel]] = {
    model.__name__: model
    for model in (VQVAE, Classifier, JointEmbedding, UNet, StandardUNet, SEResNeXt)
}


class FeatureInfo(list):
    """timm's description of a feature extractor: a list of {num_chs, reduction, module}."""

    def channels(self) -> list[int]:
        return [entry["num_chs"] for entry in self]

    def reduction(self) -> list[int]:
        return [entry["reduction"] for entry in self]

    def module_name(self) -> list[str]:
        return [entry["module"] for entry in self]


class Features(nn.Module):
    """The encoder of a model as a feature extractor with timm's interface, for segmentation and
    detection libraries.

    The encoder is shared with the model, not copied: training one trains the other.

    `forward` returns a list of feature maps, from fine to coarse, which `feature_info` describes,
    as `timm.create_model(..., features_only=True)` does. `forward_features`, `forward_head`,
    `reset_classifier`, `get_classifier` and `num_features` work as in timm's classification
    backbones. There is no classifier before `reset_classifier` makes one.

    Raises:
        ValueError: the model's encoder is not an `Encoder`.
    """

    def __init__(self, model: ExportedModel):
        super().__init__()
        encoder = getattr(model, "encoder", None)
        if not isinstance(encoder, Encoder):
            raise ValueError(
                f"{type(model).__name__} has no encoder of this project; export a run of another "
                f"recipe"
            )
        self.encoder = encoder
        first, second, latent = encoder.widths
        whole = len(encoder) > 3
        self.num_features = latent if whole else second
        self.feature_info = FeatureInfo(
            [
                {"num_chs": first, "reduction": 2, "module": "encoder.0"},
                {
                    "num_chs": self.num_features,
                    "reduction": 4,
                    "module": f"encoder.{len(encoder) - 1}",
                },
            ]
        )
        self.reset_classifier(0)

    def reset_classifier(self, num_classes: int) -> None:
        """A new linear layer with random weights as the classifier; none of 0 classes."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """The linear layer, or the identity."""
        return self.fc

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, C, H, W] in [0, 1] -> [B, F1, H / 2, W / 2] and [B, F, H / 4, W / 4].

        Raises ValueError if a side is not divisible by 4.
        """
        half, quarter = self.encoder.compress(images)
        return [half, self.encoder.refine(quarter)]

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> only the coarsest map."""
        return self(images)[-1]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over pixels, then the classifier, but with `pre_logits`: [B, F, h, w] -> [B, F], or
        logits [B, K]."""
        pooled = features.mean((2, 3))
        return pooled if pre_logits else self.fc(pooled)


# ---- Loading -------------------------------------------------------------------------------------


def build(manifest: dict[str, Any]) -> ExportedModel:
    """The model that a manifest describes, with random weights.

    Raises:
        ValueError: the manifest is of another version, or names an unknown architecture.
    """
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"the manifest has format_version {manifest.get('format_version')}, this file reads "
            f"{FORMAT_VERSION}; use the ctssl_torch.py beside the manifest"
        )
    if manifest["architecture"] not in ARCHITECTURES:
        raise ValueError(
            f"architecture {manifest['architecture']} is not one of {', '.join(ARCHITECTURES)}"
        )
    model = ARCHITECTURES[manifest["architecture"]](**manifest["model"])
    model.manifest = manifest
    return model


def load(path: str | Path) -> ExportedModel:
    """The model of an exported folder in evaluation mode, on the CPU.

    Args:
        path: the folder, a zip file of it, a weights file in it (.safetensors or .pt), or
            `hf-hub:ORG/NAME` or `hf-hub:ORG/NAME@REVISION`, a repository of a model hub, which
            needs the package huggingface_hub. Of a repository only data is fetched, no code and
            no pickle.

    Raises:
        FileNotFoundError: the path, its manifest or its weights do not exist.
        ValueError: the weights are damaged or not the weights that the manifest describes.
        ImportError: a package is missing.
    """
    package = _Package(_fetched(path))
    manifest = _manifest_of(package)
    weights = _read_weights(package, manifest)
    if manifest.get("architecture") == "SEResNeXt":
        weights = {_newer_name(name): value for name, value in weights.items()}
    try:
        _check_settings(manifest["model"], weights)
        with torch.device("meta"):  # without memory, until the sizes are those of the weights
            build(manifest).load_state_dict(weights, strict=True, assign=True)
        model = build(manifest)
        model.load_state_dict(weights, strict=True)
    except (AttributeError, KeyError, IndexError, TypeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{package.path}: manifest.json does not describe these weights ({reason}); copy the "
            "whole folder again"
        ) from None
    return model.eval()


_HUB = "hf-hub:"
_OF_A_REPOSITORY = ("manifest.json", "model.safetensors", "test_input.npz")


def _fetched(path: str | Path) -> Path:
    """The path, or the local copy of a hub's repository."""
    if not str(path).startswith(_HUB):
        return Path(path)
    name, _, revision = str(path).removeprefix(_HUB).partition("@")
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(
            f"{path} needs the package huggingface_hub: pip install huggingface_hub"
        ) from None
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=list(_OF_A_REPOSITORY)
        )
    except Exception as error:  # of many kinds: no such repository or revision, no network
        reason = (str(error).strip().splitlines() or [""])[0]
        raise FileNotFoundError(
            f"{path} cannot be fetched ({type(error).__name__}: {reason}); check the name, the "
            "revision, the network and, for a private repository, your token"
        ) from None
    return Path(folder)


class _Package:
    """The files of an exported folder, of the folder around a weights file, or of a zip file."""

    def __init__(self, path: Path):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        self.path, self.weights = path, ""
        self._folder = path
        self._archive: zipfile.ZipFile | None = None
        if path.is_dir():
            return
        if path.suffix != ".zip":
            self._folder, self.weights = path.parent, path.name
            return
        try:
            self._archive = zipfile.ZipFile(path)
        except Exception as error:  # of many kinds on damaged bytes
            raise ValueError(f"{path} is a damaged zip file ({error}); copy it again") from None
        tops = {
            name.removesuffix("manifest.json")
            for name in self._archive.namelist()
            if name.rpartition("/")[2] == "manifest.json" and name.count("/") < 2
        }
        self._top = min(tops, key=len, default="")

    def has(self, name: str) -> bool:
        if self._archive is None:
            return (self._folder / name).is_file()
        return self._top + name in self._archive.namelist()

    def read(self, name: str, limit: int) -> bytes:
        """A file's bytes; nothing of a file that is larger than the limit."""
        if self._archive is None:
            file = self._folder / name
            return file.read_bytes() if file.stat().st_size <= limit else b""
        member = self._archive.getinfo(self._top + name)
        return _read_member(self._archive, member, -1) if member.file_size <= limit else b""


def _manifest_of(package: _Package) -> dict[str, Any]:
    """Contents of a folder's manifest.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not name files with their SHA-256.
    """
    if not package.has("manifest.json"):
        raise FileNotFoundError(
            f"{package.path} has no manifest.json; give a folder that ctssl_jax.export wrote, or a "
            "zip file of it"
        )
    try:
        manifest = json.loads(package.read("manifest.json", _MANIFEST_BYTES))
    except (ValueError, RecursionError):
        manifest = None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(file, dict) and "sha256" in file for file in files.values()
    ):
        raise ValueError(
            f"{package.path}: manifest.json is no manifest of ctssl_jax.export; copy the whole "
            "folder again"
        )
    return manifest


def _check_settings(settings: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Raises TypeError if a number of the settings passes all sizes of the weights: the model would
    take more memory or time than these explain."""
    largest = max([len(weights), *(size for value in weights.values() for size in value.shape)])
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        numbers = [number for number in values if isinstance(number, int | float)]
        if len(values) > largest or any(not 0 <= number <= largest for number in numbers):
            raise TypeError(f"{name} is larger than they are")


def _weights_in(package: _Package) -> str:
    names = ["weights.pt", "model.safetensors", "weights.safetensors"]
    if importlib.util.find_spec("safetensors"):
        names.reverse()
    for name in names:
        if package.has(name):
            return name
    raise FileNotFoundError(
        f"{package.path} contains none of {', '.join(names)}; copy the whole folder again"
    )


def _newer_name(name: str) -> str:
    """timm's name of an SE-ResNeXt's entry, from that of its older network."""
    name = re.sub(r"^layer0\.", "", name.replace(".se_module.", ".se."))
    return re.sub(r"^last_linear\.", "fc.", name)


def _read_weights(package: _Package, manifest: dict[str, Any]) -> dict[str, Tensor]:
    name = package.weights or _weights_in(package)
    path = package.path if package.weights else package.path / name
    if name not in manifest["files"]:
        raise ValueError(
            f"{path} is not in its manifest; give one of {', '.join(manifest['files'])}"
        )
    facts = manifest["files"][name]
    limit = facts.get("bytes", sys.maxsize)
    content = package.read(name, limit if isinstance(limit, int) else sys.maxsize)
    damaged = f"{path} does not hold weights; copy the whole folder again"
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        raise ValueError(
            f"{path} is damaged or not the file that manifest.json describes (SHA-256 differs); "
            "copy the whole folder again"
        )
    if path.suffix == ".safetensors":
        try:
            import safetensors.torch
        except ImportError:
            raise ImportError(
                f"{path} needs the package safetensors: pip install safetensors"
            ) from None
        try:
            return safetensors.torch.load(content)
        except Exception:  # of many kinds
            raise ValueError(damaged) from None
    try:
        # torch.save stores without compression, so the members are no larger than the file
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(member.file_size for member in archive.infolist()) > len(content):
                raise ValueError(damaged)
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # of many kinds; a pickle that would run a command is one
        raise ValueError(damaged) from None
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise ValueError(damaged)
    return weights


# ---- Preprocessing: from Hounsfield units to the model's input -----------------------------------


def preprocess(
    hu: np.ndarray, affine: np.ndarray, preprocessing: dict[str, Any], num_slices: int = 1
) -> Tensor:
    """A CT volume as the model was trained on it: oriented, resized, windowed, normalised.

    Slices are whole, also of a model that was trained on cropped slices: `ExportedModel.inputs`
    crops them.

    Args:
        hu: [I, J, K] Hounsfield units, axes in any order.
        affine: [4, 4], array index -> mm towards the patient's right, anterior and superior (RAS+,
            as in nibabel).
        preprocessing: a field of manifest.json: `windows` ((level, width) in HU for each channel),
            `image_size`, `normalize`, `in_channels`.
        num_slices: adjacent slices of one input of the model. Several are stretched together, so
            `ExportedModel.inputs` does it.

    Returns:
        [S, C, H, W] float32 in [0, 1]: slices from feet to head, rows to posterior, columns to the
        patient's left.

    Raises:
        ValueError: shapes do not fit, the volume is not axial, or its values are not Hounsfield
            units.
    """
    volume, spacing = to_canonical(hu, affine)
    volume = _with_air(volume)
    size, windows = preprocessing["image_size"], preprocessing["windows"]
    grey = np.stack([_window(resize(image, spacing, size), windows) for image in volume])
    unit = torch.from_numpy(grey).permute(0, 3, 1, 2).float() / 255
    if preprocessing["normalize"] == "slice_minmax" and num_slices == 1:
        unit = _stretched(unit)
    channels = preprocessing["in_channels"]
    return unit.expand(-1, channels, -1, -1).contiguous() if unit.shape[1] == 1 else unit


def _with_air(hu: np.ndarray) -> np.ndarray:
    """Air in place of padding."""
    return np.where(hu < _BELOW_ANY_TISSUE_HU, np.asarray(AIR_HU, hu.dtype), hu)


def lung_box(hu: np.ndarray, affine: np.ndarray, image_size: int) -> tuple[int, int, int, int]:
    """The box of a scan's lungs, as models of cropped slices were trained on it.

    It is found by the code of the preparation, the file `ctssl_anatomy.py` beside this one, which
    folders of such models have. Needs scipy.

    Args:
        hu, affine: as `preprocess`.
        image_size: rows and columns of the preprocessed slices.

    Returns:
        (top, left, bottom, right) in pixels of the preprocessed slices, bottom and right behind the
        last row and column; the whole slice of a scan without lungs.

    Raises:
        ValueError: as `preprocess`.
        ImportError: no `ctssl_anatomy.py`, or no scipy.
    """
    volume, spacing = to_canonical(hu, affine)
    box = _anatomy().summarise(_with_air(volume), spacing, 1.0).lung_box
    if box is None:
        return 0, 0, image_size, image_size
    shape = volume.shape[1:]
    edges = []
    fields = zip(box[::2], box[1::2], shape, _square_field(shape, spacing), strict=True)
    for first, after, side, field in fields:
        if not _needs_resize(shape, spacing, image_size):
            edges.append((first, after))
            continue
        start = min(0.0, (side - field) / 2)
        low, high = ((edge - start) * image_size / field for edge in (first, after))
        edges.append((max(0, math.floor(low)), min(image_size, math.ceil(high))))
    (top, bottom), (left, right) = edges
    return top, left, bottom, right


def _anatomy() -> Any:
    """The module `ctssl_anatomy.py` beside this file; within ctssl_jax its origin."""
    path = Path(__file__).with_name("ctssl_anatomy.py")
    name = "ctssl_anatomy" if path.is_file() else "data_prep.scan.anatomy"
    try:
        if name not in sys.modules and path.is_file():
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
        return importlib.import_module(name)
    except ImportError as error:
        sys.modules.pop("ctssl_anatomy", None)
        raise ImportError(
            f"lung_box needs scipy, and ctssl_anatomy.py beside {Path(__file__).name} ({error}): "
            "pip install scipy, and copy the whole folder of a model of cropped slices"
        ) from None


def to_canonical(hu: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """[I, J, K] -> a view [S, H, W] with slices to superior, rows to posterior and columns to the
    patient's left, and the spacing (mm) between rows and between columns.

    Raises:
        ValueError: as `preprocess`.
    """
    hu, affine = np.asarray(hu), np.asarray(affine, dtype=float)
    if hu.ndim != 3 or affine.shape != (4, 4):
        raise ValueError(
            f"give hu [I, J, K] and affine [4, 4]; their shapes are {hu.shape} and {affine.shape}"
        )
    steps = affine[:3, :3] * np.array([[-1.0], [-1.0], [1.0]])  # to left, posterior, superior
    lengths = np.linalg.norm(steps, axis=0)
    if not (np.isfinite(steps).all() and lengths.min() > 0):
        raise ValueError("the affine has an axis of length 0 or a value that is not finite")
    directions = steps / lengths
    slices = int(np.argmax(np.abs(directions[2])))
    rows, columns = (axis for axis in range(3) if axis != slices)
    if abs(directions[0, columns]) < abs(directions[0, rows]):
        rows, columns = columns, rows
    if abs(directions[:, rows] @ directions[:, columns]) > 0.01:
        raise ValueError(
            "rows and columns are not at a right angle; resample the volume to axial slices"
        )
    posterior = directions[:, rows] * np.sign(directions[1, rows])
    left = directions[:, columns] * np.sign(directions[0, columns])
    if np.cross(left, posterior)[2] < _AXIAL_COSINE:
        raise ValueError(
            "the slices are not axial (their normal is more than 35 degrees off the patient's "
            "axis); resample the volume to axial slices"
        )
    _check_is_hu(hu)
    volume = hu.transpose(slices, rows, columns)
    flips = directions[2, slices] < 0, directions[1, rows] < 0, directions[0, columns] < 0
    volume = volume[tuple(slice(None, None, -1) if flip else slice(None) for flip in flips)]
    return volume, (float(lengths[rows]), float(lengths[columns]))


def _check_is_hu(hu: np.ndarray) -> None:
    low, high = float(np.min(hu)), float(np.max(hu))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("hu has values that are not finite")
    if low > -500:
        raise ValueError(
            f"hu lies between {low:g} and {high:g}, so no pixel is air; give Hounsfield units, "
            "before any window"
        )


def _window(hu: np.ndarray, windows: Sequence[Sequence[float]]) -> np.ndarray:
    """255 clip((HU - (level - width / 2)) / width, 0, 1), rounded half to even.

    [H, W] -> [H, W, C] uint8.
    """
    channels = [
        np.rint(255 * np.clip((hu.astype(np.float64) - (level - width / 2)) / width, 0, 1))
        for level, width in windows
    ]
    return np.stack(channels, axis=-1).astype(np.uint8)


def resize(hu: np.ndarray, spacing: tuple[float, float], size: int) -> np.ndarray:
    """The whole field as a square, undistorted: padded with air, then averaged (antialiased
    bilinear).

    Args:
        hu: [H, W] Hounsfield units of a slice.
        spacing: mm between rows and between columns.
        size: rows and columns of the square.

    Returns:
        [size, size]; a square slice of this size and of square pixels as it is.
    """
    if not _needs_resize(hu.shape, spacing, size):
        return hu
    from PIL import Image

    rows, columns = _square_field(hu.shape, spacing)
    top, left = min(0.0, (hu.shape[0] - rows) / 2), min(0.0, (hu.shape[1] - columns) / 2)
    margins = math.ceil(-top), math.ceil(-left)
    padded = np.full(
        (hu.shape[0] + 2 * margins[0], hu.shape[1] + 2 * margins[1]), AIR_HU, dtype=np.float32
    )
    padded[margins[0] : margins[0] + hu.shape[0], margins[1] : margins[1] + hu.shape[1]] = hu
    y, x = margins[0] + top, margins[1] + left
    box = (x, y, min(x + columns, padded.shape[1]), min(y + rows, padded.shape[0]))
    return np.asarray(
        Image.fromarray(padded).resize((size, size), Image.Resampling.BILINEAR, box=box)
    )


def _needs_resize(shape: Sequence[int], spacing: tuple[float, float], size: int) -> bool:
    return not math.isclose(*spacing, rel_tol=1e-3) or tuple(shape) != (size, size)


def _square_field(shape: Sequence[int], spacing: tuple[float, float]) -> tuple[float, float]:
    """Rows and columns of the smallest square field around a slice."""
    field = max(shape[0] * spacing[0], shape[1] * spacing[1])
    return field / spacing[0], field / spacing[1]


# ---- DICOM ---------------------------------------------------------------------------------------


def read_dicom(
    path: str | Path, *, max_slice_thickness_mm: float = 3.0, min_slices: int = 20
) -> tuple[np.ndarray, np.ndarray]:
    """One CT series in Hounsfield units, by the rules with which `data_prep` takes scans.

    Slices are sorted along their normal, and each gets its Rescale Slope and Intercept. Padding and
    values below -1500 HU become air (-1000). Localizers, reformats, captures, projections and
    objects of other modalities are left out, and copies of a slice count once.

    Where `data_prep` parts a series into stacks, chooses one of several series, or drops damaged or
    odd slices, a ValueError says what is there. Three things it judges and this function does not:
    whether lungs are in the volume, and the limits of the arguments where they are changed.

    Args:
        path: folder (searched through) or zip file with the series.
        max_slice_thickness_mm: thicker slices are refused.
        min_slices: series of fewer slices are refused.

    Returns:
        [S, H, W] float32 and the affine [4, 4] for `preprocess`.

    Raises:
        ValueError: not exactly one CT series of one patient; slices that are missing, damaged, lack
            elements, lie at one position or on several grids; several stacks in one; values that
            are no Hounsfield units; or files that are larger than any scan.
    """
    try:
        import pydicom  # noqa: F401
    except ImportError:
        raise ImportError("read_dicom needs the package pydicom: pip install pydicom") from None
    series: dict[str, list[_Image]] = {}
    with contextlib.ExitStack() as opened:
        for name, read in _files(Path(path), opened):
            image = _read_image(name, read)
            if image is not None:
                series.setdefault(image.text("SeriesInstanceUID"), []).append(image)
        if len(series) != 1:
            sizes = ", ".join(str(len(images)) for images in series.values())
            content = f"{len(series)} CT series (of {sizes} slices)" if series else "no CT series"
            raise ValueError(f"{path} contains {content}; give the folder of one series")
        (images,) = series.values()
        try:
            return _stack(images, max_slice_thickness_mm, min_slices)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


# ---- Files: bounded, whatever they say about themselves ------------------------------------------

_MAX_FILE_BYTES = 1 << 30
_HEADER_BYTES = 4 << 20  # all elements before the pixels
_MAX_RATIO, _FREE_BYTES = 200, 256 << 20  # what zip files and deflated images may expand to
_MAX_PIXELS = 1 << 26  # of a slice
_DEFLATED, _EXPLICIT = b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1\0\0\0"

_Read = Callable[[int], bytes]  # the first so many bytes; -1: all


def _files(path: Path, opened: contextlib.ExitStack) -> Iterator[tuple[str, _Read]]:
    """Name and reader of each file of a folder or zip file, which `opened` will close."""
    if path.is_dir():
        for file in sorted(item for item in path.rglob("*") if item.is_file()):
            if file.stat().st_size <= _MAX_FILE_BYTES:
                yield str(file.relative_to(path)), functools.partial(_read_file, file)
    elif zipfile.is_zipfile(path):
        size = path.stat().st_size
        try:
            archive = opened.enter_context(zipfile.ZipFile(path))
        except Exception as error:  # of many kinds on damaged bytes
            raise ValueError(f"{path} is a damaged zip file ({error})") from None
        members = [member for member in archive.infolist() if not member.is_dir()]
        total = sum(member.file_size for member in members)
        if total > max(_FREE_BYTES, _MAX_RATIO * size):
            raise ValueError(
                f"{path}: its members expand {size} to {total} bytes, more than any scan"
            )
        for member in sorted(members, key=lambda member: member.filename):
            if member.file_size <= _MAX_FILE_BYTES:
                yield member.filename, functools.partial(_read_member, archive, member)
    else:
        raise ValueError(
            f"{path} is neither a folder nor a zip file; give the folder of a series, and NIfTI to "
            "`preprocess`: image.get_fdata(), image.affine of nibabel"
        )


def _read_file(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, size: int) -> bytes:
    try:
        with archive.open(member) as file:  # a member that lies about its size ends there
            return file.read(member.file_size if size < 0 else min(size, member.file_size))
    except Exception as error:  # of many kinds: damaged, encrypted, an unknown compression
        raise ValueError(f"{member.filename} cannot be read from the zip file ({error})") from None


def _inflated(content: bytes) -> bytes:
    """A deflated image as an explicit one, others unchanged. pydicom would inflate it as a whole,
    whatever it expands to."""
    if _DEFLATED not in content[:4096]:
        return content
    at = 132 if content[128:132] == b"DICM" else 0
    while content[at : at + 2] == b"\x02\x00":  # the file meta elements are not deflated
        long = content[at + 4 : at + 6] in (b"OB", b"UN")
        start, end = (at + 8, at + 12) if long else (at + 6, at + 8)
        at = end + int.from_bytes(content[start:end], "little")
    stream, allowed = zlib.decompressobj(-zlib.MAX_WBITS), max(_FREE_BYTES, 8 * len(content))
    rest = stream.decompress(content[at:], allowed)
    if stream.unconsumed_tail:
        raise ValueError("a deflated image that expands beyond any scan")
    return content[:at].replace(_DEFLATED, _EXPLICIT) + rest


# ---- Headers -------------------------------------------------------------------------------------

_CT_IMAGES = {f"1.2.840.10008.5.1.4.1.1.2{suffix}" for suffix in ("", ".1", ".2")}
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_LOCALIZERS = {"LOCALIZER", "SCOUT", "SCANOGRAM", "TOPOGRAM", "SURVIEW"}
# words within a value of Image Type, such as CT_SOM5 MIP or THINMIP10
_PROJECTIONS = re.compile(
    r"\b(?:AX|AXIAL|COR|SAG|THIN|THICK|SLAB|TH|ST|CT)*"
    r"(?:MIPS?|MAX ?IP|MIN ?IP|MNIP|MXIP|MIPMAX|MIPMIN|MAXIMUM|MINIMUM|MAX INTENSITY"
    r"|MIN INTENSITY|(?<!BACK )PROJECTION|RAY ?SUM|RAY ?CAST|VRT|VOLREN|VOLUME ?RENDER(?:ED|ING)?"
    r"|SURFACE ?RENDER(?:ED|ING)?|SSD|SHADED|CPR|CURVED|STRAIGHTENED|SUBTRACTION|SUBTRACTED)"
    r"(?:AX|AXIAL|THIN|THICK|SLAB|MM|\d)*\b"
    r"|\b(?:EFF ATOMIC NUM|ELECTRON DENSITY|MAT (?:SPECIFIC|FRACTIONAL|VALUE BASED)|STD DEVIATION"
    r"|PERFUSION|CBF|CBV|MTT|TTP)\b"
)
_NO_HU = re.compile(r"(OD|MGML|Z_?EFF|ED|EDW|HU_?MOD|PCT)|.*([/%]|IODINE|DENSITY).*")
_LARGEST_NUMBER = 1e9
_SAME_POSITION_MM = 0.05
_MAX_ROTATION_DEGREES = 5.0
_FIELD_MM = (50.0, 1000.0)
_SAMPLE_STEP = 8  # values are judged on every 8th pixel of both directions
_JUMP_HU = 60.0  # more than neighbours differ by, on average
_FEW = 0.1  # so much of the slices may lack or misname an element


class _Image(NamedTuple):
    """One file: its header, and a function that reads it."""

    name: str
    read: _Read
    elements: Any  # pydicom.Dataset

    def texts(self, keyword: str) -> list[str]:
        """All values of an element, stripped; from its bytes, since broken values raise."""
        element = self.elements.get_item(keyword)
        value = None if element is None else element.value
        if value is None:
            return []
        if isinstance(value, bytes):
            value = value.decode("latin-1")
        parts = value.split("\\") if isinstance(value, str) else np.atleast_1d(value)
        return [str(part).strip(" \0\t\r\n") for part in parts]

    def text(self, keyword: str) -> str:
        return next(iter(self.texts(keyword)), "")

    def numbers(self, keyword: str) -> list[float]:
        """All values of a decimal string; [] if one is no usable number. A comma is a point."""
        try:
            values = [float(part.replace(",", ".")) for part in self.texts(keyword)]
        except ValueError:
            return []
        return values if all(abs(value) < _LARGEST_NUMBER for value in values) else []

    def number(self, keyword: str) -> float | None:
        return next(iter(self.numbers(keyword)), None)

    def integer(self, keyword: str | tuple[int, int], signed: bool = False) -> int | None:
        """The first value of an unsigned or signed short."""
        element = self.elements.get_item(keyword)
        value = None if element is None else element.value
        if isinstance(value, bytes):
            order = "little" if getattr(element, "is_little_endian", True) else "big"
            return int.from_bytes(value[:2], order, signed=signed) if len(value) >= 2 else None
        return value if isinstance(value, int) else None


class _Bounded(io.BytesIO):
    """A header that is read in a bounded number of reads, each of an element, an item or a value:
    pydicom takes hours for a few megabytes of empty items."""

    def __init__(self, content: bytes):
        super().__init__(content)
        self._reads_left = 20_000 + len(content) // 200

    def read(self, size: int | None = -1) -> bytes:
        self._reads_left -= 1
        if self._reads_left < 0:
            raise ValueError("more elements than the header of an image")
        return super().read(size)


def _read_image(name: str, read: _Read) -> _Image | None:
    """An axial CT image, or None for a file that is none.

    Raises:
        ValueError: the file begins as a DICOM image and cannot be read, or holds several frames.
    """
    import pydicom

    start = read(132)
    groups = start[:2], start[:2][::-1]
    if start[128:] != b"DICM" and not {b"\x02\x00", b"\x08\x00"} & set(groups):
        return None
    is_whole = False

    def header_ends(tag: int, vr: str | None, length: int) -> bool:
        nonlocal is_whole
        # (5200,xxxx): the functional groups of multi-frame images
        is_whole = tag >= 0x7FE00000 or tag >> 16 == 0x5200
        return is_whole or (tag == 0 and length == 0)  # zeros: a copy that was interrupted

    try:
        whole = _DEFLATED in read(4096)
        content = _inflated(read(-1))[:_HEADER_BYTES] if whole else read(_HEADER_BYTES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            elements = pydicom.filereader.read_partial(_Bounded(content), header_ends, force=True)
    except (Exception, RecursionError) as error:  # of a dozen kinds on damaged bytes
        raise ValueError(f"{name} is a damaged DICOM file ({type(error).__name__})") from None
    image = _Image(name, read, elements)
    modality, sop_class = image.text("Modality").upper(), image.text("SOPClassUID")
    if modality != "CT" and (modality or sop_class not in _CT_IMAGES):
        return None
    if not is_whole:
        raise ValueError(f"{name} is a CT image whose header does not end")
    if "NumberOfFrames" in elements and image.text("NumberOfFrames") not in ("", "1"):
        raise ValueError(
            f"{name}: enhanced multi-frame CT cannot be read here; convert it to single-frame DICOM"
        )
    kinds = [value.upper() for value in image.texts("ImageType")]
    words = [" ".join(re.split(r"[\W_]+", value)).strip() for value in kinds]
    if any(_LOCALIZERS & set(value.split()) for value in words):
        return None
    return image


def _fault(image: _Image) -> str | None:
    """Why a CT image is no slice, in words; None for a slice."""
    kinds = [value.upper() for value in image.texts("ImageType")]
    words = [" ".join(re.split(r"[\W_]+", value)).strip() for value in kinds]
    if image.text("SOPClassUID").startswith(_SECONDARY_CAPTURE):
        return "a secondary capture"
    if (
        kinds[:2] == ["DERIVED", "SECONDARY"]
        or "3D" in kinds[2:]
        or any(map(_PROJECTIONS.search, words[2:]))
        or _NO_HU.fullmatch(image.text("RescaleType").upper())
        or (image.text("RescaleType").upper() == "US" and not _in_hu(image))
    ):
        return "a derived image without CT numbers"
    if (image.integer("SamplesPerPixel") or 1) != 1 or (
        image.text("PhotometricInterpretation").upper() not in ("MONOCHROME1", "MONOCHROME2", "")
    ):
        return "not grey"
    return None


def _in_hu(image: _Image) -> bool:
    """False for Real World Values of another unit."""
    sequence = image.elements.get("RealWorldValueMappingSequence") or []
    codes = [
        str(unit.get("CodeValue", "")).strip().upper()
        for item in sequence
        for unit in item.get("MeasurementUnitsCodeSequence") or []
    ]
    return not codes or bool({"[HNSF'U]", "HU"} & set(codes))


def _axes(image: _Image) -> tuple[np.ndarray, np.ndarray] | None:
    """Unit vectors along the columns' numbers and along the rows'; None: the image is not axial.

    Raises:
        ValueError: Image Orientation is missing or invalid.
    """
    cosines = image.numbers("ImageOrientationPatient")
    if len(cosines) != 6:
        raise ValueError(f"{image.name} lacks ImageOrientationPatient")
    across, down = np.array(cosines).reshape(2, 3)
    lengths = np.linalg.norm(across), np.linalg.norm(down)
    if max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(across @ down)) > 0.01:
        raise ValueError(f"{image.name}: ImageOrientationPatient is invalid")
    return (across, down) if abs(np.cross(across, down)[2]) >= _AXIAL_COSINE else None


# ---- One stack -----------------------------------------------------------------------------------


def _stack(
    images: list[_Image], max_slice_thickness_mm: float, min_slices: int
) -> tuple[np.ndarray, np.ndarray]:
    if not images[0].text("SeriesInstanceUID"):
        raise ValueError("the slices lack SeriesInstanceUID")
    slices = _slices_of(images)
    _check_one_patient(slices)
    across, down, spacing, shape = _grid(slices)
    normal = np.cross(across, down)
    along = np.array([image.numbers("ImagePositionPatient") for image in slices]) @ normal
    order = np.argsort(along, kind="stable")
    slices, along = [slices[i] for i in order], along[order]
    if len(slices) > 1 and along[-1] - along[0] < _SAME_POSITION_MM:
        raise ValueError(f"ImagePositionPatient is the same in all {len(slices)} slices")
    _check_not_mixed(slices, along)
    starts = np.flatnonzero(np.diff(along, prepend=-np.inf) >= _SAME_POSITION_MM)
    positions = along[starts]
    if len(positions) < max(2, min_slices):
        number = f"{len(positions)} slice{'s' * (len(positions) != 1)}"
        raise ValueError(f"{number}, at least {max(2, min_slices)} asked (min_slices)")
    _check_steps(positions)
    _check_thickness(slices, float(np.median(np.diff(positions))), max_slice_thickness_mm)
    volume = np.empty((len(positions), *shape), np.float32)
    counts = np.zeros((len(positions), 4))
    for number, (start, end) in enumerate(itertools.pairwise([*starts, len(slices)])):
        volume[number], counts[number] = _to_hu(slices[start], shape)
        for copy in slices[start + 1 : end]:
            if not np.array_equal(_to_hu(copy, shape)[0], volume[number]):
                raise ValueError(
                    "two slices at one position; give the folder of one reconstruction"
                )
    _check_plausible(counts)
    _check_scale(volume, [slices[i] for i in starts])
    origins = np.array([slices[i].numbers("ImagePositionPatient") for i in starts])
    affine = np.eye(4)
    affine[:3, 0] = (origins[-1] - origins[0]) / (len(origins) - 1)
    affine[:3, 1] = down * spacing[0]
    affine[:3, 2] = across * spacing[1]
    affine[:3, 3] = origins[0]
    affine[:2] *= -1  # DICOM's x to left and y to posterior, turned to RAS+
    return volume, affine


def _slices_of(images: list[_Image]) -> list[_Image]:
    """The axial slices among the images of a series.

    Raises:
        ValueError: there are none, one lacks an element, or some show burned-in text.
    """
    slices, faults = [], []
    for image in images:
        if image.text("BurnedInAnnotation").upper() == "YES":
            raise ValueError("Burned In Annotation says YES")
        if fault := _fault(image):
            faults.append(fault)
        elif _axes(image) is None:
            faults.append("not axial")
        else:
            slices.append(image)
    if not slices:
        raise ValueError(f"the images are {max(faults, key=faults.count)}; give axial CT slices")
    for image in slices:
        needed = (("ImagePositionPatient", 3), ("PixelSpacing", 2), ("RescaleSlope", 1))
        missing = [
            keyword
            for keyword, count in (*needed, ("RescaleIntercept", 1))
            if len(image.numbers(keyword)) != count
        ]
        missing += [keyword for keyword in ("Rows", "Columns") if not image.integer(keyword)]
        if missing:
            raise ValueError(f"{image.name} lacks {', '.join(missing)}")
        if image.number("RescaleSlope") == 0:
            raise ValueError(f"{image.name}: RescaleSlope is 0")
    return slices


def _check_one_patient(slices: list[_Image]) -> None:
    for keyword in ("PatientID", "StudyInstanceUID"):
        known = {image.text(keyword).casefold() for image in slices} - {""}
        if len(known) > 1:
            raise ValueError(f"the slices of one series have {len(known)} values of {keyword}")


def _grid(slices: list[_Image]) -> tuple[np.ndarray, np.ndarray, list[float], tuple[int, int]]:
    """Row and column vectors, spacing (mm between rows, columns), rows and columns of all slices.

    Raises:
        ValueError: they differ by more than rounding, are turned within the plane, or the field is
            wider than any body.
    """
    first = slices[0]
    axes, spacing = _axes(first), first.numbers("PixelSpacing")
    shape = first.integer("Rows"), first.integer("Columns")
    assert axes is not None and shape[0] is not None and shape[1] is not None
    for image in slices:
        same = np.allclose(_axes(image), axes, atol=0.005) and np.allclose(
            image.numbers("PixelSpacing"), spacing, rtol=0.01, atol=0
        )
        if not same or (image.integer("Rows"), image.integer("Columns")) != shape:
            raise ValueError(
                "the slices differ in orientation, spacing or matrix; give the folder of one "
                "reconstruction"
            )
    field = max(np.multiply(shape, spacing))
    if min(spacing) <= 0 or not _FIELD_MM[0] <= field <= _FIELD_MM[1]:
        raise ValueError(f"a field of view of {field:.0f} mm; is PixelSpacing in mm?")
    if shape[0] * shape[1] > _MAX_PIXELS:
        raise ValueError(f"slices of {shape[0]} x {shape[1]} pixels")
    across, down = axes
    normal = np.cross(across, down)
    left = across if abs(across[0]) >= abs(across[1]) else down
    level = np.array([1.0, 0, 0]) - normal[0] * normal
    cosine = abs(left @ level) / np.linalg.norm(left) / np.linalg.norm(level)
    degrees = math.degrees(math.acos(min(1.0, cosine)))
    if degrees > _MAX_ROTATION_DEGREES:
        raise ValueError(
            f"the images are turned by {degrees:.1f} degrees within their plane, at most "
            f"{_MAX_ROTATION_DEGREES:g} are taken"
        )
    return across, down, spacing, (shape[0], shape[1])


def _check_steps(positions: np.ndarray) -> None:
    """Raises ValueError if slices are missing, or something lies between them."""
    steps = np.diff(positions)
    local = np.array([np.median(steps[max(0, i - 3) : i + 4]) for i in range(len(steps))])
    if np.any(steps <= 0.55 * local):
        raise ValueError(
            f"slices lie {steps.min():g} mm apart among steps of {np.median(steps):g} mm; give the "
            "folder of one reconstruction"
        )
    if np.any(steps > 1.5 * local):
        raise ValueError(
            f"slices are missing (a step of {steps.max():g} mm among steps of "
            f"{np.median(steps):g} mm); give the complete series"
        )


def _check_thickness(slices: list[_Image], spacing_mm: float, limit: float) -> None:
    """Raises ValueError for slices that are too thick. A few may be misnamed; where all lack it,
    the spacing stands in."""
    known = [t for image in slices if (t := image.number("SliceThickness") or 0) > 0]
    known = known or [spacing_mm]
    thick = [thickness for thickness in known if thickness > limit + 1e-4]
    if len(thick) > _FEW * len(known):
        raise ValueError(
            f"slices of {max(thick):g} mm, at most {limit:g} mm asked (max_slice_thickness_mm)"
        )


# Elements that tell two stacks apart, and how: a "value" changes the image; a "label" names a
# stack; an "order" may as well count the slices of one stack.
_ELEMENTS = (
    *(("SliceThickness", "value"), ("KVP", "value"), ("ConvolutionKernel", "value")),
    *(("TemporalPositionIdentifier", "value"), ("NominalPercentageOfCardiacPhase", "value")),
    *(("NominalPercentageOfRespiratoryPhase", "value"), ("ImageType", "label")),
    *(("FrameOfReferenceUID", "label"), ("StackID", "label"), ("SeriesNumber", "label")),
    *(("SeriesDescription", "label"), ("PatientPosition", "label"), ("AcquisitionNumber", "order")),
    *(("TriggerTime", "order"), ("AcquisitionTime", "order"), ("ContrastBolusAgent", "order")),
)
_RUNNING = ("AcquisitionNumber", "TriggerTime", "AcquisitionTime")
_LEAST_SLICES = 3  # that make a stack


def _check_not_mixed(slices: list[_Image], along: np.ndarray) -> None:
    """Raises ValueError if several stacks (kernels, energies, phases, passes ...) lie in one
    another.

    Slices of two values of an order or a label are one stack where they are even together and
    either a part alone would leave gaps between its slices, by their thickness, or Instance Number
    counts through both.

    Args:
        slices: sorted along their normal.
        along: [S] their positions in mm.
    """
    for keyword, kind in _ELEMENTS:
        values = [_value(image, keyword) for image in slices]
        missing = np.array([value == "" for value in values])
        counts = ~missing if missing.sum() <= _FEW * len(values) else np.ones(len(values), bool)
        names, codes = np.unique(
            np.array([str(value) for value in values], dtype=object), return_inverse=True
        )
        if len(names) < 2:
            continue
        step = _step_within(codes, along)
        if keyword in _RUNNING:
            codes = _passes(values, along, step)
            step = _step_within(codes, along)
        sizes = np.bincount(codes)
        counts &= sizes[codes] >= _LEAST_SLICES
        if not _overlap(codes[counts], along[counts], step):
            continue
        if kind == "value" or not _is_one(slices, along, codes, counts, kind):
            raise ValueError(
                f"several stacks lie in one another ({keyword} differs among the slices); give the "
                "folder of one reconstruction"
            )


def _value(image: _Image, keyword: str) -> str | float:
    """A value that can be compared and sorted; "" where it is missing."""
    if keyword == "ImageType":
        return "\\".join(image.texts(keyword)[2:]).upper()
    if keyword in (*_RUNNING, "SliceThickness", "KVP", "SeriesNumber"):
        number = image.number(keyword)
        return "" if number is None else round(number, 1 if keyword == "SliceThickness" else 6)
    if keyword.startswith("Nominal"):
        return repr(image.elements.get_item(keyword).value) if keyword in image.elements else ""
    return image.text(keyword)


def _step_within(codes: np.ndarray, along: np.ndarray) -> float:
    """The median step in mm between neighbours of one code; 0 without any."""
    order = np.lexsort((along, codes))
    steps = np.diff(along[order])[np.diff(codes[order]) == 0]
    steps = steps[steps >= _SAME_POSITION_MM]
    return float(np.median(steps)) if len(steps) else 0.0


def _overlap(codes: np.ndarray, along: np.ndarray, step: float) -> bool:
    """Whether the ranges of two codes overlap by more than two stacks in a row may share."""
    ranges = sorted(
        (float(part[0]), float(part[-1]))
        for code in np.unique(codes)
        if len(part := along[codes == code])
    )
    end = -np.inf
    for low, high in ranges:
        if step and min(end, high) - low > 1.5 * step:
            return True
        end = max(end, high)
    return False


def _passes(values: list[str | float], along: np.ndarray, step: float) -> np.ndarray:
    """[S] int: the runs along the patient that slices make in the order of their values. A run ends
    where it turns back, or where the next value's slices overlap it."""
    groups: dict[str | float, list[int]] = {}
    for i, value in enumerate(values):
        groups.setdefault(value, []).append(i)
    missing = groups.pop("", [])
    codes = np.zeros(len(values), int)
    number, direction, low, high, last = 0, 0.0, np.inf, -np.inf, None
    for value in sorted(groups):
        start, end = along[groups[value][0]], along[groups[value][-1]]
        way = 0.0 if last is None else (start + end) / 2 - last
        if min(high, end) - max(low, start) > 1.5 * step or way * direction < -_SAME_POSITION_MM:
            number, direction, low, high = number + 1, 0.0, start, end
        else:
            low, high = min(low, start), max(high, end)
            if abs(way) >= _SAME_POSITION_MM:
                direction = 1.0 if way > 0 else -1.0
        codes[groups[value]] = number
        last = (start + end) / 2
    codes[missing] = number + 1
    return codes


def _is_one(
    slices: list[_Image], along: np.ndarray, codes: np.ndarray, counts: np.ndarray, kind: str
) -> bool:
    """Whether slices that lie in one another fill each other's gaps and are one stack."""
    steps = np.diff(along)
    if np.mean(np.abs(steps - np.median(steps)) <= 0.1 * np.median(steps)) < 0.8:
        return False
    numbers = np.array([image.number("InstanceNumber") or 0 for image in slices])
    if kind == "order" and abs(np.sign(np.diff(numbers)).sum()) == len(steps):
        return True
    for code in np.unique(codes[counts]):
        part = np.flatnonzero(codes == code)
        known = [t for i in part if (t := slices[i].number("SliceThickness") or 0) > 0]
        if known and np.diff(along[part]).max() > max(
            1.5 * np.median(steps), 1.2 * np.median(known)
        ):
            return True  # this part alone would leave gaps
    return False


# ---- Pixels --------------------------------------------------------------------------------------


def _to_hu(image: _Image, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """HU [H, W] float32 of a slice, and four counts of a sample of its pixels: all, air, soft
    tissue, denser than any tissue.

    Raises:
        ValueError: its pixels cannot be read, or do not fit the header.
    """
    stored = _stored(image, shape)
    slope, intercept = image.number("RescaleSlope"), image.number("RescaleIntercept")
    assert slope is not None and intercept is not None
    hu = stored * slope + intercept
    air = hu < _BELOW_ANY_TISSUE_HU
    signed = image.integer("PixelRepresentation") == 1
    padding = image.integer("PixelPaddingValue", signed)
    if padding is not None:
        limit = image.integer("PixelPaddingRangeLimit", signed)
        low, high = sorted((padding, padding if limit is None else limit))
        if not any(
            _TISSUE_HU[0] < bound * slope + intercept < _TISSUE_HU[1] for bound in (low, high)
        ):
            air |= (stored >= low) & (stored <= high)
        elif padding in stored[[0, 0, -1, -1], [0, -1, 0, -1]] and low == high:
            if np.count_nonzero(stored == padding) >= 0.001 * stored.size:
                raise ValueError(f"{image.name}: Pixel Padding Value is that of a tissue")
    values = hu[::_SAMPLE_STEP, ::_SAMPLE_STEP]
    sample = values[~air[::_SAMPLE_STEP, ::_SAMPLE_STEP]]
    counts = (
        values.size,
        np.count_nonzero((sample >= -1100) & (sample < -500)),
        np.count_nonzero((sample >= -200) & (sample < 300)),
        np.count_nonzero(sample > _TISSUE_HU[1]),
    )
    hu[air] = AIR_HU
    return hu.astype(np.float32), np.array(counts)


def _stored(image: _Image, shape: tuple[int, int]) -> np.ndarray:
    """The stored values [H, W] of a slice."""
    import pydicom

    bits, high = image.integer("BitsStored"), image.integer("HighBit")
    allocated = image.integer("BitsAllocated") or 0
    if not bits or bits > allocated or (high is not None and high != bits - 1):
        raise ValueError(
            f"{image.name}: {bits} bits stored, high bit {high}, of {allocated}; the values must "
            "end at bit 0"
        )
    overlays = _overlay_bits(image)
    if any(0 < bit < bits for bit in overlays):
        raise ValueError(f"{image.name}: an overlay lies within the bits of the values")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.filereader.read_partial(
                io.BytesIO(_inflated(image.read(-1))), lambda tag, *_: tag > 0x7FE00010, force=True
            )
            syntax = dataset.file_meta.get("TransferSyntaxUID")
            compressed = syntax is not None and syntax.is_encapsulated
            values = dataset.pixel_array if compressed else None
    except Exception as error:  # of many kinds
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(
            f"{image.name}: the pixels cannot be read ({type(error).__name__}: {reason})"
        ) from None
    if values is None:
        values = _native(dataset, image, allocated, shape)
    if values.shape != shape or values.dtype.kind not in "iu":
        raise ValueError(f"{image.name}: the pixels have another matrix than Rows x Columns")
    if any(bit >= bits for bit in overlays):
        unused = 8 * values.itemsize - bits
        values = (values << unused) >> unused
    lowest, highest = int(values.min()), int(values.max())
    least = -(1 << bits - 1) if values.dtype.kind == "i" else 0
    if lowest < least or highest >= least + (1 << bits):
        raise ValueError(f"{image.name}: values beyond the {bits} bits of Bits Stored")
    return values


def _overlay_bits(image: _Image) -> list[int]:
    """Bits of the pixels that old overlays use, from 0; an overlay of its own has one bit
    allocated."""
    found = []
    for group in range(0x6000, 0x6020, 2):
        allocated, position = (image.integer((group, element)) for element in (0x0100, 0x0102))
        if allocated is not None and allocated > 1:
            found.append(position or 0)
    return found


def _native(dataset: Any, image: _Image, allocated: int, shape: tuple[int, int]) -> np.ndarray:
    """Uncompressed values as they are; pydicom cuts off what lies beyond Bits Stored."""
    if allocated not in (8, 16, 32):
        raise ValueError(f"{image.name}: {allocated} bits allocated")
    element, count = dataset.get_item(0x7FE00010), shape[0] * shape[1]
    data = b"" if element is None else element.value
    if len(data) < count * allocated // 8:
        raise ValueError(f"{image.name}: the pixel data ends early")
    order = "<" if dataset.original_encoding[1] else ">"
    kind = "i" if image.integer("PixelRepresentation") == 1 else "u"
    return np.frombuffer(data, f"{order}{kind}{allocated // 8}", count).reshape(shape)


def _check_plausible(counts: np.ndarray) -> None:
    """Raises ValueError if the values of a volume cannot be HU; `counts` [S, 4] as `_to_hu` returns
    them."""
    total, air, soft, dense = counts.sum(axis=0)
    if dense > 0.01 * total:
        raise ValueError(f"{100 * dense / total:.0f} % of the pixels are above 4000 HU")
    if soft < 0.01 * total:
        raise ValueError("no soft tissue between -200 and 300 HU")
    if air < 0.002 * total:
        raise ValueError("no air or lung between -1100 and -500 HU")


def _check_scale(volume: np.ndarray, slices: list[_Image]) -> None:
    """Raises ValueError if slices are on another scale than the slices around them (a wrong sign,
    intercept or slope, padding instead of an image).

    Two neighbours have nearly the same distribution of HU. Up to a third of the slices in a row may
    be such that the slices before and behind them are more alike.

    Args:
        volume: [S, H, W] HU.
        slices: the slices with their headers.
    """
    sample = volume[:, ::_SAMPLE_STEP, ::_SAMPLE_STEP]
    quantiles = _quantiles(sample)
    steps = _distance(quantiles[1:], quantiles[:-1])
    if len(volume) >= 3 and steps.max() > _JUMP_HU:
        for run in range(1, len(volume) // 3 + 1):
            before, behind = quantiles[: -run - 1], quantiles[run + 1 :]
            jump = np.minimum(
                _distance(before, quantiles[1:-run]), _distance(quantiles[run:-1], behind)
            )
            found = np.flatnonzero(jump > _JUMP_HU + 3 * _distance(before, behind))
            if len(found):
                name = slices[found[0] + 1].name
                raise ValueError(f"{name} has other values than its neighbours")
    scales = [(s.number("RescaleSlope"), s.number("RescaleIntercept")) for s in slices]
    for i in range(1, len(slices)):
        (slope, intercept), (other_slope, other_intercept) = scales[i], scales[i - 1]
        if scales[i] == scales[i - 1]:
            continue
        reread = (sample[i] - intercept) / slope * other_slope + other_intercept
        own = _distance(quantiles[i - 1], quantiles[i])
        if own > 8 and _distance(quantiles[i - 1], _quantiles(reread[None])[0]) < own / 3:
            raise ValueError(
                f"{slices[i].name} continues the slice below it by the rescale of that slice alone"
            )


def _quantiles(hu: np.ndarray) -> np.ndarray:
    """[S, 24] float32: the distribution of each slice's HU, of which metal is no part."""
    values = np.sort(hu.reshape(len(hu), -1), axis=1)
    places = np.rint(np.linspace(0.04, 0.96, 24) * (values.shape[1] - 1)).astype(int)
    return values[:, places].clip(-1000, 1000).astype(np.float32)


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean difference of two distributions, HU."""
    return np.abs(a - b).mean(axis=-1)


# ---- Whether this installation computes the stored outputs ---------------------------------------


@torch.inference_mode()
def verify(path: str | Path) -> dict[str, float]:
    """Compute the outputs of the folder's stored test input again.

    Returns:
        output -> largest absolute difference to the stored output, over the largest absolute stored
        value; for `codes` the share that differs.
    """
    model = load(path)
    package = _Package(_fetched(path))
    size = model.manifest["files"].get("test_input.npz", {}).get("bytes", sys.maxsize)
    stored = np.load(io.BytesIO(package.read("test_input.npz", size)))
    output = model(torch.from_numpy(stored["images"]))
    differences = {}
    for name in stored.files:
        if name == "images":
            continue
        expected = torch.from_numpy(stored[name])
        value = getattr(output, name)
        if name == "codes":
            differences[name] = float((value != expected).float().mean())
        else:
            differences[name] = float(
                (value - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
            )
    return differences


if __name__ == "__main__":
    measured = verify(sys.argv[1] if len(sys.argv) > 1 else ".")
    for output_name, difference in measured.items():
        print(f"{output_name:16} {difference:.2e}")
    within_rounding = all(
        value <= (0.01 if name == "codes" else 1e-3) for name, value in measured.items()
    )
    if not within_rounding:
        sys.exit(
            "this installation does not compute the stored outputs; install other versions of "
            "torch and numpy"
        )
    print("right: this installation computes the stored outputs, but for rounding")
