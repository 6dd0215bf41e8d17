"""The model of sparse masked modelling (SparK, arXiv 2301.03580): the autoencoder's encoder, which
sees visible positions alone, and a light decoder.

Names of the modules, which are the keys of checkpoints:

    encoder.*                             as in the autoencoder: encoders move between all tasks
    mask_token                            [D], the latent of a masked position
    light_decoder.stem.conv|norm          3 x 3, leaky ReLU
    light_decoder.blocks.i.conv3|norm|conv1
                                          residual blocks, then leaky ReLU
    light_decoder.pixels                  1 x 1: kernel, bias; the 4 x 4 pixels of a latent
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from ctssl_jax.models.joint_embedding import (
    POOLED,
    JointEmbeddingOutput,
    encode,
)
from ctssl_jax.models.layers import (
    ConvNorm,
    PointwiseConv,
    ResidualBlock,
    apply_blocks,
    leaky_relu,
)
from ctssl_jax.models.vqvae import Encoder, VQVAEConfig, encoder_flops, encoder_settings


@dataclasses.dataclass(frozen=True)
class SparkConfig:
    """Size and behaviour of the model. The defaults are the reference size.

    Attributes:
        decoder_depth: residual blocks of the decoder, of hidden[0] features.
        pooled: what the feature of a slice is the mean of, as in `JointEmbeddingConfig`.
        in_channels, hidden, depth, embedding_dim, drop_rate, remat, scan, dtype: settings of the
            encoder, as in `VQVAEConfig`; the decoder has the same dtype.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    decoder_depth: int = 4
    pooled: str = "latents"
    in_channels: int = 1
    hidden: tuple[int, int] = (256, 512)
    depth: int = 18
    embedding_dim: int = 64
    drop_rate: float = 0.0
    remat: bool = False
    scan: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        if self.decoder_depth < 0:
            raise ValueError(f"decoder_depth must not be negative, got {self.decoder_depth}")
        if self.pooled not in POOLED:
            raise ValueError(f"pooled must be one of {', '.join(POOLED)}, got {self.pooled!r}")
        object.__setattr__(self, "hidden", self.encoder.hidden)

    @property
    def encoder(self) -> VQVAEConfig:
        """The settings of the encoder, checked."""
        return encoder_settings(self)


class _Decoder(nnx.Module):
    def __init__(self, config: SparkConfig, *, rngs: nnx.Rngs):
        width, dtype = config.hidden[0], jnp.dtype(config.dtype)
        self.remat, self.scan, self.dtype = config.remat, config.scan, dtype
        self.stem = ConvNorm(config.embedding_dim, width, 3, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [ResidualBlock(width, dtype=dtype, rngs=rngs) for _ in range(config.decoder_depth)]
        )
        pixels = Encoder.stride**2 * config.in_channels
        self.pixels = PointwiseConv(width, pixels, use_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, latents: jax.Array, *, train: bool) -> jax.Array:
        """[B, h, w, D] -> [B, 4h, 4w, C] float32."""
        x = leaky_relu(self.stem(latents.astype(self.dtype), train=train))
        x = apply_blocks(self.blocks, x, None, train=train, remat=self.remat, scan=self.scan)
        x = self.pixels(leaky_relu(x)).astype(jnp.float32)
        side, (number, height, width, _) = Encoder.stride, x.shape
        x = x.reshape(number, height, width, side, side, -1).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(number, height * side, width * side, -1)


class Spark(nnx.Module):
    """Encoder, mask token and decoder. Applied to images it is the encoder with the feature of each
    slice, as a joint embedding."""

    architecture = "JointEmbedding"  # of its exports

    def __init__(self, config: SparkConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config.encoder, rngs=rngs)
        token = 0.02 * jax.random.normal(rngs.params(), (config.embedding_dim,), jnp.float32)
        self.mask_token = nnx.Param(token)
        self.light_decoder = _Decoder(config, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool) -> JointEmbeddingOutput:
        """As `JointEmbedding`, without dropout: all positions are visible."""
        return encode(self.encoder, images, self.config.pooled, train=train)

    def reconstruct(
        self,
        images: jax.Array,
        visible: jax.Array,
        *,
        train: bool,
        key: jax.Array | None = None,
        frozen_encoder: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """Predict all pixels from the visible ones.

        Args:
            images: [B, H, W, C] float in [0, 1]; H and W divisible by 4.
            visible: [B, H, W, 1] float32, as `Encoder`.
            train: use and update batch statistics, apply dropout.
            key: for dropout; needed in training if drop_rate > 0.
            frozen_encoder: the encoder behaves as in evaluation.

        Returns:
            prediction [B, H, W, C] float32 of any values, and latents [B, H / 4, W / 4, D] float32,
            0 where nothing is visible.
        """
        learns = train and not frozen_encoder
        latents = self.encoder(images, train=learns, key=key, visible=visible)
        seen = visible[:, :: Encoder.stride, :: Encoder.stride]
        filled = latents + (1 - seen) * self.mask_token[...]
        return self.light_decoder(filled, train=train), latents


def flops_per_slice(config: SparkConfig, image_size: int) -> int:
    """Floating-point operations of one forward pass of one slice. Masked positions cost as much as
    visible ones, since convolutions are dense."""
    width, positions = config.hidden[0], (image_size // Encoder.stride) ** 2
    stem = 9 * config.embedding_dim * width
    pixels = Encoder.stride**2 * config.in_channels * width
    decoder = stem + config.decoder_depth * (9 + 1) * width * width + pixels
    return encoder_flops(config.encoder, image_size) + 2 * positions * decoder
