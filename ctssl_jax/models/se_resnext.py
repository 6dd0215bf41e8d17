"""SE-ResNeXt-50 32x4d, the network that the winner of the RSNA pulmonary-embolism challenge
applied to slices (paper, section II.D, "SOTA").

A 7 x 7 convolution with stride 2 and a max-pooling, then stages of bottleneck blocks (1 x 1,
grouped 3 x 3 that carries the stride, 1 x 1, squeeze and excitation, residual add), mean over
pixels, linear layer. Reference size: 25,512,945 trainable parameters with one class, 27,559,896
with 1,000.

Names of the modules, which are the keys of checkpoints; `ctssl_jax.torch_bridge.names` has
PyTorch's beside them:

    stem.conv|norm
    stages.s.i.conv{1,2,3}.conv|norm      convolutions without bias
    stages.s.i.squeeze, .excite           1 x 1 with bias
    stages.s.i.downsample.conv|norm       in the first block of each stage
    classification                        linear: kernel, bias
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ctssl_jax.models.layers import KERNEL_INIT, ConvNorm, PointwiseConv

EXPANSION = 4  # features that leave a block, over the plain width of its stage
SQUEEZE_REDUCTION = 16
BACKBONE = ("stem", "stages")  # what ImageNet weights give


@dataclasses.dataclass(frozen=True)
class SEResNeXtConfig:
    """Size of the network. The defaults are SE-ResNeXt-50 32x4d.

    Attributes:
        num_classes: number of logits; 1 for a yes-or-no label.
        in_channels: channels of the images (three adjacent slices).
        layers: blocks of each stage.
        width: features of the stem; stage s has 2 width 2^s inside a block, 4 width 2^s after it.
        groups: groups of the 3 x 3 convolutions; divides 2 width.
        pooling: "legacy" (the winner's network), no padding and rounded up, or "timm", one pixel of
            padding on each side: the only difference between the two published networks. Use the
            one that the weights were trained with. "auto" becomes "legacy".
        dtype: "float32" or "bfloat16" for convolutions and activations; logits and embedding are
            float32.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    num_classes: int = 1
    in_channels: int = 3
    layers: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    groups: int = 32
    pooling: str = "legacy"
    dtype: str = "float32"

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.pooling == "auto":
            object.__setattr__(self, "pooling", "legacy")
        for name in ("num_classes", "in_channels", "width", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.layers or min(self.layers) < 1:
            raise ValueError(
                f"layers must be one or more positive numbers of blocks, got {self.layers}"
            )
        if 2 * self.width % self.groups:
            raise ValueError(f"groups must divide 2 width = {2 * self.width}, got {self.groups}")
        if EXPANSION * self.width < SQUEEZE_REDUCTION:
            raise ValueError(
                f"width must be at least {SQUEEZE_REDUCTION // EXPANSION}, got {self.width}"
            )
        for name, allowed in (("pooling", ("legacy", "timm")), ("dtype", ("float32", "bfloat16"))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )

    @property
    def stage_widths(self) -> tuple[tuple[int, int], ...]:
        """(features inside a block, features after it) of each stage."""
        return tuple(
            (2 * self.width << stage, EXPANSION * self.width << stage)
            for stage in range(len(self.layers))
        )


class SEResNeXtOutput(NamedTuple):
    """Outputs of the network for images [B, H, W, C].

    logits: [B, num_classes] float32.
    embedding: [B, D] float32, the last stage's features averaged over pixels; D = 2048 at the
      reference size.
    """

    logits: jax.Array
    embedding: jax.Array


class _Block(nnx.Module):
    """Bottleneck with squeeze and excitation.

    [B, H, W, I] -> [B, H / stride, W / stride, O], sides rounded up.
    """

    def __init__(
        self,
        in_features: int,
        inner: int,
        out_features: int,
        stride: int,
        groups: int,
        dtype,
        rngs: nnx.Rngs,
    ):
        common = dict(use_bias=False, dtype=dtype, rngs=rngs)
        self.stride = stride
        self.conv1 = ConvNorm(in_features, inner, 1, **common)
        self.conv2 = ConvNorm(inner, inner, 3, stride=stride, groups=groups, **common)
        self.conv3 = ConvNorm(inner, out_features, 1, **common)
        squeezed = out_features // SQUEEZE_REDUCTION
        self.squeeze = PointwiseConv(out_features, squeezed, use_bias=True, dtype=dtype, rngs=rngs)
        self.excite = PointwiseConv(squeezed, out_features, use_bias=True, dtype=dtype, rngs=rngs)
        changes_shape = stride > 1 or in_features != out_features
        self.downsample = (
            ConvNorm(in_features, out_features, 1, **common) if changes_shape else None
        )

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = jax.nn.relu(self.conv1(x, train=train))
        y = jax.nn.relu(self.conv2(y, train=train))
        y = self.conv3(y, train=train)
        mean = jnp.mean(y.astype(jnp.float32), axis=(1, 2), keepdims=True)
        gate = self.excite(jax.nn.relu(self.squeeze(mean)))
        y = y * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(y.dtype)
        if self.downsample is not None:
            # A 1 x 1 convolution with a stride reads only every stride-th pixel.
            x = self.downsample(x[:, :: self.stride, :: self.stride], train=train)
        return jax.nn.relu(x + y)


class SEResNeXt(nnx.Module):
    """Squeeze-and-excitation ResNeXt."""

    def __init__(self, config: SEResNeXtConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.config = config
        self.dtype = dtype
        self.stem = ConvNorm(
            config.in_channels, config.width, 7, stride=2, use_bias=False, dtype=dtype, rngs=rngs
        )
        stages, before = [], config.width
        for stage, (depth, (inner, after)) in enumerate(
            zip(config.layers, config.stage_widths, strict=True)
        ):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(_Block(before, inner, after, stride, config.groups, dtype, rngs))
                before = after
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.classification = nnx.Linear(
            before, config.num_classes, kernel_init=KERNEL_INIT, rngs=rngs
        )

    def __call__(
        self, images: jax.Array, *, train: bool, frozen_encoder: bool = False
    ) -> SEResNeXtOutput:
        """Classify.

        Args:
            images: [B, H, W, C] float; H and W at least 5.
            train: use and update batch statistics; False changes no state.
            frozen_encoder: all but the linear layer behaves as in evaluation.

        Returns:
            SEResNeXtOutput.

        Raises:
            ValueError: the images are too small to be pooled.
        """
        if min(images.shape[1:3]) < 5:
            raise ValueError(
                f"image sides must be at least 5, got {images.shape[1]} x {images.shape[2]}"
            )
        train = train and not frozen_encoder
        x = jax.nn.relu(self.stem(images.astype(self.dtype), train=train))
        x = nnx.max_pool(
            x, (3, 3), strides=(2, 2), padding=[_pool_padding(n, self.config) for n in x.shape[1:3]]
        )
        for blocks in self.stages:
            for block in blocks:
                x = block(x, train=train)
        embedding = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return SEResNeXtOutput(self.classification(embedding), embedding)


def _pool_padding(size: int, config: SEResNeXtConfig) -> tuple[int, int]:
    """Pixels before and behind a side. "legacy" rounds up without padding, which equals 1 pixel
    behind an even side and 0 behind an odd side.
    """
    return (1, 1) if config.pooling == "timm" else (0, 1 - size % 2)


def flops_per_slice(config: SEResNeXtConfig, image_size: int) -> int:
    """Floating-point operations of one forward pass of one image, a multiply-add counted as two.

    Counts convolutions and the linear layer; a training step does three times as many.

    Args:
        image_size: side in pixels.
    """
    side = (image_size + 1) // 2
    total = 49 * config.in_channels * config.width * side * side
    low, high = _pool_padding(side, config)
    side = (side + low + high - 3) // 2 + 1
    before = config.width
    for stage, (depth, (inner, after)) in enumerate(
        zip(config.layers, config.stage_widths, strict=True)
    ):
        for index in range(depth):
            total += before * inner * side * side
            if stage > 0 and index == 0:
                side = (side + 1) // 2
            total += (9 * inner * inner // config.groups + inner * after) * side * side
            total += 2 * after * (after // SQUEEZE_REDUCTION)
            if index == 0:
                total += before * after * side * side
            before = after
    return 2 * (total + before * config.num_classes)


def backbone_flops(config: SEResNeXtConfig, image_size: int) -> int:
    """The share of all layers but the linear one in `flops_per_slice`."""
    features = config.stage_widths[-1][1]
    return flops_per_slice(config, image_size) - 2 * features * config.num_classes
