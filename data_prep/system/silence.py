"""Says what a command does while it prints nothing: a line on stderr, where that takes long.

    loading      libraries ...
    loading      libraries took 12 s
    compiling    train_step ...
    compiling    train_step took 34 s

What is short is not mentioned. `$CTSSL_QUIET` (any value) turns these lines off. This file imports
nothing that takes time, so that a command can start it before its other imports.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

SECONDS = 3.0  # that a silence may last before it is named
_SECONDS_BETWEEN_LOOKS = 0.2
_IMPORTS = "<frozen importlib._bootstrap>"

_works: list[str] = []  # of the main thread, the outermost first
_watching = False


def watch() -> None:
    """From now on, name long silences of the main thread; further calls have no effect."""
    global _watching
    if _watching or os.environ.get("CTSSL_QUIET"):
        return
    _watching = True
    threading.Thread(target=_watch, name="silence", daemon=True).start()


def begin(work: str) -> None:
    """The main thread begins a work without lines of its own, e.g. `compiling    train_step`.

    The outermost work is named. Other threads' works are not.
    """
    if threading.current_thread() is threading.main_thread():
        _works.append(work)


def end(work: str) -> None:
    """The work of this name that began last ends."""
    if threading.current_thread() is threading.main_thread() and work in _works:
        del _works[len(_works) - 1 - _works[::-1].index(work)]


@contextlib.contextmanager
def work(name: str) -> Iterator[None]:
    """A block between `begin` and `end`."""
    begin(name)
    try:
        yield
    finally:
        end(name)


def _watch() -> None:
    name, began, is_named = "", time.monotonic(), False
    while True:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        now, current = time.monotonic(), _current()
        if current != name:
            if is_named:
                _print(f"{name} took {now - began:.0f} s")
            # imports begin with the process
            name, began, is_named = current, began if not name else now, False
        elif not name:
            began = now
        if name and not is_named and now - began > SECONDS:
            _print(f"{name} ...")
            is_named = True


def _current() -> str:
    """What the main thread does now: a work, imports, or ""."""
    for name in _works[:1]:
        return name
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTS:
            return "loading      libraries"
        frame = frame.f_back
    return ""


def _print(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads them any more
        print(line, file=sys.stderr, flush=True)
