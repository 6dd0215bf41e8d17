"""manifest.json of exported folders: what the weights beside it are.

It is written by `ctssl_jax.export`. Every field is checked before it is used.
"""

import json
from pathlib import Path
from typing import Any

from data_prep.system.errors import InputError

FORMAT_VERSION = 1  # as in ctssl_torch.py
_FIELDS = ("architecture", "model", "preprocessing", "training", "data", "files")


def find_manifest(checkpoint: Path, flag: str) -> dict[str, Any] | None:
    """The manifest of an exported folder, or of a weights file in it; None for other weights.

    Args:
      checkpoint: the folder or the file.
      flag: the flag or field with which the user named the path, for messages.

    Raises:
      InputError: a folder without a manifest, or a damaged manifest.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    path = folder / "manifest.json"
    if not path.is_file():
        if checkpoint.is_dir():
            raise InputError(
                f"{flag}={checkpoint} does not contain a manifest.json; give a folder of "
                "ctssl_jax.export, or a weights file"
            )
        return None
    manifest = read_manifest(path, flag)
    return manifest if checkpoint.is_dir() or checkpoint.name in manifest["files"] else None


def read_manifest(path: Path, flag: str) -> dict[str, Any]:
    """The manifest of an exported folder.

    Raises:
      InputError: not JSON, of another version, or without the fields that an import needs.
    """
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{flag}: {path} is damaged or not a manifest of ctssl_jax.export; copy the whole "
            "folder again"
        ) from None
    missing = [name for name in _FIELDS if name not in manifest]
    if version != FORMAT_VERSION or missing:
        problem = (
            f"has format_version {version}" if version != FORMAT_VERSION else f"lacks {missing[0]}"
        )
        raise InputError(
            f"{flag}: {path} {problem}; this version reads {FORMAT_VERSION}, so export it again"
        )
    if not _is_sound(manifest):
        raise InputError(f"{flag}: {path} is damaged; copy the whole folder again")
    return manifest


def _is_sound(manifest: dict[str, Any]) -> bool:
    """Whether the fields that an import reads have the types that an export writes."""
    training, preprocessing = manifest["training"], manifest["preprocessing"]
    dictionaries = [manifest[name] for name in _FIELDS[1:]]
    try:
        dictionaries += [training["config"], manifest["data"]["splits"]]
        windows = [(float(level), float(width)) for level, width in preprocessing["windows"]]
        step, task = training["checkpoint_step"], training["task"]
    except (KeyError, TypeError, ValueError):
        return False
    are_dictionaries = all(isinstance(value, dict) for value in dictionaries)
    return (
        are_dictionaries
        and bool(windows)
        and isinstance(step, int)
        and step >= 0
        and isinstance(task, str)
    )
