"""Self-supervised pretraining for chest CT in JAX and Flax.

    model = ctssl_jax.load(RUN)
    z = model.embed("scan.zip")      # z.slices [S, D], z.mean [D], z.max [D]

`ctssl_jax.inference.pretrained` lists the methods of a model. Each file here is a command (python
-m ctssl_jax.train --help), each folder a part of the program.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctssl_jax.inference.pretrained import PretrainedModel

__all__ = ["load"]


def load(workdir: Any, checkpoint: str = "best", *, batch_size: int = 0) -> "PretrainedModel":
    """Load the model of a run: `ctssl_jax.inference.load`, imported when it is called."""
    from ctssl_jax.inference import pretrained

    return pretrained.load(workdir, checkpoint, batch_size=batch_size)
