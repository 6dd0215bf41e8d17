"""Scores against the size of the training set: rows, comparisons with random weights, figures.

Everything follows from the kept results of the cells (`kept`), which hold what the model said of
each slice, with the number of its patient: needed to compare arms in pairs.
"""

import fractions
import itertools
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from data_prep.system.errors import InputError
from data_prep.system.files import write_text

from . import downstream, kept, results, runner
from .cells import Cell
from .downstream import Point, Study
from .paired import detectable_with_seeds, holm_with_seeds, interval_with_seeds
from .presets import TITLES

REFERENCE = "random"
# Told apart by the colour-blind (Okabe and Ito 2008, Color Universal Design), and by markers.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8F8A00")
MARKERS = "sD^vPX<>*"


class Panel(NamedTuple):
    """One axis of a figure.

    title: above it.
    metric: of the results JSON.
    arms: beginnings of the names of the arms that are drawn.
    steps: training steps of the cells that are drawn; 0 means the number of the recipe.
    """

    title: str
    metric: str
    arms: tuple[str, ...] = ("",)
    steps: int = 0


class Figure(NamedTuple):
    """One figure and its tables.

    name: of the module in `experiments`, and of the files.
    title: of the figure.
    kind: of the cells: `pe` or `nodules`.
    panels: drawn once for each number of training steps.
    compared: metric that is compared with random weights.
    more: metrics of the tables that are not drawn.
    note: last sentence of the caption.
    reference: arm that the others are compared with.
    """

    name: str
    title: str
    kind: str
    panels: tuple[Panel, ...]
    compared: str
    more: tuple[str, ...]
    note: str = ""
    reference: str = REFERENCE

    def panels_of(self, study: Study) -> list[Panel]:
        """The panels of a study: a panel for each number of steps, named if there are several."""
        numbers = study.sizes.steps[self.kind]
        return [
            panel._replace(
                title=f"{panel.title}, {steps:,} steps" if len(numbers) > 1 else panel.title,
                steps=steps,
            )
            for panel in self.panels
            for steps in numbers
        ]


def pe_figure(name: str, title: str, *panels: Panel) -> Figure:
    """A figure of PE detection."""
    more = ("exam_auroc", "average_precision", "brier", "ece")
    return Figure(name, title, "pe", panels, "auroc", more)


def nodule_figure(name: str, title: str) -> Figure:
    """A figure of nodule segmentation."""
    panels = Panel("Dice of annotated slices", "dice"), Panel("IoU of annotated slices", "iou")
    more = ("dice_all_slices", "volume_dice", "volume_iou")
    note = (
        "Hard at probability .5. Dice and IoU are means over the slices whose true mask is not "
        "empty; in dice_all_slices, volume_dice and volume_iou both masks empty count 1."
    )
    return Figure(name, title, "nodules", panels, "dice", more, note)


def curve_rows(of_points: dict[Point, dict | None], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """One row an arm, share, number of steps and metric, over the seeds whose results have it: a
    measure can be undefined on a split (labels of one class)."""
    rows = []
    keys = list(dict.fromkeys((point.arm, point.fraction, point.steps) for point in of_points))
    for (arm, fraction, steps), metric in itertools.product(keys, metrics):
        of_seeds = [
            result
            for point, result in of_points.items()
            if result and (point.arm, point.fraction, point.steps) == (arm, fraction, steps)
        ]
        of_seeds = [
            result
            for result in of_seeds
            if result["metrics"].get(metric, {"mean": None})["mean"] is not None
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
                    "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
                    for interval in intervals
                ),
                "train_studies": "/".join(
                    sorted({str(result["num_train_studies"]) for result in of_seeds})
                ),
                "train_slices": "/".join(
                    sorted({str(result["num_train_slices"]) for result in of_seeds})
                ),
                "num_patients": of_seeds[0]["metrics"][metric]["num_patients"]
                if of_seeds
                else None,
                "unit": of_seeds[0]["metrics"][metric]["unit"] if of_seeds else None,
            }
        )
    return rows


def compare_with(
    cells: dict[Point, Cell], metric: str, reference: str = REFERENCE
) -> list[dict[str, Any]]:
    """Difference of the metric between each arm and the reference at each share, mean over seeds.

    Intervals and p come from the paired bootstrap by test patient, with as many draws as the number
    of rows asks for; p, of patients and seeds, is corrected by Holm over all rows, see
    `holm_with_seeds`. Where no row could be below 5 % after the correction, `p_holm` is None and
    `not_corrected` says why. `sd_over_seeds` is of the difference, and `ci95_with_seeds` holds both
    sources, see `interval_with_seeds`; `detectable` is the smallest difference that one comparison
    shows with 80 % power, of patients and, with several seeds, of seeds.
    """
    # not at the top: they import JAX, and --help should be fast
    from ctssl_jax.evaluation import comparisons, predictions

    def statistics_of(run: predictions.Predictions) -> dict[str, float]:
        return comparisons.statistic_of(run, metric)(np.ones(len(run.patient_id)))

    pairs_of_rows = {}
    for arm, fraction, steps in dict.fromkeys(
        (point.arm, point.fraction, point.steps) for point in cells
    ):
        pairs = [
            (
                cells[Point(arm, fraction, seed, steps)],
                cells[Point(reference, fraction, seed, steps)],
            )
            for seed in sorted({point.seed for point in cells})
            if arm != reference and Point(reference, fraction, seed, steps) in cells
        ]
        pairs = [pair for pair in pairs if all(cell.is_complete() for cell in pair)]
        if pairs:
            pairs_of_rows[arm, fraction, steps] = pairs
    rows, num_draws = [], comparisons.draws_of_family(len(pairs_of_rows))
    for (arm, fraction, steps), pairs in pairs_of_rows.items():
        ours, others = (
            [kept.predictions_of(cell) for cell in side] for side in zip(*pairs, strict=True)
        )
        comparison = comparisons.paired_comparison(ours, others, metric, num_resamples=num_draws)
        of_seeds = [
            statistics_of(one)[metric] - statistics_of(other)[metric]
            for one, other in zip(ours, others, strict=True)
        ]
        rows.append(
            {
                "arm": arm,
                "fraction": fraction,
                "steps": steps,
                "num_seeds": len(pairs),
                **comparison,
                "sd_over_seeds": statistics.stdev(of_seeds) if len(of_seeds) > 1 else None,
                "ci95_with_seeds": interval_with_seeds(comparison["ci95"], of_seeds),
                "detectable": detectable_with_seeds(
                    comparison["standard_error"], of_seeds, comparison["num_patients"]
                )
                if comparison["smallest_p"] < comparisons.LEVEL
                else None,
            }
        )
    corrected, refused = holm_with_seeds(rows, lambda row: (row["fraction"], row["steps"]))
    return [
        {**row, "p_holm": value, "not_corrected": refused}
        for row, value in zip(rows, corrected, strict=True)
    ]


def curve_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Arms against shares, one table a metric and number of steps; mean ± sd over seeds."""
    parts = []
    for metric, steps in dict.fromkeys((row["metric"], row["steps"]) for row in rows):
        chosen = [row for row in rows if (row["metric"], row["steps"]) == (metric, steps)]
        shares = sorted({row["fraction"] for row in chosen})
        lines = []
        for arm in dict.fromkeys(row["arm"] for row in chosen):
            by_fraction = {row["fraction"]: row for row in chosen if row["arm"] == arm}
            cells = {
                f"{share_in_words(fraction)} of the studies": results.with_spread(
                    by_fraction[fraction]["mean"], by_fraction[fraction]["sd_over_seeds"]
                )
                if fraction in by_fraction
                else "-"
                for fraction in shares
            }
            lines.append({"weights": TITLES.get(arm, arm), **cells})
        unit = next((row["unit"] for row in chosen if row["unit"]), "")
        after = f" after {steps:,} steps" if steps else ""
        unit = f"{unit}; " if unit else ""
        parts.append(
            f"### {metric}{after}\n\n{unit}mean ± sd over seeds.\n\n{results.markdown(lines)}"
        )
    return "\n".join(parts)


def comparison_markdown(
    rows: Sequence[dict[str, Any]], metric: str, reference: str = REFERENCE
) -> str:
    """Differences from the reference with intervals and corrected p."""
    if not rows:
        return ""

    def interval(bounds: Sequence[float] | None) -> str:
        return "-" if bounds is None else f"{bounds[0]:+.4f} to {bounds[1]:+.4f}"

    def shown(row: dict[str, Any]) -> str:
        bounds = row["ci95_with_seeds"]
        sure = bounds and bounds[0] * bounds[1] > 0 and (row["p_holm"] or 1.0) < 0.05
        return f"**{row['difference']:+.4f}**" if sure else f"{row['difference']:+.4f}"

    lines = [
        {
            "weights": TITLES.get(row["arm"], row["arm"]),
            "share of the studies": share_in_words(row["fraction"]),
            "steps": f"{row['steps']:,}" if row["steps"] else "recipe",
            "seeds": str(row["num_seeds"]),
            f"difference of {metric}": shown(row),
            "95 % interval by patient": interval(row["ci95"]),
            "sd over seeds": results.with_spread(row["sd_over_seeds"], None) or "-",
            "95 % interval, patients and seeds": interval(row["ci95_with_seeds"]),
            "smallest detectable": results.with_spread(row["detectable"], None) or "-",
            "p (Holm)": "refused" if row["p_holm"] is None else f"{row['p_holm']:.4f}",
        }
        for row in rows
    ]
    text = (
        f"Paired bootstrap by test patient, {rows[0]['num_draws']:,} draws, seeds averaged; p "
        "knows patients and, where a row has several seeds, seeds, and is corrected by Holm over "
        "the rows of this table. **Bold** where the interval of patients and seeds together "
        "excludes zero and the corrected p is below 0.05; never with one seed."
    )
    if rows[0]["not_corrected"]:
        text += f" REFUSED: {rows[0]['not_corrected']}."
    return f"### {metric}: minus {TITLES[reference]}\n\n{text}\n\n{results.markdown(lines)}"


def detectable_in_words(compared: Sequence[dict[str, Any]], metric: str) -> str:
    """The smallest detectable difference of each share, the median over its arms and steps with
    the most seeds."""
    of_share: dict[float, list[float]] = {}
    for row in compared:
        own = [one["num_seeds"] for one in compared if one["fraction"] == row["fraction"]]
        if row["detectable"] is not None and row["num_seeds"] == max(own):
            of_share.setdefault(row["fraction"], []).append(row["detectable"])
    if not of_share:
        return ""
    parts = [
        f"{statistics.median(of_share[share]):.3f} at {share_in_words(share)}"
        for share in sorted(of_share)
    ]
    return (
        f" Smallest detectable difference of {metric} (one comparison, paired by patient, several "
        f"seeds included, 80 % power; median over arms): {', '.join(parts)} of the studies."
    )


def bars_in_words(rows: Sequence[dict[str, Any]]) -> str:
    """What the bars of the figure are."""
    numbers = sorted({row["num_seeds"] for row in rows if row["num_seeds"]})
    if not numbers or numbers[-1] < 2:
        return " One seed: no bars."
    seeds = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    return (
        f" Bars: ± standard deviation of {seeds} seeds, cut at 0 and 1; the choice of patients is "
        "not in them."
    )


def save_figure(
    path: Path, rows: Sequence[dict[str, Any]], panels: Sequence[Panel], title: str, caption: str
) -> None:
    """Draw the panels as PNG and SVG: mean over seeds, with the standard deviation as a bar that is
    cut at 0 and 1, the ends of every score. The caption says so."""
    from matplotlib import figure as matplotlib_figure

    caption += bars_in_words(rows)
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = matplotlib_figure.Figure(
        figsize=(4.3 * columns, 3.5 * lines + 1.1), layout="constrained"
    )
    axes = figure.subplots(lines, columns, squeeze=False)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    others = [arm for arm in arms if arm != REFERENCE]
    looks = {
        arm: {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[n % len(MARKERS)]}
        for n, arm in enumerate(others)
    }
    looks[REFERENCE] = {"color": "black", "marker": "o", "linestyle": "--"}
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
                and row["steps"] == panel.steps
                and row["mean"] is not None
            ]
            if not points:
                missing.append(TITLES.get(arm, arm))
                continue
            points.sort(key=lambda row: row["fraction"])
            means = np.array([row["mean"] for row in points])
            spread = np.array([row["sd_over_seeds"] or 0 for row in points])
            shares_left_out = len(points) < len({row["fraction"] for row in rows})
            look = looks[arm] | ({"linestyle": ":"} if shares_left_out else {})
            axis.errorbar(
                [row["fraction"] * 1.02 ** (number - len(arms) / 2) for row in points],
                means,
                [np.minimum(spread, means), np.minimum(spread, 1 - means)],
                **look,
                markersize=4,
                capsize=2,
                linewidth=1.2,
                label=TITLES.get(arm, arm),
            )
        if missing:
            axis.text(
                0.98,
                0.02,
                "missing: " + "\n".join(missing),
                ha="right",
                fontsize=8,
                transform=axis.transAxes,
            )
        axis.set(xscale="log", xlabel="training slices (share of the studies)", title=panel.title)
        axis.title.set_fontsize(9)
        shares = sorted({row["fraction"] for row in rows})
        axis.set_xticks(shares, [_share_in_slices(rows, share) for share in shares], fontsize=8)
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


def save_differences(
    path: Path, compared: Sequence[dict[str, Any]], metric: str, reference: str, caption: str
) -> None:
    """Draw the differences from the reference as PNG and SVG: a panel a share and number of steps,
    a line an arm."""
    from matplotlib import figure as matplotlib_figure

    arms = list(dict.fromkeys(row["arm"] for row in compared))
    panels = sorted({(row["fraction"], row["steps"]) for row in compared})
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = matplotlib_figure.Figure(
        figsize=(1.8 + 3.2 * columns, 1.3 + lines * (0.7 + 0.22 * len(arms))), layout="constrained"
    )
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (fraction, steps) in zip(axes.flat, panels, strict=False):
        for row in compared:
            if (row["fraction"], row["steps"]) != (fraction, steps):
                continue
            place, bounds = arms.index(row["arm"]), row["ci95_with_seeds"]
            colour = COLOURS[0] if bounds else "0.45"
            axis.plot(bounds or row["ci95"], [place] * 2, color=colour, linewidth=1.2)
            face = colour if bounds else "white"
            axis.plot(row["difference"], place, "o", color=colour, markerfacecolor=face, ms=4.5)
        axis.axvline(0, color="black", linestyle="--", linewidth=0.8, zorder=0)
        after = f", {steps:,} steps" if len({steps for _, steps in panels}) > 1 else ""
        axis.set_title(f"{share_in_words(fraction)} of the studies{after}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(arms)), [TITLES.get(arm, arm) for arm in arms], fontsize=8)
    axes[0, 0].set_ylim(len(arms) - 0.5, -0.5)
    figure.suptitle(f"{metric}: minus {TITLES.get(reference, reference)}", fontsize=11)
    words = (
        f"{caption} Filled, blue: several seeds, 95 % interval of patients and seeds. Open, grey: "
        "one seed, 95 % interval of patients alone, which does not know how far another seed would "
        "differ. Not corrected for their number: see the table."
    )
    figure.supxlabel(textwrap.fill(words.replace("**", ""), 30 + 48 * columns), fontsize=7.5)
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=130)


def _share_in_slices(rows: Sequence[dict[str, Any]], share: float) -> str:
    """A share as its number of training slices, or their range over the seeds, and the share."""
    texts = [row.get("train_slices") for row in rows if row["fraction"] == share]
    numbers = sorted({int(n) for text in texts if text for n in text.split("/") if n.isdigit()})
    if not numbers:
        return share_in_words(share)
    slices = " to ".join(f"{n:,}" for n in dict.fromkeys((numbers[0], numbers[-1])))
    return f"{slices}\n({share_in_words(share)})"


def share_in_words(share: float) -> str:
    """A share of the training studies: "1/32", "0.04", "all"."""
    exact = fractions.Fraction(share)
    if exact == 1:
        return "all"
    return f"{exact}" if exact.numerator == 1 and exact.denominator <= 64 else f"{share:.3g}"


def draw(study: Study, grid: dict[Point, Cell], figure: Figure) -> str:
    """Write NAME.md, NAME.csv, NAME.png and NAME.svg, and where arms can be compared
    NAME_comparisons.csv, NAME_differences.png and .svg; returns the Markdown.

    Raises:
      InputError: there are no results yet.
    """
    of_points = {point: results.read_result(cell) for point, cell in grid.items()}
    complete = [result for result in of_points.values() if result]
    path = study.workdir / figure.name
    if not complete:
        raise InputError(
            f"--workdir={study.workdir} holds no results of {figure.name} yet; run it first"
        )
    study.workdir.mkdir(parents=True, exist_ok=True)
    panels = figure.panels_of(study)
    rows = curve_rows(
        of_points, list(dict.fromkeys([*(panel.metric for panel in panels), *figure.more]))
    )
    caption = results.caption(complete) + (f" {figure.note}" if figure.note else "")
    caption += f" {len(complete)} of {len(of_points)} cells are there."
    compared = compare_with(grid, figure.compared, figure.reference)
    caption += detectable_in_words(compared, figure.compared)
    parts = [f"# {figure.title}\n\n{caption}\n", curve_markdown(rows)]
    text = "\n".join([*parts, comparison_markdown(compared, figure.compared, figure.reference)])
    write_text(path.with_suffix(".md"), text)
    results.write_csv(path.with_suffix(".csv"), rows)
    if compared:
        results.write_csv(path.with_name(f"{figure.name}_comparisons.csv"), compared)
        differences = path.with_name(f"{figure.name}_differences")
        save_differences(differences, compared, figure.compared, figure.reference, caption)
    save_figure(path.with_suffix(".png"), rows, panels, figure.title, caption)
    return text


def main(argv: list[str], figure: Figure) -> int:
    """The command line of a figure."""
    module = f"{__package__.rpartition('.')[0]}.{figure.name}"
    verb = runner.verb_of(argv, module)
    study = downstream.study_of_flags(verb, figure.kind)
    cells, grid = downstream.grid_cells(study, figure.kind, flags.FLAGS.arms)
    if verb == "draw":
        print(draw(study, grid, figure), flush=True)
        runner.suggest_after("draw", module, [])
    else:
        downstream.act(verb, module, study, cells)
    return 0
