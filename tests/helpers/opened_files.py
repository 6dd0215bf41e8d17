"""Which files a process opens, counted by an audit hook."""

import contextlib
import functools
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
_heard: list[str] = []


def _hear(event: str, arguments: tuple) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        _heard.append(os.path.abspath(os.fsdecode(arguments[0])))


@functools.cache
def _install() -> None:
    sys.addaudithook(_hear)  # for the rest of the process: a hook cannot be removed


@contextlib.contextmanager
def opened_files(*names: str) -> Iterator[list[str]]:
    """The paths of files of these names that are opened in the context; the list is complete at its
    end."""
    _install()
    begin, paths = len(_heard), []
    yield paths
    paths += [path for path in _heard[begin:] if os.path.basename(path) in names]


def listing(*names: str) -> list[str]:
    """What stands for `python -m` in a command line, so that the command lists the files of these
    names that its own process opens: for `listed`."""
    return [sys.executable, __file__, ",".join(names)]


def listed(errors: str) -> list[str]:
    """The paths that a command of `listing` wrote to its error stream, sorted."""
    lines = errors.splitlines()
    return sorted(line.removeprefix("OPENED ") for line in lines if line.startswith("OPENED "))


def opened_by_command(module: str, *flags: object, names: tuple[str, ...]) -> list[str]:
    """The paths of files of these names that a command opens in its own process, sorted; it must
    end with code 0."""
    command = [*listing(*names), module, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
    return listed(done.stderr)


if __name__ == "__main__":
    names, module = sys.argv[1:3]
    sys.path[0] = str(PROJECT)
    sys.argv = sys.argv[2:]
    try:
        with opened_files(*names.split(",")) as heard:
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            except SystemExit as end:
                code = end.code
    finally:
        print(*[f"OPENED {path}" for path in heard], sep="\n", file=sys.stderr)
    sys.exit(code)
