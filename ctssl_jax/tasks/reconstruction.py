"""Tasks that reconstruct a slice: masked region, next slice, denoising.

Paper, sections II.C.1 to 3. They differ in the corruption alone: model, scores and composite loss
are the same.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from ctssl_jax.data.slices import Targets
from ctssl_jax.models.quantizer import code_counts
from ctssl_jax.models.vqvae import VQVAE, VQVAEConfig, encoder_flops, flops_per_slice
from ctssl_jax.ops import corruptions, losses
from ctssl_jax.ops.images import SSIM_WINDOW, ssim, to_unit_range
from ctssl_jax.tasks.interface import StepOutput, Task, is_frozen, item_slices, model_config
from data_prep.system.errors import InputError


class Example(NamedTuple):
    """Input and target of the autoencoder.

    inputs, target: [B, H, W, channels] float32 in [0, 1].
    region: [B, H, W, 1] float32, 1 where the slice is covered; None if it is not.
    """

    inputs: jax.Array
    target: jax.Array
    region: jax.Array | None = None


def _mask_region(images: jax.Array, keys: jax.Array, config: ml_collections.ConfigDict) -> Example:
    """Cover one square region and reconstruct the whole slice (paper, section II.C.2), or some
    squares of a grid (`config.mask.block`; SimMIM, arXiv 2111.09886)."""
    target, mask = item_slices(images, 0, config), config.mask
    if mask.block:
        inputs, region = corruptions.mask_blocks(
            keys, target, fraction=mask.fraction, side=mask.block, fill=mask.fill
        )
        return Example(inputs, target, region)
    inputs, region = corruptions.mask_region(
        keys, target, fraction=mask.fraction, unit=mask.unit, margin=mask.margin, fill=mask.fill
    )
    return Example(inputs, target, region)


def _next_slice(images: jax.Array, keys: jax.Array, config: ml_collections.ConfigDict) -> Example:
    """Predict the slice `config.slice_gap` further towards superior, without any randomness (paper,
    section II.C.1)."""
    return Example(item_slices(images, 0, config), item_slices(images, 1, config))


def _add_noise(images: jax.Array, keys: jax.Array, config: ml_collections.ConfigDict) -> Example:
    """Remove salt-and-pepper noise (paper, section II.C.3)."""
    target = item_slices(images, 0, config)
    return Example(
        corruptions.salt_and_pepper(keys, target, fraction=config.noise.fraction), target
    )


def _reconstruction_scores(prediction: jax.Array, example: Example) -> dict[str, jax.Array]:
    scores = {"mse": losses.mse(prediction, example.target)}
    if example.region is not None:
        scores["masked_mse"] = losses.masked_mse(prediction, example.target, example.region)
    scores["ssim"] = ssim(to_unit_range(prediction), example.target)
    return scores


def _reconstruct(
    corrupt: Callable[..., Example],
    model: VQVAE,
    batch: dict[str, jax.Array],
    keys: jax.Array,
    model_key: jax.Array | None,
    config: ml_collections.ConfigDict,
    *,
    train: bool,
) -> StepOutput:
    """Predict the target from the corrupted input (paper, equations 1 to 3).

    The loss is w_mse MSE + w_masked MSE and w_l1 L1 inside the region, if there is one + w_vq
    (codebook + beta commitment) - w_ssim SSIM.

    Args:
      corrupt: the corruption, (images, keys, config) -> `Example`.
      model: the autoencoder. Training updates its BatchNorm statistics and codebook in place.
      batch: `images` [B, K, H, W, C] uint8, one slice for each of the task's offsets; `weight` [B]
        float32, 0 for padding.
      keys: [B] keys, one an example, for the place of the region or the noisy pixels.
      model_key: key of the model's own randomness (dropout, codebook revival); None in evaluation.
      config: the training configuration.
      train: training or evaluation mode.
    """
    example = corrupt(batch["images"], keys, config)
    output = model(example.inputs, train=train, key=model_key, frozen_encoder=is_frozen(config))
    scores = _reconstruction_scores(output.reconstruction, example)
    scores["vq_loss"] = losses.vector_quantization_loss(
        output.codebook_loss, output.commitment_loss, config.commitment
    )
    terms = config.loss
    loss = terms.mse * scores["mse"]
    if example.region is not None:
        loss += terms.masked_mse * scores["masked_mse"]
        if terms.masked_l1:
            difference = output.reconstruction, example.target, example.region
            loss += terms.masked_l1 * losses.masked_l1(*difference)
    similarity = scores["ssim"]
    if config.ssim_rescale:  # in the loss only: the reported SSIM stays comparable
        similarity = ssim(to_unit_range(output.reconstruction, rescale=True), example.target)
    loss = loss + terms.vq * scores["vq_loss"] - terms.ssim * similarity
    return StepOutput(
        loss=loss,
        scores=scores,
        pictures={
            "input": example.inputs,
            "target": example.target,
            "prediction": jnp.clip(output.reconstruction, 0, 1),
        },
        embedding=jnp.mean(output.latents, axis=(1, 2)),
        code_counts=code_counts(output.codes, config.model.num_codes, batch["weight"]),
    )


def _reconstruction_baselines(
    corrupt: Callable[..., Example],
    batch: dict[str, jax.Array],
    keys: jax.Array,
    mean_image: jax.Array,
    config: ml_collections.ConfigDict,
) -> dict[str, dict[str, jax.Array]]:
    """Predict the mean training slice, or copy the input.

    Args:
      corrupt: the corruption, (images, keys, config) -> `Example`.
      batch: `images` [B, K, H, W, C] uint8.
      keys: [B] keys, as for the model.
      mean_image: [H, W, C] float32 in [0, 1].
      config: the training configuration.

    Returns:
      `{"mean_image": {score: [B]}, "copy_input": {score: [B]}}` with the scores that the task
      reports.
    """
    example = corrupt(batch["images"], keys, config)
    predictions = {
        "mean_image": jnp.broadcast_to(mean_image, example.target.shape),
        "copy_input": example.inputs,
    }
    return {
        name: _reconstruction_scores(prediction, example)
        for name, prediction in predictions.items()
    }


def _check_reconstruction(check: Callable[..., None], config: ml_collections.ConfigDict) -> None:
    if config.image_size < SSIM_WINDOW:
        raise InputError(
            f"config.image_size={config.image_size}: SSIM needs at least {SSIM_WINDOW} pixels; "
            "prepare with a larger --image_size"
        )
    model_config(VQVAEConfig, config)
    check(config)


def _check_mask(config: ml_collections.ConfigDict) -> None:
    mask, image_size = config.mask, config.image_size
    if mask.block:
        if mask.unit != "area" or mask.margin:
            raise InputError(
                f"config.mask.block={mask.block}: blocks of a grid have no margin, and their "
                "fraction is of the area; set --config.mask.margin=0 --config.mask.unit=area"
            )
        try:
            corruptions.num_blocks(image_size, image_size, fraction=mask.fraction, side=mask.block)
        except ValueError as error:
            raise InputError(f"config.mask.block={mask.block}: {error}") from None
        return
    try:
        side = corruptions.mask_side(image_size, image_size, fraction=mask.fraction, unit=mask.unit)
    except ValueError as error:
        raise InputError(f"config.mask: {error}") from None
    if side + mask.margin > image_size:
        raise InputError(
            f"config.mask: a mask of {side} pixels with margin {mask.margin} does not fit into "
            f"{image_size} pixels; lower config.mask.margin or config.mask.fraction"
        )


def _task(
    corrupt: Callable[..., Example],
    *,
    field: str,
    reported: tuple[str, ...],
    check: Callable[[ml_collections.ConfigDict], None] = lambda config: None,
    offsets: Callable[[ml_collections.ConfigDict], tuple[int, ...]] = lambda config: (0,),
) -> Task:
    return Task(
        fields=(field, "loss", "commitment", "ssim_rescale"),
        offsets=offsets,
        targets=lambda config: Targets(),
        reported=reported,
        check=functools.partial(_check_reconstruction, check),
        build=lambda config, rngs: VQVAE(model_config(VQVAEConfig, config), rngs=rngs),
        flops=lambda config: flops_per_slice(model_config(VQVAEConfig, config), config.image_size),
        encoder=("encoder",),
        encoder_flops=lambda config: encoder_flops(
            model_config(VQVAEConfig, config), config.image_size
        ),
        apply=functools.partial(_reconstruct, corrupt),
        baselines=functools.partial(_reconstruction_baselines, corrupt),
    )


MASKED_REGION = _task(
    _mask_region, field="mask", reported=("mse", "masked_mse", "ssim"), check=_check_mask
)
NEXT_SLICE = _task(
    _next_slice,
    field="slice_gap",
    reported=("mse", "ssim"),
    offsets=lambda config: (0, config.slice_gap),
)
DENOISING = _task(_add_noise, field="noise", reported=("mse", "ssim"))
