"""Several objectives with one encoder: the sum by hand, gradients of each, exact resumption, eight
devices, evaluation, embedding and export, warm starts, wrong mixes."""

import json

import numpy as np
import pytest
from flax import nnx

from ctssl_jax.evaluation.measure import evaluate
from ctssl_jax.inference.pretrained import load
from ctssl_jax.ops.trees import flatten
from ctssl_jax.runs import reports
from ctssl_jax.runs.checkpoints import stored_shapes
from ctssl_jax.tasks.interface import step_flops
from ctssl_jax.tasks.mixed import PARTS
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training.warm_start import in_scope
from data_prep.dataset.reader import Dataset
from data_prep.system.errors import InputError
from tests.helpers.training_runs import (
    ask_to_stop_at,
    assert_same_state,
    begun_state,
    losses,
    numbers,
    saved_state,
    step_on_one_and_eight_devices,
    tiny_recipe,
    train_on,
)

TWO = (("masked_region", 1.0), ("dino", 0.5))


def learning(dataset, objectives=TWO, /, **overrides):
    short = {"num_steps": 8, "log_every": 4, "eval_every": 4, "model.depth": 0}
    short |= {"views.num_local": 0}
    config = tiny_recipe(dataset, "mixed", **(short | overrides))
    config.objectives = objectives
    return config


@pytest.fixture(scope="module")
def straight(tiny_dataset, tmp_path_factory):
    """A run without interruption."""
    workdir = tmp_path_factory.mktemp("mixed") / "run"
    assert train_on(learning(tiny_dataset), workdir)
    return workdir


def test_interrupted_run_equals_straight_run(straight, tiny_dataset, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        ask_to_stop_at(patch, 3)  # between reports
        assert not train_on(learning(tiny_dataset), workdir)
    assert train_on(learning(tiny_dataset), workdir)
    assert_same_state(workdir, straight)
    assert numbers(workdir) == numbers(straight)


def test_reports_have_the_loss_and_the_gradient_of_each(straight):
    for line in reports.read_reports(straight, "train"):
        total = line["masked_region/loss"] + 0.5 * line["dino/loss"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        for name in ("masked_region", "dino"):
            assert line[f"{name}/encoder_gradient_norm"] > 0
    assert {"masked_region/masked_mse", "dino/alignment", "used_codes"} <= set(line)
    (*_, validation) = reports.read_reports(straight, "validation")
    assert {"masked_region/masked_mse", "dino/distillation", "effective_rank"} <= set(validation)
    assert np.isfinite(losses(straight)).all()


def test_one_encoder_and_a_head_for_each(straight):
    names = stored_shapes(straight, 8)
    parts = {"/".join(name.split("/")[1:4]) for name in names if name.startswith("params/heads")}
    assert {part.split("/")[1] for part in parts} == {"masked_region", "dino"}
    assert not [name for name in names if name.startswith("params/heads") and "/encoder/" in name]
    assert [name for name in names if name.startswith("params/encoder/")]
    variables = [name for name in names if name.startswith("variables/")]
    # the steps of a schedule do not move to another run
    assert [name for name in variables if not in_scope(name, "model")] == [
        "variables/heads/dino/steps"
    ]


def test_a_step_is_the_sum_of_both_and_that_of_eight_devices(straight, tiny_dataset):
    config, images = learning(tiny_dataset), np.random.default_rng(0).integers(0, 255, (8, 3, 256))
    batch = {
        "images": images.reshape(8, 3, 16, 16, 1).astype(np.uint8),
        "record_index": np.arange(8, dtype=np.int32),
        "weight": np.ones(8, np.float32),
    }
    (one, variables), (eight, others) = step_on_one_and_eight_devices(config, batch)
    for name, value in one.items():
        if name.split("/")[-1] in ("loss", "encoder_gradient_norm", "alignment", "mse"):
            assert float(eight[name]) == pytest.approx(float(value), rel=2e-3), name
    for name, value in variables.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    # the norm of the sum of two gradients lies between the difference and the sum of theirs
    of_layers = one["layer_gradient_norms"].items()
    norm = np.sqrt(sum(value**2 for layer, value in of_layers if layer.startswith("encoder/")))
    parts = [weight * float(one[f"{name}/encoder_gradient_norm"]) for name, weight in TWO]
    assert 0.999 * abs(parts[0] - parts[1]) <= norm <= 1.001 * sum(parts)


def test_flops_are_those_of_both(tiny_dataset):
    config, task = learning(tiny_dataset), get_task("mixed")
    alone = 0
    for name, _ in TWO:
        of_one = get_task(name)
        recipe = tiny_recipe(tiny_dataset, name, model__depth=0)
        if name == "dino":
            recipe.views.num_local = 0
        alone += step_flops(of_one, recipe)
    assert step_flops(task, config) == alone


def test_evaluation_embedding_and_export(straight, tiny_dataset, tmp_path):
    result = evaluate(straight, tiny_dataset, "test", tmp_path / "r.json", batch_size=8)
    assert list(result["metrics"])[:2] == ["masked_region/loss", "masked_region/mse"]
    assert "dino/alignment" in result["metrics"] and result["num_slices"] == 24
    images = np.stack([r["image"] for r in Dataset.open(tiny_dataset).source("test")])[:6]
    model = load(straight)
    here = model.embed(images).slices
    np.testing.assert_allclose(here, model.latents(images).mean((1, 2)), atol=1e-5)
    torch = pytest.importorskip("torch")
    from ctssl_jax.release.exporting import export
    from ctssl_jax.torch_bridge import ctssl_torch

    manifest = export(straight, tmp_path / "model", ("torch",), "CC0-1.0")
    assert manifest["architecture"] == "JointEmbedding"
    given = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    np.testing.assert_allclose(ctssl_torch.load(tmp_path / "model").embed(given), here, atol=1e-5)


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ((), "config.objectives=(): must hold (name, weight) pairs, --config.objectives='((\"mask"),
        (("lejepa", 1.0), "must hold (name, weight) pairs"),
        ((("jigsaw", 1.0),), "config.objectives: 'jigsaw' is not known; choose from masked_region"),
        ((("slice_label", 1.0),), "config.objectives: 'slice_label' is not known; choose from"),
        ((("lejepa", 0.0),), "config.objectives: the weight of lejepa is 0.0; it must be a number"),
        ((("lejepa", "1"),), "config.objectives: the weight of lejepa is '1'; it must be a number"),
        ((("flip", 1.0), ("flip", 0.5)), "config.objectives names flip 2 times; give it once"),
        ((("lejepa", 1.0), ("visreg", 1.0)), "lejepa and visreg both read config.regulariser"),
        (
            (("flip", 1.0), ("visreg", 0.5)),
            "config.regulariser.weight=0.05: features of visreg end",
        ),
        ((("next_slice", 1.0), ("dino", 1.0)), "next_slice needs slices by number, dino slices by"),
    ],
)
def test_a_wrong_mix_is_one_line(objectives, message, tiny_dataset, tmp_path):
    with pytest.raises(InputError) as raised:
        train_on(learning(tiny_dataset, objectives), tmp_path / "run")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.pooled", "mean", "config.model.pooled='mean': choose one of latents"),
        ("views.global_size", 32, "config.views.global_size=32: must be a multiple of 4 and at mo"),
        ("mask.block", 5, "config.mask.block=5: blocks of 5 pixels do not tile an image of 16 x"),
        ("model.num_prototypes", 0, "config.model.num_prototypes=0: must be 1 or more"),
        ("teacher.frozen_steps", 8, "config.teacher.frozen_steps=8: prototypes would never learn"),
        ("best_by", "masked_mse", "config.best_by='masked_mse': a validation of the task mixed"),
    ],
)
def test_a_field_of_one_objective_that_cannot_work_is_one_line(
    field, value, message, tiny_dataset, tmp_path
):
    config = learning(tiny_dataset)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError) as raised:
        train_on(config, tmp_path / "run")
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_all_objectives_have_the_encoder_of_the_paper(tiny_dataset):
    """So that each can begin with the encoder of any other."""

    def encoder_of(name):
        recipe = tiny_recipe(tiny_dataset, name)
        model = nnx.eval_shape(lambda: get_task(recipe.task).build(recipe, nnx.Rngs(params=0)))
        leaves = flatten({"params": nnx.as_pure(nnx.state(model))})
        return {name: leaf.shape for name, leaf in leaves.items() if in_scope(name, "encoder")}

    plain = encoder_of("masked_region")
    assert len(plain) == 30
    for name in (*PARTS, "simmim", "mixed"):
        assert encoder_of(name) == plain, name


def test_a_run_and_its_teacher_begin_with_the_encoder_of_another(straight, tiny_dataset, tmp_path):
    config = learning(tiny_dataset, init_from=str(straight), init_scope="encoder")
    assert train_on(config, tmp_path / "run")
    moved = json.loads((tmp_path / "run" / "transplant.json").read_text())["moved"]
    assert moved and all(name.split("/")[1] == "encoder" for name in moved)
    begun, donor = begun_state(tmp_path / "run"), saved_state(straight, "best")
    for name in moved:
        np.testing.assert_array_equal(begun[name], donor[name])
        teacher = f"variables/heads/dino/teacher/{name.split('/', 1)[1]}"
        np.testing.assert_array_equal(begun[teacher], donor[name])
