"""AUROCs of patient attributes, of frozen encoders and of controls: rows, tables, figure."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.system.errors import InputError
from data_prep.system.files import write_text

from . import results
from .cells import Cell
from .downstream import Study

GROUPS = {"pretrained": "C0", "baseline": "black", "control": "0.55"}  # group -> colour


class Model(NamedTuple):
    """A row of the figure.

    title: of the row.
    group: `pretrained`, `baseline` or `control`.
    cells: attribute -> its cells, one a seed.
    """

    title: str
    group: str
    cells: dict[str, list[Cell]]


def cells_of(models: Sequence[Model]) -> list[Cell]:
    """The cells of the rows, each once, in order."""
    groups = (cells for model in models for cells in model.cells.values())
    return list({cell.name: cell for cells in groups for cell in cells}.values())


def aurocs(result: dict, attribute: str) -> dict[str, dict]:
    """The AUROCs of an attribute in the result of a probe or a training.

    Returns:
      `auroc` (mean of each class against the rest) and `auroc/CLASS` -> the measure; empty for a
      result of other attributes.
    """
    probed = result.get("kind") == "attributes"
    if not probed and result["label"] != attribute:
        return {}
    prefix = f"{attribute}/" if probed else ""
    measures = {
        name.removeprefix(prefix): value
        for name, value in result["metrics"].items()
        if name.startswith(prefix)
    }
    return {
        name: value
        for name, value in measures.items()
        if name == "auroc" or name.startswith("auroc/")
    }


def rows_of(models: Sequence[Model], by_name: dict[str, dict | None]) -> list[dict[str, Any]]:
    """One row a model, attribute and AUROC.

    Args:
      models: of the figure.
      by_name: name of a cell -> its results, None while it is missing.

    Returns:
      rows; `mean` is over the seeds with results, `ci95_low` and `ci95_high` are the mean bounds of
      their intervals by patient. All are None without results (`num_seeds` 0) or where the AUROC is
      undefined.
    """
    rows = []
    for model in models:
        for attribute, cells in model.cells.items():
            seeds = [aurocs(result, attribute) for cell in cells if (result := by_name[cell.name])]
            for metric in dict.fromkeys(["auroc", *(name for seed in seeds for name in seed)]):
                measures = [seed[metric] for seed in seeds if metric in seed]
                values = [measure["mean"] for measure in measures if measure["mean"] is not None]
                bounds = np.array(
                    [measure["ci95"] for measure in measures if measure["ci95"] is not None]
                )
                low, high = bounds.mean(axis=0).tolist() if len(bounds) else (None, None)
                rows.append(
                    {
                        "model": model.title,
                        "group": model.group,
                        "attribute": attribute,
                        "metric": metric,
                        "mean": float(np.mean(values)) if values else None,
                        "sd_over_seeds": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                        "num_seeds": len(measures),
                        "ci95_low": low,
                        "ci95_high": high,
                        "of_each_seed": " ".join(f"{value:.4f}" for value in values),
                        "num_volumes": measures[0]["num_volumes"] if measures else None,
                        "num_patients": measures[0]["num_patients"] if measures else None,
                    }
                )
    return rows


def cell_text(row: dict[str, Any]) -> str:
    """Mean, standard deviation over seeds and interval of a row; empty while it is missing."""
    if not row["num_seeds"]:
        return ""
    if row["mean"] is None:
        return "undefined"
    interval = (
        "" if row["ci95_low"] is None else f" ({row['ci95_low']:.3f} to {row['ci95_high']:.3f})"
    )
    return results.with_spread(row["mean"], row["sd_over_seeds"]) + interval


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Models against attributes, then against the classes of each attribute with more than two."""

    def table(chosen: Sequence[dict[str, Any]], column: str) -> str:
        columns = dict.fromkeys(row[column].removeprefix("auroc/") for row in chosen)
        lines = []
        for model, group in dict.fromkeys((row["model"], row["group"]) for row in chosen):
            own = {
                row[column].removeprefix("auroc/"): row for row in chosen if row["model"] == model
            }
            cells = {name: cell_text(own[name]) if name in own else "" for name in columns}
            lines.append({"features": model, "kind": group, **cells})
        return results.markdown(lines)

    parts = [table([row for row in rows if row["metric"] == "auroc"], "attribute")]
    for attribute in dict.fromkeys(row["attribute"] for row in rows):
        of_classes = [
            row for row in rows if row["attribute"] == attribute and row["metric"] != "auroc"
        ]
        # of two classes, both AUROCs are the mean
        if len({row["metric"] for row in of_classes}) > 2:
            parts.append(
                f"### {attribute}: each class against the rest\n\n{table(of_classes, 'metric')}"
            )
    return "\n".join(parts)


def caption_of(complete: Sequence[dict], rows: Sequence[dict[str, Any]], num_cells: int) -> str:
    """The words below the figure, with the warnings that its reader needs."""
    patients = []
    for attribute in dict.fromkeys(row["attribute"] for row in rows):
        numbers = sorted(
            {
                row["num_patients"]
                for row in rows
                if row["attribute"] == attribute and row["num_patients"]
            }
        )
        patients.append(f"{attribute} {' or '.join(map(str, numbers)) or 'missing'}")
    parts = [
        results.synthetic_warning(complete),
        "AUROC of each class against the rest, mean over classes, of middle slices of the "
        f"{', '.join(sorted({result['split'] for result in complete}))} split (patients: "
        f"{', '.join(patients)}). ",
        "95 % intervals by patient; where there are several seeds: mean ± sd, and mean bounds of "
        "their intervals. ",
        f"{', '.join(sorted({result['device'] for result in complete}))}. ",
        f"{len(complete)} of {num_cells} cells are there.",
    ]
    parts += [results.held_out_warning(complete), results.different_datasets(complete)]
    return "".join(parts)


def save_figure(path: Path, rows: Sequence[dict[str, Any]], caption: str) -> None:
    """Draw a panel an attribute as PNG and SVG: mean, interval and seeds of each model."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["metric"] == "auroc"]
    attributes = list(dict.fromkeys(row["attribute"] for row in rows))
    models = list(dict.fromkeys((row["model"], row["group"]) for row in rows))
    places, height = {}, 0.0
    for number, (model, group) in enumerate(models):  # a gap separates the groups
        height += 1.0 if number and group == models[number - 1][1] else 1.8
        places[model] = height
    size = 2.2 + 2.6 * len(attributes), 1.6 + 0.3 * height
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(attributes), sharey=True, squeeze=False)
    for axis, attribute in zip(axes.flat, attributes, strict=True):
        axis.axvline(0.5, color="0.3", linestyle=":", linewidth=1)
        for row in rows:
            if row["attribute"] != attribute:
                continue
            place, colour = places[row["model"]], GROUPS[row["group"]]
            if row["mean"] is None:
                axis.text(
                    0.51, place, cell_text(row) or "missing", fontsize=7, color="0.4", va="center"
                )
                continue
            if row["ci95_low"] is not None:
                axis.plot(
                    [row["ci95_low"], row["ci95_high"]], [place, place], color=colour, linewidth=1.5
                )
            axis.plot(row["mean"], place, marker="o", color=colour, markersize=5)
            if row["num_seeds"] > 1:
                values = [float(value) for value in row["of_each_seed"].split()]
                axis.plot(
                    values,
                    [place - 0.25] * len(values),
                    "o",
                    mfc="none",
                    color=colour,
                    markersize=3,
                )
        axis.set(xlim=(0, 1), xlabel="AUROC", title=attribute.replace("_", " "))
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(list(places.values()), list(places), fontsize=8)
    axes[0, 0].set_ylim(height + 0.8, 1.0)  # first model on top
    title = (
        "Patient attributes from middle slices (bars: 95 % interval by patient; rings: seeds; "
        "dotted: chance)"
    )
    figure.suptitle(textwrap.fill(title, 15 + 30 * len(attributes)), fontsize=11)
    figure.supxlabel(
        textwrap.fill(caption.replace("**", ""), 40 + 30 * len(attributes)), fontsize=7
    )
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=130)


def draw(study: Study, models: Sequence[Model]) -> str:
    """Write figure6.md, .csv, .png and .svg from the results alone; returns the Markdown.

    Raises:
      InputError: there are no results yet.
    """
    by_name = {cell.name: results.read_result(cell) for cell in cells_of(models)}
    complete = [result for result in by_name.values() if result]
    if not complete:
        raise InputError(f"--workdir={study.workdir} holds no results of figure6 yet; run it first")
    study.workdir.mkdir(parents=True, exist_ok=True)
    rows = rows_of(models, by_name)
    caption = caption_of(complete, rows, len(by_name))
    text = f"# Patient attributes\n\n{caption}\n\n{markdown(rows)}"
    write_text(study.workdir / "figure6.md", text)
    results.write_csv(study.workdir / "figure6.csv", rows)
    save_figure(study.workdir / "figure6.png", rows, caption)
    return text
