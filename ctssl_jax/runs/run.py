"""A run directory as one value that is opened once, and how training makes one.

Layout of a run directory:

    config.json           the configuration of the run
    patients.json         pseudonyms of the patients of the training and validation splits
    ancestors.json        the runs that the first weights come from, oldest first, with their
                          patients
    transplant.json       the tensors that come from there
    training_data.json    fraction, studies and slices of the training split that are used
    preparation.json      preparation.json of the dataset: windows, size, key fingerprint
    training.lock         the process that trains here, or did last: `ctssl_jax.runs.lock`
    checkpoints/STEP      Orbax checkpoints, each with its score.json: the last two, and the best
    metrics.jsonl         one line a report: step, losses, slices/s
    tensorboard/          the same numbers as event files
    profile/              traces of `ctssl_jax.train --profile=N`
    pictures/             fixed validation slices: input | target | prediction | difference, the
                          outlines of masks, or the probability of each class
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from ctssl_jax.runs import checkpoints, lock
from ctssl_jax.runs.damage import holds_checkpoint, step_numbers
from ctssl_jax.runs.directory import run_directory
from ctssl_jax.runs.reports import say
from data_prep.system.errors import InputError
from data_prep.system.files import read_json, write_json

# A run may resume with other values of these fields, which a table in ctssl_jax/README.md repeats;
# all others decide what it computes.
MAY_CHANGE = {
    "dataset": "another path of the same data (the fingerprint decides)",
    "init_from": "another path of the same weights; not from empty to a path or back",
    "init_weights": "another path of the same weights; not from empty to a path or back",
    "num_steps": "constant rate: any number; cosine and linear: a larger one, see below",
    "log_every": "reports alone",
    "eval_every": "when checkpoints are saved and validated",
    "validation_slices": "which validation slices the later scores are means of",
    "best_by": "which score chooses the best checkpoint",
    "num_pictures": "pictures alone",
    "reading_threads": "speed alone",
    "shards_gb": "disk and speed alone",
    "remat": "memory and speed",
    "scan": "memory and speed",
    "fsdp_devices": "memory and speed; equal up to the order of sums",
}
# Fields that recipes did not always have -> the value that says what runs without them did. A field
# of some tasks alone has them in `OF_TASK`.
ADDED_SINCE = {
    "batch_norm_group": 0,
    "best_by": "loss",
    "learning_rate_floor": 0.0,
    "loss.masked_l1": 0.0,
    "mask.block": 0,
    "model.neck": "none",
    "model.pooling": "legacy",
    "prolonged": [],
    "shards_gb": 32.0,
    "shuffle": "global",
    "shuffle_streams": 0,
    "shuffle_window": 16_384,
    "shuffled_targets": False,
    "validation_slices": 0,
}
OF_TASK = {
    "loss.masked_l1": ("masked_region",),
    "mask.block": ("masked_region",),
    "model.neck": ("lejepa", "visreg", "vicreg", "simclr", "dino"),
    "model.pooling": ("slice_label_se_resnext",),
    "shuffled_targets": (
        "slice_label",
        "slice_label_se_resnext",
        "segmentation",
        "segmentation_standard_unet",
    ),
}
_WEIGHTS = ("init_from", "init_weights")
OF_THE_DATA = (
    "archive",
    "fingerprint",
    "image_size",
    "key_fingerprint",
    "labels",
    "synthetic",
    "windows",
)
_WRITTEN_FIRST = ("preparation.json", "patients.json", "config.json")  # in this order


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """A configuration as it is read back from JSON: tuples become lists."""
    return json.loads(json.dumps(config.to_dict()))


def portable(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """A configuration as JSON for results and exports: without the paths of this machine."""
    paths = ("dataset", *_WEIGHTS)
    return {name: value for name, value in to_json(config).items() if name not in paths}


def from_json(content: dict[str, Any]) -> ml_collections.ConfigDict:
    """The inverse of `to_json`, for configurations of any age: see `with_added`."""
    return ml_collections.ConfigDict(with_added(content))


def with_added(content: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the fields of `ADDED_SINCE` that it lacks."""
    content = {**content}
    for name, value in ADDED_SINCE.items():
        if name in OF_TASK and content.get("task") not in OF_TASK[name]:
            continue
        section, _, field = name.rpartition(".")
        if section:
            content[section] = {field: value} | content[section]
        else:
            content.setdefault(name, value)
    return content


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory whose configuration and preparation were read and checked.

    workdir: the directory.
    config: the configuration; copy it before you change a field.
    preparation: `preparation.json` of the dataset that the run learns from.
    """

    workdir: Path
    config: ml_collections.ConfigDict
    preparation: dict

    @classmethod
    def open(cls, workdir: str | Path, flag: str = "--workdir") -> "Run":
        """Read `config.json` and `preparation.json`, and compare them with the copies in the newest
        checkpoint.

        Raises:
          InputError: not a run directory, or a damaged one.
        """
        workdir = run_directory(workdir, flag)
        if not (workdir / "config.json").is_file():
            raise InputError(
                f"--workdir={workdir} is not a run directory; give the --workdir of a run of "
                "ctssl_jax.train"
                + ("" if not holds_checkpoint(workdir) else ", or bring back its config.json")
            )
        config = read_json(workdir / "config.json", ("task", "recipe", "windows", "model"))
        preparation = read_json(workdir / "preparation.json", OF_THE_DATA)
        saved = checkpoints.saved_with(workdir) or {}
        if "config" in saved:
            old, new = (flat(with_added(content)) for content in (saved["config"], config))
            for name in sorted(old.keys() | new.keys()):
                may_differ = name in MAY_CHANGE or name == "prolonged"
                if not may_differ and old.get(name) != new.get(name):
                    raise _other_than_saved(workdir / "config.json", name)
        for name in OF_THE_DATA if "preparation" in saved else ():
            if saved["preparation"].get(name) != preparation[name]:
                raise _other_than_saved(workdir / "preparation.json", name)
        return cls(workdir, from_json(config), preparation)

    def choose_checkpoint(self, which: str = "best") -> checkpoints.Chosen:
        """The checkpoint that `best`, `last`, `last_good` or a number names
        (`checkpoints.choose`); says its step and score."""
        chosen = checkpoints.choose(self.workdir, which)
        say(f"checkpoint   step {chosen.step:,} of {self.workdir}: {chosen.why}")
        for warning in chosen.warnings:
            say(f"WARNING      {warning}")
        return chosen

    def restore(self, step: int, template: Any) -> Any:
        """The tensors of a checkpoint, in the structure and with the shardings of a template:
        `checkpoints.restore`."""
        return checkpoints.restore(self.workdir, step, template)

    @functools.cached_property
    def patients(self) -> dict:
        """`patients.json`: the fingerprint of the pseudonym key, and the patients of `train` and
        `validation`.

        Raises:
          InputError: the file is missing or damaged.
        """
        return read_json(self.workdir / "patients.json", ("key_fingerprint", "train", "validation"))

    @functools.cached_property
    def ancestors(self) -> list[dict]:
        """`ancestors.json`, the runs that the first weights come from; empty if they were random.

        Raises:
          InputError: the file is damaged.
        """
        path = self.workdir / "ancestors.json"
        ancestors = read_json(path) if path.exists() else []
        if not isinstance(ancestors, list) or not all(
            "patients" in ancestor for ancestor in ancestors
        ):
            raise InputError(
                f"{path} is damaged (it is not a list of runs); bring back a copy of it"
            )
        return ancestors

    @functools.cached_property
    def training_data(self) -> dict:
        """`training_data.json`: `train_fraction`, `num_train_studies`, `num_train_slices`; empty
        in a run that was not trained here."""
        path = self.workdir / "training_data.json"
        return read_json(path) if path.exists() else {}

    @functools.cached_property
    def imported(self) -> dict:
        """`imported.json`, where weights of another program come from; empty for a run that was
        trained here."""
        path = self.workdir / "imported.json"
        return read_json(path) if path.is_file() else {}

    @property
    def lineage(self) -> list[dict]:
        """The ancestors without their patients, as results list them."""
        return [
            {name: value for name, value in run.items() if name != "patients"}
            for run in self.ancestors
        ]

    @property
    def learned_from(self) -> list[dict]:
        """`patients.json` of this run and of its ancestors."""
        return [self.patients, *[ancestor["patients"] for ancestor in self.ancestors]]


def _other_than_saved(path: Path, name: str) -> InputError:
    return InputError(
        f"{path} is damaged ({name} differs from the checkpoint's); bring back a copy of it"
    )


def check_resumable(
    workdir: Path,
    config: ml_collections.ConfigDict,
    preparation: dict,
    set_aside: Sequence[int] = (),
) -> list[list[int]]:
    """Refuse to resume a run under another configuration or on other data; accept a new or empty
    folder.

    Args:
      workdir: the run directory.
      config: the configuration that the run shall go on with.
      preparation: `preparation.json` of the dataset.
      set_aside: damaged checkpoints, which the run does not resume from.

    Returns:
      `config.prolonged` of the run that goes on: it is recorded here if `num_steps` grows.

    Raises:
      InputError: names the first field that differs, or says that the folder holds something else.
    """
    new = flat(to_json(config))
    path = workdir / "config.json"
    if not path.exists():
        # A run that was killed at its very start may leave these: they are not a run yet.
        begun = {name + ending for name in _WRITTEN_FIRST for ending in ("", ".tmp")}
        begun.add(lock.FILE)
        if workdir.is_dir() and any(entry.name not in begun for entry in workdir.iterdir()):
            raise InputError(
                f"--workdir={workdir} holds files but no run; give a new or empty folder"
            )
        return new["prolonged"]
    steps = [step for step in step_numbers(workdir) if step not in set_aside]
    if not steps:  # nothing was learned yet: a corrected configuration may take its place
        return new["prolonged"]
    run = Run.open(workdir)
    old = flat(to_json(run.config))
    history = old["prolonged"]
    if config.schedule != "constant" and old["num_steps"] != new["num_steps"]:
        history = _prolonged(workdir, run.config, config.num_steps, steps[-1])
    if not new["prolonged"]:
        new["prolonged"] = old["prolonged"]  # the recipe's () is not a wish
    for name in sorted(old | new):
        if name in old and name in new and old[name] == new[name]:
            continue
        if name in MAY_CHANGE and name not in _WEIGHTS:
            continue
        if name in _WEIGHTS and bool(old.get(name)) == bool(new.get(name)):
            continue  # ancestors.json says where the weights came from
        if name in old and name in new:
            remedy = f"use another --workdir, or --config.{name}={old[name]}"
            raise InputError(
                f"--workdir={workdir} holds a run with config.{name}={old[name]}, not {new[name]}; "
                f"{remedy}"
            )
        raise InputError(
            f"--workdir={workdir} holds a run of another version of this program (config.{name} is "
            "not in both); use another --workdir"
        )
    if run.preparation["fingerprint"] != preparation["fingerprint"]:
        raise InputError(
            f"--workdir={workdir} holds a run on other data than {config.dataset} (dataset "
            "fingerprints differ); give the dataset that it began with, or another --workdir"
        )
    return history


def _prolonged(
    workdir: Path, config: ml_collections.ConfigDict, num_steps: int, step: int
) -> list[list[int]]:
    """`config.prolonged` of a run that goes on from a step to a larger number of steps.

    Raises:
      InputError: the number is smaller.
    """
    if num_steps < config.num_steps:
        raise InputError(
            f"--workdir={workdir} holds a run with config.num_steps={config.num_steps}, not "
            f"{num_steps}: under config.schedule={config.schedule} the number may grow, not "
            f"shrink; give --config.num_steps={config.num_steps} or more, or another --workdir"
        )
    history = [[until, number] for until, number in config.prolonged]
    kept = [change for change in history if change[0] <= step]
    if step and not (kept and kept[-1][0] == step):
        later = [number for until, number in history if until > step]
        kept.append([step, [*later, config.num_steps][0]])
    return kept


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """A tree of dictionaries as one, with names like `mask.fraction`."""
    fields = {}
    for name, value in tree.items():
        fields |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return fields


def open_workdir(
    workdir: Path,
    config: ml_collections.ConfigDict,
    preparation: dict,
    patients: dict[str, list[str]],
) -> None:
    """Create a run directory with its `config.json`, `preparation.json` and `patients.json`.

    Args:
      workdir: the folder.
      config: the training configuration.
      preparation: contents of the dataset's `preparation.json`.
      patients: pseudonyms of the patients of the training and the validation split, so that a later
        evaluation can tell whom the model has seen.

    Raises:
      InputError: the folder cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        keyed_patients = {"key_fingerprint": preparation["key_fingerprint"], **patients}
        for name, content in zip(
            _WRITTEN_FIRST, (preparation, keyed_patients, to_json(config)), strict=True
        ):
            write_json(workdir / name, content)
    except OSError as error:
        raise InputError(
            f"--workdir={workdir} cannot be written ({error.strerror}); choose another folder"
        ) from None
