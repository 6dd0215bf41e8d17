r"""SimMIM (arXiv 2111.09886), not in the paper: masked blocks of a grid, L1 inside them alone.

    ctssl train --config=simmim \
        --config.dataset=DATASET --workdir=RUN --config.dtype=bfloat16

Needs an accelerator; a step costs as much as in `masked_region`. Not run at this size; the hours
are not known.

The task and the model are those of `masked_region`, whose single square is another point of the
same family: `--config.mask.block=0` covers one square of `mask.fraction`. A block of 32 pixels is
small beside the encoder's receptive field of about 162 pixels.
"""

import ml_collections

from ctssl_jax.training.blocks import (
    dataset,
    execution,
    initial_weights,
    is_small,
    optimizer,
    reporting,
    vqvae,
)


def get_config(size: str = "reference") -> ml_collections.ConfigDict:
    """60 % of the area in blocks of 32 pixels (small: 8), L1 inside them."""
    small = is_small(size)
    config = ml_collections.ConfigDict()
    config.recipe = "simmim_small" if small else "simmim"
    config.task = "masked_region"
    config.update(dataset(image_size=64 if small else 512))
    config.update(initial_weights(init_scope="model"))

    block = 8 if small else 32
    config.mask = {"fraction": 0.6, "unit": "area", "margin": 0, "fill": 0.0, "block": block}
    config.model = vqvae(small)
    config.loss = {"mse": 0.0, "masked_mse": 0.0, "masked_l1": 1.0, "vq": 0.8, "ssim": 0.0}
    config.commitment = 0.25
    config.ssim_rescale = False

    if small:
        config.update(optimizer("radam", 2e-2, schedule="cosine", warmup_steps=50))
    else:
        config.update(optimizer("radam", 1e-3))
    config.num_steps = 1_500 if small else 100_000
    config.update(execution())
    config.update(reporting(best_by="masked_mse", eval_every=500 if small else 2_000))
    return config
