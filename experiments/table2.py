r"""Table II of the paper: eight pretrained models on held-out volumes, each on its own task.

    ctssl table2 plan --dataset=DATASET --workdir=STUDY  # one command a cell
    ctssl table2 run  --dataset=DATASET --workdir=STUDY  # runs the missing cells
    ctssl table2 draw --dataset=DATASET --workdir=STUDY  # from results JSON alone

The four mask sizes are the paper's progressive chain; the other four start from random weights.
Beyond the paper, every frozen encoder is probed on the labels of the other tasks and on
reconstruction (`--nocross` leaves that out), beside an untrained encoder and the pixels themselves,
so that encoders are compared on equal terms. `draw` writes Markdown, CSV and PNG.

With few patients, `--folds=4` and a folder of folds (`ctssl merge --folds=4`) as --dataset test
every patient once. The small results in `--results` are all that `draw` needs:

    ctssl table2 draw --results=experiments/results/table2_real_64 --workdir=TABLES

`--size=small` (64 x 64 pixels) with `--num_steps=750` took 46 minutes on two busy CPU cores;
`--size=reference --override=dtype=bfloat16` is the paper's model.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

from absl import flags

from data_prep.system import command_line
from data_prep.system.errors import InputError
from data_prep.system.files import write_text

from .study import given, kept, runner
from .study.cells import Cell, Settings, Stage, chain_cells
from .study.results import caption as caption_of
from .study.results import markdown, seconds_of, write_csv
from .study.table2_figure import (
    CLASSIFICATION,
    METRICS,
    RECONSTRUCTION,
    TITLES,
    baselines_markdown,
    cross_rows,
    cross_values,
    figure_rows,
    health_markdown,
    label_free_markdown,
    label_free_rows,
    order_markdown,
    order_rows,
    save_picture,
    table_markdown,
)

OTHER_RECIPES = ("next_slice", "denoising", *CLASSIFICATION)


def model_cells(settings: Settings) -> list[Cell]:
    """The eight trainings."""
    others = [settings.cell(name, name, {}) for name in OTHER_RECIPES]
    return [*chain_cells(settings), *others]


def cross_cells(settings: Settings) -> list[Cell]:
    """A probe of each frozen encoder, and of two controls, which use the configuration of a run."""
    cells = []
    names = [cell.name for cell in model_cells(settings)]
    for name in (*names, "untrained", "pixels"):
        # the controls take the configuration alone: of the cheapest training
        run, encoder = (name, "run") if name in names else (names[-1], name)
        result = settings.workdir / "results" / f"cross_{name}.json"
        options = {
            "workdir": settings.workdir / "runs" / run,
            "dataset": settings.dataset,
            "split": settings.split,
            "encoder": encoder,
            "output": result,
        }
        stage = Stage(f"cross_{name}: probe", "ctssl_jax.probe", options)
        cells.append(Cell(f"cross_{name}", (run,), (stage,), result))
    return cells


def all_cells(settings: Settings) -> list[Cell]:
    """Of one dataset: the trainings, then the probes of the frozen encoders."""
    return [*model_cells(settings), *cross_cells(settings)]


def draw(settings: Settings) -> str:
    """Write table2.md, .csv, cross.csv and, where the pictures of the evaluations are, table2.png
    into the folder of the study; returns the Markdown.

    Raises:
      InputError: there are no results yet.
    """
    found = kept.results_of(settings, all_cells)
    results = {name: found[name] for name in (*RECONSTRUCTION, *CLASSIFICATION)}
    cross = {name: result for name, result in found.items() if name.startswith("cross_")}
    complete = [result for result in results.values() if result]
    if not complete:
        raise InputError(f"--workdir={settings.workdir} holds no results yet; run the study first")
    settings.workdir.mkdir(parents=True, exist_ok=True)
    rows = figure_rows(results)
    caption = caption_of(complete) + kept.folds_in_words(settings, found)
    cells = settings.study(all_cells)
    total = sum(seconds_of(cell, settings.workdir) or 0 for cell in cells)
    took = f" The cells took {total / 60:.0f} minutes by the clock." if total else ""
    parts = [
        "# Table II: self-supervised models on held-out "
        f"volumes\n\n{caption}{took}\n\n{table_markdown(rows)}"
    ]
    ordered = order_rows(results)
    if ordered:
        parts.append(order_markdown(ordered))
        write_csv(settings.workdir / "order.csv", ordered)
    if baselines := baselines_markdown(results):
        parts.append(baselines)
    parts.append(f"## Representation health\n\n{health_markdown(results)}")
    if any(cross.values()):
        parts.append(
            "## Cross table: frozen encoders on equal terms\n\nLinear probe and k nearest "
            "neighbours on the frozen encoder's features, mean ± sd over "
            f"volumes.\n\n{markdown(cross_rows(cross))}"
        )
    compared = label_free_rows(cross)
    if compared:
        parts.append(label_free_markdown(compared))
        write_csv(settings.workdir / "label_free.csv", compared)
    text = "\n".join(parts)
    write_text(settings.workdir / "table2.md", text)
    write_csv(settings.workdir / "table2.csv", rows)
    write_csv(settings.workdir / "cross.csv", cross_values(cross))
    pictures = {cell.name: cell.result.with_suffix(".npz") for cell in cells}
    pictures = {name: pictures.get(name, pictures.get(f"fold_0/{name}")) for name in results}
    if any(path.exists() for path in pictures.values()):
        models = [
            (TITLES[name], [row for row in rows if row["model"] == name], pictures[name])
            for name in results
        ]
        save_picture(settings.workdir / "table2.png", models, METRICS, caption)
    return text


def define_flags() -> None:
    """Only where this module is the program."""
    given.define_flags()
    flags.DEFINE_bool("cross", True, "Also probe every frozen encoder on the other tasks.")


def main(argv: list[str]) -> int:
    """Command line."""
    verb = runner.verb_of(argv, f"{__package__}.table2")
    settings = given.settings_of_flags(verb)
    given.check_overrides(settings, ["masked_region", *OTHER_RECIPES])
    if verb != "draw":
        cells = settings.study(all_cells if flags.FLAGS.cross else model_cells)
        runner.act(verb, f"{__package__}.table2", settings, cells)
    else:
        print(draw(settings), flush=True)
        runner.suggest_after("draw", f"{__package__}.table2", [])
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main, runner.VERBS)
