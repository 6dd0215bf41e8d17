"""Chain and Table II: plans, order, resumption, and drawing from results JSON alone. Trainings are
stood in for."""

import csv
import itertools
import json
import signal
import sys
import time
import types
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import pytest
from absl import flags
from matplotlib.figure import Figure
from PIL import Image

from ctssl_jax.evaluation import measure
from ctssl_jax.parallel import processes
from ctssl_jax.probes import attribute_probe
from ctssl_jax.runs import strips
from ctssl_jax.runs.checkpoints import choose_step
from ctssl_jax.training import loop, recipe_files
from data_prep.system.errors import InputError, StartAgain
from experiments import chain, figure6, table2
from experiments.study import downstream, given, kept, results, runner, table2_figure
from experiments.study.cells import Cell, Settings, chain_cells, keeping
from experiments.study.downstream import Point, Study
from experiments.study.paper import TABLE2
from experiments.study.presets import PRESETS
from tests.helpers.training_runs import TINY, start


@pytest.fixture
def settings(tiny_dataset, tmp_path):
    """A study in an empty folder."""
    return Settings(tiny_dataset, tmp_path / "study", "small", 100, 0, (), "test")


def result_of(cell, mean=0.5):
    """A results JSON in `evaluate`'s or `probe`'s form, every number made from `mean`."""
    value = {
        "sd": 0.1,
        "ci95": [mean - 0.1, mean + 0.1],
        "num_volumes": 7,
        "num_patients": 6,
        "unit": "a unit",
    }
    names = (
        table2_figure.CROSS
        if cell.name.startswith("cross_")
        else (*chain.SCORES, "masked_mse_batch_sum")
    )
    if cell.name in table2_figure.CLASSIFICATION:
        names = ("cross_entropy", "double_softmax_cross_entropy", "auroc")
    if cell.name in ("next_slice", "denoising"):
        names = ("mse", "ssim")
    recipe = cell.stages[0].recipe if cell.stages else None
    num_steps = int(recipe.fields["num_steps"]) if recipe else 0
    return {
        "metrics": {name: {**value, "mean": mean} for name in names},
        "synthetic": True,
        "split": "test",
        "config": {"image_size": 64, "num_steps": num_steps, "batch_size": 16},
        "seed": 0,
        "device": "1 x cpu",
        "dataset_fingerprint": "abc",
        "num_patients_seen_in_training": 0,
        "checkpoint_step": 50,
        "embedding": {"effective_rank": 10.0, "embedding_dim": 64},
        "codebook": {"used_codes": 3, "dead_codes": 509, "num_codes": 512, "perplexity": 1.5},
        "warnings": ["the codebook has collapsed: 3 of 512"] if cell.name == "mask_20" else [],
    }


def complete(cell, mean=0.5):
    """Leave what a finished cell leaves."""
    cell.result.parent.mkdir(parents=True, exist_ok=True)
    cell.result.write_text(json.dumps(result_of(cell, mean)))
    images = np.linspace(0, 1, 3 * 32 * 32, dtype=np.float32).reshape(3, 32, 32, 1)
    if not cell.name.startswith("cross_"):
        shown = {"input": images, "target": images, "prediction": images**2}
        if cell.name in table2_figure.CLASSIFICATION:
            shown["label"] = np.array([2, 1, 0])
            shown["probabilities"] = np.array([[0.25, 0.625, 0.125]] * 3)
            shown["class_names"] = np.array(["a", "b", "c"])
        strips.save_arrays(cell.result.with_suffix(".npz"), shown)


@pytest.fixture
def stages_run(monkeypatch):
    """Stages are noted instead of run; the last one of a cell leaves its result."""
    ran = []

    def run_stage(title, module, *arguments):
        ran.append((title, module, *arguments))
        output = flags_of(arguments).get("--output")
        if output:
            complete(Cell(Path(output).stem, (), (), Path(output)))
        return 1.5

    monkeypatch.setattr(runner, "run_stage", run_stage)
    return ran


def flags_of(stage):
    return dict(flag.split("=", 1) for flag in stage if flag.startswith("--") and "=" in flag)


def test_each_mask_size_starts_from_the_last_checkpoint_of_the_one_before(settings):
    cells = chain_cells(settings)
    assert [cell.name for cell in cells] == ["mask_05", "mask_10", "mask_20", "mask_33"]
    assert [cell.after for cell in cells] == [(), ("mask_05",), ("mask_10",), ("mask_20",)]
    train = [flags_of(cell.stages[0].arguments()) for cell in cells]
    assert [flags["--config.mask.fraction"] for flags in train] == ["0.05", "0.1", "0.2", "0.33"]
    assert "--config.init_from" not in train[0]
    for before, after in itertools.pairwise(train):
        assert after["--config.init_from"] == before["--workdir"] and after[
            "--config.init_checkpoint"
        ] == ("last")
    assert {flags["--config.num_steps"] for flags in train} == {"100"}


def test_the_ablation_trains_for_as_many_steps_in_all(settings):
    cells = chain.ablation_cells(settings)
    train = [flags_of(cell.stages[0].arguments()) for cell in cells]
    assert [flags["--config.num_steps"] for flags in train] == ["200", "300", "400"]
    assert [flags["--config.mask.fraction"] for flags in train] == ["0.1", "0.2", "0.33"]
    assert not any(
        "--config.init_from" in flags or cell.after
        for flags, cell in zip(train, cells, strict=True)
    )
    of_recipe = chain.ablation_cells(settings._replace(num_steps=0))[0].stages[0]
    assert of_recipe.arguments().count("--config.num_steps=3000") == 1


def test_plan_lists_a_command_for_every_cell(settings, capsys):
    cells = [*table2.model_cells(settings), *table2.cross_cells(settings)]
    complete(cells[0])
    runner.plan(
        cells,
        "experiments.table2",
        given.options_of(settings._replace(overrides=("dtype=bfloat16",))),
        settings.workdir,
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (8 + 10) + 1
    assert lines[-1].startswith("# 1 of 18 cells are complete and took 0.00 hours; the 17 missing")
    assert lines[-1].endswith("but for 17 of which none was measured yet")
    assert lines[0] == "# mask_05 [complete]" and lines[2] == "# mask_10 [missing] after mask_05"
    assert lines[3].startswith("ctssl table2 run --dataset=")
    assert lines[3].endswith("--num_steps=100 --override=dtype=bfloat16 --cells=mask_10")
    assert not (settings.workdir / "study.json").exists()


def test_run_does_what_is_missing_in_order(settings, stages_run):
    cells = chain_cells(settings)
    runner.run(cells, [], settings.workdir)
    assert [stage[0] for stage in stages_run] == [
        f"{cell.name}: {do}" for cell in cells for do in ("train", "evaluate")
    ]
    runner.run(cells, [], settings.workdir)
    assert len(stages_run) == 8
    cells[2].result.unlink()
    runner.run(cells, [], settings.workdir)
    assert [stage[0] for stage in stages_run[8:]] == ["mask_20: train", "mask_20: evaluate"]
    assert [results.seconds_of(cell, settings.workdir) for cell in cells] == 4 * [3.0]


def test_kept_results_make_a_cell_complete_and_its_weights_come_again_when_needed(
    settings, stages_run, capsys
):
    folder = settings.workdir / "kept"
    cells = keeping(chain_cells(settings), folder)
    runner.run(cells, ["mask_05", "mask_10"], settings.workdir)
    assert sorted(path.name for path in folder.iterdir()) == ["mask_05.json", "mask_10.json"]
    assert json.loads((folder / "mask_05.json").read_text())["seconds"] == 3.0
    for cell in cells[:2]:
        cell.result.unlink()
    runner.plan(cells, "experiments.chain", [], settings.workdir)
    printed = capsys.readouterr().out
    assert printed.count("[complete]") == 2 and "2 of 4 cells are complete" in printed
    assert "reckoned at 0.00 hours by measured cells" in printed and "but for" not in printed
    before = len(stages_run)
    runner.run(cells, ["mask_05"], settings.workdir)
    assert len(stages_run) == before
    runner.run(cells, ["mask_20"], settings.workdir)  # starts from mask_10, whose weights are gone
    assert [stage[0] for stage in stages_run[before:]] == [
        f"{name}: {do}"
        for name in ("mask_05", "mask_10", "mask_20")
        for do in ("train", "evaluate")
    ]


def test_hours_are_reckoned_by_cells_of_the_same_recipe(settings):
    cells = keeping(table2.model_cells(settings), settings.workdir / "kept")
    complete(cells[0])
    kept.keep(cells[0], 7200.0)
    took, ahead, unknown = runner.reckoned_hours(cells, settings.workdir)
    assert (took, ahead, unknown) == (2.0, 6.0, 4)  # three masks more; four other recipes
    rates = {"masked_region": 1e6, "flip": 36.0}  # measured cells of the study come first
    took, ahead, unknown = runner.reckoned_hours(cells, settings.workdir, rates)
    assert (took, ahead, unknown) == (2.0, 7.0, 3)


def test_folds_are_pooled_over_all_patients(settings, tmp_path):
    folds = settings._replace(folds=2, kept=tmp_path / "kept")
    cells = {cell.name: cell for cell in folds.study(table2.all_cells)}
    assert len(cells) == 2 * 18 and cells["fold_1/mask_10"].after == ("fold_1/mask_05",)
    assert f"--config.dataset={settings.dataset}/fold_1" in (
        cells["fold_1/flip"].stages[0].arguments()
    )
    for number, name in enumerate(("fold_0/denoising", "fold_1/denoising", "fold_0/flip")):
        complete(cells[name]._replace(name=name.removeprefix(f"fold_{name[5]}/")))
        text = "volume_id,patient_id,num_slices,mse,ssim,cross_entropy,auroc\n"
        for patient in range(3):
            text += (
                f"v{patient},secret{patient},9,0.{number}{patient},0.5,1.5,0.{number}{patient}\n"
            )
        cells[name].result.with_suffix(".csv").write_text(text)
        content = json.loads(cells[name].result.read_text())
        content["baselines"] = {"copy_input": {"mse": {"mean": 0.1 * number}}}
        cells[name].result.write_text(json.dumps(content))
        kept.keep(cells[name], 60.0)
        cells[name].result.with_suffix(".npz").unlink()
    assert "secret" not in (tmp_path / "kept" / "fold_0" / "flip.json").read_text()
    found = kept.results_of(folds, table2.all_cells)
    value = found["denoising"]["metrics"]["mse"]
    assert (value["num_volumes"], value["num_patients"]) == (6, 6)
    assert value["mean"] == pytest.approx(np.mean([0.0, 0.01, 0.02, 0.1, 0.11, 0.12]))
    text = table2.draw(folds)
    assert "| Denoising | the input itself | 0.0500 |" in text  # of both folds
    assert "The order of the strategies" not in text  # no pair of them is there
    assert "2 folds of patients" in text and "NOT ALL FOLDS ARE THERE of flip 1." in text
    assert "3 minutes by the clock" in text
    assert not (folds.workdir / "table2.png").exists()  # no pictures of the slices are kept


def test_a_mistyped_cell_leaves_nothing_behind(settings, monkeypatch):
    given_flags = types.SimpleNamespace(FLAGS=types.SimpleNamespace(cells=["mask_99"]))
    monkeypatch.setattr(runner, "flags", given_flags)
    with pytest.raises(InputError, match="--cells=mask_99: there is no such cell"):
        runner.act("run", "experiments.table2", settings, chain_cells(settings))
    assert not settings.workdir.exists()


def test_label_free_probes_are_compared_with_the_untrained_encoder(settings, tmp_path):
    folds = settings._replace(folds=1, kept=tmp_path / "kept")
    cells = {cell.name: cell for cell in folds.study(table2.all_cells)}
    complete(cells["fold_0/flip"]._replace(name="flip"))
    cells["fold_0/flip"].result.with_suffix(".csv").write_text(
        "volume_id,patient_id,auroc\nv,s,1\n"
    )
    kept.keep(cells["fold_0/flip"], None)
    for name, gain in (("cross_flip", 0.1), ("cross_untrained", 0.0)):
        cell = cells[f"fold_0/{name}"]
        complete(cell._replace(name=name))
        text = "volume_id,patient_id,num_slices,position/linear/r2\n"
        for patient in range(8):
            text += f"v{patient},s{patient},9,{0.5 + gain + 0.001 * patient * gain}\n"
        cell.result.with_suffix(".csv").write_text(text)
        kept.keep(cell, 60.0)
    table = table2.draw(folds)
    (line,) = [line for line in table.splitlines() if line.startswith("| Flip") and "R²" in line]
    assert "+0.100" in line and "| (untrained encoder) | place in the scan" in table


def test_what_cannot_be_run_is_one_line(settings, stages_run, tiny_dataset, tmp_path):
    cells = chain_cells(settings)
    with pytest.raises(
        InputError,
        match=r"--cells=mask_99: there is no such cell; choose from mask_05, mask_10",
    ):
        runner.run(cells, ["mask_05", "mask_99"], settings.workdir)
    with pytest.raises(
        InputError,
        match=r"cell mask_10 needs mask_05 first; run --cells=mask_05,mask_10",
    ):
        runner.run(cells, ["mask_10"], settings.workdir)
    given.record_settings(settings.workdir, given.settings_content(settings))
    other = settings._replace(num_steps=7)
    with pytest.raises(
        InputError, match=r"holds a study with num_steps=100, not 7; use another one"
    ):
        given.record_settings(other.workdir, given.settings_content(other))
    assert not stages_run
    with pytest.raises(InputError, match="holds no results yet; run the study first"):
        table2.draw(settings)
    with pytest.raises(InputError, match="holds no results yet; run the study first"):
        chain.draw(settings)


def test_a_failed_stage_stops_the_study(settings, capfd):
    with pytest.raises(
        InputError,
        match=r"stage 'mask_05: train' ended with exit code 2; its message stands above",
    ):
        # the dataset's images are of 16 pixels
        runner.run(chain_cells(settings), ["mask_05"], settings.workdir)
    assert "holds images of 16 pixels, config.image_size is 64" in capfd.readouterr().err


def test_a_stage_that_was_asked_to_stop_saves_and_is_not_taken_for_complete(tiny_dataset, tmp_path):
    """SIGTERM to the study is passed on; the training saves, and nothing is evaluated yet."""
    settings = Settings(tiny_dataset, tmp_path / "study", "small", 100_000, 0, (), "test")
    fields = {**TINY, "log_every": 2, "eval_every": 100_000, "model.vq_revive_every": 0}
    fields.pop("num_steps")
    program = (
        "import sys; from pathlib import Path; from data_prep.system import command_line\nfrom "
        "experiments.study import runner; from experiments.study.cells import Settings\nsettings = "
        f"Settings(Path({str(tiny_dataset)!r}), Path({str(settings.workdir)!r}), "
        f"*{settings[2:]!r})\ncell = settings.cell('mask_05', 'masked_region', "
        f"{fields!r})\nsys.argv = ['study']\ncommand_line.run(lambda argv: runner.run([cell], [], "
        "settings.workdir))\n"
    )
    process = start([sys.executable, "-c", program])
    metrics = settings.workdir / "runs" / "mask_05" / "metrics.jsonl"
    for _ in range(1200):
        if process.poll() is not None or (
            metrics.exists() and '"kind": "train"' in metrics.read_text()
        ):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate()
    assert process.returncode == 75 and errors.endswith(
        "stage 'mask_05: train' was stopped; run the same command again to continue\n"
    )
    assert "stopped     at step" in output and "evaluate" not in output
    assert choose_step(settings.workdir / "runs" / "mask_05", "last") > 0
    assert (
        not (settings.workdir / "results").exists() and not (settings.workdir / "seconds").exists()
    )


def test_overrides_of_what_the_study_sets_are_refused(settings):
    def refused(override, match):
        with pytest.raises(InputError, match=match):
            given.check_overrides(
                settings._replace(overrides=(override,)), ["masked_region", "rotation"]
            )

    refused("mask.fraction=0.2", r"--override=mask.fraction=0.2: a study sets mask.fraction itself")
    refused("num_steps=5", "a study sets num_steps itself")
    refused("model.vq_update=ema", r"configs/rotation.py has no field model.vq_update")
    refused("dytpe=bfloat16", r"configs/masked_region.py has no field dytpe")
    refused("batch_size=abc", r"--override=batch_size=abc: batch_size is a int, such as \d+$")
    refused("remat=true", r"--override=remat=true: remat is a bool, such as False$")
    refused("model.hidden=8", r"model.hidden is a tuple, such as \(")
    refused("batch_size=0", r"--override=batch_size=0: must be 1 or more$")
    refused("windows=((50, 'a'),)", r"must hold \(level, width\) pairs of numbers")
    given.check_overrides(
        settings._replace(overrides=("dtype=bfloat16", "model.depth=2")),
        ["masked_region", "rotation"],
    )


def test_drawing_takes_the_settings_from_the_study(settings, stages_run):
    given.record_settings(settings.workdir, given.settings_content(settings))
    runner.run(chain_cells(settings), ["mask_05"], settings.workdir)
    elsewhere = settings._replace(num_steps=0, seed=3, size="reference", split="validation")
    assert given.recorded(elsewhere) == settings
    assert sorted(path.name for path in settings.workdir.iterdir()) == [
        "results",
        "seconds",
        "study.json",
    ]
    with pytest.raises(InputError, match="holds no results yet"):
        given.recorded(settings._replace(workdir=settings.workdir / "nowhere"))


def test_patients_that_were_trained_on_are_said(settings):
    one, two = result_of(chain_cells(settings)[0]), result_of(chain_cells(settings)[1])
    assert "NOT HELD OUT" not in results.caption([one, two])
    two["num_patients_seen_in_training"] = 4
    assert "NOT HELD OUT: up to 4 of these patients were in the training data" in results.caption(
        [one, two]
    )
    one["num_patients_seen_in_training"] = None
    assert "CANNOT BE CHECKED" in results.caption([one, two])


def test_the_chain_s_table(settings):
    cells, alone = chain_cells(settings), chain.ablation_cells(settings)
    for number, cell in enumerate([*cells, *alone[:1]]):
        complete(cell, 0.1 * number)
    text = chain.draw(settings)
    assert "SYNTHETIC DATA" in text and "100 / 200 training steps" in text
    with open(settings.workdir / "chain.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["mask"], row["training"], row["steps in all"]) for row in rows] == [
        ("5%", "start of both", "100"),
        ("10%", "chained", "200"),
        ("10%", "from random weights", "200"),
        ("20%", "chained", "300"),
        ("20%", "from random weights", "300"),
        ("33%", "chained", "400"),
        ("33%", "from random weights", "400"),
    ]
    assert rows[1]["masked_mse"] == "0.1000 ± 0.1000 (0.0000 to 0.2000)" and rows[2][
        "mse"
    ].startswith("0.4000")
    assert rows[4]["ssim"] == "" and "missing" in text


def test_table_two_from_results_alone(settings):
    cells = [*table2.model_cells(settings), *table2.cross_cells(settings)]
    for cell in cells:
        if cell.name not in ("flip", "cross_flip"):
            complete(cell)
    text = table2.draw(settings)
    with open(settings.workdir / "table2.csv", newline="") as file:
        rows = {(row["model"], row["metric"]): row for row in csv.DictReader(file)}
    assert {model for model, _ in rows} == set(TABLE2)
    row = rows["mask_20", "masked_mse_batch_sum"]
    assert (row["mean"], row["ci95_low"], row["num_patients"], row["paper_mean"]) == (
        "0.5",
        "0.4",
        "6",
        "0.0988",
    )
    assert rows["mask_20", "masked_mse"]["paper_mean"] == ""
    assert rows["flip", "auroc"]["mean"] == "" and rows["flip", "auroc"]["paper_mean"] == "0.85"
    assert text.count("missing") >= 2 and "SYNTHETIC DATA" in text
    assert "the codebook has collapsed: 3 of 512" in text and "3 of 512 | 2 |" in text
    assert "(untrained encoder)" in text and "(pixels, no encoder)" in text
    with open(settings.workdir / "cross.csv", newline="") as file:
        cross = list(csv.DictReader(file))
    assert len(cross) == 10 and len(cross[0]) == 1 + 2 * 15
    assert all(float(value) for name, value in cross[0].items() if name != "encoder" and value)
    assert Image.open(settings.workdir / "table2.png").size[0] > 800
    assert sorted(path.name for path in settings.workdir.iterdir()) == [
        "cross.csv", "results", "table2.csv", "table2.md", "table2.png",
    ]  # fmt: skip


def test_table_two_has_a_difference_only_where_it_means_something(settings, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *path, **options: drawn.append(self))
    for cell in table2.model_cells(settings):
        complete(cell)
    table2.draw(settings)
    rows = np.reshape(drawn[0].axes[:36], (9, 4))
    assert [bool(row[3].images) for row in rows[:8]] == 6 * [True] + 2 * [False]
    (text,) = rows[6, 3].texts
    assert text.get_text() == "P(a) = 0.250\nP(b) = 0.625  (true)\nP(c) = 0.125"
    assert "too dark" in rows[8, 3].get_xlabel() and not any(row[2].texts for row in rows[:8])


def test_results_of_different_data_are_not_passed_off_as_one(settings):
    one, two = result_of(chain_cells(settings)[0]), result_of(chain_cells(settings)[1])
    two["dataset_fingerprint"] = "other"
    assert "DIFFERENT datasets" in results.caption(
        [one, two]
    ) and "DIFFERENT" not in results.caption([one, one])


def test_a_training_in_this_process_has_the_configuration_of_its_command_line(settings):
    """Paths become text, numbers get the type of their field."""
    study = Study(
        "paper",
        PRESETS["paper"],
        settings.workdir,
        settings.dataset,
        {"rotation": settings.workdir},
    )
    for point in (Point("rotation", 1, 3, 20), Point("se_resnext", 0.04, 0, 0)):
        stage = downstream.downstream_cell(study, "pe", point).stages[0]
        flag_values = flags.FlagValues()
        recipe_files.define_flag(help="", flag_values=flag_values)
        sys_argv, sys.argv = sys.argv, ["train", *stage.arguments()[:-1]]
        try:
            flag_values(sys.argv)
        finally:
            sys.argv = sys_argv
        assert stage.recipe.config().to_json() == flag_values.config.to_json()


def test_an_override_is_a_number_where_its_field_is_one(settings):
    overrides = ("learning_rate=4e-3", "optimizer=adamw", "model.depth=2")
    (first, *_) = chain_cells(settings._replace(overrides=overrides))
    config = first.stages[0].recipe.config()
    assert (config.learning_rate, config.optimizer, config.model.depth) == (4e-3, "adamw", 2)


@pytest.mark.parametrize("finished", [True, False])
def test_stages_are_functions_in_this_process(settings, monkeypatch, capsys, finished):
    """They get the options of the command line, by the names of their parameters."""
    monkeypatch.setattr(processes, "configure_jax", lambda: None)
    calls = {}
    for name, module in (("train", loop), ("evaluate", measure), ("attributes", attribute_probe)):
        calls[name] = create_autospec(getattr(module, name), return_value=finished)
        monkeypatch.setattr(module, name, calls[name])
        if name != "train":
            monkeypatch.setattr(module, "table", lambda result: "the table")
    study = Study("phantom", PRESETS["phantom"], settings.workdir, settings.dataset, {})
    trained = study.cell("mine", "rotation", {"dataset": settings.dataset}, ())
    probe = figure6.probe_cell(study, "rotation", ("age", "sex"), "mine", {"encoder": "pixels"}, 3)
    cells = [trained._replace(stages=(*trained.stages, *probe.stages))]
    settings.workdir.mkdir()
    if not finished:
        with pytest.raises(
            StartAgain, match="stage 'mine: train' was stopped; run the same command again"
        ):
            runner.run(cells, [], settings.workdir, here=True)
        return
    runner.run(cells, [], settings.workdir, here=True)
    run, result = settings.workdir / "runs" / "mine", settings.workdir / "results"
    calls["train"].assert_called_once_with(trained.stages[0].recipe.config(), workdir=run)
    calls["evaluate"].assert_called_once_with(
        workdir=run, dataset=None, split="test", checkpoint="last", output=result / "mine.json"
    )
    calls["attributes"].assert_called_once_with(
        workdir=settings.workdir / "runs" / "pretrain_rotation",
        dataset=settings.dataset,
        names=["age", "sex"],
        checkpoint="last",
        encoder="pixels",
        seed=3,
        output=result / "probe_mine_age_sex.json",
    )
    assert capsys.readouterr().out.count("the table") == 2
    assert results.seconds_of(cells[0], settings.workdir) is not None
