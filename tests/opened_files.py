"""Which files this process opens, counted by an audit hook."""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator

_heard: list[str] = []


def _hear(event: str, arguments: tuple) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        _heard.append(os.fsdecode(arguments[0]))


@functools.cache
def _install() -> None:
    sys.addaudithook(_hear)  # for the rest of the process: a hook cannot be removed


@contextlib.contextmanager
def opened_files(name: str) -> Iterator[list[str]]:
    """The paths by which files of this name are opened in the context; the list is complete at its end."""
    _install()
    begin, paths = len(_heard), []
    yield paths
    paths += [path for path in _heard[begin:] if os.path.basename(path) == name]
