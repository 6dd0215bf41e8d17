r"""Several objectives at once, not in the paper: one encoder, a head for each, losses added.

    ctssl train --config=mixed \
        --config.objectives='(("masked_region", 1.0), ("lejepa", 0.5))' \
        --config.dataset=DATASET --workdir=RUN --config.dtype=bfloat16

Needs an accelerator: a step costs as much as those of the objectives together. Not run at this
size; the hours are not known.

Each objective corrupts the same slices in its own way and has a head of its own. `objectives` names
tasks of pretraining with the weights of their losses. The recipe has the fields of all of them;
those of objectives that are not named have no effect. Each report has the loss of every objective
and the norm of its gradient at the encoder. The best checkpoint is the one whose features tell best
where in the scan a slice lies (position_r2, of patients left out of the fit).
"""

import ml_collections

from ctssl_jax.training.blocks import (
    classifier,
    dataset,
    execution,
    initial_weights,
    is_small,
    joint_embedding,
    joint_optimizer,
    reporting,
    spark,
    views,
    vqvae,
)


def get_config(size: str = "reference") -> ml_collections.ConfigDict:
    """Masked region with weight 1 and LeJEPA with weight 0.5."""
    small = is_small(size)
    config = ml_collections.ConfigDict()
    config.recipe = "mixed_small" if small else "mixed"
    config.task = "mixed"
    config.update(dataset(image_size=64 if small else 512))
    config.update(initial_weights(init_scope="encoder"))

    config.num_steps = 1_000 if small else 100_000
    config.objectives = (("masked_region", 1.0), ("lejepa", 0.5))
    config.mask = {"fraction": 0.2, "unit": "area", "margin": 0, "fill": 0.0, "block": 0}
    config.slice_gap = 1
    config.noise = {"fraction": 0.5}
    config.loss = {"mse": 0.2, "masked_mse": 1.0, "masked_l1": 0.0, "vq": 0.8, "ssim": 0.1}
    config.loss.update({"invariance": 25.0, "variance": 25.0, "covariance": 1.0})
    config.commitment = 0.25
    config.ssim_rescale = False
    config.views = views(small, num_local=2 if small else 8)
    config.regulariser = {"weight": 0.05, "directions": 256 if small else 1_024}
    config.temperature = 0.2
    config.teacher = {"momentum": 0.99 if small else 0.996, "temperature": (0.04, 0.07)}
    config.teacher.update({"student_temperature": 0.1, "centre_momentum": 0.9})
    config.teacher.update({"warmup_steps": config.num_steps // 10})
    config.teacher.update({"frozen_steps": 30 if small else 2_000})

    projector = (256, 256, 64) if small else (2048, 2048, 256)
    head = joint_embedding(small, projector=projector, num_prototypes=512 if small else 4_096)
    config.model = vqvae(small) | classifier(small) | spark(small) | head
    config.update(joint_optimizer(small))
    config.update(execution(batch_size=32 if small else 64))
    config.update(reporting(best_by="position_r2", eval_every=500 if small else 2_000))
    return config
