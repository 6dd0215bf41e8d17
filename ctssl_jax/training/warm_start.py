"""Warm starts: weights of another run, or of a file in PyTorch's format.

Another run gives its whole model (the paper's progressive chain) or its encoder alone (from any
task to any task). All tensors that move are listed, and weights that do not fit are refused.

`ancestors.json` of a run names the runs that its weights come from, oldest first, each with the
pseudonyms of the patients that it was trained on.
"""

import collections
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from ctssl_jax.data import slices
from ctssl_jax.ops.trees import flatten, unflatten
from ctssl_jax.runs.checkpoints import stored_shapes
from ctssl_jax.runs.directory import run_directory
from ctssl_jax.runs.reports import say
from ctssl_jax.runs.run import Run
from ctssl_jax.torch_bridge import imagenet_weights, manifests
from data_prep.dataset.reader import Dataset
from data_prep.system.errors import InputError
from data_prep.system.files import file_sha256, write_json
from data_prep.system.stores import local_path


class WarmStart(NamedTuple):
    """Weights of another run.

    run: the other run.
    step: the checkpoint that is taken.
    moved: names of the tensors that are taken, as in checkpoints
      (`params/encoder/stem/conv/kernel`).
    kept: names of the new model's tensors that keep their random values.
    left: names of the other model's tensors that are not taken.
    ancestors: content of the new run's `ancestors.json`.
    allowed_overlap: from `check_leakage`; results of the new run and of its descendants report it.
    """

    run: Run
    step: int
    moved: tuple[str, ...]
    kept: tuple[str, ...]
    left: tuple[str, ...]
    ancestors: list[dict]
    allowed_overlap: str = ""


class WeightFile(NamedTuple):
    """Weights of `config.init_weights`.

    path: the file.
    sha256: of the file.
    ancestors, allowed_overlap: as `WarmStart`. Published ImageNet weights have no ancestors.
    """

    path: str
    sha256: str
    ancestors: list[dict]
    allowed_overlap: str = ""


# `patients.json` of weights whose patients nobody knows: no dataset has this key.
_UNKNOWN_PATIENTS = {"key_fingerprint": "unknown", "train": [], "validation": []}
_STEPS = re.compile(r"variables/(heads/[^/]+/)?steps")


def in_scope(name: str, scope: str) -> bool:
    """Whether a tensor of a checkpoint is in the part that moves.

    Never the number of steps that a schedule of a joint embedding follows. That of a codebook moves
    with the running counts that it belongs to.

    Args:
      name: `params/encoder/stem/conv/kernel`, `variables/decoder/...`.
      scope: `model`, all; `encoder`, the encoder; `compression`, the encoder's layers before the
        residual blocks; `encoder_norms`, the scales, shifts and statistics of the encoder's batch
        normalisation; `encoder_kernels`, the encoder without them.
    """
    kind, part, layer = (*name.split("/"), "", "")[:3]
    if kind not in ("params", "variables") or _STEPS.fullmatch(name):
        return False
    if scope in ("encoder_norms", "encoder_kernels"):
        return part == "encoder" and ("norm" in name.split("/")) == (scope == "encoder_norms")
    if scope == "compression":
        return part == "encoder" and layer in ("downsample", "stem")
    return scope == "model" or part == "encoder"


def open_other_run(config: ml_collections.ConfigDict) -> Run:
    """The run that `config.init_from` names.

    Raises:
      InputError: it is not a run directory, or a damaged one.
    """
    workdir = run_directory(config.init_from, "config.init_from")
    if not (workdir / "config.json").is_file():
        raise InputError(
            f"config.init_from={config.init_from} is not a run directory; give the --workdir of a "
            "finished run"
        )
    return Run.open(workdir)


def open_weight_file(
    config: ml_collections.ConfigDict,
    dataset: Dataset,
    windows: list[tuple[float, float]],
    template: Any,
) -> WeightFile:
    """Check that the weights of `config.init_weights` fit, and find out what they learned from.

    Exports do not name patients. So only those of runs on the very dataset of the new run are known
    to have learned from its training patients alone.

    Args:
      config: the new run's configuration.
      dataset: the dataset of the new run.
      windows: (level, width) in HU of each channel of the new run.
      template: tree with `params` and `variables` of the new model (arrays or shapes).

    Raises:
      InputError: tensors are missing, extra or of another shape, an export with other windows or
        grey scale, or `config.init_from` names weights, too.
    """
    if config.init_from:
        raise InputError("config.init_weights and config.init_from: give one of them, not both")
    path = str(local_path(config.init_weights, "config.init_weights"))
    loaded = imagenet_weights.load_state_dict(
        imagenet_weights.read_file(path), flatten(template), head=False, path=path
    )
    sha256 = file_sha256(Path(path))
    facts = manifests.facts_of(Path(path), "config.init_weights")
    if facts is None:
        return WeightFile(path, sha256, _ancestors_of_file(sha256, len(loaded)))
    grey = facts["preprocessing"]
    theirs = [(float(level), float(width)) for level, width in grey["windows"]]
    _check_grey_values(config, f"init_weights={path}", theirs, grey.get("normalize"), windows)
    training, known = facts["training"], _patients_of(dataset)
    exported = {
        "recipe": training.get("recipe", "unknown"),
        "task": training["task"],
        "checkpoint_step": training["checkpoint_step"],
        "seed": training["config"].get("seed", 0),
        "scope": "model",
        "num_tensors_moved": len(loaded),
        "dataset_fingerprint": facts["data"].get("dataset_fingerprint", "unknown"),
    }
    runs = [*training.get("init_from", []), exported]
    begun = training.get("init_weights_sha256", "")
    unrecorded = [] if not begun or training.get("init_from") else _ancestors_of_file(begun, 0)
    ancestors = [
        {**run, "patients": known.get(run.get("dataset_fingerprint"), _UNKNOWN_PATIENTS)}
        for run in runs
    ]
    return WeightFile(path, sha256, [*unrecorded, *ancestors])


def _patients_of(dataset: Dataset) -> dict[str, dict]:
    """Fingerprint of the dataset -> `patients.json` of a run on it."""
    patients = {
        split: sorted({volume["patient_id"] for volume in dataset.volumes(split)})
        for split in ("train", "validation")
    }
    key = dataset.preparation["key_fingerprint"]
    return {dataset.fingerprint: {"key_fingerprint": key, **patients}}


def _ancestors_of_file(sha256: str, num_tensors: int) -> list[dict]:
    """The entry of `ancestors.json` for weights of another program; none for published ImageNet
    weights, which learned from photographs."""
    if sha256.startswith(imagenet_weights.PUBLISHED):
        return []
    return [
        {
            "recipe": "weights of a file",
            "task": "unknown",
            "checkpoint_step": 0,
            "seed": 0,
            "scope": "model",
            "num_tensors_moved": num_tensors,
            "dataset_fingerprint": "unknown",
            "sha256": sha256,
            "patients": _UNKNOWN_PATIENTS,
        }
    ]


def find(
    config: ml_collections.ConfigDict, run: Run, windows: list[tuple[float, float]], template: Any
) -> WarmStart:
    """Check that the weights of `config.init_from` fit. All processes call it together.

    Args:
      config: the new run's configuration.
      run: from `open_other_run`.
      windows: (level, width) in HU of each channel of the new run.
      template: tree with `params` and `variables` of the new model (arrays or shapes).

    Raises:
      InputError: no such checkpoint, other windows or grey scale, or tensors that are missing,
        extra or of another shape.
    """
    try:
        chosen = run.choose_checkpoint(str(config.init_checkpoint))
    except InputError as error:
        raise InputError(f"config.init_from: {error}") from None
    channels = slices.select_channels(run.preparation, run.config.windows)
    theirs = slices.selected_windows(run.preparation, channels)
    where = f"init_from={config.init_from}"
    _check_grey_values(config, where, theirs, run.config.normalize, windows)
    stored = stored_shapes(run.workdir, chosen.step)
    moved, kept, left = _match(config.init_from, stored, flatten(template), config.init_scope)
    ancestor = {
        "recipe": run.config.recipe,
        "task": run.config.task,
        **chosen.facts,
        "seed": run.config.seed,
        "scope": config.init_scope,
        "num_tensors_moved": len(moved),
        "dataset_fingerprint": run.preparation["fingerprint"],
        "patients": run.patients,
    }
    # Earlier versions did not list a file of weights among the ancestors.
    begun = run.training_data.get("init_weights_sha256", "")
    unrecorded = [] if not begun or run.ancestors else _ancestors_of_file(begun, 0)
    return WarmStart(run, chosen.step, moved, kept, left, [*unrecorded, *run.ancestors, ancestor])


def _check_grey_values(
    config: ml_collections.ConfigDict,
    where: str,
    run_windows: list[tuple[float, float]],
    normalize: str,
    windows: list[tuple[float, float]],
) -> None:
    """Refuse grey values that mean other HU than in the other run: its encoder is useless there."""
    if windows != run_windows:
        have, want = (
            ", ".join(f"{level:g}/{width:g}" for level, width in pairs)
            for pairs in (run_windows, windows)
        )
        raise InputError(
            f"config.{where} was trained on level/width {have}, this run reads {want}; "
            "set config.windows to the former (on a dataset that has it), or start from another run"
        )
    if normalize != config.normalize:
        raise InputError(
            f"config.{where} was trained with normalize={normalize}; set "
            f"--config.normalize={normalize}"
        )


def _match(
    path: str, stored: dict[str, tuple[int, ...]], wanted: dict[str, Any], scope: str
) -> tuple[tuple[str, ...], ...]:
    """Names that move, stay and are left behind; refuses a tensor of the scope that differs or is
    on one side only."""
    have = {name: shape for name, shape in stored.items() if in_scope(name, scope)}
    want = {name: tuple(leaf.shape) for name, leaf in wanted.items() if in_scope(name, scope)}
    missing = [f"{name} is missing there" for name in want if name not in have]
    extra = [f"{name} has no place here" for name in have if name not in want]
    shapes = [
        f"{name} has shape {have[name]} there, {want[name]} here"
        for name in want
        if name in have and have[name] != want[name]
    ]
    if missing or extra or shapes:
        problems = [group[0] for group in (shapes, missing, extra) if group]
        remedy = "give the runs equal config.model fields"
        for part, words in (
            ("encoder", "the encoder alone fits"),
            ("compression", "its compression layers alone fit"),
        ):
            of_part = [
                {
                    name: tuple(getattr(leaf, "shape", leaf))
                    for name, leaf in side.items()
                    if in_scope(name, part)
                }
                for side in (stored, wanted)
            ]
            if part != scope and of_part[0] and of_part[0] == of_part[1]:
                remedy = f"{words}: --config.init_scope={part}"
                break
        raise InputError(
            f"config.init_from={path} does not fit this model ({len(missing)} tensors missing, "
            f"{len(extra)} extra, {len(shapes)} of another shape; {'; '.join(problems)}); {remedy}"
        )
    kept = [name for name in wanted if name not in want]
    of_model = ("params/", "variables/")
    left = [name for name in stored if name.startswith(of_model) and name not in have]
    return tuple(want), tuple(kept), tuple(left)


def check_leakage(
    config: ml_collections.ConfigDict,
    source: WarmStart | WeightFile,
    key_fingerprint: str,
    held_out: set[str],
) -> str:
    """Refuse weights that learned from the validation or test patients of the new run.

    Args:
      config: the new run's configuration; `leakage` says which overlap is allowed.
      source: the weights that it starts from.
      key_fingerprint: of the pseudonym key of the new run's dataset.
      held_out: pseudonyms of the dataset's validation and test patients.

    Returns:
      The overlap that `config.leakage` allowed, in words; "" if there is no overlap.

    Raises:
      InputError: such patients occur, or the data sets cannot be compared, and `config.leakage`
        does not allow it.
    """
    learned_from = [ancestor["patients"] for ancestor in source.ancestors]
    of_file = isinstance(source, WeightFile)
    where = f"init_weights={source.path}" if of_file else f"init_from={config.init_from}"
    unknown = [patients["key_fingerprint"] != key_fingerprint for patients in learned_from]
    comparable = [
        patients for patients, other in zip(learned_from, unknown, strict=True) if not other
    ]
    seen = {patient for patients in comparable for patient in patients["train"]} & held_out
    if seen and config.leakage != "allow":
        raise InputError(
            f"config.{where}: {len(seen)} of the {len(held_out)} validation "
            "and test patients of config.dataset were in the training data of these weights, so "
            "its results would not be of held-out patients; pretrain without them (the same "
            "--pseudonym_key_file and splits), or --config.leakage=allow, which results will say"
        )
    if any(unknown) and config.leakage == "refuse" and of_file:
        raise InputError(
            f"config.{where}: whether these weights were learned from validation or test patients "
            "of config.dataset cannot be told; give the run itself as config.init_from, or weights "
            "of ImageNet as published, or --config.leakage=allow_unchecked, which results will say"
        )
    if any(unknown) and config.leakage == "refuse":
        raise InputError(
            f"config.init_from={config.init_from} was trained on data with another pseudonym key, "
            "or imported without its patients, so whether they are in the validation and test "
            "splits of config.dataset cannot be checked; prepare both with one "
            "--pseudonym_key_file, or --config.leakage=allow_unchecked, which results will say"
        )
    if seen:
        return (
            f"{len(seen)} validation and test patients were in the training data of the initial "
            "weights"
        )
    return (
        "overlap with the training data of the initial weights could not be checked"
        if any(unknown)
        else ""
    )


def move(warm_start: WarmStart, state: Any) -> Any:
    """The state with the tensors of the other run; all other tensors and the optimizer's stay.

    Args:
      warm_start: from `find`.
      state: tree with `params` and `variables`, arrays on their devices.
    """
    leaves = flatten(state)
    template = {
        name: jax.ShapeDtypeStruct(
            leaves[name].shape, leaves[name].dtype, sharding=leaves[name].sharding
        )
        for name in warm_start.moved
    }
    restored = warm_start.run.restore(warm_start.step, template)
    return unflatten(state, leaves | restored | _of_teachers(leaves, restored))


def _of_teachers(leaves: dict[str, Any], restored: dict[str, Any]) -> dict[str, Any]:
    """The moved tensors also for teachers that did not move: they begin as their students do."""
    copies = {}
    for name in set(leaves) - set(restored):
        _, is_teacher, student = name.partition("/teacher/")
        for source in (f"params/{student}", f"variables/{student}"):
            if is_teacher and source in restored:
                copies[name] = restored[source]
    shardings = {name: leaves[name].sharding for name in copies}
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)(copies)


def begin(
    config: ml_collections.ConfigDict, state: Any, source: WarmStart | WeightFile | None
) -> Any:
    """The initial state with the weights of the warm start, if there is one."""
    if isinstance(source, WeightFile):
        state = imagenet_weights.load_into(state, source.path)
        say(f"start        weights of {source.path}, pooling {config.model.pooling}")
    elif source is not None:
        state = move(source, state)
        _say_moved(source)
    if source is not None and source.allowed_overlap:
        say(f"WARNING      config.leakage={config.leakage}: {source.allowed_overlap}")
    return state


def record(source: WarmStart | WeightFile | None, workdir: Path) -> None:
    """Write `ancestors.json` and `transplant.json` (the name of every tensor) of a new run."""
    names, ancestors = {}, []
    if isinstance(source, WarmStart):
        names = {"moved": source.moved, "initialised": source.kept, "left_behind": source.left}
    if source is not None and source.ancestors:
        ancestors = list(source.ancestors)
        ancestors[-1] = {**ancestors[-1], "leakage_let_pass": source.allowed_overlap}
    write_json(workdir / "ancestors.json", ancestors)
    write_json(workdir / "transplant.json", names)


def _say_moved(source: WarmStart) -> None:
    say(
        f"start        {len(source.moved)} tensors of checkpoint {source.step:,} of "
        f"{source.run.workdir}"
    )
    groups = {"moved": source.moved, "initialised": source.kept, "left behind": source.left}
    for title, names in groups.items():
        counts = collections.Counter(name.split("/")[1] for name in names)
        if counts:
            parts = ", ".join(f"{part} ({number})" for part, number in counts.items())
            say(f"{'':13}{title}: {parts}")
