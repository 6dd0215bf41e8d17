"""What the command lines of this package do alike: user errors in one line, exit code 2."""

import sys
from collections.abc import Callable

from absl import app, flags


def run(main: Callable[[], int]) -> None:
    """Runs `main` under absl.

    Wrong flags, and ValueError, OSError and RuntimeError of `main`, end in one line on stderr and exit code 2.
    """

    def guarded(argv: list[str]) -> int:
        if len(argv) > 1:
            return _fail(f"unexpected argument {argv[1]!r}; options begin with --")
        try:
            return main()
        except OSError as error:
            from data_prep.dataset_writer import explain

            return _fail(explain(error))
        except (ValueError, RuntimeError) as error:
            return _fail(str(error))

    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(_fail(f"{error}; see --help"))


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
