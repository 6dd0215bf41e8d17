"""Time of a training step of the autoencoder: this project's and the same model in PyTorch, in one run.

    python -m experiments.benchmark_training --preset=64,128

A step is the forward pass in training mode, mean squared error + codebook loss + 0.25 commitment loss, the
backward pass and a RAdam update. Both start from the same weights; the first loss of each is printed, so
that one sees that they compute the same thing. Repeats alternate between the two, so that a busy machine
slows both; the median is reported. Without PyTorch (`pip install '.[torch]'`) only this project's time is
printed.
"""

import argparse
import functools
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ctssl_jax.command_line import configure_jax
from ctssl_jax.models.vqvae import VQVAE, VQVAEConfig, flops_per_slice

LEARNING_RATE = 1e-3
BETA = 0.25

# image side, hidden, depth, batch
PRESETS = {
    "64": (64, (16, 32), 2, 8),
    "64wide": (64, (32, 64), 4, 16),
    "128": (128, (32, 64), 4, 8),
    "256": (256, (64, 128), 6, 4),
    "reference": (512, (256, 512), 18, 1),
}


def make_jax_step(model: VQVAE, images: np.ndarray) -> Callable[[], jax.Array]:
    """A function that takes one training step on images [B, H, W, C] and returns the loss, not waiting for
    it."""
    graph, params, state = nnx.split(model, nnx.Param, ...)
    optimizer = optax.radam(LEARNING_RATE)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, state, optimizer_state, images):
        def loss_of(params):
            model = nnx.merge(graph, params, state, copy=True)
            output = model(images, train=True)
            vq_loss = jnp.mean(output.codebook_loss + BETA * output.commitment_loss)
            loss = jnp.mean(jnp.square(output.reconstruction - images)) + vq_loss
            return loss, nnx.state(model, nnx.Not(nnx.Param))

        (loss, state), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return optax.apply_updates(params, updates), state, optimizer_state, loss

    # Own copies, since the step gives its arguments' memory away.
    carry = jax.tree.map(jnp.copy, (params, state, optimizer.init(params)))
    images = jnp.asarray(images)

    def run():
        nonlocal carry
        *carry, loss = step(*carry, images)
        return loss

    return run


def make_torch_step(model: VQVAE, config: VQVAEConfig, images: np.ndarray, *, use_gpu: bool) -> Callable[[], object]:
    """The same step in PyTorch (channels last in memory), from the same weights."""
    import torch

    from experiments import torch_vqvae

    device = torch.device("cuda" if use_gpu else "cpu")
    leaves = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}
    twin = torch_vqvae.VQVAE(config)
    entries = torch_vqvae.to_torch_entries(leaves, config.depth)
    missing, unexpected = twin.load_state_dict(entries, strict=False)
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise RuntimeError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    twin = twin.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.RAdam(twin.parameters(), lr=LEARNING_RATE)
    batch = torch.tensor(images.transpose(0, 3, 1, 2)).to(device, memory_format=torch.channels_last)

    def run():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            reconstruction, _, codebook_loss, commitment_loss = twin(batch)
        loss = torch.nn.functional.mse_loss(reconstruction, batch) + codebook_loss + BETA * commitment_loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def time_steps(step: Callable[[], object], count: int) -> float:
    """Milliseconds a step, over `count` steps; reading the last loss waits for all of them."""
    start = time.perf_counter()
    for _ in range(count):
        loss = step()
    float(loss)
    return 1000 * (time.perf_counter() - start) / count


def benchmark(preset: str, *, dtype: str, remat: bool, repeats: int, steps: int, compare: bool) -> dict:
    """Time one preset; returns sizes, first losses, the times of all repeats in ms, their medians and the
    ratio."""
    image_size, hidden, depth, batch_size = PRESETS[preset]
    config = VQVAEConfig(hidden=hidden, depth=depth, dtype=dtype, remat=remat)
    images = np.random.default_rng(0).random((batch_size, image_size, image_size, 1), np.float32)
    model = VQVAE(config, rngs=nnx.Rngs(0))
    device = jax.devices()[0]
    runs = {"jax": make_jax_step(model, images)}
    if compare:
        runs["torch"] = make_torch_step(model, config, images, use_gpu=device.platform == "gpu")

    start = time.perf_counter()
    first_losses = {name: float(run()) for name, run in runs.items()}
    first_step_s = time.perf_counter() - start
    for run in runs.values():
        time_steps(run, 2)
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(time_steps(run, steps))

    medians = {name: statistics.median(values) for name, values in times.items()}
    flops = 3 * flops_per_slice(config, image_size) * batch_size
    return {
        "preset": preset,
        "image_size": image_size,
        "hidden": hidden,
        "depth": depth,
        "batch_size": batch_size,
        "dtype": dtype,
        "remat": remat,
        "device": device.device_kind,
        "cpu_count": os.cpu_count(),
        "first_loss": first_losses,
        "first_steps_s": first_step_s,
        "times_ms": times,
        "median_ms": medians,
        "torch_over_jax": medians["torch"] / medians["jax"] if compare else None,
        "jax_slices_per_s": 1000 * batch_size / medians["jax"],
        "jax_gflops_per_s": flops / medians["jax"] / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="64", help=f"one or more of {','.join(PRESETS)}, comma-separated")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", action="store_true", help="recompute residual blocks in the backward pass (JAX)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps timed in each repeat")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    arguments = parser.parse_args()
    configure_jax()
    presets = arguments.preset.split(",")
    if unknown := [preset for preset in presets if preset not in PRESETS]:
        parser.error(f"--preset: {unknown[0]} is not one of {', '.join(PRESETS)}")
    compare = importlib.util.find_spec("torch") is not None
    if not compare:
        print("PyTorch is not installed (pip install '.[torch]'): timing this project only")

    results = []
    for preset in presets:
        result = benchmark(
            preset,
            dtype=arguments.dtype,
            remat=arguments.remat,
            repeats=arguments.repeats,
            steps=arguments.steps,
            compare=compare,
        )
        results.append(result)
        line = "{image_size} px, hidden {hidden}, depth {depth}, batch {batch_size}, {dtype}, {device}:"
        line = line.format(**result)
        line += f" jax {result['median_ms']['jax']:.1f} ms ({result['jax_slices_per_s']:.1f} slices/s)"
        if compare:
            line += f", torch {result['median_ms']['torch']:.1f} ms, torch/jax {result['torch_over_jax']:.2f}"
            line += ", first losses {jax:.6f} {torch:.6f}".format(**result["first_loss"])
        print(line, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
