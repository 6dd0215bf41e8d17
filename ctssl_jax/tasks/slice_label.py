"""Tasks that predict a label from a slice: pulmonary embolism, or a label of the user.

Paper, section II.D. Two models: the pretrained encoder with classification layers, and
SE-ResNeXt-50 on three adjacent slices, the slice stage of the winner of the RSNA challenge.
"""

import functools

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from ctssl_jax.data.slices import Targets
from ctssl_jax.models import classifier, se_resnext, vqvae
from ctssl_jax.ops import augmentations, losses
from ctssl_jax.ops.images import to_unit_images
from ctssl_jax.tasks.interface import Architecture, StepOutput, Task, is_frozen, model_config
from data_prep.system.errors import InputError


def _probabilities(logits: jax.Array) -> jax.Array:
    """Logits [B, K] (or one logit [B, 1] of two classes) -> probabilities [B, classes] float32."""
    return jax.nn.softmax(_two_columns(logits).astype(jnp.float32))


def _two_columns(logits: jax.Array) -> jax.Array:
    """One logit of a positive class as two logits of a softmax, which is the same model."""
    return (
        jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)
        if logits.shape[-1] == 1
        else logits
    )


def inputs(batch: dict[str, jax.Array], config: ml_collections.ConfigDict) -> jax.Array:
    """The slices of an item as channels, cropped by `config.crop`, if there is one: [B, H, W,
    channels] float32 in [0, 1]."""
    images = jnp.concatenate(list(jnp.moveaxis(batch["images"], 1, 0)), axis=-1)
    images = to_unit_images(images, config.model.in_channels, config.normalize)
    crop = config.get("crop", "none")
    return augmentations.crop_to_box(images, batch["box"]) if crop == "lung_box" else images


def _middle_slice(images: jax.Array, num_slices: int) -> jax.Array:
    """The slice that has the label, of slices as channels."""
    channels = images.shape[-1] // num_slices
    start = num_slices // 2 * channels
    return images[..., start : start + channels]


def _predict(
    architecture: Architecture,
    model: nnx.Module,
    batch: dict[str, jax.Array],
    keys: jax.Array,
    model_key: jax.Array | None,
    config: ml_collections.ConfigDict,
    *,
    train: bool,
) -> StepOutput:
    """Cross-entropy of the label. Slices of the training are augmented.

    Args:
      architecture: the kind of model, with logits [B, K] and embedding [B, D].
      model: the classifier. Training updates its BatchNorm statistics in place.
      batch: `images` [B, K, H, W, C] uint8, `label` [B] int32; with `config.crop` `box` [B, 4]
        float32.
      keys: [B] keys, one an example, for the augmentation.
      model_key: key of the model's own randomness (dropout); None in evaluation.
      config: the training configuration.
      train: training or evaluation mode.
    """
    images = inputs(batch, config)
    if train:
        images = augmentations.augment(keys, images, **config.augmentation)
    logits, embedding = architecture.call(model, images, train, model_key, config)
    loss = losses.cross_entropy(_two_columns(logits), batch["label"])
    probabilities = _probabilities(logits)
    right = jnp.argmax(probabilities, axis=-1) == batch["label"]
    return StepOutput(
        loss=loss,
        scores={"cross_entropy": loss, "accuracy": right.astype(jnp.float32)},
        pictures={"input": _middle_slice(images, batch["images"].shape[1])},
        embedding=embedding,
        classes={"label": batch["label"], "probabilities": probabilities},
    )


def _check(
    architecture: Architecture, offsets: tuple[int, ...], config: ml_collections.ConfigDict
) -> None:
    if not config.label:
        raise InputError(
            "config.label is empty; name a label of the dataset, e.g. "
            "--config.label=pe_present_on_image"
        )
    if config.num_classes < 2:
        raise InputError(
            f"config.num_classes={config.num_classes}: must be 2 or more, or 0 for as many as it "
            "has"
        )
    augmentations.check(config.augmentation)
    channels = architecture.settings(config).in_channels
    number = len(config.windows) or max(1, channels // len(offsets))  # else those of the dataset
    if offsets != (0,) and channels != number * len(offsets):
        raise InputError(
            f"config.model.in_channels={channels}, but {len(offsets)} adjacent slices of {number} "
            f"window(s) make {number * len(offsets)} channels"
        )


def _targets(config: ml_collections.ConfigDict) -> Targets:
    return Targets(
        label=config.label,
        lung_box=config.crop == "lung_box",
        repeat_edges=True,
        middle_only=config.slices == "middle",
        positive_share=config.positive_share,
        shuffled=config.shuffled_targets,
    )


def _task(
    architecture: Architecture, offsets: tuple[int, ...], fields: tuple[str, ...] = ()
) -> Task:
    """A task whose model gets slices at these offsets as channels; `fields` are its own fields."""
    return Task(
        fields=(
            "label",
            "num_classes",
            "slices",
            "positive_share",
            "shuffled_targets",
            "crop",
            "augmentation",
            *fields,
        ),
        offsets=lambda config: offsets,
        targets=_targets,
        reported=("cross_entropy", "accuracy"),
        check=functools.partial(_check, architecture, offsets),
        build=lambda config, rngs: architecture.build(architecture.settings(config), rngs=rngs),
        flops=lambda config: architecture.flops(architecture.settings(config), config.image_size),
        encoder=architecture.encoder,
        encoder_flops=lambda config: architecture.encoder_flops(
            architecture.settings(config), config.image_size
        ),
        apply=functools.partial(_predict, architecture),
        baselines=lambda batch, keys, mean_image, config: {},
        stacked=offsets != (0,),
    )


def _classifier_settings(config: ml_collections.ConfigDict) -> classifier.ClassifierConfig:
    return model_config(classifier.ClassifierConfig, config, num_classes=config.num_classes)


def _call_classifier(model, inputs, train, key, config) -> tuple[jax.Array, jax.Array]:
    logits, latents = model(inputs, train=train, key=key, frozen_encoder=is_frozen(config))
    return logits, jnp.mean(latents, axis=(1, 2))


def _se_resnext_settings(config: ml_collections.ConfigDict) -> se_resnext.SEResNeXtConfig:
    num_classes = 1 if config.num_classes == 2 else config.num_classes
    return model_config(se_resnext.SEResNeXtConfig, config, num_classes=num_classes)


def _call_se_resnext(model, inputs, train, key, config) -> tuple[jax.Array, jax.Array]:
    output = model(inputs, train=train, frozen_encoder=is_frozen(config))
    return output.logits, output.embedding


SLICE_LABEL = _task(
    Architecture(
        settings=_classifier_settings,
        build=classifier.Classifier,
        call=_call_classifier,
        flops=classifier.flops_per_slice,
        encoder=("encoder",),
        encoder_flops=lambda settings, size: vqvae.encoder_flops(settings.encoder, size),
    ),
    offsets=(0,),
)
SLICE_LABEL_SE_RESNEXT = _task(
    Architecture(
        settings=_se_resnext_settings,
        build=se_resnext.SEResNeXt,
        call=_call_se_resnext,
        flops=se_resnext.flops_per_slice,
        encoder=se_resnext.BACKBONE,
        encoder_flops=se_resnext.backbone_flops,
    ),
    offsets=(-1, 0, 1),
    fields=("init_weights",),
)
