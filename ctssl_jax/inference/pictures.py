"""Pictures of a prediction: probabilities along the slices of a scan, or regions of its mask."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

FOOTER = "Research software; not for diagnosis."


def save_curve(
    path: Path,
    position_mm: np.ndarray,
    probabilities: dict[str, np.ndarray],
    image: np.ndarray,
    top: int,
    *,
    thresholds: dict[str, float],
    title: str,
) -> None:
    """Write probabilities along the slices, and the slice on top of the curve beside them, as PNG.

    Args:
      path: file.
      position_mm: [N] of the slices.
      probabilities: class -> [N]; one curve each.
      image: [H, W] uint8, the slice to show.
      top: which of the N slices it is.
      thresholds: of what -> value; a line each.
      title: of the picture.
    """
    figure, (left, right) = _figure(1, 2, (11, 4.6), title, width_ratios=(1.7, 1))
    marker = "o" if len(position_mm) == 1 else None
    for name, values in probabilities.items():
        left.plot(position_mm, values, label=name, marker=marker, linewidth=1.4)
    left.axvline(
        position_mm[top], color="0.6", linewidth=0.8, linestyle=":", label="slice on the right"
    )
    for (what, value), line in zip(thresholds.items(), ("--", ":"), strict=False):
        left.axhline(
            value,
            color="firebrick",
            linewidth=0.9,
            linestyle=line,
            label=f"threshold of the {what} {value:.3g}",
        )
    left.set(
        ylim=(-0.02, 1.02),
        xlabel="position along the slices, towards the head (mm)",
        ylabel="probability",
    )
    left.legend(loc="best", fontsize=8)
    right.imshow(image, cmap="gray", vmin=0, vmax=255)
    highest = next(iter(probabilities.values()))[top]
    right.set_title(f"slice at {position_mm[top]:.1f} mm: {highest:.3f}", fontsize=9)
    right.axis("off")
    figure.savefig(path, dpi=110)


def save_regions(
    path: Path,
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    captions: Sequence[str],
    pixel_spacing_mm: tuple[float, float],
    *,
    title: str,
    window: tuple[float, float],
) -> None:
    """Write slices with the contour of the mask, up to three a row, as PNG.

    Args:
      path: file.
      images: each [H, W] uint8, canonically oriented.
      masks: each [H, W] bool.
      captions: above each.
      pixel_spacing_mm: between rows, between columns.
      title: of the picture.
      window: level and width of the images in HU, named below.
    """
    columns = min(3, len(images))
    rows = -(-len(images) // columns)
    figure, axes = _figure(rows, columns, (max(6.0, 4 * columns), 4.3 * rows + 0.5), title)
    figure.supxlabel(f"Window {window[0]:g}/{window[1]:g} HU. {FOOTER}", fontsize=7, color="0.4")
    for axis in np.ravel(axes):
        axis.axis("off")
    aspect = pixel_spacing_mm[0] / pixel_spacing_mm[1]
    for axis, image, mask, caption in zip(np.ravel(axes), images, masks, captions, strict=False):
        axis.imshow(image, cmap="gray", vmin=0, vmax=255, aspect=aspect)
        if mask.any():
            axis.contour(mask, levels=[0.5], colors=["#ff3b1f"], linewidths=0.9)
        axis.set_title(caption, fontsize=9)
    figure.savefig(path, dpi=110)


def _figure(
    rows: int,
    columns: int,
    size: tuple[float, float],
    title: str,
    width_ratios: Sequence[float] | None = None,
) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(title, int(11 * size[0])), fontsize=11)
    figure.supxlabel(FOOTER, fontsize=7, color="0.4")
    return figure, figure.subplots(rows, columns, width_ratios=width_ratios)
