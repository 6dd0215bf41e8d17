"""Cells: the parts of a study that can run on a machine of their own."""

import ast
import functools
from collections.abc import Callable, Sequence
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
        values = {name: str(v) if isinstance(v, Path) else v for name, v in self.fields.items()}
        for name, value in values.items():  # an override of the command line is text
            *nodes, last = name.split(".")
            own = functools.reduce(lambda node, part: node[part], nodes, config)[last]
            if isinstance(value, str) and not isinstance(own, str):
                values[name] = ast.literal_eval(value)
        config.update_from_flattened_dict(values)
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
    after: names of the cells whose output the stages read.
    stages: run one after the other.
    result: the results JSON that the last stage writes, in the study's folder.
    kept: the small JSON made of it (`kept.keep`), which outlives that folder; None: none is made.
    """

    name: str
    after: tuple[str, ...]
    stages: tuple[Stage, ...]
    result: Path
    kept: Path | None = None

    def is_complete(self) -> bool:
        """Whether its result is there, be it without the weights."""
        return self.result.exists() or (self.kept is not None and self.kept.exists())


def keeping(cells: Sequence[Cell], folder: Path | None) -> list[Cell]:
    """The cells, each with `FOLDER/NAME.json` as the result that is kept (None: nothing is); data
    are not kept."""
    if folder is None:
        return list(cells)
    return [
        cell if cell.name.startswith("data_") else cell._replace(kept=folder / f"{cell.name}.json")
        for cell in cells
    ]


def of_fold(cells: Sequence[Cell], fold: int) -> list[Cell]:
    """The cells of a study of one fold, with names that are unique among all folds."""
    return [
        cell._replace(
            name=f"fold_{fold}/{cell.name}",
            after=tuple(f"fold_{fold}/{name}" for name in cell.after),
        )
        for cell in cells
    ]


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
    folds: `dataset` holds so many folds of the same patients (`ctssl merge --folds`); 0: it is one
      dataset.
    kept: folder of the small results; None: none are kept.
    """

    dataset: Path
    workdir: Path
    size: str
    num_steps: int
    seed: int
    overrides: tuple[str, ...]
    split: str
    folds: int = 0
    kept: Path | None = None

    def fold(self, number: int) -> "Settings":
        """The settings of one fold, a study of one dataset."""
        name = f"fold_{number}"
        return self._replace(
            dataset=self.dataset / name, workdir=self.workdir / name, folds=0, kept=None
        )

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
          fields: of the configuration; they come before `--override`.
          after: cell whose last checkpoint the training starts from.
          num_steps: training steps; 0 takes `steps(recipe)`.
        """
        fields = dict(override.split("=", 1) for override in self.overrides) | fields
        if after:
            fields |= {"init_from": self.workdir / "runs" / after, "init_checkpoint": "last"}
        num_steps = num_steps or self.steps(recipe)
        fields |= {"dataset": self.dataset, "seed": self.seed, "num_steps": num_steps}
        evaluation = {"dataset": self.dataset, "split": self.split, "baselines": True}
        trained = Recipe(recipe, self.size, fields)
        return train_cell(name, trained, self.workdir, evaluation, (after,) if after else ())

    def study(self, cells_of: Callable[["Settings"], Sequence[Cell]]) -> list[Cell]:
        """The cells of all folds (of the one dataset without folds), with the results that are
        kept.

        Args:
          cells_of: settings of one dataset -> its cells.
        """
        if not self.folds:
            return keeping(cells_of(self._replace(kept=None)), self.kept)
        of_folds = [of_fold(cells_of(self.fold(k)), k) for k in range(self.folds)]
        # all folds of a cell, then the next: a study that is stopped has whole arms
        return keeping([cell for cells in zip(*of_folds, strict=True) for cell in cells], self.kept)


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
