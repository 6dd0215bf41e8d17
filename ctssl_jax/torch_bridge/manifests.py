"""`manifest.json` of an exported folder, read without trust."""

import json
from pathlib import Path
from typing import Any

from data_prep.system.errors import InputError

FORMAT_VERSION = 1  # as in ctssl_torch.py
_FIELDS = ("architecture", "model", "preprocessing", "training", "data", "files")


def read(path: Path, flag: str) -> dict[str, Any]:
    """The manifest of an exported folder.

    Raises:
      InputError: not JSON, of another version, or without what an import needs.
    """
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{flag}: {path} is no manifest of ctssl_jax.export, or damaged") from None
    missing = [name for name in _FIELDS if name not in manifest]
    if version != FORMAT_VERSION or missing:
        what = f"has format_version {version}" if version != FORMAT_VERSION else f"lacks {missing[0]}"
        raise InputError(f"{flag}: {path} {what}; this version reads {FORMAT_VERSION}: export it again")
    if not _is_sound(manifest):
        raise InputError(f"{flag}: {path} is damaged; copy the whole folder again")
    return manifest


def _is_sound(manifest: dict[str, Any]) -> bool:
    """Whether what an import reads of the fields is of the kind that an export writes."""
    training, preprocessing = manifest["training"], manifest["preprocessing"]
    dictionaries = [manifest[name] for name in _FIELDS[1:]]
    try:
        dictionaries += [training["config"], manifest["data"]["splits"]]
        windows = [(float(level), float(width)) for level, width in preprocessing["windows"]]
        step, task = training["checkpoint_step"], training["task"]
    except (KeyError, TypeError, ValueError):
        return False
    are_dictionaries = all(isinstance(value, dict) for value in dictionaries)
    return are_dictionaries and bool(windows) and isinstance(step, int) and step >= 0 and isinstance(task, str)
