"""`manifest.json` of an exported folder, read without trust."""

import json
from pathlib import Path
from typing import Any

from ctssl_jax.command_line import InputError

FORMAT_VERSION = 1  # as in ctssl_torch.py
_FIELDS = ("architecture", "model", "preprocessing", "training", "data", "files")


def read(path: Path, flag: str) -> dict[str, Any]:
    """The manifest of an exported folder.

    Raises:
      InputError: not JSON, of another version, or without what an import needs.
    """
    try:
        manifest = json.loads(path.read_text())
        missing = [name for name in _FIELDS if name not in manifest]
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{flag}: {path} is no manifest of ctssl_jax.export, or damaged") from None
    nested = [name for name in _FIELDS[1:] if name not in missing and not isinstance(manifest[name], dict)]
    if not nested and not missing:
        training, preprocessing = manifest["training"], manifest["preprocessing"]
        try:
            [(float(level), float(width)) for level, width in preprocessing["windows"]]
            sound = isinstance(training["config"], dict) and int(training["checkpoint_step"]) >= 0
            sound = sound and isinstance(training["task"], str) and isinstance(manifest["data"]["splits"], dict)
        except (KeyError, TypeError, ValueError):
            sound = False
        nested = [] if sound else ["training, preprocessing or data"]
    if nested:
        raise InputError(f"{flag}: {path} is damaged ({nested[0]} is not as ctssl_jax.export writes it)")
    if version != FORMAT_VERSION or missing:
        what = f"has format_version {version}" if version != FORMAT_VERSION else f"lacks {missing[0]}"
        raise InputError(f"{flag}: {path} {what}; this version reads {FORMAT_VERSION}: export it again")
    return manifest
