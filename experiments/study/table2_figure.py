"""Table II as a picture, in the paper's layout: measures, sample input, predicted output, difference."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from ctssl_jax import pictures
from experiments.study.results import with_spread

COLUMNS = {"input": "Sample input", "prediction": "Predicted output", "difference": "Difference"}


def save(
    path: Path,
    models: Sequence[tuple[str, list[dict], Path]],
    names: dict[str, str],
    caption: str,
) -> None:
    """Draw the table.

    Args:
      path: of the PNG.
      models: title, rows (`metric`, `mean`, `sd`, `paper_mean`, `paper_sd`) and the pictures' npz of each model; what
        is not there is drawn as missing.
      names: metric -> what it is called.
      caption: written below.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(models), 4, figsize=(9.5, 1.75 * len(models) + 1), width_ratios=(1.9, 1, 1, 1), layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].set_title("Performance: ours (the paper's)", fontsize=9, loc="left")
    for axis, title in zip(axes[0, 1:], COLUMNS.values(), strict=True):
        axis.set_title(title, fontsize=9)
    for row, (title, rows, arrays) in zip(axes, models, strict=True):
        lines = [f"{names[line['metric']]}: {_values(line)}" for line in rows]
        row[0].text(0, 0.98, title, fontsize=9, weight="bold", va="top", transform=row[0].transAxes)
        row[0].text(0, 0.8, "\n".join(lines), fontsize=7.5, va="top", transform=row[0].transAxes, linespacing=1.5)
        if not arrays.exists():
            for axis in row[1:]:
                axis.text(0.5, 0.5, "missing", ha="center", va="center", fontsize=8, color="grey")
            continue
        shown = {name: images[len(images) // 2][None] for name, images in pictures.load_arrays(arrays).items()}
        row[1].imshow(pictures.grey(shown["input"][0]))
        row[2].imshow(pictures.grey(shown["prediction"][0]))
        row[3].imshow(pictures.difference(shown["prediction"][0], shown["target"][0]))
    figure.supxlabel(textwrap.fill(caption.replace("**", ""), 130), fontsize=7.5)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _values(row: dict) -> str:
    papers = with_spread(row["paper_mean"], row["paper_sd"])
    return (with_spread(row["mean"], row["sd"]) or "missing") + (f"  ({papers})" if papers else "")
