"""Frozen encoders that probes read: the encoder of a run, and controls.

`renewed` is the run's encoder with batch statistics of whole training slices: those of a run that
hides parts of its slices are of what it left. The control `untrained` has the architecture of the
run and random weights. The controls `pixels` and `handcrafted` have no network. Only the weights of
`untrained` are random.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from ctssl_jax.data.batches import training_batches
from ctssl_jax.data.slices import NeighbourSource
from ctssl_jax.evaluation.measured_run import MeasuredRun, check_request, header
from ctssl_jax.models import joint_embedding
from ctssl_jax.models.vqvae import Encoder
from ctssl_jax.ops.images import to_unit_images
from ctssl_jax.parallel import batch_sizes
from ctssl_jax.probes import handcrafted
from ctssl_jax.runs.checkpoints import Chosen
from ctssl_jax.runs.run import Run
from ctssl_jax.tasks.interface import Task
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training.state import abstract_model
from data_prep.system.errors import InputError
from data_prep.system.extras import require

ENCODERS = ("run", "renewed", "untrained", "pixels", "handcrafted")
WITH_CHECKPOINT = ("run", "renewed")
WITH_STATISTICS = ("renewed", "untrained")  # of training slices
REGIONS = 4  # latents are averaged over 4 x 4 regions: one mean would lose where things are
PATCH = Encoder.stride  # a latent covers PATCH x PATCH pixels
NEIGHBOURS = (64, 16, 4, 1)  # the validation split chooses one, for labels and for images
STATISTICS_SLICES = 16  # at a time: batch statistics need no more, and memory has room for them
STATISTICS_STEPS = 64  # then 0.9 ** 64 = 0.1 % is left of the first values of batch statistics


class FrozenEncoder(NamedTuple):
    """An encoder whose weights no longer change.

    state: its weights and batch statistics.
    encode: (state, images [B, H, W, channels] float32) -> latents [B, H / 4, W / 4, D] and what
      `finish` takes, by default pooled [B, F], float32.
    channels, normalize: of its input images, see `ops.images.to_unit_images`.
    whole: pooled [N, F] over regions -> [N, W], the feature of the whole slice.
    finish: on the host, the fetched second result of `encode` -> pooled [B, F].
    """

    state: Any
    encode: jax.stages.Wrapped
    channels: int
    normalize: str
    whole: Callable[[np.ndarray], np.ndarray] = lambda pooled: pooled
    finish: Callable[[np.ndarray], np.ndarray] = lambda pooled: pooled


@dataclasses.dataclass(frozen=True)
class ProbedRun:
    """A run whose encoder is probed, or a control in its place; made by `open`.

    encoder: name in `ENCODERS`.
    measured: the run and the data.
    checkpoint: its step and score; None for a control, which reads no checkpoint.
    asked_batch_size: slices at a time at most; 0 leaves it to `batch_size`.
    """

    encoder: str
    measured: MeasuredRun
    checkpoint: Chosen | None
    asked_batch_size: int

    @classmethod
    def open(
        cls,
        workdir: str | Path,
        dataset: str | Path | None,
        output: Path,
        splits: tuple[str, ...],
        *,
        encoder: str,
        checkpoint: str,
        batch_size: int,
    ) -> "ProbedRun":
        """Open the run and its data, before any work.

        Args:
          workdir: run directory.
          dataset: dataset directory; None takes the dataset of the training.
          output: path of RESULT.json.
          splits: that will be read.
          encoder: name in `ENCODERS`.
          checkpoint: `best`, `last`, `last_good` or a step.
          batch_size: slices at a time at most; 0 chooses by memory.

        Raises:
          InputError: an unknown encoder, run or checkpoint, a results file that is not JSON, or
            data prepared otherwise than the data of the run.
        """
        if encoder not in ENCODERS:
            raise InputError(f"--encoder={encoder}: choose one of {', '.join(ENCODERS)}")
        if encoder == "handcrafted":
            require("skimage", "--encoder=handcrafted", "handcrafted")
        check_request(output, batch_size)
        measured = MeasuredRun.open(Run.open(workdir), dataset, splits)
        read = encoder in WITH_CHECKPOINT
        chosen = measured.run.choose_checkpoint(checkpoint) if read else None
        return cls(encoder, measured, chosen, batch_size)

    def batch_size(self, frozen: FrozenEncoder, number: int) -> int:
        """Slices at a time, for splits of so many slices at most: one size, so one program.

        Raises:
          InputError: more slices than fit are asked for.
        """
        size = self.measured.config.image_size

        def trace(slices: int) -> jax.stages.Traced:
            shape = (slices, size, size, frozen.channels)
            return frozen.encode.trace(frozen.state, jax.ShapeDtypeStruct(shape, jnp.float32))

        return batch_sizes.choose(
            self.asked_batch_size, number, size, jax.local_devices()[:1], trace, frozen.state
        )

    def load_encoder(
        self, training_slices: NeighbourSource, regions: int = REGIONS
    ) -> FrozenEncoder:
        """The encoder; prints its origin.

        Args:
          training_slices: set the batch statistics of `renewed` and `untrained`.
          regions: latents are averaged over regions x regions.

        Raises:
          InputError: the model of the run has no encoder, or the checkpoint cannot be restored.
        """
        run, config = self.measured.run, self.measured.config
        task = get_task(config.task)
        if self.encoder == "pixels":
            dim = config.model.get("embedding_dim", 64)
            frozen = pixel_encoder(len(self.measured.channels), dim, regions)
            origin = "control: pixels"
        elif self.encoder == "handcrafted":
            frozen = handcrafted_encoder(len(self.measured.channels))
            origin = "control: statistics of intensity, shape and texture"
        elif "encoder" not in abstract_model(config, task)[1]:
            raise InputError(
                f"--workdir={run.workdir}: a model of the task {config.task} has no encoder to "
                "probe; give another run"
            )
        elif self.encoder == "run":
            frozen = trained_encoder(config, task, run, self.checkpoint.step, regions)
            origin = f"run, step {self.checkpoint.step:,}"
        else:
            part = config.batch_size // config.microbatches
            size = min(STATISTICS_SLICES, part, len(training_slices))
            batches = training_batches(training_slices, size, config.seed)
            if self.encoder == "renewed":
                step = self.checkpoint.step
                frozen = trained_encoder(config, task, run, step, regions, batches)
                origin = f"run, step {step:,}, batch statistics of whole slices"
            else:
                frozen = untrained_encoder(config, task, batches, regions)
                origin = f"control: untrained, seed {config.seed}"
        device = jax.local_devices()[0].device_kind
        print(f"encoder        {config.recipe} ({origin}) on {device}", flush=True)
        return frozen

    def header(self, split: str, patient_ids: Sequence[str]) -> dict[str, Any]:
        """The first fields of RESULT.json, for a split and its patients."""
        packages = ("jax", "flax", "numpy", "scikit-learn")
        device = jax.local_devices()[0].device_kind
        fields = header(
            self.measured, split, patient_ids, self.checkpoint, device=device, packages=packages
        )
        return fields | {"encoder": self.encoder}


def area_weights(size: int, parts: int) -> np.ndarray:
    """[parts, size] float32: row i averages the i-th of `parts` equal parts of `size` pixels."""
    edges = np.linspace(0, size, parts + 1)
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.maximum(overlap, 0) * parts / size).astype(np.float32)


def pool(images: jax.Array, parts: int) -> jax.Array:
    """Means over parts x parts regions: [B, H, W, C] -> [B, parts * parts * C] float32."""
    rows, columns = (area_weights(size, parts) for size in images.shape[1:3])
    means = jnp.einsum("bhwc,ih,jw->bijc", images, rows, columns, precision="highest")
    return means.reshape(len(images), -1)


def _frozen_part(model: nnx.Module) -> nnx.Dict:
    """What makes the feature of a slice: the encoder, and the neck of a joint embedding."""
    neck = getattr(model, "neck", None)
    return nnx.Dict({"encoder": model.encoder} | ({} if neck is None else {"neck": neck}))


def _network(
    config: ml_collections.ConfigDict, graph: Any, state: tuple[Any, Any], regions: int
) -> FrozenEncoder:
    pooled = config.model.get("pooled", "latents")  # of a joint embedding
    dim, wide = config.model.embedding_dim, tuple(config.model.hidden)[1]
    widths = {"latents": (dim,), "map": (wide,), "both": (wide, dim)}[pooled]

    def encode(state, images):
        part = nnx.merge(graph, *state, copy=True)
        if "neck" in part:  # its feature has no regions
            output = joint_embedding.encode(part.encoder, images, pooled, part.neck, train=False)
            return output.latents, output.embedding
        features = part.encoder.trunk(part.encoder.compress(images, train=False)[1], train=False)
        latents = part.encoder.to_latents(features, train=False)
        chosen = joint_embedding.chosen_maps(features, latents, pooled)
        parts = min(regions, latents.shape[1])  # of small images
        means = [pool(chosen_map.astype(jnp.float32), parts) for chosen_map in chosen]
        return latents, jnp.concatenate(means, axis=-1)

    frozen = FrozenEncoder(state, jax.jit(encode), config.model.in_channels, config.normalize)
    if config.model.get("neck", "none") != "none":
        return frozen
    return frozen._replace(whole=functools.partial(_mean_over_regions, widths))


def _mean_over_regions(widths: tuple[int, ...], pooled: np.ndarray) -> np.ndarray:
    """Features of regions, part after part of these widths -> their means."""
    regions = pooled.shape[1] // sum(widths)
    ends = np.cumsum([regions * width for width in widths])[:-1]
    parts = [part.reshape(len(part), regions, -1) for part in np.split(pooled, ends, axis=1)]
    return np.concatenate([part.mean(axis=1) for part in parts], axis=1)


def trained_encoder(
    config: ml_collections.ConfigDict,
    task: Task,
    run: Run,
    step: int,
    regions: int = REGIONS,
    batches: Iterator[dict[str, np.ndarray]] | None = None,
) -> FrozenEncoder:
    """The encoder of a checkpoint, with its neck if it has one; nothing else is read. With batches,
    as those of `untrained_encoder`, its batch statistics become those of their slices.

    Raises:
      InputError: as `Run.restore`.
    """
    part = nnx.eval_shape(lambda: _frozen_part(task.build(config, nnx.Rngs(params=config.seed))))
    graph, params, variables = nnx.split(part, nnx.Param, ...)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        {"params": nnx.as_pure(params), "variables": nnx.as_pure(variables)},
    )
    restored = run.restore(step, template)
    state = restored["params"], restored["variables"]
    if batches is not None:
        state = _with_statistics(config, graph, state, batches)
    return _network(config, graph, state, regions)


def untrained_encoder(
    config: ml_collections.ConfigDict,
    task: Task,
    batches: Iterator[dict[str, np.ndarray]],
    regions: int = REGIONS,
) -> FrozenEncoder:
    """The encoder with random weights by the seed of the run; `init_from` is ignored.

    Training slices set its batch statistics. With their initial 0 and 1, activations fade from
    layer to layer, and the comparison would be with rounding errors.

    Args:
      config, task: of the run.
      batches: endless, from `data.batches.training_batches`.
      regions: latents are averaged over regions x regions.
    """
    part = _frozen_part(task.build(config, nnx.Rngs(params=config.seed)))
    graph, params, variables = nnx.split(part, nnx.Param, ...)
    state = nnx.as_pure(params), nnx.as_pure(variables)
    return _network(config, graph, _with_statistics(config, graph, state, batches), regions)


def _with_statistics(
    config: ml_collections.ConfigDict,
    graph: nnx.GraphDef,
    state: tuple[Any, Any],
    batches: Iterator[dict[str, np.ndarray]],
) -> tuple[Any, Any]:
    """(parameters, variables) after `STATISTICS_STEPS` passes in training mode."""
    pooled = config.model.get("pooled", "latents")

    @jax.jit
    def update_statistics(params, variables, images, key):
        part = nnx.merge(graph, params, variables, copy=True)
        images = to_unit_images(images, config.model.in_channels, config.normalize)
        joint_embedding.encode(part.encoder, images, pooled, part.get("neck"), train=True, key=key)
        return nnx.as_pure(nnx.split(part, nnx.Param, ...)[2])

    params, variables = state
    for step in range(STATISTICS_STEPS):
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        variables = update_statistics(params, variables, next(batches)["images"][:, 0], key)
    return params, variables


def pixel_encoder(channels: int, embedding_dim: int, regions: int = REGIONS) -> FrozenEncoder:
    """A control without a network.

    Latents are the means of blocks of 4 x 4 pixels, one number a channel. With all 16 pixels the
    reconstruction of a clean slice would be perfect, and mean nothing. Pooled features are the
    slice averaged down to as many numbers as the pooled latents of an encoder, or to the largest
    square below that number.

    Args:
      channels: of the dataset.
      embedding_dim: numbers of a latent of the encoder that the control is compared with.
      regions: that encoder averages its latents over regions x regions.
    """
    side = math.isqrt(regions * regions * embedding_dim // channels)
    whole_side = max(1, math.isqrt(embedding_dim // channels))

    def whole(pooled: np.ndarray) -> np.ndarray:
        size = math.isqrt(pooled.shape[1] // channels)
        images = pooled.reshape(len(pooled), size, size, channels)
        weights = area_weights(size, min(whole_side, size))
        return np.einsum("bhwc,ih,jw->bijc", images, weights, weights).reshape(len(pooled), -1)

    def encode(state, images):
        size, blocks = images.shape[1], images.shape[1] // PATCH
        means = pool(images, blocks).reshape(len(images), blocks, blocks, channels)
        return means, pool(images, max(1, min(side, size)))

    return FrozenEncoder((), jax.jit(encode), channels, "window", whole)


def handcrafted_encoder(channels: int) -> FrozenEncoder:
    """A control without a network: statistics of a slice, see `probes.handcrafted`.

    Latents are mean, standard deviation, minimum and maximum of blocks of 4 x 4 pixels. Pooled
    features are of the whole slice and 4 x 4 regions, whatever the regions of other encoders. They
    are computed on the host.

    Args:
      channels: of the dataset.
    """

    def encode(state, images):
        blocks = images.shape[1] // PATCH
        parts = images.reshape(-1, blocks, PATCH, blocks, PATCH, channels)
        latents = [of(parts, axis=(2, 4)) for of in (jnp.mean, jnp.std, jnp.min, jnp.max)]
        return jnp.concatenate(latents, axis=-1), images

    # Not `jax.pure_callback`: with one core it waits for itself.
    return FrozenEncoder((), jax.jit(encode), channels, "window", finish=handcrafted.features)


def num_features(encoder: FrozenEncoder, image_size: int) -> dict[str, int]:
    """Numbers of one latent (`latent`) and of the pooled features of a slice (`pooled`)."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, encoder.channels), jnp.float32)
    latents, pooled = jax.eval_shape(encoder.encode, encoder.state, images)
    finished = encoder.finish(np.zeros(pooled.shape, np.float32))
    return {"latent": latents.shape[-1], "pooled": finished.shape[-1]}
