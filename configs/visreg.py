r"""VISReg (arXiv 2606.02572), not in the paper: LeJEPA with another regulariser.

    ctssl train --config=visreg \
        --config.dataset=DATASET --workdir=RUN --config.dtype=bfloat16

Needs an accelerator. Not run at this size; the hours are not known.

Model and views are as in `lejepa`. The regulariser adds the squared means, the squared distance of
standard deviations from 1, and the distance of sorted projections from a Gaussian's quantiles, here
of unit variance: those of the paper pull batches of 16 to one point. The gradient does not vanish
where all features are equal. The best checkpoint is the one whose features tell best where in the
scan a slice lies (position_r2, of patients left out of the fit).
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
    """Weight 0.7, since smaller ones do not keep features apart; 1,024 directions."""
    small = is_small(size)
    config = ml_collections.ConfigDict()
    config.recipe = "visreg_small" if small else "visreg"
    config.task = "visreg"
    config.update(dataset(image_size=64 if small else 512))
    config.update(initial_weights(init_scope="encoder"))

    config.num_steps = 1_000 if small else 100_000
    config.views = views(small, num_local=2 if small else 8)
    config.model = joint_embedding(small, projector=(256, 256, 64) if small else (2048, 2048, 256))
    config.regulariser = {"weight": 0.7, "directions": 256 if small else 1_024}
    config.update(joint_optimizer(small))
    config.update(execution(batch_size=32 if small else 128))
    config.update(reporting(best_by="position_r2", eval_every=500 if small else 2_000))
    return config
