"""What a task is to the training loop and the evaluation, which know nothing else of it.

All per-example numbers are `[B] float32`, so that padded examples get weight 0 and nothing depends
on how a batch was put together.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
from flax import nnx

from ctssl_jax.data.slices import Targets
from ctssl_jax.ops.images import to_unit_images
from data_prep.system.errors import InputError


class StepOutput(NamedTuple):
    """What a task computes from one batch.

    loss: [B] float32, the quantity that is minimised.
    scores: name -> [B] float32, reported as means over examples.
    pictures: `input`, `target`, `prediction`, each [B, H, W, C] float32 in [0, 1]; of a
      segmentation also `target_mask` and `prediction_mask`, [B, H, W, 1] float32, 0 or 1.
    embedding: [B, D] float32, the encoder's latents averaged over the slice: what a downstream task
      would be given.
    code_counts: [num_codes] float32, how often each code was used (weighted by example); None
      without a codebook.
    classes: `label` [B] int32 and `probabilities` [B, K] float32, which scores of a whole split
      need; None unless the task predicts a label.
    """

    loss: jax.Array
    scores: dict[str, jax.Array]
    pictures: dict[str, jax.Array]
    embedding: jax.Array
    code_counts: jax.Array | None = None
    classes: dict[str, jax.Array] | None = None


class Task(NamedTuple):
    """One pretraining strategy or downstream application.

    fields: the configuration's fields that belong to this task and not to all.
    offsets: configuration -> slices of one item, relative to each other.
    targets: configuration -> what an item carries beside its slices, and which slices are taken.
    reported: the scores that evaluation reports, in the order of the paper's Table II.
    check: raises `InputError` if the configuration cannot work at its image size.
    build: makes the model from the configuration.
    flops: configuration -> floating-point operations of one forward pass of one slice.
    apply: (model, batch, keys, model_key, config, train=) -> `StepOutput`; the batch is that of
      `ctssl_jax.data.slices`, on the devices.
    baselines: (batch, keys, mean_image, config) -> scores of predictors without a model, on the
      same inputs; empty if there are none.
    """

    fields: tuple[str, ...]
    offsets: Callable[[ml_collections.ConfigDict], tuple[int, ...]]
    targets: Callable[[ml_collections.ConfigDict], Targets]
    reported: tuple[str, ...]
    check: Callable[[ml_collections.ConfigDict], None]
    build: Callable[[ml_collections.ConfigDict, nnx.Rngs], nnx.Module]
    flops: Callable[[ml_collections.ConfigDict], int]
    apply: Callable[..., StepOutput]
    baselines: Callable[..., dict[str, dict[str, jax.Array]]]


class Architecture(NamedTuple):
    """What differs between the models of a task that has several.

    settings: configuration -> settings of the model; raises `InputError` for what the model cannot
      have.
    build: (settings, rngs) -> model.
    call: (model, inputs, train, key, configuration) -> what the task takes from the model.
    flops: (settings, image_size) -> floating-point operations of one forward pass of one input.
    """

    settings: Callable
    build: Callable
    call: Callable
    flops: Callable


def item_slices(images: jax.Array, index: int, config: ml_collections.ConfigDict) -> jax.Array:
    """One slice of each item: [B, K, H, W, C] uint8 -> [B, H, W, channels] float32 in [0, 1]."""
    return to_unit_images(images[:, index], config.model.in_channels, config.normalize)


def model_config(
    make: Callable[..., Any], config: ml_collections.ConfigDict, **settings: Any
) -> Any:
    """The model's settings out of a training configuration; `InputError` for one that the model
    cannot have."""
    try:
        return make(
            **config.model.to_dict(),
            **settings,
            dtype=config.dtype,
            remat=config.remat,
            scan=config.scan,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"config.model: {error}") from None
