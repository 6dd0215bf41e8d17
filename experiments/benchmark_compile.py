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

import statistics
import time

import jax
import jax.numpy as jnp
import optax
from absl import flags
from flax import nnx

from ctssl_jax.models.vqvae import VQVAE, VQVAEConfig
from ctssl_jax.parallel.processes import configure_jax
from data_prep.system import command_line
from data_prep.system.errors import InputError

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


def define_flags() -> None:
    """Only where this module is the program: another one may define flags of the same names."""
    flags.DEFINE_integer("image_size", 64, "Side in pixels.", lower_bound=4)
    flags.DEFINE_list("hidden", ["256", "512"], "The two widths of the model.")
    flags.DEFINE_list(
        "depths", ["2", "6", "18"], "Residual blocks, in the encoder and in the decoder."
    )
    flags.DEFINE_integer("batch_size", 1, "Slices of a step.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of the convolutions.")
    flags.DEFINE_bool("remat", False, "Recompute residual blocks in the backward pass.")
    flags.DEFINE_integer("steps", 0, "Steps to run and time; 0 compiles only.", lower_bound=0)


def main(argv: list[str]) -> int:
    """Command line."""
    flag = flags.FLAGS
    hidden = tuple(command_line.whole_numbers("hidden", flag.hidden))
    depths = command_line.whole_numbers("depths", flag.depths)
    if len(hidden) != 2:
        raise InputError(f"--hidden={','.join(flag.hidden)}: give two widths, such as 256,512")
    configure_jax()
    jax.config.update("jax_enable_compilation_cache", False)

    switches = {"hidden": hidden, "dtype": flag.dtype, "remat": flag.remat}
    shape = flag.image_size, flag.batch_size
    # start the compiler: only the first program pays for it
    measure(VQVAEConfig(depth=1, **{**switches, "hidden": (4, 8)}), 16, 1, 0)
    print(
        f"{jax.devices()[0].device_kind}, {shape[0]} pixels, hidden {hidden}, batch {shape[1]}, "
        f"{flag.dtype}\n"
    )
    print("| depth | blocks | lower s | compile s | StableHLO KiB | compiled GiB | ms a step |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for depth in depths:
        for scan in (False, True):
            config = VQVAEConfig(depth=depth, scan=scan, **switches)
            cells = measure(config, *shape, flag.steps)
            blocks = "scan" if scan else "unrolled"
            print("| " + " | ".join([str(depth), blocks, *cells]) + " |", flush=True)
    command_line.suggest("benchmark_training", aside=True)
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
