"""Denoising with the paper's model (section II.C.3): half of the pixels are turned white or black, all are predicted.

    python -m ctssl_jax.train --config=configs/denoising.py \
        --config.dataset=DATASET --workdir=RUN --config.dtype=bfloat16

Everything but the corruption is as in `configs/masked_region.py`; the loss has no term for a masked region.
"""

import ml_collections

from configs import masked_region


def get_config(size: str = "reference") -> ml_collections.ConfigDict:
    """The default recipe with noise instead of a mask."""
    config = masked_region.get_config(size)
    config.recipe = config.recipe.replace("masked_region", "denoising")
    config.task = "denoising"
    del config.mask
    del config.loss.masked_mse
    config.noise = ml_collections.ConfigDict()
    config.noise.fraction = 0.5  # probability that a pixel is noisy; then it is white or black with equal probability
    return config
