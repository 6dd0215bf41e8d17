"""Correlated noise and texture as tiles that are cut and flipped for every slice."""

import numpy as np

# Line pairs per mm where a soft and a sharp kernel fall off, and what is left of the ramp at none.
CUTOFFS = {"soft": 0.34, "sharp": 0.75}
FLOOR = 0.03


def noise_tiles(
    size: int, pixel_mm: float, sharp: bool, sharpness: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Two tiles [T, T] float32, T > `size`, with the noise spectrum of a kernel.

    Filtered back projection gives a power spectrum that rises with frequency until the kernel cuts
    it off. A pixel is the mean over its square. A variance of 1 is that of the usual soft kernel at
    fine pixels: a sharp kernel has more there, and hardly more where pixels are coarse.

    Args:
      size: pixels of a slice.
      pixel_mm: their edge.
      sharp: whether the kernel is a sharp one.
      sharpness: its cutoff relative to the usual one.
      rng: random numbers.
    """
    side = size + max(64, size // 4)
    across, down = np.fft.rfftfreq(side, pixel_mm), np.fft.fftfreq(side, pixel_mm)
    frequency = np.hypot(down[:, None], across[None, :])
    cutoff = CUTOFFS["sharp" if sharp else "soft"] * sharpness

    def spectrum(f: np.ndarray, cutoff: float) -> np.ndarray:
        return np.sqrt(f + FLOOR) * np.exp(-((f / cutoff) ** 2))

    amplitude = spectrum(frequency, cutoff) * np.sinc(down[:, None] * pixel_mm)
    amplitude *= np.sinc(across[None, :] * pixel_mm)
    radius = np.linspace(0, 3, 1500)
    seen = spectrum(radius, cutoff) * np.sinc(radius * pixel_mm / np.sqrt(2)) ** 2
    usual = spectrum(radius, CUTOFFS["soft"])
    level = np.sqrt((radius * seen**2).sum() / (radius * usual**2).sum())
    tiles = []
    for _ in range(2):
        white = np.fft.rfft2(rng.standard_normal((side, side), dtype=np.float32))
        tile = np.fft.irfft2(white * amplitude, (side, side))
        tiles.append((level / tile.std() * tile).astype(np.float32))
    return tiles


class SliceNoise:
    """Noise of one slice after the other, correlated by `correlation` with the slice before: the
    slices of a spiral scan share projections."""

    def __init__(self, tiles: list[np.ndarray], size: int, correlation: float):
        self._tiles, self._size = tiles, size
        self._old, self._new = correlation, (1 - correlation**2) ** 0.5
        self._state: np.ndarray | None = None

    def next(self, rng: np.random.Generator) -> np.ndarray:
        """[size, size] float32: the noise of the next slice; it is overwritten by the one after."""
        room = (self._tiles[0].shape[0] - self._size + 1,) * 2
        which, top, left = rng.integers(0, (2 * len(self._tiles), *room))
        patch = self._tiles[which // 2][top : top + self._size, left : left + self._size]
        patch = patch[:: 1 - 2 * (which % 2)]
        if self._state is None:
            self._state = patch.copy()
        else:
            self._state *= np.float32(self._old)
            self._state += np.float32(self._new) * patch
        return self._state


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
