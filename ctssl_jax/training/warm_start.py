"""Warm starts: weights of another run, or of a file in PyTorch's format.

Another run gives its whole model (the paper's progressive chain) or its encoder alone (from any
task to any task). All tensors that move are listed, and weights that do not fit are refused.

`ancestors.json` of a run names the runs that its weights come from, oldest first, each with the
pseudonyms of the patients that it was trained on.
"""

import collections
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from ctssl_jax.data import slices
from ctssl_jax.ops.trees import flatten, unflatten
from ctssl_jax.runs.checkpoints import stored_shapes
from ctssl_jax.runs.reports import say
from ctssl_jax.runs.run import Run
from ctssl_jax.torch_bridge import imagenet_weights
from data_prep.system.errors import InputError
from data_prep.system.files import write_json


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
    """Weights of `config.init_weights`, and the file's SHA-256."""

    path: str
    sha256: str


def in_scope(name: str, scope: str) -> bool:
    """Whether a tensor of a checkpoint is in the part that moves.

    Args:
      name: `params/encoder/stem/conv/kernel`, `variables/decoder/...`.
      scope: `model`, all; `encoder`, the encoder; `compression`, the encoder's layers before the
        residual blocks.
    """
    kind, part, layer = (*name.split("/"), "", "")[:3]
    if kind not in ("params", "variables"):
        return False
    if scope == "compression":
        return part == "encoder" and layer in ("downsample", "stem")
    return scope == "model" or part == "encoder"


def open_other_run(config: ml_collections.ConfigDict) -> Run:
    """The run that `config.init_from` names.

    Raises:
      InputError: it is not a run directory, or a damaged one.
    """
    if not (Path(config.init_from) / "config.json").is_file():
        raise InputError(
            f"config.init_from={config.init_from} is not a run directory; give the --workdir of a "
            "finished run"
        )
    return Run.open(config.init_from)


def check_weight_file(config: ml_collections.ConfigDict, template: Any) -> WeightFile:
    """Refuse a `config.init_weights` that does not fit the model.

    Args:
      config: the new run's configuration.
      template: tree with `params` and `variables` of the new model (arrays or shapes).

    Raises:
      InputError: tensors are missing, extra or of another shape, or `config.init_from` names
        weights, too.
    """
    if config.init_from:
        raise InputError("config.init_weights and config.init_from: give one of them, not both")
    path = config.init_weights
    imagenet_weights.load_state_dict(
        imagenet_weights.read_file(path), flatten(template), head=False
    )
    return WeightFile(path, hashlib.sha256(Path(path).read_bytes()).hexdigest())


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
    _check_grey_values(config, run, windows)
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
    return WarmStart(run, chosen.step, moved, kept, left, [*run.ancestors, ancestor])


def _check_grey_values(
    config: ml_collections.ConfigDict, run: Run, windows: list[tuple[float, float]]
) -> None:
    """Refuse grey values that mean other HU than in the other run: its encoder is useless there."""
    workdir = config.init_from
    channels = slices.select_channels(run.preparation, run.config.windows)
    run_windows = slices.selected_windows(run.preparation, channels)
    if windows != run_windows:
        have, want = (
            ", ".join(f"{level:g}/{width:g}" for level, width in pairs)
            for pairs in (run_windows, windows)
        )
        raise InputError(
            f"config.init_from={workdir} was trained on level/width {have}, this run reads {want}; "
            "set config.windows to the former (on a dataset that has it), or start from another run"
        )
    if run.config.normalize != config.normalize:
        raise InputError(
            f"config.init_from={workdir} was trained with normalize={run.config.normalize}; set "
            f"--config.normalize={run.config.normalize}"
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
    kept = [name for name in wanted if in_scope(name, "model") and name not in want]
    left = [name for name in stored if in_scope(name, "model") and name not in have]
    return tuple(want), tuple(kept), tuple(left)


def check_leakage(
    config: ml_collections.ConfigDict,
    warm_start: WarmStart,
    key_fingerprint: str,
    held_out: set[str],
) -> str:
    """Refuse weights that learned from the validation or test patients of the new run.

    Args:
      config: the new run's configuration; `leakage` says which overlap is allowed.
      warm_start: the weights that it starts from.
      key_fingerprint: of the pseudonym key of the new run's dataset.
      held_out: pseudonyms of the dataset's validation and test patients.

    Returns:
      The overlap that `config.leakage` allowed, in words; "" if there is no overlap.

    Raises:
      InputError: such patients occur, or the data sets cannot be compared, and `config.leakage`
        does not allow it.
    """
    learned_from = [ancestor["patients"] for ancestor in warm_start.ancestors]
    unknown = [patients["key_fingerprint"] != key_fingerprint for patients in learned_from]
    comparable = [
        patients for patients, other in zip(learned_from, unknown, strict=True) if not other
    ]
    seen = {patient for patients in comparable for patient in patients["train"]} & held_out
    if seen and config.leakage != "allow":
        raise InputError(
            f"config.init_from={config.init_from}: {len(seen)} of the {len(held_out)} validation "
            "and test patients of config.dataset were in the training data of these weights, so "
            "its results would not be of held-out patients; pretrain without them (the same "
            "--pseudonym_key_file and splits), or --config.leakage=allow, which results will say"
        )
    if any(unknown) and config.leakage == "refuse":
        raise InputError(
            f"config.init_from={config.init_from} was trained on data with another pseudonym key, "
            "so whether its patients are in the validation and test splits of config.dataset "
            "cannot be checked; prepare both with one --pseudonym_key_file, or "
            "--config.leakage=allow_unchecked, which results will say"
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
    return unflatten(state, leaves | warm_start.run.restore(warm_start.step, template))


def begin(
    config: ml_collections.ConfigDict, state: Any, source: WarmStart | WeightFile | None
) -> Any:
    """The initial state with the weights of the warm start, if there is one."""
    if isinstance(source, WeightFile):
        state = imagenet_weights.load_into(state, source.path)
        say(f"start        weights of {source.path}")
    elif source is not None:
        state = move(source, state)
        _say_moved(source)
        if source.allowed_overlap:
            say(f"WARNING      config.leakage={config.leakage}: {source.allowed_overlap}")
    return state


def record(source: WarmStart | WeightFile | None, workdir: Path) -> None:
    """Write `ancestors.json` and `transplant.json` (the name of every tensor) of a new run."""
    names, ancestors = {}, []
    if isinstance(source, WarmStart):
        names = {"moved": source.moved, "initialised": source.kept, "left_behind": source.left}
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
