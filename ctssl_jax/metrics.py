"""Measures of reconstruction quality and codebook use, and their statistics over volumes and patients.

Functions of images and codes are jax, pure and usable inside jit; statistics over volumes are numpy.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ctssl_jax.models.quantizer import sum_by_code

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1 = 0.01
SSIM_K2 = 0.03


def _gaussian_band(size: int) -> jax.Array:
    """[size - 10, size] float32: row i averages positions i to i + 10 with Gaussian weights (sum 1).

    Computed from iotas while the program runs: as a constant it would add megabytes to the compiled program.
    """
    radius = SSIM_WINDOW // 2
    total = sum(math.exp(-0.5 * (offset / SSIM_SIGMA) ** 2) for offset in range(-radius, radius + 1))
    shape = (size - 2 * radius, size)
    offset = jax.lax.broadcasted_iota(jnp.int32, shape, 1) - jax.lax.broadcasted_iota(jnp.int32, shape, 0) - radius
    weights = jnp.exp(-0.5 * jnp.square(offset.astype(jnp.float32) / SSIM_SIGMA)) / total
    return jnp.where(jnp.abs(offset) <= radius, weights, 0.0)


def ssim(x: jax.Array, y: jax.Array) -> jax.Array:
    """Structural similarity of two batches of images whose values lie in [0, 1] (Wang et al. 2004).

    Gaussian window 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, data range 1, population covariance,
    averaged over the pixels whose whole window lies inside the image and over the channels. Agrees with
    scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=1)` to 1e-5.
    The window is separable and linear, so it is applied as two banded matrix products: faster than
        convolutions.

    Args:
        x, y: [B, H, W, C]; computed in float32.

    Returns:
        [B] float32 in [-1, 1].

    Raises:
        ValueError: an image side is shorter than the window.
    """
    _, height, width, _ = x.shape
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW} pixels a side, got {height} x {width}")
    # Variances do not change when both images are shifted; values around 0 lose fewer digits.
    x = x.astype(jnp.float32).transpose(0, 3, 1, 2) - 0.5
    y = y.astype(jnp.float32).transpose(0, 3, 1, 2) - 0.5
    rows, columns = _gaussian_band(height), _gaussian_band(width)

    moments = jnp.stack([x, y, x * x, y * y, x * y])
    moments = jnp.einsum("mbchw,vw->mbchv", moments, columns, precision="highest")
    moments = jnp.einsum("mbchv,uh->mbcuv", moments, rows, precision="highest")
    mean_x, mean_y = moments[0], moments[1]
    variance_x = moments[2] - mean_x * mean_x
    variance_y = moments[3] - mean_y * mean_y
    covariance = moments[4] - mean_x * mean_y

    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def to_unit_range(images: jax.Array, *, rescale: bool = False) -> jax.Array:
    """Bring predictions into [0, 1] before they are compared: [B, H, W, C] -> [B, H, W, C] float32.

    Args:
        rescale: False clips; True stretches each image from its minimum to its maximum, as the authors'
            release does before SSIM (a constant image becomes 0).
    """
    images = images.astype(jnp.float32)
    if not rescale:
        return jnp.clip(images, 0.0, 1.0)
    low = jnp.min(images, axis=(1, 2, 3), keepdims=True)
    high = jnp.max(images, axis=(1, 2, 3), keepdims=True)
    return (images - low) / jnp.maximum(high - low, 1e-8)


def code_counts(codes: jax.Array, num_codes: int, weight: jax.Array | None = None) -> jax.Array:
    """How often each code occurs: codes [B, h, w] int32 -> [num_codes] float32.

    Args:
        weight: [B], 0 for padded examples; None counts every example once.
    """
    weight = jnp.ones(len(codes), jnp.float32) if weight is None else weight.astype(jnp.float32)
    weights = jnp.broadcast_to(weight[:, None, None], codes.shape)
    return sum_by_code(weights.reshape(-1, 1), codes.reshape(-1), num_codes)[:, 0]


def perplexity(counts: jax.Array | np.ndarray) -> float:
    """Exponential of the entropy of the code frequencies: [K] -> 1 (one code used) to K (all used equally);
    0 without codes."""
    counts = np.asarray(counts, np.float64)
    if counts.sum() == 0:
        return 0.0
    frequency = counts[counts > 0] / counts.sum()
    return float(np.exp(-np.sum(frequency * np.log(frequency))))


def used_codes(counts: jax.Array | np.ndarray) -> int:
    """Number of codes that occur at least once: [K] -> int."""
    return int(np.count_nonzero(np.asarray(counts) > 0))


def codebook_use(counts: jax.Array | np.ndarray | None) -> dict[str, float]:
    """`perplexity`, `used_codes`, `dead_codes` of code counts [K]; empty for None, a model without a codebook."""
    if counts is None:
        return {}
    used = used_codes(counts)
    return {"perplexity": perplexity(counts), "used_codes": used, "dead_codes": len(counts) - used}


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
    """Number of directions that embeddings spread over: the exponential of the entropy of the normalised singular
    values of the centred embedding matrix [N, D] (Roy and Vetterli 2007).

    Args:
        sums: added up from `moments`.

    Returns:
        1 (all on one line) to min(D, N - 1) (spread equally); 0 where all embeddings are equal. A direction whose
        variance is below 1e-6 of the mean squared length counts as none: it is float32 rounding.
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


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a positive example scores higher than a negative one, ties
    counting half.

    Args:
        scores: [N] float.
        positive: [N] bool.

    Returns:
        In [0, 1]; NaN without a positive or without a negative example.
    """
    from sklearn.metrics import roc_auc_score  # a second of start-up that training does not need

    positive = np.asarray(positive, bool)
    if positive.all() or not positive.any():
        return math.nan
    return float(roc_auc_score(positive, scores))


def auroc_one_vs_rest(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes of the AUROC of each class against all others.

    Args:
        probabilities: [N, K] float.
        labels: [N] int in [0, K).

    Returns:
        In [0, 1]; the mean is over the classes for which it is defined, NaN if there is none.
    """
    areas = [auroc(probabilities[:, label], labels == label) for label in range(probabilities.shape[1])]
    defined = [area for area in areas if not math.isnan(area)]
    return sum(defined) / len(defined) if defined else math.nan


def volume_means(
    values: Sequence[float] | np.ndarray, volume_index: Sequence[int] | np.ndarray, num_volumes: int
) -> np.ndarray:
    """Average per-slice values within each volume.

    Args:
        values: [N] one value a slice.
        volume_index: [N] int in [0, num_volumes), the volume of each slice.

    Returns:
        [num_volumes] float64.

    Raises:
        ValueError: a volume without a slice.
    """
    volume_index = np.asarray(volume_index, np.int64)
    counts = np.bincount(volume_index, minlength=num_volumes)
    if np.any(counts == 0):
        raise ValueError(f"volume {int(np.argmin(counts))} has no slice to average")
    return np.bincount(volume_index, weights=np.asarray(values, np.float64), minlength=num_volumes) / counts


def volume_summary(
    volume_values: Sequence[float] | np.ndarray,
    patient_ids: Sequence[str],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, object]:
    """Mean and standard deviation over volumes, with a 95 % bootstrap interval of the mean by patient.

    Volumes of a patient are not independent, so whole patients are drawn with replacement, each with all of
    its volumes; the interval is the 2.5th to 97.5th percentile of the resampled means.

    Args:
        volume_values: [V] one value a volume, from `volume_means`.
        patient_ids: V patients, one a volume.
        num_resamples: bootstrap draws.
        seed: of the draws; the result is a function of the arguments.

    Returns:
        {"mean": float, "sd": float or None with one volume (sample standard deviation over volumes),
        "ci95": [low, high] or None with one patient, "num_volumes": int, "num_patients": int}.

    Raises:
        ValueError: no volume, or lengths that differ.
    """
    values = np.asarray(volume_values, np.float64)
    if len(values) == 0 or len(values) != len(patient_ids):
        raise ValueError(f"need as many patients as volumes and at least one, got {len(values)} and {len(patient_ids)}")
    patients, patient_index = np.unique(np.asarray(patient_ids, dtype=str), return_inverse=True)
    num_patients = len(patients)
    sums = np.bincount(patient_index, weights=values, minlength=num_patients)
    counts = np.bincount(patient_index, minlength=num_patients)
    interval = None
    if num_patients > 1:
        draws = np.random.default_rng(seed).integers(0, num_patients, (num_resamples, num_patients))
        means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
        interval = [float(bound) for bound in np.percentile(means, [2.5, 97.5])]
    return {
        "mean": float(values.mean()),
        "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
        "ci95": interval,
        "num_volumes": len(values),
        "num_patients": num_patients,
    }
