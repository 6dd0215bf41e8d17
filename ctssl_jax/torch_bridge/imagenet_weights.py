"""Weights of SE-ResNeXt-50 32x4d from a user's PyTorch file, in either published layout of names:
timm's (`seresnext50_32x4d`, see `names`), or the older layout of the challenge's winner, which
differs in a few words.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ctssl_jax.ops.trees import flatten, unflatten
from ctssl_jax.torch_bridge.manifests import facts_of
from ctssl_jax.torch_bridge.names import from_state_dict, newer_se_resnext_name
from ctssl_jax.torch_bridge.weight_files import read_tensors
from data_prep.system.errors import InputError

# ImageNet weights that were published under the first eight digits of their SHA-256: timm's own,
# Gluon's and the older network's, as timm lists them, and the older network's first release.
PUBLISHED = ("a304a460", "90cf2d6e", "f3651bad", "a260b3a4")


def read_file(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of `config.init_weights` by their names in the file; see `read_tensors`."""
    return read_tensors(path, "config.init_weights")


def pooling_of(path: str | Path) -> str:
    """The pooling of the network that a file of weights was trained with, `timm` or `legacy`.

    An export of this program says it. Each of the two published networks has its own layout of
    names.

    Raises:
      InputError: as `read_file`; a damaged export.
    """
    facts = facts_of(Path(path), "config.init_weights")
    if facts is not None:
        return facts["model"].get("pooling", "legacy")
    older = any(name != newer_se_resnext_name(name) for name in read_file(path))
    return "legacy" if older else "timm"


def load_state_dict(
    tensors: Mapping[str, np.ndarray],
    template: Mapping[str, Any],
    *,
    head: bool,
    path: str | Path = "",
) -> dict[str, np.ndarray]:
    """Rename and transpose all tensors of an SE-ResNeXt in PyTorch.

    Args:
        tensors: by their names in the file, either layout.
        template: leaves of our model with a shape, by flat name, e.g. `params/stem/conv/kernel` and
            `variables/stem/norm/mean`; other names than `params/` and `variables/` are skipped.
        head: also take the linear layer; without it, the linear layer of the file may have other
            classes or be missing.
        path: the file, for the message.

    Returns:
        float32 arrays by the flat names of `template`, without the linear layer if not head.

    Raises:
        InputError: a tensor is missing, left over, or of another shape; names the first of each.
    """
    model = {
        name.split("/", 1)[1]: name
        for name in template
        if name.startswith(("params/", "variables/"))
        and (head or name.split("/")[1] != "classification")
    }
    entries = {newer_se_resnext_name(name): value for name, value in tensors.items()}
    if not head:
        entries = {name: value for name, value in entries.items() if not name.startswith("fc.")}
    shapes = {name: tuple(template[flat].shape) for name, flat in model.items()}
    loaded, misfits = from_state_dict(entries, shapes, "SEResNeXt")
    if misfits:
        raise InputError(
            f"config.init_weights={path} does not fit this model ({misfits.text()}); it must be "
            "an SE-ResNeXt of the same config.model in timm's or the older layout of names"
        )
    return {model[name]: value for name, value in loaded.items()}


def load_into(state: Any, path: str | Path, *, head: bool = False) -> Any:
    """The state with its weights replaced by the weights of a file. The rest of the state, such as
    the optimizer's moments, stays.

    Args:
        state: tree with `params` and `variables`, arrays on their devices.
        path: see `read_file`.
        head: see `load_state_dict`.

    Raises:
        InputError: as `read_file` and `load_state_dict`.
    """
    leaves = flatten(state)
    loaded = load_state_dict(read_file(path), leaves, head=head, path=path)
    moved = {name: jax.device_put(value, leaves[name].sharding) for name, value in loaded.items()}
    return unflatten(state, leaves | moved)
