"""Time to compile a training step, with residual blocks unrolled and in a scan.

    ctssl benchmark_compile --image_size=64 --steps=3
    ctssl benchmark_compile --image_size=512

Each program is traced and compiled once, with JAX's cache of compiled programs off. With --steps
the step is also run, and its median time printed (the first run does not count). The model has the
reference widths unless --hidden changes them; the step is the same as in
`experiments.benchmark_training`.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ctssl_jax.models.vqvae import VQVAE, VQVAEConfig
from ctssl_jax.parallel.processes import configure_jax
from data_prep.system import command_line

from .bench.sides import (
    GIB,
    LEARNING_RATE,
    compiled_bytes,
    example_batch,
    make_train_step,
    time_steps,
)


def step_milliseconds(compiled: jax.stages.Compiled, carry: tuple, batch, steps: int) -> float:
    """Median time of a step; the first step does not count."""

    def step():
        nonlocal carry
        *carry, loss = compiled(*carry, batch)
        return loss

    time_steps(step, 1)
    return statistics.median(time_steps(step, 1) for _ in range(steps))


def measure(config: VQVAEConfig, image_size: int, batch_size: int, steps: int) -> list[str]:
    """Cells of one row: seconds to lower and to compile, KiB of StableHLO, GiB, ms a step."""
    make = (lambda build: build()) if steps else nnx.eval_shape
    graph, params, variables = nnx.split(
        make(lambda: VQVAE(config, rngs=nnx.Rngs(0))), nnx.Param, ...
    )
    initialize = optax.radam(LEARNING_RATE).init
    carry = (params, variables, initialize(params) if steps else jax.eval_shape(initialize, params))
    batch = jax.tree.map(jnp.asarray, example_batch(batch_size, image_size))
    train_step = make_train_step(graph)

    began = time.perf_counter()
    lowered = train_step.lower(*carry, batch)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ended = time.perf_counter()
    milliseconds = f"{step_milliseconds(compiled, carry, batch, steps):.0f}" if steps else "-"
    text_kib = len(lowered.as_text()) / 1024
    seconds = f"{traced - began:.1f}", f"{ended - traced:.1f}"
    return [*seconds, f"{text_kib:.0f}", f"{compiled_bytes(compiled) / GIB:.2f}", milliseconds]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image_size", type=int, default=64, help="side in pixels")
    parser.add_argument("--hidden", default="256,512", help="the two widths of the model")
    parser.add_argument(
        "--depths", default="2,6,18", help="residual blocks, in the encoder and in the decoder"
    )
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--remat", action="store_true", help="recompute residual blocks in the backward pass"
    )
    parser.add_argument(
        "--steps", type=int, default=0, help="steps to run and time; 0 compiles only"
    )
    arguments = parser.parse_args()
    configure_jax()
    jax.config.update("jax_enable_compilation_cache", False)

    hidden = tuple(int(width) for width in arguments.hidden.split(","))
    switches = {"hidden": hidden, "dtype": arguments.dtype, "remat": arguments.remat}
    shape = arguments.image_size, arguments.batch_size
    # start the compiler: only the first program pays for it
    measure(VQVAEConfig(depth=1, **{**switches, "hidden": (4, 8)}), 16, 1, 0)
    print(
        f"{jax.devices()[0].device_kind}, {shape[0]} pixels, hidden {hidden}, batch {shape[1]}, "
        f"{arguments.dtype}\n"
    )
    print("| depth | blocks | lower s | compile s | StableHLO KiB | compiled GiB | ms a step |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for depth in arguments.depths.split(","):
        for scan in (False, True):
            config = VQVAEConfig(depth=int(depth), scan=scan, **switches)
            cells = measure(config, *shape, arguments.steps)
            blocks = "scan" if scan else "unrolled"
            print("| " + " | ".join([depth, blocks, *cells]) + " |", flush=True)
    command_line.suggest("benchmark_training", aside=True)


if __name__ == "__main__":
    main()
