r"""Table II of the paper: eight pretrained models on held-out volumes, each on its own task.

    ctssl table2 plan --dataset=DATASET --workdir=STUDY  # one command a cell
    ctssl table2 run  --dataset=DATASET --workdir=STUDY  # runs the missing cells
    ctssl table2 draw --dataset=DATASET --workdir=STUDY  # from results JSON alone

The four mask sizes are the paper's progressive chain; the other four start from random weights.
Beyond the paper, every frozen encoder is probed on the labels of the other tasks and on
reconstruction (`--nocross` leaves that out), beside an untrained encoder and the pixels themselves,
so that encoders are compared on equal terms. `draw` writes Markdown, CSV and PNG.

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

from .study import runner
from .study.cells import Cell, Settings, Stage, chain_cells
from .study.results import caption as caption_of
from .study.results import markdown, read_result, seconds, write_csv
from .study.table2_figure import (
    CLASSIFICATION,
    METRICS,
    RECONSTRUCTION,
    TITLES,
    cross_rows,
    cross_values,
    figure_rows,
    health_markdown,
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
        run, encoder = (name, "run") if name in names else (names[0], name)
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


def draw(settings: Settings) -> str:
    """Write table2.md, .csv, .png and cross.csv into the folder of the study; returns the Markdown.

    Raises:
      InputError: there are no results yet.
    """
    cells = {cell.name: cell for cell in model_cells(settings)}
    results = {name: read_result(cell) for name, cell in cells.items()}
    cross = {cell.name: read_result(cell) for cell in cross_cells(settings)}
    complete = [result for result in results.values() if result]
    if not complete:
        raise InputError(f"--workdir={settings.workdir} holds no results yet; run the study first")
    rows = figure_rows(results)
    caption = caption_of(complete)
    total = sum(seconds(settings.workdir).values())
    took = f" The cells took {total / 60:.0f} minutes by the clock." if total else ""
    parts = [
        "# Table II: self-supervised models on held-out "
        f"volumes\n\n{caption}{took}\n\n{table_markdown(rows)}"
    ]
    parts.append(f"## Representation health\n\n{health_markdown(results)}")
    if any(cross.values()):
        parts.append(
            "## Cross table: frozen encoders on equal terms\n\nLinear probe and k nearest "
            "neighbours on the frozen encoder's features, mean ± sd over "
            f"volumes.\n\n{markdown(cross_rows(cross))}"
        )
    text = "\n".join(parts)
    write_text(settings.workdir / "table2.md", text)
    write_csv(settings.workdir / "table2.csv", rows)
    write_csv(settings.workdir / "cross.csv", cross_values(cross))
    save_picture(
        settings.workdir / "table2.png",
        [
            (
                TITLES[name],
                [row for row in rows if row["model"] == name],
                cells[name].result.with_suffix(".npz"),
            )
            for name in (*RECONSTRUCTION, *CLASSIFICATION)
        ],
        METRICS,
        caption,
    )
    return text


def define_flags() -> None:
    """Only where this module is the program."""
    runner.define_flags()
    flags.DEFINE_bool("cross", True, "Also probe every frozen encoder on the other tasks.")


def main(argv: list[str]) -> int:
    """Command line."""
    verb = runner.verb_of(argv, f"{__package__}.table2")
    settings = runner.settings_of_flags(verb)
    runner.check_overrides(settings, ["masked_region", *OTHER_RECIPES])
    cells = [*model_cells(settings), *(cross_cells(settings) if flags.FLAGS.cross else [])]
    if verb == "plan":
        runner.plan(cells, f"{__package__}.table2", runner.options_of(settings))
    elif verb == "run":
        runner.record_settings(settings.workdir, runner.settings_content(settings))
        runner.run(cells, flags.FLAGS.cells, settings.workdir)
        runner.suggest_after("run", f"{__package__}.table2", [f"--workdir={settings.workdir}"])
    else:
        print(draw(settings), flush=True)
        runner.suggest_after("draw", f"{__package__}.table2", [])
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main, runner.VERBS)
