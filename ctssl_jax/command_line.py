"""What every command line of this package does alike: user errors in one line, settings of JAX."""

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from absl import app, flags, logging

from data_prep.system.errors import InputError, RunFailed


def require(package: str, what: str, extra: str) -> None:
    """Refuse where an optional package is not installed.

    Args:
      package: name to import.
      what: that needs it, as the message begins.
      extra: of this package's installation that brings it.

    Raises:
      InputError: says how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{what} needs the package {package}: pip install 'ctssl_jax[{extra}]'")


def run(main: Callable[[list[str]], int | None], verbs: Sequence[str] = ()) -> None:
    """Run `main` under absl; an `InputError` (or one of the dataset's) becomes one line on stderr and exit code 2, what
    failed otherwise (a full disk) one line and exit code 1.

    Args:
      main: gets the program's name and, if there are any, its verb.
      verbs: what may stand on the command line beside options, e.g. `plan`, `run` and `draw`.
    """

    def guarded(argv: list[str]) -> int:
        unexpected = [word for word in argv[1:] if word not in verbs] or argv[2:]
        if unexpected:
            remedy = f"verbs are {', '.join(verbs)}; options" if verbs else "options"
            print(f"error: unexpected argument {unexpected[0]!r}; {remedy} begin with --", file=sys.stderr)
            return 2
        from data_prep.system.errors import DatasetError

        if not flags.FLAGS["verbosity"].present:
            # Notes and tracebacks of libraries (Orbax logs one for each thread) only on request: --verbosity=0
            logging.set_verbosity(logging.WARNING)
            logging.get_absl_handler().addFilter(lambda record: record.exc_info is None)
            sys.unraisablehook = _report_unraisable

        try:
            return main(argv) or 0
        except (InputError, DatasetError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except RunFailed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except OSError as error:
            from data_prep.dataset_writer import explain

            print(f"error: {explain(error)}", file=sys.stderr)
            return 1

    app.run(guarded, flags_parser=_parse_flags)


def _report_unraisable(error: Any) -> None:
    """As usual, but not what TensorStore's threads say dozens of times after a save that failed."""
    if not (error.exc_type is RuntimeError and str(error.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(error)


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, but a flag or a configuration field that cannot be is one line and exit code 2."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, TypeError, OSError) as error:  # the last three: from --config and its fields
        message = str(error).replace("\\n", "\n")
        if "Traceback" in message:  # a recipe refused its argument, `RECIPE.py:ARGUMENT`: what it says stands last
            message = f"{message.split(': ')[0]}: {message.strip().splitlines()[-1].split(': ', 1)[-1]}"
        if isinstance(error, AttributeError):
            message = f"the recipe has no such field: {message}"
        message = " ".join(message.replace("\\", "").split())
        print(f"error: {message}; --help lists the flags", file=sys.stderr)
        sys.exit(2)


def configure_jax() -> None:
    """Settings of every command line: faster convolutions on CPU, and compiled programs kept between runs.

    Must run before JAX is first used. jaxlib 0.10 and 0.11 send the weight gradients of convolutions on CPU to a
    library that uses one core for them; the flag turns that off (a training step takes two thirds of the time on two
    cores, four fifths with 0.11). Other versions of jaxlib end at flags that they do not know, so they get none.
    """
    flag = "--xla_cpu_experimental_ynn_fusion_type"
    if version("jaxlib").startswith(("0.10.", "0.11.")) and flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}=".strip()
    _use_compilation_cache()


def _use_compilation_cache() -> None:
    """Keep compiled programs between runs (in `$JAX_COMPILATION_CACHE_DIR`, else in the user's cache folder)."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "ctssl_jax", "compiled"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)
