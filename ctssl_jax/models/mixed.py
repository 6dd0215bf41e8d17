"""The model of several objectives at once: one encoder, and a head for each of them.

Names of the modules, which are the keys of checkpoints:

    encoder.*               as in the autoencoder: encoders move between all tasks
    heads.NAME.*            what the model of the task NAME has beside its encoder
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from ctssl_jax.models.joint_embedding import (
    JointEmbedding,
    JointEmbeddingConfig,
    JointEmbeddingOutput,
    encode,
)


class Mixed(nnx.Module):
    """Models of several tasks that share the encoder of the first.

    Applied to images it is that encoder with the feature of each slice, as a joint embedding.
    """

    architecture = "JointEmbedding"  # of its exports

    def __init__(self, config: JointEmbeddingConfig, models: Mapping[str, Any]):
        """`models`: task -> its model with an `encoder` of its own, all of one size."""
        self.config = config
        self.heads = nnx.Dict(models)
        self.encoder = next(iter(models.values())).encoder
        for model in models.values():
            model.encoder = self.encoder
            if isinstance(model, JointEmbedding) and model.config.num_prototypes:
                model.follow(0.0)  # its teacher had the weights of the encoder that is gone

    def __call__(self, images: jax.Array, *, train: bool) -> JointEmbeddingOutput:
        """As `JointEmbedding`, without dropout."""
        return encode(self.encoder, images, self.config.pooled, train=train)
