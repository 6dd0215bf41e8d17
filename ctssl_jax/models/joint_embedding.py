"""The model of joint-embedding objectives: the autoencoder's encoder, and a projector that training
alone uses.

Names of the modules, which are the keys of checkpoints:

    encoder.*                        as in the autoencoder: encoders move between all tasks
    neck.attention                   1 x 1 without bias (neck "attention")
    neck.stages.{0,1}.conv|norm      3 x 3 stride 2, leaky ReLU (neck "stages")
    projector.layers.i.kernel        linear, [before, after]
    projector.layers.i.norm          batch normalisation, of all but the last layer
    projector.layers.i.bias          of the last layer
    prototypes                       [projector[-1], P], columns of any length (DINO alone)
    teacher.encoder|neck|projector.*, teacher.prototypes, centre, steps
                                     state of training: no optimizer moves it
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ctssl_jax.models.layers import (
    KERNEL_INIT,
    BatchNorm,
    ConvNorm,
    PointwiseConv,
    leaky_relu,
)
from ctssl_jax.models.vqvae import Encoder, VQVAEConfig, encoder_flops, encoder_settings

POOLED = ("latents", "map", "both")
NECKS = ("none", "attention", "stages")
NUM_STAGES = 2


class TeacherState(nnx.Variable):
    """State that follows the trained parameters: a teacher, its centre, the number of steps."""


@dataclasses.dataclass(frozen=True)
class JointEmbeddingConfig:
    """Size and behaviour of the model. The defaults are the reference size.

    Attributes:
        projector: features after each layer of the projector.
        pooled: what the feature of a slice is the mean of, over the pixels: "latents" (D numbers),
            "map", the features before the projection to latents (hidden[1] numbers), or "both", the
            map's and then the latents'.
        neck: what lies between these pixels and their mean. "none"; "attention": in place of the
            mean a weighted one, for each feature with the softmax over pixels of a linear function
            of all features; "stages": two convolutions with stride 2 of the same width, so that a
            number of the mean has seen four times as far.
        num_prototypes: P, vectors that the projections are compared with; 0 without a teacher.
        in_channels, hidden, depth, embedding_dim, drop_rate, remat, scan, dtype: settings of the
            encoder, as in `VQVAEConfig`. The projector is float32.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    projector: tuple[int, ...] = (2048, 2048, 64)
    pooled: str = "latents"
    neck: str = "none"
    num_prototypes: int = 0
    in_channels: int = 1
    hidden: tuple[int, int] = (256, 512)
    depth: int = 18
    embedding_dim: int = 64
    drop_rate: float = 0.0
    remat: bool = False
    scan: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        object.__setattr__(self, "projector", tuple(self.projector))
        if not self.projector or min(self.projector) < 1:
            raise ValueError(f"projector must be one or more positive widths, got {self.projector}")
        if self.pooled not in POOLED:
            raise ValueError(f"pooled must be one of {', '.join(POOLED)}, got {self.pooled!r}")
        if self.neck not in NECKS:
            raise ValueError(f"neck must be one of {', '.join(NECKS)}, got {self.neck!r}")
        object.__setattr__(self, "hidden", self.encoder.hidden)

    @property
    def encoder(self) -> VQVAEConfig:
        """The settings of the encoder, checked."""
        return encoder_settings(self)

    @property
    def num_features(self) -> int:
        """Numbers of the feature of a slice."""
        widths = {"latents": self.embedding_dim, "map": self.hidden[1]}
        return widths.get(self.pooled, sum(widths.values()))


class JointEmbeddingOutput(NamedTuple):
    """What the encoder makes of images [B, H, W, C].

    latents: [B, H / 4, W / 4, D] float32.
    embedding: [B, F] float32, the feature of each slice, F = `num_features`.
    """

    latents: jax.Array
    embedding: jax.Array


class _Layer(nnx.Module):
    def __init__(self, before: int, after: int, last: bool, rngs: nnx.Rngs):
        self.kernel = nnx.Param(KERNEL_INIT(rngs.params(), (before, after), jnp.float32))
        if last:
            self.bias = nnx.Param(jnp.zeros(after, jnp.float32))
        else:
            self.norm = BatchNorm(after)
        self.last = last

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = jnp.dot(x, self.kernel[...], precision="high")
        return x + self.bias[...] if self.last else jax.nn.relu(self.norm(x, train=train))


class Projector(nnx.Module):
    """Linear layers in float32, all but the last with batch normalisation and ReLU."""

    def __init__(self, widths: tuple[int, ...], *, rngs: nnx.Rngs):
        pairs = list(itertools.pairwise(widths))
        self.layers = nnx.List(
            [
                _Layer(before, after, number == len(pairs) - 1, rngs)
                for number, (before, after) in enumerate(pairs)
            ]
        )

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """[N, F] float32 -> [N, D] float32."""
        for layer in self.layers:
            x = layer(x, train=train)
        return x


class Neck(nnx.Module):
    """What lies between the encoder's features and the feature of a slice, see
    `JointEmbeddingConfig.neck`."""

    def __init__(self, config: JointEmbeddingConfig, *, rngs: nnx.Rngs):
        width = config.num_features
        if config.neck == "attention":
            self.attention = PointwiseConv(
                width, width, use_bias=False, dtype=jnp.dtype("float32"), rngs=rngs
            )
        else:
            dtype = jnp.dtype(config.dtype)
            self.stages = nnx.List(
                [
                    ConvNorm(width, width, 3, stride=2, dtype=dtype, rngs=rngs)
                    for _ in range(NUM_STAGES)
                ]
            )
        self.kind = config.neck

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """[B, h, w, F] -> [B, F] float32."""
        if self.kind == "attention":
            x = x.astype(jnp.float32)
            weights = jax.nn.softmax(self.attention(x), axis=(1, 2))
            return jnp.sum(weights * x, axis=(1, 2))
        for stage in self.stages:
            x = leaky_relu(stage(x, train=train))
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


class _Network(nnx.Module):
    """What a student and its teacher both have."""

    def __init__(self, config: JointEmbeddingConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config.encoder, rngs=rngs)
        if config.neck != "none":
            self.neck = Neck(config, rngs=rngs)
        self.projector = Projector((config.num_features, *config.projector), rngs=rngs)
        if config.num_prototypes:
            shape = (config.projector[-1], config.num_prototypes)
            self.prototypes = nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32))

    def embed(
        self,
        images: jax.Array,
        *,
        train: bool,
        key: jax.Array | None = None,
        frozen_encoder: bool = False,
    ) -> JointEmbeddingOutput:
        """The encoder's latents and the feature of each slice, see `encode`."""
        neck = getattr(self, "neck", None)
        how = {"train": train, "key": key, "frozen_encoder": frozen_encoder}
        return encode(self.encoder, images, self.config.pooled, neck, **how)

    def scores(self, projections: jax.Array, learning: jax.Array | bool = True) -> jax.Array:
        """Cosines of projections and prototypes: [..., D] -> [..., P] float32.

        `learning`: whether the prototypes get a gradient.
        """
        prototypes = self.prototypes[...]
        prototypes = jnp.where(learning, prototypes, jax.lax.stop_gradient(prototypes))
        columns = prototypes / jnp.linalg.norm(prototypes, axis=0)
        lengths = jnp.linalg.norm(projections, axis=-1, keepdims=True)
        return jnp.dot(projections / jnp.maximum(lengths, 1e-12), columns, precision="high")


def encode(
    encoder: Encoder,
    images: jax.Array,
    pooled: str,
    neck: Neck | None = None,
    *,
    train: bool,
    key: jax.Array | None = None,
    frozen_encoder: bool = False,
) -> JointEmbeddingOutput:
    """Latents of an encoder, and the feature of each slice.

    Args:
        images: [B, H, W, C] float in [0, 1]; H and W divisible by 4.
        pooled: as `JointEmbeddingConfig.pooled`.
        neck: None takes the mean over the pixels.
        train: use and update batch statistics, apply dropout.
        key: for dropout; needed in training if drop_rate > 0.
        frozen_encoder: the encoder behaves as in evaluation.
    """
    learns = train and not frozen_encoder
    encoder.check_key(learns, key)  # before any batch statistic changes
    features = encoder.trunk(encoder.compress(images, train=learns)[1], train=learns, key=key)
    latents = encoder.to_latents(features, train=learns)
    chosen = chosen_maps(features, latents, pooled)
    if neck is not None:
        joined = jnp.concatenate([part.astype(jnp.float32) for part in chosen], axis=-1)
        return JointEmbeddingOutput(latents, neck(joined, train=train))
    means = [jnp.mean(part.astype(jnp.float32), axis=(1, 2)) for part in chosen]
    return JointEmbeddingOutput(latents, jnp.concatenate(means, axis=-1))


def chosen_maps(features: jax.Array, latents: jax.Array, pooled: str) -> tuple[jax.Array, ...]:
    """The maps that `JointEmbeddingConfig.pooled` names."""
    return {"latents": (latents,), "map": (features,), "both": (features, latents)}[pooled]


class JointEmbedding(_Network):
    """Encoder and projector; with prototypes also a teacher of the same shape and its centre.

    The teacher begins with the weights of the student, and is without dropout. `follow` moves it.
    """

    def __init__(self, config: JointEmbeddingConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.steps = TeacherState(jnp.zeros((), jnp.int32))
        if config.num_prototypes:
            self.teacher = _Network(dataclasses.replace(config, drop_rate=0.0), rngs=rngs)
            _as_state(self.teacher)
            self.centre = TeacherState(jnp.zeros(config.num_prototypes, jnp.float32))
            self.follow(0.0)

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool,
        key: jax.Array | None = None,
        frozen_encoder: bool = False,
    ) -> JointEmbeddingOutput:
        """Encode.

        Args:
            images: [B, H, W, C] float in [0, 1]; H and W divisible by 4.
            train: use and update batch statistics, apply dropout; False changes no state.
            key: for dropout; needed in training if drop_rate > 0.
            frozen_encoder: the encoder behaves as in evaluation.

        Raises:
            ValueError: as `Encoder`.
        """
        return self.embed(images, train=train, key=key, frozen_encoder=frozen_encoder)

    def follow(self, momentum: jax.Array | float) -> None:
        """Move the teacher towards the student: momentum * teacher + (1 - momentum) * student."""
        student = nnx.to_flat_state(nnx.state(self, nnx.Param))
        teacher = dict(nnx.to_flat_state(nnx.state(self.teacher, TeacherState)))
        for path, value in student:
            old = teacher[path]
            old[...] = momentum * old[...] + (1 - momentum) * value[...]


def _as_state(module: nnx.Module) -> None:
    """Turn the parameters of a module into state that no optimizer moves."""
    for _, node in list(nnx.iter_graph(module)):
        if isinstance(node, nnx.Module):
            for name, value in list(vars(node).items()):
                if isinstance(value, nnx.Param):
                    setattr(node, name, TeacherState(value[...]))


def flops_per_view(config: JointEmbeddingConfig, image_size: int) -> int:
    """Floating-point operations of one forward pass of one view: encoder, neck, projector,
    prototypes.

    Args:
        image_size: side of the view in pixels.
    """
    width = config.num_features
    widths = (width, *config.projector)
    projector = 2 * sum(before * after for before, after in itertools.pairwise(widths))
    prototypes = 2 * config.projector[-1] * config.num_prototypes
    neck, side = 0, image_size // Encoder.stride
    if config.neck == "attention":
        neck = 2 * side * side * width * width
    elif config.neck == "stages":
        for _ in range(NUM_STAGES):
            side = (side + 1) // 2
            neck += 2 * 9 * width * width * side * side
    return encoder_flops(config.encoder, image_size) + neck + projector + prototypes
