"""Measuring a run on a split of a dataset, and comparing runs.

>>> from ctssl_jax.evaluation import evaluate
>>> result = evaluate("run", "dataset", "test", "result.json")
>>> sorted(result["metrics"])
['masked_mse', 'masked_mse_batch_sum', 'mse', 'ssim']
>>> result["metrics"]["ssim"]["num_volumes"], len(result["metrics"]["ssim"]["ci95"])
(2, 2)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctssl_jax.evaluation.measure import evaluate

__all__ = ["evaluate"]

# imported when they are used: JAX takes seconds
_HOMES = {"evaluate": "ctssl_jax.evaluation.measure"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
