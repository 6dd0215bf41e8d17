"""The training step: pure functions of the state and a batch, compiled for the mesh."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from ctssl_jax.ops.corruptions import example_keys
from ctssl_jax.parallel.memory import (
    compiled_bytes,
    device_memory,
    is_out_of_memory,
    peak_bytes,
)
from ctssl_jax.parallel.mesh import replicated, split_along_batch, split_parameters, to_devices
from ctssl_jax.tasks.interface import Objective, StepOutput, Task
from ctssl_jax.training.scoring import Scorer, make_scorer
from ctssl_jax.training.state import (
    Definition,
    TrainState,
    abstract_batch,
    define,
    layer_norms,
    make_optimizer,
    split_model,
    with_trained,
)
from data_prep.system import silence

HOPELESS = 1.5  # times the memory of a device: reckoned figures may be a fifth too high


def initial_state(definition: Definition) -> TrainState:
    """The state before the first step, with random weights."""
    model = definition.task.build(definition.config, nnx.Rngs(params=definition.config.seed))
    _, params, variables = split_model(model)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        variables=variables,
        optimizer=_optimizer(definition).init(definition.trained_part(params)),
        sums=zero_sums(definition),
        nonfinite_step=jnp.full((), -1, jnp.int32),
    )


def _optimizer(definition: Definition) -> optax.GradientTransformation:
    return make_optimizer(definition.config, definition.task.encoder)


def zero_sums(definition: Definition) -> dict[str, jax.Array]:
    """`TrainState.sums` of no step."""
    shapes = (
        definition.params,
        definition.variables,
        abstract_batch(definition),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    _, (_, sums) = jax.eval_shape(functools.partial(loss_of, definition), *shapes)
    for objective in definition.task.objectives(definition.config):
        sums[_norm_at_encoder(objective)] = jax.ShapeDtypeStruct((), jnp.float32)
    sums["gradient_norm"] = jax.ShapeDtypeStruct((), jnp.float32)  # both are added once a step
    sums["layer_gradient_norms"] = jax.eval_shape(
        layer_norms, definition.trained_part(definition.params)
    )
    return zeros_of(sums)


def zeros_of(tree: Any) -> Any:
    """Zeros in the shapes of a tree."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def _norm_at_encoder(objective: Objective) -> str:
    return f"{objective.name}/encoder_gradient_norm"


def loss_of(
    definition: Definition,
    params: Any,
    variables: Any,
    batch: dict,
    step: jax.Array,
    apply: Callable[..., StepOutput] | None = None,
) -> tuple:
    """Loss of a microbatch, as its part of the batch's mean, and (new variables, sums to add).

    `apply`: of one objective alone; None is the whole task's.
    """
    config, weight = definition.config, batch["weight"]
    model = definition.model(params, variables)
    keys = example_keys(definition.train_key, batch["record_index"], step)
    step_key = jax.random.fold_in(
        jax.random.fold_in(definition.model_key, step), batch["record_index"][0]
    )
    apply = apply or definition.task.apply
    output = apply(model, batch, keys, step_key, config, train=True)
    loss = jnp.sum(output.loss * weight) / (jnp.sum(weight) * config.microbatches)
    _, _, variables = split_model(model)
    sums = {name: jnp.sum(value * weight) for name, value in output.scores.items()}
    sums |= {
        "loss": jnp.sum(output.loss * weight),
        "weight": jnp.sum(weight),
        "code_counts": output.code_counts,
    }
    return loss, (variables, sums)


def gradients_of(definition: Definition, state: TrainState, batch: dict) -> tuple[TrainState, Any]:
    """The state with variables and sums of a microbatch, and the gradients of its loss, in the
    structure of `Definition.trained_part`: what leads to no trained parameter is not computed."""
    if objectives := definition.task.objectives(definition.config):
        return _gradients_of_each(definition, state, batch, objectives)

    def loss(trained: Any) -> tuple:
        params = with_trained(state.params, trained)
        return loss_of(definition, params, state.variables, batch, state.step)

    (_, (variables, sums)), gradients = jax.value_and_grad(loss, has_aux=True)(
        definition.trained_part(state.params)
    )
    return state.replace(variables=variables, sums=_added(state.sums, sums)), gradients


def _gradients_of_each(
    definition: Definition, state: TrainState, batch: dict, objectives: Sequence[Objective]
) -> tuple[TrainState, Any]:
    """`gradients_of` of several objectives: the sum of their gradients with their weights. The sums
    have the loss of each and the norm of its gradient at the encoder, both without its weight;
    with several microbatches the norm is the mean of theirs."""
    trained, variables = definition.trained_part(state.params), state.variables
    sums: dict[str, Any] = {"loss": 0.0, "code_counts": None}
    total = None

    def loss(trained: Any, variables: Any, apply: Callable[..., StepOutput]) -> tuple:
        params = with_trained(state.params, trained)
        return loss_of(definition, params, variables, batch, state.step, apply)

    for objective in objectives:
        (_, (variables, own)), gradients = jax.value_and_grad(loss, has_aux=True)(
            trained, variables, objective.apply
        )
        at_encoder = [gradients[part] for part in definition.task.encoder]
        norm = optax.tree.norm(at_encoder) * definition.config.microbatches
        sums["weight"] = own.pop("weight")
        sums["loss"] += objective.weight * own["loss"]
        counts = own.pop("code_counts")
        sums["code_counts"] = counts if sums["code_counts"] is None else sums["code_counts"]
        sums |= {f"{objective.name}/{name}": value for name, value in own.items()}
        sums[_norm_at_encoder(objective)] = norm * sums["weight"]
        weighted = jax.tree.map(functools.partial(jnp.multiply, objective.weight), gradients)
        total = weighted if total is None else jax.tree.map(jnp.add, total, weighted)
    return state.replace(variables=variables, sums=_added(state.sums, sums)), total


def _added(sums: dict, more: dict) -> dict:
    return sums | jax.tree.map(jnp.add, {name: sums[name] for name in more}, more)


def apply_gradients(definition: Definition, state: TrainState, gradients: Any) -> TrainState:
    """The state after an optimizer step; it keeps the first step that was not finite."""
    trained = definition.trained_part(state.params)
    updates, optimizer_state = _optimizer(definition).update(gradients, state.optimizer, trained)
    norm = optax.tree.norm(gradients)
    norms = {"gradient_norm": norm, "layer_gradient_norms": layer_norms(gradients)}
    params = with_trained(state.params, optax.apply_updates(trained, updates))
    finite = (
        jnp.isfinite(norm)
        & jnp.isfinite(state.sums["loss"])
        & jnp.isfinite(optax.tree.norm(params))
    )
    first = jnp.where((state.nonfinite_step < 0) & ~finite, state.step + 1, state.nonfinite_step)
    return state.replace(
        step=state.step + 1,
        params=params,
        variables=_after_step(definition, params, state.variables),
        optimizer=optimizer_state,
        sums=_added(
            state.sums, jax.tree.map(lambda value: value * definition.config.batch_size, norms)
        ),
        nonfinite_step=first,
    )


def _after_step(definition: Definition, params: Any, variables: Any) -> Any:
    """The model's other variables after `Task.after_step`."""
    if definition.task.after_step is None:
        return variables
    model = nnx.merge(definition.graph, params, variables, copy=True)
    definition.task.after_step(model, definition.config)
    return split_model(model)[2]


def train_step(definition: Definition, state: TrainState, batch: dict) -> TrainState:
    """The state after a step on a batch in one part."""
    return apply_gradients(definition, *gradients_of(definition, state, batch))


def accumulate(
    definition: Definition, state: TrainState, total: Any, batch: dict
) -> tuple[TrainState, Any]:
    """The state after a microbatch, and the total with the gradients of this microbatch."""
    state, gradients = gradients_of(definition, state, batch)
    return state, jax.tree.map(jnp.add, total, gradients)


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of this file, each compiled once for a run and its mesh.

    definition: the run that they are compiled for.
    template: shape and sharding of each array of the state.
    initial_state: () -> state
    zero_gradients: () -> zeros in the shapes of the trained parameters
    train_step: (state, batch) -> state, for one microbatch
    accumulate: (state, gradients, batch) -> (state, gradients), for more microbatches
    apply_gradients: (state, gradients) -> state
    zeros_like: a tree -> zeros of its shapes, on every device of every host
    scorer: the functions of a validation
    """

    definition: Definition
    template: TrainState
    initial_state: Callable[[], TrainState]
    zero_gradients: Callable
    train_step: Callable
    accumulate: Callable
    apply_gradients: Callable
    zeros_like: Callable
    scorer: Scorer


def make_program(
    config: ml_collections.ConfigDict, task: Task, channels: int, mesh: Mesh
) -> Program:
    """The functions of a run.

    Args:
      config: a checked training configuration.
      task: the task that `config.task` names.
      channels: channels of the dataset's images that are read.
      mesh: the devices.
    """
    definition = define(config, task, channels, mesh)
    everywhere, along_batch = replicated(mesh), split_along_batch(mesh)
    parts = split_parameters(mesh, definition.params)
    trained = definition.trained_part(definition.params)
    gradient_parts = split_parameters(mesh, trained)

    def of_run(function: Callable) -> Callable:
        return functools.partial(function, definition)

    begin = of_run(initial_state)  # one function, so that JAX traces it once
    shapes = jax.eval_shape(begin)
    shardings = jax.tree.map(lambda leaf: everywhere, shapes).replace(
        params=parts, optimizer=split_parameters(mesh, shapes.optimizer)
    )
    return Program(
        definition=definition,
        template=jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            shardings,
        ),
        initial_state=jax.jit(
            begin, out_shardings=shardings, compiler_options=quick_to_compile(mesh)
        ),
        zero_gradients=jax.jit(functools.partial(zeros_of, trained), out_shardings=gradient_parts),
        train_step=jax.jit(
            of_run(train_step),
            in_shardings=(shardings, along_batch),
            out_shardings=shardings,
            donate_argnums=0,
        ),
        accumulate=jax.jit(
            of_run(accumulate),
            in_shardings=(shardings, gradient_parts, along_batch),
            out_shardings=(shardings, gradient_parts),
            donate_argnums=(0, 1),
        ),
        apply_gradients=jax.jit(
            of_run(apply_gradients),
            in_shardings=(shardings, gradient_parts),
            out_shardings=shardings,
            donate_argnums=0,
        ),
        zeros_like=jax.jit(
            lambda tree: jax.tree.map(jnp.zeros_like, tree), out_shardings=everywhere
        ),
        scorer=make_scorer(definition),
    )


def quick_to_compile(mesh: Mesh) -> dict[str, Any] | None:
    """Options for code that runs once or never: to optimise it took 28 s, ten times as long."""
    if mesh.devices.flat[0].platform != "cpu":
        return None
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def compile_step(
    program: Program, *, to_run: bool = True, hopeless: float = HOPELESS
) -> tuple[Program, int]:
    """Compile the training step ahead of the first batch.

    Args:
      program: from `make_program`.
      to_run: False takes less time where that is possible, and gives a slow step.
      hopeless: a step that is reckoned to need so many times the memory of a device is not
        compiled: on a GPU XLA would try convolutions of that size.

    Returns:
      The program with the compiled step in place, and the bytes a device that XLA expects it to
      need. If the step is not compiled, or XLA refuses to, they are the reckoned ones, and above
      the memory of a device.
    """
    with silence.work("compiling    the training step"):
        return _compile_step(program, to_run, hopeless)


def _compile_step(program: Program, to_run: bool, hopeless: float) -> tuple[Program, int]:
    available = device_memory(list(program.definition.mesh.devices.flat))
    traced = trace_step(program)
    reckoned = reckoned_bytes(program, traced)
    if available is not None and reckoned > hopeless * available:
        return program, reckoned
    options = None if to_run else quick_to_compile(program.definition.mesh)
    try:
        compiled = traced.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:  # TPUs refuse here
        if available is None or not is_out_of_memory(error):
            raise
        return program, max(reckoned, available + 1)
    name = "train_step" if program.definition.config.microbatches == 1 else "accumulate"
    return dataclasses.replace(program, **{name: compiled}), compiled_bytes(compiled)


def trace_step(program: Program) -> jax.stages.Traced:
    """The part of the training step that needs the most memory: that of one microbatch."""
    batch, state = abstract_batch(program.definition), program.template
    if program.definition.config.microbatches == 1:
        return program.train_step.trace(state, batch)
    gradients = program.definition.trained_part(state.params)
    return program.accumulate.trace(state, gradients, batch)


def reckoned_bytes(program: Program, traced: jax.stages.Traced) -> int:
    """Bytes a device that a traced step needs, within about 20 %, without compiling it."""
    state = jax.tree.leaves(program.template)
    everywhere = sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in state)
    on_each = sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in state
    )
    num_devices = program.definition.mesh.size
    return on_each + max(0, peak_bytes(traced.jaxpr.jaxpr) - everywhere) // num_devices


class Feed:
    """Global batches on the devices, one ahead of the step that runs: it never waits for a copy.

    Attributes:
      parts: the parts of the next step's batch, for `run_step`.
      waited: seconds in which the devices were idle because the next batch was not there.
    """

    def __init__(self, mesh: Mesh, batches: Iterator[dict[str, np.ndarray]], microbatches: int):
        """Fetch the first batch. `batches`: from `training_batches`."""
        self._mesh, self._batches, self._microbatches = mesh, batches, microbatches
        self.waited = 0.0
        self.parts = self._fetch()

    def _fetch(self) -> list[dict[str, jax.Array]]:
        return [to_devices(self._mesh, next(self._batches)) for _ in range(self._microbatches)]

    def advance(self, running: jax.Array) -> None:
        """Fetch the next batch; `running` is a result of the step that was just begun."""
        began, idle = time.monotonic(), running.is_ready()
        self.parts = self._fetch()
        if idle or running.is_ready():  # else the devices were busy all the time
            self.waited += time.monotonic() - began


def run_step(
    program: Program, state: TrainState, microbatches: Sequence[dict[str, jax.Array]]
) -> TrainState:
    """The state after one optimizer step on one global batch in equal parts.

    Gradient accumulation is a host loop over one compiled function: a scan over microbatches would
    make convolutions inside it slow on CPU, and an unrolled loop would multiply the compile time.

    Args:
      program: from `make_program`.
      state: donated; use the returned one.
      microbatches: `config.microbatches` parts, global arrays `[B / microbatches, ...]`, from
        `Feed.parts`.
    """
    if len(microbatches) == 1:
        return program.train_step(state, microbatches[0])
    gradients = program.zero_gradients()
    for part in microbatches:
        state, gradients = program.accumulate(state, gradients, part)
    return program.apply_gradients(state, gradients)


class Report(NamedTuple):
    """Means over the steps since the last report.

    means: loss, scores and gradient norm, means over examples; those of `Task.over_annotated` over
      the examples with a mask, and absent if there was none.
    code_counts: [num_codes], how often each code was used; None without a codebook.
    layer_gradient_norms: layer -> mean over the steps.
    """

    means: dict[str, float]
    code_counts: np.ndarray | None
    layer_gradient_norms: dict[str, float]


def take_report(program: Program, state: TrainState) -> tuple[TrainState, Report]:
    """The state with its sums set to zero, and the means that they give."""
    sums = jax.device_get(state.sums)
    weight, code_counts, norms = (
        sums.pop(name) for name in ("weight", "code_counts", "layer_gradient_norms")
    )
    weight = max(float(weight), 1.0)
    means, norms = (
        {name: float(value) / weight for name, value in values.items()} for values in (sums, norms)
    )
    for name in program.definition.task.over_annotated:
        total = means.pop(name)
        if means["annotated_slices"] > 0:
            means[name] = total / means["annotated_slices"]
    return state.replace(sums=program.zeros_like(state.sums)), Report(means, code_counts, norms)
