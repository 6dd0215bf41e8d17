"""The training state, its model and its optimizer.

The state is a plain tree. Randomness comes from the seed, the step and each slice's record index
alone, so a run that resumes from a checkpoint repeats exactly.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, Sharding

from ctssl_jax.models.layers import normalize_in_groups
from ctssl_jax.ops.corruptions import example_keys
from ctssl_jax.ops.trees import flatten, unflatten
from ctssl_jax.parallel.mesh import fetch_parameters
from ctssl_jax.runs.checkpoints import restore, stored_shapes
from ctssl_jax.tasks.interface import Task, is_frozen
from data_prep.system.errors import RunFailed

EVALUATION_SEED = 0


class TrainingDiverged(RunFailed):
    """The loss, a gradient or a parameter was not finite. The message is one line."""


@flax.struct.dataclass
class TrainState:
    """The content of a checkpoint.

    step: int32, optimizer steps taken.
    params: all parameters, those that keep their values among them.
    variables: the model's other state: BatchNorm statistics, a codebook of moving averages.
    optimizer: optax state, of the trained parameters alone.
    sums: sums since the last report, so that reports resume, too: over examples (scores, loss,
      weight, code counts) and over steps (gradient norms of all trained parameters together and
      of those of each layer, before they are clipped).
    nonfinite_step: int32, the first step whose loss, gradient or new parameters were not finite, or
      -1.
    """

    step: jax.Array
    params: nnx.State
    variables: nnx.State
    optimizer: Any
    sums: dict[str, jax.Array]
    nonfinite_step: jax.Array


@dataclasses.dataclass(frozen=True)
class Definition:
    """The constants of a run: a step or a score is a function of them, the state and a batch.

    config: a checked configuration.
    task: the task of `config.task`.
    channels: channels of the dataset's images that are read.
    mesh: the devices.
    graph: the structure of the model.
    params, variables: shapes of the model's parameters and of its other variables.
    trained: names of the parameters that the optimizer moves, from `trained_names`.
    train_key: seed of the corruption of each slice.
    model_key: seed of the model's own randomness, e.g. its dropout.
    """

    config: ml_collections.ConfigDict
    task: Task
    channels: int
    mesh: Mesh
    graph: Any
    params: nnx.State
    variables: nnx.State
    trained: frozenset[str]
    train_key: jax.Array
    model_key: jax.Array

    def model(self, params: Any, variables: Any) -> nnx.Module:
        """The model with these tensors, for one use within a compiled function."""
        whole = fetch_parameters(self.mesh, params, jnp.dtype(self.config.dtype))
        params = with_trained(jax.lax.stop_gradient(whole), self.trained_part(whole))
        return nnx.merge(self.graph, params, variables, copy=True)

    def trained_part(self, params: Any) -> Any:
        """A tree of all parameters with None in place of those that keep their values."""
        leaves = flatten(params)
        kept = {name: leaf if name in self.trained else None for name, leaf in leaves.items()}
        return unflatten(params, kept)


def with_trained(params: Any, trained: Any) -> Any:
    """The parameters with the values of `Definition.trained_part` in place of their own."""
    return jax.tree.map(
        lambda new, old: old if new is None else new, trained, params, is_leaf=lambda x: x is None
    )


def define(config: ml_collections.ConfigDict, task: Task, channels: int, mesh: Mesh) -> Definition:
    """The `Definition` of a configuration on the devices of a mesh."""
    keys = jax.random.split(jax.random.key(config.seed))
    devices = config.get("batch_norm_group", 0) or mesh.size
    graph, params, variables = abstract_model(config, task, mesh.size // devices)
    trained = trained_names(config, task, params)
    return Definition(config, task, channels, mesh, graph, params, variables, trained, *keys)


def trained_names(config: ml_collections.ConfigDict, task: Task, params: Any) -> frozenset[str]:
    """Names of the parameters that the optimizer moves. All others keep their values.

    These are the parameters of a frozen encoder, and biases of convolutions before a batch
    normalisation. Such a bias is subtracted again with the batch's mean, so its gradient is
    rounding alone, which Adam and RAdam would scale up to whole steps.

    Args:
      config: the training configuration.
      task: the task of `config.task`.
      params: the model's parameters, arrays or shapes.
    """
    names = set(flatten(params))
    frozen = task.encoder if is_frozen(config) else ()
    before_norm = {
        name
        for name in names
        if name.endswith("/conv/bias") and f"{name.removesuffix('conv/bias')}norm/bias" in names
    }
    return frozenset(name for name in names - before_norm if name.partition("/")[0] not in frozen)


def abstract_model(
    config: ml_collections.ConfigDict, task: Task, num_norm_groups: int = 1
) -> tuple[Any, nnx.State, nnx.State]:
    """Graph definition of the model; shapes of its parameters and of its other variables.

    Args:
      config: a checked configuration.
      task: the task of `config.task`.
      num_norm_groups: parts of a batch with BatchNorm statistics of their own.
    """
    model = nnx.eval_shape(lambda: task.build(config, nnx.Rngs(params=config.seed)))
    normalize_in_groups(model, num_norm_groups)
    return split_model(model)


def split_model(model: nnx.Module) -> tuple[Any, nnx.State, nnx.State]:
    """A model as graph definition, parameters and other variables."""
    graph, params, variables = nnx.split(model, nnx.Param, ...)
    return graph, nnx.as_pure(params), nnx.as_pure(variables)


def restore_model(
    workdir: Path, step: int, config: ml_collections.ConfigDict, task: Task, sharding: Sharding
) -> tuple[Any, dict[str, Any]]:
    """The model of a checkpoint, without the rest of the training state.

    Args:
      workdir: run directory.
      step: a checkpoint that exists.
      config: the run's configuration.
      task: the run's task.
      sharding: the sharding of every tensor.

    Returns:
      The graph definition; `params` and `variables` as arrays.

    Raises:
      InputError: the checkpoint does not fit the configuration, or is damaged.
    """
    graph, params, variables = abstract_model(config, task)
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        {"params": params, "variables": variables},
    )
    return graph, restore(workdir, step, template)


def resume(workdir: Path, step: int, template: TrainState) -> TrainState:
    """The state of a checkpoint from which training goes on.

    Another version of the program may have added up other scores. Then all sums begin at zero: the
    next report is of the steps after the checkpoint alone.

    Args:
      workdir: run directory.
      step: a checkpoint that exists.
      template: shape and sharding of each array.

    Raises:
      InputError: the checkpoint does not fit the template, or is damaged.
    """
    stored = stored_shapes(workdir, step)
    if all(name in stored for name in flatten({"sums": template.sums})):
        return restore(workdir, step, template)
    state = restore(workdir, step, template.replace(sums={}))
    zeros = jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), template.sums),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, template.sums),
    )
    return state.replace(sums=zeros())


def count_parameters(params: Any) -> int:
    """Number of scalars."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def evaluation_keys(record_index: jax.Array) -> jax.Array:
    """[B] int32 -> [B] keys. They do not depend on the run's seed: every evaluation corrupts a
    slice in the same way."""
    return example_keys(jax.random.key(EVALUATION_SEED), record_index)


def abstract_batch(definition: Definition, size: int = 0) -> dict[str, Any]:
    """Shapes of a batch of so many slices; 0 takes the size of a microbatch."""
    config = definition.config
    size = size or config.batch_size // config.microbatches
    side, targets = config.image_size, definition.task.targets(config)
    shapes = {
        "images": (
            (size, len(definition.task.offsets(config)), side, side, definition.channels),
            jnp.uint8,
        ),
        "record_index": ((size,), jnp.int32),
        "weight": ((size,), jnp.float32),
    }
    if targets.label:
        shapes["label"] = ((size,), jnp.int32)
    if targets.mask:
        shapes["mask"] = ((size, side, side), jnp.uint8)
    if targets.lung_box:
        shapes["box"] = ((size, 4), jnp.float32)
    if targets.patient:
        shapes["patient"] = ((size,), jnp.int32)
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def slices_of_a_device(config: ml_collections.ConfigDict, mesh: Mesh) -> int:
    """Slices of a microbatch on each device of a mesh."""
    return config.batch_size // config.microbatches // mesh.size


def learning_rate_schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
    """Step -> learning rate: linear warm-up, then constant, or a cosine or a line to
    `learning_rate_floor` of it at `num_steps`.

    Where `num_steps` grew, the rate is the one of a run of so many steps from there on: it depends
    on `num_steps` and `prolonged` alone, so that a run that resumes repeats exactly.
    """
    rate = _schedule(config, config.num_steps)
    for until, num_steps in reversed(config.prolonged):
        rate = functools.partial(_first_then, _schedule(config, num_steps), rate, until)
    return rate


def _first_then(first: optax.Schedule, then: optax.Schedule, until: int, step: Any) -> jax.Array:
    return jnp.where(step < until, first(step), then(step))


def _schedule(config: ml_collections.ConfigDict, num_steps: int) -> optax.Schedule:
    peak, warmup, floor = config.learning_rate, config.warmup_steps, config.learning_rate_floor
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(num_steps - warmup, 1), alpha=floor)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, floor * peak, max(num_steps - warmup, 1))
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])


def make_optimizer(
    config: ml_collections.ConfigDict, encoder: tuple[str, ...]
) -> optax.GradientTransformation:
    """RAdam (the authors' release) or AdamW, with optional clipping of the gradient's global norm.

    It takes the trained parameters alone, so that no other counts in the clipped norm. The
    encoder's steps are multiplied by `encoder_learning_rate_factor`.

    Args:
      config: the training configuration.
      encoder: `Task.encoder`.
    """
    schedule = learning_rate_schedule(config)
    if config.optimizer == "radam":
        decay = (
            optax.add_decayed_weights(config.weight_decay)
            if config.weight_decay
            else optax.identity()
        )
        optimizer = optax.chain(
            optax.scale_by_radam(), decay, optax.scale_by_learning_rate(schedule)
        )
    else:
        optimizer = optax.adamw(schedule, weight_decay=config.weight_decay)
    if config.gradient_clip > 0:
        optimizer = optax.chain(optax.clip_by_global_norm(config.gradient_clip), optimizer)
    if config.encoder_learning_rate_factor != 1:
        factor = config.encoder_learning_rate_factor
        optimizer = optax.chain(optimizer, _scale_parts(encoder, factor))
    return optimizer


def _scale_parts(parts: tuple[str, ...], factor: float) -> optax.GradientTransformation:
    def scale(path, update):
        return factor * update if path[0].key in parts else update

    return optax.stateless(
        lambda updates, params=None: jax.tree_util.tree_map_with_path(scale, updates)
    )


def layer_of(name: str) -> str:
    """The layer of a parameter: `encoder/blocks/0/conv3/kernel` -> `encoder/blocks/0`."""
    parts = name.split("/")
    return "/".join(parts[:-2]) or parts[0]


def layer_norms(gradients: Any) -> dict[str, jax.Array]:
    """L2 norm of the gradient of each layer's parameters: layer -> float32 scalar.

    A layer that is not trained has none.
    """
    squares: dict[str, jax.Array] = {}
    for name, gradient in flatten(gradients).items():
        square = jnp.sum(jnp.square(gradient.astype(jnp.float32)))
        squares[layer_of(name)] = squares.get(layer_of(name), 0.0) + square
    return {layer: jnp.sqrt(square) for layer, square in squares.items()}


def check_state(
    config: ml_collections.ConfigDict,
    state: TrainState,
    workdir: Path,
    last_checkpoint: int | None,
) -> None:
    """Stop a run whose numbers are not finite, before it saves them. Waits for the devices.

    Raises:
      TrainingDiverged: names the step, the last good checkpoint and the remedy.
    """
    step = int(state.nonfinite_step)
    if step >= 0:
        what = "the loss, its gradient or the parameters"
        raise _diverged(config, what, step, workdir, last_checkpoint)


def check_finite(
    config: ml_collections.ConfigDict,
    validation_loss: float,
    step: int,
    workdir: Path,
    last_checkpoint: int | None,
) -> None:
    """Stop a run whose validation loss is not finite. Raises TrainingDiverged."""
    if not np.isfinite(validation_loss):
        raise _diverged(config, "the validation loss", step, workdir, last_checkpoint)


def _diverged(
    config: ml_collections.ConfigDict,
    quantity: str,
    step: int,
    workdir: Path,
    last_checkpoint: int | None,
) -> TrainingDiverged:
    clip = "lower config.gradient_clip" if config.gradient_clip else "set config.gradient_clip=1"
    kept, place = "there is no checkpoint", ""
    if last_checkpoint is not None:
        kept, place = (
            f"the checkpoint of step {last_checkpoint} is kept",
            ", with another --workdir",
        )
    return TrainingDiverged(
        f"not finite at step {step} of {workdir}: {quantity}; {kept}; lower config.learning_rate "
        f"or {clip}{place}"
    )
