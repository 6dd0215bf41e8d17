r"""Pulmonary embolism on a slice (paper, section II.D): the pretrained encoder, fine-tuned.

    ctssl train --config=pe --config.dataset=DATASET --workdir=RUN \
        --config.init_from=PRETRAINED_RUN --config.train_fraction=0.04 --config.dtype=bfloat16

Needs an accelerator. Not run at this size; the hours are not known. On an older synthetic
archive (64 x 64 pixels, 48 training studies), 150 steps of `:small` reached an AUROC over slices of
0.666 from random weights and 0.681 from masked region prediction with 20 %. A training with its
evaluation took 35 to 75 seconds on two busy CPU cores.

DATASET is made by `ctssl prepare --archive=rsna_pe`. Without `init_from` the encoder
starts from random weights, which is the paper's baseline. Any label of a dataset can be trained on
(`--labels_csv` of `ctssl prepare`): `--config.label=NAME --config.num_classes=K`.
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
    """The classifier on a label of the dataset."""
    small = is_small(size)
    config = ml_collections.ConfigDict()
    config.recipe = "pe_small" if small else "pe"
    config.task = "slice_label"
    config.update(dataset(image_size=64 if small else 512))
    config.update(initial_weights(init_scope="encoder"))

    config.label = "pe_present_on_image"
    config.num_classes = 2
    config.slices = "all"
    config.positive_share = 0.5 if small else 0.0  # 5 % of RSNA's slices are positive
    config.shuffled_targets = False
    config.crop = "none"
    config.augmentation = augmentation(shift=0.1, scale=0.1, flip=True) if small else augmentation()
    config.model = classifier(small)

    if small:
        config.update(optimizer("adamw", 2e-3, schedule="cosine", warmup_steps=20))
    else:
        config.update(optimizer("adamw", 1e-4, schedule="cosine"))
    config.num_steps = 200 if small else 20_000
    config.update(execution())
    config.update(reporting(best_by="auroc", eval_every=200 if small else 2_000))
    return config
