"""What fits on an accelerator: memory of a training step of the reference model by batch and
switches.

    python -m experiments.memory_table                                      # reckoned, on any machine
    python -m experiments.memory_table --measure --batch_sizes=1,2,4,8      # what XLA expects on this device

The reckoned table adds up, for one device,

* parameters, gradients and the two moments of RAdam, float32, each divided by the number of devices
  that share them;
* if they are shared, the parameters gathered for the computation, once, float32;
* the arrays that the backward pass keeps of the forward pass: the residuals that JAX saves for the
  loss of `experiments.bench.sides`, copies of kernels in the convolutions' dtype included, all of
  them at once;
* working memory: three float32 arrays as large as the largest activation (a gradient coming in, one
  going out, and what a convolution library asks for), and with recomputed blocks the residuals of
  one block;
* with --scan the stack of the blocks' gradients (that of their parameters is among the residuals).

Residuals are traced at one and at two slices and continued in a line. What XLA merges, moves or
pads is not known, nor what the device's software takes: a tenth of each device is left free.
Accumulating gradients over microbatches is the column of the smaller batch.

--measure compiles the step of each cell instead and prints the memory that XLA expects (one device,
so nothing is shared). On a CPU that says little about a GPU: XLA undoes recomputation there unless
it is in a scan.
"""

import argparse
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.extend.core import Literal

from ctssl_jax.models.layers import ResidualBlock
from ctssl_jax.models.vqvae import VQVAE, VQVAEConfig
from experiments.bench.sides import (
    GIB,
    LEARNING_RATE,
    Batch,
    compiled_bytes,
    loss_of,
    make_train_step,
)

DEVICE_GIB = (16, 40, 80, 141)
USABLE = 0.9  # share of a device's memory
SHARING_DEVICES = 8


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
    """Bytes that `jax.vjp` saves for the backward pass beside the arguments themselves. Traced, not
    run.

    Args:
        function: (differentiated, *others) -> (scalar or array, anything).
        differentiated, others: trees of arrays or shapes.

    Returns:
        bytes; an array that is saved twice counts once, one that repeats a constant not at all.
    """

    def residuals(differentiated, *others):
        _, backward, _ = jax.vjp(
            lambda first: function(first, *others), differentiated, has_aux=True
        )
        return jax.tree.leaves(backward)

    program = jax.make_jaxpr(residuals)(differentiated, *others).jaxpr
    # arguments have none
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
    """Of one residual block: the residuals of one slice, and the float32 parameters, in bytes."""
    dtype, features = jnp.dtype(config.dtype), config.hidden[1]
    block = nnx.eval_shape(lambda: ResidualBlock(features, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, params, variables = nnx.split(block, nnx.Param, ...)
    x = jax.ShapeDtypeStruct((1, image_size // 4, image_size // 4, features), dtype)

    def run(params_and_x, variables):
        params, x = params_and_x
        return nnx.merge(graph, params, variables, copy=True)(x, None, train=True), None

    return saved_bytes(run, (params, x), variables), 4 * num_scalars(params)


def reckon(config: VQVAEConfig, image_size: int, sharing: int) -> tuple[int, int]:
    """Memory of a training step on one device as (bytes whatever the batch, bytes a slice).

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
    """Slices that fit on a device, 0 if none."""
    return max(0, int((USABLE * device_gib * GIB - fixed) // per_slice))


def table(
    batch_sizes: list[int], image_size: int, *, measured: bool, scan: bool, **sizes
) -> list[str]:
    """Lines of the Markdown table.

    Args:
        batch_sizes: slices a device, one column each.
        image_size: side in pixels.
        measured: compile every cell instead of reckoning it.
        scan: residual blocks as one loop.
        sizes: of the model, for `VQVAEConfig`.
    """
    title = ["dtype", "blocks", "parameters", *(f"batch {size}" for size in batch_sizes)]
    title += [] if measured else [f"fits {memory} GiB" for memory in DEVICE_GIB]
    rows = [title, ["---"] * len(title)]
    choices = itertools.product(
        ("float32", "bfloat16"), (False, True), (1,) if measured else (1, SHARING_DEVICES)
    )
    for dtype, remat, sharing in choices:
        config = VQVAEConfig(dtype=dtype, remat=remat, scan=scan, **sizes)
        row = [
            dtype,
            "recomputed" if remat else "kept",
            f"shared by {sharing}" if sharing > 1 else "on each device",
        ]
        if measured:
            needed = [measure(config, image_size, size) for size in batch_sizes]
        else:
            fixed, per_slice = reckon(config, image_size, sharing)
            needed = [fixed + size * per_slice for size in batch_sizes]
        row += [f"{value / GIB:.3g}" for value in needed]
        row += (
            []
            if measured
            else [str(largest_batch(fixed, per_slice, memory)) for memory in DEVICE_GIB]
        )
        rows.append(row)
    return ["| " + " | ".join(row) + " |" for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--batch_sizes", default="1,2,4,8,16,32,64", help="slices a device, comma-separated"
    )
    parser.add_argument("--image_size", type=int, default=512, help="side in pixels")
    parser.add_argument("--hidden", default="256,512", help="the model's two widths")
    parser.add_argument(
        "--depth", type=int, default=18, help="residual blocks, in the encoder and in the decoder"
    )
    parser.add_argument("--scan", action="store_true", help="residual blocks as one loop")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="compile every cell and print what XLA expects to need",
    )
    arguments = parser.parse_args()
    sizes = {
        "hidden": tuple(int(width) for width in arguments.hidden.split(",")),
        "depth": arguments.depth,
    }
    device = jax.devices()[0].device_kind
    how = (
        f"expected by XLA, compiled for one {device}"
        if arguments.measure
        else "reckoned, not measured"
    )
    loop = ", blocks in a scan" if arguments.scan else ""
    print(
        f"GiB a device for a training step at {arguments.image_size} x "
        f"{arguments.image_size}{loop}; {how}\n"
    )
    batch_sizes = [int(size) for size in arguments.batch_sizes.split(",")]
    lines = table(
        batch_sizes, arguments.image_size, measured=arguments.measure, scan=arguments.scan, **sizes
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
