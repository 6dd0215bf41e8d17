r"""DINO (arXiv 2104.14294), not in the paper: a student names views as its own moving average does.

    ctssl train --config=dino \
        --config.dataset=DATASET --workdir=RUN --config.dtype=bfloat16

Needs an accelerator. Not run at this size; the hours are not known.

The encoder is that of `masked_region`. The loss is the cross-entropy between the prototypes of all
views and those that a teacher gives the global views. The teacher follows the student; it and its
centre are in each checkpoint. Embeddings and exports are of the student. The best checkpoint is the
one whose features tell best where in the scan a slice lies (position_r2, of patients left out of
the fit).
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
    """Two global and eight local views; a head of 2,048, 2,048, 256 and 4,096 prototypes."""
    small = is_small(size)
    config = ml_collections.ConfigDict()
    config.recipe = "dino_small" if small else "dino"
    config.task = "dino"
    config.update(dataset(image_size=64 if small else 512))
    config.update(initial_weights(init_scope="encoder"))

    config.num_steps = 1_000 if small else 100_000
    config.views = views(small, num_local=2 if small else 8)
    config.model = joint_embedding(
        small,
        projector=(256, 256, 64) if small else (2048, 2048, 256),
        num_prototypes=512 if small else 4096,
    )
    config.teacher = {
        "momentum": 0.99 if small else 0.996,
        "temperature": (0.04, 0.07),
        "warmup_steps": config.num_steps // 10,
        "student_temperature": 0.1,
        "centre_momentum": 0.9,
        "frozen_steps": 30 if small else 2_000,
    }
    config.update(joint_optimizer(small))
    config.update(execution(batch_size=32 if small else 128))
    config.update(reporting(best_by="position_r2", eval_every=500 if small else 2_000))
    return config
