"""Recipes as text, for readers: the list of all, and every field of one."""

import ast
import textwrap
from pathlib import Path

from ctssl_jax.runs.run import flat, to_json
from ctssl_jax.training.fields import FIELDS
from ctssl_jax.training.recipe_files import load_recipe, recipe_file, recipe_names


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


def _docstring(name: str) -> str:
    path = recipe_file(name)
    return ast.get_docstring(ast.parse(Path(path).read_text()))


def _indented(text: str, by: int) -> str:
    margin = by * " "
    return textwrap.fill(
        " ".join(text.split()), 96, initial_indent=margin, subsequent_indent=margin
    )
