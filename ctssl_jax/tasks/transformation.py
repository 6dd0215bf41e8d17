"""Tasks that tell how a slice was transformed: rotation, flip (paper, sections II.C.4 and 5).

They differ in the transformation alone: model, scores and loss are the same.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from ctssl_jax.data.slices import Targets
from ctssl_jax.models.classifier import Classifier, ClassifierConfig, flops_per_slice
from ctssl_jax.models.vqvae import encoder_flops
from ctssl_jax.ops import corruptions, losses
from ctssl_jax.tasks.interface import StepOutput, Task, is_frozen, item_slices, model_config


class Transformation(NamedTuple):
    """A set of transformations of a slice. The label is the number of the one that was applied.

    class_names: of the transformations.
    apply, undo: (images [B, H, W, C], labels [B] int32) -> images.
    """

    class_names: tuple[str, ...]
    apply: Callable[[jax.Array, jax.Array], jax.Array]
    undo: Callable[[jax.Array, jax.Array], jax.Array]

    @property
    def num_classes(self) -> int:
        """Number of transformations."""
        return len(self.class_names)


def _classification_scores(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    return {
        "cross_entropy": losses.cross_entropy(logits, labels),
        "double_softmax_cross_entropy": losses.double_softmax_cross_entropy(logits, labels),
        "accuracy": (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32),
    }


def _classify(
    transformation: Transformation,
    model: Classifier,
    batch: dict[str, jax.Array],
    keys: jax.Array,
    model_key: jax.Array | None,
    config: ml_collections.ConfigDict,
    *,
    train: bool,
) -> StepOutput:
    """Tell which transformation was applied. The loss is the cross-entropy on logits.

    The picture of a prediction is the input with the predicted transformation undone. A right one
    equals the target.

    Args:
      transformation: rotation or flip.
      model: the classifier. Training updates its BatchNorm statistics in place.
      batch: `images` [B, 1, H, W, C] uint8.
      keys: [B] keys, one an example, for the label.
      model_key: key of the model's own randomness (dropout); None in evaluation.
      config: the training configuration.
      train: training or evaluation mode.
    """
    target = item_slices(batch["images"], 0, config)
    labels = corruptions.random_labels(keys, transformation.num_classes)
    inputs = transformation.apply(target, labels)
    logits, latents = model(inputs, train=train, key=model_key, frozen_encoder=is_frozen(config))
    scores = _classification_scores(logits, labels)
    return StepOutput(
        loss=scores["cross_entropy"],
        scores=scores,
        pictures={
            "input": inputs,
            "target": target,
            "prediction": transformation.undo(inputs, jnp.argmax(logits, axis=-1)),
        },
        embedding=jnp.mean(latents, axis=(1, 2)),
        classes={"label": labels, "probabilities": jax.nn.softmax(logits)},
    )


def _classification_baselines(
    num_classes: int,
    batch: dict[str, jax.Array],
    keys: jax.Array,
    mean_image: jax.Array,
    config: ml_collections.ConfigDict,
) -> dict[str, dict[str, jax.Array]]:
    """`{"equal_probabilities": {score: [B]}}`: all classes are equally probable. For the accuracy
    the first one is predicted."""
    labels = corruptions.random_labels(keys, num_classes)
    return {
        "equal_probabilities": _classification_scores(jnp.zeros((len(labels), num_classes)), labels)
    }


def _task(transformation: Transformation) -> Task:
    def settings(config: ml_collections.ConfigDict) -> ClassifierConfig:
        return model_config(ClassifierConfig, config, num_classes=transformation.num_classes)

    def check(config: ml_collections.ConfigDict) -> None:
        settings(config)

    return Task(
        fields=(),
        offsets=lambda config: (0,),
        targets=lambda config: Targets(),
        reported=("cross_entropy", "double_softmax_cross_entropy", "accuracy"),
        check=check,
        build=lambda config, rngs: Classifier(settings(config), rngs=rngs),
        flops=lambda config: flops_per_slice(settings(config), config.image_size),
        encoder=("encoder",),
        encoder_flops=lambda config: encoder_flops(settings(config).encoder, config.image_size),
        apply=functools.partial(_classify, transformation),
        baselines=functools.partial(_classification_baselines, transformation.num_classes),
        class_names=transformation.class_names,
    )


ROTATION = _task(
    Transformation(
        class_names=("turned 0°", "turned 90°", "turned 180°", "turned 270°"),
        apply=corruptions.rotate,
        undo=lambda images, quarter_turns: corruptions.rotate(images, -quarter_turns),
    )
)
FLIP = _task(
    Transformation(
        class_names=("not flipped", "flipped left-right", "flipped up-down"),
        apply=corruptions.flip,
        undo=corruptions.flip,
    )
)
