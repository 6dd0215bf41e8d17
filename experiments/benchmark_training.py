"""Speed and memory of a training step of the autoencoder: this project's and the same model in PyTorch, in one run.

    python -m experiments.benchmark_training --preset=64,128
    python -m experiments.benchmark_training --preset=reference --dtype=bfloat16 --batch_size=4,8,16,32 --sides=jax

A step is the forward pass in training mode, the loss of `configs/masked_region.py` (0.2 MSE + 0.2 masked MSE + 0.8
vector quantization - 0.1 SSIM), the backward pass and a RAdam update. Both sides start from the same weights and see
the same images, so their first losses must agree; what differs is what each library does with them.

Repeats alternate between the sides, so that a busy machine slows both; the median is reported, and the spread of the
middle half. "of peak" is the model's arithmetic (3 x the forward pass, `flops_per_slice`) over the fastest square
matrix product in the same dtype that either library does in the same run (float32 may be TF32 there, as it is in the
convolutions). "compiled" is the memory that XLA expects the step to need, "peak" what the device has held at most: for
JAX since the program began (batch sizes are tried in rising order), for PyTorch within the row; "-" where a backend
cannot tell. On a GPU both sides share the memory: to find the largest batch of each, run --sides=jax and --sides=torch
one after the other. Without PyTorch (`pip install '.[torch]'`) only this project is timed. "compile" is tracing and
compilation together, from nothing (compiled programs that earlier runs kept are not used).

--profile=FOLDER traces a few more steps of this project's side, writes the trace and the compiled program there and
prints the operations that take most of a step.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ctssl_jax import losses
from ctssl_jax.models.vqvae import VQVAE, VQVAEConfig, flops_per_slice
from ctssl_jax.ops.images import ssim, to_unit_range
from ctssl_jax.parallel.processes import configure_jax
from experiments import step_profile

LEARNING_RATE = 1e-3
BETA = 0.25
WEIGHTS = {"mse": 0.2, "masked_mse": 0.2, "vq": 0.8, "ssim": 0.1}
MASKED_AREA = 0.2
GIB = 2**30

# image side, hidden, depth, batch
PRESETS = {
    "64": (64, (16, 32), 2, 8),
    "64wide": (64, (32, 64), 4, 16),
    "128": (128, (32, 64), 4, 8),
    "256": (256, (64, 128), 6, 4),
    "reference": (512, (256, 512), 18, 1),
}


class Batch(NamedTuple):
    """inputs, target: [B, S, S, C] float32 in [0, 1]; region: [B, S, S, 1] float32, 1 where the input was covered."""

    inputs: Any
    target: Any
    region: Any


class Side(NamedTuple):
    """One library's training: `step` takes a step and returns the loss, not waiting for it; `peak` () -> bytes held at
    most, None where unknown; `program` what XLA made of the step and the seconds that took, None for PyTorch."""

    step: Callable[[], Any]
    peak: Callable[[], int | None]
    program: jax.stages.Compiled | None = None
    compile_seconds: float | None = None


def example_batch(batch_size: int, image_size: int) -> Batch:
    """Random images with a covered square in the middle, numpy."""
    target = np.random.default_rng(0).random((batch_size, image_size, image_size, 1), np.float32)
    side = round(image_size * MASKED_AREA**0.5)
    begin = (image_size - side) // 2
    region = np.zeros_like(target)
    region[:, begin : begin + side, begin : begin + side] = 1
    return Batch(target * (1 - region), target, region)


def loss_of(graph, params, variables, batch: Batch) -> tuple[jax.Array, Any]:
    """The recipe's loss (scalar) in training mode, and the model's new variables."""
    model = nnx.merge(graph, params, variables, copy=True)
    output = model(batch.inputs, train=True)
    prediction, target = output.reconstruction, batch.target
    loss = WEIGHTS["mse"] * losses.mse(prediction, target)
    loss += WEIGHTS["masked_mse"] * losses.masked_mse(prediction, target, batch.region)
    loss += WEIGHTS["vq"] * losses.vector_quantization_loss(output.codebook_loss, output.commitment_loss, BETA)
    loss -= WEIGHTS["ssim"] * ssim(to_unit_range(prediction), target)
    return jnp.mean(loss), nnx.state(model, nnx.Not(nnx.Param))


def make_train_step(graph) -> Callable:
    """The jitted step: (params, variables, optimizer_state, batch) -> the first three anew, and the loss."""

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def train_step(params, variables, optimizer_state, batch):
        value_and_grad = jax.value_and_grad(functools.partial(loss_of, graph), has_aux=True)
        (loss, variables), gradients = value_and_grad(params, variables, batch)
        updates, optimizer_state = optax.radam(LEARNING_RATE).update(gradients, optimizer_state, params)
        return optax.apply_updates(params, updates), variables, optimizer_state, loss

    return train_step


def compiled_bytes(compiled: jax.stages.Compiled) -> int:
    """Memory that XLA expects a compiled program to need, its arguments and results included."""
    memory = compiled.memory_analysis()
    parts = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    return sum(parts) - memory.alias_size_in_bytes


def make_jax_side(model: VQVAE, batch: Batch) -> Side:
    """Training by JAX from the model's weights, which it copies."""
    graph, params, variables = nnx.split(model, nnx.Param, ...)
    # Own copies, since the step gives its arguments' memory away.
    carry = jax.tree.map(jnp.copy, (params, variables, optax.radam(LEARNING_RATE).init(params)))
    batch = jax.tree.map(jnp.asarray, batch)
    began = time.perf_counter()
    compiled = make_train_step(graph).lower(*carry, batch).compile()
    compile_seconds = time.perf_counter() - began

    def step():
        nonlocal carry
        *carry, loss = compiled(*carry, batch)
        return loss

    def peak():
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    return Side(step, peak, compiled, compile_seconds)


def make_torch_side(model: VQVAE, config: VQVAEConfig, batch: Batch, *, use_gpu: bool, compiled: bool) -> Side:
    """The same training in PyTorch (channels last in memory), from the same weights; `compiled` by torch.compile."""
    import torch
    from torch.nn import functional

    from ctssl_jax.torch_bridge import ctssl_torch, names
    from experiments import torch_ssim

    device = torch.device("cuda" if use_gpu else "cpu")
    if use_gpu:
        torch.cuda.reset_peak_memory_stats()
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True  # convolutions, as in JAX; the two matrix products stay exact on both sides
    tensors = {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
    entries = names.state_dict(tensors, "VQVAE", config.depth, 0)
    twin = ctssl_torch.VQVAE(**names.architecture_settings(config))
    twin.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in entries.items()})
    twin = twin.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.RAdam(twin.parameters(), lr=LEARNING_RATE)
    tensors = (torch.tensor(images.transpose(0, 3, 1, 2)) for images in batch)
    inputs, target, region = (images.to(device, memory_format=torch.channels_last) for images in tensors)
    band = torch_ssim.gaussian_band(target.shape[-1]).to(device)

    def training_loss():
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            output = twin(inputs)
        prediction, codebook_loss, commitment_loss = (
            output.reconstruction,
            output.codebook_loss,
            output.commitment_loss,
        )
        error = (prediction - target).square()
        masked = ((error * region).sum((1, 2, 3)) / region.sum((1, 2, 3)).clamp(min=1)).mean()
        similarity = torch_ssim.ssim(prediction.clamp(0, 1), target, band).mean()
        loss = WEIGHTS["mse"] * functional.mse_loss(prediction, target) + WEIGHTS["masked_mse"] * masked
        return loss + WEIGHTS["vq"] * (codebook_loss + BETA * commitment_loss) - WEIGHTS["ssim"] * similarity

    if compiled:
        eager_loss, training_loss = training_loss, torch.compile(training_loss)
        try:
            training_loss().backward()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the compiler lacks; the first line says it
            print(f"torch.compile failed, PyTorch runs without it: {(str(error).splitlines() or [repr(error)])[0]}")
            training_loss = eager_loss

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = training_loss()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Side(step, torch.cuda.max_memory_allocated if use_gpu else lambda: None)


def time_steps(step: Callable[[], Any], count: int) -> float:
    """Milliseconds a step, over `count` steps; reading the last loss waits for all of them."""
    start = time.perf_counter()
    for _ in range(count):
        loss = step()
    float(loss)
    return 1000 * (time.perf_counter() - start) / count


def matmul_peak(side: str, dtype: str, *, use_gpu: bool) -> float:
    """The most that one square matrix product in this dtype reaches, in FLOP/s, over several sizes and tries."""
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
            matrix = torch.tensor(values, dtype=getattr(torch, dtype), device="cuda" if use_gpu else "cpu")

            def product(matrix=matrix):
                return (matrix @ matrix)[0, 0]

        time_steps(product, 1)
        milliseconds = min(time_steps(product, 10 if use_gpu else 2) for _ in range(5))
        best = max(best, 2 * size**3 / milliseconds * 1000)
        if side == "torch":
            torch.backends.cuda.matmul.allow_tf32 = False
    return best


def benchmark(
    makers: dict[str, Callable[[], Side]], *, repeats: int, steps: int, profile: Path | None = None
) -> tuple[dict[str, dict], str]:
    """Time all sides, alternating; with a folder for it, then profile the JAX side.

    Returns:
        for each side its first loss, the times of all repeats and their median in ms, and memory in bytes; a side that
        ran out of memory has only {"failed": "out of memory"}. And the profile as a table, "" without one.
    """
    sides, results = {}, {}
    for name, make in makers.items():
        try:
            side = make()
            results[name] = {"first_loss": float(side.step()), "times_ms": []}
            time_steps(side.step, 2)
            sides[name] = side
        except Exception as error:  # the libraries have no common type for it
            if not any(phrase in str(error) for phrase in ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")):
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
    return results, step_profile.table(step_profile.profile(sides["jax"].step, sides["jax"].program.as_text(), profile))


def _row(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _gib(value: int | None) -> str:
    return "-" if value is None else f"{value / GIB:.2f}"


def run_preset(preset: str, arguments: argparse.Namespace, sides: list[str], peak: float) -> list[dict]:
    """Time one preset at every batch size that was asked for; prints a line a side and returns them as dicts."""
    image_size, hidden, depth, batch_size = PRESETS[preset]
    use_gpu = jax.devices()[0].platform == "gpu"
    switches = {"dtype": arguments.dtype, "remat": arguments.remat, "scan": arguments.scan}
    config = VQVAEConfig(hidden=hidden, depth=depth, **switches)
    model = VQVAE(config, rngs=nnx.Rngs(0))
    sizes = sorted(int(size) for size in arguments.batch_size.split(",")) if arguments.batch_size else [batch_size]
    rows = []
    for size in sizes:
        batch = example_batch(size, image_size)
        makers = {
            "jax": functools.partial(make_jax_side, model, batch),
            "torch": functools.partial(
                make_torch_side, model, config, batch, use_gpu=use_gpu, compiled=arguments.torch_compile
            ),
        }
        results, profile = benchmark(
            {side: makers[side] for side in sides},
            repeats=arguments.repeats,
            steps=arguments.steps,
            profile=arguments.profile and arguments.profile / f"{preset}_batch{size}",
        )
        for side, result in results.items():
            row = {"preset": preset, "image_size": image_size, **dataclasses.asdict(config), "batch_size": size}
            row |= {"side": side, **result}
            cells = (image_size, hidden, depth, size, arguments.dtype, side)
            if "failed" in result:
                print(_row(*cells, result["failed"], *["-"] * 7), flush=True)
            else:
                row["slices_per_s"] = 1000 * size / result["median_ms"]
                row["of_peak"] = 3 * flops_per_slice(config, image_size) * row["slices_per_s"] / peak
                low, _, high = statistics.quantiles(result["times_ms"], n=4)
                times = f"{result['median_ms']:.1f} ({low:.1f} to {high:.1f})"
                speeds = f"{row['slices_per_s']:.1f}", f"{100 * row['of_peak']:.1f} %"
                memory = _gib(result["compiled_bytes"]), _gib(result["peak_bytes"])
                compiling = "-" if result["compile_seconds"] is None else f"{result['compile_seconds']:.1f}"
                print(_row(*cells, times, *speeds, *memory, compiling, f"{result['first_loss']:.6f}"), flush=True)
            rows.append(row)
        if profile:
            print(f"\n{profile}\n", flush=True)
        sides = [side for side in sides if "failed" not in results[side]]  # a larger batch fits no better
    return rows


def best_batches(rows: list[dict]) -> list[str]:
    """For each side the batch size with the most slices a second, and how the sides then compare; one line each."""
    fastest = {}
    for row in rows:
        if row.get("slices_per_s", 0) > fastest.get(row["side"], {}).get("slices_per_s", 0):
            fastest[row["side"]] = row
    lines = [
        f"{side}: {row['slices_per_s']:.1f} slices/s at batch {row['batch_size']}" for side, row in fastest.items()
    ]
    if {"jax", "torch"} <= set(fastest):
        ratio = fastest["jax"]["slices_per_s"] / fastest["torch"]["slices_per_s"]
        lines.append(f"jax / torch, each at its best batch: {ratio:.2f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="64", help=f"one or more of {','.join(PRESETS)}, comma-separated")
    parser.add_argument("--batch_size", default="", help="batch sizes to try, comma-separated; default: the preset's")
    parser.add_argument("--sides", default="jax,torch", help="jax, torch or both, comma-separated")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", action="store_true", help="recompute residual blocks in the backward pass (JAX)")
    parser.add_argument("--scan", action="store_true", help="residual blocks as one loop (JAX)")
    parser.add_argument("--torch_compile", action="store_true", help="PyTorch through torch.compile")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps timed in each repeat")
    parser.add_argument("--profile", type=Path, help="folder for a trace of this project's side")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    arguments = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory to PyTorch
    configure_jax()
    jax.config.update("jax_enable_compilation_cache", False)
    presets, sides = arguments.preset.split(","), arguments.sides.split(",")
    if unknown := [preset for preset in presets if preset not in PRESETS]:
        parser.error(f"--preset: {unknown[0]} is not one of {', '.join(PRESETS)}")
    if unknown := [side for side in sides if side not in ("jax", "torch")]:
        parser.error(f"--sides: {unknown[0]} is neither jax nor torch")
    if arguments.repeats < 2:
        parser.error("--repeats: at least 2 are needed for a spread")
    if "torch" in sides and importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed (pip install '.[torch]'): timing this project only")
        sides = [side for side in sides if side != "torch"] or ["jax"]

    device = jax.devices()[0]
    peaks = {side: matmul_peak(side, arguments.dtype, use_gpu=device.platform == "gpu") for side in sides}
    measured = ", ".join(f"{side} {peak / 1e12:.3f} TFLOP/s" for side, peak in peaks.items())
    print(f"{device.device_kind}, {os.cpu_count()} CPU cores; fastest {arguments.dtype} matrix product: {measured}\n")
    titles = ("pixels", "hidden", "depth", "batch", "dtype", "side", "ms a step", "slices/s", "of peak")
    print(_row(*titles, "compiled GiB", "peak GiB", "compile s", "first loss"))
    print(_row(*["---"] * 13))
    rows = [row for preset in presets for row in run_preset(preset, arguments, sides, max(peaks.values()))]
    for preset in presets:
        print("\n".join([f"\n{preset}", *best_batches([row for row in rows if row["preset"] == preset])]))
    if arguments.json:
        content = {"device": device.device_kind, "cpu_count": os.cpu_count(), "matmul_flops": peaks, "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
