"""Recipes by name, from any folder: `masked_region:small` is `get_config("small")` of
`configs/masked_region.py`, in a checkout and in an installed package."""

import difflib
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from data_prep.system.errors import InputError

_PACKAGE = Path(__file__).resolve().parents[1]


def recipes_folder() -> Path:
    """Where the recipes of this installation lie."""
    installed = _PACKAGE / "configs"  # where setup.cfg puts `configs` into a wheel
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def recipe_names() -> list[str]:
    """Names of all recipes."""
    return sorted(
        path.stem for path in recipes_folder().glob("*.py") if not path.stem.startswith("_")
    )


def recipe_file(recipe: str) -> str:
    """The file of a recipe, with its size behind a colon where one is given.

    Args:
      recipe: a name, `masked_region:small`, or a file, `configs/masked_region.py:small`.

    Raises:
      InputError: there is no such recipe, or no such file.
    """
    name, colon, size = recipe.partition(":")
    is_file = name.endswith(".py") or "/" in name
    path = Path(name) if is_file else recipes_folder() / f"{name}.py"
    if not path.is_file():
        what = "file" if is_file else "recipe"
        raise InputError(
            f"{name}: no such {what}; choose one of {', '.join(recipe_names())}, or give a file"
        )
    return f"{path}{colon}{size}"


def load_recipe(name: str, size: str = "reference") -> ml_collections.ConfigDict:
    """The recipe of this name.

    Raises:
      InputError: there is none, or none of this size.
    """
    path = recipe_file(name)
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(size)


def check_fields(config: ml_collections.ConfigDict, arguments: Sequence[str]) -> None:
    """Refuse `--config.FIELD` where the recipe has no such field.

    Raises:
      InputError: names the field, and the one that was probably meant.
    """
    known = list(_names(config))
    for argument in arguments:
        name = argument.partition("=")[0].lstrip("-").removeprefix("no").removeprefix("config.")
        if not re.match(r"--?(no)?config\.", argument) or name in known:
            continue
        same_end = [field for field in known if field.rpartition(".")[2] == name.rpartition(".")[2]]
        near = [*same_end, *difflib.get_close_matches(name, known, 1)][:1]
        meant = f"; did you mean config.{near[0]}?" if near else ""
        raise InputError(f"config.{name}: the recipe has no such field{meant}")


def _names(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def define_flag(
    default: str | None = None, *, help: str, flag_values: flags.FlagValues = flags.FLAGS
) -> None:
    """Define --config, which takes a recipe's name or file, and --config.FIELD for its fields."""
    config_flags.DEFINE_config_file("config", None, help, flag_values=flag_values)
    flag_values["config"].parser = _RecipeParser(flag_values["config"].parser)
    if default:
        flag_values.set_default("config", default)


class _RecipeParser(flags.ArgumentParser):
    def __init__(self, of_files: flags.ArgumentParser):
        self._of_files = of_files

    def parse(self, argument: str) -> ml_collections.ConfigDict:
        config = self._of_files.parse(recipe_file(argument))
        check_fields(config, sys.argv[1:])
        return config

    def flag_type(self) -> str:
        return "recipe"
