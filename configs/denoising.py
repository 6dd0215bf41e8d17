r"""Denoising with the paper's model (section II.C.3): half of the pixels are white or black noise.

    ctssl train --config=denoising \
        --config.dataset=DATASET --workdir=RUN --config.dtype=bfloat16

Needs an accelerator; a step costs as much as in `masked_region` (8.4 hours on one H200). Not run at
this size. On an older, easier synthetic archive (64 x 64 pixels, 7 test patients), `:small` with
`--config.num_steps=750` reached MSE 0.0099 ± 0.0016 and SSIM 0.845 ± 0.016. It was trained in a
study of eight models that took 40 minutes on two busy CPU cores (`ctssl table2`).

Model, data and schedule are as in `masked_region`. The loss has no term for a masked
region.
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
    """The autoencoder with salt-and-pepper noise."""
    small = is_small(size)
    config = ml_collections.ConfigDict()
    config.recipe = "denoising_small" if small else "denoising"
    config.task = "denoising"
    config.update(dataset(image_size=64 if small else 512))
    config.update(initial_weights(init_scope="model"))

    config.noise = {"fraction": 0.5}
    config.model = vqvae(small)
    config.loss = {"mse": 0.2, "vq": 0.8, "ssim": 0.1}
    config.commitment = 0.25
    config.ssim_rescale = False

    if small:
        config.update(optimizer("radam", 2e-2, schedule="cosine", warmup_steps=50))
    else:
        config.update(optimizer("radam", 1e-3))
    config.num_steps = 1_500 if small else 100_000
    config.update(execution())
    config.update(reporting(best_by="mse", eval_every=500 if small else 2_000))
    return config
