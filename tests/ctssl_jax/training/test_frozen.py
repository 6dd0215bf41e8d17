"""Parameters that are not trained: a frozen encoder, and biases before a batch normalisation."""

import dataclasses
import functools

import jax
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from ctssl_jax.models.layers import ConvNorm, TransposedConvNorm
from ctssl_jax.ops.trees import flatten
from ctssl_jax.parallel.mesh import make_mesh
from ctssl_jax.tasks.interface import step_flops
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training import recipe
from ctssl_jax.training.state import abstract_batch, define
from ctssl_jax.training.step import initial_state, train_step
from data_prep.system.errors import InputError
from tests.helpers.training_runs import tiny_recipe

RECIPES = {
    "masked_region": {},
    "rotation": {},
    "pe": {"gradient_clip": 1.0},
    "pe_se_resnext": {"model.layers": (1, 1), "model.width": 8, "model.groups": 2},
    "nodules": {},
    "nodules_standard_unet": {"model.widths": (4, 4, 8, 8, 8)},
}


def definition_of(name, factor=1.0):
    """The definition of a run of a recipe."""
    fields = RECIPES[name] | {"encoder_learning_rate_factor": factor}
    config = tiny_recipe("data", name, **fields)
    return define(config, get_task(config.task), 1, make_mesh(jax.devices()[:1]))


def traced(definition):
    """Its training step as a jaxpr, and the names of the state's arrays."""
    state = jax.eval_shape(functools.partial(initial_state, definition))
    step = jax.make_jaxpr(functools.partial(train_step, definition))
    return step(state, abstract_batch(definition)).jaxpr, list(flatten(state))


def convolutions(jaxpr):
    """The convolutions of a program, of its inner programs among them."""
    inner = [jaxpr for equation in jaxpr.eqns for jaxpr in jaxprs_in_params(equation.params)]
    own = [equation for equation in jaxpr.eqns if equation.primitive.name == "conv_general_dilated"]
    return len(own) + sum(map(convolutions, inner))


@pytest.mark.parametrize("name", [name for name in RECIPES if "standard" not in name])
def test_a_frozen_encoder_leaves_a_step_as_it_came(name):
    """Its parameters and batch statistics are the same arrays, whatever the task, and neither the
    optimizer nor the gradient norms hold it."""
    definition = definition_of(name, factor=0.0)
    step, names = traced(definition)
    untouched = {
        name
        for name, before, after in zip(names, step.invars, step.outvars, strict=False)
        if before is after
    }
    parts = {name: set(name.split("/")) & set(definition.task.encoder) for name in names}
    encoder = {name for name in names if parts[name]}
    assert {name.split("/")[0] for name in encoder} == {"params", "variables"}
    assert encoder <= untouched
    assert {name for name in names if name.startswith("params") and name not in untouched} == {
        f"params/{name}" for name in definition.trained
    }


def test_no_gradient_of_a_frozen_encoder_is_computed():
    """Of each of its convolutions but the first there are three in a step, and one in a frozen
    step; its last layer is a matrix product."""
    convolutions_of = [
        convolutions(traced(definition_of("pe", factor))[0]) for factor in (1.0, 0.0)
    ]
    encoder, compression = 4, 2  # downsample, stem and one block have 3 x 3 or 4 x 4 kernels
    assert convolutions_of[0] == 3 * (encoder + compression) - 1
    assert convolutions_of[1] == encoder + 3 * compression - 1


def test_the_arithmetic_of_a_frozen_step():
    full, frozen = (definition_of("pe", factor) for factor in (1.0, 0.0))
    forward, task = full.task.flops(full.config), full.task
    assert step_flops(task, full.config) == 3 * forward
    head = forward - task.encoder_flops(full.config)
    assert step_flops(task, frozen.config) == task.encoder_flops(full.config) + 3 * head


@pytest.mark.parametrize("factor", [0.0, 1.0])
@pytest.mark.parametrize("name", ["pe", "masked_region"])
def test_runs_whose_optimizer_held_all_parameters_resume(name, factor):
    """Versions before trained the biases and held the moments of a frozen encoder: their
    checkpoints have every array of this version's state, and more."""
    definition = definition_of(name, factor)
    older = dataclasses.replace(definition, trained=frozenset(flatten(definition.params)))
    now, before = (
        {
            name: (leaf.shape, leaf.dtype)
            for name, leaf in flatten(
                jax.eval_shape(functools.partial(initial_state, each))
            ).items()
        }
        for each in (definition, older)
    )
    assert now.items() < before.items()


@pytest.mark.parametrize("name", RECIPES)
def test_biases_before_a_batch_normalisation_are_not_trained(name):
    definition = definition_of(name)
    model = nnx.eval_shape(lambda: definition.task.build(definition.config, nnx.Rngs(params=0)))
    biases = {
        "/".join(map(str, (*path, "conv", "bias")))
        for path, module in nnx.iter_graph(model)
        if isinstance(module, ConvNorm | TransposedConvNorm) and module.conv.bias is not None
    }
    assert set(flatten(definition.params)) - definition.trained == biases
    assert bool(biases) == (name != "pe_se_resnext")


def test_a_model_without_an_encoder_has_none_to_freeze():
    config = tiny_recipe("data", "nodules_standard_unet", encoder_learning_rate_factor=0.0)
    with pytest.raises(InputError, match=r"=0: the model of .* set it to 1, or train the recipe"):
        recipe.check_encoder(config)
    config.encoder_learning_rate_factor = 1.0
    recipe.check_encoder(config)
