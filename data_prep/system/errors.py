"""The errors that end a command in one line. Any other exception is a bug: a traceback."""


class InputError(ValueError):
    """The user can mend it: exit code 2. The message is one line: the place, the fault, and the
    remedy."""


class DatasetError(InputError):
    """A dataset directory that can't be used."""


class RunFailed(RuntimeError):
    """The world failed, not an input (a full disk, a lost worker): exit code 1. The message is one
    line."""


class StartAgain(RuntimeError):
    """Stopped before the end (a signal, a lost host): exit code 75. The same command continues. One
    line."""
