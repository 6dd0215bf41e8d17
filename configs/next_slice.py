"""Next-slice prediction with the paper's model (section II.C.1): from one slice, the next one towards superior.

    python -m ctssl_jax.train --config=configs/next_slice.py \
        --config.dataset=DATASET --workdir=RUN --config.dtype=bfloat16

Everything but the pair of slices is as in `configs/masked_region.py`; the loss has no term for a masked region. Pairs
never cross a gap in a scan, and the last slice of a volume is in none as an input.
"""

import ml_collections

from configs import masked_region


def get_config(size: str = "reference") -> ml_collections.ConfigDict:
    """The default recipe with the neighbouring slice as target."""
    config = masked_region.get_config(size)
    config.recipe = config.recipe.replace("masked_region", "next_slice")
    config.task = "next_slice"
    del config.mask
    del config.loss.masked_mse
    config.slice_gap = 1  # the target lies this many slices further towards superior
    return config
