"""The notebook as it is kept: whole, with its outputs, and with names that exist. `.ci/run`
executes it."""

import ast
import copy
import importlib

import pytest

from tests.campaigns import notebook
from tests.test_documents import commands_of, notebook_as_markdown, refused

KEPT = notebook.read()
CODE = [cell for cell in KEPT["cells"] if cell["cell_type"] == "code"]
PYTHON = ["".join(cell["source"]) for cell in CODE if not cell["source"][0].startswith("%%bash")]


def test_it_is_a_notebook_that_was_run_once_from_its_top():
    assert (KEPT["nbformat"], KEPT["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert len({cell["id"] for cell in KEPT["cells"]}) == len(KEPT["cells"])
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    streams = {one["name"] for cell in CODE for one in cell["outputs"] if "name" in one}
    assert streams == {"stdout"}


def test_every_cell_shows_what_it_made():
    assert notebook.problems(KEPT) == []
    assert notebook.NOTEBOOK.stat().st_size <= notebook.MOST_BYTES


def test_a_wrong_output_is_found():
    def found(change):
        planted = copy.deepcopy(KEPT)
        change(next(cell for cell in planted["cells"] if "image/png" in str(cell)))
        return notebook.problems(planted)

    text = {"output_type": "stream", "name": "stdout", "text": ["made /ho", "me/me/RUN\n"]}
    assert "shows nothing" in found(lambda cell: cell.update(outputs=[]))[0]
    assert "shows no picture" in found(lambda cell: cell.update(outputs=[text]))[0]
    assert "names /" in found(lambda cell: cell["outputs"].append(text))[0]
    error = {"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}
    assert "failed" in found(lambda cell: cell["outputs"].append(error))[0]


def test_its_commands_parse():
    commands = list(commands_of(notebook_as_markdown()))
    assert {"data_prep.phantom", "data_prep.prepare", "ctssl_jax.train", "ctssl_jax.predict"} <= {
        module for module, _ in commands
    }
    assert refused({"first_steps.ipynb": commands}) == []


@pytest.mark.parametrize("source", PYTHON)
def test_it_takes_public_names_alone(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith(("data_prep", "ctssl_jax")):
            public = importlib.import_module(node.module).__all__
            assert {alias.name for alias in node.names} <= set(public)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ctssl_jax":
            assert node.attr in importlib.import_module("ctssl_jax").__all__
