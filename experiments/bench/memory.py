"""Memory of a training step: computed from shapes, or as XLA expects it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.extend.core import Literal

from ctssl_jax.models.layers import ResidualBlock
from ctssl_jax.models.vqvae import VQVAE, VQVAEConfig

from .sides import (
    GIB,
    LEARNING_RATE,
    Batch,
    compiled_bytes,
    loss_of,
    make_train_step,
)

USABLE = 0.9  # share of a device's memory


def abstract_model(config: VQVAEConfig) -> tuple:
    """Graph, parameters and other variables of the model as shapes."""
    return nnx.split(nnx.eval_shape(lambda: VQVAE(config, rngs=nnx.Rngs(0))), nnx.Param, ...)


def abstract_batch(config: VQVAEConfig, image_size: int, batch_size: int) -> Batch:
    """Shapes of a batch."""

    def images(channels):
        return jax.ShapeDtypeStruct((batch_size, image_size, image_size, channels), jnp.float32)

    return Batch(images(config.in_channels), images(config.in_channels), images(1))


def num_scalars(tree) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def saved_bytes(function, differentiated, *others) -> int:
    """Bytes that `jax.vjp` saves for the backward pass beside its arguments; traced, not run.

    Args:
        function: (differentiated, *others) -> (scalar or array, anything).
        differentiated, others: trees of arrays or shapes.

    Returns:
        bytes; an array that is saved twice counts once, an array that repeats a constant is free.
    """

    def residuals(differentiated, *others):
        _, backward, _ = jax.vjp(
            lambda first: function(first, *others), differentiated, has_aux=True
        )
        return jax.tree.leaves(backward)

    program = jax.make_jaxpr(residuals)(differentiated, *others).jaxpr
    # the arguments have no equation
    source = {result: equation for equation in program.eqns for result in equation.outvars}
    saved = {
        result for result in program.outvars if not isinstance(result, Literal) and result in source
    }

    def repeats_a_constant(result):
        equation = source[result]
        return equation.primitive.name == "broadcast_in_dim" and isinstance(
            equation.invars[0], Literal
        )

    shapes = [result.aval for result in saved if not repeats_a_constant(result)]
    return sum(int(np.prod(shape.shape)) * shape.dtype.itemsize for shape in shapes)


@functools.cache
def residual_bytes(config: VQVAEConfig, image_size: int, batch_size: int) -> int:
    """Bytes that a training step of the model keeps for its backward pass."""
    graph, params, variables = abstract_model(config)
    batch = abstract_batch(config, image_size, batch_size)
    return saved_bytes(functools.partial(loss_of, graph), params, variables, batch)


def _block_bytes(config: VQVAEConfig, image_size: int) -> tuple[int, int]:
    """Bytes of one residual block: its residuals for one slice, and its float32 parameters."""
    dtype, features = jnp.dtype(config.dtype), config.hidden[1]
    block = nnx.eval_shape(lambda: ResidualBlock(features, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, params, variables = nnx.split(block, nnx.Param, ...)
    x = jax.ShapeDtypeStruct((1, image_size // 4, image_size // 4, features), dtype)

    def run(params_and_x, variables):
        params, x = params_and_x
        return nnx.merge(graph, params, variables, copy=True)(x, None, train=True), None

    return saved_bytes(run, (params, x), variables), 4 * num_scalars(params)


def estimate_bytes(config: VQVAEConfig, image_size: int, sharing: int) -> tuple[int, int]:
    """Memory of a training step on one device: bytes for any batch, and bytes a slice.

    Args:
        config: the model with its switches.
        image_size: side in pixels.
        sharing: devices that share parameters, gradients and optimizer state.
    """
    one, two = (residual_bytes(config, image_size, batch_size) for batch_size in (1, 2))
    scalars = num_scalars(abstract_model(config)[1])
    gathered = 4 * scalars if sharing > 1 else 0
    first, second = config.hidden
    working = 3 * 4 * max(first * (image_size // 2) ** 2, second * (image_size // 4) ** 2)
    block_residuals, block_parameters = _block_bytes(config, image_size)
    stack = 2 * config.depth * block_parameters if config.scan else 0
    fixed = 4 * 4 * scalars // sharing + max(2 * one - two, gathered) + stack
    return fixed, two - one + working + block_residuals * config.remat


def measure(config: VQVAEConfig, image_size: int, batch_size: int) -> int:
    """Bytes that XLA expects the compiled training step to need on this device."""
    graph, params, variables = abstract_model(config)
    optimizer_state = jax.eval_shape(optax.radam(LEARNING_RATE).init, params)
    batch = abstract_batch(config, image_size, batch_size)
    return compiled_bytes(
        make_train_step(graph).lower(params, variables, optimizer_state, batch).compile()
    )


def largest_batch(fixed: int, per_slice: int, device_gib: int) -> int:
    """Number of slices that fit on a device, which may be 0."""
    return max(0, int((USABLE * device_gib * GIB - fixed) // per_slice))
