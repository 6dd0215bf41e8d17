r"""Masked region prediction with the paper's model (section II.C.2): 101 million parameters.

    ctssl train --config=masked_region \
        --config.dataset=DATASET --workdir=RUN --config.dtype=bfloat16

Needs an accelerator, since a step costs about 10 TFLOP a slice. One H200 does 52.6 slices/s at
batch 16 (bfloat16), so that the 100,000 steps would take 8.4 hours; they were not run.

Every recipe has a size that a laptop trains in minutes, on a dataset prepared with
`--image_size=64`:

    ctssl train --config=masked_region:small \
        --config.dataset=DATASET --workdir=RUN

On an older, easier synthetic archive (34 patients for training, 7 for the test) this took 777 s on
two busy CPU cores. It reached masked MSE 0.0223, MSE 0.0088 and SSIM 0.844 on the test patients;
the mean training slice has a masked MSE of 0.0574. `--config.FIELD=VALUE` overrides any field.

`masked_region:paper` and, at 64 x 64 pixels, `masked_region:paper_small` are the paper's reading
where the default differs: codebook by gradient from a uniform start, the release's loss weights, a
constant rate. `ctssl recipe_choices` measures what each choice costs.
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

PAPER = {"paper": "reference", "paper_small": "small"}  # variant -> its size


def get_config(size: str = "reference") -> ml_collections.ConfigDict:
    """The values of the paper; where it is silent or contradicts itself, of the table in
    configs/README.md. `paper` and `paper_small`: its reading also where the default differs."""
    paper, small = size in PAPER, is_small(PAPER.get(size, size))
    config = ml_collections.ConfigDict()
    config.recipe = "masked_region_small" if small else "masked_region"
    config.task = "masked_region"
    config.update(dataset(image_size=64 if small else 512))
    config.update(initial_weights(init_scope="model"))

    config.mask = {"fraction": 0.2, "unit": "area", "margin": 0, "fill": 0.0, "block": 0}
    config.model = vqvae(small)
    config.loss = {"mse": 0.2, "masked_mse": 1.0 if small else 0.2, "vq": 0.8, "ssim": 0.1}
    config.loss.masked_l1 = 0.0
    config.commitment = 0.25
    config.ssim_rescale = False

    if small:  # the output layer starts at mid-grey and has far to go to black
        config.update(optimizer("radam", 2e-2, schedule="cosine", warmup_steps=50))
    else:
        config.update(optimizer("radam", 1e-3))
    config.num_steps = 1_500 if small else 100_000
    config.update(execution())
    config.update(reporting(best_by="masked_mse", eval_every=500 if small else 2_000))
    if paper:
        config.recipe += "_paper"
        config.model.update({"vq_update": "gradient", "vq_init": "uniform", "vq_revive_every": 0})
        config.loss.masked_mse = 0.2
        config.update(optimizer("radam", 1e-3))
    return config
