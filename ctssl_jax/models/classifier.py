"""The classifier of the pretext tasks that predict a label: the autoencoder's encoder, then
compression and classification layers (paper, section II.B). The paper names these layers without
their sizes, so the sizes are our choice.

Names of the modules, which are the keys of checkpoints:

    encoder.*                             as in the autoencoder: encoders move between the two
    compression.i.conv|norm               3 x 3 stride 2, leaky ReLU
    classification                        linear: kernel, bias
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ctssl_jax.models.layers import KERNEL_INIT, ConvNorm, leaky_relu
from ctssl_jax.models.vqvae import Encoder, VQVAEConfig, encoder_flops, encoder_settings


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Size and behaviour of the classifier. The defaults are the reference size; its encoder has
    51.7 million parameters.

    Attributes:
        num_classes: number of labels.
        compression: features after each 3 x 3 convolution with stride 2 on the latents.
        in_channels, hidden, depth, embedding_dim, drop_rate, remat, scan, dtype: settings of the
            encoder, as in `VQVAEConfig`; the compression layers have the same dtype.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    num_classes: int
    compression: tuple[int, ...] = (128, 256)
    in_channels: int = 1
    hidden: tuple[int, int] = (256, 512)
    depth: int = 18
    embedding_dim: int = 64
    drop_rate: float = 0.0
    remat: bool = False
    scan: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        object.__setattr__(self, "compression", tuple(self.compression))
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {self.num_classes}")
        if not self.compression or min(self.compression) < 1:
            raise ValueError(
                f"compression must be one or more positive widths, got {self.compression}"
            )
        object.__setattr__(self, "hidden", self.encoder.hidden)

    @property
    def encoder(self) -> VQVAEConfig:
        """The settings of the encoder, checked."""
        return encoder_settings(self)


class ClassifierOutput(NamedTuple):
    """What the classifier returns for images [B, H, W, C].

    logits: [B, num_classes] float32.
    latents: [B, H / 4, W / 4, D] float32, the encoder's output.
    """

    logits: jax.Array
    latents: jax.Array


class Classifier(nnx.Module):
    """Encoder, strided convolutions on its latents (without a quantizer), mean over pixels, linear
    layer.
    """

    def __init__(self, config: ClassifierConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.config = config
        self.encoder = Encoder(config.encoder, rngs=rngs)
        widths = (config.embedding_dim, *config.compression)
        self.compression = nnx.List(
            [
                ConvNorm(before, after, 3, stride=2, dtype=dtype, rngs=rngs)
                for before, after in itertools.pairwise(widths)
            ]
        )
        self.classification = nnx.Linear(
            widths[-1], config.num_classes, kernel_init=KERNEL_INIT, rngs=rngs
        )

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool,
        key: jax.Array | None = None,
        frozen_encoder: bool = False,
    ) -> ClassifierOutput:
        """Classify.

        Args:
            images: [B, H, W, C] float in [0, 1]; H and W divisible by 4.
            train: use and update batch statistics, apply dropout; False changes no state.
            key: for dropout; needed in training if drop_rate > 0.
            frozen_encoder: the encoder behaves as in evaluation.

        Returns:
            ClassifierOutput.

        Raises:
            ValueError: as `Encoder`.
        """
        x = latents = self.encoder(images, train=train and not frozen_encoder, key=key)
        for layer in self.compression:
            x = leaky_relu(layer(x, train=train))
        return ClassifierOutput(
            self.classification(jnp.mean(x.astype(jnp.float32), axis=(1, 2))), latents
        )


def flops_per_slice(config: ClassifierConfig, image_size: int) -> int:
    """Floating-point operations of one forward pass of one slice, a multiply-add counted as two.

    Counts convolutions and the linear layer; a training step does three times as many.

    Args:
        image_size: side in pixels.
    """
    total = encoder_flops(config.encoder, image_size)
    side, before = image_size // Encoder.stride, config.embedding_dim
    for after in config.compression:
        side = (side + 1) // 2
        total += 2 * 9 * before * after * side * side
        before = after
    return total + 2 * before * config.num_classes
