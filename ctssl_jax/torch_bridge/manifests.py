"""manifest.json of exported folders: what the weights beside it are.

It is written by `ctssl_jax.export`, which also writes its first fields into the weights files, so
that a file that was moved alone still says what it is. Every field is checked before it is used.
"""

import json
from pathlib import Path
from typing import Any

from ctssl_jax.torch_bridge.weight_files import read_note
from data_prep.system.errors import InputError
from data_prep.system.files import file_sha256

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


def note(manifest: dict[str, Any]) -> str:
    """The fields of a manifest that go into the weights files, as JSON."""
    kept = ("format_version", *_FIELDS)
    return json.dumps({name: manifest[name] for name in kept if name in manifest} | {"files": {}})


def facts_of(path: Path, flag: str) -> dict[str, Any] | None:
    """The fields of the manifest that a weights file was exported with, read from the file itself
    or from the folder around it; None for a file of another program.

    Args:
      path: a weights file.
      flag: the flag or field with which the user named it, for messages.

    Raises:
      InputError: as `read_tensors` of a file that cannot be read; a damaged manifest.
    """
    if text := read_note(path, flag):
        return _checked(text, f"{flag}={path}", "export it again")
    manifest = find_manifest(path, flag)
    if manifest is None or manifest["files"][path.name].get("sha256") != file_sha256(path):
        return None
    return manifest


def read_manifest(path: Path, flag: str) -> dict[str, Any]:
    """The manifest of an exported folder.

    Raises:
      InputError: not JSON, of another version, or without the fields that an import needs.
    """
    try:
        text = path.read_text()
    except (OSError, ValueError):
        text = ""
    return _checked(text, f"{flag}: {path}", "copy the whole folder again")


def _checked(text: str, where: str, remedy: str) -> dict[str, Any]:
    try:
        manifest = json.loads(text)
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{where} is damaged or not a manifest of ctssl_jax.export; {remedy}"
        ) from None
    missing = [name for name in _FIELDS if name not in manifest]
    if version != FORMAT_VERSION or missing:
        problem = (
            f"has format_version {version}" if version != FORMAT_VERSION else f"lacks {missing[0]}"
        )
        raise InputError(
            f"{where} {problem}; this version reads {FORMAT_VERSION}, so export it again"
        )
    if not _is_sound(manifest):
        raise InputError(f"{where} is damaged; {remedy}")
    return manifest


def _is_sound(manifest: dict[str, Any]) -> bool:
    """Whether the fields that an import reads have the types that an export writes."""
    training, preprocessing = manifest["training"], manifest["preprocessing"]
    dictionaries = [manifest[name] for name in _FIELDS[1:]]
    try:
        dictionaries += [training["config"], manifest["data"]["splits"]]
        windows = [(float(level), float(width)) for level, width in preprocessing["windows"]]
        step, task = training["checkpoint_step"], training["task"]
        ancestors = training.get("init_from", [])
    except (KeyError, TypeError, ValueError):
        return False
    are_dictionaries = all(isinstance(value, dict) for value in dictionaries)
    return (
        are_dictionaries
        and bool(windows)
        and isinstance(step, int)
        and step >= 0
        and isinstance(task, str)
        and isinstance(ancestors, list)
        and all(isinstance(ancestor, dict) for ancestor in ancestors)
    )
