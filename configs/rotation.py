"""Rotation prediction (paper, section II.C.4): was the slice rotated by 0, 90, 180 or 270 degrees?

    python -m ctssl_jax.train --config=configs/rotation.py \
        --config.dataset=DATASET --workdir=RUN --config.dtype=bfloat16

The encoder is that of `configs/masked_region.py`, with compression and classification layers instead of codebook and
decoder. Data, optimizer and schedule are the same; the loss is the cross-entropy on logits.
"""

import ml_collections

from configs import masked_region


def get_config(size: str = "reference") -> ml_collections.ConfigDict:
    """The default recipe with the classifier and without what only a reconstruction needs."""
    config = masked_region.get_config(size)
    config.recipe = config.recipe.replace("masked_region", "rotation")
    config.task = "rotation"
    for name in ("mask", "loss", "commitment", "ssim_rescale"):
        del config[name]
    for name in [name for name in config.model if name.startswith("vq_")]:
        del config.model[name]
    del config.model.num_codes
    del config.model.output_activation
    config.model.compression = (128, 256)  # features after each 3 x 3 convolution with stride 2 on the latents
    return config
