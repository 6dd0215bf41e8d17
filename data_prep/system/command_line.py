"""The one runner of all command lines: errors in one line, exit codes, requests to stop.

0   finished
1   the world failed (a full disk, a lost worker): one line; or a bug: a traceback
2   the user can mend it (a flag, a file): one line with the remedy
75  stopped before the end (a signal, a lost host): the same command continues
"""

import contextlib
import functools
import os
import re
import shlex
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags, logging

from data_prep.system import stores
from data_prep.system.early_stop import (
    EXIT_START_AGAIN,
    STOP_SIGNALS,
    STOPPED,
    ending_with_the_reader,
    leave_at_once,
    left_to_the_thread,
)
from data_prep.system.errors import InputError, RunFailed, StartAgain
from data_prep.system.files import explain, printable

EXIT_FAILED, EXIT_INPUT = 1, 2
# For what is still open when a command fails. Threads that wait for storage may never end.
LEAVING_SECONDS = 5.0

_PACKAGES = ("data_prep", "ctssl_jax", "experiments")  # whose flags `--help` shows
_handled: list[int] = []  # signals that reached a handler of `stop_signals_handled_by`


def run(main: Callable[[list[str]], int | None], verbs: Sequence[str] = ()) -> None:
    """Run `main` under absl and end the process with one of the exit codes of this module.

    Args:
      main: gets the program's name and, if there are any, its verb.
      verbs: words that the command line may have beside options, e.g. `plan`, `run` and `draw`.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files may be no text at all
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    leave_at_once()  # recipes are read with the flags, and may take their time
    if {"-h", "-help", "--help", "--helpshort"} & set(sys.argv[1:]):
        with ending_with_the_reader():
            print(help_text(verbs))
        sys.exit(0)
    app.run(functools.partial(_run_guarded, main, verbs), flags_parser=_parse_flags)


def help_text(verbs: Sequence[str] = ()) -> str:
    """What `--help` prints: the program's docstring, its verbs, and all of its own flags."""
    program, own, shared = sys.modules["__main__"], [], []
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module == sys.argv[0] or module == program.__name__:
            own += defined
        elif module.partition(".")[0] in _PACKAGES:
            shared += defined
    lines = [(program.__doc__ or "").rstrip()]
    if verbs:
        lines += ["", f"verbs: {', '.join(verbs)}"]
    if not own:
        own, shared = shared, []
    for title, group in (("flags:", own), ("flags that other commands have, too:", shared)):
        if group:
            lines += ["", title, *(_help_of(flag) for flag in group)]
    return "\n".join([*lines, "", "--helpfull lists the flags of libraries, too."])


def _help_of(flag: flags.Flag) -> str:
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    text = flag.help.partition(";\n    repeat this option")[0]
    if isinstance(flag.default, str | int | float | list) and flag.default not in ("", False, []):
        shown = flag.default if isinstance(flag.default, list) else [flag.default]
        text += f" (default {' '.join(map(str, shown))})"
    margin = 8 * " "
    filled = textwrap.fill(text, 96, initial_indent=margin, subsequent_indent=margin)
    return f"  {name}\n{filled}"


def suggest(*command: object, aside: bool = False) -> None:
    """Print the command that most users type next, the last line of a door.

    Args:
      command: its words after `ctssl`.
      aside: on stderr, where what is printed may go to a file or another program.
    """
    line = f"next:        ctssl {shlex.join(map(str, command))}"
    print(line, file=sys.stderr if aside else sys.stdout, flush=True)


def whole_numbers(name: str, words: Sequence[str]) -> list[int]:
    """The numbers of a flag that takes several, from 1 on.

    Args:
      name: of the flag, for the message.
      words: what stands between the commas.

    Raises:
      InputError: one is no whole number above 0, or there is none.
    """
    try:
        numbers = [int(word) for word in words]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise InputError(
            f"--{name}={','.join(words)}: give whole numbers from 1 on, separated by commas"
        )
    return numbers


def beside(workdir: str, ending: str) -> str:
    """A name for results of a run: beside its directory, or here where that is on a store."""
    local = not stores.is_url(workdir)
    return (workdir.rstrip("/") if local else workdir.rstrip("/").rpartition("/")[2]) + ending


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ends with this error."""
    if isinstance(error, StartAgain | KeyboardInterrupt):
        return EXIT_START_AGAIN
    return EXIT_INPUT if isinstance(error, InputError) else EXIT_FAILED


@contextlib.contextmanager
def stop_signals_handled_by(
    handler: Callable[[int, Any], None], numbers: Sequence[int] = STOP_SIGNALS
) -> Iterator[None]:
    """A block of the main thread in which `handler` gets SIGTERM, Ctrl-C and the end of the
    terminal.

    Signals that are ignored stay ignored: under nohup a closed terminal stops nothing.
    """

    def handle(number: int, frame: Any) -> None:
        _handled.append(number)
        handler(number, frame)

    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: old for number, old in before.items() if old not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, old in before.items():
            # The thread of `early_stop` may see a signal only now that was handled in this block.
            late = _handled and old is left_to_the_thread
            signal.signal(number, signal.SIG_DFL if late else old)


def _run_guarded(
    main: Callable[[list[str]], int | None], verbs: Sequence[str], argv: list[str]
) -> int:
    unexpected = [word for word in argv[1:] if word not in verbs] or argv[2:]
    if unexpected:
        remedy = f"choose one of {', '.join(verbs)}; options" if verbs else "options"
        return _fail(EXIT_INPUT, f"unexpected argument {unexpected[0]!r}; {remedy} begin with --")
    if not flags.FLAGS["verbosity"].present:
        # Notes and tracebacks of libraries (Orbax logs one for each thread) only on request:
        # --verbosity=0
        logging.set_verbosity(logging.WARNING)
        logging.get_absl_handler().addFilter(lambda record: record.exc_info is None)
        sys.unraisablehook = _report_unraisable
    try:
        with stop_signals_handled_by(_stop):
            return main(argv) or 0
    except StartAgain as error:  # all is saved, and other processes of a run still end
        return _fail(EXIT_START_AGAIN, str(error))
    except (Exception, KeyboardInterrupt) as error:
        _leave_in_time(exit_code(error))
        if isinstance(error, KeyboardInterrupt):
            return _fail(EXIT_START_AGAIN, STOPPED)
        if isinstance(error, InputError | RunFailed):
            return _fail(exit_code(error), str(error))
        if isinstance(error, OSError):
            return _fail(EXIT_FAILED, explain(error))
        if line := stores.failed(error):
            return _fail(EXIT_FAILED, f"{line}; then run the same command again")
        raise


def _stop(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)  # the second time it ends at once
    raise KeyboardInterrupt  # handlers of errors let it through


def _report_unraisable(error: Any) -> None:
    """As usual, without the line that TensorStore's threads print dozens of times after a failed
    save."""
    if not (error.exc_type is RuntimeError and str(error.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(error)


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser; a wrong flag or configuration field is one line and exit code 2."""
    try:
        return flags.FLAGS(argv)
    # --config and its fields raise the last three
    except (flags.Error, AttributeError, TypeError, OSError) as error:
        message = str(error).replace("\\n", "\n").replace("\\", "")
        if missing := re.findall(r"Flag (--\w+) must have a value other than None", message):
            message = f"give {' and '.join(missing)}"
        if refusals := [cause for cause in _causes(error) if isinstance(cause, InputError)]:
            # The recipe itself refused; the message around it is a traceback.
            message = f"--config: {refusals[-1]}"
        elif isinstance(error, AttributeError):
            message = f"the recipe has no such field: {message}"
        sys.exit(_fail(EXIT_INPUT, f"{message}; --help lists the flags"))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__context__


def _fail(code: int, message: str) -> int:
    """Print one line; a stop is not an error."""
    prefix = "" if code == EXIT_START_AGAIN else "error: "
    print(prefix + printable(" ".join(message.split())), file=sys.stderr)
    return code


def _leave_in_time(code: int) -> None:
    """End the process after at most `LEAVING_SECONDS`, whatever its other threads wait for."""
    leave = threading.Timer(LEAVING_SECONDS, os._exit, [code])
    leave.daemon = True
    leave.start()
