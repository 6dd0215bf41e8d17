"""What a study is given: its flags, its overrides, and the settings that it records."""

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from ctssl_jax.training.recipe_files import load_recipe
from data_prep.dataset.reader import Dataset
from data_prep.system import stores
from data_prep.system.errors import InputError
from data_prep.system.files import read_json

from .cells import Recipe, Settings

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


def define_flags() -> None:
    """Flags that all studies of one dataset share, only where a study is the program."""
    flags.DEFINE_string("dataset", None, "Dataset directory made by data_prep.prepare.")
    flags.DEFINE_string("workdir", None, "Folder of the study: runs, results, tables, figures.")
    define_results_flag()
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
    flags.DEFINE_integer(
        "folds",
        0,
        "--dataset holds so many folds, made by `ctssl merge --folds`: every patient is tested.",
        lower_bound=0,
    )
    flags.DEFINE_list(
        "cells", [], "Cells to run, separated by commas; by default all that are missing."
    )


def define_results_flag() -> None:
    """Only where a study is the program."""
    flags.DEFINE_string(
        "results",
        None,
        "Folder of the small results that are kept and that `draw` needs; by default WORKDIR/kept.",
    )


def settings_of_flags(verb: str) -> Settings:
    """The settings of the command line; `draw` takes all but the folder from the recorded study.

    Raises:
      InputError: a flag is missing, an override is not FIELD=VALUE, there is no dataset, or it has
        not these folds.
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
        folds=flags.FLAGS.folds,
    )
    settings = settings._replace(kept=results_folder(settings.workdir))
    if verb == "draw":
        return recorded(settings)
    number = len(list(settings.dataset.glob("fold_*/preparation.json")))
    if settings.folds and settings.folds != number:
        raise InputError(
            f"--folds={settings.folds}: {settings.dataset} holds {number} folds; give their "
            "number, or make them by ctssl merge --folds"
        )
    Dataset.open(settings.fold(0).dataset if settings.folds else settings.dataset)
    return settings


def check_overrides(settings: Settings, recipes: Sequence[str]) -> None:
    """Refuse overrides of fields that a study sets itself, or that one of its recipes lacks.

    Raises:
      InputError: names the field, also where its value has another type.
    """
    # not at the top: they import JAX, and --help should be fast
    from ctssl_jax.runs.run import flat, to_json
    from ctssl_jax.training.fields import FIELDS

    for override in settings.overrides:
        field = override.split("=")[0]
        if field in FIXED_FIELDS:
            raise InputError(
                f"--override={override}: a study sets {field} itself (see --help for the choices)"
            )
        for recipe in recipes:
            node = load_recipe(recipe, settings.size)
            for part in field.split("."):
                if not isinstance(node, ConfigDict) or part not in node:
                    raise InputError(
                        f"--override={override}: configs/{recipe}.py has no field {field}"
                    )
                node = node[part]
            if isinstance(node, ConfigDict):
                raise InputError(
                    f"--override={override}: {field} has fields of its own; give one of them, such "
                    f"as {field}.{next(iter(node))}"
                )
            try:
                config = Recipe(recipe, settings.size, dict([override.split("=", 1)])).config()
                value = flat(to_json(config))[field]
            except (ValueError, SyntaxError, TypeError):
                raise InputError(
                    f"--override={override}: {field} is a {type(node).__name__}, such as {node!r}"
                ) from None
            if remedy := FIELDS[field].remedy(value):
                raise InputError(f"--override={override}: {remedy}")


def options_of(settings: Settings) -> list[str]:
    """The flags of these settings."""
    options = [f"--dataset={settings.dataset}", f"--workdir={settings.workdir}"]
    options += [f"--size={settings.size}", f"--seed={settings.seed}", f"--split={settings.split}"]
    options += [f"--num_steps={settings.num_steps}"] if settings.num_steps else []
    options += [f"--folds={settings.folds}"] if settings.folds else []
    if settings.kept not in (None, settings.workdir / "kept"):
        options.append(f"--results={settings.kept}")
    return [*options, *(f"--override={override}" for override in settings.overrides)]


def results_folder(workdir: Path) -> Path:
    """The folder of `--results`.

    Raises:
      InputError: for a URL.
    """
    if not flags.FLAGS.results:
        return workdir / "kept"
    return stores.local_path(flags.FLAGS.results, "--results", "choose a folder here").resolve()


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


def record(settings: Settings) -> None:
    """Record the settings of a study of one dataset or its folds, in its folder and beside its kept
    results.

    Raises:
      InputError: as `record_settings`.
    """
    for folder in (settings.workdir, settings.kept):
        if folder is not None:
            record_settings(folder, settings_content(settings))


def record_settings(workdir: Path, content: dict[str, Any]) -> None:
    """Write the settings of a study into its folder, or compare them with the recorded settings.

    Cells may start at the same time on several machines: the file appears whole, and the first file
    stays.

    Args:
      workdir: the study's folder, or that of its kept results; made if need be.
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
            os.chmod(file.name, 0o644)
            with contextlib.suppress(FileExistsError):
                os.link(file.name, path)
    except OSError as error:
        raise InputError(f"{workdir} cannot be written ({error.strerror})") from None
    recorded_content = read_json(path)
    for name, value in content.items():
        if recorded_content.get(name) != value:
            raise InputError(
                f"{workdir} holds a study with {name}={recorded_content.get(name)}, not {value}; "
                "use another one"
            )


def settings_content(settings: Settings) -> dict[str, Any]:
    """The settings of a study of one dataset that `record_settings` keeps."""
    datasets = [settings.fold(number).dataset for number in range(settings.folds)]
    fingerprints = [Dataset.open(path).fingerprint for path in datasets or [settings.dataset]]
    content = {**settings._asdict(), "dataset_fingerprint": " ".join(fingerprints)}
    if not settings.folds:
        del content["folds"]
    return {n: value for n, value in content.items() if n not in ("dataset", "workdir", "kept")}


def recorded(settings: Settings) -> Settings:
    """The settings that the cells of the study were run with, for drawing; flags do not count.

    Raises:
      InputError: neither the kept results nor the folder have a study.
    """
    paths = [folder / SETTINGS for folder in (settings.kept, settings.workdir) if folder]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise InputError(
            f"--workdir={settings.workdir} holds no results yet; run the study first, or give "
            "--results"
        )
    content = read_json(path)
    del content["dataset_fingerprint"]
    overrides = tuple(content["overrides"])
    return settings._replace(**{"folds": 0} | content | {"overrides": overrides})
