r"""Nodule segmentation by a standard U-Net of 64 to 1,024 features, beside `nodules`.

    ctssl train --config=nodules_standard_unet \
        --config.dataset=DATASET --workdir=RUN

Needs an accelerator. Not run at this size; the hours are not known. On an older, easier synthetic
archive, 150 steps of `:small` from random weights differed from `nodules` by +0.014, -0.035 and
+0.020 Dice with an eighth, a quarter and all of the training studies. All three intervals contain
zero. """

import ml_collections

from ctssl_jax.training.blocks import (
    augmentation,
    dataset,
    execution,
    initial_weights,
    is_small,
    optimizer,
    reporting,
)


def get_config(size: str = "reference") -> ml_collections.ConfigDict:
    """The nodule task with another network."""
    small = is_small(size)
    config = ml_collections.ConfigDict()
    config.recipe = "nodules_standard_unet_small" if small else "nodules_standard_unet"
    config.task = "segmentation_standard_unet"
    config.update(dataset(image_size=64 if small else 512))
    config.update(initial_weights(init_scope="model"))

    config.positive_share = 0.5
    config.shuffled_targets = False
    config.augmentation = augmentation(shift=0.1, scale=0.1, flip=True)
    config.model = {
        "in_channels": 1,
        "widths": (8, 16, 32, 64, 128) if small else (64, 128, 256, 512, 1024),
    }
    config.loss = {"bce": 1.0, "dice": 1.0}

    if small:
        config.update(optimizer("adamw", 3e-3, schedule="cosine", warmup_steps=20))
    else:
        config.update(optimizer("adamw", 1e-4, schedule="cosine"))
    config.num_steps = 300 if small else 20_000
    config.update(execution())
    config.update(reporting(best_by="dice", eval_every=300 if small else 2_000))
    return config
