r"""Pulmonary embolism on a slice by SE-ResNeXt-50 32x4d, the RSNA winner's slice stage ("SOTA").

    ctssl train --config=pe_se_resnext \
        --config.dataset=DATASET --workdir=RUN \
        --config.init_weights=seresnext50_32x4d_racm-a304a460.pth --config.dtype=bfloat16

Needs an accelerator. Not run at this size, nor on the synthetic archives; hours and score are not
known.

Three adjacent slices are the channels, level 100 / width 700 (`--window=100,700` of
`ctssl prepare`, one of the defaults of `--archive=rsna_pe`). Each image is stretched from its
minimum to its maximum and cropped to the lungs. Binary cross-entropy, Adam, one epoch, a learning
rate that falls to zero. `init_weights` names your file of ImageNet weights in the layout of timm or
the older one, whose pooling the network takes. Without it training starts from random weights,
which cost the winner about 0.09 of AUROC. A file that is not known by its SHA-256 as one of the
published ones needs `--config.leakage=allow_unchecked`, since nobody can tell whose scans it
learned from; results say it.
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
)


def get_config(size: str = "reference") -> ml_collections.ConfigDict:
    """The winner's network on a label of the dataset."""
    small = is_small(size)
    config = ml_collections.ConfigDict()
    config.recipe = "pe_se_resnext_small" if small else "pe_se_resnext"
    config.task = "slice_label_se_resnext"
    side = 64 if small else 576
    config.update(dataset(image_size=side, windows=((100, 700),), normalize="slice_minmax"))
    config.update(initial_weights(init_scope="model"))
    config.init_weights = ""

    config.label = "pe_present_on_image"
    config.num_classes = 2
    config.slices = "all"
    config.positive_share = 0.5 if small else 0.0
    config.shuffled_targets = False
    config.crop = "lung_box"
    config.augmentation = augmentation(
        contrast=0.2,
        shift=0.2,
        scale=0.2,
        rotation_degrees=20.0,
        cutout_holes=2,
        cutout_side=0.4,
        flip=small,
    )
    if small:
        config.model = {"in_channels": 3, "layers": (1, 1, 1, 1), "width": 16, "groups": 8}
        config.update(optimizer("adamw", 2e-3, schedule="linear", warmup_steps=20))
    else:
        config.model = {"in_channels": 3, "layers": (3, 4, 6, 3), "width": 64, "groups": 32}
        config.update(optimizer("adamw", 4e-4, schedule="linear"))
    config.model.pooling = "auto"  # that of the weights
    config.num_steps = 200 if small else 12_048  # an epoch of the winner's 1,542,133 slices
    config.update(execution(batch_size=16 if small else 128))
    config.update(reporting(best_by="auroc", eval_every=200 if small else 2_000))
    return config
