"""Tasks that draw a mask on a slice: nodules, or masks of the user (paper, section II.E).

Two models: a U-Net whose down branch is the pretrained encoder, and a standard U-Net as reference.
"""

import functools

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from ctssl_jax.data.slices import Targets
from ctssl_jax.models import unet
from ctssl_jax.ops import augmentations, losses, overlap
from ctssl_jax.tasks.interface import (
    Architecture,
    StepOutput,
    Task,
    is_frozen,
    item_slices,
    model_config,
)
from data_prep.system.errors import InputError


def _segment(
    architecture: Architecture,
    model: nnx.Module,
    batch: dict[str, jax.Array],
    keys: jax.Array,
    model_key: jax.Array | None,
    config: ml_collections.ConfigDict,
    *,
    train: bool,
) -> StepOutput:
    """Binary cross-entropy plus soft Dice loss against the union of the slice's regions.

    All regions of a slice count, so that a correct detection is never penalised.

    Args:
      architecture: the kind of model, with a `UNetOutput`.
      model: the U-Net. Training updates its BatchNorm statistics in place.
      batch: `images` [B, 1, H, W, C] uint8, `mask` [B, H, W] uint8 (0 background).
      keys: [B] keys, one an example, for the augmentation.
      model_key: key of the model's own randomness (dropout); None in evaluation.
      config: the training configuration.
      train: training or evaluation mode.
    """
    images, mask = item_slices(batch["images"], 0, config), (batch["mask"] > 0).astype(jnp.float32)
    if train:
        images, mask = augmentations.augment_with_masks(keys, images, mask, **config.augmentation)
    logits, embedding = architecture.call(model, images, train, model_key, config)
    bce = losses.binary_cross_entropy(logits, mask)
    soft_dice = losses.soft_dice(logits, mask)
    intersection, predicted, target = overlap.counts(logits, mask)
    annotated = (target > 0).astype(jnp.float32)
    scores = {
        "binary_cross_entropy": bce,
        "annotated_slices": annotated,
        "dice": annotated * overlap.dice(intersection, predicted, target),
        "iou": annotated * overlap.iou(intersection, predicted, target),
        "intersection_px": intersection,
        "predicted_px": predicted,
        "target_px": target,
    }
    return StepOutput(
        loss=config.loss.bce * bce + config.loss.dice * soft_dice,
        scores=scores,
        pictures={
            "input": images,
            "target": images,
            "prediction": images,
            "target_mask": mask[..., None],
            "prediction_mask": (logits > 0).astype(jnp.float32)[..., None],
        },
        embedding=embedding,
    )


def _check(architecture: Architecture, config: ml_collections.ConfigDict) -> None:
    augmentations.check(config.augmentation)
    architecture.settings(config)
    if config.image_size % unet.STRIDE:
        raise InputError(
            f"config.image_size={config.image_size} is not divisible by the U-Net's stride "
            f"{unet.STRIDE}; prepare with an --image_size that is"
        )


def _task(architecture: Architecture) -> Task:
    return Task(
        fields=("positive_share", "shuffled_targets", "augmentation", "loss"),
        offsets=lambda config: (0,),
        targets=lambda config: Targets(
            mask=True,
            positive_share=config.positive_share,
            shuffled=config.shuffled_targets,
        ),
        reported=("binary_cross_entropy", "dice", "iou"),
        check=functools.partial(_check, architecture),
        build=lambda config, rngs: architecture.build(architecture.settings(config), rngs=rngs),
        flops=lambda config: architecture.flops(architecture.settings(config), config.image_size),
        encoder=architecture.encoder,
        encoder_flops=lambda config: architecture.encoder_flops(
            architecture.settings(config), config.image_size
        ),
        apply=functools.partial(_segment, architecture),
        baselines=lambda batch, keys, mean_image, config: {},
        over_annotated=("dice", "iou"),
    )


def _call_encoder_unet(model, images, train, key, config) -> unet.UNetOutput:
    return model(images, train=train, key=key, frozen_encoder=is_frozen(config))


SEGMENTATION = _task(
    Architecture(
        settings=functools.partial(model_config, unet.UNetConfig),
        build=unet.UNet,
        call=_call_encoder_unet,
        flops=unet.flops_per_slice,
        encoder=("encoder",),
        encoder_flops=unet.encoder_flops_per_slice,
    )
)
SEGMENTATION_STANDARD_UNET = _task(
    Architecture(
        settings=functools.partial(model_config, unet.StandardUNetConfig),
        build=unet.StandardUNet,
        call=lambda model, images, train, key, config: model(images, train=train),
        flops=unet.standard_flops_per_slice,
        encoder=(),
        encoder_flops=lambda settings, size: 0,
    )
)
