"""Time the sides of a comparison, and the fastest matrix product beside them."""

import statistics
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from . import step_profile
from .sides import Side, compiled_bytes, time_steps


def matmul_peak(side: str, dtype: str, *, use_gpu: bool) -> float:
    """The highest speed of one square matrix product in this dtype, over several sizes and tries.

    Returns:
        FLOP/s.
    """
    best = 0.0
    for size in (4096, 8192, 16384) if use_gpu else (1024, 2048):
        values = np.random.default_rng(0).standard_normal((size, size), np.float32)
        if side == "jax":
            matrix = jnp.asarray(values, dtype)
            multiply = jax.jit(jnp.dot)

            def product(matrix=matrix, multiply=multiply):
                return multiply(matrix, matrix)[0, 0]
        else:
            import torch

            torch.backends.cuda.matmul.allow_tf32 = True
            matrix = torch.tensor(
                values, dtype=getattr(torch, dtype), device="cuda" if use_gpu else "cpu"
            )

            def product(matrix=matrix):
                return (matrix @ matrix)[0, 0]

        time_steps(product, 1)
        milliseconds = min(time_steps(product, 10 if use_gpu else 2) for _ in range(5))
        best = max(best, 2 * size**3 / milliseconds * 1000)
        if side == "torch":
            torch.backends.cuda.matmul.allow_tf32 = False
    return best


def time_sides(
    makers: dict[str, Callable[[], Side]], *, repeats: int, steps: int, profile: Path | None = None
) -> tuple[dict[str, dict], str]:
    """Time all sides in turn; with a folder for `profile`, then profile the JAX side.

    Returns:
        for each side its first loss, the times of all repeats and their median in ms, and memory in
        bytes; a side that ran out of memory has only {"failed": "out of memory"}. And the profile
        as a table, "" without a profile.
    """
    sides, results = {}, {}
    for name, make in makers.items():
        try:
            side = make()
            results[name] = {"first_loss": float(side.step()), "times_ms": []}
            time_steps(side.step, 2)
            sides[name] = side
        except Exception as error:  # the libraries share no type for this error
            if not any(
                phrase in str(error)
                for phrase in ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")
            ):
                raise
            results[name] = {"failed": "out of memory"}
    for _ in range(repeats):
        for name, side in sides.items():
            results[name]["times_ms"].append(time_steps(side.step, steps))
    for name, side in sides.items():
        results[name] |= {
            "median_ms": statistics.median(results[name]["times_ms"]),
            "compiled_bytes": side.program and compiled_bytes(side.program),
            "compile_seconds": side.compile_seconds,
            "peak_bytes": side.peak(),
        }
    if not profile or "jax" not in sides:
        return results, ""
    return results, step_profile.table(
        step_profile.profile(sides["jax"].step, sides["jax"].program.as_text(), profile)
    )
