"""Figure 6: which cells there are, and tables and figure from results alone. Results are made by
hand."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_prep.system.errors import InputError
from experiments import figure6
from experiments.study import attributes, downstream, presets
from experiments.study.downstream import Study
from experiments.study.presets import PRESETS
from tests.helpers.training_runs import PROJECT


@pytest.fixture
def study(tmp_path):
    """A phantom study of two seeds."""
    sizes = PRESETS["phantom"]._replace(seeds=(3, 4))
    return Study("phantom", sizes, tmp_path, tmp_path / "data" / "attributes", {})


def measure(mean, low=None, high=None):
    """A measure as results hold it."""
    return {
        "mean": mean,
        "sd": None,
        "ci95": None if low is None else [low, high],
        "num_volumes": 40,
        "num_patients": 30,
    }


def write(cell, metrics, **fields):
    """Leave a results JSON: of a probe, or of a training if it has a label."""
    content = {
        **({} if "label" in fields else {"kind": "attributes"}),
        "metrics": metrics,
        "synthetic": True,
        "split": "test",
        "device": "cpu",
        "num_patients_seen_in_training": 0,
        "dataset_fingerprint": "abc",
        **fields,
    }
    cell.result.parent.mkdir(exist_ok=True)
    cell.result.write_text(json.dumps(content))


def flags_of(stage):
    return dict(
        text.removeprefix("--").split("=", 1)
        for text in stage.arguments()
        if text.startswith("--") and "=" in text
    )


def by_title(models):
    return {model.title: model for model in models}


def read_rows(folder):
    with open(folder / "figure6.csv", newline="") as file:
        return {
            (row["model"], row["attribute"], row["metric"]): row for row in csv.DictReader(file)
        }


# ---- cells ---------------------------------------------------------------------------------------


def test_cells_are_run_once_a_seed_where_something_is_random(study):
    models = figure6.models_of(study, ("masked_20", "rotation"), figure6.ATTRIBUTES)
    assert [cell.name for cell in figure6.cells_of(models)] == [
        "probe_masked_20",
        "probe_rotation",
        *(f"end_to_end_{attribute}_s{seed}" for attribute in figure6.ATTRIBUTES for seed in (3, 4)),
        "probe_masked_20_untrained_s3",
        "probe_masked_20_untrained_s4",
        "probe_masked_20_pixels_s3",
        "probe_masked_20_shuffled_s3",
        "probe_masked_20_shuffled_s4",
    ]
    assert [model.group for model in models] == ["pretrained"] * 2 + ["baseline"] + ["control"] * 3


def test_probes_read_the_last_weights_of_their_arm(study, tmp_path):
    given = tmp_path / "mine"
    models = by_title(
        figure6.models_of(
            study._replace(pretrained={"mine": given}), ("rotation", "mine"), ("sex",)
        )
    )
    (cell,), (own,) = models["rotation"].cells["sex"], models["mine"].cells["sex"]
    assert flags_of(cell.stages[0]) == {
        "workdir": str(tmp_path / "runs" / "pretrain_rotation"),
        "dataset": str(study.dataset),
        "attributes": "sex",
        "checkpoint": "last",
        "seed": "3",
        "output": str(cell.result),
    }
    assert cell.after == ("data_attributes", "pretrain_rotation") and own.after == (
        "data_attributes",
    )
    assert flags_of(own.stages[0])["workdir"] == str(given)


def test_controls_differ_in_one_option_and_in_seeds(study):
    models = by_title(figure6.models_of(study, ("rotation", "flip"), ("sex",)))
    untrained = models["frozen random weights"].cells["sex"]
    assert [flags_of(cell.stages[0])["seed"] for cell in untrained] == ["3", "4"]
    assert {flags_of(cell.stages[0])["encoder"] for cell in untrained} == {"untrained"}
    (pixels,) = models["pixels, no network"].cells["sex"]
    assert flags_of(pixels.stages[0])["encoder"] == "pixels"
    shuffled = models["shuffled labels"].cells["sex"]
    assert len(shuffled) == 2 and all(
        "--shuffled_labels" in cell.stages[0].arguments() for cell in shuffled
    )
    assert all(
        flags_of(cell.stages[0])["workdir"].endswith("pretrain_rotation")
        for cell in (*shuffled, pixels)
    )


def test_the_baseline_is_trained_from_random_weights_for_each_attribute(study):
    cells = by_title(figure6.models_of(study, ("rotation",), figure6.ATTRIBUTES))[
        figure6.END_TO_END
    ].cells
    assert list(cells) == list(figure6.ATTRIBUTES)
    for attribute, of_seeds in cells.items():
        for seed, cell in zip((3, 4), of_seeds, strict=True):
            train, evaluate = (flags_of(stage) for stage in cell.stages)
            assert train["config"] == "attributes:small"
            assert (train["config.label"], train["config.num_classes"]) == (attribute, "0")
            assert (train["config.seed"], train["config.num_steps"]) == (str(seed), "100")
            assert "config.init_from" not in train and evaluate["workdir"] == train["workdir"]
            assert cell.after == ("data_attributes",)
    of_recipe = study._replace(sizes=PRESETS["paper"])
    cells = by_title(figure6.models_of(of_recipe, ("rotation",), ("sex",)))[
        figure6.END_TO_END
    ].cells["sex"]
    assert "config.num_steps" not in flags_of(cells[0].stages[0]) and cells[0].after == ()


def test_other_attributes_are_other_cells(study):
    """Else results of the default attributes would pass for complete ones of those study for."""
    usual = figure6.cells_of(figure6.models_of(study, ("rotation",), figure6.ATTRIBUTES))
    other = figure6.cells_of(figure6.models_of(study, ("rotation",), ("smoker",)))
    assert not {cell.result for cell in usual} & {cell.result for cell in other}


def figure6_command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.figure6", *arguments],
        capture_output=True,
        text=True,
        cwd=PROJECT,
    )


def test_plan_prints_commands_that_ask_for_the_same_cells(tmp_path):
    options = [f"--workdir={tmp_path}", "--arms=rotation", "--attributes=sex", "--seeds=5"]
    done = figure6_command("plan", *options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines[:16:2]] == [
        "data_pretraining",
        "data_attributes",
        "pretrain_rotation",
        "probe_rotation_sex",
        "end_to_end_sex_s5",
        "probe_rotation_untrained_s5_sex",
        "probe_rotation_pixels_s5_sex",
        "probe_rotation_shuffled_s5_sex",
    ]
    assert lines[6] == "# probe_rotation_sex [missing] after data_attributes, pretrain_rotation"
    asked_again = lines[7].removeprefix("ctssl figure6 run ").split()
    assert sorted(asked_again) == sorted(
        ["--preset=phantom", *options, "--cells=probe_rotation_sex"]
    )
    assert not any(Path(tmp_path).iterdir())


def test_bad_requests_are_one_line(study, tmp_path):
    done = figure6_command("plan", f"--workdir={tmp_path}", "--arms=random,rotation")
    assert done.returncode == 2 and done.stderr.startswith(
        "error: --arms: random is not a pretrained encoder; choose"
    )
    done = figure6_command("plan", f"--workdir={tmp_path}", "--attributes=sex,sex")
    assert (
        done.returncode == 2
        and "--attributes=sex,sex: give one name or more, each once" in done.stderr
    )
    done = figure6_command("plan", f"--workdir={tmp_path}", "--fractions=0.5")
    assert (
        done.returncode == 2 and "--fractions: Figure 6 uses all training patients" in done.stderr
    )
    with pytest.raises(InputError, match="holds no results of figure6 yet"):
        figure6.draw(study, figure6.models_of(study, ("rotation",), ("sex",)))


# ---- results -------------------------------------------------------------------------------------


def test_draw_from_results_alone_and_missing_cells_are_said(study, tmp_path):
    models = figure6.models_of(study, ("masked_20", "rotation"), ("sex", "ethnic_group"))
    of = by_title(models)
    probe = {
        "sex/auroc": measure(0.8, 0.7, 0.9),
        "sex/auroc/F": measure(0.8, 0.7, 0.9),
        "sex/auroc/M": measure(0.8, 0.7, 0.9),
        "sex/accuracy": measure(0.99),
        "ethnic_group/auroc": measure(0.6, 0.5, 0.7),
        **{
            f"ethnic_group/auroc/{name}": measure(value)
            for name, value in (("A", 0.4), ("B", 0.6), ("C", 0.8))
        },
    }
    write(of["masked region, 20 %"].cells["sex"][0], probe)
    for cell, mean, low, high in zip(
        of[figure6.END_TO_END].cells["sex"], (0.7, 0.9), (0.6, 0.8), (0.8, 0.94), strict=True
    ):
        write(cell, {"auroc": measure(mean, low, high), "sensitivity": measure(0.2)}, label="sex")
    write(of["shuffled labels"].cells["sex"][1], {"sex/auroc": measure(0.45, 0.3, 0.6)})

    text = figure6.draw(study, models)
    rows = read_rows(tmp_path)
    row = rows["masked region, 20 %", "sex", "auroc"]
    assert (row["mean"], row["ci95_low"], row["ci95_high"], row["sd_over_seeds"]) == (
        "0.8",
        "0.7",
        "0.9",
        "",
    )
    assert (row["num_seeds"], row["num_patients"], row["group"]) == ("1", "30", "pretrained")
    assert rows["masked region, 20 %", "ethnic_group", "auroc/C"]["mean"] == "0.8"
    row = rows[figure6.END_TO_END, "sex", "auroc"]  # mean .8; sd of .7 and .9 is .2 / sqrt(2)
    assert float(row["mean"]) == pytest.approx(0.8) and float(
        row["sd_over_seeds"]
    ) == pytest.approx(0.14142, abs=1e-5)
    assert float(row["ci95_low"]) == pytest.approx(0.7) and float(
        row["ci95_high"]
    ) == pytest.approx(0.87)
    assert row["of_each_seed"] == "0.7000 0.9000"
    assert rows["shuffled labels", "sex", "auroc"]["num_seeds"] == "1"
    for missing in (
        ("rotation", "sex"),
        (figure6.END_TO_END, "ethnic_group"),
        ("pixels, no network", "sex"),
    ):
        assert rows[(*missing, "auroc")]["mean"] == "" and rows[(*missing, "auroc")][
            "num_seeds"
        ] == ("0")
    assert not any("accuracy" in metric or "sensitivity" in metric for _, _, metric in rows)

    lines = text.splitlines()
    assert (
        "| masked region, 20 % | pretrained | 0.8000 (0.700 to 0.900) | 0.6000 (0.500 to 0.700) |"
        in lines
    )
    assert (
        f"| {figure6.END_TO_END} | baseline | 0.8000 ± 0.1414 (0.700 to 0.870) | missing |" in lines
    )
    assert "| rotation | pretrained | missing | missing |" in lines
    assert "### ethnic_group: each class against the rest" in lines and "### sex: each" not in text
    assert "| masked region, 20 % | pretrained | 0.4000 | 0.6000 | 0.8000 |" in lines
    assert (
        "SYNTHETIC DATA" in text
        and "4 of 11 cells are there" in text
        and "NOT HELD OUT" not in text
    )
    assert (tmp_path / "figure6.md").read_text() == text
    assert Image.open(tmp_path / "figure6.png").size[0] > 600
    picture = (tmp_path / "figure6.svg").read_text()
    # pixels, untrained, rotation; all but masked region
    assert picture.count("<!-- missing -->") == 3 + 5
    assert "<!-- random weights, trained end to end -->" in picture


def test_an_undefined_auroc_is_neither_missing_nor_a_number(study):
    (model,) = figure6.models_of(study, ("rotation",), ("sex",))[:1]
    (cell,) = model.cells["sex"]
    rows = attributes.rows_of(
        [model], {cell.name: {"kind": "attributes", "metrics": {"sex/auroc": measure(None)}}}
    )
    assert (
        rows[0]["mean"] is None
        and rows[0]["num_seeds"] == 1
        and attributes.cell_text(rows[0]) == ("undefined")
    )


def test_a_training_on_another_label_is_not_taken_for_this_attribute():
    result = {"label": "age", "metrics": {"auroc": measure(0.9)}}
    assert attributes.aurocs(result, "sex") == {}
    assert attributes.aurocs(result, "age") == {"auroc": measure(0.9)}
    probe = {
        "kind": "attributes",
        "metrics": {"age/auroc": measure(0.9), "age_group/auroc": measure(0.1)},
    }
    assert attributes.aurocs(probe, "age") == {"auroc": measure(0.9)}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_patients_seen_in_training": 4}, "NOT HELD OUT: up to 4 of these patients"),
        ({"num_patients_seen_in_training": None}, "CANNOT BE CHECKED"),
        ({"dataset_fingerprint": "other"}, "DIFFERENT datasets"),
    ],
)
def test_what_spoils_the_comparison_is_said(study, fields, said):
    models = figure6.models_of(study, ("rotation", "flip"), ("sex",))
    for model, more in zip(models[:2], ({}, fields), strict=True):
        write(model.cells["sex"][0], {"sex/auroc": measure(0.8, 0.7, 0.9)}, **more)
    assert said in figure6.draw(study, models)


def test_the_presets_have_what_the_study_needs(study):
    names = [cell.name for cell in downstream.data_cells(study, ("pretraining", "attributes"))]
    assert names == ["data_pretraining", "data_attributes"]
    assert all(arm in presets.PRETEXTS for arm in figure6.ARMS)
