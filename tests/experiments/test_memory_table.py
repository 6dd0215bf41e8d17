"""The memory table counts what a training step really saves."""

import jax
import numpy as np
import pytest
from flax import nnx

from ctssl_jax.models.vqvae import VQVAE, VQVAEConfig
from experiments import memory_table
from experiments.bench import memory
from experiments.bench.sides import example_batch, loss_of

TINY = {"hidden": (4, 8), "depth": 1, "embedding_dim": 4, "num_codes": 8}
WIDE = {**TINY, "hidden": (16, 32), "depth": 2}


def test_parameters_are_those_of_the_reference_model():
    _, params, _ = memory.abstract_model(VQVAEConfig(in_channels=3))
    assert memory.num_scalars(params) == 101_353_673


def test_residuals_are_those_that_a_backward_pass_holds():
    config = VQVAEConfig(dtype="bfloat16", **TINY)
    graph, params, variables = nnx.split(VQVAE(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
    batch = example_batch(2, 16)

    @jax.jit
    def residuals(params, variables, batch):
        _, backward, _ = jax.vjp(
            lambda params: loss_of(graph, params, variables, batch), params, has_aux=True
        )
        return jax.tree.leaves(backward)

    def contents(array):
        return array.shape, array.dtype, array.tobytes()

    held = [np.asarray(leaf) for leaf in residuals(params, variables, batch)]
    arguments = {contents(np.asarray(leaf)) for leaf in jax.tree.leaves((params, variables, batch))}
    total = sum(
        array.nbytes for array in held if contents(array) not in arguments and np.any(array != 0)
    )
    assert memory.residual_bytes(config, 16, 2) == pytest.approx(total, rel=0.01)


def slice_bytes(**settings) -> int:
    """Residuals of one slice of 32 x 32."""
    config = VQVAEConfig(**{**WIDE, **settings})
    return memory.residual_bytes(config, 32, 2) - memory.residual_bytes(config, 32, 1)


def test_switches_lower_what_is_kept():
    kept = {
        (dtype, remat): slice_bytes(dtype=dtype, remat=remat)
        for dtype in ("float32", "bfloat16")
        for remat in (False, True)
    }
    assert kept["bfloat16", False] < 0.7 * kept["float32", False]
    assert kept["float32", True] < 0.8 * kept["float32", False]


def test_batch_normalisation_keeps_its_input_as_it_came():
    """No float32 copy of an activation is kept in bfloat16: two bytes a value, and one for the sign
    of each."""
    block = slice_bytes(dtype="bfloat16", depth=2) - slice_bytes(dtype="bfloat16", depth=1)
    # of one activation, in the encoder and in the decoder: 8 x 8 pixels, 32 features
    values = 2 * 8 * 8 * 32
    # input and output of conv3, input of conv1, sign before the ReLU
    assert block == values * (2 + 2 + 2 + 1)


def test_table_has_every_row_and_shares_the_state():
    lines = memory_table.table([1, 2], 32, measured=False, scan=False, **WIDE)
    assert len(lines) == 2 + 8 and all(line.count("|") == lines[0].count("|") for line in lines)
    config = VQVAEConfig(**WIDE)
    alone, per_slice = memory.estimate_bytes(config, 32, 1)
    shared, same = memory.estimate_bytes(config, 32, 8)
    assert shared < alone and same == per_slice > 0
    assert memory.largest_batch(alone, per_slice, 0) == 0


def test_compiled_step_needs_at_least_its_state():
    config = VQVAEConfig(**{**TINY, "depth": 0})
    scalars = memory.num_scalars(memory.abstract_model(config)[1])
    assert memory.measure(config, 16, 1) > 3 * 4 * scalars
