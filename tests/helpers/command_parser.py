"""Parses command lines, each by the flags of its own program, and runs none of them.

The program reads [[module, [word, ...]], ...] as JSON, and writes a list of refusals, "" for none.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import runpy
import subprocess
import sys
from pathlib import Path

from absl import flags

from ctssl_jax.training import recipe_files  # noqa: F401, read once for all command lines
from data_prep.system import command_line, early_stop

PROJECT = Path(__file__).resolve().parents[2]


def refusals(commands: list[tuple[str, list[str]]]) -> list[str]:
    """Why each command line is refused by its program; "" if it is not."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.command_parser"],
        cwd=PROJECT,
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


class _Parsed(Exception):
    """The command line was parsed; its program goes no further."""


def _refusal(command: tuple[str, list[str]]) -> str:
    """In a process of its own, since a program defines its flags for the whole process."""
    module, words = command

    def parse_flags(main, verbs=()):
        rest = flags.FLAGS(sys.argv)[1:]
        if rest[1:] or set(rest) - set(verbs):
            raise flags.Error(f"{rest} is no verb")
        raise _Parsed

    def parse_arguments(parser, *arguments):
        whole(parser, *arguments)
        raise _Parsed

    whole = argparse.ArgumentParser.parse_args
    command_line.run, early_stop.leave_at_once = parse_flags, lambda: None
    argparse.ArgumentParser.parse_args = parse_arguments
    sys.argv = [module, *words]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except _Parsed:
        return ""
    except SystemExit:
        return f"{module} {words}: {printed.getvalue()}"
    except Exception as error:
        return f"{module} {words}: {error}"
    return f"{module} {words}: parses no flags"


if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        print(json.dumps(pool.map(_refusal, json.load(sys.stdin), chunksize=1)))
