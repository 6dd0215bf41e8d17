r"""Nodule segmentation by a standard U-Net of its own, 64 to 1,024 features: a reference beside `configs/nodules.py`.

python -m ctssl_jax.train --config=configs/nodules_standard_unet.py --config.dataset=DATASET --workdir=RUN
"""

import ml_collections

from configs import nodules


def get_config(size: str = "reference") -> ml_collections.ConfigDict:
    """The nodule recipe with another network."""
    config = nodules.get_config(size)
    config.recipe = config.recipe.replace("nodules", "nodules_standard_unet")
    config.task = "segmentation_standard_unet"
    config.init_scope = "model"
    config.model = ml_collections.ConfigDict()
    config.model.in_channels = 1
    config.model.widths = (8, 16, 32, 64, 128) if size == "small" else (64, 128, 256, 512, 1024)
    return config
