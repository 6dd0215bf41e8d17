r"""SparK (arXiv 2301.03580), not in the paper: masked blocks are hidden from every convolution.

    ctssl train --config=spark \
        --config.dataset=DATASET --workdir=RUN --config.dtype=bfloat16

Needs an accelerator; a step costs about half of one of `masked_region`. Not run at this size; the
hours are not known.

The encoder is that of `masked_region`, with the same parameters. Masked positions are zero after
every convolution and count in no batch statistic; mask tokens take their place before a light
decoder, which predicts each masked block with its own mean and deviation taken out. Convolutions
are dense: masked positions cost as much as visible ones. Embeddings are of whole slices. The best
checkpoint is the one whose features tell best where in the scan a slice lies (position_r2, of
patients left out of the fit).
"""

import ml_collections

from ctssl_jax.training.blocks import (
    dataset,
    execution,
    initial_weights,
    is_small,
    joint_optimizer,
    reporting,
    spark,
)


def get_config(size: str = "reference") -> ml_collections.ConfigDict:
    """60 % of the area in blocks of 32 pixels (small: 8)."""
    small = is_small(size)
    config = ml_collections.ConfigDict()
    config.recipe = "spark_small" if small else "spark"
    config.task = "spark"
    config.update(dataset(image_size=64 if small else 512))
    config.update(initial_weights(init_scope="encoder"))

    config.num_steps = 1_500 if small else 100_000
    config.mask = {"fraction": 0.6, "block": 8 if small else 32}
    config.model = spark(small)
    config.update(joint_optimizer(small))
    config.update(execution(batch_size=16 if small else 64))
    config.update(reporting(best_by="position_r2", eval_every=500 if small else 2_000))
    return config
