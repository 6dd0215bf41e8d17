"""Objectives at equal compute: scores, differences, costs and curves as tables and figures."""

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import results
from .paired import holm_with_seeds, interval_by_patient, paired_arms

SEEDS = 3


class Objective(NamedTuple):
    """One row of the tables.

    title: of the row.
    recipe: file in `configs/`.
    fields: of its configuration.
    papers: whether it is one of the paper's eight.
    base: of an ablation: the objective whose recipe it changes; "" otherwise.
    """

    title: str
    recipe: str
    fields: dict[str, Any]
    papers: bool = False
    base: str = ""


def _masked(percent: int) -> Objective:
    title, fields = f"masked region, {percent} %", {"mask.fraction": percent / 100}
    return Objective(title, "masked_region", fields, papers=True)


OBJECTIVES = {
    "rotation": Objective("rotation", "rotation", {}, papers=True),
    "flip": Objective("flip", "flip", {}, papers=True),
    "mask_20": _masked(20),
    "lejepa": Objective("LeJEPA", "lejepa", {}),
    "vicreg": Objective("VICReg", "vicreg", {}),
    "next_slice": Objective("next slice", "next_slice", {}, papers=True),
    "denoising": Objective("denoising", "denoising", {}, papers=True),
    "simmim": Objective("SimMIM", "simmim", {}),
    "simclr": Objective("SimCLR", "simclr", {}),
    "visreg": Objective("VISReg", "visreg", {}),
    "dino": Objective("DINO", "dino", {}),
    "spark": Objective("SparK", "spark", {}),
    "mask_05": _masked(5),
    "mask_10": _masked(10),
    "mask_33": _masked(33),
}


def _lejepa(title: str, **fields: Any) -> Objective:
    return Objective(f"LeJEPA, {title}", "lejepa", fields, base="lejepa")


def _simmim(title: str, **fields: Any) -> Objective:
    return Objective(f"SimMIM, {title}", "simmim", fields, base="simmim")


# One choice of a recipe changed; the choice comes before `--override`.
ABLATIONS = {
    "lejepa_map": _lejepa("map pooled", **{"model.pooled": "map"}),
    "lejepa_both": _lejepa("map and latents pooled", **{"model.pooled": "both"}),
    "lejepa_attention": _lejepa("attention pooled", **{"model.neck": "attention"}),
    "lejepa_stages": _lejepa("neck of two stages", **{"model.neck": "stages"}),
    "lejepa_one_slice": _lejepa("views of one slice", **{"views.slices": 1}),
    "lejepa_slab_40": _lejepa("slab of 40 mm", **{"views.slab_mm": 40.0}),
    "lejepa_no_local": _lejepa("no local views", **{"views.num_local": 0}),
    "lejepa_six_local": _lejepa("six local views", **{"views.num_local": 6}),
    "lejepa_batch_8": _lejepa("batches of 8", batch_size=8),
    "lejepa_batch_64": _lejepa("batches of 64", batch_size=64),
    "simmim_blocks_4": _simmim("blocks of 4 pixels", **{"mask.block": 4}),
    "simmim_blocks_16": _simmim("blocks of 16 pixels", **{"mask.block": 16}),
    "simmim_area_20": _simmim("20 % of the area", **{"mask.fraction": 0.2}),
    "simmim_area_80": _simmim("80 % of the area", **{"mask.fraction": 0.8}),
    "simmim_one_square": _simmim(
        "one square of a quarter", **{"mask.block": 32, "mask.fraction": 0.25}
    ),
}
CONTROLS = {
    "untrained": "(untrained encoder)",
    "pixels": "(pixels)",
    "handcrafted": "(handcrafted statistics)",
}
TITLES = {name: one.title for name, one in (OBJECTIVES | ABLATIONS).items()} | CONTROLS
SCORES = {
    "position/linear/r2": "place, R²",
    "order/linear/auroc": "order, AUROC",
    "neighbours/knn/recall": "neighbours",
    "whole_position/linear/r2": "place, whole slice, R²",
    "whole_order/linear/auroc": "order, whole slice, AUROC",
    "whole_neighbours/knn/recall": "neighbours, whole slice",
    "flip/linear/auroc": "flip, AUROC, linear",
    "flip/knn/auroc": "flip, AUROC, kNN",
    "rotation/linear/auroc": "rotation, AUROC, linear",
    "rotation/knn/auroc": "rotation, AUROC, kNN",
}
CURVES = {  # (kind of report, name) -> title
    ("train", "loss"): "training loss",
    ("validation", "effective_rank"): "effective rank",
    ("validation", "pairwise_cosine"): "mean cosine of two",
    ("validation", "neighbour_recall"): "neighbours found",
}
_LEAST_R2 = -1.0  # in the figure: of a volume unlike all others R² may be -100
_PANELS = 5  # beside each other
_COLOURS = {"paper": "black", "new": "C0", "control": "0.5"}

Arms = dict[str, list[dict[str, Any]]]  # name -> the kept results of its seeds


def arms_of(found: dict[str, dict[str, Any] | None]) -> Arms:
    """The results of cells `NAME_SEED` by name, in the order of the tables; [] while missing. Of
    folds, the seeds that have as many as the arm's fullest: others are of fewer patients."""
    names = (*sorted(OBJECTIVES, key=_is_new), *CONTROLS, *ABLATIONS)
    by_name: Arms = {name: [] for name in names}
    for cell, result in found.items():
        if result:
            by_name[cell.rpartition("_")[0]].append(result)
    for name, of_seeds in by_name.items():
        most = max((one.get("folds", 1) for one in of_seeds), default=1)
        by_name[name] = [one for one in of_seeds if one.get("folds", 1) == most]
    return by_name


def _is_new(name: str) -> bool:
    return name not in CONTROLS and not (OBJECTIVES | ABLATIONS)[name].papers


def _group(name: str) -> str:
    return "control" if name in CONTROLS else "new" if _is_new(name) else "paper"


def score_rows(arms: Arms) -> list[dict[str, Any]]:
    """One row an arm and score: mean over volumes and seeds, spread over seeds, the interval by
    patient of the mean; None where it is missing."""
    rows = []
    for name, of_seeds in arms.items():
        for score in SCORES:
            measures = [one["metrics"][score] for one in of_seeds if score in one["metrics"]]
            means = [one["mean"] for one in measures]
            low, high = interval_by_patient(of_seeds, score) or (None, None)
            rows.append(
                {
                    "objective": name,
                    "group": _group(name),
                    "score": score,
                    "mean": statistics.mean(means) if means else None,
                    "sd_over_seeds": statistics.stdev(means) if len(means) > 1 else None,
                    "ci95_low": low,
                    "ci95_high": high,
                    "num_seeds": len(means),
                    "num_patients": measures[0]["num_patients"] if measures else None,
                }
            )
    return rows


def score_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A line an arm that there is, a column a score."""
    there = {row["objective"] for row in rows if row["num_seeds"]}
    rows = [row for row in rows if row["objective"] not in ABLATIONS or row["objective"] in there]
    lines = []
    for name in dict.fromkeys(row["objective"] for row in rows):
        own = {row["score"]: row for row in rows if row["objective"] == name}
        seeds = max(row["num_seeds"] for row in own.values())
        line = {"encoder": TITLES[name], "kind": _group(name), "seeds": str(seeds)}
        lines.append(line | {title: _mean(own[score]) for score, title in SCORES.items()})
    text = (
        "Mean over volumes and seeds, ± its standard deviation over seeds, in brackets its 95 % "
        "interval by patient. A neck and the handcrafted statistics are one feature a slice: it "
        "stands in the columns of regions, too."
    )
    return f"## Scores of held-out patients\n\n{text}\n\n{results.markdown(lines)}"


def _mean(row: dict[str, Any]) -> str:
    if row["mean"] is None:
        return ""
    text = f"{row['mean']:.3f}"
    if row["sd_over_seeds"] is not None:
        text += f" ± {row['sd_over_seeds']:.3f}"
    if row["ci95_low"] is not None:
        text += f" ({row['ci95_low']:.3f} to {row['ci95_high']:.3f})"
    return text


def best_of_paper(arms: Arms, score: str) -> str | None:
    """The paper's objective with the highest mean over the patients that most arms tested."""
    measures = {
        name: [one["metrics"][score] for one in of_seeds if score in one["metrics"]]
        for name, of_seeds in arms.items()
        if _group(name) == "paper"
    }
    means = {
        name: (ours[0]["num_patients"], statistics.mean(one["mean"] for one in ours))
        for name, ours in measures.items()
        if ours
    }
    return max(means, key=lambda name: means[name]) if means else None


def comparison_rows(arms: Arms) -> list[dict[str, Any]]:
    """One row a pair and score: of each objective that is not the paper's minus the paper's best by
    that score, and of each objective minus each control. `p_holm` is corrected over all rows of one
    reference; None where the patients are too few for that."""
    rows: list[dict[str, Any]] = []
    for reference in ("best of the paper's", *CONTROLS):
        family = []
        for name in OBJECTIVES if reference in CONTROLS else filter(_is_new, OBJECTIVES):
            for score in SCORES:
                other = reference if reference in CONTROLS else best_of_paper(arms, score)
                if not arms[name] or not other or not arms[other]:
                    continue
                family += _compared(arms, name, other, score, reference)
        rows += _corrected(family)
    return rows


def ablation_rows(arms: Arms) -> list[dict[str, Any]]:
    """One row an ablation and score: its mean minus that of the recipe that it changes. `p_holm` as
    in `comparison_rows`, corrected over all rows of one recipe."""
    rows: list[dict[str, Any]] = []
    for base in dict.fromkeys(one.base for one in ABLATIONS.values()):
        family = []
        for name, ablation in ABLATIONS.items():
            if ablation.base != base or not arms[name] or not arms[base]:
                continue
            for score in SCORES:  # of regions 1,024 numbers, of a neck its one feature
                if "model.neck" not in ablation.fields or score.startswith("whole_"):
                    family += _compared(arms, name, base, score, base)
        rows += _corrected(family)
    return rows


def _compared(
    arms: Arms, name: str, other: str, score: str, reference: str
) -> list[dict[str, Any]]:
    """One row, or none where the two have no patient in common."""
    found = paired_arms(arms[name], arms[other], score)
    row = {"objective": name, "reference": reference, "other": other, "score": score}
    return [row | found] if found["difference"] is not None else []


def _corrected(family: list[dict[str, Any]]) -> list[dict[str, Any]]:
    values, refused = holm_with_seeds(family, lambda row: row["score"])
    return [
        row | {"p_holm": p, "not_corrected": refused} for row, p in zip(family, values, strict=True)
    ]


def is_sure(row: dict[str, Any]) -> bool:
    """Whether the interval excludes zero, and the corrected p is below 5 %."""
    low, high = _interval(row)
    return low * high > 0 and row["p_holm"] is not None and row["p_holm"] < 0.05


def comparison_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table a reference: lines objectives, columns scores."""
    parts = []
    for reference in dict.fromkeys(row["reference"] for row in rows):
        own = [row for row in rows if row["reference"] == reference]
        lines = []
        for name in sorted(dict.fromkeys(row["objective"] for row in own), key=_is_new):
            line = {"encoder": TITLES[name]}
            for score, title in SCORES.items():
                one = next((r for r in own if (r["objective"], r["score"]) == (name, score)), None)
                line[title] = _difference(one) if one else ""
            lines.append(line)
        others = {row["score"]: TITLES[row["other"]] for row in own}
        which = f" ({'; '.join(f'{SCORES[score]}: {other}' for score, other in others.items())})"
        title = TITLES.get(reference, reference).strip("()")
        notes = (
            " The best was chosen by these same patients, which favours it: that an objective is "
            "behind says little."
            if reference not in TITLES
            else ""
        )
        if own[0]["not_corrected"]:
            notes += f" REFUSED, so that nothing is bold: {own[0]['not_corrected']}."
        parts.append(
            f"## Minus {title}\n\nMean difference over volumes"
            f"{which if reference not in TITLES else ''}, in brackets its 95 % interval by "
            "patient (and seed, if there are several). **Bold** where it excludes zero also after "
            "Holm's correction over this table, by a p of patients and seeds."
            f"{notes}\n\n{results.markdown(lines)}"
        )
    return "\n".join(parts)


def _interval(row: dict[str, Any]) -> tuple[float, float]:
    """That of patients and seeds, if there are several seeds."""
    ending = "" if row["low_with_seeds"] is None else "_with_seeds"
    return row[f"low{ending}"], row[f"high{ending}"]


def _difference(row: dict[str, Any]) -> str:
    low, high = _interval(row)
    text = f"{row['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
    return f"**{text}**" if is_sure(row) else text


def training_markdown(arms: Arms) -> str:
    """A line an objective: what a step costs, the steps, and the end of its monitor."""
    lines = []
    for name, of_seeds in arms.items():
        if not of_seeds or name in CONTROLS:
            continue
        of_run, fields = of_seeds[0]["training"], of_seeds[0]["fields"]
        seed = str(of_seeds[0]["seed"])
        line = {
            "objective": TITLES[name],
            "seed": seed,
            "GFLOP a step": f"{of_run['step_flops'] / 1e9:.2f}",
        }
        line["steps"] = f"{fields['num_steps']:,}"
        line["TFLOP"] = f"{of_run['step_flops'] * fields['num_steps'] / 1e12:.3f}"
        speeds = of_run["train"].get("slices_per_second", ())
        line["slices/s"] = f"{statistics.median(speeds):.1f}" if speeds else ""
        for (kind, value), title in CURVES.items():
            numbers = [number for number in of_run[kind].get(value, ()) if number is not None]
            line[f"{title}, first"] = f"{numbers[0]:.3g}" if numbers else ""
            line[f"{title}, last"] = f"{numbers[-1]:.3g}" if numbers else ""
        lines.append(line)
    if not lines:  # controls alone
        return ""
    return (
        "## Trainings\n\nOf the first fold and the first seed that is there. Speed as the machine "
        f"was, beside other work.\n\n{results.markdown(lines)}"
    )


def caption_of(arms: Arms) -> str:
    """Data and compute in words."""
    complete = [one for of_seeds in arms.values() for one in of_seeds]
    trained = [one for one in complete if "training" in one]
    budget = max(
        (one["training"]["step_flops"] * one["fields"]["num_steps"] for one in trained), default=0
    )
    seeds = sorted({one["seed"] for one in complete})
    tested = max(next(iter(one["metrics"].values()))["num_patients"] for one in complete)
    return (
        results.synthetic_warning(complete)
        + f"{', '.join(sorted({one['split'] for one in complete}))} split, {tested} patients; each "
        f"training has {budget / 1e12:.2f} TFLOP; seed{'s' if len(seeds) > 1 else ''} "
        f"{', '.join(map(str, seeds))}; {', '.join(sorted({one['device'] for one in complete}))}."
        + results.few_patients(tested)
        + results.held_out_warning(complete)
        + results.different_datasets(complete)
    )


def save_scores(path: Path, rows: Sequence[dict[str, Any]], caption: str) -> None:
    """Draw a panel a score as PNG: mean and interval by patient of each arm."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["objective"] for row in rows))
    scores = [s for s in SCORES if any(r["score"] == s and r["mean"] is not None for r in rows)]
    lines = -(-len(scores) // _PANELS)
    size = 1.8 + 2.3 * min(_PANELS, len(scores)), 0.8 + lines * (0.5 + 0.2 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, min(_PANELS, len(scores)), sharey=True, squeeze=False)
    for axis in axes.flat[len(scores) :]:
        axis.set_axis_off()
    for axis, score in zip(axes.flat, scores, strict=False):
        for row in rows:
            if row["score"] != score or row["mean"] is None:
                continue
            place, colour = names.index(row["objective"]), _COLOURS[row["group"]]
            if row["ci95_low"] is not None:
                axis.plot([row["ci95_low"], row["ci95_high"]], [place] * 2, color=colour, lw=1)
            is_off = score.endswith("/r2") and row["mean"] < _LEAST_R2
            axis.plot(
                _LEAST_R2 if is_off else row["mean"],
                place,
                "<" if is_off else "o",
                color=colour,
                markersize=4,
            )
            if row["group"] == "control":
                axis.axvline(row["mean"], color="0.8", linestyle=":", linewidth=1, zorder=0)
        if axis.get_xlim()[0] < _LEAST_R2:
            axis.set_xlim(1.05 * _LEAST_R2, 1.0)
        axis.set_title(SCORES[score], fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(axis="x", alpha=0.2)
    axes[0, 0].set_yticks(range(len(names)), [TITLES[name] for name in names], fontsize=8)
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    words = (
        f"{caption} Black: the paper's; blue: others; grey: controls. Bars: 95 % by patient. The "
        f"axes of R² end at {_LEAST_R2:g}; an arrow is a mean below."
    )
    figure.supxlabel(
        textwrap.fill(words.replace("**", ""), 32 * min(_PANELS, len(scores))), fontsize=7
    )
    figure.savefig(path, dpi=130)


def save_curves(path: Path, arms: Arms, caption: str) -> None:
    """Draw training loss and monitor of each objective (first fold, first seed) as PNG."""
    from matplotlib.figure import Figure

    trained = {
        name: seeds[0]["training"] for name, seeds in arms.items() if name in OBJECTIVES and seeds
    }
    if not trained:
        return
    size = 2.0 + 2.2 * len(CURVES), 1.2 + 1.1 * len(trained)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(trained), len(CURVES), squeeze=False)
    for row, (name, of_run) in zip(axes, trained.items(), strict=True):
        row[0].set_ylabel(TITLES[name], fontsize=7)
        for axis, ((kind, value), title) in zip(row, CURVES.items(), strict=True):
            if values := of_run[kind].get(value):
                mark = "-" if kind == "train" else "o-"
                colour = _COLOURS[_group(name)]
                axis.plot(of_run[kind]["step"], values, mark, color=colour, markersize=3, lw=1)
            axis.set_xlim(0, None)
            axis.tick_params(labelsize=6)
            if name == next(iter(trained)):
                axis.set_title(title, fontsize=8)
    words = f"Of the first fold and the first seed that is there, by step. {caption}".replace(
        "**", ""
    )
    figure.supxlabel(textwrap.fill(words, 110), fontsize=7)
    figure.savefig(path, dpi=110)
