"""Coarse chest anatomy from Hounsfield units: body, lungs, the middle slice.

Areas are counted on a grid of about 4 mm. Where that grid misses lung, behind a thin chest wall or
at the edge of the field, the walls are looked for on a grid of about 1.5 mm.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import ndimage

_GRID_MM = 4.0
_WALL_GRID_MM = 1.5
_OPENED_UP_TO_MM = 2.25  # on a coarser grid a wall may be a single pixel
_BODY_HU = -300
_LUNG_HU = (-970, -400)  # aerated parenchyma; free gas (bowel, sinuses, trachea) lies below
# lung that is outside the body at first sight, as against mattresses, tables and clothes
_AERATED_HU = -940  # of the region's median; outer air lies below
_REGION_MM2 = 400.0  # smaller regions are not looked for
_FIELD_EDGE_FRACTION = 0.5  # at most, of its boundary
_LARGE_REGION = 0.2  # of the largest region of tissue; smaller ones may be a table
_OTHER_SIDE = 0.05  # at least, of the tissue: in front of its centre as well as behind
_LUNG_SLICE_FRACTION = 0.1  # of the body's area
_CHEST_LUNG_ML = 1000.0
_CHEST_SLICE_FRACTION = 0.5
_SMALL_REGION = 0.1  # of the largest region of lung


@dataclasses.dataclass(frozen=True)
class ChestSummary:
    """Chest anatomy of a volume. In a lung slice, lung is at least a tenth of the body's area."""

    body_area_mm2: np.ndarray  # [S] float64, lungs included
    lung_fraction: np.ndarray  # [S] float64, lung area over body area
    lung_volume_ml: float
    first_lung_slice: int | None
    last_lung_slice: int | None  # inclusive
    # first row, row after the last, first column, column after the last
    lung_box: tuple[int, int, int, int] | None
    middle_slice: int


def summarise(
    hu: np.ndarray, pixel_spacing_mm: tuple[float, float], slice_spacing_mm: float
) -> ChestSummary:
    """Chest anatomy of a volume [S, H, W] in HU, rows to posterior.

    Body: HU > -300, opened, largest region of each slice, holes filled; with the lungs that this
    leaves out, see `_lung_outside`. Lung: -970 to -400 HU within the body, opened, without regions
    below a tenth of the largest (streaks between arm and chest, bowel). Middle slice: the slice
    nearest to the volume's centre among the lung slices whose body area, median filtered over five
    slices, is at least 99.5 % of the largest. A volume without lung slices takes it from all
    slices.
    """
    steps = [
        min(size, max(1, round(_GRID_MM / spacing)))
        for size, spacing in zip(hu.shape[1:], pixel_spacing_mm, strict=True)
    ]
    coarse = hu[:, steps[0] // 2 :: steps[0], steps[1] // 2 :: steps[1]]
    pixel_mm2 = steps[0] * pixel_spacing_mm[0] * steps[1] * pixel_spacing_mm[1]
    tissue = coarse > _BODY_HU
    found = [_body(plane) for plane in _opened(tissue)]
    body, beside = (np.array(arrays) for arrays in zip(*found, strict=True))
    outside = (
        _opened(~tissue & ~body & (coarse > _AERATED_HU)) & (beside >= _OTHER_SIDE)[:, :, None]
    )
    size = _REGION_MM2 / pixel_mm2
    for i in np.flatnonzero(outside.sum(axis=(1, 2)) >= size):
        walls = _walls(hu[i], pixel_spacing_mm, steps)
        lung = _lung_outside(coarse[i], walls, body[i], beside[i], hu[i, 0, 0], size)
        if lung.any():
            body[i], _ = _body(_opened(tissue[i] | lung))
    lung = _lung(body & (coarse >= _LUNG_HU[0]) & (coarse <= _LUNG_HU[1]))
    body_area = body.sum(axis=(1, 2)) * pixel_mm2
    lung_area = lung.sum(axis=(1, 2)) * pixel_mm2
    fraction = lung_area / np.maximum(body_area, pixel_mm2)
    lung_slices = np.flatnonzero(fraction >= _LUNG_SLICE_FRACTION)
    return ChestSummary(
        body_area_mm2=body_area,
        lung_fraction=fraction,
        lung_volume_ml=float(lung_area.sum() * slice_spacing_mm / 1000),
        first_lung_slice=int(lung_slices[0]) if len(lung_slices) else None,
        last_lung_slice=int(lung_slices[-1]) if len(lung_slices) else None,
        lung_box=_lung_box(lung[lung_slices], steps, hu.shape[1:]),
        middle_slice=_middle_slice(body_area, lung_slices),
    )


def covers_chest(summary: ChestSummary) -> bool:
    """Whether a volume has at least one litre of lung, or lung in at least half of its slices (a
    slab, a child).

    The lung bases of an abdominal scan and the apices of a neck scan have neither.
    """
    lung_slices = np.count_nonzero(summary.lung_fraction >= _LUNG_SLICE_FRACTION)
    return summary.lung_volume_ml >= _CHEST_LUNG_ML or lung_slices >= _CHEST_SLICE_FRACTION * len(
        summary.lung_fraction
    )


def _body(tissue: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[h, w] bool: the largest region of a slice's tissue, its holes filled. And for each row [h]
    float64 the part of the large regions that lies in front of or behind it, the smaller one."""
    labels, count = ndimage.label(tissue)
    if count == 0:
        return tissue, np.ones(len(tissue))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    large = (sizes >= _LARGE_REGION * sizes.max()).take(labels)
    in_front = np.cumsum(np.count_nonzero(large, axis=1)) / np.count_nonzero(large)
    outside, _ = ndimage.label(_padded(labels != np.argmax(sizes), True))
    body = (outside != outside[0, 0])[1:-1, 1:-1]
    return body, np.minimum(in_front, 1 - in_front)


def _walls(
    image: np.ndarray, pixel_spacing_mm: tuple[float, float], steps: list[int]
) -> np.ndarray:
    """[h, w] bool: the cells of the coarse grid of an image [H, W] that hold tissue.

    Tissue of about 5 mm and more is seen. Most of what is thinner, such as the shell of a table, is
    opened away.
    The body is taken to go on beyond the edge of the image.
    """
    fine = [
        min(step, max(1, round(_WALL_GRID_MM / spacing)))
        for step, spacing in zip(steps, pixel_spacing_mm, strict=True)
    ]
    tissue = image[fine[0] // 2 :: fine[0], fine[1] // 2 :: fine[1]] > _BODY_HU
    spacing_mm = max(np.multiply(fine, pixel_spacing_mm))
    if spacing_mm <= _WALL_GRID_MM:  # three pixels
        inner = _with_neighbours(np.logical_and, _padded(tissue, True))
        tissue = _with_neighbours(np.logical_or, _padded(inner, False))
    elif spacing_mm <= _OPENED_UP_TO_MM:  # two pixels
        around = _padded(tissue, True)[:-1, :-1]
        inner = around[:-1, :-1] & around[:-1, 1:] & around[1:, :-1] & around[1:, 1:]
        around = _padded(inner, False)[1:, 1:]
        tissue = around[:-1, :-1] | around[:-1, 1:] | around[1:, :-1] | around[1:, 1:]
    # Cells of at least the coarse step, so that the coarse grid skips none.
    factors = [math.ceil(step / thin) for step, thin in zip(steps, fine, strict=True)]
    height, width = (-(-n // factor) for n, factor in zip(tissue.shape, factors, strict=True))
    in_rows = np.zeros((height, tissue.shape[1]), dtype=bool)
    for row in range(factors[0]):
        part = tissue[row :: factors[0]]
        in_rows[: len(part)] |= part
    cells = np.zeros((height, width), dtype=bool)
    for column in range(factors[1]):
        part = in_rows[:, column :: factors[1]]
        cells[:, : part.shape[1]] |= part
    rows, columns = (
        np.arange(step // 2, length, step) // (thin * factor)
        for step, length, thin, factor in zip(steps, image.shape, fine, factors, strict=True)
    )
    return cells[np.ix_(rows, columns)]


def _padded(mask: np.ndarray, value: bool) -> np.ndarray:
    """[h + 2, w + 2] bool: a mask [h, w] with a margin of one pixel."""
    padded = np.full((mask.shape[0] + 2, mask.shape[1] + 2), value)
    padded[1:-1, 1:-1] = mask
    return padded


def _lung_outside(
    hu: np.ndarray,
    walls: np.ndarray,
    body: np.ndarray,
    beside: np.ndarray,
    corner_hu: float,
    min_size: float,
) -> np.ndarray:
    """[h, w] bool: lung of a coarse slice that is outside of `body`, with a margin of one cell.

    Lung is a region that walls and the edge of the field enclose. It is aerated by its median HU.
    It lies beside the body: the nearer its centre is to the front or back of all tissue (`beside`
    [h], see `_body`), where tables and mattresses are, the less of its boundary may be the field's
    edge. The field ends at the edge of the image and at the padding of a circular field, which has
    the value of the image's corner.
    """
    padding = (hu == corner_hu) & (hu < _AERATED_HU)
    labels, count = ndimage.label(~(walls | body | padding))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    aerated = np.bincount(labels[hu > _AERATED_HU], minlength=count + 1)
    found = np.zeros_like(body)
    for number in np.flatnonzero((2 * aerated > sizes) & (sizes >= min_size)):
        region = labels == number
        other_side = beside[int(np.mean(np.flatnonzero(region)) / region.shape[1])]
        if number == 0 or other_side < _OTHER_SIDE:
            continue
        around = _with_neighbours(np.logical_or, _padded(region, False)) & ~region
        at_edge = np.count_nonzero(around & padding) + sum(
            np.count_nonzero(side) for side in (region[0], region[-1], region[:, 0], region[:, -1])
        )
        around &= ~padding
        allowed = min(_FIELD_EDGE_FRACTION, 2 * other_side)
        if at_edge <= allowed * (at_edge + np.count_nonzero(around)):
            found |= region | around
    return found


def _lung(mask: np.ndarray) -> np.ndarray:
    """[S, h, w] bool: the mask, opened in plane, without small three-dimensional regions."""
    mask = _opened(mask)
    used = [np.flatnonzero(mask.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    if len(used[0]) == 0:
        return mask
    part = mask[tuple(slice(indices[0], indices[-1] + 1) for indices in used)]
    labels, _ = ndimage.label(part)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    part &= (sizes >= _SMALL_REGION * sizes.max()).take(labels)
    return mask


def _opened(mask: np.ndarray) -> np.ndarray:
    """In-plane opening of [..., h, w] bool by a cross of three pixels, with the edge repeated
    beyond the image."""
    margin = [(0, 0)] * (mask.ndim - 2) + [(1, 1), (1, 1)]
    for combine in (np.logical_and, np.logical_or):
        mask = _with_neighbours(combine, np.pad(mask, margin, mode="edge"))
    return mask


def _with_neighbours(combine: np.ufunc, padded: np.ndarray) -> np.ndarray:
    """[..., h, w] bool: each pixel of [..., h + 2, w + 2] combined with its four neighbours."""
    mask = combine(padded[..., 1:-1, 1:-1], padded[..., :-2, 1:-1])
    for shifted in (padded[..., 2:, 1:-1], padded[..., 1:-1, :-2], padded[..., 1:-1, 2:]):
        combine(mask, shifted, out=mask)
    return mask


def _lung_box(
    lung: np.ndarray, steps: list[int], shape: tuple[int, int]
) -> tuple[int, int, int, int] | None:
    """The box of the lung in full-size pixels, from coarse masks [n, h, w] of the lung slices."""
    edges = []
    for axis, step, size in ((2, steps[0], shape[0]), (1, steps[1], shape[1])):
        used = np.flatnonzero(lung.any(axis=(0, axis)))
        if len(used) == 0:
            return None
        edges += [int(used[0] * step), int(min(size, (used[-1] + 1) * step))]
    return tuple(edges)


def _middle_slice(body_area: np.ndarray, lung_slices: np.ndarray) -> int:
    area = ndimage.median_filter(body_area, size=5, mode="nearest")
    allowed = lung_slices if len(lung_slices) else np.arange(len(area))
    large = allowed[area[allowed] >= 0.995 * area[allowed].max()]
    return int(large[np.argmin(np.abs(large - (len(area) - 1) / 2))])
