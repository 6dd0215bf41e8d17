"""The verbs `plan` and `run` of a study."""

import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

import ctssl_jax
from data_prep.system import command_line
from data_prep.system.errors import InputError, RunFailed, StartAgain
from data_prep.system.files import write_text

from . import given, kept, results
from .cells import Cell, Settings, Stage

VERBS = ("plan", "run", "draw")
STUDIES = (
    "table1",
    "table2",
    "chain",
    "recipe_choices",
    "figure3",
    "figure4",
    "figure5",
    "figure_s1",
    "figure6",
    "confounds",
    "objectives",
)
# commands that `run_stage_here` can run
HERE = ("ctssl_jax.train", "ctssl_jax.evaluate", "ctssl_jax.attributes", "ctssl_jax.probe")


def verb_of(argv: Sequence[str], module: str) -> str:
    """The verb of a command line.

    Raises:
      InputError: there is none.
    """
    if len(argv) < 2:
        name = module.rpartition(".")[2]
        raise InputError(f"give one of {', '.join(VERBS)}: ctssl {name} plan ...")
    return argv[1]


def typed(module: str, *arguments: str) -> str:
    """The command line that runs a door, as one types it."""
    return shlex.join(["ctssl", module.rpartition(".")[2], *arguments])


def run_stage(title: str, module: str, *arguments: str) -> float:
    """Run `python -m module` in a process of its own; returns its seconds.

    A request to stop (SIGTERM, Ctrl-C) is passed on, and the stage may save its state.

    Raises:
      InputError: the stage refused its input, and has printed the reason.
      StartAgain: it was asked to stop, or stopped before its end.
      RunFailed: it failed otherwise.
    """
    command = [sys.executable, "-m", module, *arguments]
    print(f"\n== {title}\n$ {typed(module, *arguments)}", flush=True)
    paths = os.pathsep.join(
        [str(Path(ctssl_jax.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    started, requests = time.monotonic(), []
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})

    def pass_on(signal_number: int, frame: object) -> None:
        requests.append(signal_number)
        if signal_number == signal.SIGTERM:  # Ctrl-C reaches the stage by itself
            process.terminate()

    with command_line.stop_signals_handled_by(pass_on):
        code = process.wait()
    if requests or code == command_line.EXIT_START_AGAIN:
        raise StartAgain(_stopped(title))
    if code == -signal.SIGKILL:
        raise RunFailed(
            f"stage '{title}' was killed, probably since memory ran out; give it a smaller batch "
            "size or more memory, and run the same command again"
        )
    if code:
        failure = InputError if code == command_line.EXIT_INPUT else RunFailed
        raise failure(f"stage '{title}' ended with exit code {code}; its message stands above")
    return time.monotonic() - started


def _stopped(title: str) -> str:
    return f"stage '{title}' was stopped; run the same command again to continue"


def run_stage_here(stage: Stage) -> float:
    """Train, evaluate or probe in this process, without the start of another; returns its seconds.

    Raises:
      StartAgain: the training was asked to stop.
      InputError, RunFailed: as the command raises.
    """
    from ctssl_jax.parallel import processes

    processes.configure_jax()  # before JAX is used
    import jax

    from ctssl_jax.evaluation import measure
    from ctssl_jax.probes import attribute_probe, probing
    from ctssl_jax.training import loop

    print(f"\n== {stage.title}\n$ {typed(stage.module, *stage.arguments())}", flush=True)
    started = time.monotonic()
    if stage.module == "ctssl_jax.train":
        if not loop.train(stage.recipe.config(), **stage.options):
            raise StartAgain(_stopped(stage.title))
    elif stage.module == "ctssl_jax.evaluate":
        result = measure.evaluate(**{"dataset": None, "split": "test"} | stage.options)
        print(measure.table(result), flush=True)
    elif stage.module == "ctssl_jax.probe":
        options = dict(stage.options)
        if "targets" in options:
            options["targets"] = options["targets"].split(",")
        print(probing.table(probing.probe(**options)), flush=True)
    else:
        names = stage.options["attributes"].split(",")
        options = {name: value for name, value in stage.options.items() if name != "attributes"}
        print(attribute_probe.table(attribute_probe.attributes(**options, names=names)), flush=True)
    jax.clear_caches()  # the next cell uses only programs that are kept on disk
    return time.monotonic() - started


def suggest_after(verb: str, module: str, options: Sequence[str]) -> None:
    """Print what comes next in a study: after `plan` its `run`, after `run` its `draw`, after
    `draw` the next study. On stderr: a plan and a table may go to a file.

    Args:
      verb: that was done.
      module: of the study.
      options: flags of the verb that comes next.
    """
    study = module.rpartition(".")[2]
    if verb == "draw":
        following = STUDIES[(STUDIES.index(study) + 1) % len(STUDIES)]
        command_line.suggest(following, "--help", aside=True)
    else:
        command_line.suggest(study, "run" if verb == "plan" else "draw", *options, aside=True)


def reckoned_hours(
    cells: Sequence[Cell], workdir: Path, rates: Mapping[str, float] | None = None
) -> tuple[float, float, int]:
    """The hours of a study.

    Args:
      cells: of the study.
      workdir: its folder.
      rates: recipe -> seconds a step that were measured elsewhere, for recipes of which no cell is
        complete.

    Returns:
      hours that complete cells took (measured); hours that missing cells will take, by the seconds
      a step of complete cells of the same recipe, else by `rates`; and the number of missing cells
      for whose recipe there is neither, which are not in the hours.
    """
    took = {cell.name: results.seconds_of(cell, workdir) for cell in cells if cell.is_complete()}
    a_step: dict[str, list[float]] = {}
    for cell in cells:
        if seconds := took.get(cell.name):
            a_step.setdefault(_kind(cell), []).append(seconds / _steps(cell))
    ahead, unknown = 0.0, 0
    for cell in cells:
        if not cell.is_complete():
            known = a_step.get(_kind(cell)) or [
                rate for name, rate in (rates or {}).items() if name == _kind(cell)
            ]
            unknown += not known
            ahead += _steps(cell) * statistics.median(known) if known else 0.0
    return sum(seconds or 0.0 for seconds in took.values()) / 3600, ahead / 3600, unknown


def _kind(cell: Cell) -> str:
    """What decides how long a step of a cell takes."""
    recipe = next((stage.recipe.name for stage in cell.stages if stage.recipe), "")
    return recipe or (cell.stages[-1].module if cell.stages else cell.name)


def _steps(cell: Cell) -> int:
    """Training steps of a cell; 1 for a cell without a training or with the recipe's number."""
    return sum(int(s.recipe.fields.get("num_steps", 1)) for s in cell.stages if s.recipe) or 1


def plan(cells: Sequence[Cell], module: str, options: Sequence[str], workdir: Path) -> None:
    """Print the cells: whether complete, the cells before them, and the command that runs each;
    and the hours of all.

    Args:
      cells: of the study.
      module: whose `run` verb runs a cell.
      options: flags of the study.
      workdir: the study's folder.
    """
    data = _data(cells)
    for cell in cells:
        absent = "made when needed" if cell.name in data else "missing"
        state = "complete" if cell.is_complete() else absent
        after = f" after {', '.join(cell.after)}" if cell.after else ""
        print(f"# {cell.name} [{state}]{after}")
        print(typed(module, "run", *options, f"--cells={cell.name}"))
    cells = [cell for cell in cells if cell.name not in data]
    took, ahead, unknown = reckoned_hours(cells, workdir)
    missing = sum(not cell.is_complete() for cell in cells)
    print(
        f"# {len(cells) - missing} of {len(cells)} cells are complete and took {took:.2f} hours; "
        f"the {missing} missing ones are reckoned at {ahead:.2f} hours by measured cells of their "
        f"recipes" + (f", but for {unknown} of which none was measured yet" if unknown else "")
    )
    sys.stdout.flush()
    suggest_after("plan", module, options)


def check_chosen(cells: Sequence[Cell], chosen: Sequence[str]) -> None:
    """Refuse names of cells that a study has not, before anything is written.

    Raises:
      InputError: names the cell, and those that there are.
    """
    names = [cell.name for cell in cells]
    for name in chosen:
        if name not in names:
            raise InputError(
                f"--cells={name}: there is no such cell; choose from {', '.join(names)}"
            )


def run(cells: Sequence[Cell], chosen: Sequence[str], workdir: Path, *, here: bool = False) -> None:
    """Run the chosen cells that are not complete (all, if none is named), in order.

    The result of each is kept as soon as it is there. A cell whose result was kept is complete
    without its weights; where a missing cell needs them, it is run again.

    Args:
      cells: of the study.
      chosen: names of cells.
      workdir: the study's folder; its settings were recorded.
      here: run trainings, evaluations and probes in this process, which is faster.

    Raises:
      InputError: an unknown cell, one whose predecessor is missing, a kept result that was made
        otherwise, or a stage that refused its input.
      RunFailed, StartAgain: a stage failed, or was asked to stop.
    """
    check_chosen(cells, chosen)
    for cell in cells:
        kept.check_as_now(cell)
    by_name = {cell.name: cell for cell in cells}
    data = set() if chosen else _data(cells)
    missing = [
        cell
        for cell in cells
        if (cell.name in chosen or (not chosen and cell.name not in data))
        and not cell.is_complete()
    ]
    planned = _with_outputs(by_name, missing)
    done: set[str] = set()
    for number, cell in enumerate(planned, 1):
        for before in cell.after:
            if before not in done and not by_name[before].result.exists():
                raise InputError(
                    f"cell {cell.name} needs {before} first; run --cells={before},{cell.name}"
                )
        print(f"\n==== cell {number} of {len(planned)}: {cell.name}", flush=True)
        seconds = sum(
            run_stage_here(stage)
            if here and stage.module in HERE
            else run_stage(stage.title, stage.module, *stage.arguments())
            for stage in cell.stages
        )
        (workdir / "seconds").mkdir(exist_ok=True)  # a file a cell: cells may run at the same time
        write_text(workdir / "seconds" / cell.name.replace("/", "-"), f"{seconds:.1f}\n")
        done.add(cell.name)
        if cell.kept is not None and cell.result.exists():
            kept.keep(cell, seconds)
    for cell in cells:  # also those that an earlier version of this program ran
        if cell.kept is not None and cell.result.exists() and not cell.kept.exists():
            kept.keep(cell, results.seconds_of(cell, workdir))
    number = len(cells) - len(missing)
    print(f"\n{len(planned)} cell(s) run, {number} were complete or not chosen", flush=True)


def _data(cells: Sequence[Cell]) -> set[str]:
    """Names of the cells that only make data, in a study that keeps its results."""
    if all(cell.kept is None for cell in cells):
        return set()
    return {cell.name for cell in cells if cell.kept is None}


def _with_outputs(by_name: dict[str, Cell], missing: Sequence[Cell]) -> list[Cell]:
    """The missing cells, and before them the data that they need, and the complete cells whose
    output they need and that was removed."""
    wanted, data = {cell.name for cell in missing}, _data(list(by_name.values()))
    for cell in reversed(by_name.values()):
        if cell.name in wanted:
            wanted |= {
                name
                for name in cell.after
                if (by_name[name].is_complete() or name in data)
                and not by_name[name].result.exists()
            }
    return [cell for cell in by_name.values() if cell.name in wanted]


def act(verb: str, module: str, settings: Settings, cells: Sequence[Cell]) -> None:
    """`plan` or `run` the cells of a study of one dataset or its folds.

    Args:
      verb: `plan` or `run`.
      module: of the study, whose `run` verb runs a cell.
      settings: of the study.
      cells: of the study.
    """
    if verb == "plan":
        plan(cells, module, given.options_of(settings), settings.workdir)
        return
    check_chosen(cells, flags.FLAGS.cells)
    given.record(settings)
    run(cells, flags.FLAGS.cells, settings.workdir, here=True)
    suggest_after("run", module, [f"--workdir={settings.workdir}"])
