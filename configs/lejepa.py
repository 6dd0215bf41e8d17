r"""LeJEPA (arXiv 2511.08544), not in the paper: views of a slab agree, features spread evenly.

    ctssl train --config=lejepa \
        --config.dataset=DATASET --workdir=RUN --config.dtype=bfloat16

Needs an accelerator. Not run at this size; the hours are not known.

The encoder is that of `masked_region`; a projector takes the place of codebook and decoder. The
loss is (1 - weight) * the views' mean squared distance from the mean of the global ones + weight *
SIGReg, which compares the projections of the whole batch on all devices (of each microbatch alone)
with a Gaussian, along random directions. There is no teacher. The best checkpoint is the one whose
features tell best where in the scan a slice lies (position_r2, of patients left out of the fit).
"""

import ml_collections

from ctssl_jax.training.blocks import (
    dataset,
    execution,
    initial_weights,
    is_small,
    joint_embedding,
    joint_optimizer,
    reporting,
    views,
)


def get_config(size: str = "reference") -> ml_collections.ConfigDict:
    """Two global and eight local views, weight 0.05, 1,024 directions."""
    small = is_small(size)
    config = ml_collections.ConfigDict()
    config.recipe = "lejepa_small" if small else "lejepa"
    config.task = "lejepa"
    config.update(dataset(image_size=64 if small else 512))
    config.update(initial_weights(init_scope="encoder"))

    config.num_steps = 1_000 if small else 100_000
    config.views = views(small, num_local=2 if small else 8)
    config.model = joint_embedding(small, projector=(256, 256, 32) if small else (2048, 2048, 64))
    config.regulariser = {"weight": 0.05, "directions": 256 if small else 1_024}
    config.update(joint_optimizer(small))
    config.update(execution(batch_size=32 if small else 128))
    config.update(reporting(best_by="position_r2", eval_every=500 if small else 2_000))
    return config
