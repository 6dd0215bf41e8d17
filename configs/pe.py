r"""Pulmonary embolism on a slice (paper, section II.D): the pretrained encoder with classification layers, fine-tuned.

    python -m ctssl_jax.train --config=configs/pe.py --config.dataset=DATASET --workdir=RUN \
        --config.init_from=PRETRAINED_RUN --config.train_fraction=0.04 --config.dtype=bfloat16

DATASET is made by `python -m data_prep.prepare --archive=rsna_pe`; without `init_from` the encoder starts from random
weights, the paper's baseline. Any label of a dataset goes the same way (`--labels_csv` of `data_prep.prepare`):
`--config.label=NAME --config.num_classes=K`.
"""

import ml_collections

from configs import rotation


def get_config(size: str = "reference") -> ml_collections.ConfigDict:
    """The rotation recipe's classifier on a label of the dataset."""
    config = rotation.get_config(size)
    config.recipe = config.recipe.replace("rotation", "pe")
    config.task = "slice_label"
    config.init_scope = "encoder"
    config.label = "pe_present_on_image"  # a label of the dataset, of slices, volumes or patients
    config.num_classes = 2
    config.slices = "all"  # all, or middle: one slice a volume (its largest body cross-section)
    config.positive_share = 0.0  # share of positive slices in training batches (5 % in RSNA); 0 takes them as they come
    config.crop = "none"  # none, or lung_box: the volume's lungs, enlarged to the whole image
    config.augmentation = no_augmentation()
    config.optimizer = "adamw"
    config.learning_rate = 1e-4
    config.schedule = "cosine"
    config.num_steps = 20_000
    if size == "small":
        config.learning_rate = 2e-3
        config.warmup_steps = 20
        config.num_steps = 200
        config.eval_every = 200
        config.positive_share = 0.5
        config.augmentation.shift = 0.1
        config.augmentation.scale = 0.1
        config.augmentation.flip = True
    return config


def no_augmentation() -> ml_collections.ConfigDict:
    """Strengths of the augmentations of training slices, all off."""
    return ml_collections.ConfigDict(
        {
            "contrast": 0.0,  # factor of the distance from the mean grey value, 1 - c to 1 + c
            "shift": 0.0,  # of the side, each way
            "scale": 0.0,  # 1 - s to 1 + s
            "rotation_degrees": 0.0,  # each way
            "cutout_holes": 0,
            "cutout_side": 0.0,  # of the side, at most
            "flip": False,  # left and right, every other time
        }
    )
