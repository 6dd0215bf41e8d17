"""Hounsfield units to grey values, and to the image size of a dataset."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_prep.scan.anatomy import ChestSummary
from data_prep.scan.geometry import AIR_HU
from data_prep.system.errors import InputError

_THUMBNAIL = 128  # pixels of a side
Window = tuple[float, float]  # level, width in HU


def parse_window(text: str) -> Window:
    """The window (level, width) of a text such as "50,350".

    Raises:
        InputError: the text is not two numbers, or the width is not positive.
    """
    try:
        level, width = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"--window={text}: give level,width in HU, such as --window=50,350"
        ) from None
    if not (math.isfinite(level) and math.isfinite(width) and width > 0):
        raise InputError(f"--window={text}: the width must be above 0, such as --window=50,350")
    return level, width


def window_to_uint8(hu: np.ndarray, windows: Sequence[Window]) -> np.ndarray:
    """Grey values [..., C] uint8 of `hu` [...], one channel for each window.

    The value is 255 clip((HU - (level - width / 2)) / width, 0, 1) in float64, rounded half to
    even. int16 is computed in float32 where the result is the same for every int16, else by a
    table.

    Raises:
        InputError: no window, or a width that is not positive.
    """
    if not windows:
        raise InputError("no window; give level,width such as 50,350")
    for level, width in windows:
        if not (width > 0 and math.isfinite(width) and math.isfinite(level)):
            raise InputError(f"window {level:g},{width:g}: give a finite level and a width above 0")
    grey = np.empty((*hu.shape, len(windows)), dtype=np.uint8)
    for channel, (level, width) in enumerate(windows):
        if hu.dtype == np.int16 and _float32_is_exact(float(level), float(width)):
            grey[..., channel] = _grey_float32(hu, level, width)
        elif hu.dtype == np.int16:
            bits = np.ascontiguousarray(hu).view(np.uint16)
            _table(float(level), float(width)).take(bits, mode="clip", out=grey[..., channel])
        else:
            grey[..., channel] = _grey(hu, level, width)
    return grey


def _grey(hu: np.ndarray, level: float, width: float) -> np.ndarray:
    grey = hu.astype(np.float64)
    grey -= level - width / 2
    grey /= width
    np.clip(grey, 0, 1, out=grey)
    grey *= 255
    return np.rint(grey, out=grey).astype(np.uint8)


def _grey_float32(hu: np.ndarray, level: float, width: float) -> np.ndarray:
    """As `_grey`, in float32: twice as fast as the table."""
    grey = np.subtract(hu, np.float32(level - width / 2), dtype=np.float32)
    grey *= np.float32(255 / width)
    np.clip(grey, 0, 255, out=grey)
    return np.rint(grey, out=grey).astype(np.uint8)


@functools.lru_cache(maxsize=16)
def _float32_is_exact(level: float, width: float) -> bool:
    bits = np.arange(65536, dtype=np.uint16)
    return np.array_equal(_grey_float32(bits.view(np.int16), level, width), _table(level, width))


@functools.lru_cache(maxsize=16)
def _table(level: float, width: float) -> np.ndarray:
    """Grey values of all int16, in the order of their bits read as uint16."""
    return _grey(np.arange(65536, dtype=np.uint16).view(np.int16), level, width)


def grey_thumbnail(hu: np.ndarray) -> np.ndarray:
    """A small picture [h, w] uint8 of a slice [H, W] whose values may be of any scale: means of
    n x n pixels, at most 128 a side, from the 1st percentile (black) to the 99th (white)."""
    image = Image.fromarray(hu.astype(np.float32))
    small = np.nan_to_num(np.asarray(image.reduce(-(-max(hu.shape) // _THUMBNAIL))))
    ordered = np.sort(small, axis=None)
    low, high = ordered[len(ordered) // 100], ordered[-1 - len(ordered) // 100]
    return _grey(small, (low + high) / 2, max(high - low, 1.0))


def needs_resize(
    shape: tuple[int, int], pixel_spacing_mm: tuple[float, float], image_size: int
) -> bool:
    """Whether slices of this matrix must be resampled to become squares of `image_size` pixels."""
    square_pixels = math.isclose(*pixel_spacing_mm, rel_tol=1e-3)
    return not (square_pixels and tuple(shape) == (image_size, image_size))


def resize_slice(
    hu: np.ndarray, pixel_spacing_mm: tuple[float, float], image_size: int
) -> np.ndarray:
    """`hu` [H, W] as a square [image_size, image_size] of the same field, undistorted.

    A field that is not square is first padded with air (-1000 HU) around its centre. Then Pillow's
    bilinear filter resizes it in float32. The filter averages over the whole source area when it
    shrinks (antialiased), and its result depends on the input alone. A slice that has the right
    size already is returned unchanged, in its own type.
    """
    if not needs_resize(hu.shape, pixel_spacing_mm, image_size):
        return hu
    return _resize(hu, pixel_spacing_mm, image_size, AIR_HU)


def resize_mask(
    mask: np.ndarray, pixel_spacing_mm: tuple[float, float], image_size: int
) -> np.ndarray:
    """`mask` [H, W] uint8 (0 background, k region k) as [image_size, image_size] uint8, on the
    field of `resize_slice`.

    Each region goes through the filter of the images by itself. A pixel belongs to the region that
    covers the largest part of it, if this part is at least half; else it is background. Of two
    equal parts the region with the smaller number wins.
    """
    if not needs_resize(mask.shape, pixel_spacing_mm, image_size):
        return np.ascontiguousarray(mask)
    resized = np.zeros((image_size, image_size), np.uint8)
    largest_part = np.full((image_size, image_size), 0.5, np.float32)
    for region in np.unique(mask[mask > 0])[::-1]:
        covered = _resize(mask == region, pixel_spacing_mm, image_size, 0)
        resized[covered >= largest_part] = region
        np.maximum(largest_part, covered, out=largest_part)
    return resized


def _resize(
    hu: np.ndarray, pixel_spacing_mm: tuple[float, float], image_size: int, padding: float
) -> np.ndarray:
    top, left, rows, columns = _square_field(hu.shape, pixel_spacing_mm)
    margins = math.ceil(-top), math.ceil(-left)
    padded = np.full(
        (hu.shape[0] + 2 * margins[0], hu.shape[1] + 2 * margins[1]), padding, dtype=np.float32
    )
    padded[margins[0] : margins[0] + hu.shape[0], margins[1] : margins[1] + hu.shape[1]] = hu
    y, x = margins[0] + top, margins[1] + left
    box = (x, y, min(x + columns, padded.shape[1]), min(y + rows, padded.shape[0]))
    resized = Image.fromarray(padded).resize(
        (image_size, image_size), Image.Resampling.BILINEAR, box=box
    )
    return np.asarray(resized)


def resized_spacing_mm(
    shape: tuple[int, int], pixel_spacing_mm: tuple[float, float], image_size: int
) -> float:
    """Edge of a pixel after `resize_slice`, in mm."""
    return _square_field(shape, pixel_spacing_mm)[2] * pixel_spacing_mm[0] / image_size


def resize_box(
    box: tuple[int, int, int, int],
    shape: tuple[int, int],
    pixel_spacing_mm: tuple[float, float],
    image_size: int,
) -> tuple[int, int, int, int]:
    """A box of slices of `shape`, in the pixels of the resized slices.

    A box is (first row, row after the last, first column, column after the last). The resized box
    includes every pixel that it touches.
    """
    if not needs_resize(shape, pixel_spacing_mm, image_size):
        return box
    top, left, rows, columns = _square_field(shape, pixel_spacing_mm)
    return (
        max(0, math.floor((box[0] - top) * image_size / rows)),
        min(image_size, math.ceil((box[1] - top) * image_size / rows)),
        max(0, math.floor((box[2] - left) * image_size / columns)),
        min(image_size, math.ceil((box[3] - left) * image_size / columns)),
    )


def _square_field(
    shape: tuple[int, int], pixel_spacing_mm: tuple[float, float]
) -> tuple[float, float, float, float]:
    """The smallest square field around the image: its top and left (0 or less), rows and columns,
    in pixels."""
    field_mm = max(shape[0] * pixel_spacing_mm[0], shape[1] * pixel_spacing_mm[1])
    rows, columns = field_mm / pixel_spacing_mm[0], field_mm / pixel_spacing_mm[1]
    return min(0.0, (shape[0] - rows) / 2), min(0.0, (shape[1] - columns) / 2), rows, columns


def lung_box(
    chest: ChestSummary,
    shape: tuple[int, int],
    pixel_spacing_mm: tuple[float, float],
    image_size: int,
) -> str:
    """The box of the lungs in pixels of the resized image, "top left bottom right" (bottom and
    right exclusive), or "" without lungs."""
    if chest.lung_box is None:
        return ""
    top, bottom, left, right = resize_box(chest.lung_box, shape, pixel_spacing_mm, image_size)
    return f"{top} {left} {bottom} {right}"


def prepare_images(
    hu: np.ndarray,
    pixel_spacing_mm: tuple[float, float],
    windows: Sequence[Window],
    image_size: int,
) -> np.ndarray:
    """Resized and windowed slices of a canonically oriented volume.

    Args:
        hu: [S, H, W], rows to posterior, columns to the left, slices to superior.
        pixel_spacing_mm: between rows, between columns.
        windows: (level, width) in HU, a channel each.
        image_size: height and width of the slices in pixels.

    Returns:
        [S, image_size, image_size, C] uint8.
    """
    images = np.empty((len(hu), image_size, image_size, len(windows)), np.uint8)
    for image, out in zip(hu, images, strict=True):
        out[:] = window_to_uint8(resize_slice(image, pixel_spacing_mm, image_size), windows)
    return images
