r"""Figure 6: what pretrained encoders know of patients (age, sex, ethnic group), against no pretraining and controls.

    python -m experiments.figure6 run --preset=phantom --workdir=STUDY
    python -m experiments.figure6 draw --preset=phantom --workdir=STUDY

Each arm is a frozen encoder, the last weights of its pretraining as in the other figures, probed on the middle slice of
each volume (`ctssl_jax.attributes`). The paper's baseline is the same encoder trained end to end from random weights
(`configs/attributes.py`), one model an attribute. Controls, with the architecture and weights of the first arm: random
weights, pixels without a network, and shuffled labels. What is random is run once a seed; probes of given weights are
not. `plan` lists the cells, one command each. With your own data:

    python -m experiments.figure6 run --preset=paper --workdir=STUDY --dataset=DATASET --attributes=age,sex \
        --pretrained=masked_20=RUN --pretrained=rotation=RUN --arms=masked_20,rotation
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from data_prep.system import command_line
from data_prep.system.errors import InputError
from data_prep.system.files import write_text
from experiments import downstream, study
from experiments.downstream import PRETEXTS, TITLES, Study
from experiments.study import Cell

ARMS = ("masked_05", "masked_20", "next_slice", "denoising", "rotation", "flip")
ATTRIBUTES = ("age", "sex", "ethnic_group")
GROUPS = {"pretrained": "C0", "baseline": "black", "control": "0.55"}  # group -> colour
END_TO_END = "random weights, trained end to end"
CONTROLS = {
    "untrained": ("frozen random weights", ("--encoder=untrained",)),
    "pixels": ("pixels, no network", ("--encoder=pixels",)),
    "shuffled": ("shuffled labels", ("--shuffled_labels",)),
}


class Model(NamedTuple):
    """A row of the figure.

    title: of the row.
    group: `pretrained`, `baseline` or `control`.
    cells: attribute -> its cells, one a seed.
    """

    title: str
    group: str
    cells: dict[str, list[Cell]]


def probe_cell(asked: Study, arm: str, attributes: Sequence[str], name: str, options: Sequence[str], seed: int) -> Cell:
    """Probe the encoder of an arm for all attributes.

    Args:
      asked: the study.
      arm: whose run is read.
      attributes: to probe; others than the default ones are part of the cell's name.
      name: of the cell, after `probe_`.
      options: of `ctssl_jax.attributes`, for a control.
      seed: of its random weights, shuffling and bootstrap.
    """
    name = "_".join([f"probe_{name}", *(attributes if tuple(attributes) != ATTRIBUTES else ())])
    result = asked.workdir / "results" / f"{name}.json"
    probe = (
        *(f"{name}: probe", "ctssl_jax.attributes", f"--workdir={asked.run_of(arm)}", f"--dataset={asked.dataset}"),
        *(f"--attributes={','.join(attributes)}", "--checkpoint=last", f"--seed={seed}", *options),
        f"--output={result}",
    )
    after = ["data_attributes"] if asked.sizes.archives else []
    after += [] if arm in asked.pretrained else [f"pretrain_{arm}"]
    return Cell(name, tuple(after), (probe,), result)


def models_of(asked: Study, arms: Sequence[str], attributes: Sequence[str]) -> list[Model]:
    """The rows of the figure: pretrained encoders, the baseline, controls."""
    seeds, first = asked.sizes.seeds, arms[0]
    models = []
    for arm in arms:
        cell = probe_cell(asked, arm, attributes, arm, (), seeds[0])
        models.append(Model(TITLES.get(arm, arm), "pretrained", {attribute: [cell] for attribute in attributes}))

    steps = asked.sizes.attribute_steps
    fields = {"num_classes": 0} | ({"num_steps": steps, "eval_every": steps} if steps else {})
    after = ("data_attributes",) if asked.sizes.archives else ()
    baseline = {}
    for attribute in attributes:
        of_attribute = {"label": attribute, **fields}
        baseline[attribute] = [
            downstream.trained_cell(
                asked,
                f"end_to_end_{attribute}_s{seed}",
                "attributes",
                asked.dataset,
                {**of_attribute, "seed": seed},
                after=after,
            )
            for seed in seeds
        ]
    models.append(Model(END_TO_END, "baseline", baseline))

    for control, (title, options) in CONTROLS.items():
        of_seeds = [
            probe_cell(asked, first, attributes, f"{first}_{control}_s{seed}", options, seed)
            for seed in (seeds[:1] if control == "pixels" else seeds)
        ]
        models.append(Model(title, "control", dict.fromkeys(attributes, of_seeds)))
    return models


def cells_of(models: Sequence[Model]) -> list[Cell]:
    """The cells of the rows, each once, in order."""
    cells = {cell.name: cell for model in models for of_seeds in model.cells.values() for cell in of_seeds}
    return list(cells.values())


def aurocs(result: dict, attribute: str) -> dict[str, dict]:
    """`auroc` (mean of each class against the rest) and `auroc/CLASS` of an attribute; of a probe or a training.

    Returns:
      name -> the measure; empty if the result has none of this attribute.
    """
    probed = result.get("kind") == "attributes"
    if not probed and result["label"] != attribute:
        return {}
    prefix = f"{attribute}/" if probed else ""
    measures = {
        name.removeprefix(prefix): value for name, value in result["metrics"].items() if name.startswith(prefix)
    }
    return {name: value for name, value in measures.items() if name == "auroc" or name.startswith("auroc/")}


def rows_of(models: Sequence[Model], results: dict[str, dict | None]) -> list[dict[str, Any]]:
    """One row a model, attribute and AUROC.

    Args:
      models: of the figure.
      results: name of a cell -> its results, None while it is missing.

    Returns:
      rows; `mean` is over the seeds that are there, `ci95_low` and `ci95_high` are the mean bounds of their intervals
      by patient. All None where nothing is there (`num_seeds` 0) or no AUROC is defined.
    """
    rows = []
    for model in models:
        for attribute, cells in model.cells.items():
            found = [aurocs(result, attribute) for cell in cells if (result := results[cell.name])]
            for metric in dict.fromkeys(["auroc", *(name for measures in found for name in measures)]):
                measures = [of_seed[metric] for of_seed in found if metric in of_seed]
                values = [measure["mean"] for measure in measures if measure["mean"] is not None]
                bounds = np.array([measure["ci95"] for measure in measures if measure["ci95"] is not None])
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
    interval = "" if row["ci95_low"] is None else f" ({row['ci95_low']:.3f} to {row['ci95_high']:.3f})"
    return study.with_spread(row["mean"], row["sd_over_seeds"]) + interval


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Models against attributes, then models against the classes of each attribute of more than two."""

    def table(chosen: Sequence[dict[str, Any]], column: str) -> str:
        columns = dict.fromkeys(row[column].removeprefix("auroc/") for row in chosen)
        lines = []
        for model, group in dict.fromkeys((row["model"], row["group"]) for row in chosen):
            own = {row[column].removeprefix("auroc/"): row for row in chosen if row["model"] == model}
            cells = {name: cell_text(own[name]) if name in own else "" for name in columns}
            lines.append({"features": model, "kind": group, **cells})
        return study.markdown(lines)

    parts = [table([row for row in rows if row["metric"] == "auroc"], "attribute")]
    for attribute in dict.fromkeys(row["attribute"] for row in rows):
        of_classes = [row for row in rows if row["attribute"] == attribute and row["metric"] != "auroc"]
        if len({row["metric"] for row in of_classes}) > 2:  # of two classes, both AUROCs are the mean
            parts.append(f"### {attribute}: each class against the rest\n\n{table(of_classes, 'metric')}")
    return "\n".join(parts)


def caption_of(found: Sequence[dict], rows: Sequence[dict[str, Any]], num_cells: int) -> str:
    """What is shown, and what the reader must know of it."""
    patients = []
    for attribute in dict.fromkeys(row["attribute"] for row in rows):
        numbers = sorted({row["num_patients"] for row in rows if row["attribute"] == attribute and row["num_patients"]})
        patients.append(f"{attribute} {' or '.join(map(str, numbers)) or 'missing'}")
    parts = [
        "**SYNTHETIC DATA: computer-made scans, no patients; nothing here is a medical result.** "
        if any(result["synthetic"] for result in found)
        else "",
        "AUROC of each class against the rest, mean over classes, of middle slices of the "
        f"{', '.join(sorted({result['split'] for result in found}))} split (patients: {', '.join(patients)}). ",
        "95 % intervals by patient; where there are several seeds: mean ± sd, and mean bounds of their intervals. ",
        f"{', '.join(sorted({result['device'] for result in found}))}. {len(found)} of {num_cells} cells are there.",
    ]
    seen = {result["num_patients_seen_in_training"] for result in found}
    if None in seen:
        parts.append(" Whether the models were trained on these patients CANNOT BE CHECKED (other pseudonym key).")
    if seen - {None, 0}:
        parts.append(f" NOT HELD OUT: up to {max(seen - {None})} of these patients were in the training data.")
    if len({result["dataset_fingerprint"] for result in found}) > 1:
        parts.append(" The results are of DIFFERENT datasets.")
    return "".join(parts)


def save_figure(path: Path, rows: Sequence[dict[str, Any]], caption: str) -> None:
    """Draw a panel an attribute as PNG and SVG: mean and interval of each model, small rings for its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["metric"] == "auroc"]
    attributes = list(dict.fromkeys(row["attribute"] for row in rows))
    models = list(dict.fromkeys((row["model"], row["group"]) for row in rows))
    places, height = {}, 0.0
    for number, (model, group) in enumerate(models):
        height += 1.0 if number and group == models[number - 1][1] else 1.8  # a gap sets the groups apart
        places[model] = height
    figure, axes = plt.subplots(
        1,
        len(attributes),
        figsize=(2.2 + 2.6 * len(attributes), 1.6 + 0.3 * height),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, attribute in zip(axes.flat, attributes, strict=True):
        axis.axvline(0.5, color="0.3", linestyle=":", linewidth=1)
        for row in rows:
            if row["attribute"] != attribute:
                continue
            place, colour = places[row["model"]], GROUPS[row["group"]]
            if row["mean"] is None:
                axis.text(0.51, place, cell_text(row) or "missing", fontsize=7, color="0.4", va="center")
                continue
            if row["ci95_low"] is not None:
                axis.plot([row["ci95_low"], row["ci95_high"]], [place, place], color=colour, linewidth=1.5)
            axis.plot(row["mean"], place, marker="o", color=colour, markersize=5)
            if row["num_seeds"] > 1:
                values = [float(value) for value in row["of_each_seed"].split()]
                axis.plot(values, [place - 0.25] * len(values), "o", mfc="none", color=colour, markersize=3)
        axis.set(xlim=(0, 1), xlabel="AUROC", title=attribute.replace("_", " "))
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(list(places.values()), list(places), fontsize=8)
    axes[0, 0].set_ylim(height + 0.8, 1.0)  # first model on top
    figure.suptitle("Patient attributes from middle slices (dotted: chance; rings: seeds)", fontsize=11)
    figure.supxlabel(textwrap.fill(caption.replace("**", ""), 40 + 30 * len(attributes)), fontsize=7)
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=130)
    plt.close(figure)


def draw(asked: Study, models: Sequence[Model]) -> str:
    """Write figure6.md, .csv, .png and .svg from the results alone; returns the Markdown.

    Raises:
      InputError: no result at all.
    """
    results = {cell.name: study.read_result(cell) for cell in cells_of(models)}
    found = [result for result in results.values() if result]
    if not found:
        raise InputError(f"--workdir={asked.workdir} holds no results of figure6 yet; run it first")
    rows = rows_of(models, results)
    caption = caption_of(found, rows, len(results))
    text = f"# Patient attributes\n\n{caption}\n\n{markdown(rows)}"
    write_text(asked.workdir / "figure6.md", text)
    study.write_csv(asked.workdir / "figure6.csv", rows)
    save_figure(asked.workdir / "figure6.png", rows, caption)
    return text


def check_request(asked: Study, arms: Sequence[str], attributes: Sequence[str]) -> None:
    """Refuse arms that were not pretrained, repeated names, and shares of the training data.

    Raises:
      InputError: names the flag.
    """
    others = [arm for arm in arms if arm not in PRETEXTS and arm not in asked.pretrained]
    if others:
        raise InputError(f"--arms: {others[0]} is not a pretrained encoder; choose from {', '.join(PRETEXTS)}")
    for flag, names in (("arms", arms), ("attributes", attributes)):
        if not names or len(set(names)) < len(names):
            raise InputError(f"--{flag}={','.join(names)}: give one name or more, each once")
    if flags.FLAGS.fractions:
        raise InputError("--fractions: Figure 6 uses all training patients; leave it out")


def main(argv: list[str]) -> int:
    """Command line."""
    if len(argv) < 2:
        raise InputError(f"give one of {', '.join(study.VERBS)}: python -m experiments.figure6 plan ...")
    given = flags.FLAGS
    asked = downstream.study_of_flags(argv[1], "attributes")
    check_request(asked, given.arms, given.attributes)
    models = models_of(asked, given.arms, given.attributes)
    if argv[1] == "draw":
        print(draw(asked, models))
        return 0
    cells = [
        *downstream.data_cells(asked, ("pretraining", "attributes")),
        *downstream.pretraining_cells(asked, given.arms),
        *cells_of(models),
    ]
    downstream.act(argv[1], "experiments.figure6", asked, cells, lists=("attributes",))
    return 0


if __name__ == "__main__":
    downstream.define_flags(ARMS)
    flags.adopt_module_key_flags(downstream)
    flags.DEFINE_list("attributes", list(ATTRIBUTES), "Attributes, as `ctssl_jax.attributes` takes them.")
    command_line.run(main, study.VERBS)
