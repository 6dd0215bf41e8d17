"""How widely embeddings spread: sums over batches on the device, the rank that they give, and
numbers of all embeddings of a validation."""

import jax
import jax.numpy as jnp
import numpy as np

_MOST_OF_UNIFORMITY = 2_048  # slices, evenly chosen: of more, all pairs take long


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


def spread(embedding: np.ndarray) -> dict[str, float]:
    """How far apart embeddings [N, D] lie, N >= 2.

    Returns:
      `pairwise_cosine`, the mean cosine of two of them (1: all point the same way); `relative_sd`,
      the root of their variance over the root of their mean squared length (0: all are equal);
      `uniformity`, the logarithm of the mean of exp(-2 d^2) over pairs at distance d of embeddings
      of length 1 (Wang and Isola 2020; 0: all are equal, about -4 at most spread). NaN of fewer
      than two.
    """
    values = np.asarray(embedding, np.float64)
    number = len(values)
    if number < 2:
        return dict.fromkeys(("pairwise_cosine", "relative_sd", "uniformity"), float("nan"))
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    unit = values / np.maximum(lengths, 1e-12)
    cosine = (np.square(unit.sum(axis=0)).sum() - np.square(unit).sum()) / (number * (number - 1))
    deviation = np.sqrt(values.var(axis=0).sum() / max(np.square(lengths).mean(), 1e-24))
    places = np.linspace(0, number - 1, min(number, _MOST_OF_UNIFORMITY)).astype(int)
    products = unit[places] @ unit[places].T
    potential = np.exp(np.minimum(4 * (products - 1), 0))[np.triu_indices(len(places), 1)]
    return {
        "pairwise_cosine": float(cosine),
        "relative_sd": float(deviation),
        "uniformity": float(np.log(potential.mean())),
    }
