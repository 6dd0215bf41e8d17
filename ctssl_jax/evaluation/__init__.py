"""Measuring a run on a split of a dataset, and comparing runs.

from ctssl_jax.evaluation import evaluate

result = evaluate("RUN", "DATASET", "test", "RESULT.json")
print(result["metrics"]["ssim"]["mean"], result["metrics"]["ssim"]["ci95"])
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctssl_jax.evaluation.measure import evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    if name == "evaluate":  # when it is first used: JAX takes seconds to import
        from ctssl_jax.evaluation.measure import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
