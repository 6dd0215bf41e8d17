"""The downstream studies: their cells, what starts from what, and figures from results files
alone."""

import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ctssl_jax.evaluation import comparisons, predictions
from ctssl_jax.evaluation.predictions import Predictions
from ctssl_jax.stats import bootstrap
from data_prep.system.errors import InputError
from experiments import confounds, figure3
from experiments.study import curves, downstream, kept, paired, presets, runner
from experiments.study.cells import Cell
from experiments.study.downstream import Point, Study
from experiments.study.presets import PRESETS
from tests.helpers.training_runs import PROJECT

PATIENTS = np.repeat([f"p{number}" for number in range(8)], 4)
LABELS = np.tile([0, 1, 0, 1], 8)


@pytest.fixture
def study(tmp_path):
    sizes = PRESETS["phantom"]._replace(
        fractions=(0.25,), seeds=(0, 1), steps={"pe": (5,), "nodules": (10,)}
    )
    return Study("phantom", sizes, tmp_path, tmp_path / "data" / "pe", {})


def write_result(cell, probability_of_positive: float, seed: int) -> None:
    """A result whose positive slices have this probability and whose negative ones 0.5, but for a
    little noise."""
    noise = np.random.default_rng(seed).uniform(0, 0.01, len(LABELS))
    positive = np.where(LABELS == 1, probability_of_positive, 0.5) + noise
    found = Predictions(
        PATIENTS,
        PATIENTS,
        np.tile(np.arange(4), 8),
        LABELS,
        np.stack([1 - positive, positive], axis=-1),
    )
    number = {
        "mean": probability_of_positive,
        "sd": None,
        "ci95": [0.1, 0.9],
        "num_volumes": 8,
        "num_patients": 8,
    }
    cell.result.parent.mkdir(exist_ok=True)
    predictions.write(cell.result, found)
    content = {
        "metrics": {
            name: {**number, "unit": "made up"} for name in ("auroc", "sensitivity", "specificity")
        },
        "config": {"image_size": 64, "num_steps": 5, "batch_size": 16},
        **{
            "split": "test",
            "synthetic": True,
            "seed": seed,
            "device": "cpu",
            "num_patients_seen_in_training": 0,
        },
        **{
            "num_train_studies": 4,
            "num_train_slices": 96,
            "init_from": [],
            "recipe": "pe",
            "dataset_fingerprint": "d",
        },
    }
    cell.result.write_text(json.dumps(content))


def test_arms_differ_in_their_weights_alone(study):
    cells, grid = downstream.grid_cells(study, "pe", ["random", "masked_10"])
    assert [cell.name for cell in cells] == [
        *("data_pretraining", "data_pe", "pretrain_masked_05", "pretrain_masked_10"),
        *(
            "pe_random_0.25_s0_5",
            "pe_masked_10_0.25_s0_5",
            "pe_random_0.25_s1_5",
            "pe_masked_10_0.25_s1_5",
        ),
    ]
    random, masked = (grid[Point(arm, 0.25, 1, 5)] for arm in ("random", "masked_10"))
    settings = [set(cell.stages[0].arguments()) for cell in (random, masked)]
    assert {text.split("=")[0] for text in settings[1] ^ settings[0]} == {
        *("--workdir", "--config.init_from", "--config.init_checkpoint"),
    }
    assert "--config.seed=1" in settings[0] and "--config.train_fraction=0.25" in settings[0]
    assert set(masked.after) == {"data_pe", "pretrain_masked_10"} and random.after == ("data_pe",)
    chain = next(cell for cell in cells if cell.name == "pretrain_masked_10")
    assert chain.after == ("pretrain_masked_05",)


def test_weights_that_are_not_given_are_asked_for(study):
    real = study._replace(
        preset="paper", sizes=PRESETS["paper"]._replace(fractions=(0.04,), seeds=(0,))
    )
    with pytest.raises(
        InputError, match=r"no weights for rotation: give --pretrained=rotation=RUN"
    ):
        downstream.grid_cells(real, "pe", ["random", "rotation"])
    known = real._replace(pretrained={"rotation": study.workdir})
    cells, _ = downstream.grid_cells(known, "nodules", ["random", "rotation"])
    assert len(cells) == 2 * len(PRESETS["paper"].steps["nodules"])


def test_a_kept_result_that_would_be_made_otherwise_now_is_refused(study, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "_training", lambda stage: {})
    for number in (1, 2):
        (tmp_path / f"run_{number}").mkdir()
        (tmp_path / f"run_{number}" / "config.json").write_text(f'{{"seed": {number}}}')
    sizes = study.sizes._replace(archives={}, fractions=(0.25,), seeds=(0,))
    given = study._replace(preset="paper", sizes=sizes, kept=tmp_path / "kept")

    def cell_of(run, steps=5):
        sizes = given.sizes._replace(steps={"pe": (steps,)})
        arms = given._replace(sizes=sizes, pretrained={"rotation": tmp_path / f"run_{run}"})
        return downstream.grid_cells(arms, "pe", ["rotation"])[1][Point("rotation", 0.25, 0, steps)]

    cell = cell_of(1)
    write_result(cell, 0.7, 0)
    kept.keep(cell, 1.0)
    kept.check_as_now(cell, "d")
    with pytest.raises(InputError, match=r"_5\.json: was made from another run than .*run_2; "):
        runner.run([cell_of(2)], [], study.workdir)
    with pytest.raises(InputError, match="was made with num_steps=5, not 9; give another"):
        kept.check_as_now(cell_of(1, steps=9)._replace(kept=cell.kept))
    with pytest.raises(InputError, match="was made on another dataset than"):
        kept.check_as_now(cell, "other")


def test_the_comparison_is_paired_and_names_the_better_arm(study):
    _, grid = downstream.grid_cells(study, "pe", ["random", "masked_10", "rotation"])
    for point, cell in grid.items():
        write_result(
            cell, {"random": 0.5, "masked_10": 0.9, "rotation": 0.5}[point.arm], point.seed
        )
    rows = {row["arm"]: row for row in curves.compare_with(grid, "auroc")}
    assert rows.keys() == {"masked_10", "rotation"}
    assert rows["masked_10"]["num_seeds"] == 2 and rows["masked_10"]["a"] == 1.0
    assert rows["masked_10"]["ci95"][0] > 0 and rows["masked_10"]["p_holm"] < 0.05
    # the same predictions
    assert rows["rotation"]["difference"] == 0 and rows["rotation"]["p_holm"] == 1
    assert rows["masked_10"]["p_holm"] == pytest.approx(2 * rows["masked_10"]["p"])


def test_a_correction_that_cannot_succeed_is_refused(study):
    """Eight patients allow no p below 1/128: too many for seven rows."""
    _, grid = downstream.grid_cells(study, "pe", ["random", *presets.PRETEXTS[:7]])
    for point, cell in grid.items():
        write_result(cell, 0.5 if point.arm == "random" else 0.9, point.seed)
    rows = curves.compare_with(grid, "auroc")
    assert len(rows) == 7 and {row["p"] for row in rows} == {2 / 2**8}
    assert {row["p_holm"] for row in rows} == {None}
    text = curves.comparison_markdown(rows, "auroc")
    assert "20,000 draws" in text and "REFUSED: Holm's correction of 7 comparisons" in text


def test_the_interval_of_patients_and_seeds_is_wider_than_that_of_patients():
    by_patient = [0.05, 0.15]
    assert curves.interval_with_seeds(by_patient, [0.1, 0.1]) == pytest.approx(by_patient)
    low, high = curves.interval_with_seeds(by_patient, [0.0, 0.1, 0.2])
    assert low < 0 < high and low + high == pytest.approx(0.2)  # t of about three degrees
    assert high - 0.1 == pytest.approx(0.2, abs=0.03)
    assert curves.interval_with_seeds(by_patient, [-0.8, 1.0]) == [-1.0, 1.0]
    assert curves.interval_with_seeds(by_patient, [0.1]) is None


def test_bold_needs_patients_and_seeds(study):
    _, grid = downstream.grid_cells(study, "pe", ["random", "masked_10", "rotation"])
    for point, cell in grid.items():
        better = 0.9 if point.arm == "masked_10" or point.seed == 0 else 0.503
        write_result(cell, 0.5 if point.arm == "random" else better, seed=0)
    rows = {row["arm"]: row for row in curves.compare_with(grid, "auroc")}
    sure, unsure = rows["masked_10"], rows["rotation"]
    assert unsure["ci95"][0] > 0  # of patients alone
    assert unsure["ci95_with_seeds"][0] < 0 < sure["ci95_with_seeds"][0]
    assert unsure["sd_over_seeds"] > sure["sd_over_seeds"]
    text = curves.comparison_markdown([sure, unsure], "auroc")
    assert f"| **{sure['difference']:+.4f}** |" in text and "patients and seeds" in text
    assert f"| {unsure['difference']:+.4f} |" in text


def of_family(difference, sd_over_seeds, **others):
    row = {"difference": difference, "p": 1e-4, "smallest_p": 1e-4, "num_patients": 144}
    row |= {"standard_error": 0.01, "num_seeds": 3, "sd_over_seeds": sd_over_seeds}
    return row | others


def holm(rows):
    return paired.holm_with_seeds(rows, lambda row: row.get("score"))


def test_the_corrected_p_knows_seeds_by_all_rows():
    alone = [of_family(0.05, None, num_seeds=1), of_family(0.05, None, num_seeds=1)]
    assert holm(alone) == ([2e-4, 2e-4], "")
    (of_seeds, lucky), refused = holm([of_family(0.05, 0.05), of_family(0.05, 0.0)])
    assert refused == "" and of_seeds == lucky  # its three seeds happened to agree
    rows = [of_family(0.05, 0.05), of_family(0.05, None, num_seeds=1)]
    assert holm(rows)[0][1] > 0.3  # of one seed, like those of the others
    spread = np.hypot(0.01, 0.05 / np.sqrt(6))
    assert of_seeds == pytest.approx(2 * bootstrap.t_test(0.05, spread, 5.2), rel=0.15)
    few = [of_family(0.05, 0.0, smallest_p=0.04), of_family(0.05, 0.0, smallest_p=0.04)]
    values, refused = holm(few)
    assert values == [None, None] and "Holm's correction of 2 comparisons" in refused


def test_seeds_of_unlike_scores_are_not_pooled():
    calm = [of_family(0.05, 0.005, score="auroc") for _ in range(9)]
    noisy = of_family(0.05, 1.0, score="r2")
    alone, together = holm([noisy])[0], holm([*calm, noisy])[0]
    assert together[-1] == pytest.approx(alone[0]) and together[-1] > 0.9
    assert together[0] == pytest.approx(10 / 9 * holm(calm)[0][0])


def test_the_smallest_detectable_difference_knows_patients_and_seeds():
    equal = curves.detectable_with_seeds(0.01, [0.1, 0.1, 0.1], 1_000)
    assert equal == pytest.approx(0.02805, abs=1e-5)  # 2.8 standard errors
    assert curves.detectable_with_seeds(0.01, [0.1], 1_000) == equal
    assert curves.detectable_with_seeds(0.01, [0.1], 4) == pytest.approx(0.0416, abs=1e-4)
    both = curves.detectable_with_seeds(0.01, [0.0, 0.1, 0.2], 1_000)
    of_two_degrees = 4.303 + 1.061  # of Student's t, for seeds decide here
    assert both == pytest.approx(of_two_degrees * np.hypot(0.01, 0.1 / np.sqrt(3)), rel=0.05)
    rows = [{"fraction": 0.25, "detectable": value, "num_seeds": 3} for value in (0.1, 0.3)]
    rows += [{"fraction": 1.0, "detectable": None, "num_seeds": 3}]
    rows += [{"fraction": 0.25, "detectable": 0.01, "num_seeds": 1}]  # of patients alone
    assert ": 0.200 at 1/4 of the studies." in curves.detectable_in_words(rows, "auroc")
    assert curves.detectable_in_words(rows[2:3], "auroc") == ""


def test_confounds_change_one_thing_and_are_compared_with_one_stage(study, without_pictures):
    arms = presets.FIGURES["confounds"][1]
    cells, grid = downstream.grid_cells(study, "pe", arms)
    pretraining = {c.name: set(c.stages[0].arguments()) for c in cells if "pretrain" in c.name}
    area = pretraining["pretrain_area_20"]
    changed = pretraining["pretrain_side_20"] ^ area
    assert {text for text in changed if "workdir" not in text} == {"--config.mask.unit=side"}
    assert "--config.num_steps=1500" in pretraining["pretrain_alone_20"]  # 3 stages of 500
    tuned = grid[Point("minmax_20", 0.25, 0, 5)].stages[0].recipe.fields
    assert tuned["normalize"] == "slice_minmax"
    norms = grid[Point("norms_20", 0.25, 0, 5)]
    assert norms.after == ("data_pe", "pretrain_area_20")
    assert norms.stages[0].recipe.fields["init_scope"] == "encoder_norms"
    for point, cell in grid.items():
        write_result(cell, 0.9 if point.arm == "side_20" else 0.52, point.seed)
    text = curves.draw(study, grid, confounds.FIGURE._replace(more=()))
    assert "minus 20 % of the area, one stage" in text and "Smallest detectable difference" in text


def test_the_control_learns_from_shuffled_labels_and_else_as_random_weights_do(study):
    _, grid = downstream.grid_cells(study, "pe", ["random", "shuffled"])
    random, control = (grid[Point(arm, 0.25, 0, 5)].stages[0] for arm in ("random", "shuffled"))
    assert control.recipe.fields == random.recipe.fields | {"shuffled_targets": True}


def test_channels_are_the_windows_and_of_the_sota_those_of_three_slices(study):
    sizes = presets.PRESETS["study"]._replace(fractions=(1.0,), seeds=(0,))
    wide = study._replace(sizes=sizes)
    _, grid = downstream.grid_cells(wide, "pe", ["random", "se_resnext"])
    fields = {point.arm: cell.stages[0].recipe.fields for point, cell in grid.items()}
    assert fields["random"]["model.in_channels"] == 2
    assert fields["se_resnext"]["model.in_channels"] == 6
    assert all(f["windows"] == presets.WINDOWS for f in fields.values())
    data = downstream.data_cells(wide, ("pe",))[0].stages
    assert "--min_embolus_mm2=85" in data[0].arguments()
    assert {"--window=50,350", "--window=-600,1500"} <= set(data[1].arguments())


def test_arms_of_other_networks_have_two_shares(study):
    sizes = study.sizes._replace(fractions=(0.1, 0.5, 1.0), two_shares=("se_resnext",))
    _, grid = downstream.grid_cells(study._replace(sizes=sizes), "pe", ["random", "se_resnext"])
    shares = {arm: {p.fraction for p in grid if p.arm == arm} for arm in ("random", "se_resnext")}
    assert shares == {"random": {0.1, 0.5, 1.0}, "se_resnext": {0.1, 1.0}}


def figure_row(arm, steps, mean, sd=0.2, num_seeds=3):
    """As `curve_rows` makes it."""
    row = {"arm": arm, "fraction": 1.0, "steps": steps, "metric": "dice", "mean": mean}
    return row | {"sd_over_seeds": sd, "num_seeds": num_seeds if mean else 0}


def test_an_arm_without_a_share_has_a_dash_there():
    points = [("random", 0.03125), ("random", 0.3), ("random", 1.0)]
    points += [("se_resnext", 0.03125), ("se_resnext", 1.0)]
    rows = [
        figure_row(arm, 0, 0.5) | {"fraction": share, "unit": "", "metric": "auroc"}
        for arm, share in points
    ]
    _, _, header, _, *lines = curves.curve_markdown(rows).splitlines()[2:]
    assert header == "| weights | 1/32 of the studies | 0.3 of the studies | all of the studies |"
    assert lines[1] == "| SE-ResNeXt-50 (SOTA) | 0.5000 ± 0.2000 | - | 0.5000 ± 0.2000 |"


def test_bars_stay_in_the_range_and_the_legend_has_no_line_that_is_not_there(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *path, **options: drawn.append(self))
    rows = [figure_row("random", 5, 0.1), figure_row("masked_10", 5, 0.9)]
    rows.append(figure_row("rotation", 5, None))
    panel = curves.Panel("Dice", "dice", steps=5)
    curves.save_figure(tmp_path / "figure.png", rows, [panel], "title", "Caption.")
    (axis,) = drawn[0].axes
    bars = np.concatenate([line.get_segments()[0] for line in axis.collections])[:, 1]
    np.testing.assert_allclose(sorted(bars), [0, 0.3, 0.7, 1])
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["random weights", "masked region, 10 %"]
    assert "missing: rotation" in [text.get_text() for text in axis.texts]
    caption = " ".join(drawn[0].get_supxlabel().split())
    assert "Bars: ± standard deviation of 3 seeds, cut at 0 and 1" in caption


def test_without_several_seeds_there_are_no_bars():
    assert curves.bars_in_words([figure_row("random", 5, 0.1, None, 1)]) == " One seed: no bars."
    several = [figure_row("random", 5, 0.1), figure_row("masked_10", 5, 0.1, num_seeds=2)]
    assert "of 2 to 3 seeds" in curves.bars_in_words(several)


def test_figures_come_from_results_and_say_what_is_missing(study):
    _, grid = downstream.grid_cells(study, "pe", ["random", "masked_10"])
    figure = figure3.FIGURE._replace(more=())
    with pytest.raises(InputError, match=r"holds no results of figure3 yet"):
        curves.draw(study, grid, figure)
    for point, cell in list(grid.items())[:3]:
        write_result(cell, 0.9, point.seed)
    text = curves.draw(study, grid, figure)
    assert "SYNTHETIC DATA" in text and "3 of 4 cells are there" in text
    assert "masked region, 10 %" in text and "random weights" in text
    for suffix in (".md", ".csv", ".png", ".svg"):
        assert (study.workdir / f"figure3{suffix}").stat().st_size > 0
    for name in ("figure3.png", "figure3_differences.png"):
        assert min(Image.open(study.workdir / name).size) > 200
    assert (study.workdir / "figure3_comparisons.csv").read_text().count("masked_10") == 1


def test_kept_results_alone_give_the_same_numbers(study, tmp_path, without_pictures):
    """The study's folder can go: the small files hold all that a figure needs, and no pseudonym."""
    kept_study = study._replace(kept=tmp_path / "kept")
    _, grid = downstream.grid_cells(kept_study, "pe", ["random", "masked_10"])
    for point, cell in grid.items():
        write_result(cell, 0.9 if point.arm == "random" else 0.52, point.seed)
    figure = figure3.FIGURE._replace(more=())
    before = curves.draw(kept_study, grid, figure)
    for cell in grid.values():
        kept.keep(cell, seconds=7.0)
    for path in study.workdir.glob("results/*"):
        path.unlink()
    elsewhere = kept_study._replace(workdir=tmp_path / "elsewhere")
    _, grid = downstream.grid_cells(elsewhere, "pe", ["random", "masked_10"])
    assert curves.draw(elsewhere, grid, figure) == before
    content = json.loads((tmp_path / "kept" / "pe_random_0.25_s0_5.json").read_text())
    assert content["predictions"]["patient"][:5] == [0, 0, 0, 0, 1]
    assert content["seconds"] == 7.0 and "/" not in json.dumps(content).replace("share/", "")
    assert (tmp_path / "kept" / "pe_random_0.25_s0_5.json").stat().st_size < 4_000


def test_masks_are_kept_where_there_is_one(tmp_path):
    raw = Cell("nodules", (), (), tmp_path / "nodules.json", tmp_path / "kept" / "nodules.json")
    counts = np.array([[3, 4, 5], [0, 2, 0], [2, 2, 8]], np.float32).T
    found = Predictions(
        np.array(["b", "b", "a"]), np.array(["v", "v", "w"]), np.arange(3), None, None, *counts
    )
    raw.result.write_text("{}")
    predictions.write(raw.result, found)
    expected = comparisons.statistic_of(found, "dice")(np.ones(3))
    kept.keep(raw, None)
    again = kept.predictions_of(raw)
    assert again.patient_id.tolist() == ["p1", "p0"]
    assert comparisons.statistic_of(again, "dice")(np.ones(2)) == pytest.approx(expected)


def test_names_of_the_studies_archives_are_those_of_the_importers():
    layouts = {archive.layout for archive in PRESETS["phantom"].archives.values()}
    assert layouts == {"dicom", "rsna_pe", "lidc_idri"}
    assert (
        presets.SYNTHETIC_KEY
        and len({archive.seed for archive in PRESETS["phantom"].archives.values()}) == 4
    )


@pytest.mark.parametrize(
    ("options", "flips"),
    [((), False), (("--arms=random,flip",), True), (("--preset=paper",), True)],
)
def test_arms_of_a_preset(tmp_path, options, flips):
    """The synthetic preset leaves arms out that would not fit into an hour; whoever names them gets
    them."""
    given = [f"--workdir={tmp_path}", f"--dataset={tmp_path}", *options]
    if "--preset=paper" in options:
        (tmp_path / "config.json").write_text("{}")
        arms = ("masked_05", "masked_20", "next_slice", "denoising", "rotation", "flip")
        given += [f"--pretrained={arm}={tmp_path}" for arm in arms]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.figure3", "plan", *given],
        capture_output=True,
        text=True,
        cwd=PROJECT,
    )
    assert done.returncode == 0, done.stderr
    assert ("# pe_flip_" in done.stdout) == flips and "# pe_random_" in done.stdout
