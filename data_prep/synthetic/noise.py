"""Correlated noise and texture as tiles that are cut and flipped for every slice."""

import numpy as np


def noise_tiles(
    size: int, pixel_mm: float, sharp: bool, rng: np.random.Generator
) -> list[np.ndarray]:
    """Two tiles [T, T] float32 of unit variance, T > `size`, with the noise spectrum of a kernel.

    Filtered back projection gives a power spectrum that rises with frequency; a soft kernel then
    cuts it off early, a sharp one lifts the high frequencies.
    """
    side = size + max(64, size // 4)
    frequency = np.hypot(
        np.fft.fftfreq(side, pixel_mm)[:, None], np.fft.rfftfreq(side, pixel_mm)[None, :]
    )
    # Frequencies in line pairs per mm: a soft kernel falls off at about 0.35, a sharp one near 0.9.
    cutoff = 0.9 if sharp else 0.34
    amplitude = (
        np.sqrt(frequency)
        * np.exp(-((frequency / cutoff) ** 2))
        * (1 + (2.5 * frequency if sharp else 0))
    )
    tiles = []
    for _ in range(2):
        white = np.fft.rfft2(rng.standard_normal((side, side), dtype=np.float32))
        tile = np.fft.irfft2(white * amplitude, (side, side))
        tiles.append((tile / tile.std()).astype(np.float32))
    return tiles


def texture_tile(size: int, pixel_mm: float, seed: int) -> np.ndarray:
    """[2 * size, size] float32 of unit variance: the grain of lung, liver and bone, a few mm
    across.

    It repeats after `size` rows, so that a window that moves down it with z gives every slice its
    own grain.
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(
        np.fft.fftfreq(size, pixel_mm)[:, None], np.fft.rfftfreq(size, pixel_mm)[None, :]
    )
    amplitude = np.exp(-((frequency / 0.12) ** 2)) + 0.25 * np.exp(-((frequency / 0.02) ** 2))
    white = np.fft.rfft2(rng.standard_normal((size, size), dtype=np.float32))
    tile = np.fft.irfft2(white * amplitude, (size, size))
    tile = np.concatenate([tile, tile])
    return (tile / tile.std()).astype(np.float32)
