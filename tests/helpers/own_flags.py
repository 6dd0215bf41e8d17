"""The `main` of a command in this process."""

from collections.abc import Callable
from types import ModuleType

import pytest
from absl import flags


def main_of(module: ModuleType, *words: str) -> int:
    """What `main` of a command returns, or raises, for these words of a command line.

    The flags are defined for this call alone: the tests of a process may run commands whose flags
    have the same names. For modules that name their flags as `flags.FLAGS` within functions.
    """
    own = flags.FlagValues()

    def for_own(define: Callable) -> Callable:
        return lambda *arguments, **options: define(*arguments, **options | {"flag_values": own})

    with pytest.MonkeyPatch.context() as patch:
        for name in dir(flags):
            if name.startswith("DEFINE"):
                patch.setattr(flags, name, for_own(getattr(flags, name)))
        patch.setattr(flags, "FLAGS", own)
        module.define_flags()
        return module.main(own([module.__name__, *words]))
