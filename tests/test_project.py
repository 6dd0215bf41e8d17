"""The project around the code: light command lines, no machine named anywhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "data_prep.prepare",
    "data_prep.describe",
    "data_prep.merge",
    "data_prep.fetch",
    "data_prep.phantom",
    "ctssl_jax.train",
    "ctssl_jax.evaluate",
    "ctssl_jax.probe",
    "ctssl_jax.attributes",
    "ctssl_jax.views",
    "ctssl_jax.neighbours",
    "experiments.quickstart",
    "experiments.chain",
    "experiments.table2",
    "experiments.recipe_choices",
    "experiments.table1",
    "experiments.figure3",
    "experiments.figure4",
    "experiments.figure5",
    "experiments.figure_s1",
    "experiments.figure6",
    "experiments.confounds",
    "experiments.objectives",
)


@pytest.mark.parametrize("module", COMMANDS)
def test_help_needs_no_heavy_library(module):
    """`--help` prints the module's docstring, and neither jax nor TFDS is imported for it."""
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['{module}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('{module}', run_name='__main__')\n"
        "except SystemExit:\n"
        "    pass\n"
        "print('HEAVY', [name for name in ('jax', 'tensorflow_datasets', 'matplotlib') if name in "
        "sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )
    assert "flags:" in result.stdout, result.stderr
    assert "HEAVY []" in result.stdout


@pytest.mark.parametrize("module", COMMANDS)
def test_an_unknown_flag_is_one_clear_line(module):
    result = subprocess.run(
        [sys.executable, "-m", module, "--no_such_flag=1"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode != 0
    assert "no_such_flag" in result.stderr and "Traceback" not in result.stderr


def test_command_lines_can_be_imported_together():
    """A module that is not the program defines no flag, or two of the same name would meet."""
    doors = [*(PROJECT / "data_prep").glob("*.py"), *(PROJECT / "ctssl_jax").glob("*.py")]
    names = [f"{path.parent.name}.{path.stem}" for path in sorted(doors)]
    imports = "; ".join(f"import {name.removesuffix('.__init__')}" for name in names)
    done = subprocess.run(
        [sys.executable, "-c", imports], capture_output=True, text=True, cwd=PROJECT
    )
    assert done.returncode == 0, done.stderr


def test_repository_names_no_machine():
    """No absolute home or workspace path in any tracked text."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        path = PROJECT / name
        if path.suffix in (".py", ".md", ".cfg", ".toml", ""):
            text = path.read_text()
            found = re.findall(r"(?<![\w.])/(?:home|root|Users|mnt|opt)/\w+", text)
            assert not found, f"{name}: {found}"
