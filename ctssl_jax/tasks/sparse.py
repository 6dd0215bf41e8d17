"""Sparse masked modelling (SparK, arXiv 2301.03580): blocks of a slice are hidden from every
convolution of the encoder, and predicted from what is visible.

In `masked_region` and its blocks (SimMIM) a hole is a grey value, which the encoder sees and fills
within a few layers. Here masked positions are zero after every convolution and count in no batch
statistic, so that the encoder learns from visible tissue alone.
"""

import jax
import jax.numpy as jnp
import ml_collections

from ctssl_jax.data.slices import Targets
from ctssl_jax.models.spark import Spark, SparkConfig, flops_per_slice
from ctssl_jax.models.vqvae import Encoder, encoder_flops
from ctssl_jax.ops import corruptions, losses
from ctssl_jax.ops.images import normalize_blocks
from ctssl_jax.tasks.interface import StepOutput, Task, is_frozen, item_slices, model_config
from data_prep.system.errors import InputError


def _reconstruct(
    model: Spark,
    batch: dict[str, jax.Array],
    keys: jax.Array,
    model_key: jax.Array | None,
    config: ml_collections.ConfigDict,
    *,
    train: bool,
) -> StepOutput:
    """Predict the masked blocks, each with its own mean and deviation taken out. The loss is the
    mean squared error over masked pixels; in evaluation the embedding is of the whole slice.

    Arguments as those of `Task.apply`; `batch` holds `images` [B, 1, H, W, C] uint8.
    """
    images, mask = item_slices(batch["images"], 0, config), config.mask
    inputs, masked = corruptions.mask_blocks(
        keys, images, fraction=mask.fraction, side=mask.block, fill=0.0
    )
    target, mean, deviation = normalize_blocks(images, mask.block)
    prediction, latents = model.reconstruct(
        inputs, 1 - masked, train=train, key=model_key, frozen_encoder=is_frozen(config)
    )
    loss = losses.masked_mse(prediction, target, masked)
    shown = jnp.where(masked > 0, jnp.clip(prediction * deviation + mean, 0, 1), images)
    embedding = jnp.mean(latents, (1, 2)) if train else model(images, train=False).embedding
    return StepOutput(
        loss=loss,
        scores={"block_mse": loss},
        pictures={"input": inputs, "target": images, "prediction": shown},
        embedding=embedding,
    )


def _baselines(
    batch: dict[str, jax.Array],
    keys: jax.Array,
    mean_image: jax.Array,
    config: ml_collections.ConfigDict,
) -> dict[str, dict[str, jax.Array]]:
    """`{"block_mean": {"block_mse": [B]}}`: every masked block is predicted as its own mean."""
    images, mask = item_slices(batch["images"], 0, config), config.mask
    _, masked = corruptions.mask_blocks(keys, images, fraction=mask.fraction, side=mask.block)
    target, *_ = normalize_blocks(images, mask.block)
    return {"block_mean": {"block_mse": losses.masked_mse(jnp.zeros_like(target), target, masked)}}


def _settings(config: ml_collections.ConfigDict) -> SparkConfig:
    return model_config(SparkConfig, config)


def _check(config: ml_collections.ConfigDict) -> None:
    mask, size = config.mask, config.image_size
    if not mask.block or mask.block % Encoder.stride:
        raise InputError(
            f"config.mask.block={mask.block}: blocks of this task must be a multiple of the "
            f"encoder's stride {Encoder.stride}; set --config.mask.block={8 * Encoder.stride}"
        )
    try:
        corruptions.num_blocks(size, size, fraction=mask.fraction, side=mask.block)
    except ValueError as error:
        raise InputError(f"config.mask.block={mask.block}: {error}") from None
    _settings(config)


SPARK = Task(
    fields=("mask",),
    offsets=lambda config: (0,),
    targets=lambda config: Targets(),
    reported=("block_mse",),
    check=_check,
    build=lambda config, rngs: Spark(_settings(config), rngs=rngs),
    flops=lambda config: flops_per_slice(_settings(config), config.image_size),
    encoder=("encoder",),
    encoder_flops=lambda config: encoder_flops(_settings(config).encoder, config.image_size),
    apply=_reconstruct,
    baselines=_baselines,
)
