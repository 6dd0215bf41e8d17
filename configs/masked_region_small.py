"""Masked region prediction at 128 x 128 with a small model: minutes on two CPU cores.

    python -m ctssl_jax.train --config=configs/masked_region_small.py --config.dataset=DATASET --workdir=RUN

with a dataset prepared with `--image_size=128`. The codebook follows the latents by moving averages, starts from data
and revives unused codes: plain gradient updates let it collapse to a few codes within hundreds of steps.
"""

import ml_collections

from configs import masked_region


def get_config() -> ml_collections.ConfigDict:
    """The default recipe with a small model, a short schedule and a codebook that cannot collapse."""
    config = masked_region.get_config()
    config.recipe = "masked_region_small"
    config.image_size = 128
    config.model.hidden = (16, 32)
    config.model.depth = 4
    config.model.vq_update = "ema"
    config.model.vq_init = "data"
    config.model.vq_revive_every = 50
    config.learning_rate = 3e-2
    config.schedule = "cosine"
    config.warmup_steps = 50
    config.num_steps = 2_500
    config.batch_size = 8
    config.eval_every = 500
    return config
