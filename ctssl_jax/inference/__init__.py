"""A trained model applied to scans: embeddings, class probabilities, masks.

    >>> from ctssl_jax.inference import embed, load
    >>> facts = embed("run", "dataset", "embeddings.npz", split="test")
    checkpoint   step ... of run: best ...
    >>> facts["num_volumes"], facts["num_slices"]
    (2, 24)
    >>> volume = load("run").embed("scan")  # a folder, a zip file or one file
    checkpoint   step ... of run: best ...
    >>> volume.slices.shape, volume.mean.shape, volume.max.shape
    ((21, 4), (4,), (4,))

A run of a label or a segmentation recipe predicts: `predict("run", Request("scan"), "folder")`.
"""

from typing import TYPE_CHECKING

from data_prep.system import lazy_names

if TYPE_CHECKING:
    from ctssl_jax.inference.embedding import embed
    from ctssl_jax.inference.prediction import Request, predict
    from ctssl_jax.inference.pretrained import load

__all__ = ["Request", "embed", "load", "predict"]

_HOMES = {  # imported when they are used: JAX takes seconds
    "Request": "ctssl_jax.inference.prediction",
    "embed": "ctssl_jax.inference.embedding",
    "load": "ctssl_jax.inference.pretrained",
    "predict": "ctssl_jax.inference.prediction",
}

__getattr__ = lazy_names.importer(__name__, _HOMES)
