"""Measuring a run on a split of a dataset, and comparing runs.

>>> from ctssl_jax.evaluation import evaluate
>>> result = evaluate("run", "dataset", "test", "result.json")
checkpoint   step ... of run: best ...
>>> sorted(result["metrics"])
['masked_mse', 'masked_mse_batch_sum', 'mse', 'ssim']
>>> result["metrics"]["ssim"]["num_volumes"], len(result["metrics"]["ssim"]["ci95"])
(2, 2)
"""

from typing import TYPE_CHECKING

from data_prep.system import lazy_names

if TYPE_CHECKING:
    from ctssl_jax.evaluation.measure import evaluate

__all__ = ["evaluate"]

# imported when they are used: JAX takes seconds
_HOMES = {"evaluate": "ctssl_jax.evaluation.measure"}

__getattr__ = lazy_names.importer(__name__, _HOMES)
