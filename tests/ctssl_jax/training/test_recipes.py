"""Recipes: their resolved values stay the same, and every field has a meaning, type and range."""

import importlib
import json
import math
import re
from pathlib import Path

import pytest

from ctssl_jax.runs.run import to_json
from ctssl_jax.training.fields import FIELDS
from ctssl_jax.training.recipe import check_config
from data_prep.system.errors import InputError

FOLDER = Path(__file__).resolve().parent
RESOLVED = json.loads((FOLDER / "resolved_recipes.json").read_text())
CONFIGS = FOLDER.parents[2] / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("[a-z]*.py"))
ALL_SIZES = [f"{recipe}:{size}" for recipe in RECIPES for size in ("reference", "small")]
VARIANTS = ["masked_region:paper", "masked_region:paper_small"]


def recipe_of(name):
    recipe, size = name.split(":")
    return importlib.import_module(f"configs.{recipe}").get_config(size)


def fields_of(config, prefix=""):
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from fields_of(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@pytest.mark.parametrize("name", [*ALL_SIZES, *VARIANTS])
def test_recipes_resolve_to_the_stored_values(name):
    """`resolved_recipes.json` was written before recipes were composed of blocks; 1 is not 1.0."""
    assert json.dumps(to_json(recipe_of(name)), sort_keys=True) == json.dumps(
        RESOLVED[name], sort_keys=True
    )


def test_the_stored_values_are_of_these_recipes():
    assert list(RESOLVED) == [*ALL_SIZES, *VARIANTS]


def test_an_unknown_size_is_refused():
    with pytest.raises(InputError, match="size 'large' is not known; choose reference or small"):
        recipe_of("pe:large")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_can_be_read_alone(recipe):
    """It takes nothing from another recipe and deletes nothing, and it is short."""
    text = (CONFIGS / f"{recipe}.py").read_text()
    assert "configs import" not in text and "    del " not in text and ".replace(" not in text
    assert f'"{recipe}_small" if small else "{recipe}"' in text
    assert len(text.splitlines()) <= 70


def test_every_field_has_an_entry_and_every_entry_is_a_field():
    assert {field for name in ALL_SIZES for field, _ in fields_of(recipe_of(name))} == FIELDS.keys()
    assert all(field.meaning for field in FIELDS.values())


@pytest.mark.parametrize("name", ALL_SIZES)
def test_values_have_the_type_and_the_range_of_their_field(name):
    for field, value in fields_of(recipe_of(name)):
        assert type(value) is FIELDS[field].kind, field
        assert not FIELDS[field].remedy(value), field


def outside(field):
    """Values beyond each bound of a field."""
    if field.choices:
        yield "nonsense"
    if field.kind in (int, float):
        bounds = (field.above, field.below, field.at_least, field.at_most)
        for bound, step in zip(bounds, (0, 0, -1, 1), strict=True):
            yield from (field.kind(bound + step),) if math.isfinite(bound) else ()
    if field.kind is float:
        yield from (math.nan, math.inf)


@pytest.mark.parametrize("name", [name for name in ALL_SIZES if name.endswith("small")])
def test_the_check_of_a_configuration_refuses_what_lies_outside_of_a_range(name):
    for field, _ in fields_of(recipe_of(name)):
        for value in outside(FIELDS[field]):
            config = recipe_of(name)
            config.update_from_flattened_dict({"dataset": "somewhere", field: value})
            with pytest.raises(
                InputError, match=rf"config\.{re.escape(field)}=.*: (must be|choose one of) "
            ):
                check_config(config, num_devices=1)
