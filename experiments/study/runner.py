"""The verbs `plan` and `run` of a study, and the flags of studies of one dataset."""

import contextlib
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
from typing import Any

from absl import flags

import ctssl_jax
from ctssl_jax.training.recipe_files import load_recipe
from data_prep.dataset.reader import Dataset
from data_prep.system import command_line, stores
from data_prep.system.errors import InputError, RunFailed, StartAgain
from data_prep.system.files import read_json, write_text

from .cells import Cell, Settings, Stage

VERBS = ("plan", "run", "draw")
STUDIES = ("table1", "table2", "chain", "figure3", "figure4", "figure5", "figure_s1", "figure6")
# commands that `run_stage_here` can run
HERE = ("ctssl_jax.train", "ctssl_jax.evaluate", "ctssl_jax.attributes")
SETTINGS = "study.json"
# fields of a recipe that a study sets
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
    from ctssl_jax.probes import attribute_probe
    from ctssl_jax.training import loop

    print(f"\n== {stage.title}\n$ {typed(stage.module, *stage.arguments())}", flush=True)
    started = time.monotonic()
    if stage.module == "ctssl_jax.train":
        if not loop.train(stage.recipe.config(), **stage.options):
            raise StartAgain(_stopped(stage.title))
    elif stage.module == "ctssl_jax.evaluate":
        result = measure.evaluate(**{"dataset": None, "split": "test"} | stage.options)
        print(measure.table(result), flush=True)
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


def plan(cells: Sequence[Cell], module: str, options: Sequence[str]) -> None:
    """Print the cells: whether complete, the cells before them, and the command that runs each.

    Args:
      cells: of the study.
      module: whose `run` verb runs a cell.
      options: flags of the study.
    """
    for cell in cells:
        state = "complete" if cell.result.exists() else "missing"
        after = f" after {', '.join(cell.after)}" if cell.after else ""
        print(f"# {cell.name} [{state}]{after}")
        print(typed(module, "run", *options, f"--cells={cell.name}"))
    sys.stdout.flush()
    suggest_after("plan", module, options)


def run(cells: Sequence[Cell], chosen: Sequence[str], workdir: Path, *, here: bool = False) -> None:
    """Run the chosen cells that are not complete (all, if none is named), in order.

    Args:
      cells: of the study.
      chosen: names of cells.
      workdir: the study's folder; its settings were recorded.
      here: run trainings, evaluations and probes in this process, which is faster.

    Raises:
      InputError: an unknown cell, one whose predecessor is missing, or a stage that refused its
        input.
      RunFailed, StartAgain: a stage failed, or was asked to stop.
    """
    by_name = {cell.name: cell for cell in cells}
    for name in chosen:
        if name not in by_name:
            raise InputError(
                f"--cells={name}: there is no such cell; choose from {', '.join(by_name)}"
            )
    missing = [
        cell for cell in cells if (cell.name in chosen or not chosen) and not cell.result.exists()
    ]
    for number, cell in enumerate(missing, 1):
        for before in cell.after:
            if not by_name[before].result.exists():
                raise InputError(
                    f"cell {cell.name} needs {before} first; run --cells={before},{cell.name}"
                )
        print(f"\n==== cell {number} of {len(missing)}: {cell.name}", flush=True)
        seconds = sum(
            run_stage_here(stage)
            if here and stage.module in HERE
            else run_stage(stage.title, stage.module, *stage.arguments())
            for stage in cell.stages
        )
        (workdir / "seconds").mkdir(exist_ok=True)  # a file a cell: cells may run at the same time
        write_text(workdir / "seconds" / cell.name, f"{seconds:.1f}\n")
    kept = len(cells) - len(missing)
    print(f"\n{len(missing)} cell(s) run, {kept} were complete or not chosen", flush=True)


def record_settings(workdir: Path, content: dict[str, Any]) -> None:
    """Write the settings of a study into its folder, or compare them with the recorded settings.

    Cells may start at the same time on several machines: the file appears whole, and the first file
    stays.

    Args:
      workdir: the study's folder, made if need be.
      content: settings that all cells share, without paths.

    Raises:
      InputError: the folder holds a study with other settings, or cannot be written.
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
    recorded_content = read_json(path)
    for name, value in content.items():
        if recorded_content.get(name) != value:
            raise InputError(
                f"--workdir={workdir} holds a study with {name}={recorded_content.get(name)}, not "
                f"{value}; use another one"
            )


def settings_content(settings: Settings) -> dict[str, Any]:
    """The settings of a study of one dataset that `record_settings` keeps."""
    fingerprint = Dataset.open(settings.dataset).fingerprint
    content = {**settings._asdict(), "dataset_fingerprint": fingerprint}
    return {name: value for name, value in content.items() if name not in ("dataset", "workdir")}


def recorded(settings: Settings) -> Settings:
    """The settings that the cells of the study were run with, for drawing; flags do not count.

    Raises:
      InputError: the folder has no study.
    """
    path = settings.workdir / SETTINGS
    if not path.exists():
        raise InputError(f"--workdir={settings.workdir} holds no results yet; run the study first")
    content = read_json(path)
    del content["dataset_fingerprint"]
    return settings._replace(**content | {"overrides": tuple(content["overrides"])})


def check_overrides(settings: Settings, recipes: Sequence[str]) -> None:
    """Refuse overrides of fields that a study sets itself, or that one of its recipes lacks.

    Raises:
      InputError: names the field.
    """
    for override in settings.overrides:
        field = override.split("=")[0]
        if field in FIXED_FIELDS:
            raise InputError(
                f"--override={override}: a study sets {field} itself (see --help for the choices)"
            )
        for recipe in recipes:
            node = load_recipe(recipe, settings.size)
            for part in field.split("."):
                if part not in node:
                    raise InputError(
                        f"--override={override}: configs/{recipe}.py has no field {field}"
                    )
                node = node[part]


def define_flags() -> None:
    """Flags that all studies of one dataset share, only where a study is the program."""
    flags.DEFINE_string("dataset", None, "Dataset directory made by data_prep.prepare.")
    flags.DEFINE_string("workdir", None, "Folder of the study: runs, results, tables, figures.")
    flags.DEFINE_enum(
        "size",
        "small",
        ["small", "reference"],
        "Size of the recipes: 64 x 64 pixels, or the paper's model.",
    )
    flags.DEFINE_integer(
        "num_steps", 0, "Steps of each training; 0 takes the recipe's.", lower_bound=0
    )
    flags.DEFINE_integer("seed", 0, "Seed of weights and of the order of slices.")
    flags.DEFINE_multi_string(
        "override", [], "FIELD=VALUE of every recipe, e.g. dtype=bfloat16; repeatable."
    )
    flags.DEFINE_enum("split", "test", ["test", "validation"], "Split that is evaluated.")
    flags.DEFINE_list(
        "cells", [], "Cells to run, separated by commas; by default all that are missing."
    )


def local_dataset(dataset: str) -> Path:
    """The absolute path of a dataset.

    Raises:
      InputError: for a URL.
    """
    remedy = "fetch it first: ctssl fetch"
    return stores.local_path(dataset, "--dataset", remedy).resolve()


def local_study(workdir: str) -> Path:
    """The absolute path of a study's folder.

    Raises:
      InputError: for a URL.
    """
    return stores.local_path(workdir, "--workdir", "choose a folder here").resolve()


def settings_of_flags(verb: str) -> Settings:
    """The settings of the command line; `draw` takes all but the folder from the recorded study.

    Raises:
      InputError: a flag is missing, or an override is not FIELD=VALUE.
    """
    for name in ("workdir",) if verb == "draw" else ("dataset", "workdir"):
        if not flags.FLAGS[name].value:
            raise InputError(f"give --{name}=DIR")
    for override in flags.FLAGS.override:
        if "=" not in override:
            raise InputError(
                f"--override={override}: must be FIELD=VALUE, e.g. --override=dtype=bfloat16"
            )
    settings = Settings(
        dataset=local_dataset(flags.FLAGS.dataset or ""),
        workdir=local_study(flags.FLAGS.workdir),
        size=flags.FLAGS.size,
        num_steps=flags.FLAGS.num_steps,
        seed=flags.FLAGS.seed,
        overrides=tuple(flags.FLAGS.override),
        split=flags.FLAGS.split,
    )
    return recorded(settings) if verb == "draw" else settings


def options_of(settings: Settings) -> list[str]:
    """The flags of these settings."""
    options = [f"--dataset={settings.dataset}", f"--workdir={settings.workdir}"]
    options += [f"--size={settings.size}", f"--seed={settings.seed}", f"--split={settings.split}"]
    options += [f"--num_steps={settings.num_steps}"] if settings.num_steps else []
    return [*options, *(f"--override={override}" for override in settings.overrides)]
