r"""SimCLR (arXiv 2002.05709), not in the paper: a view finds its pair among other patients' views.

    ctssl train --config=simclr \
        --config.dataset=DATASET --workdir=RUN --config.dtype=bfloat16

Needs an accelerator. Not run at this size; the hours are not known.

The encoder is that of `masked_region`. The loss is NT-Xent over the whole batch on all devices.
Pairs of slices of one patient are no negatives: they look alike. A batch of one patient teaches
nothing. The best checkpoint is the one whose features tell best where in the scan a slice lies
(position_r2, of patients left out of the fit).
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
    """Two global views, temperature 0.2."""
    small = is_small(size)
    config = ml_collections.ConfigDict()
    config.recipe = "simclr_small" if small else "simclr"
    config.task = "simclr"
    config.update(dataset(image_size=64 if small else 512))
    config.update(initial_weights(init_scope="encoder"))

    config.num_steps = 1_000 if small else 100_000
    config.views = views(small, num_local=0)
    config.model = joint_embedding(small, projector=(256, 64) if small else (2048, 128))
    config.temperature = 0.2
    config.update(joint_optimizer(small))
    config.update(execution(batch_size=32 if small else 128))
    config.update(reporting(best_by="position_r2", eval_every=500 if small else 2_000))
    return config
