"""The training state, the step and the evaluation of a split: everything that runs on the devices.

The state is a plain tree; a step is a pure function of (state, batch) under `jax.jit` over a mesh. Randomness comes
from the seed, the step and each slice's record index alone, so a run that goes on from a checkpoint repeats exactly.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, Sharding

from ctssl_jax import distributed
from ctssl_jax.checkpoint import flatten, restore
from ctssl_jax.corruptions import example_keys
from ctssl_jax.ops.embeddings import moments
from ctssl_jax.task_interface import Task
from data_prep.system.errors import RunFailed

EVALUATION_SEED = 0


class TrainingDiverged(RunFailed):
    """The loss or a gradient was not finite. The message is one line."""


@flax.struct.dataclass
class TrainState:
    """All that a checkpoint holds.

    step: int32, optimizer steps taken.
    params: trainable parameters.
    variables: the model's other state: BatchNorm statistics, a codebook that follows by moving averages.
    optimizer: optax state.
    sums: sums over examples since the last report (scores, loss, weight, code counts) and over steps (gradient norms,
      of all parameters and of each layer), so that reports, too, go on where they were.
    nonfinite_step: int32, the first step whose loss, gradient or new parameters were not finite, or -1.
    """

    step: jax.Array
    params: nnx.State
    variables: nnx.State
    optimizer: Any
    sums: dict[str, jax.Array]
    nonfinite_step: jax.Array


@dataclasses.dataclass(frozen=True)
class Program:
    """Compiled-once functions of one run, all under the mesh.

    shardings: how each array of the state lies on the mesh
    initial_state: () -> TrainState
    zero_gradients: () -> zeros like the parameters
    train_step: (state, batch) -> state, for one microbatch
    accumulate: (state, gradients, batch) -> (state, gradients), for more microbatches
    apply_gradients: (state, gradients) -> state
    evaluate_batch: (state, batch) -> (per-slice values, sums over the batch, pictures); the pictures stay split along
      the batch
    replicate: copy a split tree to every device of every host
    zeros_like: a tree -> zeros of its shapes, on every device of every host
    """

    mesh: Mesh
    shardings: TrainState
    initial_state: Callable[[], TrainState]
    zero_gradients: Callable
    train_step: Callable
    accumulate: Callable
    apply_gradients: Callable
    evaluate_batch: Callable
    replicate: Callable
    zeros_like: Callable


def learning_rate_schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
    """Step -> learning rate: linear warm-up, then constant, or a cosine or a line to zero at `num_steps`."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(config.num_steps - warmup, 1))
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, 0.0, max(config.num_steps - warmup, 1))
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """RAdam (the release's) or AdamW, with optional clipping of the gradient's global norm; the encoder's steps are
    multiplied by `encoder_learning_rate_factor`."""
    schedule = learning_rate_schedule(config)
    if config.optimizer == "radam":
        decay = optax.add_decayed_weights(config.weight_decay) if config.weight_decay else optax.identity()
        optimizer = optax.chain(optax.scale_by_radam(), decay, optax.scale_by_learning_rate(schedule))
    else:
        optimizer = optax.adamw(schedule, weight_decay=config.weight_decay)
    if config.gradient_clip > 0:
        optimizer = optax.chain(optax.clip_by_global_norm(config.gradient_clip), optimizer)
    if config.encoder_learning_rate_factor != 1:
        optimizer = optax.chain(optimizer, _scale_encoder(config.encoder_learning_rate_factor))
    return optimizer


def _scale_encoder(factor: float) -> optax.GradientTransformation:
    def scale(path, update):
        return factor * update if path[0].key == "encoder" else update

    return optax.stateless(lambda updates, params=None: jax.tree_util.tree_map_with_path(scale, updates))


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to: `encoder/blocks/0/conv3/kernel` -> `encoder/blocks/0`."""
    parts = name.split("/")
    return "/".join(parts[:-2]) or parts[0]


def layer_norms(gradients: Any) -> dict[str, jax.Array]:
    """L2 norm of the gradient of each layer's parameters: layer -> float32 scalar."""
    squares: dict[str, jax.Array] = {}
    for name, gradient in flatten(gradients).items():
        square = jnp.sum(jnp.square(gradient.astype(jnp.float32)))
        squares[layer_of(name)] = squares.get(layer_of(name), 0.0) + square
    return {layer: jnp.sqrt(square) for layer, square in squares.items()}


def abstract_model(config: ml_collections.ConfigDict, task: Task) -> tuple[Any, nnx.State, nnx.State]:
    """The model's structure without its numbers: graph definition, parameters and other variables as shapes."""
    model = nnx.eval_shape(lambda: task.build(config, nnx.Rngs(params=config.seed)))
    graph, params, variables = nnx.split(model, nnx.Param, ...)
    return graph, nnx.as_pure(params), nnx.as_pure(variables)


def restore_model(
    workdir: Path, step: int, config: ml_collections.ConfigDict, task: Task, sharding: Sharding
) -> tuple[Any, dict[str, Any]]:
    """A checkpoint's model without the rest of the training state.

    Args:
      workdir: run directory.
      step: a checkpoint that exists.
      config: the run's configuration.
      task: the run's task.
      sharding: of every tensor.

    Returns:
      The graph definition; `params` and `variables` as arrays.

    Raises:
      InputError: the checkpoint does not fit the configuration, or is damaged.
    """
    graph, params, variables = abstract_model(config, task)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        {"params": params, "variables": variables},
    )
    return graph, restore(workdir, step, like)


def count_parameters(params: Any) -> int:
    """Number of trainable scalars."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def evaluation_keys(record_index: jax.Array) -> jax.Array:
    """[B] int32 -> [B] keys: a slice is corrupted the same way in every evaluation, whatever the seed of the run."""
    return example_keys(jax.random.key(EVALUATION_SEED), record_index)


def abstract_batch(config: ml_collections.ConfigDict, task: Task, channels: int, size: int) -> dict[str, Any]:
    """Shapes of a batch of `size` items from a dataset with `channels` channels."""
    side, targets = config.image_size, task.targets(config)
    shapes = {
        "images": ((size, len(task.offsets(config)), side, side, channels), jnp.uint8),
        "record_index": ((size,), jnp.int32),
        "weight": ((size,), jnp.float32),
    }
    if targets.label:
        shapes["label"] = ((size,), jnp.int32)
    if targets.mask:
        shapes["mask"] = ((size, side, side), jnp.uint8)
    if targets.lung_box:
        shapes["box"] = ((size, 4), jnp.float32)
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def make_program(config: ml_collections.ConfigDict, task: Task, channels: int, mesh: Mesh) -> Program:
    """Build the functions of a run.

    Args:
      config: a checked training configuration.
      task: the task that `config.task` names.
      channels: channels of the dataset's images that are read.
      mesh: the devices.
    """
    graph, *abstract_state = abstract_model(config, task)
    optimizer = make_optimizer(config)
    everywhere = distributed.replicated(mesh)
    along_batch = distributed.split_along_batch(mesh)
    train_key, model_key = jax.random.split(jax.random.key(config.seed))
    run_once = None
    if mesh.devices.flat[0].platform == "cpu":  # optimising code that runs once took 28 s, ten times what is left
        run_once = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

    def initial_state() -> TrainState:
        model = task.build(config, nnx.Rngs(params=config.seed))
        _, params, variables = nnx.split(model, nnx.Param, ...)
        params, variables = nnx.as_pure(params), nnx.as_pure(variables)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            variables=variables,
            optimizer=optimizer.init(params),
            sums=zero_sums(),
            nonfinite_step=jnp.full((), -1, jnp.int32),
        )

    def zero_sums() -> dict[str, jax.Array]:
        batch = abstract_batch(config, task, channels, config.batch_size // config.microbatches)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        _, (_, sums) = jax.eval_shape(loss_of, *abstract_state, batch, step)
        sums["gradient_norm"] = jax.ShapeDtypeStruct((), jnp.float32)  # both are added once a step
        sums["layer_gradient_norms"] = jax.eval_shape(layer_norms, abstract_state[0])
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sums)

    parts = distributed.split_parameters(mesh, abstract_state[0])

    @jax.custom_vjp
    def fetch(params):
        return jax.lax.with_sharding_constraint(params, everywhere)

    fetch.defvjp(
        lambda params: (fetch(params), None),
        lambda _, gradients: (jax.lax.with_sharding_constraint(gradients, parts),),
    )

    def whole(params):
        """Each device fetches all parameters for as long as it uses them, and gets its part of the gradients' sum."""
        return params if mesh.shape["fsdp"] == 1 else fetch(params)

    def loss_of(params, variables, batch, step) -> tuple[jax.Array, tuple]:
        model = nnx.merge(graph, whole(params), variables, copy=True)
        keys = example_keys(train_key, batch["record_index"], step)
        weight = batch["weight"]
        step_key = jax.random.fold_in(jax.random.fold_in(model_key, step), batch["record_index"][0])
        output = task.apply(model, batch, keys, step_key, config, train=True)
        loss = jnp.sum(output.loss * weight) / (jnp.sum(weight) * config.microbatches)
        _, _, variables = nnx.split(model, nnx.Param, ...)
        sums = {name: jnp.sum(value * weight) for name, value in output.scores.items()}
        sums |= {
            "loss": jnp.sum(output.loss * weight),
            "weight": jnp.sum(weight),
            "code_counts": output.code_counts,
        }
        return loss, (nnx.as_pure(variables), sums)

    def gradients_of(state: TrainState, batch: dict) -> tuple[TrainState, Any]:
        (_, (variables, sums)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, state.variables, batch, state.step
        )
        return state.replace(variables=variables, sums=added(state.sums, sums)), gradients

    def added(sums: dict, more: dict) -> dict:
        """The sums with those of `more` added."""
        return sums | jax.tree.map(jnp.add, {name: sums[name] for name in more}, more)

    def apply_gradients(state: TrainState, gradients: Any) -> TrainState:
        updates, new_optimizer = optimizer.update(gradients, state.optimizer, state.params)
        norm = optax.tree.norm(gradients)
        norms = {"gradient_norm": norm, "layer_gradient_norms": layer_norms(gradients)}
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(norm) & jnp.isfinite(state.sums["loss"]) & jnp.isfinite(optax.tree.norm(params))
        first = jnp.where((state.nonfinite_step < 0) & ~finite, state.step + 1, state.nonfinite_step)
        return state.replace(
            step=state.step + 1,
            params=params,
            optimizer=new_optimizer,
            sums=added(state.sums, jax.tree.map(lambda value: value * config.batch_size, norms)),
            nonfinite_step=first,
        )

    def train_step(state: TrainState, batch: dict) -> TrainState:
        return apply_gradients(*gradients_of(state, batch))

    def accumulate(state: TrainState, total: Any, batch: dict) -> tuple[TrainState, Any]:
        state, gradients = gradients_of(state, batch)
        return state, jax.tree.map(jnp.add, total, gradients)

    def evaluate_batch(state: TrainState, batch: dict) -> tuple[dict, jax.Array, dict]:
        model = nnx.merge(graph, whole(state.params), state.variables, copy=True)
        keys = evaluation_keys(batch["record_index"])
        output = task.apply(model, batch, keys, None, config, train=False)
        slices = {
            "record_index": batch["record_index"],
            "weight": batch["weight"],
            "scores": {"loss": output.loss, **output.scores},
            "classes": output.classes,
        }
        totals = {
            "code_counts": output.code_counts,
            "embedding_moments": moments(output.embedding, batch["weight"]),
        }
        return slices, totals, output.pictures

    shapes = jax.eval_shape(initial_state)
    shardings = jax.tree.map(lambda leaf: everywhere, shapes).replace(
        params=parts,
        optimizer=distributed.split_parameters(mesh, shapes.optimizer),
    )
    return Program(
        mesh=mesh,
        shardings=shardings,
        initial_state=jax.jit(initial_state, out_shardings=shardings, compiler_options=run_once),
        zero_gradients=jax.jit(
            lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_state[0]),
            out_shardings=shardings.params,
        ),
        train_step=jax.jit(
            train_step, in_shardings=(shardings, along_batch), out_shardings=shardings, donate_argnums=0
        ),
        accumulate=jax.jit(
            accumulate,
            in_shardings=(shardings, shardings.params, along_batch),
            out_shardings=(shardings, shardings.params),
            donate_argnums=(0, 1),
        ),
        apply_gradients=jax.jit(
            apply_gradients, in_shardings=(shardings, shardings.params), out_shardings=shardings, donate_argnums=0
        ),
        evaluate_batch=jax.jit(
            evaluate_batch,
            in_shardings=(None, along_batch),  # the state as it lies: an evaluation may hold a part of it only
            out_shardings=(everywhere, everywhere, along_batch),
        ),
        replicate=jax.jit(lambda tree: tree, out_shardings=everywhere),
        zeros_like=jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), out_shardings=everywhere),
    )


def compile_step(
    program: Program, config: ml_collections.ConfigDict, abstract_state: TrainState, batch_shapes: dict
) -> tuple[Program, int]:
    """Compile the training step ahead of the first batch.

    Returns:
      The program with the compiled step in place, and the bytes a device that XLA expects it to need.
    """
    if config.microbatches == 1:
        compiled = program.train_step.lower(abstract_state, batch_shapes).compile()
        program = dataclasses.replace(program, train_step=compiled)
    else:
        compiled = program.accumulate.lower(abstract_state, abstract_state.params, batch_shapes).compile()
        program = dataclasses.replace(program, accumulate=compiled)
    memory = compiled.memory_analysis()
    parts = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    return program, sum(parts) - memory.alias_size_in_bytes


def check_state(state: TrainState, workdir: Path, last_checkpoint: int | None) -> None:
    """Stop a run whose numbers are no longer finite, before it saves them. Waits for the devices.

    Raises:
      TrainingDiverged: names the step, the checkpoint that is still good, and what to try.
    """
    step = int(state.nonfinite_step)
    if step >= 0:
        raise _diverged("the loss, its gradient or the parameters", step, workdir, last_checkpoint)


def check_finite(validation_loss: float, step: int, workdir: Path, last_checkpoint: int | None) -> None:
    """The same by the validation loss."""
    if not np.isfinite(validation_loss):
        raise _diverged("the validation loss", step, workdir, last_checkpoint)


def _diverged(what: str, step: int, workdir: Path, last_checkpoint: int | None) -> TrainingDiverged:
    kept = "there is no checkpoint" if last_checkpoint is None else f"the checkpoint of step {last_checkpoint} is kept"
    return TrainingDiverged(
        f"not finite at step {step} of {workdir}: {what}; {kept}; lower config.learning_rate or set "
        "config.gradient_clip=1, with another --workdir"
    )


class Feed:
    """Global batches on the devices, one ahead of the step that runs, so that reading and copying cost no time of it.

    Attributes:
      parts: the parts of the next step's batch, for `run_step`.
      waited: seconds so far in which no device had anything to do because the next batch was not there.
    """

    def __init__(self, mesh: Mesh, batches: Iterator[dict[str, np.ndarray]], microbatches: int):
        """Fetches the first batch. `batches`: this process's share of the parts, from `data.training_batches`."""
        self._mesh, self._batches, self._microbatches = mesh, batches, microbatches
        self.waited = 0.0
        self.parts = self._fetch()

    def _fetch(self) -> list[dict[str, jax.Array]]:
        return [distributed.to_devices(self._mesh, next(self._batches)) for _ in range(self._microbatches)]

    def advance(self, running: jax.Array) -> None:
        """Fetch the next batch; `running` is a result of the step that was just begun."""
        asked, idle = time.monotonic(), running.is_ready()
        self.parts = self._fetch()
        if idle or running.is_ready():  # else the devices were at work all the while
            self.waited += time.monotonic() - asked


def run_step(program: Program, state: TrainState, microbatches: Sequence[dict[str, jax.Array]]) -> TrainState:
    """One optimizer step on one global batch, given in equal parts.

    Gradient accumulation is a host loop over one compiled function: a scan over microbatches would make convolutions
    inside it slow on CPU, and an unrolled loop would multiply the compile time.

    Args:
      program: from `make_program`.
      state: donated; use the returned one.
      microbatches: `config.microbatches` parts, global arrays `[B / microbatches, ...]`, as a `Feed` has them.
    """
    if len(microbatches) == 1:
        return program.train_step(state, microbatches[0])
    gradients = program.zero_gradients()
    for part in microbatches:
        state, gradients = program.accumulate(state, gradients, part)
    return program.apply_gradients(state, gradients)


class Report(NamedTuple):
    """What was learned since the last report.

    means: loss, scores and gradient norm, means over examples.
    code_counts: [num_codes], how often each code was used; None without a codebook.
    layer_gradient_norms: layer -> mean over the steps.
    """

    means: dict[str, float]
    code_counts: np.ndarray | None
    layer_gradient_norms: dict[str, float]


def take_report(program: Program, state: TrainState) -> tuple[TrainState, Report]:
    """The state with its sums set to zero, and what they say."""
    sums = jax.device_get(state.sums)
    weight, code_counts, norms = (sums.pop(name) for name in ("weight", "code_counts", "layer_gradient_norms"))
    weight = max(float(weight), 1.0)
    means, norms = ({name: float(value) / weight for name, value in values.items()} for values in (sums, norms))
    return state.replace(sums=program.zeros_like(state.sums)), Report(means, code_counts, norms)


class SplitScores(NamedTuple):
    """Scores of every slice of a split, sorted by record.

    record_index: [N] int32.
    scores: `loss` and the task's scores, each [N] float32.
    classes: `label` [N] int32 and `probabilities` [N, K] float32; None unless the task predicts a label.
    code_counts: [num_codes] float64, over the split; None without a codebook.
    embedding_moments: sums over the slices' embeddings, see `ops.embeddings.moments`.
    """

    record_index: np.ndarray
    scores: dict[str, np.ndarray]
    classes: dict[str, np.ndarray] | None
    code_counts: np.ndarray | None
    embedding_moments: dict[str, np.ndarray]


def evaluate_split(program: Program, state: TrainState, batches: Iterable[dict[str, np.ndarray]]) -> SplitScores | None:
    """Score every slice of a split.

    Args:
      program: from `make_program`.
      state: the model.
      batches: this process's share, from `data.evaluation_batches`.

    Returns:
      The same on every process; None if there was no batch.
    """
    pending, fetched = None, []
    for batch in batches:
        running = program.evaluate_batch(state, distributed.to_devices(program.mesh, batch))[:2]
        if pending is not None:  # fetch one batch behind, so that the devices never wait for the host
            fetched.append(jax.device_get(pending))
        pending = running
    if pending is None:
        return None
    fetched.append(jax.device_get(pending))
    slices = jax.tree.map(lambda *parts: np.concatenate(parts), *[slices for slices, _ in fetched])
    totals = jax.tree.map(lambda *parts: np.sum(parts, axis=0, dtype=float), *[totals for _, totals in fetched])
    kept = np.flatnonzero(slices.pop("weight") > 0)
    kept = kept[np.argsort(slices["record_index"][kept], kind="stable")]
    return SplitScores(**jax.tree.map(lambda values: values[kept], slices), **totals)


def render_pictures(
    program: Program, state: TrainState, batch: dict[str, np.ndarray], number: int
) -> dict[str, np.ndarray]:
    """Input, target and prediction of the first `number` slices of a batch: [number, H, W, C] float32 in [0, 1]."""
    _, _, pictures = program.evaluate_batch(state, distributed.to_devices(program.mesh, batch))
    return {name: images[:number] for name, images in jax.device_get(program.replicate(pictures)).items()}
