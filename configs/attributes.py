r"""A patient attribute from the middle slice, end to end: the paper's baseline in its Figure 6.

    ctssl train --config=attributes \
        --config.dataset=DATASET --workdir=RUN --config.label=sex --config.num_classes=2

Needs an accelerator. Not run at this size; the hours are not known. On an older, easier synthetic
archive (64 x 64 pixels, 48 test patients), 100 steps of `:small` told sex with an AUROC of 0.972.
The whole figure of 18 cells took 8 minutes 41 seconds on two busy CPU cores.

The network is the encoder of the pretraining, with random weights. `ctssl attributes` probes
frozen pretrained encoders. `config.label` names a label of the dataset, or `sex`, `ethnic_group` or
`age` (decades) of its volumes.
"""

import ml_collections

from ctssl_jax.training.blocks import (
    augmentation,
    classifier,
    dataset,
    execution,
    initial_weights,
    is_small,
    optimizer,
    reporting,
)


def get_config(size: str = "reference") -> ml_collections.ConfigDict:
    """The classifier on one slice a volume."""
    small = is_small(size)
    config = ml_collections.ConfigDict()
    config.recipe = "attributes_small" if small else "attributes"
    config.task = "slice_label"
    config.update(dataset(image_size=64 if small else 512))
    config.update(initial_weights(init_scope="encoder"))

    config.label = "sex"
    config.num_classes = 2
    config.slices = "middle"
    config.positive_share = 0.0
    config.shuffled_targets = False
    config.crop = "none"
    config.augmentation = augmentation(shift=0.1, scale=0.1, flip=True) if small else augmentation()
    config.model = classifier(small)

    if small:
        config.update(optimizer("adamw", 2e-3, schedule="cosine", warmup_steps=20))
    else:
        config.update(optimizer("adamw", 1e-4, schedule="cosine"))
    config.num_steps = 150 if small else 2_000
    config.update(execution())
    config.update(reporting(best_by="auroc", eval_every=150 if small else 2_000))
    return config
