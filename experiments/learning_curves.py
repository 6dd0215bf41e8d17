"""Scores against the size of the training set: rows, comparisons with random weights, tables, figures.

Everything is a function of the study's results: RESULT.json of each cell, and RESULT.predictions.npz beside it (what
the model said of each slice, with its patient's pseudonym), from which arms are compared in pairs.
"""

import itertools
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from data_prep.system.errors import InputError
from data_prep.system.files import write_text
from experiments import downstream, study
from experiments.downstream import TITLES, Point, Study
from experiments.study import Cell

REFERENCE = "random"


class Panel(NamedTuple):
    """One axis of a figure.

    title: above it.
    metric: of the results JSON.
    arms: beginnings of the names of the arms that are drawn.
    steps: training steps of the cells that are drawn.
    """

    title: str
    metric: str
    arms: tuple[str, ...]
    steps: int | None = None


def curve_rows(results: dict[Point, dict | None], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """One row an arm, share, number of steps and metric: mean and standard deviation over the seeds that are there."""
    rows = []
    keys = list(dict.fromkeys((point.arm, point.fraction, point.steps) for point in results))
    for (arm, fraction, steps), metric in itertools.product(keys, metrics):
        of_seeds = [
            result
            for point, result in results.items()
            if result and (point.arm, point.fraction, point.steps) == (arm, fraction, steps)
        ]
        values = [result["metrics"][metric]["mean"] for result in of_seeds]
        intervals = [result["metrics"][metric]["ci95"] for result in of_seeds]
        rows.append(
            {
                "arm": arm,
                "fraction": fraction,
                "steps": steps,
                "metric": metric,
                "mean": float(np.mean(values)) if values else None,
                "sd_over_seeds": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "num_seeds": len(values),
                "ci95_by_patient_of_each_seed": "; ".join(
                    "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}" for interval in intervals
                ),
                "train_studies": "/".join(sorted({str(result["num_train_studies"]) for result in of_seeds})),
                "train_slices": "/".join(sorted({str(result["num_train_slices"]) for result in of_seeds})),
                "num_patients": of_seeds[0]["metrics"][metric]["num_patients"] if of_seeds else None,
                "unit": of_seeds[0]["metrics"][metric]["unit"] if of_seeds else None,
            }
        )
    return rows


def compare_with_random(cells: dict[Point, Cell], metric: str) -> list[dict[str, Any]]:
    """Each arm against random weights at each share: difference of the metric, averaged over the seeds of both.

    Intervals and p are of the paired bootstrap by test patient; p is corrected by Holm over all rows.
    """
    from ctssl_jax.evaluation import comparisons, predictions

    rows = []
    for arm, fraction, steps in dict.fromkeys((point.arm, point.fraction, point.steps) for point in cells):
        pairs = [
            (cells[Point(arm, fraction, seed, steps)].result, cells[Point(REFERENCE, fraction, seed, steps)].result)
            for seed in sorted({point.seed for point in cells})
            if arm != REFERENCE and Point(REFERENCE, fraction, seed, steps) in cells
        ]
        pairs = [pair for pair in pairs if all(result.exists() for result in pair)]
        if not pairs:
            continue
        ours, reference = ([predictions.read(path) for path in side] for side in zip(*pairs, strict=True))
        found = comparisons.paired_comparison(ours, reference, metric)
        rows.append({"arm": arm, "fraction": fraction, "steps": steps, "num_seeds": len(pairs), **found})
    corrected = comparisons.holm([row["p"] for row in rows])
    return [{**row, "p_holm": value} for row, value in zip(rows, corrected, strict=True)]


def curve_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Arms against shares, one table a metric and number of steps; mean ± sd over seeds."""
    parts = []
    for metric, steps in dict.fromkeys((row["metric"], row["steps"]) for row in rows):
        chosen = [row for row in rows if (row["metric"], row["steps"]) == (metric, steps)]
        fractions = sorted({row["fraction"] for row in chosen})
        lines = []
        for arm in dict.fromkeys(row["arm"] for row in chosen):
            by_fraction = {row["fraction"]: row for row in chosen if row["arm"] == arm}
            cells = {
                f"{fraction:.3g} of the studies": study.with_spread(
                    by_fraction[fraction]["mean"], by_fraction[fraction]["sd_over_seeds"]
                )
                for fraction in fractions
            }
            lines.append({"weights": TITLES.get(arm, arm), **cells})
        unit = next((row["unit"] for row in chosen if row["unit"]), "")
        after = f" after {steps:,} steps" if steps else ""
        unit = f"{unit}; " if unit else ""
        parts.append(f"### {metric}{after}\n\n{unit}mean ± sd over seeds.\n\n{study.markdown(lines)}")
    return "\n".join(parts)


def comparison_markdown(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """Differences from random weights with intervals and corrected p."""
    if not rows:
        return ""
    lines = [
        {
            "weights": TITLES.get(row["arm"], row["arm"]),
            "share of the studies": f"{row['fraction']:.3g}",
            "steps": f"{row['steps']:,}" if row["steps"] else "recipe",
            "seeds": str(row["num_seeds"]),
            f"difference of {metric}": f"{row['difference']:+.4f}",
            "95 % interval": f"{row['ci95'][0]:+.4f} to {row['ci95'][1]:+.4f}",
            "p (Holm)": f"{row['p_holm']:.3f}",
        }
        for row in rows
    ]
    text = "Paired bootstrap by test patient, seeds averaged; p corrected by Holm over the rows of this table."
    return f"### {metric}: minus random weights\n\n{text}\n\n{study.markdown(lines)}"


def save_figure(path: Path, rows: Sequence[dict[str, Any]], panels: Sequence[Panel], title: str, caption: str) -> None:
    """Draw the panels as PNG and SVG; a point is the mean over seeds, its bar the standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.3 * columns, 3.5 * lines + 1.1), squeeze=False, layout="constrained"
    )
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    colours = {arm: f"C{number % 10}" for number, arm in enumerate(arms)}
    for axis, panel in itertools.zip_longest(axes.flat, panels):
        if panel is None:
            axis.set_axis_off()
            continue
        missing: list[str] = []
        for number, arm in enumerate(arms):
            if arm != REFERENCE and not any(arm.startswith(beginning) for beginning in panel.arms):
                continue
            points = [
                row
                for row in rows
                if row["arm"] == arm
                and row["metric"] == panel.metric
                and panel.steps in (None, row["steps"])
                and row["mean"] is not None
            ]
            points.sort(key=lambda row: row["fraction"])
            axis.errorbar(
                [row["fraction"] * 1.02 ** (number - len(arms) / 2) for row in points],
                [row["mean"] for row in points],
                [row["sd_over_seeds"] or 0 for row in points],
                marker="o",
                markersize=4,
                capsize=2,
                linewidth=1.2,
                linestyle="--" if arm == REFERENCE else "-",
                color="black" if arm == REFERENCE else colours[arm],
                label=TITLES.get(arm, arm),
            )
            missing += [] if points else [TITLES.get(arm, arm)]
        if missing:
            axis.text(0.98, 0.02, "missing: " + "\n".join(missing), ha="right", fontsize=8, transform=axis.transAxes)
        axis.set(xscale="log", xlabel="share of the training studies", title=panel.title)
        axis.title.set_fontsize(9)
        shares = sorted({row["fraction"] for row in rows})
        axis.set_xticks(shares, [f"{share:.3g}" for share in shares])
        axis.set_xlim(shares[0] / 1.3, shares[-1] * 1.3)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    labelled: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    figure.legend(labelled.values(), labelled.keys(), loc="outside right center", fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(textwrap.fill(caption.replace("**", ""), 52 * columns), fontsize=7.5)
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=130)
    plt.close(figure)


def draw(
    asked: Study,
    grid: dict[Point, Cell],
    *,
    name: str,
    title: str,
    panels: Sequence[Panel],
    more: Sequence[str],
    note: str,
) -> str:
    """Write NAME.md, NAME.csv, NAME_comparisons.csv, NAME.png and NAME.svg; returns the Markdown.

    Raises:
      InputError: no result at all.
    """
    results = {point: study.read_result(cell) for point, cell in grid.items()}
    found = [result for result in results.values() if result]
    if not found:
        raise InputError(f"--workdir={asked.workdir} holds no results of {name} yet; run it first")
    metrics = list(dict.fromkeys([*(panel.metric for panel in panels), *more]))
    rows = curve_rows(results, metrics)
    caption = study.caption(found) + (f" {note}" if note else "")
    caption += f" {len(found)} of {len(results)} cells are there."
    main_metric = panels[-1].metric if name == "figure3" else panels[0].metric
    compared = compare_with_random(grid, main_metric)
    text = "\n".join(
        [
            f"# {title}\n\n{caption}\n",
            curve_markdown(rows),
            comparison_markdown(compared, main_metric),
        ]
    )
    write_text(asked.workdir / f"{name}.md", text)
    study.write_csv(asked.workdir / f"{name}.csv", rows)
    if compared:
        study.write_csv(asked.workdir / f"{name}_comparisons.csv", compared)
    save_figure(asked.workdir / f"{name}.png", rows, panels, title, caption)
    return text


def main(
    argv: list[str],
    *,
    module: str,
    kind: str,
    cells_of: Callable[[Study, list[str]], tuple[list[Cell], dict[Point, Cell]]],
    name: str,
    title: str,
    panels: Sequence[Panel] | Callable[[Study], Sequence[Panel]],
    more: Sequence[str],
    note: str = "",
) -> int:
    """The command line of a figure."""
    if len(argv) < 2:
        raise InputError(f"give one of {', '.join(study.VERBS)}: python -m {module} plan ...")
    asked = downstream.study_of_flags(argv[1], kind)
    cells, grid = cells_of(asked, flags.FLAGS.arms)
    if argv[1] == "draw":
        panels = panels(asked) if callable(panels) else panels
        print(draw(asked, grid, name=name, title=title, panels=panels, more=more, note=note))
    else:
        downstream.act(argv[1], module, asked, cells)
    return 0
