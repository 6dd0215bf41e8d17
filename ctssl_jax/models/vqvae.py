"""The vector-quantized autoencoder of the pretext tasks: encoder, codebook, decoder, at any size.

At the reference size (512 x 512, hidden (256, 512), depth 18, embedding 64, 512 codes) with 3 input
channels it has 101,353,673 trainable parameters, 51,709,888 of them in the encoder.

Names of the modules, which are the keys of checkpoints, beside the entries of the PyTorch layout of
the authors' weights (d = depth). Kernels are HWIO here; from OIHW `transpose(2, 3, 1, 0)`.
Transposed kernels are HWIO too: PyTorch's IOHW mirrored in H and W, then `transpose(2, 3, 0, 1)`.

    here                                  PyTorch
    encoder.downsample.{0,1}.conv|norm    encoder.{0,1}.{0|1}            4 x 4 stride 2, leaky ReLU
    encoder.stem.conv|norm                encoder.2.{0|1}                3 x 3, leaky ReLU
    encoder.blocks.i.conv3|norm|conv1     encoder.{3+i}.resblock.{0|2|4} (1 is a dropout, 3 a ReLU)
                                          encoder.{3+d}                  leaky ReLU
    encoder.project.conv|norm             encoder.{4+d}.{0|1}            1 x 1, leaky ReLU
    quantizer.codebook                    vq_layer.embedding.weight
    decoder.stem.conv|norm                decoder.0.{0|1}                3 x 3, leaky ReLU
    decoder.blocks.i.conv3|norm|conv1     decoder.{1+i}.resblock.{0|1|3} (no dropout entry)
                                          decoder.{1+d}                  leaky ReLU
    decoder.upsample.{0,1}.conv|norm      decoder.{2+d,3+d}.{0|1}        4 x 4 transposed stride 2,
                                                                         leaky ReLU | tanh
    conv: kernel, bias                    weight, bias (conv3, conv1: kernel only)
    norm: scale, bias, mean, var          weight, bias, running_mean, running_var
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ctssl_jax.models.layers import (
    ConvNorm,
    ResidualBlock,
    TransposedConvNorm,
    apply_blocks,
    leaky_relu,
)
from ctssl_jax.models.quantizer import VectorQuantizer


@dataclasses.dataclass(frozen=True)
class VQVAEConfig:
    """Size and behaviour of the autoencoder. The defaults are the reference size.

    Attributes:
        in_channels: channels of the images, in and out.
        hidden: features after the first and the second halving of the resolution.
        depth: residual blocks in the encoder, and as many in the decoder.
        embedding_dim: features of a latent and of a code.
        num_codes: entries of the codebook.
        drop_rate: dropout inside the encoder's residual blocks, in [0, 1).
        output_activation: "unit_tanh", (tanh(y) + 1) / 2 in [0, 1]; "tanh", in [-1, 1], for the
            authors' weights.
        vq_update: "gradient", the codebook is a parameter trained by the codebook loss; "ema", it
            follows the running mean of the latents assigned to each code and is not a parameter.
            "ema" with vq_init="data" and vq_revive_every=100 keeps most codes in use. "gradient"
            from a uniform start is how the paper reads, but tends to collapse to few codes.
        vq_ema_decay: decay of the running counts and sums, in [0, 1).
        vq_init: "uniform" in +-1 / num_codes, or "data", k-means on the latents of the first
            training batch ("ema" only).
        vq_revive_every: training steps after which codes that are hardly used are moved onto
            random latents of the batch; 0 never moves them ("ema" only).
        vq_revive_below: a code is hardly used below this fraction of an equal share of the latents.
        remat: recompute residual blocks in the backward pass: less memory, more time, same numbers.
        scan: run the residual blocks as one loop instead of a copy each: same numbers, see
            `apply_blocks`.
        dtype: "float32" or "bfloat16" for convolutions and activations; parameters, batch
            statistics, vector quantization, latents and reconstruction are always float32.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    in_channels: int = 1
    hidden: tuple[int, int] = (256, 512)
    depth: int = 18
    embedding_dim: int = 64
    num_codes: int = 512
    drop_rate: float = 0.0
    output_activation: str = "unit_tanh"
    vq_update: str = "gradient"
    vq_ema_decay: float = 0.99
    vq_init: str = "uniform"
    vq_revive_every: int = 0
    vq_revive_below: float = 0.05
    remat: bool = False
    scan: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if len(self.hidden) != 2 or min(self.hidden) < 1:
            raise ValueError(f"hidden must be two positive widths, got {self.hidden}")
        for name in ("in_channels", "embedding_dim", "num_codes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("depth", "vq_revive_every", "vq_revive_below"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("drop_rate", "vq_ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        choices = {
            "output_activation": ("unit_tanh", "tanh"),
            "vq_update": ("gradient", "ema"),
            "vq_init": ("uniform", "data"),
            "dtype": ("float32", "bfloat16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if self.vq_update == "gradient" and (self.vq_init == "data" or self.vq_revive_every):
            raise ValueError(
                'vq_init="data" and vq_revive_every need vq_update="ema", since a trained codebook '
                "is moved by its gradient alone"
            )


_OF_ENCODER = (
    *("in_channels", "hidden", "depth", "embedding_dim", "drop_rate"),
    *("remat", "scan", "dtype"),
)


def encoder_settings(config: Any) -> VQVAEConfig:
    """The settings of the encoder in those of another model, which has them under the same names.

    Raises:
        ValueError: a value out of range; the message names the field.
    """
    return VQVAEConfig(**{name: getattr(config, name) for name in _OF_ENCODER})


class VQVAEOutput(NamedTuple):
    """Outputs of the autoencoder for images [B, H, W, C]; h = H / 4, w = W / 4, D = embedding_dim.

    reconstruction: [B, H, W, C] float32, in [0, 1] ("unit_tanh") or [-1, 1] ("tanh").
    latents: [B, h, w, D] float32, the encoder's output.
    quantized: [B, h, w, D] float32, each latent's nearest code; its gradient passes straight to the
      latents.
    codes: [B, h, w] int32, index of that code.
    codebook_loss: [B] float32, mean squared distance that pulls codes to latents; 0 with EMA
      updates.
    commitment_loss: [B] float32, the same distance, pulling latents to codes.
    """

    reconstruction: jax.Array
    latents: jax.Array
    quantized: jax.Array
    codes: jax.Array
    codebook_loss: jax.Array
    commitment_loss: jax.Array


class Encoder(nnx.Module):
    """Images to latents at a quarter of the resolution.

    With `compression_only` it has only the layers before the residual blocks, and only `compress`
    works.
    """

    stride = 4

    def __init__(self, config: VQVAEConfig, *, rngs: nnx.Rngs, compression_only: bool = False):
        first, second = config.hidden
        dtype = jnp.dtype(config.dtype)
        self.dtype = dtype
        self.remat, self.scan = config.remat, config.scan
        self.drop_rate = config.drop_rate
        self.downsample = nnx.List(
            [
                ConvNorm(config.in_channels, first, 4, stride=2, dtype=dtype, rngs=rngs),
                ConvNorm(first, second, 4, stride=2, dtype=dtype, rngs=rngs),
            ]
        )
        self.stem = ConvNorm(second, second, 3, dtype=dtype, rngs=rngs)
        if compression_only:
            return
        self.blocks = nnx.List(
            [
                ResidualBlock(second, drop_rate=config.drop_rate, dtype=dtype, rngs=rngs)
                for _ in range(config.depth)
            ]
        )
        self.project = ConvNorm(second, config.embedding_dim, 1, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool,
        key: jax.Array | None = None,
        visible: jax.Array | None = None,
    ) -> jax.Array:
        """Encode.

        Args:
            images: [B, H, W, C] float in [0, 1]; H and W divisible by 4.
            train: use and update batch statistics, apply dropout.
            key: for dropout; needed in training if drop_rate > 0.
            visible: [B, H, W, 1] float32, 0 or 1, equal within each 4 x 4 pixels: positions that
                are 0 are set to zero after every convolution and count in no batch statistic, so
                that nothing of their pixels reaches any output (SparK, arXiv 2301.03580).

        Returns:
            latents [B, H / 4, W / 4, D] float32; 0 where nothing is visible.

        Raises:
            ValueError: sides not divisible by 4, or the key is missing.
        """
        self.check_key(train, key)  # before any batch statistic changes
        compressed = self.compress(images, train=train, visible=visible)[1]
        return self.refine(compressed, train=train, key=key, visible=visible)

    def compress(
        self, images: jax.Array, *, train: bool, visible: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The layers before the residual blocks.

        Args:
            images: [B, H, W, C] float in [0, 1]; H and W divisible by 4.
            train: use and update batch statistics.
            visible: as `__call__`.

        Returns:
            features [B, H / 2, W / 2, hidden[0]] of the first layer and [B, H / 4, W / 4,
            hidden[1]] of the last.

        Raises:
            ValueError: sides not divisible by 4.
        """
        height, width = images.shape[1:3]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"image sides must be divisible by {self.stride}, got {height} x {width}"
            )
        at_half = at_quarter = None
        if visible is not None:
            images, at_half = images * visible, visible[:, ::2, ::2]
            at_quarter = _at_quarter(visible)
        half = leaky_relu(
            self.downsample[0](images.astype(self.dtype), train=train, visible=at_half)
        )
        quarter = leaky_relu(self.downsample[1](half, train=train, visible=at_quarter))
        return half, leaky_relu(self.stem(quarter, train=train, visible=at_quarter))

    def check_key(self, train: bool, key: jax.Array | None) -> None:
        """Refuse training with dropout and without a key, with a ValueError."""
        if train and self.drop_rate > 0 and key is None:
            raise ValueError("training with drop_rate > 0 needs a key")

    def refine(
        self,
        compressed: jax.Array,
        *,
        train: bool,
        key: jax.Array | None = None,
        visible: jax.Array | None = None,
    ) -> jax.Array:
        """The residual blocks and the projection: the last output of `compress` -> latents, as
        `__call__`.
        """
        features = self.trunk(compressed, train=train, key=key, visible=visible)
        return self.to_latents(features, train=train, visible=visible)

    def trunk(
        self,
        compressed: jax.Array,
        *,
        train: bool,
        key: jax.Array | None = None,
        visible: jax.Array | None = None,
    ) -> jax.Array:
        """The residual blocks: the last output of `compress` -> [B, H / 4, W / 4, hidden[1]]."""
        self.check_key(train, key)
        return leaky_relu(
            apply_blocks(
                self.blocks,
                compressed,
                key,
                train=train,
                remat=self.remat,
                scan=self.scan,
                visible=_at_quarter(visible),
            )
        )

    def to_latents(
        self, features: jax.Array, *, train: bool, visible: jax.Array | None = None
    ) -> jax.Array:
        """The projection: the output of `trunk` -> latents [B, H / 4, W / 4, D] float32."""
        projected = self.project(features, train=train, visible=_at_quarter(visible))
        return leaky_relu(projected).astype(jnp.float32)


def _at_quarter(visible: jax.Array | None) -> jax.Array | None:
    """The visible positions of images as those of latents."""
    return None if visible is None else visible[:, ::4, ::4]


class Decoder(nnx.Module):
    """Quantized latents back to images."""

    def __init__(self, config: VQVAEConfig, *, rngs: nnx.Rngs):
        first, second = config.hidden
        dtype = jnp.dtype(config.dtype)
        self.dtype = dtype
        self.remat, self.scan = config.remat, config.scan
        self.output_activation = config.output_activation
        self.stem = ConvNorm(config.embedding_dim, second, 3, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [ResidualBlock(second, dtype=dtype, rngs=rngs) for _ in range(config.depth)]
        )
        self.upsample = nnx.List(
            [
                TransposedConvNorm(second, first, dtype=dtype, rngs=rngs),
                TransposedConvNorm(first, config.in_channels, dtype=dtype, rngs=rngs),
            ]
        )

    def __call__(self, quantized: jax.Array, *, train: bool) -> jax.Array:
        """[B, h, w, D] -> [B, 4h, 4w, C] float32, in [0, 1] ("unit_tanh") or [-1, 1] ("tanh")."""
        x = leaky_relu(self.stem(quantized.astype(self.dtype), train=train))
        x = leaky_relu(
            apply_blocks(self.blocks, x, None, train=train, remat=self.remat, scan=self.scan)
        )
        x = leaky_relu(self.upsample[0](x, train=train))
        x = jnp.tanh(self.upsample[1](x, train=train).astype(jnp.float32))
        return (x + 1) / 2 if self.output_activation == "unit_tanh" else x


class VQVAE(nnx.Module):
    """Encoder, vector quantizer and decoder. State beside `nnx.Param`: batch statistics, and the
    codebook under EMA.
    """

    def __init__(self, config: VQVAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.quantizer = VectorQuantizer(
            config.num_codes,
            config.embedding_dim,
            update=config.vq_update,
            ema_decay=config.vq_ema_decay,
            init=config.vq_init,
            revive_every=config.vq_revive_every,
            revive_below=config.vq_revive_below,
            rngs=rngs,
        )
        self.decoder = Decoder(config, rngs=rngs)

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool,
        key: jax.Array | None = None,
        frozen_encoder: bool = False,
    ) -> VQVAEOutput:
        """Encode, quantize and decode.

        Args:
            images: [B, H, W, C] float in [0, 1]; H and W divisible by 4.
            train: training behaviour (batch statistics, dropout, codebook updates); False changes
              no state.
            key: a new key each step, needed in training with dropout, vq_init="data" or
                vq_revive_every.
            frozen_encoder: the encoder behaves as in evaluation.

        Returns:
            VQVAEOutput.

        Raises:
            ValueError: as `Encoder` and `VectorQuantizer`.
        """
        encoder_key, quantizer_key = (None, None) if key is None else jax.random.split(key)
        latents = self.encoder(images, train=train and not frozen_encoder, key=encoder_key)
        quantized, codes, codebook_loss, commitment_loss = self.quantizer(
            latents, train=train, key=quantizer_key
        )
        reconstruction = self.decoder(quantized, train=train)
        return VQVAEOutput(
            reconstruction, latents, quantized, codes, codebook_loss, commitment_loss
        )


def level_pixels(image_size: int | tuple[int, int], num_levels: int) -> list[int]:
    """Pixels at 1, 1/2, 1/4, ... of the resolution; `image_size` is a side or (height, width)."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return [(height >> level) * (width >> level) for level in range(num_levels)]


def encoder_flops(
    config: VQVAEConfig, image_size: int | tuple[int, int], *, compression_only: bool = False
) -> int:
    """The encoder's share of `flops_per_slice`; with `compression_only` without residual blocks and
    projection.
    """
    (first, second), (_, half, quarter) = config.hidden, level_pixels(image_size, 3)
    downsample = 16 * config.in_channels * first * half + 16 * first * second * quarter
    compression = 2 * (downsample + 9 * second * second * quarter)
    if compression_only:
        return compression
    blocks = config.depth * (9 + 1) * second * second * quarter
    return compression + 2 * (blocks + second * config.embedding_dim * quarter)


def flops_per_slice(config: VQVAEConfig, image_size: int | tuple[int, int]) -> int:
    """Floating-point operations of one forward pass of one slice, a multiply-add counted as two.

    Counts convolutions and the distances to the codes; normalisation and activations are below 1 %.
    A training step does three times as many. Reference size: 3.32e12.

    Args:
        image_size: side, or (height, width), in pixels.
    """
    (first, second), (_, half, quarter) = config.hidden, level_pixels(image_size, 3)
    latent = config.embedding_dim
    blocks = config.depth * (9 + 1) * second * second * quarter
    decoder = (
        9 * latent * second * quarter
        + blocks
        + 16 * second * first * quarter
        + 16 * first * config.in_channels * half
    )
    return encoder_flops(config, image_size) + 2 * (decoder + config.num_codes * latent * quarter)
