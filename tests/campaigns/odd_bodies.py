"""Odd bodies and fields of view: metal, a lung without air, thin walls, children, wide bores."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from data_prep.synthetic.dicom_writer import VENDORS
from tests.campaigns.odd_base import AIR_HU, OddScan, Sound, kind

SQUARE = [vendor for vendor in VENDORS if vendor.outside is None]  # reconstructs the corners


def _lung(scan: Sound) -> np.ndarray:
    """[S, H, W] bool: the lungs of the phantom."""
    return (scan.hu > -970) & (scan.hu < -500)


def _square_field(scan: Sound) -> None:
    scan.vendor = scan.choice(SQUARE)
    scan.outside = np.zeros_like(scan.outside)


@kind
def metal(scan: Sound) -> OddScan:
    """A spinal implant, a pacemaker or a hip of 3071 HU and, on an extended scale, far above."""
    signed = [vendor for vendor in VENDORS if vendor.signed]
    extended = scan.rng.random() < 0.5
    if extended:
        scan.vendor = scan.choice(signed)
    rows, columns = scan.hu.shape[1:]
    y, x = int(rows * 0.62), int(columns * 0.47)
    height = max(1, rows // 40)
    scan.hu[4:-4, y : y + height, x : x + 2] = 14000 if extended else 3000
    streaks = scan.hu[4:-4, y, :]
    streaks[streaks > -300] -= 200
    return scan.odd(scan.datasets())


@kind
def one_lung_without_air(scan: Sound) -> OddScan:
    """Pneumonectomy, collapse or effusion of one side."""
    lung, side = _lung(scan), scan.choice([0, 1])
    half = scan.hu.shape[2] // 2
    lung[..., :half] &= side == 0
    lung[..., half:] &= side == 1
    noise = scan.rng.integers(-8, 9, scan.hu.shape)
    scan.hu = np.where(lung, 15 + noise, scan.hu).astype(np.int16)
    return scan.odd(scan.datasets())


@kind
def emphysema_or_fibrosis(scan: Sound) -> OddScan:
    """Lungs near -950 or near -700 HU."""
    shift = scan.choice([-85, 60, 150])
    hu = np.where(_lung(scan), scan.hu + shift, scan.hu)
    scan.hu = np.clip(hu, AIR_HU, 3000).astype(np.int16)
    return scan.odd(scan.datasets())


@kind
def child(scan: Sound) -> OddScan:
    """A chest of half the width, with less than a litre of lung."""
    scan.pixel_mm = round(scan.pixel_mm * float(scan.choice([0.45, 0.6])), 5)
    scan.spacing_mm = scan.thickness_mm = scan.choice([1.0, 2.0])
    return scan.odd(scan.datasets())


@kind(size=128)
def thin_walls(scan: Sound) -> OddScan:
    """A chest wall of two to four pixels, 6 to 12 mm: thin, sick and young people."""
    _square_field(scan)
    lung = ndimage.binary_opening(_lung(scan), np.ones((1, 3, 3)))
    wall = scan.choice([2.0, 3.0, 4.0])
    disk = np.hypot(*np.mgrid[-9:10, -9:10]) <= 9
    cavities = np.stack([_closed(plane, disk) for plane in lung])
    # smooth along the patient: neighbours of a real scan are nearly alike
    cavities = ndimage.median_filter(cavities.astype(np.uint8), (9, 1, 1)) > 0
    lowest = [plane.any(axis=1).nonzero()[0].max(initial=0) for plane in cavities]
    back = np.zeros_like(cavities[0])
    back[int(np.median(lowest)) - 8 :] = True
    for hu, cavity in zip(scan.hu, cavities, strict=True):
        body = ndimage.distance_transform_edt(~cavity) <= wall
        hu[~(body | back & (hu > -300))] = AIR_HU
        hu[body & ~cavity & (hu < -200)] = 20
    return scan.odd(scan.datasets())


def _closed(plane: np.ndarray, disk: np.ndarray) -> np.ndarray:
    """Both lungs of a slice [H, W] and what lies between them."""
    grown = ndimage.binary_dilation(np.pad(plane, 20), disk, iterations=2)
    closed = ndimage.binary_erosion(grown, disk, iterations=2)
    return ndimage.binary_fill_holes(closed)[20:-20, 20:-20]


@kind(size=96)
def field_cuts_the_wall(scan: Sound) -> OddScan:
    """A field of view around the lungs that cuts the chest wall on both sides."""
    _square_field(scan)
    columns = np.flatnonzero(_lung(scan).sum(axis=(0, 1)) > len(scan.hu))
    margin = int(scan.choice([1, 2, 3]))
    left, right = max(0, columns[0] - margin), min(96, columns[-1] + 1 + margin)
    rows = (96 - (right - left)) // 2
    scan.hu = scan.hu[:, rows : rows + right - left, left:right].copy()
    scan.outside = np.zeros(scan.hu.shape[1:], bool)
    return scan.odd(scan.datasets())


@kind
def wide_bore(scan: Sound) -> OddScan:
    """A field of 700 mm and more, with the body in its middle."""
    size = scan.hu.shape[1]
    width = max(2, int((scan.choice([700, 780]) / scan.pixel_mm - size) / 2))
    scan.hu = np.pad(scan.hu, ((0, 0), (width, width), (width, width)), constant_values=AIR_HU)
    scan.outside = np.pad(scan.outside, width, constant_values=True)
    return scan.odd(scan.datasets())


@kind
def arms_beside(scan: Sound) -> OddScan:
    """Arms down: they touch the chest and the edge of the field."""
    _square_field(scan)
    size = scan.hu.shape[1]
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    noise = scan.rng.integers(-6, 7, scan.hu.shape)
    for side in (-1, 1):
        arm = np.hypot((x - 0.98 * side) / 0.16, (y - 0.1) / 0.24) < 1
        scan.hu = np.where(arm & (scan.hu < -300) & ~_lung(scan), 45 + noise, scan.hu)
    scan.hu = scan.hu.astype(np.int16)
    return scan.odd(scan.datasets())


@kind
def table_and_clothes(scan: Sound) -> OddScan:
    """A dense table, a blanket and a tube outside of the body."""
    _square_field(scan)
    size = scan.hu.shape[1]
    air = scan.hu < -700
    air &= ~_lung(scan)
    scan.hu[:, -4:-2, size // 8 : -size // 8][air[:, -4:-2, size // 8 : -size // 8]] = 300
    scan.hu[:, 2:3, size // 3 : -size // 3][air[:, 2:3, size // 3 : -size // 3]] = -250
    return scan.odd(scan.datasets())
