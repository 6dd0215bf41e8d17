"""Masked region prediction at 64 x 64 with a small model: minutes on two CPU cores.

    python -m ctssl_jax.train --config=configs/masked_region_small.py --config.dataset=DATASET --workdir=RUN

with a dataset prepared with `--image_size=64`. On the synthetic archive of `python -m experiments.quickstart` (34
patients for training, 7 for the test) it took 290 s on two CPU cores and reached masked MSE 0.0386, MSE 0.0125 and SSIM
0.806 on the test patients; the mean training slice has a masked MSE of 0.0818.

The codebook follows the latents by moving averages, starts from data and revives unused codes: plain gradient updates
let it collapse to a few codes within hundreds of steps.
"""

import ml_collections

from configs import masked_region


def get_config() -> ml_collections.ConfigDict:
    """The default recipe with a small model, a short schedule and a codebook that cannot collapse."""
    config = masked_region.get_config()
    config.recipe = "masked_region_small"
    config.image_size = 64
    config.model.hidden = (24, 48)
    config.model.depth = 6  # the masked square and its surroundings lie within what one output pixel sees
    config.model.vq_update = "ema"
    config.model.vq_init = "data"
    config.model.vq_revive_every = 50
    config.loss.masked_mse = 1.0
    config.learning_rate = 2e-2  # the output layer starts at mid-grey and has far to go to black
    config.schedule = "cosine"
    config.warmup_steps = 50
    config.num_steps = 1_500
    config.batch_size = 16
    config.eval_every = 500
    return config
