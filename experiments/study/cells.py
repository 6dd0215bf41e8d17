"""Cells: the parts of a study that can run on a machine of their own."""

from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from ctssl_jax.training.recipe_files import load_recipe

FRACTIONS = (0.05, 0.10, 0.20, 0.33)  # of the image area: the masks of the progressive chain


class Recipe(NamedTuple):
    """A recipe of `configs/`, its size, and fields with other values, `{"mask.fraction": 0.05}`."""

    name: str
    size: str
    fields: dict[str, Any]

    def config(self) -> ml_collections.ConfigDict:
        """The configuration of a training in this process; its fields have the recipe's types."""
        config = load_recipe(self.name, self.size)
        texts = {name: str(value) for name, value in self.fields.items() if isinstance(value, Path)}
        config.update_from_flattened_dict(self.fields | texts)
        return config.lock()


class Stage(NamedTuple):
    """One command of a cell. It does nothing when run again after it was completed.

    title: printed above it.
    module: that `python -m` runs.
    options: flag -> value; True for a flag without a value, a tuple for a repeated flag.
    recipe: of a training.
    """

    title: str
    module: str
    options: dict[str, Any]
    recipe: Recipe | None = None

    def arguments(self) -> list[str]:
        """The command line after the module's name."""
        flags = []
        if self.recipe:
            name, size, fields = self.recipe
            flags = [f"--config={name}:{size}"]
            flags += [f"--config.{field}={value}" for field, value in fields.items()]
        for name, value in self.options.items():
            values = value if isinstance(value, tuple) else (value,)
            flags += [f"--{name}" if one is True else f"--{name}={one}" for one in values]
        return flags


class Cell(NamedTuple):
    """One part of a study that can run on a machine of its own.

    name: unique within the study.
    after: names of the cells that must be complete before.
    stages: run one after the other.
    result: the results JSON that the last stage writes.
    """

    name: str
    after: tuple[str, ...]
    stages: tuple[Stage, ...]
    result: Path


def train_cell(
    name: str,
    recipe: Recipe,
    workdir: Path,
    evaluation: dict[str, Any],
    after: tuple[str, ...] = (),
) -> Cell:
    """Train a recipe and evaluate it.

    Args:
      name: of the cell; the run is `WORKDIR/runs/NAME`, the result `WORKDIR/results/NAME.json`.
      recipe: with all fields that the study sets.
      workdir: folder of the study.
      evaluation: options of `ctssl_jax.evaluate`.
      after: cells that must be complete before.
    """
    run, result = workdir / "runs" / name, workdir / "results" / f"{name}.json"
    train = Stage(f"{name}: train", "ctssl_jax.train", {"workdir": run}, recipe)
    options = {"workdir": run, **evaluation, "output": result}
    evaluate = Stage(f"{name}: evaluate", "ctssl_jax.evaluate", options)
    return Cell(name, after, (train, evaluate), result)


class Settings(NamedTuple):
    """The settings of all cells of a study of one dataset.

    dataset: dataset directory.
    workdir: folder of the study.
    size: of the recipes, `reference` or `small`.
    num_steps: of each training; 0 takes the number of the recipe.
    seed: of weights and data order.
    overrides: `FIELD=VALUE` of every recipe, e.g. `dtype=bfloat16`.
    split: that is evaluated.
    """

    dataset: Path
    workdir: Path
    size: str
    num_steps: int
    seed: int
    overrides: tuple[str, ...]
    split: str

    def steps(self, recipe: str) -> int:
        """Training steps of a recipe, `config.num_steps`."""
        return self.num_steps or load_recipe(recipe, self.size).num_steps

    def cell(
        self, name: str, recipe: str, fields: dict[str, Any], *, after: str = "", num_steps: int = 0
    ) -> Cell:
        """Train a recipe and evaluate its best checkpoint, beside baselines.

        Args:
          name: of the cell.
          recipe: file in `configs/`.
          fields: of the configuration.
          after: cell whose last checkpoint the training starts from.
          num_steps: training steps; 0 takes `steps(recipe)`.
        """
        fields = dict(fields)
        if after:
            fields |= {"init_from": self.workdir / "runs" / after, "init_checkpoint": "last"}
        num_steps = num_steps or self.steps(recipe)
        fields |= {"dataset": self.dataset, "seed": self.seed, "num_steps": num_steps}
        fields |= dict(override.split("=", 1) for override in self.overrides)
        evaluation = {"dataset": self.dataset, "split": self.split, "baselines": True}
        trained = Recipe(recipe, self.size, fields)
        return train_cell(name, trained, self.workdir, evaluation, (after,) if after else ())


def mask_name(fraction: float) -> str:
    """Name of a mask size's cell: 0.05 -> `mask_05`."""
    return f"mask_{100 * fraction:02.0f}"


def chain_cells(settings: Settings) -> list[Cell]:
    """One training a mask size, each from the last checkpoint of the one before."""
    cells: list[Cell] = []
    for fraction in FRACTIONS:
        after = cells[-1].name if cells else ""
        fields = {"mask.fraction": fraction}
        cells.append(settings.cell(mask_name(fraction), "masked_region", fields, after=after))
    return cells
