r"""Nodule segmentation (paper, section II.E): a U-Net whose down branch is the pretrained encoder.

    ctssl train --config=nodules --config.dataset=DATASET --workdir=RUN \
        --config.init_from=PRETRAINED_RUN --config.train_fraction=0.1 --config.dtype=bfloat16

Needs an accelerator. Not run at this size; the hours are not known. On an older, easier synthetic
archive (64 x 64 pixels, 40 training studies), 150 steps of `:small` reached Dice 0.475 from random
weights and 0.514 from masked region prediction with 20 %. A training with its evaluation took 35 to
75 seconds on two busy CPU cores.

DATASET is made by `ctssl prepare --archive=lidc_idri`, or with `--masks_dir` beside
any archive. Without `init_from` all weights of the same network are random, which is the paper's
baseline. `--config.model.residual_stack=True --config.init_scope=encoder` also takes the residual
blocks of the encoder, as the bottleneck.
"""

import ml_collections

from ctssl_jax.training.blocks import (
    augmentation,
    dataset,
    execution,
    initial_weights,
    is_small,
    optimizer,
    reporting,
    unet,
)


def get_config(size: str = "reference") -> ml_collections.ConfigDict:
    """The encoder in a U-Net, on the union of all masks of a slice."""
    small = is_small(size)
    config = ml_collections.ConfigDict()
    config.recipe = "nodules_small" if small else "nodules"
    config.task = "segmentation"
    config.update(dataset(image_size=64 if small else 512))
    config.update(initial_weights(init_scope="compression"))

    config.positive_share = 0.5
    config.shuffled_targets = False
    config.augmentation = augmentation(shift=0.1, scale=0.1, flip=True)
    config.model = unet(small)
    config.loss = {"bce": 1.0, "dice": 1.0}

    if small:
        config.update(optimizer("adamw", 3e-3, schedule="cosine", warmup_steps=20))
    else:
        config.update(optimizer("adamw", 1e-4, schedule="cosine"))
    config.num_steps = 300 if small else 20_000
    config.update(execution())
    config.update(reporting(best_by="dice", eval_every=300 if small else 2_000))
    return config
