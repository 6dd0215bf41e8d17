"""Requests to stop that come before a command has begun its work: it ends at once, with code 75.

Python runs a handler between two steps of the main thread, so not while that thread compiles or
waits in C. The thread of this module hears of a signal at once. This file imports nothing that
takes time, so that a command can call `leave_at_once` before its other imports.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

from data_prep.system import silence

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
EXIT_START_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
STOPPED = "stopped; run the same command again to continue"
_SECONDS_TO_TELL = 2.0

_told: list[Callable[[], None]] = []
_listening = False


def leave_at_once() -> None:
    """From now on, until a handler is set for them, SIGTERM, Ctrl-C and the end of the terminal end
    this process with one line and exit code 75. Call it in the main thread.

    Signals that are ignored stay ignored. Long silences are named from now on, see `silence`.
    """
    silence.watch()
    for number in STOP_SIGNALS:
        if signal.getsignal(number) not in (None, signal.SIG_IGN):
            signal.signal(number, left_to_the_thread)
    _listen()


@contextlib.contextmanager
def ending_with_the_reader() -> Iterator[None]:
    """A reader of this block's output may take the first lines only (`| head`): no error. After it
    a broken pipe is an exception again, as in all of Python: a process that goes on would be gone
    without a word at the next one, such as that of a worker which died."""
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        yield
        sys.stdout.flush()
    finally:
        signal.signal(signal.SIGPIPE, before)


def tell_before_leaving(function: Callable[[], None]) -> None:
    """Call this function before the process ends by `leave_at_once`, for at most two seconds."""
    _told[:] = [function]


def left_to_the_thread(number: int, frame: object) -> None:
    """The handler of signals that end the process by the thread of this module."""


def _listen() -> None:
    global _listening
    if _listening:
        return
    _listening = True
    heard, written = socket.socketpair()
    written.setblocking(False)
    signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    # a forked process would write into its parent's socket
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

    def hear() -> None:
        while numbers := heard.recv(64):
            if any(signal.getsignal(number) is left_to_the_thread for number in numbers):
                _leave(written)

    threading.Thread(target=hear, name="early stop", daemon=True).start()


def _leave(kept: object) -> None:  # `kept`: the socket must not be closed while signals come
    for function in _told:
        telling = threading.Thread(target=function, daemon=True)
        telling.start()
        telling.join(_SECONDS_TO_TELL)
    os.write(2, f"{STOPPED}\n".encode())
    os._exit(EXIT_START_AGAIN)
