"""Slices, read out of a frozen encoder by a linear decoder and by nearest neighbours.

Every encoder sees the same corruptions, whatever task it was trained on. The validation split
chooses the settings. Nothing here is random.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from ctssl_jax.ops import corruptions, losses
from ctssl_jax.ops.images import ssim, to_unit_images, to_unit_range
from ctssl_jax.probes.encoders import NEIGHBOURS, PATCH, FrozenEncoder
from ctssl_jax.training.state import evaluation_keys

# relative to the variance of a standardised feature
RIDGE_PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
MASK_FRACTION = 0.2  # of the image area
NOISE_FRACTION = 0.5


class ImageTarget(NamedTuple):
    """A slice to reconstruct from a corrupted one or from the slice before it.

    offsets: of the input and the target in the volume; (0,) where they are the same slice.
    corrupt: (keys, images) -> inputs, and region [B, H, W, 1] float32 (1 where covered) or None.
    """

    offsets: tuple[int, ...]
    corrupt: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]


IMAGES = {
    "clean": ImageTarget((0,), lambda keys, images: (images, None)),
    "masked_region": ImageTarget(
        (0,), functools.partial(corruptions.mask_region, fraction=MASK_FRACTION)
    ),
    "denoising": ImageTarget(
        (0,),
        lambda keys, images: (
            corruptions.salt_and_pepper(keys, images, fraction=NOISE_FRACTION),
            None,
        ),
    ),
    "next_slice": ImageTarget((0, 1), lambda keys, images: (images, None)),
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _corrupt(target: ImageTarget, channels: int, normalize: str, images, record_index):
    return target.corrupt(
        evaluation_keys(record_index), to_unit_images(images[:, 0], channels, normalize)
    )


class ImageFeatures(NamedTuple):
    """A batch of encoded slices and their targets.

    latents: [B, h, w, D] float32.
    pooled: [B, F] float32.
    target: [B, H, W, C] uint8.
    region: [B, H, W, 1] float32, 1 where the input was covered; None if nothing was.
    record_index: [B] int32.
    kept: [B] bool, False for padding.
    """

    latents: np.ndarray
    pooled: np.ndarray
    target: np.ndarray
    region: np.ndarray | None
    record_index: np.ndarray
    kept: np.ndarray


def image_features(
    encoder: FrozenEncoder, target: ImageTarget, batches: Iterable[dict[str, np.ndarray]]
) -> Iterator[ImageFeatures]:
    """Corrupt each slice and encode it.

    The target is the windowed slice in [0, 1] whatever grey scale the encoder takes, so that errors
    of encoders can be compared.

    Args:
      encoder: the encoder.
      target: the slice to reconstruct.
      batches: from `data.batches.evaluation_batches` with the offsets of the target.
    """
    for batch in batches:
        inputs, region = _corrupt(
            target, encoder.channels, encoder.normalize, batch["images"], batch["record_index"]
        )
        latents, fetched, region = jax.device_get((*encoder.encode(encoder.state, inputs), region))
        pooled, images = encoder.finish(fetched), batch["images"][:, -1]
        yield ImageFeatures(
            latents, pooled, images, region, batch["record_index"], batch["weight"] > 0
        )


def to_patches(images: np.ndarray) -> np.ndarray:
    """[B, H, W, C] -> [B, H / 4, W / 4, 16 * C]: the pixels that each latent covers."""
    size, height, width, channels = images.shape
    patches = images.reshape(size, height // PATCH, PATCH, width // PATCH, PATCH, channels)
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(size, height // PATCH, width // PATCH, -1)


def from_patches(patches: np.ndarray) -> np.ndarray:
    """The inverse of `to_patches`."""
    size, rows, columns, _ = patches.shape
    images = patches.reshape(size, rows, columns, PATCH, PATCH, -1).transpose(0, 1, 3, 2, 4, 5)
    return images.reshape(size, rows * PATCH, columns * PATCH, -1)


def gram(features: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Sums from which `ridge` and `ridge_error` are computed; they add up over batches.

    Args:
      features: [..., D].
      outputs: [..., P].

    Returns:
      [1 + D + P, 1 + D + P] float64: Z^T Z of the rows Z = (1, features, outputs).
    """
    ones = np.ones((*features.shape[:-1], 1))
    rows = np.concatenate([ones, features, outputs], axis=-1, dtype=np.float64).reshape(
        -1, 1 + features.shape[-1] + outputs.shape[-1]
    )
    return rows.T @ rows


def ridge(sums: np.ndarray, num_features: int, penalty: float) -> np.ndarray:
    """Ridge regression on standardised features, in closed form.

    Args:
      sums: added up from `gram`.
      num_features: D.
      penalty: on the squared weights of standardised features, a row of data counting 1 / N
        (scikit-learn's alpha / N). A constant feature gets weight 0.

    Returns:
      [1 + D, P] float64: intercept, then the weight of each feature, which is not standardised.
    """
    mean = sums[0, 1:] / sums[0, 0]
    covariance = sums[1:, 1:] / sums[0, 0] - np.outer(mean, mean)
    variance, second = (
        np.diag(matrix)[:num_features] for matrix in (covariance, sums[1:, 1:] / sums[0, 0])
    )
    scale = np.sqrt(np.where(variance > 1e-12 * second, variance, np.inf))
    correlation = covariance[:num_features, :num_features] / np.outer(scale, scale)
    weights = np.linalg.solve(
        correlation + penalty * np.eye(num_features),
        covariance[:num_features, num_features:] / scale[:, None],
    )
    weights = weights / scale[:, None]
    return np.concatenate([(mean[num_features:] - mean[:num_features] @ weights)[None], weights])


def ridge_error(sums: np.ndarray, weights: np.ndarray) -> float:
    """Mean squared error of the weights [1 + D, P] of `ridge` on the data behind `sums`."""
    residual = np.concatenate([weights, -np.eye(weights.shape[1])])
    return float(
        np.einsum("ip,ij,jp->", residual, sums, residual, optimize=True)
        / sums[0, 0]
        / weights.shape[1]
    )


def predict_ridge(weights: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """[1 + D, P] and [B, h, w, D] -> [B, 4h, 4w, P / 16] float32."""
    return from_patches((weights[0] + latents @ weights[1:]).astype(np.float32))


class ImageProbes(NamedTuple):
    """Both fitted probes of an image.

    weights: of the linear decoder, [1 + D, 16 * C].
    penalty: of the linear decoder, the chosen one.
    scaler: standardises pooled features.
    neighbours: finds the nearest training slices.
    targets: [N, H, W, C] uint8, of the training slices.
    number: of neighbours, the chosen one.
    """

    weights: np.ndarray
    penalty: float
    scaler: StandardScaler
    neighbours: NearestNeighbors
    targets: np.ndarray
    number: int


def _neighbour_means(
    probes: ImageProbes, pooled: np.ndarray, numbers: Iterable[int]
) -> dict[int, np.ndarray]:
    """Mean target of the nearest training slices: their number -> [B, H, W, C] float32."""
    features = probes.scaler.transform(pooled.astype(np.float64))
    nearest = probes.neighbours.kneighbors(features, max(numbers), return_distance=False)
    total, means = np.zeros((len(pooled), *probes.targets.shape[1:]), np.float32), {}
    for rank in range(nearest.shape[1]):
        total += probes.targets[nearest[:, rank]]
        if rank + 1 in numbers:
            means[rank + 1] = total / np.float32(255 * (rank + 1))
    return means


def fit_images(train: Iterable[ImageFeatures], validation: Iterable[ImageFeatures]) -> ImageProbes:
    """Fit the linear decoder and the nearest neighbours; validation slices choose by MSE.

    The decoder sees one latent at a time and predicts the 4 x 4 pixels that it covers, so all that
    it knows of them is in that latent. Neighbours are nearest by cosine of standardised pooled
    features.

    Args:
      train, validation: from `image_features`.
    """
    sums, pooled, targets = 0.0, [], []
    for batch in train:
        sums = sums + gram(
            batch.latents[batch.kept], to_patches(batch.target[batch.kept] / np.float64(255))
        )
        pooled.append(batch.pooled[batch.kept].astype(np.float64))
        targets.append(batch.target[batch.kept])
        num_features = batch.latents.shape[-1]
    pooled, targets = np.concatenate(pooled), np.concatenate(targets)
    scaler = StandardScaler().fit(pooled)
    neighbours = NearestNeighbors(metric="cosine", algorithm="brute").fit(scaler.transform(pooled))
    probes = ImageProbes(np.zeros(0), 0.0, scaler, neighbours, targets, 0)
    numbers = [number for number in NEIGHBOURS if number <= len(targets)]
    errors, unseen = dict.fromkeys(numbers, 0.0), 0.0
    for batch in validation:
        target = batch.target[batch.kept] / np.float32(255)
        unseen = unseen + gram(batch.latents[batch.kept], to_patches(target))
        for number, means in _neighbour_means(probes, batch.pooled[batch.kept], numbers).items():
            errors[number] += float(np.square(means - target).sum(dtype=np.float64))
    decoders = {penalty: ridge(sums, num_features, penalty) for penalty in RIDGE_PENALTIES}
    penalty = min(decoders, key=lambda penalty: ridge_error(unseen, decoders[penalty]))
    return probes._replace(
        weights=decoders[penalty], penalty=penalty, number=min(errors, key=errors.get)
    )


@jax.jit
def _image_scores(
    prediction: jax.Array, target: jax.Array, region: jax.Array | None
) -> dict[str, jax.Array]:
    target = target.astype(jnp.float32) / 255
    scores = {"mse": losses.mse(prediction, target)}
    if region is not None:
        scores["masked_mse"] = losses.masked_mse(prediction, target, region)
    return scores | {"ssim": ssim(to_unit_range(prediction), target)}


def score_images(
    probes: ImageProbes, batches: Iterable[ImageFeatures]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Score the predictions of both probes.

    Returns:
      `linear/mse`, `linear/ssim`, `knn/mse`, ..., each [N] float32, and record_index [N] int32.
    """
    parts = []
    for batch in batches:
        predictions = {
            "linear": predict_ridge(probes.weights, batch.latents),
            "knn": _neighbour_means(probes, batch.pooled, [probes.number])[probes.number],
        }
        values = {"record_index": batch.record_index}
        for probe, prediction in predictions.items():
            scores = jax.device_get(_image_scores(prediction, batch.target, batch.region))
            values |= {f"{probe}/{name}": value for name, value in scores.items()}
        parts.append({name: value[batch.kept] for name, value in values.items()})
    scores = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return scores, scores.pop("record_index")
