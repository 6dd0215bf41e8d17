"""The two sides of a comparison of training speed: this project and the same model in PyTorch."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ctssl_jax.models.vqvae import VQVAE, VQVAEConfig
from ctssl_jax.ops import losses
from ctssl_jax.ops.images import ssim, to_unit_range

LEARNING_RATE = 1e-3
BETA = 0.25
WEIGHTS = {"mse": 0.2, "masked_mse": 0.2, "vq": 0.8, "ssim": 0.1}
MASKED_AREA = 0.2
GIB = 2**30


class Batch(NamedTuple):
    """inputs, target: [B, S, S, C] float32 in [0, 1]; region: [B, S, S, 1] float32, 1 where the
    input was covered."""

    inputs: Any
    target: Any
    region: Any


class Side(NamedTuple):
    """The training of one library.

    step: takes a step and returns the loss, not waiting for it.
    peak: () -> highest memory in bytes, None where it is unknown.
    program, compile_seconds: the compiled step and the time of compiling; None for PyTorch.
    """

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
    loss += WEIGHTS["vq"] * losses.vector_quantization_loss(
        output.codebook_loss, output.commitment_loss, BETA
    )
    loss -= WEIGHTS["ssim"] * ssim(to_unit_range(prediction), target)
    return jnp.mean(loss), nnx.state(model, nnx.Not(nnx.Param))


def make_train_step(graph) -> Callable:
    """The jitted step: (params, variables, optimizer_state, batch) -> new values of the first three
    and the loss."""

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def train_step(params, variables, optimizer_state, batch):
        value_and_grad = jax.value_and_grad(functools.partial(loss_of, graph), has_aux=True)
        (loss, variables), gradients = value_and_grad(params, variables, batch)
        updates, optimizer_state = optax.radam(LEARNING_RATE).update(
            gradients, optimizer_state, params
        )
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
    # copies, since the step donates the memory of its arguments
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


def make_torch_side(
    model: VQVAE, config: VQVAEConfig, batch: Batch, *, use_gpu: bool, compiled: bool
) -> Side:
    """The same training in PyTorch (channels last in memory), from the same weights; `compiled` by
    torch.compile."""
    import torch
    from torch.nn import functional

    from ctssl_jax.torch_bridge import ctssl_torch, names

    from . import torch_ssim

    device = torch.device("cuda" if use_gpu else "cpu")
    if use_gpu:
        torch.cuda.reset_peak_memory_stats()
    torch.backends.cudnn.benchmark = True
    # convolutions, as in JAX; the two matrix products stay exact on both sides
    torch.backends.cudnn.allow_tf32 = True
    tensors = {
        "/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))
    }
    entries = names.state_dict(tensors, "VQVAE", config.depth, 0)
    twin = ctssl_torch.VQVAE(**names.architecture_settings(config))
    twin.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in entries.items()})
    twin = twin.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.RAdam(twin.parameters(), lr=LEARNING_RATE)
    tensors = (torch.tensor(images.transpose(0, 3, 1, 2)) for images in batch)
    inputs, target, region = (
        images.to(device, memory_format=torch.channels_last) for images in tensors
    )
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
        loss = (
            WEIGHTS["mse"] * functional.mse_loss(prediction, target)
            + WEIGHTS["masked_mse"] * masked
        )
        return (
            loss
            + WEIGHTS["vq"] * (codebook_loss + BETA * commitment_loss)
            - WEIGHTS["ssim"] * similarity
        )

    if compiled:
        eager_loss, training_loss = training_loss, torch.compile(training_loss)
        try:
            training_loss().backward()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any type: the compiler lacks something, see its first line
            print(
                "torch.compile failed, PyTorch runs without it: "
                f"{(str(error).splitlines() or [repr(error)])[0]}"
            )
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
