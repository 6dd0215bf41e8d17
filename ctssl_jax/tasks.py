"""Pretraining tasks: what each shows the model, what it must predict, and how that is scored.

A task is plain functions; the training loop and the evaluation know nothing else of it. All per-example numbers are
`[B] float32`, so that padded examples get weight 0 and nothing depends on how a batch was put together.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from ctssl_jax import corruptions, losses, metrics
from ctssl_jax.command_line import InputError
from ctssl_jax.models.vqvae import VQVAE, VQVAEConfig


class StepOutput(NamedTuple):
    """What a task computes from one batch.

    loss: [B] float32, the quantity that is minimised.
    scores: name -> [B] float32, reported as means over examples.
    code_counts: [num_codes] float32, how often each code was used (weighted by example).
    pictures: `input`, `target`, `prediction`, each [B, H, W, C] float32 in [0, 1].
    """

    loss: jax.Array
    scores: dict[str, jax.Array]
    code_counts: jax.Array
    pictures: dict[str, jax.Array]


class Task(NamedTuple):
    """One pretraining strategy.

    offsets: slices of one item, relative to each other.
    reported: the scores that evaluation reports, in the order of the paper's Table II.
    check: raises `InputError` if the configuration cannot work at an image size.
    build: makes the model from the configuration.
    apply: model and batch -> `StepOutput`.
    baselines: scores of predictors without a model, on the same corrupted inputs.
    """

    offsets: tuple[int, ...]
    reported: tuple[str, ...]
    check: Callable[[ml_collections.ConfigDict, int], None]
    build: Callable[[ml_collections.ConfigDict, nnx.Rngs], nnx.Module]
    apply: Callable[..., StepOutput]
    baselines: Callable[..., dict[str, dict[str, jax.Array]]]


def model_config(config: ml_collections.ConfigDict) -> VQVAEConfig:
    """The autoencoder's settings out of a training configuration.

    Raises:
      InputError: a setting that the model cannot have.
    """
    try:
        return VQVAEConfig(
            **{**config.model.to_dict(), "hidden": tuple(config.model.hidden)},
            dtype=config.dtype,
            remat=config.remat,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"config.model: {error}") from None


def to_unit_images(images: jax.Array, channels: int, normalize: str) -> jax.Array:
    """Grey values to the model's input range.

    Args:
      images: [B, H, W, C] uint8, windowed: 0 is the lower end of the window, 255 the upper.
      channels: of the model; one grey channel is copied to three if the model wants three.
      normalize: `window` keeps the affine map from HU, the same for every slice; `slice_minmax` stretches each slice
        from its own minimum to its own maximum (the authors' release).

    Returns:
      [B, H, W, channels] float32 in [0, 1].
    """
    unit = images.astype(jnp.float32) / 255
    if normalize == "slice_minmax":
        unit = metrics.to_unit_range(unit, rescale=True)
    return jnp.broadcast_to(unit, (*unit.shape[:-1], channels)) if unit.shape[-1] == 1 else unit


def _check_masked_region(config: ml_collections.ConfigDict, image_size: int) -> None:
    if image_size < metrics.SSIM_WINDOW:
        raise InputError(
            f"config.image_size={image_size}: SSIM needs at least {metrics.SSIM_WINDOW} pixels; prepare with a larger "
            "--image_size"
        )
    mask = config.mask
    try:
        side = corruptions.mask_side(image_size, image_size, fraction=mask.fraction, unit=mask.unit)
    except ValueError as error:
        raise InputError(f"config.mask: {error}") from None
    if mask.margin < 0 or side + mask.margin > image_size:
        raise InputError(
            f"config.mask: a mask of {side} pixels with margin {mask.margin} does not fit into {image_size} pixels; "
            "lower config.mask.margin or config.mask.fraction"
        )


def _build_autoencoder(config: ml_collections.ConfigDict, rngs: nnx.Rngs) -> VQVAE:
    return VQVAE(model_config(config), rngs=rngs)


def _mask(
    images: jax.Array, keys: jax.Array, config: ml_collections.ConfigDict
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B, 1, H, W, C] uint8 -> input and target [B, H, W, channels] in [0, 1], region [B, H, W, 1]."""
    target = to_unit_images(images[:, 0], config.model.in_channels, config.normalize)
    mask = config.mask
    inputs, region = corruptions.mask_region(
        keys, target, fraction=mask.fraction, unit=mask.unit, margin=mask.margin, fill=mask.fill
    )
    return inputs, target, region


def _apply_masked_region(
    model: VQVAE,
    images: jax.Array,
    weight: jax.Array,
    keys: jax.Array,
    model_key: jax.Array | None,
    config: ml_collections.ConfigDict,
    *,
    train: bool,
) -> StepOutput:
    """Cover one square region and reconstruct the whole slice (paper, section II.C.2 and equation 2).

    The loss is w_mse MSE + w_masked MSE inside the region + w_vq (codebook + beta commitment) - w_ssim SSIM.

    Args:
      model: the autoencoder; its state (BatchNorm statistics, codebook) is updated in place if `train`.
      images: [B, 1, H, W, C] uint8.
      weight: [B] float32, 0 for padding.
      keys: [B] keys, one an example: where the region lies.
      model_key: key of the model's own randomness (dropout, codebook revival); None in evaluation.
      config: the training configuration.
      train: training or evaluation mode.
    """
    inputs, target, region = _mask(images, keys, config)
    output = model(inputs, train=train, key=model_key)
    prediction = output.reconstruction
    scores = {
        "mse": losses.mse(prediction, target),
        "masked_mse": losses.masked_mse(prediction, target, region),
        "ssim": metrics.ssim(metrics.to_unit_range(prediction, rescale=config.ssim_rescale), target),
        "vq_loss": losses.vector_quantization_loss(output.codebook_loss, output.commitment_loss, config.commitment),
    }
    terms = config.loss
    loss = (
        terms.mse * scores["mse"]
        + terms.masked_mse * scores["masked_mse"]
        + terms.vq * scores["vq_loss"]
        - terms.ssim * scores["ssim"]
    )
    return StepOutput(
        loss=loss,
        scores=scores,
        code_counts=metrics.code_counts(output.codes, config.model.num_codes, weight),
        pictures={"input": inputs, "target": target, "prediction": jnp.clip(prediction, 0, 1)},
    )


def _masked_region_baselines(
    images: jax.Array, keys: jax.Array, mean_image: jax.Array, config: ml_collections.ConfigDict
) -> dict[str, dict[str, jax.Array]]:
    """Predict the mean training slice, or copy the masked input.

    Args:
      images: [B, 1, H, W, C] uint8.
      keys: [B] keys, as for the model.
      mean_image: [H, W, C] float32 in [0, 1].
      config: the training configuration.

    Returns:
      `{"mean_image": {score: [B]}, "copy_input": {score: [B]}}` with the scores mse, masked_mse and ssim.
    """
    inputs, target, region = _mask(images, keys, config)
    predictions = {"mean_image": jnp.broadcast_to(mean_image, target.shape), "copy_input": inputs}
    return {
        name: {
            "mse": losses.mse(prediction, target),
            "masked_mse": losses.masked_mse(prediction, target, region),
            "ssim": metrics.ssim(prediction, target),
        }
        for name, prediction in predictions.items()
    }


TASKS = {
    "masked_region": Task(
        offsets=(0,),
        reported=("mse", "masked_mse", "ssim"),
        check=_check_masked_region,
        build=_build_autoencoder,
        apply=_apply_masked_region,
        baselines=_masked_region_baselines,
    ),
}


def get_task(name: str) -> Task:
    """Task by the name that `config.task` gives.

    Raises:
      InputError: no such task.
    """
    if name not in TASKS:
        raise InputError(f"config.task={name!r} is not known; choose one of {', '.join(sorted(TASKS))}")
    return TASKS[name]
