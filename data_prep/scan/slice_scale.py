"""Single slices on another scale than the slices around them: a wrong sign, intercept or slope,
padding instead of an image, damaged values.

Two neighbours have nearly the same distribution of HU, whatever the anatomy; far-off slices need
not. So a slice is judged against the nearest ones alone. Measured on the project's real scans, also
thinned out to 12 mm and cut to one lung: the slices between two slices whose HU differ by b on
average differ from them by at most 3 b + 27 HU, so the limit below takes no slice of a sound scan.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_prep.scan.headers import Header
from data_prep.scan.hounsfield import to_hu
from data_prep.scan.stored_bits import low_bits

SAMPLE_STEP = 8  # slices are judged on every 8th pixel of both directions
_LARGEST_HU = 32767  # scanners' extended scale ends at 30,710
_CLIPPED_HU = (-1000, 1000)
_SHARES = np.linspace(0.04, 0.96, 24)  # of the pixels; metal has less than the rest
_JUMP_HU, _JUMP_FACTOR = 60.0, 3.0
_LONGEST_RUN = 3  # a run of odd slices has at most this part of the slices
# Between slices of different rescale: a difference that the other's rescale explains.
_OTHER_RESCALE_HU, _OTHER_RESCALE_SHARE = 8.0, 1 / 3


def slices_on_another_scale(
    hu: np.ndarray, headers: Sequence[Header], stored: Sequence[np.ndarray]
) -> list[int]:
    """Indices of the slices whose values cannot be HU, by their neighbours or by their size.

    Args:
        hu: [S, H, W], the slices in order.
        headers: of the slices.
        stored: for each slice its stored values, every `SAMPLE_STEP`-th pixel of both directions.
    """
    quantiles = _quantiles(hu[:, ::SAMPLE_STEP, ::SAMPLE_STEP])
    odd = _by_rescale(quantiles, headers, stored)
    if hu.dtype.kind == "f":
        odd += np.flatnonzero(hu.max(axis=(1, 2)) > _LARGEST_HU).tolist()
    rest = np.setdiff1d(np.arange(len(hu)), odd)
    return sorted({*odd, *rest[_runs_between_neighbours(quantiles[rest])].tolist()})


def _quantiles(hu: np.ndarray) -> np.ndarray:
    """[S, 24] float32: the distribution of each slice's HU."""
    values = np.sort(hu.reshape(len(hu), -1), axis=1)
    picked = values[:, np.rint(_SHARES * (values.shape[1] - 1)).astype(int)]
    return picked.clip(*_CLIPPED_HU).astype(np.float32)


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean difference of two distributions, HU."""
    return np.abs(a - b).mean(axis=-1)


def _by_rescale(
    quantiles: np.ndarray, headers: Sequence[Header], stored: Sequence[np.ndarray]
) -> list[int]:
    """Slices whose stored values continue their neighbour's, but not under their own rescale.

    From the slices of the most frequent rescale outwards, each slice is compared with the last
    sound one. Slices that use a rescale each, as PET has it, continue their neighbours' HU.
    """
    scales = [(h.rescale_slope, h.rescale_intercept, h.pixel_representation) for h in headers]
    if len(set(scales)) == 1:
        return []
    usual = max(sorted(set(scales), key=str), key=scales.count)
    start = scales.index(usual)
    odd = []
    for outwards in (range(start + 1, len(scales)), range(start - 1, -1, -1)):
        last = start
        for i in outwards:
            if scales[i] not in (usual, scales[last]):
                own = _distance(quantiles[last], quantiles[i])
                read_alike = _quantiles(_reread(stored[i], headers[i], headers[last])[None])
                alike = _distance(quantiles[last], read_alike[0])
                if own > _OTHER_RESCALE_HU and alike < _OTHER_RESCALE_SHARE * own:
                    odd.append(i)
                    continue
            last = i
    return odd


def _reread(stored: np.ndarray, header: Header, other: Header) -> np.ndarray:
    """Stored values of a slice in HU, read with the sign and the rescale of another header."""
    if header.pixel_representation != other.pixel_representation and stored.dtype.kind in "iu":
        bits = 8 * stored.dtype.itemsize
        kind = "i" if other.pixel_representation else "u"
        stored = low_bits(stored.astype(f"{kind}{bits // 8}"), min(other.bits_stored or bits, bits))
    return to_hu(stored, other)


def _runs_between_neighbours(quantiles: np.ndarray) -> np.ndarray:
    """[S] bool: slices that differ from the slices before and after them, which are alike. Shorter
    runs of such slices are found, and left out, first."""
    odd = np.zeros(len(quantiles), dtype=bool)
    if len(quantiles) < 3 or _distance(quantiles[1:], quantiles[:-1]).max() <= _JUMP_HU:
        return odd
    for length in range(1, len(quantiles) // _LONGEST_RUN + 1):
        rest = np.flatnonzero(~odd)
        kept = quantiles[rest]
        if len(kept) < length + 2:
            break
        before, after = kept[: -length - 1], kept[length + 1 :]
        jump = np.minimum(_distance(before, kept[1:-length]), _distance(kept[length:-1], after))
        found = np.flatnonzero(jump > _JUMP_HU + _JUMP_FACTOR * _distance(before, after))
        for first in found:
            odd[rest[first + 1 : first + 1 + length]] = True
    return odd
