"""BatchNorm statistics of groups of devices: those of each part of the batch, and no device waits
for another group."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ctssl_jax.models.layers import NORM_DECAY, BatchNorm, normalize_in_groups
from ctssl_jax.parallel.mesh import make_mesh, replicated, split_along_batch
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training.state import define
from tests.helpers.training_runs import tiny_config

X = 3 + 2 * jax.random.normal(jax.random.key(0), (16, 2, 2, 3))
WEIGHTS = jax.random.normal(jax.random.key(1), X.shape)


def outputs_of(norm, x):
    """Normalised x, running statistics, and gradients of a weighted sum."""
    graph, params, statistics = nnx.split(norm, nnx.Param, ...)

    def loss(params, x):
        model = nnx.merge(graph, params, statistics, copy=True)
        y = model(x, train=True)
        return jnp.sum(jnp.sin(y) * WEIGHTS[: len(x)]), (y, model.mean[...], model.var[...])

    (_, (y, mean, var)), (gradients, x_gradient) = jax.value_and_grad(
        loss, argnums=(0, 1), has_aux=True
    )(params, x)
    return y, mean, var, x_gradient, gradients


@pytest.mark.parametrize("num_groups", [1, 2, 8])
def test_eight_devices_in_groups_normalise_each_part_by_itself(num_groups):
    mesh = make_mesh(fsdp_devices=2)
    norm = BatchNorm(3)
    normalize_in_groups(norm, num_groups)
    step = jax.jit(lambda x: outputs_of(norm, x), in_shardings=split_along_batch(mesh))
    compiled = step.lower(jax.ShapeDtypeStruct(X.shape, X.dtype)).compile()
    y, mean, var, x_gradient, _ = compiled(jax.device_put(X, split_along_batch(mesh)))

    parts = np.asarray(X).reshape(num_groups, -1, 3)
    means, variances = parts.mean(axis=1, keepdims=True), parts.var(axis=1, keepdims=True)
    expected = ((parts - means) / np.sqrt(variances + 1e-5)).reshape(X.shape)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    np.testing.assert_allclose(mean, (1 - NORM_DECAY) * means.mean((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(
        var, NORM_DECAY + (1 - NORM_DECAY) * variances.mean((0, 1)), rtol=1e-4
    )
    # A part's gradient is that of a batch of its own.
    size = len(X) // num_groups
    alone = outputs_of(BatchNorm(3), X[:size])[3]
    np.testing.assert_allclose(x_gradient[:size], alone, atol=2e-4)
    waiting = re.findall(r"all-reduce(?:-start)?\(", compiled.as_text())
    # The sum of the gradients alone; within groups also sums forwards and backwards; of one group
    # the sums backwards are the gradients.
    assert len(waiting) == {8: 1, 2: 3, 1: 2}[num_groups]


def test_the_recipe_counts_devices_of_a_group(tiny_dataset):
    for devices, num_groups in ((0, 1), (8, 1), (4, 2), (1, 8)):
        config = tiny_config(tiny_dataset, batch_norm_group=devices)
        definition = define(config, get_task(config.task), 1, make_mesh())
        model = nnx.merge(definition.graph, definition.params, definition.variables)
        norms = [module for _, module in nnx.iter_graph(model) if isinstance(module, BatchNorm)]
        assert len(norms) > 5 and {norm.num_groups for norm in norms} == {num_groups}


def test_replicated_statistics_are_the_same_on_every_device():
    mesh = make_mesh()
    norm = BatchNorm(3)
    normalize_in_groups(norm, 8)
    step = jax.jit(
        lambda x: outputs_of(norm, x)[1:3],
        in_shardings=split_along_batch(mesh),
        out_shardings=replicated(mesh),
    )
    for value in step(jax.device_put(X, split_along_batch(mesh))):
        shards = [np.asarray(shard.data) for shard in value.addressable_shards]
        assert all(np.array_equal(shard, shards[0]) for shard in shards[1:])
