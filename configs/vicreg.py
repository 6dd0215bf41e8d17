r"""VICReg (arXiv 2105.04906), not in the paper: two views agree, features vary and do not covary.

    ctssl train --config=vicreg \
        --config.dataset=DATASET --workdir=RUN --config.dtype=bfloat16

Needs an accelerator. Not run at this size; the hours are not known.

The encoder is that of `masked_region`. The loss is 25 * the mean squared difference of two views +
25 * a hinge on standard deviations below 1 + the squared covariances of dimensions, with the
statistics of the whole batch on all devices. The best checkpoint is the one whose features tell
best where in the scan a slice lies (position_r2, of patients left out of the fit).
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
    """Two global views; an expander of 2,048 features, for an encoder of 64."""
    small = is_small(size)
    config = ml_collections.ConfigDict()
    config.recipe = "vicreg_small" if small else "vicreg"
    config.task = "vicreg"
    config.update(dataset(image_size=64 if small else 512))
    config.update(initial_weights(init_scope="encoder"))

    config.num_steps = 1_000 if small else 100_000
    config.views = views(small, num_local=0)
    config.model = joint_embedding(
        small, projector=(256, 256, 256) if small else (2048, 2048, 2048)
    )
    config.loss = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}
    config.update(joint_optimizer(small))
    config.update(execution(batch_size=32 if small else 128))
    config.update(reporting(best_by="position_r2", eval_every=500 if small else 2_000))
    return config
