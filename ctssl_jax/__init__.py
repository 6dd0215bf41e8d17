"""Self-supervised pretraining for chest CT in JAX and Flax: data loading, models, training,
evaluation.

model = ctssl_jax.load(RUN)
z = model.embed("scan.zip")      # z.slices [S, D], z.mean [D], z.max [D]; see
`ctssl_jax.inference.pretrained`
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctssl_jax.inference.pretrained import PretrainedModel

__all__ = ["load"]


def load(workdir: Any, checkpoint: str = "best", *, batch_size: int = 0) -> "PretrainedModel":
    """A run's model as a function of scans: `ctssl_jax.inference.load`, imported when it is
    called."""
    from ctssl_jax.inference import pretrained

    return pretrained.load(workdir, checkpoint, batch_size=batch_size)
