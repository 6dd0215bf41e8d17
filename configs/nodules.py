r"""Nodule segmentation (paper, section II.E): a U-Net whose down branch is the pretrained encoder's compression layers.

    python -m ctssl_jax.train --config=configs/nodules.py --config.dataset=DATASET --workdir=RUN \
        --config.init_from=PRETRAINED_RUN --config.train_fraction=0.1 --config.dtype=bfloat16

DATASET is made by `python -m data_prep.prepare --archive=lidc_idri`, or with `--masks_dir` beside any archive. Without
`init_from` all weights are random: the paper's baseline, the same network. `--config.model.residual_stack=True
--config.init_scope=encoder` takes the encoder's residual blocks, too, as the bottleneck.
"""

import ml_collections

from configs import masked_region, pe


def get_config(size: str = "reference") -> ml_collections.ConfigDict:
    """The pretraining's encoder in a U-Net, on the union of a slice's masks."""
    config = masked_region.get_config(size)
    config.recipe = config.recipe.replace("masked_region", "nodules")
    config.task = "segmentation"
    config.init_scope = "compression"
    for name in ("mask", "commitment", "ssim_rescale"):
        del config[name]
    for name in [name for name in config.model if name.startswith("vq_")]:
        del config.model[name]
    del config.model.num_codes
    del config.model.output_activation
    config.model.residual_stack = False
    config.positive_share = 0.5  # share of slices with foreground in training batches
    config.augmentation = pe.no_augmentation()
    config.augmentation.flip = True
    config.augmentation.shift = 0.1
    config.augmentation.scale = 0.1
    config.loss = ml_collections.ConfigDict()
    config.loss.bce = 1.0
    config.loss.dice = 1.0
    config.optimizer = "adamw"
    config.learning_rate = 1e-4
    config.schedule = "cosine"
    config.num_steps = 20_000
    if size == "small":
        config.learning_rate = 3e-3
        config.warmup_steps = 20
        config.num_steps = 300
        config.eval_every = 300
    return config
