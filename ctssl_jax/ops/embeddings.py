"""How widely embeddings spread: sums over batches on the device, and the rank that they give."""

import jax
import jax.numpy as jnp
import numpy as np


def moments(embedding: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
    """Weighted sums from which `effective_rank` is computed; they add up over batches.

    Args:
        embedding: [B, D] float32.
        weight: [B], 0 for padded examples.

    Returns:
        {"weight": scalar, "first": [D], "second": [D, D]}, sums of w, w x and w x x^T.
    """
    weighted = embedding * weight[:, None]
    return {
        "weight": jnp.sum(weight),
        "first": jnp.sum(weighted, axis=0),
        "second": jnp.dot(weighted.T, embedding, precision="highest"),
    }


def effective_rank(sums: dict[str, np.ndarray]) -> float:
    """Number of directions that embeddings spread over: the exponential of the entropy of the
    normalised singular values of the centred embedding matrix [N, D] (Roy and Vetterli 2007).

    Args:
        sums: `moments`, added up over batches.

    Returns:
        1 (all on one line) to min(D, N - 1) (spread equally); 0 where all embeddings are equal.
        Directions whose variance is below 1e-6 of the mean squared length are left out: they are
        float32 rounding.
    """
    count = float(sums["weight"])
    if count < 2:
        return 0.0
    mean = np.asarray(sums["first"], np.float64) / count
    second = np.asarray(sums["second"], np.float64) / count
    variances = np.linalg.eigvalsh(second - np.outer(mean, mean))
    variances = variances[variances > 1e-6 * np.trace(second)]
    if len(variances) == 0:
        return 0.0
    share = np.sqrt(variances) / np.sqrt(variances).sum()
    return float(np.exp(-np.sum(share * np.log(share))))
