"""Optional packages: the command that installs those of an extra."""

import importlib.metadata
import importlib.util

from data_prep.system.errors import InputError

_PROJECT = "ctssl_jax"


def pip_install(extra: str) -> str:
    """The command that installs the packages of an extra, from a checkout and from a wheel alike.

    Args:
      extra: its name in setup.cfg, such as `dicom-seg`.
    """
    mark = f'extra == "{extra}"'
    try:
        required = importlib.metadata.requires(_PROJECT) or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that was never installed
        required = []
    packages = [line.partition(";")[0].strip() for line in required if mark in line]
    return "pip install " + " ".join(f"'{name}'" for name in packages or [f".[{extra}]"])


def require(package: str, user: str, extra: str) -> None:
    """Refuse where an optional package is not installed.

    Args:
      package: name to import.
      user: the part that needs it, the first words of the message.
      extra: of this project's installation that brings it.

    Raises:
      InputError: says how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{user} needs the package {package}: {pip_install(extra)}")
