"""Segmentation networks: a U-Net whose down branch is the pretraining's encoder, and a standard
U-Net as reference (paper, section II.E). The paper names the encoder's "compression layers" as the
down branch and leaves the rest open, so the rest is our choice.

The first network has the same graph for every start, so that a pretrained and a random start differ
only in the encoder's weights. All other weights are random in both cases:

    full resolution   stem                                            -> skip
    1/2               encoder.downsample.0                            -> skip
    1/4               encoder.downsample.1, encoder.stem              -> skip
                      with residual_stack also encoder.blocks and
                      encoder.project, on the way down only
    1/8               max-pooling, pooled.0                           -> skip
    1/16              max-pooling, pooled.1
    1/8 ... 1         up.{3,2,1,0}: transposed convolution, concatenation with the skip,
                      two convolutions
    full resolution   head, 1 x 1

Names of the modules, which are the keys of checkpoints:

    encoder.*                             as in the autoencoder: encoders move between the two
    stem.{0,1}.conv|norm                  3 x 3, ReLU
    pooled.i.{0,1}.conv|norm              3 x 3, ReLU (standard U-Net: down.i.{0,1})
    up.i.upsample.conv|norm               4 x 4 transposed stride 2, ReLU; i = 0 is full resolution
    up.i.convolutions.{0,1}.conv|norm     3 x 3, ReLU
    head                                  1 x 1: kernel, bias
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ctssl_jax.models.layers import ConvNorm, PointwiseConv, TransposedConvNorm
from ctssl_jax.models.vqvae import (
    Encoder,
    VQVAEConfig,
    encoder_flops,
    encoder_settings,
    level_pixels,
)

STRIDE = 16
_NUM_LEVELS = 5
# Masks are small: without this start the network needs hundreds of steps to learn that nearly all
# pixels are background.
FOREGROUND_PRIOR = 0.01


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Size and behaviour of the U-Net around the encoder. The defaults are the reference size.

    Attributes:
        in_channels, hidden, depth, embedding_dim, drop_rate, remat, scan: settings of the encoder,
            as in `VQVAEConfig`. Only the first two matter without residual_stack.
        residual_stack: the way down includes the encoder's residual blocks and projection.
        widths: features of the random parts at 1, 1/2, 1/4, 1/8 and 1/16 of the resolution (at 1/2
            and 1/4 of the up branch alone); empty takes (hidden[0] / 4, hidden[0] / 2,
            hidden[1] / 2, hidden[1], hidden[1]).
        dtype: "float32" or "bfloat16" for convolutions and activations; logits and embedding are
            float32.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    in_channels: int = 1
    hidden: tuple[int, int] = (256, 512)
    depth: int = 18
    embedding_dim: int = 64
    drop_rate: float = 0.0
    residual_stack: bool = False
    widths: tuple[int, ...] = ()
    remat: bool = False
    scan: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        object.__setattr__(self, "hidden", self.encoder.hidden)
        first, second = self.hidden
        derived = (max(first // 4, 1), max(first // 2, 1), max(second // 2, 1), second, second)
        object.__setattr__(self, "widths", _checked_widths(self.widths or derived))

    @property
    def encoder(self) -> VQVAEConfig:
        """The settings of the encoder, checked."""
        return encoder_settings(self)


@dataclasses.dataclass(frozen=True)
class StandardUNetConfig:
    """Size of the standard U-Net.

    Attributes:
        in_channels: channels of the images.
        widths: features at 1, 1/2, 1/4, 1/8 and 1/16 of the resolution.
        dtype: "float32" or "bfloat16" for convolutions and activations.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    in_channels: int = 1
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    dtype: str = "float32"

    def __post_init__(self):
        object.__setattr__(self, "widths", _checked_widths(self.widths))
        if self.in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {self.in_channels}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be one of float32, bfloat16, got {self.dtype!r}")


def _checked_widths(widths) -> tuple[int, ...]:
    widths = tuple(widths)
    if len(widths) != _NUM_LEVELS or min(widths) < 1:
        raise ValueError(f"widths must be {_NUM_LEVELS} positive numbers of features, got {widths}")
    return widths


class UNetOutput(NamedTuple):
    """Outputs of both networks for images [B, H, W, C].

    logits: [B, H, W] float32; above 0 where foreground is more likely than background.
    embedding: [B, widths[4]] float32, the features at 1/16 of the resolution averaged over pixels.
    """

    logits: jax.Array
    embedding: jax.Array


def _two_convolutions(in_features: int, out_features: int, dtype, rngs: nnx.Rngs) -> nnx.List:
    widths = (in_features, out_features, out_features)
    return nnx.List(
        [
            ConvNorm(before, after, 3, dtype=dtype, rngs=rngs)
            for before, after in itertools.pairwise(widths)
        ]
    )


def _apply_relu(layers: nnx.List, x: jax.Array, *, train: bool) -> jax.Array:
    for layer in layers:
        x = jax.nn.relu(layer(x, train=train))
    return x


def _max_pool(x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (2, 2), strides=(2, 2))


class _Up(nnx.Module):
    """Double the resolution, concatenate the skip, two convolutions.

    [B, h, w, I] and [B, 2h, 2w, S] -> [B, 2h, 2w, O].
    """

    def __init__(
        self, in_features: int, skip_features: int, out_features: int, *, dtype, rngs: nnx.Rngs
    ):
        self.upsample = TransposedConvNorm(in_features, out_features, dtype=dtype, rngs=rngs)
        self.convolutions = _two_convolutions(
            out_features + skip_features, out_features, dtype, rngs
        )

    def __call__(self, x: jax.Array, skip: jax.Array, *, train: bool) -> jax.Array:
        x = jax.nn.relu(self.upsample(x, train=train))
        return _apply_relu(self.convolutions, jnp.concatenate([skip, x], axis=-1), train=train)


def _up_branch(widths: tuple[int, ...], skips: tuple[int, ...], dtype, rngs: nnx.Rngs) -> nnx.List:
    """Stages from full resolution (index 0) to 1/8; each gets the width of the level below it."""
    return nnx.List(
        [
            _Up(below, skip, here, dtype=dtype, rngs=rngs)
            for here, below, skip in zip(widths[:-1], widths[1:], skips, strict=True)
        ]
    )


def _head(in_features: int, rngs: nnx.Rngs) -> PointwiseConv:
    """Logits that begin around `FOREGROUND_PRIOR`."""
    head = PointwiseConv(in_features, 1, use_bias=True, dtype=jnp.float32, rngs=rngs)
    head.bias[...] = jnp.full(1, math.log(FOREGROUND_PRIOR / (1 - FOREGROUND_PRIOR)))
    return head


def _decode(
    up: nnx.List, head: PointwiseConv, bottom: jax.Array, skips: list[jax.Array], *, train: bool
) -> UNetOutput:
    x = bottom
    for stage, skip in zip(reversed(list(up)), reversed(skips), strict=True):
        x = stage(x, skip, train=train)
    embedding = jnp.mean(bottom.astype(jnp.float32), axis=(1, 2))
    return UNetOutput(head(x)[..., 0], embedding)


def _check_sides(images: jax.Array) -> None:
    height, width = images.shape[1:3]
    if height % STRIDE or width % STRIDE:
        raise ValueError(f"image sides must be divisible by {STRIDE}, got {height} x {width}")


class UNet(nnx.Module):
    """U-Net whose down branch is the pretraining's encoder; the latents are not quantized.

    The random parts are built before the encoder, so that one seed gives them the same values for
    every encoder. (Only the first pooled convolution differs with residual_stack, since it reads
    embedding_dim features.)
    """

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.config = config
        first, second = config.hidden
        widths = config.widths
        self.up = _up_branch(widths, (widths[0], first, second, widths[3]), dtype, rngs)
        self.head = _head(widths[0], rngs)
        self.stem = _two_convolutions(config.in_channels, widths[0], dtype, rngs)
        deepest = config.embedding_dim if config.residual_stack else second
        self.pooled = nnx.List(
            [
                _two_convolutions(before, after, dtype, rngs)
                for before, after in itertools.pairwise((deepest, *widths[3:]))
            ]
        )
        self.encoder = Encoder(
            config.encoder, rngs=rngs, compression_only=not config.residual_stack
        )

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool,
        key: jax.Array | None = None,
        frozen_encoder: bool = False,
    ) -> UNetOutput:
        """Segment.

        Args:
            images: [B, H, W, C] float in [0, 1]; H and W divisible by 16.
            train: use and update batch statistics, apply dropout; False changes no state.
            key: for dropout; needed in training if drop_rate > 0 and residual_stack.
            frozen_encoder: the encoder behaves as in evaluation.

        Returns:
            UNetOutput.

        Raises:
            ValueError: sides not divisible by 16, or the key is missing.
        """
        _check_sides(images)
        encoder_train = train and not frozen_encoder
        if self.config.residual_stack:
            self.encoder.check_key(encoder_train, key)  # before any batch statistic changes
        full = _apply_relu(self.stem, images, train=train)
        half, quarter = self.encoder.compress(images, train=encoder_train)
        deepest = quarter
        if self.config.residual_stack:
            deepest = self.encoder.refine(quarter, train=encoder_train, key=key)
        eighth = _apply_relu(self.pooled[0], _max_pool(deepest), train=train)
        bottom = _apply_relu(self.pooled[1], _max_pool(eighth), train=train)
        return _decode(self.up, self.head, bottom, [full, half, quarter, eighth], train=train)


class StandardUNet(nnx.Module):
    """U-Net with two padded 3 x 3 convolutions a level, batch normalisation, four max-poolings."""

    def __init__(self, config: StandardUNetConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.config = config
        self.down = nnx.List(
            [
                _two_convolutions(before, after, dtype, rngs)
                for before, after in itertools.pairwise((config.in_channels, *config.widths))
            ]
        )
        self.up = _up_branch(config.widths, config.widths[:-1], dtype, rngs)
        self.head = _head(config.widths[0], rngs)

    def __call__(self, images: jax.Array, *, train: bool) -> UNetOutput:
        """As `UNet`, without randomness."""
        _check_sides(images)
        levels = [_apply_relu(self.down[0], images, train=train)]
        for layers in list(self.down)[1:]:
            levels.append(_apply_relu(layers, _max_pool(levels[-1]), train=train))
        return _decode(self.up, self.head, levels[-1], levels[:-1], train=train)


def _up_flops(widths: tuple[int, ...], skips: tuple[int, ...], pixels: list[int]) -> int:
    """Operations of the up branch and the head."""
    total = 2 * widths[0] * pixels[0]
    for level, skip in enumerate(skips):
        here, below = widths[level], widths[level + 1]
        total += 2 * (
            16 * below * here * pixels[level + 1] + 9 * (2 * here + skip) * here * pixels[level]
        )
    return total


def flops_per_slice(config: UNetConfig, image_size: int | tuple[int, int]) -> int:
    """Floating-point operations of one forward pass of `UNet` on a slice, a multiply-add being two.

    Counts convolutions. A training step does three times as many.

    Args:
        image_size: side, or (height, width), in pixels.
    """
    (first, second), widths = config.hidden, config.widths
    pixels = level_pixels(image_size, _NUM_LEVELS)
    deepest = config.embedding_dim if config.residual_stack else second
    down = 9 * (config.in_channels + widths[0]) * widths[0] * pixels[0]
    down += (
        9 * (deepest + widths[3]) * widths[3] * pixels[3]
        + 9 * (widths[3] + widths[4]) * widths[4] * pixels[4]
    )
    encoder = encoder_flops_per_slice(config, image_size)
    return encoder + 2 * down + _up_flops(widths, (widths[0], first, second, widths[3]), pixels)


def encoder_flops_per_slice(config: UNetConfig, image_size: int | tuple[int, int]) -> int:
    """The share of the encoder in `flops_per_slice`."""
    return encoder_flops(config.encoder, image_size, compression_only=not config.residual_stack)


def standard_flops_per_slice(config: StandardUNetConfig, image_size: int | tuple[int, int]) -> int:
    """`flops_per_slice` for `StandardUNet`."""
    widths, pixels = config.widths, level_pixels(image_size, _NUM_LEVELS)
    levels = zip((config.in_channels, *widths), widths, pixels, strict=False)
    down = sum(9 * (before + after) * after * count for before, after, count in levels)
    return 2 * down + _up_flops(widths, widths[:-1], pixels)
