"""Training of every task: checks and start, the loop, the step, and the cost of a run.

>>> from configs import rotation
>>> from ctssl_jax.training import train
>>> config = rotation.get_config("small")
>>> config.dataset, config.image_size, config.num_steps = "dataset", 16, 1
>>> config.model.hidden, config.model.depth, config.reading_threads = (4, 8), 1, 1
>>> train(config, "trained")  # False: stopped before the last step  # doctest: +ELLIPSIS
devices      ...
True
"""

from typing import TYPE_CHECKING

from data_prep.system import lazy_names

if TYPE_CHECKING:
    from ctssl_jax.training.loop import train

__all__ = ["train"]

# Imported at the first use, since JAX takes seconds.
_HOMES = {"train": "ctssl_jax.training.loop"}

__getattr__ = lazy_names.importer(__name__, _HOMES)
