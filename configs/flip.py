"""Flip prediction (paper, section II.C.5): was the slice flipped horizontally, vertically or not at all?

    python -m ctssl_jax.train --config=configs/flip.py \
        --config.dataset=DATASET --workdir=RUN --config.dtype=bfloat16

Everything but the label is as in `configs/rotation.py`.
"""

import ml_collections

from configs import rotation


def get_config(size: str = "reference") -> ml_collections.ConfigDict:
    """The rotation recipe with flips."""
    config = rotation.get_config(size)
    config.recipe = config.recipe.replace("rotation", "flip")
    config.task = "flip"
    return config
