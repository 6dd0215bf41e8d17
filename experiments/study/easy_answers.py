"""What copying a slice and filling noise from its neighbours cost, without a model."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from ctssl_jax.data.slices import neighbour_table
from ctssl_jax.ops.corruptions import example_keys, salt_and_pepper
from ctssl_jax.ops.images import SSIM_WINDOW, ssim
from ctssl_jax.stats.bootstrap import interval, patient_bootstrap, weighted_mean, widened
from data_prep.dataset.reader import Dataset

NOISE = 0.5  # share of the pixels, as in the recipe `denoising`
FILL_SIGMA_PX = 0.6
BLOCK = 32  # slices
_ssim = jax.jit(ssim)


def filled(images: np.ndarray, noisy: np.ndarray) -> np.ndarray:
    """Slices [N, H, W, C] whose noisy pixels [N, H, W, 1] are the weighted mean of clean ones."""
    sigma = (0, FILL_SIGMA_PX, FILL_SIGMA_PX, 0)
    clean = 1.0 - noisy
    weights = ndimage.gaussian_filter(clean, sigma, mode="constant")
    means = ndimage.gaussian_filter(images * clean, sigma, mode="constant")
    return np.where(noisy > 0, means / np.maximum(weights, 1e-6), images)


def noise_of_size(pixels: int, seed: int) -> Callable[[np.ndarray], jax.Array]:
    """Records [N] of a split -> [N, pixels, pixels, 1] float32: 1 where `denoising` puts noise."""
    # of a grey image no pixel is white or black but by noise
    grey = np.full((BLOCK, pixels, pixels, 1), 0.5, np.float32)

    @jax.jit
    def noisy(records: jax.Array) -> jax.Array:
        keys = example_keys(jax.random.key(seed), records)
        return (salt_and_pepper(keys, grey, fraction=NOISE) != 0.5).astype(jnp.float32)

    return noisy


def pairs_at(volume: dict[str, Any], distance_mm: float) -> tuple[np.ndarray, float]:
    """Pairs of slices of a volume about this far apart, at least one slice and across no gap.

    Args:
      volume: row of `volumes.csv`.
      distance_mm: 0 for neighbours.

    Returns:
      [N, 2] int64 of slice numbers, and their distance in mm; without pairs where the volume has no
      spacing or is shorter.
    """
    spacing = volume["slice_spacing_mm"]
    if not spacing:
        return np.zeros((0, 2), np.int64), distance_mm
    gap = max(1, round(distance_mm / spacing))
    return neighbour_table([volume | {"first_record": 0}], (0, gap)), gap * spacing


def errors_of(prediction: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Mean MSE and SSIM of slices [N, H, W, C]; no SSIM where its window does not fit."""
    errors = {"mse": float(np.mean(np.square(prediction - target)))}
    if min(target.shape[1:3]) >= SSIM_WINDOW:
        errors["ssim"] = float(np.mean(_in_blocks(_ssim, prediction, target)))
    return errors


def _in_blocks(function: Callable[..., jax.Array], *arrays: np.ndarray) -> np.ndarray:
    """A function of N items, computed in blocks of one size, so that it is compiled once."""
    parts = []
    for first in range(0, len(arrays[0]), BLOCK):
        blocks = [array[first : first + BLOCK] for array in arrays]
        number = len(blocks[0])
        wanted = np.arange(BLOCK) % number
        parts.append(np.asarray(function(*(block[wanted] for block in blocks)))[:number])
    return np.concatenate(parts)


def measured(
    dataset: Dataset, splits: Sequence[str], distances_mm: Sequence[float], seed: int
) -> Iterator[dict[str, Any]]:
    """The errors of each volume: {"patient", "fill": {...}, "copy": {distance: {"mm", ...}}}."""
    for split in splits:
        source = dataset.source(split)
        noise = noise_of_size(dataset.preparation["image_size"], seed)
        for volume in dataset.volumes(split):
            records = volume["first_record"] + np.arange(volume["num_slices"])
            images = np.stack([source[record]["image"] for record in records])
            images = images.astype(np.float32) / 255
            noisy = _in_blocks(noise, records)
            copies = {}
            for distance in distances_mm:
                pairs, mm = pairs_at(volume, distance)
                if len(pairs):
                    errors = errors_of(images[pairs[:, 0]], images[pairs[:, 1]])
                    copies[distance] = {"mm": mm, **errors}
            yield {
                "patient": volume["patient_id"],
                "fill": errors_of(filled(images, noisy), images),
                "copy": copies,
            }


def rows_of(pixels: int, volumes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table for one dataset: first what filling gives, then each distance.

    Args:
      pixels: side of a slice.
      volumes: from `measured`.

    Returns:
      {"pixels", "without training", "mm", "num_patients", and of "mse", "ssim" and, for a distance,
      "minus_fill" (MSE): the mean over volumes, with NAME_low and NAME_high its 95 % interval by
      patient, which are missing with one patient}.
    """
    fill = _means([one["fill"] for one in volumes], [one["patient"] for one in volumes])
    rows = [{"pixels": pixels, "without training": "fill", "mm": None} | fill]
    for distance in sorted({one for volume in volumes for one in volume["copy"]}):
        there = [volume for volume in volumes if distance in volume["copy"]]
        copies = [
            volume["copy"][distance]
            | {"minus_fill": volume["copy"][distance]["mse"] - volume["fill"]["mse"]}
            for volume in there
        ]
        mm = float(np.mean([copy["mm"] for copy in copies]))
        row = {"pixels": pixels, "without training": "copy", "mm": mm}
        rows.append(row | _means(copies, [volume["patient"] for volume in there]))
    return rows


def _means(parts: Sequence[dict[str, float]], patients: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"num_patients": len(set(patients))}
    for name in ("mse", "ssim", "minus_fill"):
        if all(name in part for part in parts):
            statistic = weighted_mean(name, np.array([part[name] for part in parts]))
            estimate, draws = patient_bootstrap(statistic, patients)
            found[name] = estimate[name]
            bounds, _ = interval(draws[name])
            if len(set(patients)) > 1 and bounds:
                low, high = widened(bounds, estimate[name], len(set(patients)))
                found |= {f"{name}_low": low, f"{name}_high": high}
    return found
