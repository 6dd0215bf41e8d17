"""Every training of every study has a configuration that can work: found out here, not after hours
of the cells before it."""

import pytest

from ctssl_jax.training.recipe import check_config, check_dataset
from data_prep.dataset.reader import Dataset
from experiments import objectives, recipe_choices, table2
from experiments.study import downstream, presets
from experiments.study.cells import Settings
from tests.helpers.example_dataset import change_preparation, write_example_dataset


@pytest.fixture
def settings(tmp_path):
    overrides = ("batch_size=16",)
    return Settings(tmp_path / "data", tmp_path, "small", 100, 0, overrides, "test")


def assert_possible(cells, dataset=None):
    recipes = {
        str(sorted(stage.recipe.fields.items())) + stage.recipe.name: stage.recipe
        for cell in cells
        for stage in cell.stages
        if stage.recipe and not stage.recipe.fields.get("seed")
    }
    assert recipes
    for recipe in recipes.values():
        config = recipe.config()
        check_config(config, 1)
        if dataset:
            check_dataset(config, dataset, ("train", "validation"))


@pytest.mark.parametrize(
    "cells_of",
    [table2.all_cells, recipe_choices.cells_of, objectives.all_cells],
    ids=["table2", "recipe_choices", "objectives"],
)
def test_of_one_dataset(cells_of, settings):
    assert_possible(cells_of(settings))


@pytest.mark.parametrize("kind", ["pe", "nodules"])
@pytest.mark.parametrize("preset", ["phantom", "study"])
def test_of_fine_tuned_arms(preset, kind, tmp_path):
    sizes = presets.PRESETS[preset]._replace(fractions=(1.0,), seeds=(0,))
    study = downstream.Study(preset, sizes, tmp_path, tmp_path / "data", {})
    other = {"pe": "standard_unet", "nodules": "se_resnext"}[kind]
    cells, _ = downstream.grid_cells(study, kind, [arm for arm in presets.TITLES if arm != other])
    windows = sizes.windows or ((50.0, 350.0), (100.0, 700.0))  # those of rsna_pe
    folder = write_example_dataset(
        tmp_path / "scans",
        image_size=64,
        channels=2,
        volumes_per_split={"train": 1, "validation": 1},
    )
    change_preparation(folder, windows=[{"level": one, "width": other} for one, other in windows])
    assert_possible(cells, Dataset.open(folder))
