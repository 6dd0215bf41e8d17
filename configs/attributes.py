r"""A patient attribute from the raw middle slice, trained end to end: the paper's baseline of its Figure 6.

    python -m ctssl_jax.train --config=configs/attributes.py --config.dataset=DATASET --workdir=RUN \
        --config.label=sex --config.num_classes=2

The encoder is the pretraining's with random weights; `ctssl_jax.attributes` probes frozen pretrained ones. Labels are
those of the dataset, and `sex`, `ethnic_group` and `age` (decades) of its volumes.
"""

import ml_collections

from configs import pe


def get_config(size: str = "reference") -> ml_collections.ConfigDict:
    """The PE recipe on one slice a volume."""
    config = pe.get_config(size)
    config.recipe = config.recipe.replace("pe", "attributes")
    config.label = "sex"
    config.slices = "middle"
    config.positive_share = 0.0
    config.num_steps = 2_000
    if size == "small":
        config.num_steps = 150
        config.eval_every = 150
    return config
