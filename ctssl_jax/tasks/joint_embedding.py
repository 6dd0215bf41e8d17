"""Tasks that learn features in which the views of an item agree, and items differ.

LeJEPA, VISReg, VICReg, SimCLR and DINO. They differ in the loss alone: views, encoder and projector
are the same. The views of an item come from different slices of a slab of its volume.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from ctssl_jax.data.slices import Targets
from ctssl_jax.models.joint_embedding import (
    JointEmbedding,
    JointEmbeddingConfig,
    flops_per_view,
)
from ctssl_jax.models.vqvae import Encoder, encoder_flops
from ctssl_jax.ops import joint_losses, views
from ctssl_jax.ops.images import to_unit_images
from ctssl_jax.tasks.interface import StepOutput, Task, is_frozen, item_slices, model_config
from data_prep.system.errors import InputError

VISREG_LEAST_WEIGHT = 0.3  # at 0.05 a run ended at one point, at 0.4 it did not


class Projections(NamedTuple):
    """What a loss may use.

    z: [B, V, D] float32, the projected views of each item, the global ones first.
    model: for DINO, its prototypes and teacher.
    views: of which z is made.
    batch: of the data.
    train: training or evaluation mode.
    """

    z: jax.Array
    model: JointEmbedding
    views: views.Views
    batch: dict[str, jax.Array]
    train: bool


# (projections, configuration) -> loss [B], and its terms, each [B]
Loss = Callable[[Projections, ml_collections.ConfigDict], tuple[jax.Array, dict[str, jax.Array]]]


def _with_regulariser(
    terms_of: Callable[[jax.Array, jax.Array, int], dict[str, jax.Array]],
    given: Projections,
    config: ml_collections.ConfigDict,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(1 - weight) * invariance + weight * the sum of the terms, along directions that are new in
    each step; of the step's number alone, so that all devices and a resumed run draw the same.

    The terms also know how many items a step has: training may see them in several microbatches.
    """
    settings = config.regulariser
    step = given.model.steps[...] if given.train else 0
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    directions = joint_losses.unit_directions(key, settings.directions, given.z.shape[-1])
    agreement = joint_losses.invariance(given.z, config.views.num_global)
    number = config.batch_size if given.train else len(given.z)
    terms = _of_each(terms_of(given.z, directions, number), given.z)
    loss = (1 - settings.weight) * agreement + settings.weight * sum(terms.values())
    return loss, {"invariance": agreement, **terms}


def _of_each(terms: dict[str, jax.Array], z: jax.Array) -> dict[str, jax.Array]:
    """Numbers of a batch as numbers of each of its examples."""
    return {name: jnp.broadcast_to(value, (len(z),)) for name, value in terms.items()}


def _vicreg(
    given: Projections, config: ml_collections.ConfigDict
) -> tuple[jax.Array, dict[str, jax.Array]]:
    terms = _of_each(joint_losses.vicreg(given.z), given.z)
    return sum(config.loss[name] * terms[name] for name in terms), terms


def _simclr(
    given: Projections, config: ml_collections.ConfigDict
) -> tuple[jax.Array, dict[str, jax.Array]]:
    loss = joint_losses.nt_xent(given.z, given.batch["patient"], config.temperature)
    return loss, {"nt_xent": loss}


def _dino(
    given: Projections, config: ml_collections.ConfigDict
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The teacher sees the global views, and its centre follows them."""
    model, settings, train = given.model, config.teacher, given.train
    steps = model.steps[...]
    student = model.scores(given.z, learning=steps >= settings.frozen_steps)
    large = views.Views(given.views.large, given.views.small[:, :0])
    projected = _project(model.teacher, large, config, train=train)[1]
    teacher = jax.lax.stop_gradient(model.teacher.scores(projected))
    first, last = settings.temperature
    share = jnp.minimum(steps / max(1, settings.warmup_steps), 1.0)
    loss = joint_losses.self_distillation(
        student,
        teacher,
        model.centre[...],
        student_temperature=settings.student_temperature,
        teacher_temperature=first + (last - first) * share,
    )
    if train:
        kept = settings.centre_momentum
        mean = jnp.mean(teacher, axis=(0, 1))
        model.centre[...] = kept * model.centre[...] + (1 - kept) * mean
    return loss, {"distillation": loss}


def _project(
    network: Any,
    seen: views.Views,
    config: ml_collections.ConfigDict,
    *,
    train: bool,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Features [B, V, F] and projections [B, V, D] of all views, the global ones first.

    All views of one size pass the encoder as one batch. Running statistics of encoder and neck
    follow the global views alone, which are more like whole slices. Views stay beside their item,
    so that a batch that is split over devices stays where it is.
    """
    parts = []
    for number, images in enumerate((seen.small, seen.large)):
        if not images.shape[1]:
            continue
        statistics = nnx.as_pure(nnx.state(network, nnx.BatchStat))
        output = network.embed(
            images.reshape(-1, *images.shape[2:]),
            train=train,
            key=None if key is None else jax.random.fold_in(key, number),
            frozen_encoder=is_frozen(config),
        )
        parts.append(output.embedding.reshape(*images.shape[:2], -1))
        if number == 0:
            nnx.update(network, statistics)
    features = jnp.concatenate(parts[::-1], axis=1)
    flat = network.projector(features.reshape(-1, features.shape[-1]), train=train)
    return features, flat.reshape(*features.shape[:2], -1)


def _alignment(features: jax.Array) -> jax.Array:
    """Mean squared distance of two views' features of length 1: [B, G, F] -> [B] in [0, 4]."""
    lengths = jnp.linalg.norm(features, axis=-1, keepdims=True)
    unit, number = features / jnp.maximum(lengths, 1e-12), features.shape[1]
    spread = jnp.sum(jnp.square(unit - jnp.mean(unit, axis=1, keepdims=True)), axis=-1)
    return 2 * jnp.mean(spread, axis=1) * number / max(1, number - 1)


def _compare(
    loss_of: Loss,
    model: JointEmbedding,
    batch: dict[str, jax.Array],
    keys: jax.Array,
    model_key: jax.Array | None,
    config: ml_collections.ConfigDict,
    *,
    train: bool,
) -> StepOutput:
    """The loss of the views of a batch; in evaluation also the feature of each whole slice.

    Args:
      loss_of: the objective.
      model: encoder and projector. Training updates its BatchNorm statistics and a centre in place.
      batch: `images` [B, K, H, W, C] uint8, the slices of each item; for SimCLR `patient` [B]
        int32.
      keys: [B] keys, one an example, for the views.
      model_key: key of the model's own randomness (dropout); None in evaluation.
      config: the training configuration.
      train: training or evaluation mode.
    """
    images, settings = batch["images"], config.views
    number, num_slices = images.shape[:2]
    unit = to_unit_images(
        images.reshape(-1, *images.shape[2:]), config.model.in_channels, config.normalize
    )
    seen = views.make_views(keys, unit.reshape(number, num_slices, *unit.shape[1:]), settings)
    features, z = _project(model, seen, config, train=train, key=model_key)
    loss, terms = loss_of(Projections(z, model, seen, batch, train), config)
    slices = item_slices(images, views.slice_offsets(num_slices).index(0), config)
    embedding = features[:, 0] if train else model.embed(slices, train=False).embedding
    shown = {f"global view {n + 1}": seen.large[:, n] for n in range(min(2, settings.num_global))}
    shown |= {f"local view {n + 1}": seen.small[:, n] for n in range(min(2, settings.num_local))}
    return StepOutput(
        loss=loss,
        scores=terms | {"alignment": _alignment(features[:, : settings.num_global])},
        pictures={"input": slices, **shown},
        embedding=embedding,
    )


def _after_step(model: JointEmbedding, config: ml_collections.ConfigDict) -> None:
    """Count the step. A teacher follows: its momentum rises to 1 by a cosine over `num_steps`."""
    if model.config.num_prototypes:
        share = jnp.minimum(model.steps[...] / config.num_steps, 1.0)
        rest = (1 - config.teacher.momentum) * (jnp.cos(math.pi * share) + 1) / 2
        model.follow(1 - rest)
    model.steps[...] = model.steps[...] + 1


def _settings(config: ml_collections.ConfigDict) -> JointEmbeddingConfig:
    return model_config(JointEmbeddingConfig, config)


def _check(fewest_views: int, has_teacher: bool, config: ml_collections.ConfigDict) -> None:
    settings, of_views = _settings(config), config.views
    views.check(of_views, config.image_size, Encoder.stride)
    if of_views.num_global + of_views.num_local < 2 or of_views.num_global < fewest_views:
        raise InputError(
            f"config.views: {of_views.num_global} global and {of_views.num_local} local views of "
            f"an item; two{' global ones' if fewest_views > 1 else ''} are compared at least: set "
            "--config.views.num_global=2"
        )
    if has_teacher != bool(settings.num_prototypes):
        raise InputError(
            f"config.model.num_prototypes={settings.num_prototypes}: must be "
            + ("1 or more" if has_teacher else "0, since this task has no teacher")
        )
    if has_teacher and len(config.teacher.temperature) != 2:
        raise InputError(
            f"config.teacher.temperature={tuple(config.teacher.temperature)}: must hold the first "
            "and the last one, e.g. --config.teacher.temperature='(0.04, 0.07)'"
        )
    if has_teacher and config.teacher.frozen_steps >= config.num_steps:
        raise InputError(
            f"config.teacher.frozen_steps={config.teacher.frozen_steps}: prototypes would never "
            f"learn in config.num_steps={config.num_steps}; set "
            f"--config.teacher.frozen_steps={config.num_steps // 10}"
        )
    if config.task == "visreg" and config.regulariser.weight < VISREG_LEAST_WEIGHT:
        raise InputError(
            f"config.regulariser.weight={config.regulariser.weight}: features of visreg end at one "
            f"point below {VISREG_LEAST_WEIGHT}; set --config.regulariser.weight=0.7"
        )
    fewest_items = 4 if "regulariser" in config else 2  # it looks at their distribution
    if config.batch_size // config.microbatches < fewest_items:
        raise InputError(
            f"config.batch_size={config.batch_size} in {config.microbatches} microbatches: the "
            "items of a microbatch are compared with each other; give "
            f"{fewest_items} or more a microbatch"
        )


def _encoder_flops(config: ml_collections.ConfigDict) -> int:
    settings, of_views = _settings(config).encoder, config.views
    return of_views.num_global * encoder_flops(settings, of_views.global_size) + (
        of_views.num_local * encoder_flops(settings, of_views.local_size)
    )


def _flops(config: ml_collections.ConfigDict) -> int:
    """Of all views of an item, and of the teacher's."""
    settings, of_views = _settings(config), config.views
    student = of_views.num_global * flops_per_view(settings, of_views.global_size) + (
        of_views.num_local * flops_per_view(settings, of_views.local_size)
    )
    return student + _teacher_flops(config)


def _teacher_flops(config: ml_collections.ConfigDict) -> int:
    settings, of_views = _settings(config), config.views
    if not settings.num_prototypes:
        return 0
    return of_views.num_global * flops_per_view(settings, of_views.global_size)


def _targets(patient: bool, config: ml_collections.ConfigDict) -> Targets:
    step = views.slice_step_mm(config.views.slices, config.views.slab_mm)
    return Targets(step_mm=step, patient=patient)


def _task(
    loss_of: Loss,
    *,
    fields: tuple[str, ...],
    reported: tuple[str, ...],
    fewest_views: int = 2,
    patient: bool = False,
    has_teacher: bool = False,
) -> Task:
    """`fewest_views`: global ones; `patient`: the loss knows the patient of each item."""
    return Task(
        fields=("views", *fields),
        offsets=lambda config: views.slice_offsets(config.views.slices),
        targets=functools.partial(_targets, patient),
        reported=(*reported, "alignment"),
        check=functools.partial(_check, fewest_views, has_teacher),
        build=lambda config, rngs: JointEmbedding(_settings(config), rngs=rngs),
        flops=_flops,
        encoder=("encoder",),
        encoder_flops=_encoder_flops,
        apply=functools.partial(_compare, loss_of),
        baselines=lambda batch, keys, mean_image, config: {},
        teacher_flops=_teacher_flops,
        after_step=_after_step,
        compares_batch=True,
    )


LEJEPA = _task(
    functools.partial(
        _with_regulariser,
        lambda z, directions, number: {"sigreg": joint_losses.sigreg(z, directions, number=number)},
    ),
    fields=("regulariser",),
    reported=("invariance", "sigreg"),
    fewest_views=1,
)
VISREG = _task(
    functools.partial(
        _with_regulariser, lambda z, directions, number: joint_losses.visreg(z, directions)
    ),
    fields=("regulariser",),
    reported=("invariance", "center", "scale", "shape"),
    fewest_views=1,
)
VICREG = _task(_vicreg, fields=("loss",), reported=("invariance", "variance", "covariance"))
SIMCLR = _task(_simclr, fields=("temperature",), reported=("nt_xent",), patient=True)
DINO = _task(_dino, fields=("teacher",), reported=("distillation",), has_teacher=True)
