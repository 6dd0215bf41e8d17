"""A trained model applied to scans: embeddings, class probabilities, masks.

from ctssl_jax.inference import Request, embed, load, predict

facts = embed("RUN", "SCANS", "EMBEDDINGS.parquet")
prediction = predict("RUN", Request("SCAN.zip"), "FOLDER")
z = load("RUN").embed("SCAN.zip")  # z.slices [S, D], z.mean [D], z.max [D]
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctssl_jax.inference.embedding import embed
    from ctssl_jax.inference.prediction import Request, predict
    from ctssl_jax.inference.pretrained import load

__all__ = ["Request", "embed", "load", "predict"]


def __getattr__(name: str) -> Any:
    if name == "embed":  # when it is first used: JAX takes seconds to import
        from ctssl_jax.inference.embedding import embed

        return embed
    if name in ("Request", "predict"):
        from ctssl_jax.inference import prediction

        return getattr(prediction, name)
    if name == "load":
        from ctssl_jax.inference.pretrained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
