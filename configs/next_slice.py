r"""Next-slice prediction with the paper's model (section II.C.1): the next slice towards superior.

    ctssl train --config=next_slice \
        --config.dataset=DATASET --workdir=RUN --config.dtype=bfloat16

Needs an accelerator; a step costs as much as in `masked_region` (8.4 hours on one H200). Not run at
this size. On an older, easier synthetic archive (64 x 64 pixels, 7 test patients), `:small` with
`--config.num_steps=750` reached MSE 0.0054 ± 0.0007 and SSIM 0.917 ± 0.007. It was trained in a
study of eight models that took 40 minutes on two busy CPU cores (`ctssl table2`).

Model, data and schedule are as in `masked_region`. The loss has no term for a masked
region. Pairs never cross a gap in a scan, and the last slice of a volume is not an input.
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
    """The autoencoder with the neighbouring slice as target."""
    small = is_small(size)
    config = ml_collections.ConfigDict()
    config.recipe = "next_slice_small" if small else "next_slice"
    config.task = "next_slice"
    config.update(dataset(image_size=64 if small else 512))
    config.update(initial_weights(init_scope="model"))

    config.slice_gap = 1
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
