"""Frozen encoders that probes read: the encoder of a run, and two controls.

The control `untrained` has the architecture of the run and random weights. The control `pixels` has
no network. The weights of `untrained` are the only thing here that is random.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from ctssl_jax.data.batches import training_batches
from ctssl_jax.data.slices import NeighbourSource
from ctssl_jax.evaluation.measured_run import MeasuredRun
from ctssl_jax.models.vqvae import Encoder
from ctssl_jax.ops.images import to_unit_images
from ctssl_jax.runs.run import Run
from ctssl_jax.tasks.interface import Task
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training.state import abstract_model
from data_prep.system.errors import InputError

ENCODERS = ("run", "untrained", "pixels")
REGIONS = 4  # latents are averaged over 4 x 4 regions: the mean of all would lose where things are
PATCH = Encoder.stride  # pixels a side that one latent stands for
NEIGHBOURS = (64, 16, 4, 1)  # of which the validation split chooses, in both kinds of probes
STATISTICS_STEPS = 64  # of the 0 and 1 that batch statistics start from 0.9 ** 64 = 0.1 % is left


class FrozenEncoder(NamedTuple):
    """An encoder whose numbers no longer change.

    state: its numbers.
    encode: (state, images [B, H, W, channels] float32) -> latents [B, H / 4, W / 4, D] and pooled
      [B, F], float32.
    channels, normalize: of the images that it takes, see `ops.images.to_unit_images`.
    """

    state: Any
    encode: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]
    channels: int
    normalize: str


def check_encoder(encoder: str) -> None:
    """Refuse a name that is not in `ENCODERS`.

    Raises:
      InputError: names the flag.
    """
    if encoder not in ENCODERS:
        raise InputError(f"--encoder={encoder}: choose one of {', '.join(ENCODERS)}")


def open_encoder(
    name: str,
    measured: MeasuredRun,
    step: int | None,
    training_slices: NeighbourSource,
    batch_size: int,
    regions: int = REGIONS,
) -> tuple[FrozenEncoder, str]:
    """The encoder of a run or a control, and its origin in words.

    Args:
      name: of `ENCODERS`.
      measured: the run and its data.
      step: of the checkpoint; the controls read none.
      training_slices: set the batch statistics of the control `untrained`.
      batch_size: training slices at a time.
      regions: latents are averaged over regions x regions.

    Raises:
      InputError: the model of the run has no encoder, or the checkpoint cannot be restored.
    """
    config = measured.config
    if name == "pixels":
        dim = config.model.get("embedding_dim", 64)
        return pixel_encoder(len(measured.channels), dim, regions), "control: pixels"
    task = get_task(config.task)
    if "encoder" not in abstract_model(config, task)[1]:
        raise InputError(
            f"--workdir={measured.run.workdir}: a model of the task {config.task} has no encoder "
            "to probe; give another run"
        )
    if name == "run":
        return trained_encoder(config, task, measured.run, step, regions), f"run, step {step:,}"
    batches = training_batches(training_slices, min(batch_size, len(training_slices)), config.seed)
    return untrained_encoder(
        config, task, batches, regions
    ), f"control: untrained, seed {config.seed}"


def area_weights(size: int, parts: int) -> np.ndarray:
    """[parts, size] float32: row i averages the i-th of `parts` equal stretches of `size`
    pixels."""
    edges = np.linspace(0, size, parts + 1)
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.maximum(overlap, 0) * parts / size).astype(np.float32)


def pool(images: jax.Array, parts: int) -> jax.Array:
    """Means over parts x parts regions, flattened: [B, H, W, C] -> [B, parts * parts * C]
    float32."""
    rows, columns = (area_weights(size, parts) for size in images.shape[1:3])
    means = jnp.einsum("bhwc,ih,jw->bijc", images, rows, columns, precision="highest")
    return means.reshape(len(images), -1)


def _abstract_encoder(config: ml_collections.ConfigDict, task: Task) -> tuple[Any, Any, Any]:
    encoder = nnx.eval_shape(lambda: task.build(config, nnx.Rngs(params=config.seed)).encoder)
    graph, params, variables = nnx.split(encoder, nnx.Param, ...)
    return graph, nnx.as_pure(params), nnx.as_pure(variables)


def _network(
    config: ml_collections.ConfigDict, graph: Any, state: tuple[Any, Any], regions: int
) -> FrozenEncoder:
    def encode(state, images):
        latents = nnx.merge(graph, *state, copy=True)(images, train=False)
        return latents, pool(latents, regions)

    return FrozenEncoder(state, jax.jit(encode), config.model.in_channels, config.normalize)


def trained_encoder(
    config: ml_collections.ConfigDict, task: Task, run: Run, step: int, regions: int = REGIONS
) -> FrozenEncoder:
    """The encoder of a checkpoint; nothing else of the checkpoint is read.

    Raises:
      InputError: as `Run.restore`.
    """
    graph, params, variables = _abstract_encoder(config, task)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        {"params": {"encoder": params}, "variables": {"encoder": variables}},
    )
    restored = run.restore(step, template)
    return _network(
        config, graph, (restored["params"]["encoder"], restored["variables"]["encoder"]), regions
    )


def untrained_encoder(
    config: ml_collections.ConfigDict,
    task: Task,
    batches: Iterator[dict[str, np.ndarray]],
    regions: int = REGIONS,
) -> FrozenEncoder:
    """The encoder before it learned anything: random weights by the seed of the run, whatever
    `init_from` says.

    Its batch statistics are those of training slices, set by `STATISTICS_STEPS` passes in training
    mode. With the 0 and 1 that they start from, activations fade from layer to layer, and the
    comparison would be with rounding.

    Args:
      config, task: of the run.
      batches: endless, from `data.training_batches`.
      regions: latents are averaged over regions x regions.
    """
    graph, params, variables = nnx.split(
        task.build(config, nnx.Rngs(params=config.seed)).encoder, nnx.Param, ...
    )

    @jax.jit
    def follow(params, variables, images, key):
        encoder = nnx.merge(graph, params, variables, copy=True)
        encoder(
            to_unit_images(images, config.model.in_channels, config.normalize), train=True, key=key
        )
        return nnx.as_pure(nnx.split(encoder, nnx.Param, ...)[2])

    params, variables, key = (
        nnx.as_pure(params),
        nnx.as_pure(variables),
        jax.random.key(config.seed),
    )
    for step in range(STATISTICS_STEPS):
        variables = follow(
            params, variables, next(batches)["images"][:, 0], jax.random.fold_in(key, step)
        )
    return _network(config, graph, (params, variables), regions)


def pixel_encoder(channels: int, embedding_dim: int, regions: int = REGIONS) -> FrozenEncoder:
    """A control without a network.

    Latents are the means of blocks of 4 x 4 pixels, one number a channel: all 16 pixels would make
    reconstruction of a clean slice perfect, and say nothing. Pooled features are the slice averaged
    down to as many numbers as the pooled latents of an encoder have, or as near below as a square
    allows.

    Args:
      channels: of the dataset.
      embedding_dim: features of a latent of the encoder that it is compared with.
      regions: over regions x regions of which that encoder averages.
    """
    side = math.isqrt(regions * regions * embedding_dim // channels)

    def encode(state, images):
        size = images.shape[1]
        means = pool(images, size // PATCH).reshape(
            len(images), size // PATCH, size // PATCH, channels
        )
        return means, pool(images, max(1, min(side, size)))

    return FrozenEncoder((), jax.jit(encode), channels, "window")


def num_features(encoder: FrozenEncoder, image_size: int) -> dict[str, int]:
    """Numbers that the probes see: `latent`, of a position, and `pooled`, of a slice."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, encoder.channels), jnp.float32)
    latents, pooled = jax.eval_shape(encoder.encode, encoder.state, images)
    return {"latent": latents.shape[-1], "pooled": pooled.shape[-1]}
