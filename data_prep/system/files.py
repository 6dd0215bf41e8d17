"""Files that are written whole or not at all, and JSON that is checked when it is read."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.system.errors import InputError


def read_json(path: Path, fields: Sequence[str] = ()) -> Any:
    """Read a JSON file.

    Args:
      path: of the file.
      fields: names that an intact file has.

    Raises:
      InputError: the file is missing, is not JSON, or lacks a field.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); bring back a copy of it") from None
    except ValueError as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is damaged ({reason}); bring back a copy of it") from None
    if missing := [name for name in fields if not isinstance(content, dict) or name not in content]:
        raise InputError(f"{path} is damaged ({missing[0]} is not in it); bring back a copy of it")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one step, see `write_text`."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: a reader sees the old file or the new one, never a part of it.

    After an error the old file is still there and nothing else.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
