r"""What each choice of the recipe of masked region prediction costs: one changed at a time.

    ctssl recipe_choices plan --dataset=DATASET --workdir=STUDY
    ctssl recipe_choices run  --dataset=DATASET --workdir=STUDY
    ctssl recipe_choices draw --results=experiments/results/recipe_choices_real_64 --workdir=TABLES

The codebook (by gradient, which leaves a uniform start and no revival, or by moving averages with
any of them), the grey map, optimizer and learning rate, the weight of the masked error, and the
paper's reading of all of them (`masked_region:paper`). Each choice is trained, evaluated on
held-out patients and probed: the probes score the windowed slice whatever grey map an encoder
takes. Differences from the default are paired by volume, with a 95 % bootstrap interval by patient.
With few patients give folds, as for `ctssl table2`.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

import operator
from typing import Any

from ctssl_jax.training.recipe_files import load_recipe
from data_prep.system import command_line
from data_prep.system.errors import InputError
from data_prep.system.files import write_text

from .study import given, kept, results, runner
from .study.cells import Cell, Settings, Stage
from .study.paired import NAMES, paired_volumes

RECIPE = "masked_region"
DEFAULT = "default"
_GRADIENT = {"model.vq_update": "gradient"}
_PLAIN = {"model.vq_init": "uniform", "model.vq_revive_every": 0}
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> (in words, fields)
    DEFAULT: ("the recipe as it is", {}),
    "paper": ("the paper's reading", {}),
    "gradient": ("codebook by gradient, uniform start, no revival", _GRADIENT | _PLAIN),
    "ema_plain": ("codebook by averages, uniform start, no revival", _PLAIN),
    "ema_uniform": ("codebook by averages, uniform start, revival", {"model.vq_init": "uniform"}),
    "ema_unrevived": (
        "codebook by averages, start from data, no revival",
        {"model.vq_revive_every": 0},
    ),
    "slice_minmax": ("grey map by slice", {"normalize": "slice_minmax"}),
    "adamw": ("AdamW at 0.004", {"optimizer": "adamw", "learning_rate": 4e-3}),
    "slower": ("RAdam at a tenth of the rate", {"learning_rate": 2e-3}),
    "masked_weight": ("weight of the masked error 0.2", {"loss.masked_mse": 0.2}),
}
# Scores of the evaluation, and of the probe on the windowed slice.
SCORES = {"masked_mse": "masked MSE", "mse": "MSE", "ssim": "SSIM"}
PROBES = {
    "masked_region/linear/masked_mse": "masked MSE, linear probe",
    "position/linear/r2": "place in the scan, R²",
}


def cells_of(settings: Settings) -> list[Cell]:
    """A training and a probe for each choice."""
    cells = []
    for name, (_, fields) in CHOICES.items():
        of_size = settings
        if name == "paper":
            of_size = _of_paper(settings)
        cells.append(of_size.cell(name, RECIPE, fields))
        result = settings.workdir / "results" / f"probe_{name}.json"
        options = {"workdir": settings.workdir / "runs" / name, "dataset": settings.dataset}
        options |= {"split": settings.split, "output": result}
        stage = Stage(f"probe_{name}: probe", "ctssl_jax.probe", options)
        cells.append(Cell(f"probe_{name}", (name,), (stage,), result))
    return cells


def _of_paper(settings: Settings) -> Settings:
    """The settings for the paper's reading, without overrides of what it reads otherwise."""
    papers = settings._replace(size={"small": "paper_small", "reference": "paper"}[settings.size])
    recipes = [load_recipe(RECIPE, one.size) for one in (settings, papers)]

    def is_alike(override: str) -> bool:
        ours, theirs = map(operator.attrgetter(override.split("=")[0]), recipes)
        return ours == theirs

    return papers._replace(overrides=tuple(filter(is_alike, settings.overrides)))


def table_rows(found: dict[str, dict | None]) -> list[dict[str, Any]]:
    """One row a choice and score: the mean, its difference from the default with its interval, and
    the smallest detectable difference; None where a number is missing."""
    rows = []
    for name, (words, _) in CHOICES.items():
        for prefix, scores in (("", SCORES), ("probe_", PROBES)):
            ours, default = found[prefix + name], found[prefix + DEFAULT]
            for score, title in scores.items():
                value = (ours or {}).get("metrics", {}).get(score, {"mean": None})
                row = {"choice": name, "in_words": words, "score": score, "title": title}
                row["mean"] = value["mean"]
                row |= dict.fromkeys(NAMES)
                own_grey_map = name == "slice_minmax" and not prefix
                if ours and default and name != DEFAULT and not own_grey_map:
                    row |= paired_volumes(ours, default, score)
                rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]], found: dict[str, dict | None]) -> str:
    """A line a choice, a column a score, with differences from the default; and the codes used."""
    lines = []
    for name, (words, _) in CHOICES.items():
        own = [row for row in rows if row["choice"] == name]
        line = {"choice": f"{words} (`{name}`)"}
        for row in own:
            text = "" if row["mean"] is None else f"{row['mean']:.4f}"
            if row["difference"] is not None:
                text += f" ({row['difference']:+.4f}; {row['low']:+.4f} to {row['high']:+.4f})"
            line[row["title"]] = text
        result = found[name]
        codebook = result.get("codebook") if result else None
        line["codes used"] = (
            f"{codebook['used_codes']:.0f} of {codebook['num_codes']:.0f}" if codebook else ""
        )
        lines.append(line)
    return results.markdown(lines)


def draw(settings: Settings) -> str:
    """Write recipe_choices.md and .csv into the folder of the study; returns the Markdown.

    Raises:
      InputError: there are no results yet.
    """
    found = kept.results_of(settings, cells_of)
    complete = [found[name] for name in CHOICES if found[name]]
    if not complete:
        raise InputError(f"--workdir={settings.workdir} holds no results yet; run the study first")
    rows = table_rows(found)
    caption = results.caption(complete) + kept.folds_in_words(settings, found)
    text = (
        f"# Choices of masked region prediction\n\n{caption} In brackets: minus the default, with "
        "the 95 % interval of the paired bootstrap by patient, widened for few patients and not "
        f"corrected for the {sum(row['difference'] is not None for row in rows)} comparisons of "
        "this table. Errors of the grey map by slice are of its own grey values; its probes are "
        f"not.\n\n{markdown(rows, found)}"
    )
    settings.workdir.mkdir(parents=True, exist_ok=True)
    write_text(settings.workdir / "recipe_choices.md", text)
    results.write_csv(settings.workdir / "recipe_choices.csv", rows)
    return text


def main(argv: list[str]) -> int:
    """Command line."""
    module = f"{__package__}.recipe_choices"
    verb = runner.verb_of(argv, module)
    settings = given.settings_of_flags(verb)
    given.check_overrides(settings, [RECIPE])
    cells = settings.study(cells_of)
    if verb == "draw":
        print(draw(settings), flush=True)
        runner.suggest_after("draw", module, [])
    else:
        runner.act(verb, module, settings, cells)
    return 0


if __name__ == "__main__":
    given.define_flags()
    command_line.run(main, runner.VERBS)
