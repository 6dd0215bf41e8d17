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

import hashlib
import importlib.util
import io
import itertools
import json
import math
import sys
import zipfile
from collections.abc import Iterator, Sequence
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


# ---- Models: entries are named as in the authors' weights where these have them ------------------


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
        if images.shape[-1] % 4 or images.shape[-2] % 4:
            raise ValueError(
                f"image sides must be divisible by 4, got {images.shape[-2]} x {images.shape[-1]}"
            )
        return super().forward(images)

    def compress(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The first layer's features [B, F1, H / 2, W / 2], the third's [B, F2, H / 4, W / 4]."""
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
                "the preprocessed slices"
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
        """Images [B, C, H, W] in [0, 1], sides divisible by 16."""
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
        """Images [B, C, H, W] in [0, 1], sides divisible by 16."""
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
    model.__name__: model for model in (VQVAE, Classifier, UNet, StandardUNet, SEResNeXt)
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
    as `timm.create_model(..., features_only=True)` does. `forward_features`,
    `forward_head(pre_logits=True)` and `num_features` work as in timm's classification backbones.

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

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, C, H, W] in [0, 1] -> [B, F1, H / 2, W / 2] and [B, F, H / 4, W / 4]."""
        half, quarter = self.encoder.compress(images)
        return [half, self.encoder.refine(quarter)]

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> only the coarsest map."""
        return self(images)[-1]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over pixels: [B, F, h, w] -> [B, F]. Without a classification layer `pre_logits` has
        no effect.
        """
        return features.mean((2, 3))


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
        path: the folder, or a weights file in it (.safetensors or .pt).

    Raises:
        FileNotFoundError: the path, its manifest or its weights do not exist.
        ValueError: the weights are damaged or not the weights that the manifest describes.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    folder = path if path.is_dir() else path.parent
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(
            f"{folder}/manifest.json does not exist; give a folder that ctssl_jax.export wrote"
        )
    manifest = json.loads((folder / "manifest.json").read_text())
    weights = _read_weights(path if path.is_file() else _weights_in(folder), manifest)
    try:
        model = build(manifest)
        model.load_state_dict(weights, strict=True)
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{folder}: manifest.json does not describe these weights ({reason}); copy the whole "
            "folder again"
        ) from None
    return model.eval()


def _weights_in(folder: Path) -> Path:
    names = ["weights.pt", "weights.safetensors"]
    if importlib.util.find_spec("safetensors"):
        names.reverse()
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"{folder} contains neither weights.safetensors nor weights.pt; copy the whole folder again"
    )


def _read_weights(path: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    if path.name not in manifest["files"]:
        raise ValueError(
            f"{path} is not in its manifest; give one of {', '.join(manifest['files'])}"
        )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["files"][path.name]["sha256"]:
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
        return safetensors.torch.load(content)
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


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
    volume = np.where(volume < _BELOW_ANY_TISSUE_HU, np.asarray(AIR_HU, volume.dtype), volume)
    size, windows = preprocessing["image_size"], preprocessing["windows"]
    grey = np.stack([_window(_resize(image, spacing, size), windows) for image in volume])
    unit = torch.from_numpy(grey).permute(0, 3, 1, 2).float() / 255
    if preprocessing["normalize"] == "slice_minmax" and num_slices == 1:
        unit = _stretched(unit)
    channels = preprocessing["in_channels"]
    return unit.expand(-1, channels, -1, -1).contiguous() if unit.shape[1] == 1 else unit


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


def _resize(hu: np.ndarray, spacing: tuple[float, float], size: int) -> np.ndarray:
    """The whole field as a square [size, size], undistorted: padded with air, then averaged
    (antialiased bilinear).
    """
    if math.isclose(*spacing, rel_tol=1e-3) and hu.shape == (size, size):
        return hu
    from PIL import Image

    field = max(hu.shape[0] * spacing[0], hu.shape[1] * spacing[1])
    rows, columns = field / spacing[0], field / spacing[1]
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


# ---- DICOM ---------------------------------------------------------------------------------------


def read_dicom(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """One CT series in Hounsfield units.

    Slices are sorted along their normal, and each gets its Rescale Slope and Intercept. Padding and
    values below -1500 HU become air (-1000). Localizers and objects of other modalities are left
    out.

    Args:
        path: folder (searched through) or zip file with the series.

    Returns:
        [S, H, W] float32 and the affine [4, 4] for `preprocess`.

    Raises:
        ValueError: not exactly one CT series; or slices that are missing, lack tags, lie at one
            position or on several grids.
    """
    try:
        import pydicom
    except ImportError:
        raise ImportError("read_dicom needs the package pydicom: pip install pydicom") from None
    series: dict[str, list[Any]] = {}
    for name, content in _files(Path(path)):
        try:
            dataset = pydicom.dcmread(io.BytesIO(content), force=True)  # also without the preamble
        except Exception:  # a file of another kind may raise anything
            continue
        if dataset.get("Modality") != "CT" or "LOCALIZER" in dataset.get("ImageType", []):
            continue
        if "NumberOfFrames" in dataset:
            raise ValueError(
                f"{name}: enhanced multi-frame CT cannot be read here; convert it to single-frame "
                "DICOM"
            )
        # A file without preamble and meta information does not name its transfer syntax.
        if "TransferSyntaxUID" not in dataset.file_meta:
            explicit = not dataset.original_encoding[0]
            dataset.file_meta.TransferSyntaxUID = (
                pydicom.uid.ExplicitVRLittleEndian
                if explicit
                else pydicom.uid.ImplicitVRLittleEndian
            )
        missing = [tag for tag in _NEEDED_TAGS if dataset.get(tag) in (None, "")]
        if missing:
            raise ValueError(f"{name} lacks {', '.join(missing)}")
        series.setdefault(dataset.SeriesInstanceUID, []).append(dataset)
    if len(series) != 1:
        sizes = ", ".join(str(len(slices)) for slices in series.values())
        content = f"{len(series)} CT series (of {sizes} slices)" if series else "no CT series"
        raise ValueError(f"{path} contains {content}; give the folder of one series")
    (slices,) = series.values()
    return _stack(path, slices)


_NEEDED_TAGS = (
    *("SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
    *("RescaleSlope", "RescaleIntercept", "Rows", "Columns"),
)


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in sorted(item for item in path.rglob("*") if item.is_file()):
            yield str(file.relative_to(path)), file.read_bytes()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if not name.endswith("/"):
                    yield name, archive.read(name)
    else:
        raise ValueError(f"{path} is neither a folder nor a zip file; give the folder of a series")


def _stack(path: Any, slices: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    first = slices[0]
    grids = {
        (*map(float, s.ImageOrientationPatient), *map(float, s.PixelSpacing), s.Rows, s.Columns)
        for s in slices
    }
    if len({tuple(round(value, 4) for value in grid) for grid in grids}) > 1:
        raise ValueError(
            f"{path}: the slices differ in orientation, spacing or matrix; give the folder of one "
            "reconstruction"
        )
    along_columns, along_rows = np.array(first.ImageOrientationPatient, dtype=float).reshape(2, 3)
    normal = np.cross(along_columns, along_rows)
    origins = np.array([slice_.ImagePositionPatient for slice_ in slices], dtype=float)
    order = np.argsort(origins @ normal, kind="stable")
    origins = origins[order]
    if len(slices) < 2 or np.diff(origins @ normal).min() < 1e-3:
        problem = "one slice only" if len(slices) < 2 else "two slices at one position"
        raise ValueError(f"{path}: {problem}; give the folder of one complete series")
    steps = np.diff(origins @ normal)
    if steps.max() > 1.5 * np.median(steps):
        raise ValueError(
            f"{path}: slices are missing (a step of {steps.max():g} mm among steps of "
            f"{np.median(steps):g} mm); give the complete series"
        )
    volume = np.stack([_to_hu(slices[index]) for index in order])
    affine = np.eye(4)
    affine[:3, 0] = (origins[-1] - origins[0]) / (len(slices) - 1)
    affine[:3, 1] = along_rows * float(first.PixelSpacing[0])
    affine[:3, 2] = along_columns * float(first.PixelSpacing[1])
    affine[:3, 3] = origins[0]
    affine[:2] *= -1  # DICOM's x to left and y to posterior, turned to RAS+
    return volume, affine


def _to_hu(dataset: Any) -> np.ndarray:
    stored = dataset.pixel_array
    slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
    hu = stored * slope + intercept
    air = hu < _BELOW_ANY_TISSUE_HU
    padding = dataset.get("PixelPaddingValue")
    if padding is not None:
        limit = dataset.get("PixelPaddingRangeLimit")
        low, high = sorted((int(padding), int(padding if limit is None else limit)))
        if not any(
            _TISSUE_HU[0] < bound * slope + intercept < _TISSUE_HU[1] for bound in (low, high)
        ):
            air |= (stored >= low) & (stored <= high)
    hu[air] = AIR_HU
    return hu.astype(np.float32)


# ---- Whether this installation computes the stored outputs ---------------------------------------


@torch.inference_mode()
def verify(path: str | Path) -> dict[str, float]:
    """Compute the outputs of the folder's stored test input again.

    Returns:
        output -> largest absolute difference to the stored output, over the largest absolute stored
        value; for `codes` the share that differs.
    """
    model = load(path)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    stored = np.load(folder / "test_input.npz")
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
    sys.exit(
        0
        if within_rounding
        else "this installation does not compute the stored outputs; install other versions of "
        "torch and numpy"
    )
