"""Objectives at equal compute: the number of steps, cells, tables and figures of kept results."""

import csv
import json

import jax
import numpy as np
import pytest
from PIL import Image

from ctssl_jax.parallel.mesh import make_mesh
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training import estimate
from ctssl_jax.training.step import make_program, trace_step
from experiments import benchmark_objectives, objectives
from experiments.study import kept, results
from experiments.study import objectives_figure as figure
from experiments.study.cells import Recipe, Settings
from experiments.study.paired import interval_by_patient, paired_arms
from tests.helpers.training_runs import TINY


@pytest.fixture
def settings(tmp_path):
    overrides = ("batch_size=16",)
    return Settings(
        tmp_path / "data",
        tmp_path / "study",
        "small",
        100,
        0,
        overrides,
        "test",
        2,
        tmp_path / "kept",
    )


def result_of(cell, gain, seed=0):
    """A kept result of four patients."""
    values = [0.5 + 0.01 * number + gain for number in range(4)]
    name = cell.name.split("/")[1].rpartition("_")[0]
    content = {
        "cell": cell.name, "synthetic": False, "split": "test", "seed": seed, "device": "1 x cpu",
        "seconds": 9.0, "dataset_fingerprint": "d", "num_patients_seen_in_training": 0,
        "warnings": [], "config": {},
        "metrics": {score: {"mean": 0.5, "num_volumes": 4, "num_patients": 4, "ci95": None}
                    for score in figure.SCORES},
        "volumes": {"patient": [0, 1, 2, 3]} | dict.fromkeys(figure.SCORES, values),
    }  # fmt: skip
    if name not in figure.CONTROLS:
        content["fields"] = {"num_steps": 100}
        content["training"] = {
            "step_flops": 10**10,
            "train": {"step": [1, 2], "loss": [2.0, 1.0], "slices_per_second": [9.0, 11.0]},
            "validation": {"step": [2], "effective_rank": [7.0], "neighbour_recall": [None]},
        }
    return content


def keep_results(settings, gains):
    """Of the first seed of these objectives, in all folds."""
    for cell in settings.study(objectives.all_cells):
        name, _, seed = cell.name.split("/")[1].rpartition("_")
        if name in gains and seed == "0":
            cell.kept.parent.mkdir(parents=True, exist_ok=True)
            cell.kept.write_text(json.dumps(result_of(cell, gains[name])))


def test_all_objectives_have_the_compute_of_masked_region(settings):
    fold = settings.fold(0)
    budget = 100 * objectives.step_flops(fold, "mask_20")
    for name in figure.OBJECTIVES:
        fields = objectives.fields_of(fold, name, 1)
        of_step = objectives.step_flops(fold, name)
        assert abs(fields["num_steps"] * of_step - budget) <= of_step / 2
        assert fields["seed"] == 1 and fields["batch_size"] == "16"
    assert sum(objective.papers for objective in figure.OBJECTIVES.values()) == 8
    short = objectives.fields_of(fold._replace(num_steps=30), "dino", 0)
    assert short["num_steps"] < 30 and short["teacher.frozen_steps"] == short["num_steps"] // 10


def test_cells_are_a_training_and_its_probe(settings):
    cells = {cell.name: cell for cell in settings.study(objectives.all_cells)}
    assert len(cells) == 2 * (3 * (len(figure.OBJECTIVES) + len(figure.ABLATIONS) + 1) + 2)
    train, probe = cells["fold_1/dino_2"].stages
    config = train.recipe.config()
    assert (config.task, config.seed, config.batch_size) == ("dino", 2, 16)
    assert config.dataset.endswith("fold_1")
    assert probe.options["workdir"] == train.options["workdir"]
    assert probe.options["checkpoint"] == "last"  # equal compute
    assert cells["fold_0/untrained_1"].after == ("fold_0/rotation_1",)
    assert "fold_0/pixels_1" not in cells and "fold_0/handcrafted_0" in cells


@pytest.mark.parametrize("name", figure.ABLATIONS)
def test_an_ablation_changes_one_choice_at_the_same_compute(name, settings):
    fold, ablation = settings.fold(0), figure.ABLATIONS[name]
    ours, base = (
        Recipe(ablation.recipe, "small", objectives.fields_of(fold, one, 0)).config().to_dict()
        for one in (name, ablation.base)
    )
    budget = 100 * objectives.step_flops(fold, "mask_20")
    of_step = objectives.step_flops(fold, name)
    assert abs(ours["num_steps"] * of_step - budget) <= of_step / 2
    changed = set()
    for field in ablation.fields:
        group, _, rest = field.partition(".")
        before, after = (one[group][rest] if rest else one[group] for one in (base, ours))
        if before != after:
            changed.add(field)
        if rest:
            base[group][rest] = after
        else:
            base[group] = after
    assert changed  # nothing is as in the recipe, and nothing else differs but the schedule
    schedule = ("num_steps", "warmup_steps", "eval_every", "log_every")
    assert {k: v for k, v in ours.items() if k not in schedule} == {
        k: v for k, v in base.items() if k not in schedule
    }


def test_ablations_are_told_from_their_recipe(settings):
    gains = {"lejepa": 0.1, "lejepa_map": 0.3, "rotation": 0.0, "simmim_area_20": 0.2}
    keep_results(settings, gains)
    text = objectives.draw(settings)
    with open(settings.workdir / "comparisons.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    own = [row for row in rows if row["objective"] in figure.ABLATIONS]
    # nothing to tell SimMIM's from; and an ablation is never the paper's best
    assert {(row["objective"], row["reference"]) for row in own} == {("lejepa_map", "lejepa")}
    assert all(float(row["difference"]) == pytest.approx(0.2) for row in own)
    assert "## Minus LeJEPA" in text and "LeJEPA, map pooled" in text
    best = {row["other"] for row in rows if row["reference"] == "best of the paper's"}
    assert best == {"rotation"}


@pytest.mark.parametrize("name", ["lejepa", "dino"])
def test_counted_operations_are_those_of_the_program(name):
    """XLA leaves out products with the zeros of padding and the gradient of the images, and counts
    views, losses and optimizer: all together is less than a tenth, and equal for all objectives."""
    objective = figure.OBJECTIVES[name]
    fields = objective.fields | {"batch_size": 16, "model.depth": 2}
    config = Recipe(objective.recipe, "small", fields).config()
    program = make_program(config, get_task(config.task), 1, make_mesh(jax.devices()[:1], 1))
    of_program = trace_step(program).lower().cost_analysis()["flops"]
    assert 1.0 < kept.step_flops(config) / of_program < 1.1


def test_costs_of_a_step_are_measured(tiny_dataset, monkeypatch):
    monkeypatch.setattr(estimate, "SECONDS", 0.0)  # as few steps as it takes
    fields = {"dataset": str(tiny_dataset)} | TINY
    row = benchmark_objectives.costs("mask_20", "small", fields)
    assert row["batch_size"] == TINY["batch_size"] and row["memory_bytes"] > 0
    assert row["step_flops"] == row["flops_a_slice"] * row["batch_size"] > 0
    assert row["slices_per_second"] > 0 and 0 <= row["waiting_for_data"] <= 1
    assert f"| masked region, 20 % | {row['batch_size']} |" in benchmark_objectives.table([row])


def test_tables_and_figures_follow_from_kept_results(settings):
    gains = {"lejepa": 0.2, "vicreg": 0.0, "rotation": 0.1, "flip": 0.0, "untrained": 0.0}
    keep_results(settings, gains)
    text = objectives.draw(settings)
    assert "2 folds of patients" in text and "8 patients" in text and "1.00 TFLOP" in text
    assert "**+0.100 (+0.100 to +0.100)**" not in text  # p of 8 patients, corrected for 14 rows
    assert "+0.100 (+0.100 to +0.100)" in text and "-0.100 (-0.100 to -0.100)" in text
    assert "| LeJEPA | 0 | 10.00 | 100 | 1.000 | 10.0 | 2 | 1 | 7 | 7 |" in text
    assert "NOT ALL FOLDS" not in text and "missing" in text
    with open(settings.workdir / "comparisons.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    best = {row["other"] for row in rows if row["reference"] == "best of the paper's"}
    assert best == {"rotation"}
    assert {row["objective"] for row in rows if row["reference"] == "untrained"} == {
        "lejepa", "vicreg", "rotation", "flip",
    }  # fmt: skip
    for name in ("objectives.png", "curves.png"):
        assert min(Image.open(settings.workdir / name).size) > 300


def test_a_seed_counts_once_all_its_folds_are_there(settings):
    keep_results(settings, {"vicreg": 0.2, "untrained": 0.0})
    before = objectives.draw(settings)
    for cell in settings.study(objectives.all_cells):
        if cell.name in ("fold_0/vicreg_1", "fold_0/untrained_1"):
            cell.kept.write_text(json.dumps(result_of(cell, 0.9)))
    assert objectives.draw(settings) == before  # not of four patients from here on
    names = [cell.name for cell in settings.study(objectives.all_cells)]
    assert names[:2] == ["fold_0/rotation_0", "fold_1/rotation_0"]


def test_what_is_known_of_patients_seen_is_said_beside_what_is_not():
    unknown, none, four = ({"num_patients_seen_in_training": n} for n in (None, 0, 4))
    assert results.held_out_warning([none]) == ""
    assert "CANNOT BE CHECKED" in results.held_out_warning([unknown, none])
    words = results.held_out_warning([unknown, four])
    assert "CANNOT BE CHECKED" in words and "up to 4" in words
    of_folds = [{"cell": f"fold_{k}/a", "volumes": {"patient": [0]}, "seconds": 1} for k in (0, 1)]
    for number, fold in zip((None, 4), of_folds, strict=True):
        fold["num_patients_seen_in_training"] = number
    assert kept.pooled(of_folds)["num_patients_seen_in_training"] == 4


def test_the_interval_of_a_mean_over_seeds_is_not_the_mean_of_their_intervals():
    values = [0.1, 0.9, 0.3, 0.7]
    seeds = [{"volumes": {"patient": [3, 1, 2, 0], "s": values}}]
    seeds += [{"volumes": {"patient": [3, 1, 2, 0], "s": [1 - value for value in values]}}]
    low, high = interval_by_patient(seeds[:1], "s")
    assert low < 0.35 < 0.65 < high
    assert interval_by_patient(seeds, "s") == pytest.approx([0.5, 0.5])
    assert interval_by_patient([{"volumes": {"patient": [0, 0], "s": [0.1, 0.2]}}], "s") is None
    assert interval_by_patient([], "s") is interval_by_patient(seeds, "other") is None


def test_several_seeds_are_in_the_interval():
    patients = list(range(6))
    ours = [
        {"seed": seed, "volumes": {"patient": patients, "s": [0.7 + seed / 10] * 6}}
        for seed in (0, 1, 2)
    ]
    other = [{"seed": 0, "volumes": {"patient": patients, "s": [0.5] * 6}}]
    other[0]["encoder"] = "pixels"
    found = paired_arms(ours, other, "s")
    assert found["difference"] == pytest.approx(0.3) and found["num_seeds"] == 3
    assert found["low"] == pytest.approx(0.3)  # no patient differs, but seeds do
    assert found["low_with_seeds"] < 0.1 < 0.3 < found["high_with_seeds"]
    assert paired_arms(ours[:1], other, "s")["low_with_seeds"] is None
    two = paired_arms(ours, [ours[2], ours[0]], "s")  # those of one seed are compared
    assert two["difference"] == two["sd_over_seeds"] == 0 and two["num_seeds"] == 2
    assert paired_arms(ours[:2], ours[2:], "s")["difference"] is None
    untrained = [ours[1] | {"encoder": "untrained"}]  # which is random, too
    assert paired_arms(ours, untrained, "s")["num_seeds"] == 1
    row = dict.fromkeys(("low_with_seeds", "high_with_seeds")) | {"low": 0.1, "high": 0.2}
    assert figure.is_sure(row | {"p_holm": 0.01}) and not figure.is_sure(row | {"p_holm": None})
    assert not figure.is_sure(row | {"p_holm": 0.01, "low_with_seeds": -1, "high_with_seeds": 1})
    assert np.isfinite(found["p"])
