"""The slices of a stack: which image counts at each position, where it begins, how thick it is."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

import numpy as np

from data_prep.scan.geometry import SAME_POSITION_MM, canonical_axes, canonical_origin
from data_prep.scan.headers import Header
from data_prep.scan.image_kinds import is_lossy, may_be_lossy
from data_prep.scan.rules import Rules
from data_prep.scan.stacks import canonical_grid, order_slices

_OFF_LINE_MM = 1.0  # beside the line through the other slices' origins
_SPACING_ROUNDING_MM = 0.0051  # of two digits behind the point
_SAME_THICKNESS = 0.1  # of the thickness


def same_grid(a: Header, b: Header) -> bool:
    """Whether matrix and pixel spacing are the same but for rounding."""
    (*shape_a, spacing_a), (*shape_b, spacing_b) = canonical_grid(a), canonical_grid(b)
    return shape_a == shape_b and all(
        abs(x - y) <= max(0.002 * y, min(_SPACING_ROUNDING_MM, 0.01 * y))
        for x, y in zip(spacing_a, spacing_b, strict=True)
    )


def group_by_position(headers: list[Header]) -> tuple[list[list[Header]], np.ndarray]:
    """The headers of each position towards superior, with the preferred one first, and the
    positions in mm along the normal."""
    slices: list[list[Header]] = []
    positions: list[float] = []
    for header, position in zip(*order_slices(headers), strict=True):
        if slices and position - positions[-1] < SAME_POSITION_MM:
            slices[-1].append(header)
        else:
            slices.append([header])
            positions.append(float(position))
    for group in slices:
        if len(group) > 1:
            group.sort(key=_preference_of_copies)
    return slices, np.array(positions)


def _preference_of_copies(header: Header) -> tuple:
    """An original comes before its lossy copy, the first acquisition before the others."""
    return (
        is_lossy(header),
        may_be_lossy(header),
        header.image_type[:1] == ("DERIVED",),
        header.acquisition_number or 0,
        header.source,
        header.frame,
    )


def origins(headers: Iterable[Header]) -> np.ndarray:
    """[S, 3] in mm: where the slices begin within their planes."""
    headers = list(headers)
    if len({header.orientation for header in headers}) == 1:
        return np.array([header.position for header in headers])
    return np.array([canonical_origin(header) for header in headers])


def strays_of(slices: list[list[Header]]) -> list[list[Header]]:
    """For each position the headers whose origin lies beside the line through the slices, where
    another header of the position lies on it."""
    nothing: list[list[Header]] = [[] for _ in slices]
    crowds = [i for i, group in enumerate(slices) if len(group) > 1]
    alone = [i for i, group in enumerate(slices) if len(group) == 1]
    if not crowds or len(alone) <= len(slices) / 2:
        return nothing
    line = origins(slices[i][0] for i in alone)
    for i in crowds:
        at = np.searchsorted(alone, i)
        neighbours = line[max(0, at - 2) : at + 2]
        # within the plane the neighbours' mean is close even if the gantry is tilted
        normal = canonical_axes(slices[i][0].orientation).normal
        beside = origins(slices[i]) - neighbours.mean(axis=0)
        beside -= np.outer(beside @ normal, normal)
        tilted = np.ptp(neighbours - np.outer(neighbours @ normal, normal), axis=0).max()
        off = np.linalg.norm(beside, axis=1) > _OFF_LINE_MM + tilted
        if off.any() and not off.all():
            nothing[i] = [header for header, far in zip(slices[i], off, strict=True) if far]
    return nothing


def thickness_of(
    headers: tuple[Header, ...], positions: np.ndarray, rules: Rules
) -> tuple[float | None, bool]:
    """Slice Thickness of a stack in mm, and whether a few slices name an odd one.

    It is the thickest slice's. A few slices that name another thickness than nearly all others are
    passed over if they lie as regularly as the others.
    """
    known = [h.slice_thickness for h in headers if h.slice_thickness is not None]
    if not known:
        return None, False
    common = most_common(known)
    odd = np.array(
        [
            h.slice_thickness is not None
            and abs(h.slice_thickness - common) > _SAME_THICKNESS * common
            for h in headers
        ]
    )
    if not odd.any():
        return max(known), False
    steps = np.diff(positions)
    beside = steps[odd[1:] | odd[:-1]]
    regular = np.all(np.abs(beside - np.median(steps)) <= 0.1 * np.median(steps))
    if regular and np.count_nonzero(odd) <= rules.max_lost_fraction * len(headers):
        usual = zip(headers, odd, strict=True)
        return max(h.slice_thickness or 0.0 for h, strange in usual if not strange), True
    return max(known), False


def most_common(values: list) -> Any:
    """The most frequent value; of several the one with the most digits, as it is the least
    rounded, then the smallest."""
    counts = collections.Counter(values)
    return min(counts, key=lambda value: (-counts[value], -len(repr(value)), value))
