"""Studies: many trainings and evaluations that together make a table or a figure.

A study is a list of cells. Each is a few commands, complete when its results JSON exists. Every study has three verbs:

    plan    lists the cells, one command each, with what must be complete before: for a Slurm array or several machines
    run     runs the missing cells here, one after the other; run again after an interruption, it goes on
    draw    makes tables and figures from the results JSON files alone; what is missing is drawn as missing
"""

import contextlib
import csv
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from data_prep import stores
from data_prep.system import command_line
from data_prep.system.errors import InputError, RunFailed, StartAgain
from data_prep.system.files import write_text, written_whole

PROJECT = Path(__file__).resolve().parent.parent
VERBS = ("plan", "run", "draw")
HERE = ("ctssl_jax.train", "ctssl_jax.evaluate", "ctssl_jax.attributes")
SETTINGS = "study.json"
FIXED_FIELDS = (
    "dataset",
    "seed",
    "num_steps",
    "image_size",
    "task",
    "recipe",
    "mask.fraction",
    "init_from",
    "init_scope",
    "init_checkpoint",
)


class Cell(NamedTuple):
    """One part of a study that can run on a machine of its own.

    name: unique within the study.
    after: names of the cells that must be complete before.
    stages: what is run, each `(title, module, arguments...)`; a stage that is complete does nothing when run again.
    result: the results JSON that the last stage writes.
    """

    name: str
    after: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]
    result: Path


class Settings(NamedTuple):
    """What all cells of a study share.

    dataset: dataset directory.
    workdir: the study's folder.
    size: of the recipes, `reference` or `small`.
    num_steps: of each training; 0 takes the recipe's.
    seed: of weights and data order.
    overrides: `FIELD=VALUE` of every recipe, e.g. `dtype=bfloat16`.
    split: that is evaluated.
    """

    dataset: Path
    workdir: Path
    size: str
    num_steps: int
    seed: int
    overrides: tuple[str, ...]
    split: str

    def steps(self, recipe: str) -> int:
        """Training steps of a recipe, `config.num_steps`."""
        return self.num_steps or importlib.import_module(f"configs.{recipe}").get_config(self.size).num_steps


def train_cell(
    settings: Settings, name: str, recipe: str, *, after: str = "", num_steps: int = 0, **fields: Any
) -> Cell:
    """Train a recipe and evaluate it.

    Args:
      settings: of the study.
      name: of the cell; the run is `WORKDIR/runs/NAME`, the result `WORKDIR/results/NAME.json`.
      recipe: file in `configs/`.
      after: cell whose last checkpoint the training starts from.
      num_steps: training steps, by default the recipe's.
      fields: further fields of the configuration, `mask__fraction=0.05`.
    """
    run, result = settings.workdir / "runs" / name, settings.workdir / "results" / f"{name}.json"
    fields = {field.replace("__", "."): value for field, value in fields.items()}
    if after:
        fields |= {"init_from": settings.workdir / "runs" / after, "init_checkpoint": "last"}
    fields |= {"dataset": settings.dataset, "seed": settings.seed, "num_steps": num_steps or settings.steps(recipe)}
    given = [*(f"{field}={value}" for field, value in fields.items()), *settings.overrides]
    train = (
        *(f"{name}: train", "ctssl_jax.train", f"--config={PROJECT / 'configs' / recipe}.py:{settings.size}"),
        *(f"--config.{field}" for field in given),
        f"--workdir={run}",
    )
    evaluate = (
        *(f"{name}: evaluate", "ctssl_jax.evaluate", f"--workdir={run}", f"--dataset={settings.dataset}"),
        *(f"--split={settings.split}", f"--output={result}", "--baselines"),
    )
    return Cell(name, (after,) if after else (), (train, evaluate), result)


def run_stage(title: str, module: str, *arguments: str) -> float:
    """Run `python -m module` in a process of its own; returns its seconds.

    A request to stop (SIGTERM, Ctrl-C) is passed on, and the stage may save what it has.

    Raises:
      InputError: the stage refused its input; it has already said why.
      StartAgain: it was asked to stop, or stopped before its end.
      RunFailed: it failed otherwise.
    """
    command = [sys.executable, "-m", module, *arguments]
    print(f"\n== {title}\n$ python {shlex.join(command[1:])}", flush=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])}
    started, asked = time.monotonic(), []
    process = subprocess.Popen(command, env=environment)

    def pass_on(signal_number: int, frame: object) -> None:
        asked.append(signal_number)
        if signal_number == signal.SIGTERM:  # Ctrl-C and a closed terminal reach the stage by themselves
            process.terminate()

    with command_line.stop_signals_handled_by(pass_on):
        code = process.wait()
    if asked or code == command_line.EXIT_START_AGAIN:
        raise StartAgain(f"stage '{title}' was stopped; run the same command again to continue")
    if code:
        failure = InputError if code == command_line.EXIT_INPUT else RunFailed
        raise failure(f"stage '{title}' ended with exit code {code}; its message stands above")
    return time.monotonic() - started


def run_stage_here(title: str, module: str, *arguments: str) -> float:
    """Run a command line of `HERE` in this process; returns its seconds.

    Raises:
      InputError, RunFailed: as the command does.
      StartAgain: it was asked to stop.
    """
    import jax

    print(f"\n== {title}\n$ python {shlex.join(['-m', module, *arguments])}", flush=True)
    started = time.monotonic()
    program, given = importlib.import_module(module), flags.FlagValues()
    program.define_flags(given)
    command, sys.argv = sys.argv, [module, *arguments]  # where a recipe's fields are looked for
    try:
        given(sys.argv)
    finally:
        sys.argv = command
    if not program.start(given):
        raise StartAgain(f"stage '{title}' was stopped; run the same command again to continue")
    jax.clear_caches()  # compiled programs of one cell are of no use to the next, but for those kept on disk
    return time.monotonic() - started


def plan(cells: Sequence[Cell], module: str, options: Sequence[str]) -> None:
    """Print the cells: whether complete, what must be complete before, and the command that runs each.

    Args:
      cells: of the study.
      module: whose `run` verb runs a cell.
      options: flags of the study.
    """
    for cell in cells:
        state = "complete" if cell.result.exists() else "missing"
        after = f" after {', '.join(cell.after)}" if cell.after else ""
        print(f"# {cell.name} [{state}]{after}")
        print(f"python -m {module} run {shlex.join([*options, f'--cells={cell.name}'])}")


def options_of(settings: Settings) -> list[str]:
    """The flags that ask for these settings."""
    options = [f"--dataset={settings.dataset}", f"--workdir={settings.workdir}", f"--size={settings.size}"]
    options += [f"--seed={settings.seed}", f"--split={settings.split}"]
    options += [f"--num_steps={settings.num_steps}"] if settings.num_steps else []
    return [*options, *(f"--override={override}" for override in settings.overrides)]


def run(cells: Sequence[Cell], chosen: Sequence[str], workdir: Path, *, here: bool = False) -> None:
    """Run the chosen cells that are not complete (all, if none is named), in order.

    Args:
      cells: of the study.
      chosen: names of cells.
      workdir: the study's folder; its settings were recorded.
      here: run trainings and evaluations in this process, which saves their start-up.

    Raises:
      InputError: an unknown cell, one whose predecessor is missing, a stage that refused its input, or a folder with
        results of other settings.
      RunFailed, StartAgain: a stage failed, or was asked to stop.
    """
    known = {cell.name: cell for cell in cells}
    for name in chosen:
        if name not in known:
            raise InputError(f"--cells={name}: there is no such cell; choose from {', '.join(known)}")
    missing = [cell for cell in cells if (cell.name in chosen or not chosen) and not cell.result.exists()]
    for number, cell in enumerate(missing, 1):
        for before in cell.after:
            if not known[before].result.exists():
                raise InputError(f"cell {cell.name} needs {before} first; run --cells={before},{cell.name}")
        print(f"\n==== cell {number} of {len(missing)}: {cell.name}", flush=True)
        seconds = sum((run_stage_here if here and stage[1] in HERE else run_stage)(*stage) for stage in cell.stages)
        (workdir / "seconds").mkdir(exist_ok=True)  # a file a cell: cells may run at the same time
        write_text(workdir / "seconds" / cell.name, f"{seconds:.1f}\n")
    print(f"\n{len(missing)} cell(s) run, {len(cells) - len(missing)} were complete or not chosen", flush=True)


def record_settings(workdir: Path, content: dict[str, Any]) -> None:
    """A study's folder holds results of one kind: `study.json` says of which.

    Cells may start at the same time on several machines: the file appears whole, and the first one stays.

    Args:
      workdir: the study's folder, made if need be.
      content: what all its cells share, without places.

    Raises:
      InputError: it holds a study with other settings, or cannot be written.
    """
    content = json.loads(json.dumps(content))
    path = workdir / SETTINGS
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=workdir, prefix=".study") as file:
            file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
            file.flush()
            with contextlib.suppress(FileExistsError):
                os.link(file.name, path)
    except OSError as error:
        raise InputError(f"--workdir={workdir} cannot be written ({error.strerror})") from None
    known = json.loads(path.read_text())
    for name, value in content.items():
        if known.get(name) != value:
            raise InputError(
                f"--workdir={workdir} holds a study with {name}={known.get(name)}, not {value}; use another one"
            )


def settings_content(settings: Settings) -> dict[str, Any]:
    """What `record_settings` keeps of a study of one dataset."""
    from data_prep.dataset import Dataset

    content = {**settings._asdict(), "dataset_fingerprint": Dataset.open(settings.dataset).preparation["fingerprint"]}
    return {name: value for name, value in content.items() if name not in ("dataset", "workdir")}


def recorded(settings: Settings) -> Settings:
    """The settings that the study's cells were run with, whatever the flags say; for drawing.

    Raises:
      InputError: no study was begun there.
    """
    path = settings.workdir / SETTINGS
    if not path.exists():
        raise InputError(f"--workdir={settings.workdir} holds no results yet; run the study first")
    known = json.loads(path.read_text())
    del known["dataset_fingerprint"]
    return settings._replace(**known | {"overrides": tuple(known["overrides"])})


def check_overrides(settings: Settings, recipes: Sequence[str]) -> None:
    """Refuse overrides of what a study itself sets, and of fields that one of its recipes lacks.

    Raises:
      InputError: names the field.
    """
    for override in settings.overrides:
        field = override.split("=")[0]
        if field in FIXED_FIELDS:
            raise InputError(f"--override={override}: a study sets {field} itself (see --help for what can be chosen)")
        for recipe in recipes:
            node = importlib.import_module(f"configs.{recipe}").get_config(settings.size)
            for part in field.split("."):
                if part not in node:
                    raise InputError(f"--override={override}: configs/{recipe}.py has no field {field}")
                node = node[part]


def with_spread(mean: float | None, sd: float | None) -> str:
    """A mean with its standard deviation, if there is one; empty without a mean."""
    return "" if mean is None else f"{mean:.4f}" + ("" if sd is None else f" ± {sd:.4f}")


def score(value: dict) -> str:
    """A metric of a results JSON: mean, standard deviation and 95 % interval."""
    interval = "" if value["ci95"] is None else f" ({value['ci95'][0]:.4f} to {value['ci95'][1]:.4f})"
    return with_spread(value["mean"], value["sd"]) + interval


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Rows with the same columns as a Markdown table; an empty cell is `missing`."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(value or "missing" for value in row.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows with the same columns as CSV; None is empty."""
    with written_whole(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_result(cell: Cell) -> dict | None:
    """The results of a cell, or None while it is missing."""
    return json.loads(cell.result.read_text()) if cell.result.exists() else None


def caption(results: Sequence[dict]) -> str:
    """What the results have in common, in words: data, sizes, training. Says so where they have it not."""

    def common(values: Sequence[Any]) -> str:
        found = list(dict.fromkeys(str(value) for value in values))
        return found[0] if len(found) == 1 else ", ".join(found)

    numbers = [next(iter(result["metrics"].values())) for result in results]
    size = [f"{result['config']['image_size']} x {result['config']['image_size']} pixels" for result in results]
    steps = sorted({result["config"]["num_steps"] for result in results})
    parts = [
        "**SYNTHETIC DATA: computer-made scans, no patients; nothing here is a medical result.** "
        if any(result["synthetic"] for result in results)
        else "",
        f"{common([result['split'] for result in results])} split, "
        f"{common([number['num_volumes'] for number in numbers])} volume(s) of "
        f"{common([number['num_patients'] for number in numbers])} patient(s), {common(size)}; ",
        f"{' / '.join(f'{number:,}' for number in steps)} training steps of batch "
        f"{common([result['config']['batch_size'] for result in results])}, seed "
        f"{common([result['seed'] for result in results])}, {common([result['device'] for result in results])}.",
    ]
    seen = {result["num_patients_seen_in_training"] for result in results}
    if None in seen:
        parts.append(" Whether the models were trained on these patients CANNOT BE CHECKED (other pseudonym key).")
    elif seen != {0}:
        parts.append(f" NOT HELD OUT: up to {max(seen)} of these patients were in the training data.")
    if len({result["dataset_fingerprint"] for result in results}) > 1:
        parts.append(" The results are of DIFFERENT datasets.")
    return "".join(parts)


def seconds(workdir: Path) -> dict[str, float]:
    """Cell -> seconds of its last run."""
    return {
        path.name: float(path.read_text()) for path in sorted((workdir / "seconds").glob("*")) if path.suffix != ".tmp"
    }


def define_flags() -> None:
    """Flags that all studies share; only where a study is the program."""
    flags.DEFINE_string("dataset", None, "Dataset directory made by data_prep.prepare.")
    flags.DEFINE_string("workdir", None, "Folder of the study: runs, results, tables, figures.")
    flags.DEFINE_enum("size", "small", ["small", "reference"], "Of the recipes: 64 x 64 pixels, or the paper's model.")
    flags.DEFINE_integer("num_steps", 0, "Steps of each training; 0 takes the recipe's.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Of weights and order of slices.")
    flags.DEFINE_multi_string("override", [], "FIELD=VALUE of every recipe, e.g. dtype=bfloat16; repeatable.")
    flags.DEFINE_enum("split", "test", ["test", "validation"], "Split that is evaluated.")
    flags.DEFINE_list("cells", [], "Cells to run, separated by commas; by default all that are missing.")


def local_dataset(dataset: str) -> Path:
    """The absolute path of a dataset. Raises InputError for a URL."""
    return stores.local_path(dataset, "--dataset", "fetch it first: python -m data_prep.fetch").resolve()


def settings_of_flags(verb: str) -> Settings:
    """What the command line asks for; `draw` takes all but the folder from what the study was run with.

    Raises:
      InputError: a flag is missing, or an override is no FIELD=VALUE.
    """
    for name in ("workdir",) if verb == "draw" else ("dataset", "workdir"):
        if not flags.FLAGS[name].value:
            raise InputError(f"give --{name}=DIR")
    for override in flags.FLAGS.override:
        if "=" not in override:
            raise InputError(f"--override={override}: must be FIELD=VALUE, e.g. --override=dtype=bfloat16")
    settings = Settings(
        dataset=local_dataset(flags.FLAGS.dataset or ""),
        workdir=Path(flags.FLAGS.workdir).resolve(),
        size=flags.FLAGS.size,
        num_steps=flags.FLAGS.num_steps,
        seed=flags.FLAGS.seed,
        overrides=tuple(flags.FLAGS.override),
        split=flags.FLAGS.split,
    )
    return recorded(settings) if verb == "draw" else settings
