"""Weight files of other programs, read without running code that is in them."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.system.errors import InputError
from data_prep.system.extras import require

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".tar", ".ckpt")
_WRAPPERS = ("model_state", "state_dict", "model")  # entries that may contain the tensors


def read_tensors(path: str | Path, flag: str) -> dict[str, np.ndarray]:
    """The tensors of a weights file by their names in it.

    Args:
      path: `.safetensors`, or a file of `torch.save` with tensors by name, alone or in an entry
        `model_state`, `state_dict` or `model` beside other tensors, numbers and text. A prefix
        `module.` that all names have is removed.
      flag: the flag or field with which the user named the path, for messages.

    Returns:
      arrays by name, floating-point arrays as float32, others with their dtype.

    Raises:
      InputError: the file does not exist, has another ending, is damaged, contains code, or its
        reader is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{flag}={path}: no such file; give a weights file")
    if path.suffix not in SUFFIXES:
        raise InputError(f"{flag}={path}: give a file that ends in {', '.join(SUFFIXES)}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, flag)
    content = _load_without_code(path, flag)
    for name in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    import torch

    if not (
        isinstance(content, Mapping) and content and all(map(torch.is_tensor, content.values()))
    ):
        raise InputError(f"{flag}={path} does not hold tensors by name; save model.state_dict()")
    if any(value.layout != torch.strided for value in content.values()):
        raise InputError(f"{flag}={path} contains sparse tensors; save dense tensors")
    return _plain(
        {
            str(name): (value.float() if value.is_floating_point() else value).detach().numpy()
            for name, value in content.items()
        }
    )


NOTE = "ctssl_jax"  # metadata of a safetensors file; attribute of the dictionary in a .pt file


def read_note(path: Path, flag: str) -> str:
    """The text that `ctssl_jax.export` wrote into a weights file; "" in files of others.

    Args:
      path: as `read_tensors`.
      flag: as `read_tensors`.

    Raises:
      InputError: as `read_tensors`.
    """
    read_tensors(path, flag)
    if path.suffix == ".safetensors":
        import safetensors

        with safetensors.safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get(NOTE, "")
    text = getattr(_load_without_code(path, flag), NOTE, "")
    return text if isinstance(text, str) else ""


def _plain(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors without a common prefix `module.`, floating-point arrays as float32."""
    whole = ("i", "u", "b")
    tensors = {
        name: value if value.dtype.kind in whole else value.astype(np.float32)
        for name, value in tensors.items()
    }
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _read_safetensors(path: Path, flag: str) -> dict[str, np.ndarray]:
    require("safetensors", f"{flag}={path}", "torch")
    import safetensors.numpy

    try:
        return _plain(safetensors.numpy.load_file(path))
    except Exception as error:  # the package raises its own class, in C
        raise InputError(
            f"{flag}={path} is damaged or not a safetensors file ({_first_line(error)}); copy it "
            "again"
        ) from None


def _load_without_code(path: Path, flag: str) -> Any:
    require("torch", f"{flag}={path}", "torch")
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        with open(path, "rb") as file:
            is_pickle = file.read(1) == b"\x80"  # as torch.save wrote before it wrote zip files
        is_whole = zipfile.is_zipfile(path) or is_pickle
        if is_whole and isinstance(error, pickle.UnpicklingError):
            raise InputError(
                f"{flag}={path} holds Python objects beside its tensors, which can run code when "
                "they are loaded, so nothing was loaded; if you trust its source, save only the "
                "tensors: "
                "torch.save({'model_state': torch.load(FILE, weights_only=False)['model_state']}, "
                "NEW_FILE)"
            ) from None
        damaged = "damaged" if is_whole else "truncated"
        raise InputError(
            f"{flag}={path} is {damaged} or not a file of torch.save ({_first_line(error)}); copy "
            "it again"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0][:200]
