"""Coarse chest anatomy from Hounsfield units: body, lungs, the middle slice. Works on a grid of
about 4 mm."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import ndimage

_GRID_MM = 4.0
_BODY_HU = -300
_LUNG_HU = (-970, -400)  # aerated parenchyma; free gas (bowel, sinuses, trachea) lies below
_LUNG_SLICE_FRACTION = 0.1  # of the body's area
_CHEST_LUNG_ML = 1000.0
_CHEST_SLICE_FRACTION = 0.5
_SMALL_REGION = 0.1  # of the largest region of lung
_IN_PLANE = np.array(
    [np.zeros((3, 3)), [[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.zeros((3, 3))], dtype=bool
)


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

    Body: HU > -300, opened, largest region of each slice, holes filled. Lung: -970 to -400 HU
    within the body, opened, without regions below a tenth of the largest (streaks between arm and
    chest, bowel). Middle slice: the slice nearest to the volume's centre among the lung slices
    whose body area, median filtered over five slices, is at least 99.5 % of the largest. A volume
    without lung slices takes it from all slices.
    """
    steps = [max(1, round(_GRID_MM / spacing)) for spacing in pixel_spacing_mm]
    coarse = hu[:, steps[0] // 2 :: steps[0], steps[1] // 2 :: steps[1]]
    pixel_mm2 = steps[0] * pixel_spacing_mm[0] * steps[1] * pixel_spacing_mm[1]
    body = _body(coarse)
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


def _body(hu: np.ndarray) -> np.ndarray:
    """[S, h, w] bool: in each slice the largest region of tissue, opened, its holes filled."""
    tissue = _opened(hu > _BODY_HU)
    labels, count = ndimage.label(tissue, _IN_PLANE)
    if count == 0:
        return tissue
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    largest = np.array([np.argmax(np.where(_present(plane, count), sizes, 0)) for plane in labels])
    region = (labels == largest[:, None, None]) & (largest > 0)[:, None, None]
    outside = np.pad(~region, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    outside, _ = ndimage.label(outside, _IN_PLANE)
    return (outside != outside[:, :1, :1])[:, 1:-1, 1:-1]


def _lung(mask: np.ndarray) -> np.ndarray:
    """[S, h, w] bool: the mask, opened in plane, without small three-dimensional regions."""
    mask = _opened(mask)
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= _SMALL_REGION * sizes.max(initial=1))[labels] & mask


def _opened(mask: np.ndarray) -> np.ndarray:
    """In-plane opening of [S, h, w] bool by a cross of three pixels, with the edge repeated
    beyond the image."""
    for combine in (np.logical_and, np.logical_or):
        padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)), mode="edge")
        mask = combine(mask, padded[:, :-2, 1:-1])
        for shifted in (padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]):
            combine(mask, shifted, out=mask)
    return mask


def _present(plane: np.ndarray, count: int) -> np.ndarray:
    present = np.zeros(count + 1, dtype=bool)
    present[plane.ravel()] = True
    return present


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
