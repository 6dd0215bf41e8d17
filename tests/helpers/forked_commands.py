"""Runs command lines, each in a process of its own that is forked from one which has read the
libraries: many refusals for the price of one start of Python.

The program reads [[module to import, ...], [[module, word, ...], ...]] as JSON and writes a list of
`Ended`.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[2]


class Ended(NamedTuple):
    """What a command left, as `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


def ended(commands: Sequence[Sequence[str]], imports: Sequence[str] = ()) -> list[Ended]:
    """Run command lines (a module and its words), one after the other, as `python -m` runs them.

    Args:
      commands: none of which uses JAX's devices.
      imports: modules that all of them use; a command's own module is run anew in any case.
    """
    asked = json.dumps([list(imports), [list(map(str, c)) for c in commands]])
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, "-m", "tests.helpers.forked_commands", folder]
        done = subprocess.run(program, cwd=PROJECT, input=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Ended(*one) for one in json.loads(done.stdout)]


def _main() -> None:
    imports, commands = json.load(sys.stdin)
    for name in imports:
        importlib.import_module(name)
    results = []
    files = [Path(sys.argv[1], name) for name in ("stdout", "stderr")]
    for module, *words in commands:
        if (child := os.fork()) == 0:
            for number, file in enumerate(files, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.argv = [module, *words]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            return  # and ends as Python ends
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        results.append([code, *(file.read_text() for file in files)])
    print(json.dumps(results))


if __name__ == "__main__":
    _main()
