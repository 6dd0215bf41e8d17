"""Table II: its rows as text, and the picture in the paper's layout."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctssl_jax.runs import strips

from .cells import FRACTIONS, mask_name
from .paired import paired_volumes
from .paper import TABLE2
from .results import markdown, with_spread

RECONSTRUCTION = ("next_slice", *(mask_name(fraction) for fraction in FRACTIONS), "denoising")
CLASSIFICATION = ("rotation", "flip")
TITLES = {
    "next_slice": "Next slice prediction",
    **{
        mask_name(fraction): f"Masked region prediction, {fraction:.0%} masking"
        for fraction in FRACTIONS
    },
    "denoising": "Denoising",
    "rotation": "Rotation prediction",
    "flip": "Flip prediction",
    "untrained": "(untrained encoder)",
    "pixels": "(pixels, no encoder)",
}
METRICS = {
    "mse": "MSE",
    "masked_mse": "masked MSE, per pixel",
    "masked_mse_batch_sum": "masked MSE, sum over a batch of 16",
    "ssim": "SSIM",
    "cross_entropy": "cross-entropy on logits",
    "double_softmax_cross_entropy": "cross-entropy, softmax twice",
    "auroc": "AUROC, one against the rest",
}
CROSS = {  # columns of the cross table: metric of the probe -> title
    f"{target}/{probe}/{metric}": f"{title}, {'linear' if probe == 'linear' else 'kNN'}"
    for target, metric, title in (
        ("rotation", "auroc", "rotation AUROC"),
        ("flip", "auroc", "flip AUROC"),
        ("clean", "mse", "slice MSE"),
        ("masked_region", "masked_mse", "masked MSE"),
        ("denoising", "mse", "denoising MSE"),
        ("next_slice", "mse", "next-slice MSE"),
    )
    for probe in ("linear", "knn")
} | {
    "position/linear/r2": "place in the scan, R²",
    "order/linear/auroc": "order of two slices, AUROC",
    "neighbours/knn/recall": "neighbours found, kNN",
}
LABEL_FREE = ("position/linear/r2", "order/linear/auroc", "neighbours/knn/recall")
CONTROL = "cross_untrained"
BASELINES = {"copy_input": "the input itself", "mean_image": "mean training slice"}
COLUMNS = {"input": "Sample input", "prediction": "Predicted output", "difference": "Difference"}


def figure_rows(results: dict[str, dict | None]) -> list[dict[str, str | float | None]]:
    """One row a model and metric: our mean, sd and interval, the paper's numbers, the unit; None
    where a number is missing."""
    rows = []
    for name in (*RECONSTRUCTION, *CLASSIFICATION):
        result = results[name]
        metrics = [
            metric
            for metric in METRICS
            if (result and metric in result["metrics"]) or metric in TABLE2[name]
        ]
        for metric in metrics:
            value = (result["metrics"] if result else {}).get(metric, {})
            low, high = value.get("ci95") or (None, None)
            paper_mean, paper_sd = TABLE2[name].get(metric, (None, None))
            rows.append(
                {
                    "model": name,
                    "metric": metric,
                    "mean": value.get("mean"),
                    "sd": value.get("sd"),
                    "ci95_low": low,
                    "ci95_high": high,
                    "num_volumes": value.get("num_volumes"),
                    "num_patients": value.get("num_patients"),
                    "paper_mean": paper_mean,
                    "paper_sd": paper_sd,
                    "unit": value.get("unit"),
                }
            )
    return rows


def table_markdown(rows: Sequence[dict]) -> str:
    """Table II: a line for each model and metric, ours beside the paper's."""
    return markdown(
        [
            {
                "strategy": TITLES[row["model"]],
                "measure": METRICS[row["metric"]],
                "ours, mean ± sd over volumes": with_spread(row["mean"], row["sd"]),
                "95 % interval by patient": "-"
                if row["ci95_low"] is None
                else f"{row['ci95_low']:.4f} to {row['ci95_high']:.4f}",
                "the paper's": with_spread(row["paper_mean"], row["paper_sd"]) or "-",
            }
            for row in rows
        ]
    )


def health_markdown(results: dict[str, dict | None]) -> str:
    """A line a model: its use of embedding and codebook, and its warnings of a collapse."""
    rows = []
    for name, result in results.items():
        columns = "strategy,checkpoint,effective rank,codes used,perplexity,collapsed".split(",")
        row = dict.fromkeys(columns, "")
        row["strategy"] = TITLES[name]
        if result:
            embedding, codebook = result["embedding"], result.get("codebook")
            row["checkpoint"] = f"step {result['checkpoint_step']:,}"
            if (score := result.get("checkpoint_score")) and score["value"] is not None:
                row["checkpoint"] += f", {score['name']} {score['value']:.4g}"
            row["effective rank"] = (
                f"{embedding['effective_rank']:.1f} of {embedding['embedding_dim']:.0f}"
            )
            row["codes used"] = (
                f"{codebook['used_codes']:.0f} of {codebook['num_codes']:.0f}" if codebook else "-"
            )
            row["perplexity"] = f"{codebook['perplexity']:.0f}" if codebook else "-"
            row["collapsed"] = "; ".join(result["warnings"]) or "no"
        rows.append(row)
    return markdown(rows)


def cross_rows(results: dict[str, dict | None]) -> list[dict[str, str]]:
    """One row an encoder, one column a probe; empty where missing."""
    rows = []
    for name, result in results.items():
        values = {
            title: with_spread(result["metrics"][metric]["mean"], result["metrics"][metric]["sd"])
            if result and metric in result["metrics"]
            else ""
            for metric, title in CROSS.items()
        }
        rows.append({"encoder": TITLES[name.removeprefix("cross_")], **values})
    return rows


def cross_values(results: dict[str, dict | None]) -> list[dict[str, Any]]:
    """`cross_rows` as numbers: two columns a probe, mean and standard deviation over volumes."""
    rows = []
    for name, result in results.items():
        row: dict[str, Any] = {"encoder": name.removeprefix("cross_")}
        for metric in CROSS:
            value = (result["metrics"] if result else {}).get(metric, {"mean": None, "sd": None})
            row |= {f"{metric}_mean": value["mean"], f"{metric}_sd": value["sd"]}
        rows.append(row)
    return rows


# The order of strategies that the paper's Table II shows: (first, second, measure), first - second.
ORDER = (
    *(("next_slice", "denoising", metric) for metric in ("mse", "ssim")),
    *(("mask_20", "denoising", metric) for metric in ("mse", "ssim")),
    *(("mask_10", "mask_05", metric) for metric in ("mse", "masked_mse", "ssim")),
    *(("mask_20", "mask_10", metric) for metric in ("mse", "masked_mse", "ssim")),
    *(("mask_33", "mask_20", metric) for metric in ("mse", "masked_mse", "ssim")),
    ("flip", "rotation", "auroc"),
)


def order_rows(results: dict[str, dict | None]) -> list[dict[str, Any]]:
    """One row a pair of strategies that the paper's table orders: their difference on the patients
    that both tested, its interval, and the paper's difference. Empty without such pairs."""
    rows = []
    for first, second, metric in ORDER:
        ours, other = results.get(first), results.get(second)
        if not ours or not other:
            continue
        found = paired_volumes(ours, other, metric)
        if found["difference"] is None:
            continue
        papers = [
            TABLE2[name].get("masked_mse_batch_sum" if metric == "masked_mse" else metric)
            for name in (first, second)
        ]
        scale = 16 if metric == "masked_mse" else 1  # a sum over a batch of 16
        paper = (papers[0][0] - papers[1][0]) / scale if all(papers) else None
        row = {"first": first, "second": second, "metric": metric, **found}
        rows.append(row | {"paper": paper})
    return rows


def order_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """`order_rows` as a table."""
    lines = [
        {
            "first minus second": f"{TITLES[row['first']]} - {TITLES[row['second']]}",
            "measure": METRICS[row["metric"]],
            "difference": f"{row['difference']:+.4f}",
            "95 % interval by patient": f"{row['low']:+.4f} to {row['high']:+.4f}",
            "patients": str(row["num_patients"]),
            "smallest detectable": with_spread(row["detectable"], None) or "-",
            "the paper's": "-" if row["paper"] is None else f"{row['paper']:+.4f}",
        }
        for row in rows
    ]
    return (
        "## The order of the strategies\n\nPaired bootstrap by test patient, widened for few "
        "patients; one seed, so that no interval knows how far training itself varies. "
        f"{_each_alone(len(rows))}\n\n{markdown(lines)}"
    )


def _each_alone(number: int) -> str:
    return (
        f"Not corrected for the {number} comparisons of this table. Smallest detectable: the "
        "difference that one comparison of so many patients shows with 80 % power at the level of "
        "5 %."
    )


def baselines_markdown(results: dict[str, dict | None]) -> str:
    """A line a strategy and baseline: what needs no training. "" without baselines."""
    lines = [
        {
            "strategy": TITLES[name],
            "baseline": BASELINES[kind],
            **{
                METRICS[metric]: f"{measures[metric]:.4f}" if metric in measures else "-"
                for metric in ("mse", "masked_mse", "ssim")
            },
        }
        for name in RECONSTRUCTION
        for kind, measures in ((results.get(name) or {}).get("baselines") or {}).items()
        if kind in BASELINES and isinstance(measures.get("mse"), float)
    ]
    return f"## Baselines\n\nMeans over volumes.\n\n{markdown(lines)}" if lines else ""


def label_free_rows(results: dict[str, dict | None]) -> list[dict[str, Any]]:
    """One row an encoder and label-free probe: the mean over volumes, and its difference from the
    untrained encoder on the same volumes with a 95 % interval by patient and the smallest
    difference that so many patients can show. Empty without volumes of the control."""
    control = results.get(CONTROL)
    if not control or "volumes" not in control:
        return []
    rows = []
    for name, result in results.items():
        for metric in LABEL_FREE:
            value = (result or {}).get("metrics", {}).get(metric)
            if value is None or metric not in control["metrics"]:
                continue
            low, high = value["ci95"] or (None, None)
            row = {"encoder": name.removeprefix("cross_"), "metric": metric, "mean": value["mean"]}
            row |= {"ci95_low": low, "ci95_high": high, "num_patients": value["num_patients"]}
            row |= dict.fromkeys(("difference", "low", "high", "p", "detectable"))
            if name != CONTROL:
                row |= paired_volumes(result, control, metric)
            rows.append(row)
    return rows


def label_free_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """`label_free_rows` as a table, a line an encoder and probe."""
    lines = []
    for row in rows:
        bounds = (
            "-" if row["ci95_low"] is None else f"{row['ci95_low']:.3f} to {row['ci95_high']:.3f}"
        )
        line = {
            "encoder": TITLES[row["encoder"]],
            "probe": CROSS[row["metric"]],
            "mean over volumes": f"{row['mean']:.3f}",
            "95 % interval by patient": bounds,
            "minus untrained": "-",
            "its 95 % interval": "-",
            "smallest detectable": "-",
        }
        if row["difference"] is not None:
            line["minus untrained"] = f"{row['difference']:+.3f}"
            low, high = row["low"], row["high"]
            line["its 95 % interval"] = f"{low:+.3f} to {high:+.3f}"
            if row["detectable"] is not None:
                line["smallest detectable"] = f"{row['detectable']:.3f}"
        lines.append(line)
    return (
        "## Label-free probes of held-out patients\n\n"
        f"{_each_alone(sum(row['difference'] is not None for row in rows))}\n\n{markdown(lines)}"
    )


def save_picture(
    path: Path,
    models: Sequence[tuple[str, list[dict], Path]],
    names: dict[str, str],
    caption: str,
) -> None:
    """Draw the table.

    Args:
      path: of the PNG.
      models: title, rows (`metric`, `mean`, `sd`, `paper_mean`, `paper_sd`) and the pictures' npz
        of each model; absent pictures are drawn as missing. A model that tells classes has their
        probabilities in place of a difference.
      names: metric -> its title.
      caption: written below.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 1.75 * len(models) + 1.4), layout="constrained")
    axes = figure.subplots(
        len(models) + 1,
        4,
        width_ratios=(1.9, 1, 1, 1),
        height_ratios=(*[1] * len(models), 0.06),
    )
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].set_title("Performance: ours (the paper's)", fontsize=9, loc="left")
    for axis, title in zip(axes[0, 1:], COLUMNS.values(), strict=True):
        axis.set_title(title, fontsize=9)
    colours = LinearSegmentedColormap.from_list("difference", ["blue", "0.5", "red"])
    scale = axes[-1, 3]
    scale.set_axis_on()
    figure.colorbar(
        ScalarMappable(Normalize(-0.5, 0.5), colours), cax=scale, orientation="horizontal"
    )
    scale.set_xlabel("blue too dark, red too bright\n(share of the window)", fontsize=7)
    scale.tick_params(labelsize=7)
    for row, (title, rows, arrays) in zip(axes, models, strict=False):
        lines = [f"{names[line['metric']]}: {_values(line)}" for line in rows]
        row[0].text(0, 0.98, title, fontsize=9, weight="bold", va="top", transform=row[0].transAxes)
        row[0].text(
            0,
            0.8,
            "\n".join(lines),
            fontsize=7.5,
            va="top",
            transform=row[0].transAxes,
            linespacing=1.5,
        )
        if not arrays.exists():
            for axis in row[1:]:
                axis.text(0.5, 0.5, "missing", ha="center", va="center", fontsize=8, color="grey")
            continue
        pictures = strips.load_arrays(arrays)
        middle = len(pictures["input"]) // 2
        row[1].imshow(strips.grey(pictures["input"][middle]))
        row[2].imshow(strips.grey(pictures["prediction"][middle]))
        if "probabilities" in pictures:
            row[3].text(0, 0.9, _classes(pictures, middle), fontsize=7.5, va="top", linespacing=1.6)
        elif any(line["metric"] == "auroc" for line in rows):  # of an evaluation before them
            row[3].text(0, 0.9, "P of the classes: missing", fontsize=7.5, va="top", color="grey")
        else:
            row[3].imshow(
                strips.difference(pictures["prediction"][middle], pictures["target"][middle])
            )
    figure.supxlabel(textwrap.fill(caption.replace("**", ""), 130), fontsize=7.5)
    figure.savefig(path, dpi=130)


def _classes(pictures: dict[str, Any], number: int) -> str:
    """The probability of each class of a slice, and the truth."""
    truth = pictures["label"][number]
    lines = [
        f"P({name}) = {probability:.3f}{'  (true)' if k == truth else ''}"
        for k, (name, probability) in enumerate(
            zip(pictures["class_names"], pictures["probabilities"][number], strict=True)
        )
    ]
    return "\n".join(lines)


def _values(row: dict) -> str:
    papers = with_spread(row["paper_mean"], row["paper_sd"])
    return (with_spread(row["mean"], row["sd"]) or "missing") + (f"  ({papers})" if papers else "")
