"""Stored pixel values -> Hounsfield units, and whether they can be Hounsfield units at all."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from scipy import ndimage

from data_prep.scan.geometry import AIR_HU
from data_prep.scan.headers import Header
from data_prep.scan.stored_bits import BELOW_ANY_TISSUE_HU, PixelError

# A "padding value" in this range is a mistake: some writers declare 0 where 0 is water.
_TISSUE_HU = (-900, 4000)
_OUTSIDE_SHARE = 0.001  # of the pixels; fewer in a corner may be tissue by chance
_SAMPLE_STEP = 8  # plausibility is judged on every 8th pixel of both directions


def has_rescale(header: Header) -> bool:
    """Whether a header has both Rescale Slope and Intercept."""
    return header.rescale_slope is not None and header.rescale_intercept is not None


def rescale(header: Header) -> tuple[float, float]:
    """Rescale Slope and Intercept; 1 and 0 where both are missing.

    Raises:
        PixelError: only one is present, or the slope is 0.
    """
    if header.rescale_slope is None and header.rescale_intercept is None:
        return 1.0, 0.0
    if not has_rescale(header) or header.rescale_slope == 0:
        raise PixelError(
            "missing_rescale", "Rescale Slope or Intercept is missing, or the slope is 0"
        )
    return header.rescale_slope, header.rescale_intercept


def padding_range(header: Header) -> tuple[int, int] | None:
    """Lowest and highest stored value that Pixel Padding Value and Range Limit declare to lie
    outside the image."""
    if header.padding_value is None:
        return None
    limit = header.padding_value if header.padding_limit is None else header.padding_limit
    low, high = sorted((header.padding_value, limit))
    slope, intercept = rescale(header)
    if any(_TISSUE_HU[0] < bound * slope + intercept < _TISSUE_HU[1] for bound in (low, high)):
        return None
    return low, high


def _padding_of_a_tissue_value(stored: np.ndarray, header: Header) -> np.ndarray | None:
    """[H, W] bool: padding whose value could be tissue, as far as it reaches from the corners of
    the image; None if there is none."""
    value = header.padding_value
    if value is None or header.padding_limit not in (None, value) or padding_range(header):
        return None
    corners = stored[[0, 0, -1, -1], [0, -1, 0, -1]]
    if not (corners == value).any():
        return None
    regions, _ = ndimage.label(stored == value)
    outside = np.isin(regions, np.setdiff1d(regions[[0, 0, -1, -1], [0, -1, 0, -1]], 0))
    return outside if np.count_nonzero(outside) >= _OUTSIDE_SHARE * outside.size else None


def to_hu(stored: np.ndarray, header: Header) -> np.ndarray:
    """Stored values [H, W] in HU: int16, or float32 if any is fractional or beyond int16.

    Padding and all values below -1500 HU become air, -1000 HU. A padding value that could be
    tissue is padding only where it reaches from a corner of the image. MONOCHROME1 tells how to
    display a value and does not change it.

    Raises:
        PixelError: see `rescale`.
    """
    slope, intercept = rescale(header)
    padding = padding_range(header)
    lowest, highest = int(stored.min()), int(stored.max())
    if (
        slope == 1
        and intercept == int(intercept)
        and stored.dtype.itemsize <= 2
        and highest + intercept <= 32767
    ):
        hu = _add_intercept(stored, int(intercept), padding, lowest)
        if (outside := _padding_of_a_tissue_value(stored, header)) is not None:
            hu[outside] = AIR_HU
        return hu
    hu = stored * slope + intercept
    air = hu < BELOW_ANY_TISSUE_HU
    if padding:
        air |= (stored >= padding[0]) & (stored <= padding[1])
    elif (outside := _padding_of_a_tissue_value(stored, header)) is not None:
        air |= outside
    hu[air] = AIR_HU
    if hu.max() <= 32767 and np.array_equal(hu, np.rint(hu)):
        return hu.astype(np.int16)
    return hu.astype(np.float32)


def _add_intercept(
    stored: np.ndarray, intercept: int, padding: tuple[int, int] | None, lowest: int
) -> np.ndarray:
    """The common case, in int16. The sum wraps around only where the result becomes air anyway."""
    bits = stored.view(np.int16) if stored.dtype.itemsize == 2 else stored.astype(np.int16)
    hu = bits + np.array(intercept % 65536, dtype=np.uint16).view(np.int16)
    below = math.ceil(BELOW_ANY_TISSUE_HU - intercept)
    if lowest < below:
        hu[stored < below] = AIR_HU
    if padding and padding[1] >= max(lowest, below):
        hu[(stored >= padding[0]) & (stored <= padding[1])] = AIR_HU
    return hu


class PlausibilityCount:
    """Counts a volume's values, slice by slice.

    Every CT has some air, some soft tissue and hardly a value above 4000 HU. Shifted scales (a
    wrong sign, missing rescale tags) break this rule.
    """

    def __init__(self):
        self._counts: list[tuple[int, int, int, int]] = []

    def add(self, stored: np.ndarray, header: Header) -> None:
        """Counts one slice of stored values [H, W]; padding is not evidence of air."""
        slope, intercept = rescale(header)
        sample = stored[::_SAMPLE_STEP, ::_SAMPLE_STEP]
        hu = sample * slope + intercept
        image = hu >= BELOW_ANY_TISSUE_HU
        if padding := padding_range(header):
            image &= (sample < padding[0]) | (sample > padding[1])
        elif (outside := _padding_of_a_tissue_value(stored, header)) is not None:
            image &= ~outside[::_SAMPLE_STEP, ::_SAMPLE_STEP]
        hu = hu[image]
        air = np.count_nonzero((hu >= -1100) & (hu < -500))
        soft = np.count_nonzero((hu >= -200) & (hu < 300))
        self._counts.append((sample.size, air, soft, np.count_nonzero(hu > 4000)))

    def fault(self, without: Collection[int] = ()) -> str | None:
        """The implausible property in words, or None; slices `without`, by their number, do not
        count."""
        counts = [count for i, count in enumerate(self._counts) if i not in without]
        total, air, soft, dense = np.sum(counts, axis=0)
        if dense > 0.01 * total:
            return f"{100 * dense / total:.0f} % of the pixels are above 4000 HU"
        if soft < 0.01 * total:
            return "no soft tissue between -200 and 300 HU"
        if air < 0.002 * total:
            return "no air or lung between -1100 and -500 HU"
        return None
