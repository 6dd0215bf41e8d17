r"""Flip prediction (paper, section II.C.5): a slice flipped horizontally, vertically or not at all.

    ctssl train --config=flip \
        --config.dataset=DATASET --workdir=RUN --config.dtype=bfloat16

Needs an accelerator. Not run at this size; the hours are not known. On an older, easier synthetic
archive (64 x 64 pixels, 7 test patients), `:small` with `--config.num_steps=750` reached AUROC
1.0000 and cross-entropy 0.0062 ± 0.0078. It was trained in a study of eight models that took 40
minutes on two busy CPU cores (`ctssl table2`).

The encoder, the data, the optimizer and the schedule are as in `masked_region`.
Compression and classification layers stand in the place of codebook and decoder. The loss is the
cross-entropy on logits.
"""

import ml_collections

from ctssl_jax.training.blocks import (
    classifier,
    dataset,
    execution,
    initial_weights,
    is_small,
    optimizer,
    reporting,
)


def get_config(size: str = "reference") -> ml_collections.ConfigDict:
    """The classifier of the three flips."""
    small = is_small(size)
    config = ml_collections.ConfigDict()
    config.recipe = "flip_small" if small else "flip"
    config.task = "flip"
    config.update(dataset(image_size=64 if small else 512))
    config.update(initial_weights(init_scope="model"))

    config.model = classifier(small)

    if small:
        config.update(optimizer("radam", 2e-2, schedule="cosine", warmup_steps=50))
    else:
        config.update(optimizer("radam", 1e-3))
    config.num_steps = 1_500 if small else 100_000
    config.update(execution())
    config.update(reporting(best_by="cross_entropy", eval_every=500 if small else 2_000))
    return config
