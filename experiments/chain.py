r"""The progressive chain of masked region prediction: 5, 10, 20, then 33 % of the area.

    ctssl chain --dataset=DATASET --workdir=STUDY                # the chain
    ctssl chain --dataset=DATASET --workdir=STUDY --nochained    # the ablation

In the chain (paper, section II.C.2) each model starts from the one before. So a larger mask comes
with longer training: the fourth model has seen four times as many steps as the first. The ablation
trains each mask size from random weights, for as many steps as the chain took to get there. The two
rows of a mask size then differ in the chain alone. Results of both stay in the same folder, and the
table shows both.

Without a verb it runs the missing cells and draws the table; `plan`, `run` and `draw` do one of the
three. After a kill at any moment the same command continues.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

from collections.abc import Sequence

from absl import flags

from data_prep.system import command_line
from data_prep.system.errors import InputError
from data_prep.system.files import write_text

from .study import given, results, runner
from .study.cells import FRACTIONS, Cell, Settings, chain_cells, keeping, mask_name

SCORES = ("masked_mse", "mse", "ssim")
RECIPE = "masked_region"


def ablation_cells(settings: Settings) -> list[Cell]:
    """The mask sizes from random weights, each for as many steps as the chain took to get there.

    The first model of the chain serves both.
    """
    steps = settings.steps(RECIPE)
    return [
        settings.cell(
            f"{mask_name(fraction)}_alone",
            RECIPE,
            {"mask.fraction": fraction},
            num_steps=(stage + 1) * steps,
        )
        for stage, fraction in enumerate(FRACTIONS)
        if stage > 0
    ]


def table_rows(chained: Sequence[Cell], alone: Sequence[Cell], steps: int) -> list[dict[str, str]]:
    """One row a model, from results JSON; scores of a missing cell are empty."""
    rows = []
    for stage, fraction in enumerate(FRACTIONS):
        ways = [("chained" if stage else "start of both", chained[stage])]
        ways += [("from random weights", alone[stage - 1])] if stage else []
        for way, cell in ways:
            row = {
                "mask": f"{fraction:.0%}",
                "training": way,
                "steps in all": f"{(stage + 1) * steps:,}",
            }
            result = results.read_result(cell)
            for score in SCORES:
                row[score] = "" if result is None else results.score(result["metrics"][score])
            rows.append(row)
    return rows


def draw(settings: Settings) -> str:
    """Write chain.md and chain.csv into the folder of the study; returns the Markdown.

    Raises:
      InputError: there are no results yet.
    """
    chained, alone = (keeping(f(settings), settings.kept) for f in (chain_cells, ablation_cells))
    rows = table_rows(chained, alone, settings.steps(RECIPE))
    complete = [result for cell in (*chained, *alone) if (result := results.read_result(cell))]
    if not complete:
        raise InputError(f"--workdir={settings.workdir} holds no results yet; run the study first")
    caption = results.caption(complete)
    text = f"# Progressive masking, chained and not\n\n{caption}\n\n{results.markdown(rows)}"
    write_text(settings.workdir / "chain.md", text)
    results.write_csv(settings.workdir / "chain.csv", rows)
    return text


def define_flags() -> None:
    """Only where this module is the program."""
    given.define_flags()
    flags.DEFINE_bool(
        "chained", True, "Each from the one before; --nochained: each from random weights."
    )


def main(argv: list[str]) -> int:
    """Command line."""
    verb = argv[1] if len(argv) > 1 else ""
    settings = given.settings_of_flags(verb)
    given.check_overrides(settings, [RECIPE])
    if settings.folds:
        raise InputError("--folds: the chain is drawn of one dataset; leave it out")
    chain = chain_cells(settings)
    cells = chain if flags.FLAGS.chained else [chain[0], *ablation_cells(settings)]
    cells = keeping(cells, settings.kept)
    if verb == "plan":
        more = [] if flags.FLAGS.chained else ["--nochained"]
        options = [*given.options_of(settings), *more]
        runner.plan(cells, f"{__package__}.chain", options, settings.workdir)
    if verb in ("", "run"):
        runner.check_chosen(cells, flags.FLAGS.cells)
        given.record(settings)
        runner.run(cells, flags.FLAGS.cells, settings.workdir)
    if verb in ("", "draw"):
        print(draw(given.recorded(settings)), flush=True)
        runner.suggest_after("draw", f"{__package__}.chain", [])
    elif verb == "run":
        runner.suggest_after("run", f"{__package__}.chain", [f"--workdir={settings.workdir}"])
    return 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main, runner.VERBS)
