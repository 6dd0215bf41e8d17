"""The interface of tasks, which is all that training and evaluation know of a task.

All numbers of examples are `[B] float32`: padded examples get weight 0, and no score depends on the
other examples of a batch, but for tasks that compare them (`Task.compares_batch`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
from flax import nnx

from ctssl_jax.data.slices import Targets
from ctssl_jax.ops.images import to_unit_images
from data_prep.system.errors import InputError

# The scores that may choose the best checkpoint (`config.best_by`), each with its direction.
HIGHER_IS_BETTER = {
    "mse": False,
    "masked_mse": False,
    "block_mse": False,
    "ssim": True,
    "cross_entropy": False,
    "double_softmax_cross_entropy": False,
    "accuracy": True,
    "auroc": True,
    "binary_cross_entropy": False,
    "dice": True,
    "iou": True,
    "position_r2": True,
}


class StepOutput(NamedTuple):
    """The values that a task computes from one batch.

    loss: [B] float32, the quantity that is minimised.
    scores: name -> [B] float32, reported as means over examples.
    pictures: `input`, `target`, `prediction`, each [B, H, W, C] float32 in [0, 1]. A segmentation
      adds `target_mask` and `prediction_mask`, [B, H, W, 1] float32, 0 or 1. A label of a slice has
      `input` alone, a joint embedding `input` and views by their titles, square, of any size.
    embedding: [B, D] float32, the encoder's latents averaged over the slice, as downstream tasks
      use them.
    code_counts: [num_codes] float32, uses of each code (weighted by example); None without a
      codebook.
    classes: `label` [B] int32 and `probabilities` [B, K] float32, for scores of a whole split; None
      unless the task predicts a label.
    """

    loss: jax.Array
    scores: dict[str, jax.Array]
    pictures: dict[str, jax.Array]
    embedding: jax.Array
    code_counts: jax.Array | None = None
    classes: dict[str, jax.Array] | None = None


class Objective(NamedTuple):
    """One of several losses that a task adds.

    name: scores of it are named `NAME/SCORE`.
    weight: factor of its loss, above 0.
    apply: as `Task.apply`, of this objective alone.
    """

    name: str
    weight: float
    apply: Callable[..., StepOutput]


class Task(NamedTuple):
    """One pretraining strategy or downstream application.

    fields: the fields of the configuration that belong to this task and not to all.
    offsets: configuration -> slices of one item, relative to each other.
    targets: configuration -> the labels and masks of an item, and the slices that are used.
    reported: the scores that evaluation reports, in the order of the paper's Table II; of several
      objectives those that the configuration has.
    check: raises `InputError` if the configuration cannot work at its image size.
    build: makes the model from the configuration.
    flops: configuration -> floating-point operations of one forward pass of one slice.
    encoder: names of the model's parts that pretraining gives and
      `config.encoder_learning_rate_factor` applies to; empty if there is no such part.
    encoder_flops: configuration -> the share of `flops` of these parts.
    apply: (model, batch, keys, model_key, config, train=) -> `StepOutput`; the batch is from
      `ctssl_jax.data.batches`, on the devices.
    baselines: (batch, keys, mean_image, config) -> scores of predictors without a model on the same
      inputs; may be empty.
    over_annotated: scores that are means over the slices with a mask alone. They are 0 on the
      others, and the score `annotated_slices` is 1 or 0.
    class_names: of the classes that the task itself makes, in the order of the probabilities.
    teacher_flops: configuration -> the part of `flops` that has no backward pass.
    after_step: (model, configuration): changes the model's state, not its parameters, after each
      step of the optimizer; None if there is nothing to change.
    stacked: the slices of one item are channels of one image, so that the model has as many
      channels as they have together.
    compares_batch: the loss compares the examples of a batch with each other. So a validation reads
      its slices in random order, and its loss depends on the size of its batches.
    objectives: configuration -> the losses that `apply` adds, if there are several: training takes
      the gradient of each by itself and reports its norm at the encoder.
    """

    fields: tuple[str, ...]
    offsets: Callable[[ml_collections.ConfigDict], tuple[int, ...]]
    targets: Callable[[ml_collections.ConfigDict], Targets]
    reported: tuple[str, ...]
    check: Callable[[ml_collections.ConfigDict], None]
    build: Callable[[ml_collections.ConfigDict, nnx.Rngs], nnx.Module]
    flops: Callable[[ml_collections.ConfigDict], int]
    encoder: tuple[str, ...]
    encoder_flops: Callable[[ml_collections.ConfigDict], int]
    apply: Callable[..., StepOutput]
    baselines: Callable[..., dict[str, dict[str, jax.Array]]]
    over_annotated: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    teacher_flops: Callable[[ml_collections.ConfigDict], int] = lambda config: 0
    after_step: Callable[[nnx.Module, ml_collections.ConfigDict], None] | None = None
    stacked: bool = False
    compares_batch: bool = False
    objectives: Callable[[ml_collections.ConfigDict], tuple[Objective, ...]] = lambda config: ()


class Architecture(NamedTuple):
    """The differences between the models of one task.

    settings: configuration -> settings of the model; raises `InputError` for impossible settings.
    build: (settings, rngs) -> model.
    call: (model, inputs, train, key, configuration) -> output of the model.
    flops: (settings, image_size) -> floating-point operations of one forward pass of one input.
    encoder, encoder_flops: as `Task.encoder`, and its share of `flops`, with the same arguments.
    """

    settings: Callable
    build: Callable
    call: Callable
    flops: Callable
    encoder: tuple[str, ...]
    encoder_flops: Callable


def is_frozen(config: ml_collections.ConfigDict) -> bool:
    """Whether the task's encoder keeps its weights and behaves as in evaluation."""
    return config.encoder_learning_rate_factor == 0


def step_flops(task: Task, config: ml_collections.ConfigDict) -> int:
    """Floating-point operations of a training step on one slice: three times those of the forward
    pass, but of a frozen encoder and of a teacher only their forward pass."""
    kept = task.teacher_flops(config) + (task.encoder_flops(config) if is_frozen(config) else 0)
    learning = task.flops(config) - kept
    return task.flops(config) + 2 * learning


def item_slices(images: jax.Array, index: int, config: ml_collections.ConfigDict) -> jax.Array:
    """One slice of each item: [B, K, H, W, C] uint8 -> [B, H, W, channels] float32 in [0, 1]."""
    return to_unit_images(images[:, index], config.model.in_channels, config.normalize)


def model_config(make: type[Any], config: ml_collections.ConfigDict, **settings: Any) -> Any:
    """Settings of the model from a training configuration; `InputError` for impossible settings."""
    execution = {
        name: config[name]
        for name in ("dtype", "remat", "scan")
        if name in make.__dataclass_fields__
    }
    try:
        return make(**config.model.to_dict(), **settings, **execution)
    except (TypeError, ValueError) as error:
        raise InputError(f"config.model: {error}") from None
