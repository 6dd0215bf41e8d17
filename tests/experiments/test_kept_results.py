"""The results that are kept in the repository: numbers only, and they draw the tables there."""

import json
import re
from pathlib import Path

import pytest

from experiments import figure3, figure5, objectives, recipe_choices, table2
from experiments.study import curves, downstream, given, presets
from experiments.study.cells import Settings
from tests.helpers.training_runs import PROJECT

RESULTS = PROJECT / "experiments" / "results"
# Folder of fine-tuned models -> figure -> arms, shares and seeds that are drawn.
FINE_TUNED = {
    "study_phantom": {
        figure3.FIGURE: (
            (
                *("random", "masked_05", "masked_10", "masked_20", "masked_33"),
                *("next_slice", "denoising", "rotation", "flip"),
                *("lejepa", "visreg", "vicreg", "simclr", "simmim", "se_resnext", "shuffled"),
            ),
            (0.03125, 0.0625, 1.0),
            (0, 1, 2),
        ),
        figure5.FIGURE: (
            (
                *("random", "masked_20", "next_slice", "denoising", "rotation", "flip"),
                *("standard_unet", "shuffled"),
            ),
            (0.03125, 0.125, 1.0),
            (0, 1, 2),
        ),
    }
}
STUDIES = {"table2": table2, "recipe_choices": recipe_choices, "objectives": objectives}


def folders():
    return sorted(path.parent for path in RESULTS.glob("*/study.json"))


def fine_tuned():
    return [(name, *one) for name, figures in FINE_TUNED.items() for one in figures.items()]


@pytest.mark.parametrize(
    "folder",
    [folder for folder in folders() if folder.name not in FINE_TUNED],
    ids=lambda folder: folder.name,
)
def test_the_tables_follow_from_the_results(folder, tmp_path, without_pictures):
    name, study = next(one for one in STUDIES.items() if folder.name.startswith(one[0]))
    tables = tmp_path / "new"
    asked = Settings(Path(), tables, "small", 0, 0, (), "test", kept=folder)
    drawn = study.draw(given.recorded(asked))
    assert drawn == (folder / f"{name}.md").read_text()
    for table in folder.glob("*.csv"):
        assert (tables / table.name).read_text() == table.read_text()


@pytest.mark.parametrize(("folder", "figure", "points"), fine_tuned())
def test_the_figures_follow_from_the_results(folder, figure, points, tmp_path, without_pictures):
    arms, fractions, seeds = points
    kept = RESULTS / folder
    preset = json.loads((kept / "study.json").read_text())["preset"]
    sizes = presets.PRESETS[preset]._replace(fractions=fractions, seeds=seeds)
    study = downstream.Study(preset, sizes, tmp_path, tmp_path / "data", {}, kept)
    _, grid = downstream.grid_cells(study, figure.kind, arms)
    assert curves.draw(study, grid, figure) == (kept / f"{figure.name}.md").read_text()
    for table in kept.glob(f"{figure.name}*.csv"):
        assert (tmp_path / table.name).read_text() == table.read_text()
    drawn = {path.stem for name in FINE_TUNED for path in (RESULTS / name).glob("*.md")}
    assert drawn == {one.name for figures in FINE_TUNED.values() for one in figures}


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_they_are_small_and_hold_no_pseudonym_path_or_picture(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".md", ".csv"}
    for path in folder.rglob("*.json"):
        assert path.stat().st_size < 50_000
        if path.name == "study.json":
            continue
        content = json.loads(path.read_text())
        assert len(content.pop("dataset_fingerprint")) == 64
        text = json.dumps(content)
        # pseudonyms, paths, UIDs of DICOM
        assert not re.search(r"[0-9a-f]{16}|/(tmp|home|work)|\d\.\d+\.\d+\.\d+\.\d", text)
        assert all(isinstance(patient, int) for patient in content["volumes"]["patient"])
