"""Choices of the recipe: one changed at a time, and paired differences from kept results."""

import csv
import json

import pytest

from experiments import recipe_choices
from experiments.study.cells import Settings
from experiments.study.paired import paired_volumes


@pytest.fixture
def settings(tiny_dataset, tmp_path):
    return Settings(
        tiny_dataset, tmp_path / "study", "small", 100, 0, (), "test", 2, tmp_path / "kept"
    )


def result_of(name, gain):
    """A kept result of four patients in a fold."""
    probe = name.startswith("probe_")
    scores = recipe_choices.PROBES if probe else recipe_choices.SCORES
    values = [0.1 + 0.01 * number - gain for number in range(4)]
    return {
        "synthetic": False, "split": "test", "seed": 0, "device": "1 x cpu", "seconds": 9.0,
        "dataset_fingerprint": "d", "num_patients_seen_in_training": 0, "warnings": [],
        "config": {"image_size": 64, "num_steps": 100, "batch_size": 16},
        "metrics": {score: {"mean": 0.1, "num_volumes": 4, "num_patients": 4} for score in scores},
        "volumes": {"patient": [0, 1, 2, 3]} | dict.fromkeys(scores, values),
        **({} if probe else {"codebook": {"used_codes": 5, "num_codes": 512}}),
    }  # fmt: skip


def test_each_choice_changes_what_it_names(settings):
    cells = {cell.name: cell for cell in settings.study(recipe_choices.cells_of)}
    assert len(cells) == 2 * 2 * len(recipe_choices.CHOICES)
    configs = {
        name: cells[f"fold_0/{name}"].stages[0].recipe.config() for name in recipe_choices.CHOICES
    }
    flat = {name: dict(flat_of(config.to_dict())) for name, config in configs.items()}
    for name, (_, fields) in recipe_choices.CHOICES.items():
        changed = {field for field in flat[name] if flat[name][field] != flat["default"][field]}
        assert changed == set(fields) or name == "paper"
    assert (configs["paper"].model.vq_update, configs["paper"].learning_rate) == ("gradient", 1e-3)
    assert configs["paper"].image_size == 64


def test_overrides_are_of_the_default_and_do_not_undo_a_choice(settings):
    overrides = ("optimizer=adamw", "learning_rate=0.004", "model.vq_revive_every=0")
    cells = settings._replace(overrides=overrides).study(recipe_choices.cells_of)
    configs = {cell.name.split("/")[1]: cell.stages[0].recipe for cell in cells[::2]}
    flat = {
        name: dict(flat_of(configs[name].config().to_dict())) for name in recipe_choices.CHOICES
    }
    assert (flat["default"]["optimizer"], flat["default"]["learning_rate"]) == ("adamw", 0.004)
    for name, (_, fields) in recipe_choices.CHOICES.items():
        assert {field: flat[name][field] for field in fields} == fields, name
    assert flat["paper"]["learning_rate"] == 0.001  # its reading differs there


def flat_of(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, dict):
            yield from flat_of(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_differences_are_paired_by_patient(settings):
    for cell in settings.study(recipe_choices.cells_of):
        name = cell.name.split("/")[1]
        if name.removeprefix("probe_") in ("default", "adamw", "slice_minmax"):
            cell.kept.parent.mkdir(parents=True, exist_ok=True)
            gain = 0.02 if name == "adamw" else 0.0
            cell.kept.write_text(json.dumps(result_of(name, gain) | {"cell": cell.name}))
    text = recipe_choices.draw(settings)
    assert "2 folds of patients, each patient tested once." in text
    assert "-0.0200; -0.0200 to -0.0200" in text and "5 of 512" in text and "missing" in text
    with open(settings.workdir / "recipe_choices.csv", newline="") as file:
        rows = {(row["choice"], row["score"]): row for row in csv.DictReader(file)}
    row = rows["adamw", "masked_mse"]
    assert float(row["difference"]) == pytest.approx(-0.02) and row["num_patients"] == "8"
    assert float(row["detectable"]) == pytest.approx(0, abs=1e-9)  # the same in every patient
    assert rows["slice_minmax", "mse"]["difference"] == ""  # of other grey values


def test_pairs_that_do_not_fit_have_no_difference():
    one = {"volumes": {"patient": [0, 1], "mse": [0.1, 0.2]}}
    other = {"volumes": {"patient": [2, 0, 1], "mse": [9.0, 0.0, 0.3]}}
    assert paired_volumes(one, other, "mse")["difference"] == pytest.approx(0.0)  # +0.1, -0.1
    assert paired_volumes(one, other, "mse")["num_patients"] == 2
    strangers = {"volumes": {"patient": [0, 2], "mse": [0.1, 0.2]}}
    assert set(paired_volumes(one, strangers, "mse").values()) == {None}
    assert set(paired_volumes(one, one, "ssim").values()) == {None}
    partly = {"volumes": {"patient": [0, 1], "mse": [0.1, None]}}
    assert paired_volumes(one, partly, "mse")["difference"] is None  # one patient is left
    assert paired_volumes(one, one, "mse")["difference"] == 0
