"""Every pretraining task: targets, loss and scores by hand, learning, exact resumption, evaluation,
wrong recipes."""

import csv
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import masked_region
from ctssl_jax.data import slices
from ctssl_jax.evaluation.measure import evaluate, table
from ctssl_jax.ops import corruptions
from ctssl_jax.ops.images import ssim
from ctssl_jax.tasks.table import TASKS, get_task
from ctssl_jax.training.recipe import check_config
from ctssl_jax.training.state import evaluation_keys
from data_prep.dataset.reader import Dataset
from data_prep.system.errors import InputError
from tests.helpers.training_runs import (
    PROJECT,
    ask_to_stop_at,
    assert_same_state,
    losses,
    numbers,
    saved_state,
    tiny_recipe,
    train_on,
)

RECIPES = sorted(path.stem for path in (PROJECT / "configs").glob("[a-z]*.py"))
NEW = ("next_slice", "denoising", "rotation", "flip")


def apply_untrained(config, images, keys, train=False):
    """The untrained model, its output for a batch, and the task's output."""
    task = get_task(config.task)
    model = task.build(config, nnx.Rngs(params=0))
    batch = {"images": images, "weight": jnp.ones(len(images))}
    apply = nnx.jit(lambda model: task.apply(model, batch, keys, None, config, train=train))
    return model, apply(model)


@pytest.fixture(scope="module")
def batch():
    """Four items of two slices, [4, 2, 16, 16, 1] uint8, and their keys."""
    images = np.random.default_rng(0).integers(0, 256, (4, 2, 16, 16, 1), np.uint8)
    return images, evaluation_keys(jnp.arange(4))


@pytest.mark.parametrize(
    ("task", "rescale"), [("next_slice", False), ("denoising", False), ("denoising", True)]
)
def test_reconstruction_target_and_loss_by_hand(task, rescale, batch):
    images, keys = batch
    config = tiny_recipe("", task, ssim_rescale=rescale)
    model, output = apply_untrained(config, images, keys)
    unit = images.astype(np.float32) / 255
    inputs, target = unit[:, 0], unit[:, 1 if task == "next_slice" else 0]
    if task == "denoising":
        inputs = corruptions.salt_and_pepper(keys, inputs, fraction=0.5)
        assert np.mean(inputs != target) == pytest.approx(0.5, abs=0.06)
    np.testing.assert_allclose(output.pictures["input"], inputs, atol=1e-6)
    np.testing.assert_allclose(output.pictures["target"], target, atol=1e-6)
    predicted = model(jnp.asarray(inputs), train=False)
    mse = np.square(np.asarray(predicted.reconstruction) - target).mean((1, 2, 3))
    score = ssim(jnp.clip(predicted.reconstruction, 0, 1), target)
    np.testing.assert_allclose(output.scores["ssim"], score, atol=1e-5)  # whatever the loss uses
    if rescale:
        low, high = (
            f(predicted.reconstruction, (1, 2, 3), keepdims=True) for f in (jnp.min, jnp.max)
        )
        score = ssim((predicted.reconstruction - low) / (high - low), target)
    vq = predicted.codebook_loss + 0.25 * predicted.commitment_loss
    np.testing.assert_allclose(output.scores["mse"], mse, rtol=1e-4)
    np.testing.assert_allclose(output.loss, 0.2 * mse + 0.8 * vq - 0.1 * score, rtol=1e-4)
    assert set(output.scores) == {"mse", "ssim", "vq_loss"} and output.classes is None
    np.testing.assert_allclose(output.embedding, np.mean(predicted.latents, axis=(1, 2)), atol=1e-6)
    assert output.code_counts.sum() == 4 * 4 * 4


@pytest.mark.parametrize(("task", "num_classes"), [("rotation", 4), ("flip", 3)])
def test_classification_labels_and_loss_by_hand(task, num_classes, batch):
    images, keys = batch
    model, output = apply_untrained(tiny_recipe("", task), images[:, :1], keys)
    labels = np.asarray(output.classes["label"])
    transform = (
        np.rot90
        if task == "rotation"
        else (lambda image, k: [image, image[:, ::-1], image[::-1]][k])
    )
    inputs = np.stack(
        [
            transform(image, int(k))
            for image, k in zip(images[:, 0] / np.float32(255), labels, strict=True)
        ]
    )
    np.testing.assert_allclose(output.pictures["input"], inputs, atol=1e-6)
    predicted = model(jnp.asarray(inputs), train=False)
    logits = np.asarray(predicted.logits)
    np.testing.assert_allclose(output.embedding, np.mean(predicted.latents, axis=(1, 2)), atol=1e-6)
    assert logits.shape == (4, num_classes)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(output.classes["probabilities"], probabilities, rtol=1e-4)
    np.testing.assert_allclose(output.loss, -np.log(probabilities[np.arange(4), labels]), rtol=1e-4)
    right = probabilities.argmax(1) == labels
    np.testing.assert_array_equal(output.scores["accuracy"], right)
    equal = np.isclose(output.pictures["prediction"], output.pictures["target"]).all((1, 2, 3))
    np.testing.assert_array_equal(equal, right)  # the picture is right where the class is
    assert output.code_counts is None


def test_masked_blocks_with_l1_by_hand(batch):
    images, keys = batch
    config = tiny_recipe("", "simmim", mask__block=4)
    model, output = apply_untrained(config, images, keys)
    target = images[:, 0].astype(np.float32) / 255
    inputs, region = corruptions.mask_blocks(keys, jnp.asarray(target), fraction=0.6, side=4)
    np.testing.assert_allclose(output.pictures["input"], inputs, atol=1e-6)
    predicted = model(jnp.asarray(inputs), train=False)
    error = np.abs(np.asarray(predicted.reconstruction) - target) * region
    vq = predicted.codebook_loss + 0.25 * predicted.commitment_loss
    expected = error.sum((1, 2, 3)) / (10 * 16) + 0.8 * vq  # 10 of 16 blocks of 16 pixels
    np.testing.assert_allclose(output.loss, expected, rtol=1e-4)


def test_labels_are_fixed_in_evaluation_and_new_every_step(batch):
    records = jnp.arange(64)
    key = jax.random.key(3)
    drawn = [
        corruptions.random_labels(corruptions.example_keys(key, records, step), 4)
        for step in (0, 1, 0)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert np.mean(drawn[0] != drawn[1]) > 0.5


def test_next_slice_pairs_never_cross_a_gap_or_a_volume(tiny_dataset):
    records = Dataset.open(tiny_dataset).source("train")
    for gap, pairs_a_volume in ((1, 10), (2, 8)):  # 12 slices, a gap after slice 5
        config = tiny_recipe(tiny_dataset, "next_slice", slice_gap=gap)
        source = slices.open_source(
            Dataset.open(tiny_dataset), "train", (0,), get_task("next_slice").offsets(config)
        )
        assert len(source) == 5 * pairs_a_volume
        for index in range(len(source)):
            item = source[index]
            first, second = (records[int(item["record_index"]) + offset] for offset in (0, gap))
            np.testing.assert_array_equal(
                item["images"], np.stack([first["image"], second["image"]])
            )
            assert first["volume_id"] == second["volume_id"]
            assert second["position_mm"] - first["position_mm"] == pytest.approx(2.5 * gap)


@pytest.fixture(scope="module")
def straight(tiny_dataset, tmp_path_factory):
    """Runs without interruption, one a task."""
    finished = {}

    def run(task):
        if task not in finished:
            finished[task] = tmp_path_factory.mktemp(task) / "run"
            assert train_on(learning(tiny_dataset, task), finished[task])
        return finished[task]

    return run


def learning(dataset_dir, task):
    return tiny_recipe(
        dataset_dir,
        task,
        num_steps=40,
        log_every=10,
        eval_every=20,
        learning_rate=0.01,
        optimizer="adamw",
    )


@pytest.mark.parametrize("task", NEW)
def test_loss_decreases(task, straight):
    reported = losses(straight(task))
    assert len(reported) == 4 and reported[-1] < 0.97 * reported[0]


@pytest.mark.parametrize("task", NEW)
def test_interrupted_run_equals_straight_run(task, straight, tiny_dataset, tmp_path, monkeypatch):
    config, workdir = learning(tiny_dataset, task), tmp_path / "run"
    with monkeypatch.context() as patch:
        ask_to_stop_at(patch, 13)  # between reports, in the second epoch
        assert not train_on(config, workdir)
    assert train_on(config, workdir)
    assert_same_state(workdir, straight(task))
    assert numbers(workdir) == numbers(straight(task))


def test_runs_report_what_their_model_has(straight, tiny_dataset):
    names = {
        task: {
            name.split("/")[1] for name in saved_state(straight(task)) if name.startswith("params/")
        }
        for task in ("denoising", "rotation")
    }
    assert names == {
        "denoising": {"encoder", "quantizer", "decoder"},
        "rotation": {"encoder", "compression", "classification"},
    }
    assert (
        "used_codes" in numbers(straight("denoising"))[0]
        and "used_codes" not in numbers(straight("rotation"))[0]
    )
    assert list((straight("rotation") / "pictures").iterdir())


@pytest.mark.parametrize("task", NEW)
def test_evaluation_reports_the_row_of_the_paper(task, straight, tiny_dataset, tmp_path):
    result = evaluate(
        straight(task), tiny_dataset, "test", tmp_path / "r.json", baselines=True, batch_size=7
    )
    reconstructs = task in ("next_slice", "denoising")
    names = (
        ["mse", "ssim"]
        if reconstructs
        else ["cross_entropy", "double_softmax_cross_entropy", "accuracy", "auroc"]
    )
    assert list(result["metrics"]) == names
    assert result["num_slices"] == (20 if task == "next_slice" else 24)
    with open(tmp_path / "r.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["volume_id", "patient_id", "num_slices", *names]
    for name in names:
        assert np.mean([float(row[name]) for row in rows]) == pytest.approx(
            result["metrics"][name]["mean"], rel=1e-4
        )
    assert json.loads((tmp_path / "r.json").read_text()) == result
    assert names[0] in table(result)
    if reconstructs:
        assert "codebook" in result and set(result["baselines"]) == {"mean_image", "copy_input"}
    else:
        classes = 4 if task == "rotation" else 3
        confusion = np.array(result["confusion"])
        assert (
            confusion.shape == (classes, classes)
            and confusion.sum() == 24
            and "codebook" not in result
        )
        assert np.trace(confusion) / 24 == pytest.approx(result["metrics"]["accuracy"]["mean"])
        chance = result["baselines"]["equal_probabilities"]
        assert chance["cross_entropy"]["mean"] == pytest.approx(np.log(classes), abs=1e-5)
        assert chance["double_softmax_cross_entropy"]["mean"] == pytest.approx(
            np.log(classes), abs=1e-5
        )


def test_copying_the_current_slice_is_a_baseline_of_next_slice(straight, tiny_dataset, tmp_path):
    result = evaluate(
        straight("next_slice"), tiny_dataset, "test", tmp_path / "r.json", baselines=True
    )
    images = (
        np.stack([record["image"] for record in Dataset.open(tiny_dataset).source("test")]) / 255
    )
    expected = [
        np.square(images[i] - images[i + 1]).mean() for i in range(23) if i not in (5, 11, 17)
    ]
    assert result["baselines"]["copy_input"]["mse"]["mean"] == pytest.approx(
        np.mean(expected), rel=1e-4
    )


@pytest.mark.parametrize("size", ["reference", "small"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_pass_the_checks_and_hold_no_field_of_another_task(recipe, size):
    config = importlib.import_module(f"configs.{recipe}").get_config(size)
    config.dataset = "somewhere"
    check_config(config, num_devices=8)
    task = config.task
    assert config.recipe == recipe + {"reference": "", "small": "_small"}[size]
    assert ("masked_mse" in config.get("loss", ())) == (task in ("masked_region", "mixed"))
    common = {
        name for name in masked_region.get_config() if name not in TASKS["masked_region"].fields
    }
    assert set(config) == common | set(TASKS[task].fields)


@pytest.mark.parametrize(
    ("task", "field", "value", "message"),
    [
        ("next_slice", "slice_gap", 0, "config.slice_gap=0: must be 1 or more"),
        ("next_slice", "slice_gap", 20, r"no slices with neighbours at offsets (0, 20)"),
        ("next_slice", "commitment", -1.0, "config.commitment=-1.0: must be 0 or more"),
        ("denoising", "noise.fraction", 1.5, "config.noise.fraction=1.5: must be above 0 and at "
                                             "most 1"),
        ("rotation", "model.compression", (0,), "config.model.compression=(0,): must be 1 or more"),
        ("flip", "model.depth", -1, "config.model.depth=-1: must be 0 or more"),
        (
            "rotation", "task", "denoising",
            "config.task='denoising' does not fit this recipe (config.noise is missing, "
            "config.loss is missing, config.commitment is missing, config.ssim_rescale is "
            "missing); start from --config=denoising",
        ),
        ("simmim", "mask.block", 5, "config.mask.block=5: blocks of 5 pixels do not tile an image"),
        ("simmim", "mask.margin", 2, "config.mask.block=32: blocks of a grid have no margin"),
        (
            "masked_region", "task", "flip",
            "does not fit this recipe (config.mask has no meaning, config.loss has no meaning, "
            "config.commitment has no meaning, config.ssim_rescale has no meaning); start from "
            "--config=flip",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line(task, field, value, message, tiny_dataset, tmp_path):
    config = tiny_recipe(tiny_dataset, task)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError) as raised:
        train_on(config, tmp_path / "run")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()
