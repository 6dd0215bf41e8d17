"""Effective rank, gradient norms of layers, and warnings of a collapse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctssl_jax.data.batches import training_batches
from ctssl_jax.data.slices import open_source
from ctssl_jax.evaluation.measure import evaluate, table
from ctssl_jax.ops.embeddings import effective_rank, moments
from ctssl_jax.parallel.mesh import make_mesh
from ctssl_jax.runs import reports
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training import health
from ctssl_jax.training.state import layer_norms, layer_of
from ctssl_jax.training.step import make_program, run_step, take_report
from data_prep.dataset.reader import Dataset
from tests.helpers.training_runs import EMA, losses, tiny_config, tiny_recipe, train_on


def rank_of(embeddings, batch=7):
    """Effective rank by sums over batches, the last one padded."""
    total = None
    for start in range(0, len(embeddings), batch):
        part = embeddings[start : start + batch]
        weight = np.pad(np.ones(len(part), np.float32), (0, batch - len(part)))
        part = np.pad(part, ((0, batch - len(part)), (0, 0)), constant_values=9)
        sums = jax.device_get(moments(jnp.asarray(part), jnp.asarray(weight)))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    return effective_rank(total)


def test_effective_rank_by_hand():
    random = np.random.default_rng(0)
    embeddings = random.normal(size=(50, 6)).astype(np.float32) * [3, 2, 1, 1, 0.5, 0.1] + 2
    singular = np.linalg.svd(embeddings - embeddings.mean(0), compute_uv=False)
    share = singular / singular.sum()
    assert rank_of(embeddings.astype(np.float32)) == pytest.approx(
        np.exp(-np.sum(share * np.log(share))), rel=1e-3
    )


def test_effective_rank_of_what_has_collapsed():
    random = np.random.default_rng(1)
    line = random.normal(size=(40, 1)) * np.ones((1, 8)) + 5
    assert rank_of(line.astype(np.float32)) == pytest.approx(1, abs=1e-3)
    assert rank_of(np.full((40, 8), 0.3, np.float32)) == 0
    assert rank_of(np.full((1, 8), 0.3, np.float32)) == 0
    spread = np.concatenate([np.eye(8), -np.eye(8)]).astype(np.float32)
    assert rank_of(spread) == pytest.approx(8, rel=1e-4)


def test_layers_of_parameters():
    names = {
        "encoder/blocks/0/conv3/kernel": "encoder/blocks/0",
        "encoder/stem/norm/scale": "encoder/stem",
        "quantizer/codebook": "quantizer",
        "classification/bias": "classification",
        "compression/1/conv/bias": "compression/1",
    }
    assert {name: layer_of(name) for name in names} == names
    norms = layer_norms({"a": {"b": {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full(9, 1.0)}}})
    assert {layer: float(norm) for layer, norm in norms.items()} == {"a": pytest.approx(5)}


HEALTHY = {
    "effective_rank": 12.0,
    "embedding_dim": 64,
    "used_codes": 300,
    "dead_codes": 212,
    "perplexity": 120.0,
}


@pytest.mark.parametrize(
    ("change", "norms", "found"),
    [
        ({}, {"encoder/stem": 1e-3, "decoder/stem": 1.0}, []),
        (
            {"effective_rank": 1.4},
            None,
            ["the encoder has collapsed: the embeddings of all slices spread over 1.4 of 64"],
        ),
        (
            {"used_codes": 3, "dead_codes": 509, "perplexity": 2.5},
            None,
            ["the codebook has collapsed: 3 of 512 codes"],
        ),
        (
            {"perplexity": 1.2},
            None,
            ["the codebook has collapsed: 300 of 512 codes are in use (perplexity 1.2); in a"],
        ),
        (
            {},
            {"encoder/stem": 0.0, "decoder/stem": 1.0},
            ["no gradient reaches encoder/stem: these layers do not learn"],
        ),
        (
            {"effective_rank": 0.0, "perplexity": 1.0},
            {"a": 0.0, "b": 2.0},
            ["the encoder", "the codebook", "no gradient"],
        ),
    ],
)
def test_warnings(change, norms, found):
    said = health.warnings(tiny_config("data"), HEALTHY | change, norms)
    assert len(said) == len(found)
    for line, start in zip(said, found, strict=True):
        assert line.startswith(start) and "\n" not in line


@pytest.mark.parametrize(
    ("task", "name"), [("dino", "prototypes"), ("mixed", "heads/x/prototypes")]
)
def test_frozen_prototypes_are_no_fault(task, name):
    config = tiny_recipe("data", task, **{"teacher.frozen_steps": 5})
    norms = {layer_of(name): 0.0, "encoder/stem": 1.0}
    for step, number in ((4, 0), (5, 0), (6, 1)):  # the sixth step is the first with a gradient
        learning = health.norms_of_learning(config, step, norms)
        assert len(health.warnings(config, HEALTHY, learning)) == number


def test_a_classifier_has_no_codebook_to_collapse():
    config = tiny_recipe("data", "rotation")
    assert health.warnings(config, {"effective_rank": 5.0, "embedding_dim": 64}) == []


@pytest.mark.parametrize(
    ("change", "on", "remedy"),
    [
        ({}, {}, "vq_update=ema --config.model.vq_init=data --config.model.vq_revive_every=50"),
        ({}, {"model.vq_update": "ema"}, "run --config.model.vq_init=data --config.model.vq_rev"),
        ({}, {**EMA, "model.vq_init": "uniform"}, "run --config.model.vq_init=data keeps"),
        ({}, {**EMA, "model.vq_revive_every": 0}, "run --config.model.vq_revive_every=50 keeps"),
        ({}, EMA, "is on already: in a new run try a smaller config.model.num_codes"),
        ({"effective_rank": 1.0}, {}, "; try a lower config.learning_rate"),
        (
            {"effective_rank": 1.0},
            {"encoder_learning_rate_factor": 0.0},
            "; it is frozen: in a new run give it other weights by config.init_from",
        ),
    ],
)
def test_a_warning_names_only_settings_that_are_not_on(change, on, remedy):
    use = HEALTHY | (change or {"perplexity": 1.2})
    (line,) = health.warnings(tiny_config("data", **on), use)
    assert remedy in line


def test_gradient_norms_of_layers_are_means_over_steps(tiny_dataset):
    """Of two steps in two parts each: the mean of both steps' norms, which squared and summed give
    the whole norm."""
    config = tiny_config(tiny_dataset, microbatches=2)
    program = make_program(config, get_task(config.task), 1, make_mesh(jax.devices()[:1]))
    source = open_source(Dataset.open(tiny_dataset), "train", (0,), (0,))

    def reports_of(*steps):
        state, taken = program.initial_state(), []
        batches = training_batches(source, config.batch_size, config.seed, microbatches=2)
        for number in steps:
            for _ in range(number):
                state = run_step(program, state, [next(batches), next(batches)])
            state, report = take_report(program, state)
            taken.append(report)
        return taken

    first, second = reports_of(1, 1)
    (both,) = reports_of(2)
    assert set(first.layer_gradient_norms) >= {
        "encoder/downsample/0",
        "encoder/blocks/0",
        "quantizer",
        "decoder/stem",
    }
    whole = np.sqrt(sum(norm**2 for norm in first.layer_gradient_norms.values()))
    assert first.means["gradient_norm"] == pytest.approx(whole, rel=1e-5)
    for layer, norm in both.layer_gradient_norms.items():
        expected = (first.layer_gradient_norms[layer] + second.layer_gradient_norms[layer]) / 2
        assert norm == pytest.approx(expected, rel=1e-5) and norm > 0, layer


def test_a_collapsed_codebook_is_said_and_written(tiny_dataset, tmp_path, capsys):
    """2,048 codes, and no more than 384 latents to use them."""
    config = tiny_config(
        tiny_dataset, **{"model.num_codes": 2048}, num_steps=6, log_every=3, eval_every=6
    )
    assert train_on(config, tmp_path / "run")
    printed = capsys.readouterr().out
    assert (
        "WARNING      step 6: the codebook has collapsed: " in printed
        and "WARNING      step 0" not in printed
    )
    result = evaluate(tmp_path / "run", None, "test", tmp_path / "r.json")
    assert result["warnings"][0].startswith(
        "the codebook has collapsed"
    ) and "WARNING: the codebook" in table(result)
    assert result["codebook"]["used_codes"] + result["codebook"]["dead_codes"] == 2048
    assert 0 < result["embedding"]["effective_rank"] <= result["embedding"]["embedding_dim"] == 4
    norms = reports.read_reports(tmp_path / "run", "gradient_norm")
    assert [line["step"] for line in norms] == [3, 6] and norms[0]["encoder/stem"] > 0
    (line,) = [
        line for line in reports.read_reports(tmp_path / "run", "validation") if line["step"] == 6
    ]
    assert {"effective_rank", "used_codes", "dead_codes", "perplexity"} <= set(line)
    assert np.isfinite(losses(tmp_path / "run")).all()
