r"""The paper's pretexts and the objectives of today at equal compute, told apart on equal terms.

    ctssl objectives plan --folds=4 --dataset=FOLDS --workdir=STUDY --num_steps=100
    ctssl objectives run  --folds=4 --dataset=FOLDS --workdir=STUDY --num_steps=100
    ctssl objectives draw --results=experiments/results/objectives_real_64 --workdir=TABLES

`--num_steps` are those of masked region prediction. All others get its compute: the floating-point
operations of their training step are counted from the model's shapes, with all views, projector and
teacher, and their number of steps is the budget over this count. All train on the same slices with
the fields of their recipes; three seeds, `--seed` and the next two, the first of them first.

The last checkpoint of each is probed (`ctssl probe`): the place of a slice, the order of two and
the neighbours of a slice, which need no label, and rotations and flips, linear and by nearest
neighbours. Beside them stand an untrained encoder, pixels and handcrafted statistics, which need
`pip install '.[handcrafted]'`. Last come the ablations: one choice of LeJEPA or SimMIM changed, at
the same compute. Differences are paired by patient. `draw` makes tables, a figure and the curves of
the trainings; `ctssl benchmark_objectives` measures what a step of each costs here.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

import functools

from data_prep.system import command_line
from data_prep.system.errors import InputError
from data_prep.system.files import write_text

from .study import given, kept, runner
from .study import objectives_figure as figure
from .study.cells import Cell, Recipe, Settings, Stage
from .study.objectives_figure import ABLATIONS, CONTROLS, OBJECTIVES, SEEDS
from .study.results import write_csv

TARGETS = "rotation,flip"
VALIDATIONS = 3  # of a training


def fields_of(settings: Settings, name: str, seed: int) -> dict:
    """All fields of an objective's configuration that the study sets."""
    own = _own_fields(settings, name)
    budget = settings.steps("masked_region") * step_flops(settings, "mask_20")
    steps = max(1, round(budget / step_flops(settings, name)))
    config = Recipe((OBJECTIVES | ABLATIONS)[name].recipe, settings.size, {}).config()
    # starts that are meant for longer trainings: a tenth of this one at most
    starts = {"warmup_steps": min(config.warmup_steps, steps // 10)}
    for start in ("warmup_steps", "frozen_steps"):
        if "teacher" in config:
            starts[f"teacher.{start}"] = min(config.teacher[start], steps // 10)
    every = {"eval_every": -(-steps // VALIDATIONS), "log_every": max(1, steps // 20)}
    of_study = {"dataset": settings.dataset, "seed": settings.seed + seed, "num_steps": steps}
    return starts | own | every | of_study


@functools.cache
def step_flops(settings: Settings, name: str) -> int:
    """Floating-point operations of a training step of an objective: all slices, views, projector
    and teacher; counted from the shapes of the model."""
    recipe = (OBJECTIVES | ABLATIONS)[name].recipe
    return kept.step_flops(Recipe(recipe, settings.size, _own_fields(settings, name)).config())


def _own_fields(settings: Settings, name: str) -> dict:
    """Fields of an objective and of `--override`, or the choice of an ablation after both."""
    objective = (OBJECTIVES | ABLATIONS)[name]
    overrides = dict(override.split("=", 1) for override in settings.overrides)
    return overrides | objective.fields if objective.base else objective.fields | overrides


def probe_stage(settings: Settings, name: str, run: str, encoder: str = "run") -> Stage:
    """Probe the last checkpoint of a run, or a control in its place."""
    options = {
        "workdir": settings.workdir / "runs" / run,
        "dataset": settings.dataset,
        "split": settings.split,
        "checkpoint": "last",
        "encoder": encoder,
        "targets": TARGETS,
        "output": settings.workdir / "results" / f"{name}.json",
    }
    return Stage(f"{name}: probe", "ctssl_jax.probe", options)


def all_cells(settings: Settings) -> list[Cell]:
    """Of one dataset: for each seed a training with its probe, then the controls; then the
    ablations."""
    cells = []
    for seed in range(SEEDS):
        cells += [trained_cell(settings, name, seed) for name in OBJECTIVES]
        for name in CONTROLS:
            if seed and name != "untrained":  # nothing in them is random
                continue
            run = f"rotation_{seed}"  # whose configuration they take
            stage = probe_stage(settings, f"{name}_{seed}", run, name)
            cells.append(Cell(f"{name}_{seed}", (run,), (stage,), stage.options["output"]))
    return cells + [trained_cell(settings, n, seed) for seed in range(SEEDS) for n in ABLATIONS]


def trained_cell(settings: Settings, name: str, seed: int) -> Cell:
    """The training of an objective or ablation with its probe."""
    cell, recipe = f"{name}_{seed}", (OBJECTIVES | ABLATIONS)[name].recipe
    configured = Recipe(recipe, settings.size, fields_of(settings, name, seed))
    run = settings.workdir / "runs" / cell
    train = Stage(f"{cell}: train", "ctssl_jax.train", {"workdir": run}, configured)
    probe = probe_stage(settings, cell, cell)
    return Cell(cell, (), (train, probe), probe.options["output"])


def draw(settings: Settings) -> str:
    """Write objectives.md, objectives.csv, comparisons.csv, objectives.png and curves.png into the
    folder of the study; returns the Markdown.

    Raises:
      InputError: there are no results yet.
    """
    found = kept.results_of(settings, all_cells)
    arms = figure.arms_of(found)
    if not any(arms.values()):
        raise InputError(f"--workdir={settings.workdir} holds no results yet; run the study first")
    rows = figure.score_rows(arms)
    compared = figure.comparison_rows(arms) + figure.ablation_rows(arms)
    caption = figure.caption_of(arms) + kept.folds_in_words(settings, _of_first_seed(found))
    text = "\n".join(
        [
            f"# Objectives at equal compute\n\n{caption}\n",
            figure.score_markdown(rows),
            figure.comparison_markdown(compared),
            figure.training_markdown(arms),
        ]
    )
    settings.workdir.mkdir(parents=True, exist_ok=True)
    write_text(settings.workdir / "objectives.md", text)
    write_csv(settings.workdir / "objectives.csv", rows)
    if compared:
        write_csv(settings.workdir / "comparisons.csv", compared)
    shown = [row for row in rows if row["objective"] not in ABLATIONS]
    figure.save_scores(settings.workdir / "objectives.png", shown, caption)
    figure.save_curves(settings.workdir / "curves.png", arms, caption)
    return text


def _of_first_seed(found: dict) -> dict:
    """Those of which a fold can be missing: other seeds are said by their number."""
    return {name: result for name, result in found.items() if name.endswith("_0")}


def main(argv: list[str]) -> int:
    """Command line."""
    module = f"{__package__}.objectives"
    verb = runner.verb_of(argv, module)
    settings = given.settings_of_flags(verb)
    given.check_overrides(settings, list({one.recipe: None for one in OBJECTIVES.values()}))
    if verb == "draw":
        print(draw(settings), flush=True)
        runner.suggest_after("draw", module, [])
    else:
        runner.act(verb, module, settings, settings.study(all_cells))
    return 0


if __name__ == "__main__":
    given.define_flags()
    command_line.run(main, runner.VERBS)
