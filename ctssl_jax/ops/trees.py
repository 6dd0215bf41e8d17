"""Trees of arrays as flat dictionaries with readable names."""

import hashlib
from typing import Any

import jax
import numpy as np


def flatten(tree: Any) -> dict[str, Any]:
    """A tree as a flat dictionary with names such as `params/encoder/blocks/0/conv1/kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(template: Any, flat: dict[str, Any]) -> Any:
    """The inverse of `flatten`: the leaves of `flat` in the structure of `template`."""
    paths, structure = jax.tree_util.tree_flatten_with_path(template)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    return jax.tree_util.tree_unflatten(structure, [flat[name] for name in names])


def with_sharding(sharding: jax.sharding.Sharding, tree: Any) -> Any:
    """The shapes of arrays or shapes, on these devices."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def fingerprint(flat: dict[str, Any]) -> str:
    """SHA-256 over names and bytes of a model's tensors, the `model_fingerprint` of results."""
    digest = hashlib.sha256()
    for name in sorted(flat):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(jax.device_get(flat[name])).tobytes())
    return digest.hexdigest()
