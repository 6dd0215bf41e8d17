"""Recipes as text, for readers: the list of all, and every field of one."""

import ast
import textwrap
from pathlib import Path
from typing import Any

from ctssl_jax.runs.run import flat, to_json
from ctssl_jax.training.fields import FIELDS
from ctssl_jax.training.recipe_files import load_recipe, recipe_file, recipe_names

_SIZES = ("reference", "small")
_SECTIONS = {  # first field -> title
    "recipe": "Recipe and task",
    "dataset": "Data",
    "init_from": "Weights of another run",
    "objectives": "Pretext tasks",
    "views.num_global": "Joint embeddings",
    "label": "Labels and masks",
    "model.in_channels": "Model",
    "loss.mse": "Loss",
    "optimizer": "Optimizer",
    "num_steps": "Execution",
    "log_every": "Reports",
}


def list_recipes() -> str:
    """All recipes as text: title with the paper's section; hardware, hours and score."""
    parts = []
    for name in recipe_names():
        title, _, needs = _docstring(name).split("\n\n")[:3]
        parts.append(f"{name}\n{_indented(title, 4)}\n{_indented(needs, 4)}")
    more = (
        "The fields of one: ctssl recipes NAME. A training: ctssl train --config=NAME[:small] ..."
    )
    return "\n\n".join([*parts, more])


def describe(name: str, size: str = "reference") -> str:
    """A recipe as text: its docstring, then every field with its value, type and meaning.

    Raises:
      InputError: there is no such recipe.
    """
    lines = [_docstring(name), "", f"Fields of {name}:{size}, as --config.FIELD=VALUE"]
    for field, value in flat(to_json(load_recipe(name, size))).items():
        known = FIELDS[field]
        lines.append(f"  {field} = {value!r}  ({known.kind.__name__})")
        text = known.meaning + (f" [{', '.join(known.choices)}]" if known.choices else "")
        lines.append(_indented(text, 6))
    return "\n".join(lines)


def markdown() -> str:
    """Every field of every recipe as tables of Markdown, for `configs/README.md`."""
    resolved = {
        size: {name: flat(to_json(load_recipe(name, size))) for name in recipe_names()}
        for size in _SIZES
    }
    lines = []
    for field in FIELDS:
        if field in _SECTIONS:
            lines += ["", f"### {_SECTIONS[field]}", ""]
            lines += ["| field | type | default | of `:small` | in | meaning |", "|" + 6 * "---|"]
        values = [
            {name: of[field] for name, of in resolved[size].items() if field in of}
            for size in _SIZES
        ]
        lines.append(f"| {' | '.join(_cells(field, *values))} |")
    return "\n".join(lines).strip()


def _cells(field: str, reference: dict[str, Any], small: dict[str, Any]) -> tuple[str, ...]:
    """A row of the tables, from the field's value in each recipe that has it."""
    known = FIELDS[field]
    default, of_small = _defaults(reference), _defaults(small)
    if field == "recipe":
        default, of_small = "`NAME`", "`NAME_small`"
    meaning = known.meaning
    if not all(choice in meaning for choice in known.choices):
        meaning += f" ({', '.join(known.choices)})"
    recipes = "all" if len(reference) == len(recipe_names()) else ", ".join(reference)
    of_small = "" if of_small == default else of_small
    return f"`{field}`", known.kind.__name__, default, of_small, recipes, meaning


def _defaults(values: dict[str, Any]) -> str:
    """The most common value, then each other value with its recipes."""
    of_value: dict[str, list[str]] = {}
    for name, value in values.items():
        of_value.setdefault(_code(value), []).append(name)
    common, *others = sorted(of_value.items(), key=lambda item: -len(item[1]))
    return "; ".join([common[0], *(f"{code} in {', '.join(names)}" for code, names in others)])


def _code(value: Any) -> str:
    return f"`{_python(value)}`" if value != "" else "empty"


def _python(value: Any) -> str:
    """A value as `--config.FIELD=VALUE` takes it."""
    if isinstance(value, list):
        return f"({', '.join(map(_python, value))}{',' * (len(value) == 1)})"
    return str(value)


def _docstring(name: str) -> str:
    path = recipe_file(name)
    return ast.get_docstring(ast.parse(Path(path).read_text()))


def _indented(text: str, by: int) -> str:
    margin = by * " "
    return textwrap.fill(
        " ".join(text.split()), 96, initial_indent=margin, subsequent_indent=margin
    )
