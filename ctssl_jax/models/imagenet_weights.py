"""Weights of SE-ResNeXt-50 32x4d from a PyTorch file of the user's, in either published layout of names.

    here                               timm (`seresnext50_32x4d`)        legacy (the winner's)
    stem.conv, stem.norm               conv1, bn1                        layer0.conv1, layer0.bn1
    stages.s.i.conv{k}.conv|norm       layer{s+1}.i.conv{k}|bn{k}        the same
    stages.s.i.squeeze, excite         layer{s+1}.i.se.fc1, fc2          layer{s+1}.i.se_module.fc1, fc2
    stages.s.i.downsample.conv|norm    layer{s+1}.i.downsample.0|1       the same
    classification                     fc                                last_linear
    kernel, bias; scale, bias          weight, bias                      the same
    mean, var                          running_mean, running_var         the same

Convolution kernels are HWIO here and OIHW there, the linear layer's are transposed.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ctssl_jax.checkpoint import flatten, unflatten
from ctssl_jax.command_line import InputError

_PREFIXES = (
    (r"conv1\.|layer0\.conv1\.", "stem/conv/"),
    (r"bn1\.|layer0\.bn1\.", "stem/norm/"),
    (r"(?:fc|last_linear)\.", "classification/"),
    (r"layer(?P<stage>[1-9])\.(?P<block>\d+)\.conv(?P<n>[123])\.", "stages/{stage}/{block}/conv{n}/conv/"),
    (r"layer(?P<stage>[1-9])\.(?P<block>\d+)\.bn(?P<n>[123])\.", "stages/{stage}/{block}/conv{n}/norm/"),
    (r"layer(?P<stage>[1-9])\.(?P<block>\d+)\.(?:se|se_module)\.fc1\.", "stages/{stage}/{block}/squeeze/"),
    (r"layer(?P<stage>[1-9])\.(?P<block>\d+)\.(?:se|se_module)\.fc2\.", "stages/{stage}/{block}/excite/"),
    (r"layer(?P<stage>[1-9])\.(?P<block>\d+)\.downsample\.0\.", "stages/{stage}/{block}/downsample/conv/"),
    (r"layer(?P<stage>[1-9])\.(?P<block>\d+)\.downsample\.1\.", "stages/{stage}/{block}/downsample/norm/"),
)


def read_file(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a weights file by their names there.

    Args:
        path: `.safetensors`, or `.pth` / `.pt` / `.bin` of `torch.save` with nothing but tensors inside (a "state_dict"
            entry is looked into).

    Returns:
        float arrays by name.

    Raises:
        InputError: the file does not exist, has another ending, cannot be read, or its reader is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"config.init_weights={path}: there is no such file")
    if path.suffix == ".safetensors":
        try:
            from safetensors.numpy import load_file
        except ImportError:
            raise InputError(
                f"config.init_weights={path} needs the package safetensors: pip install safetensors"
            ) from None
        try:
            return load_file(path)
        except Exception as error:  # the reader has exceptions of its own kind
            raise InputError(f"config.init_weights={path} is no readable safetensors file: {error}") from None
    if path.suffix not in (".pth", ".pt", ".bin"):
        raise InputError(f"config.init_weights={path}: give a .safetensors, .pth, .pt or .bin file")
    try:
        import torch
    except ImportError:
        raise InputError(f'config.init_weights={path} needs PyTorch: pip install "ctssl_jax[torch]"') from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"config.init_weights={path} is no file of tensors alone: {reason}") from None
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise InputError(f"config.init_weights={path} does not hold tensors by name; save model.state_dict()")
    return {name: tensor.float().numpy() for name, tensor in content.items()}


def load_state_dict(tensors: Mapping[str, np.ndarray], like: Mapping[str, Any], *, head: bool) -> dict[str, np.ndarray]:
    """Rename and transpose the tensors of a PyTorch `SE-ResNeXt`, every one of them or an error.

    Args:
        tensors: by their names there, either layout.
        like: leaves of our model with a shape, by flat name, e.g. `params/stem/conv/kernel` and
            `variables/stem/norm/mean`; other names than `params/` and `variables/` are left alone.
        head: whether the linear layer is taken too; without it, the file's may have other classes or be missing.

    Returns:
        float32 arrays by those flat names, all of `like` but the linear layer's if not head.

    Raises:
        InputError: a tensor is missing, has no place, or has another shape; the first of each is named.
    """
    wanted = {
        name: tuple(leaf.shape)
        for name, leaf in like.items()
        if name.startswith(("params/", "variables/")) and (head or name.split("/")[1] != "classification")
    }
    found, extra = {}, []
    for name, tensor in tensors.items():
        if name.endswith(".num_batches_tracked"):
            continue
        ours = _our_name(name)
        if ours is None or (ours not in wanted and ours.split("/")[1] != "classification"):
            extra.append(f"{name} has no place here")
        elif ours in wanted:
            found[ours] = _our_axes(np.asarray(tensor, np.float32), ours)
    missing = [f"{name.split('/', 1)[1]} is missing there" for name in wanted if name not in found]
    shapes = [
        f"{name.split('/', 1)[1]} has shape {value.shape} there, {wanted[name]} here"
        for name, value in found.items()
        if value.shape != wanted[name]
    ]
    if missing or extra or shapes:
        problems = "; ".join(group[0] for group in (shapes, missing, extra) if group)
        raise InputError(
            f"config.init_weights: the file does not fit this model ({len(missing)} tensors missing, "
            f"{len(extra)} extra, {len(shapes)} of another shape; {problems}); it must be an SE-ResNeXt of the same "
            "config.model in timm's or the older layout of names"
        )
    return found


def load_into(state: Any, path: str | Path, *, head: bool = False) -> Any:
    """The state with a file's weights in place of its own; all else, the optimizer's moments among it, is untouched.

    Args:
        state: tree with `params` and `variables`, arrays on their devices.
        path: see `read_file`.
        head: see `load_state_dict`.

    Raises:
        InputError: as `read_file` and `load_state_dict`.
    """
    leaves = flatten(state)
    loaded = load_state_dict(read_file(path), leaves, head=head)
    moved = {name: jax.device_put(value, leaves[name].sharding) for name, value in loaded.items()}
    return unflatten(state, leaves | moved)


def _our_name(name: str) -> str | None:
    prefix, _, last = name.rpartition(".")
    matches = ((re.fullmatch(pattern, prefix + "."), ours) for pattern, ours in _PREFIXES)
    match, ours = next(((match, ours) for match, ours in matches if match), (None, ""))
    if match is None:
        return None
    groups = match.groupdict()
    if groups:
        ours = ours.format(**groups | {"stage": int(groups["stage"]) - 1})
    kind = "norm" if ours.endswith("norm/") else "convolution"
    names = {
        "norm": {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"},
        "convolution": {"weight": "kernel", "bias": "bias"},
    }[kind]
    if last not in names:
        return None
    return ("variables/" if last.startswith("running_") else "params/") + ours + names[last]


def _our_axes(tensor: np.ndarray, ours: str) -> np.ndarray:
    if not ours.endswith("/kernel"):
        return tensor
    if tensor.ndim == 4:
        return tensor.transpose(2, 3, 1, 0)
    return tensor.T
