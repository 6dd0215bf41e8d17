"""Weights from one run to another: the whole model (the paper's progressive chain) or its encoder alone (any task to
any other). Nothing is taken in silence: what moves is listed, and what does not fit is refused.

A run remembers where its weights come from in `ancestors.json`: one entry a run, from the first to the one that it
started from, with the pseudonyms of the patients that each was trained on.
"""

import collections
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from ctssl_jax import configuration, data
from ctssl_jax.checkpoint import choose_step, flatten, restore, stored_shapes, unflatten
from data_prep.system.errors import InputError
from data_prep.system.files import read_json, write_json

ANCESTORS = "ancestors.json"


class Donor(NamedTuple):
    """A run whose weights another one starts from.

    workdir: its run directory.
    step: the checkpoint that is taken.
    moved: names of the tensors that are taken, as in checkpoints (`params/encoder/stem/conv/kernel`).
    kept: names of the model's tensors that stay as the new run initialises them.
    left: names of the donor's model tensors that are not taken.
    ancestors: contents of the new run's `ancestors.json`.
    """

    workdir: Path
    step: int
    moved: tuple[str, ...]
    kept: tuple[str, ...]
    left: tuple[str, ...]
    ancestors: list[dict]


def in_scope(name: str, scope: str) -> bool:
    """Whether a checkpoint's tensor belongs to the part that moves.

    Args:
      name: `params/encoder/stem/conv/kernel`, `variables/decoder/...`.
      scope: `model`, all; `encoder`, the encoder; `compression`, its layers before the residual blocks.
    """
    kind, part, layer = (*name.split("/"), "", "")[:3]
    if kind not in ("params", "variables"):
        return False
    if scope == "compression":
        return part == "encoder" and layer in ("downsample", "stem")
    return scope == "model" or part == "encoder"


def check_is_run(config: ml_collections.ConfigDict) -> None:
    """Refuse a `config.init_from` that is no run directory.

    Raises:
      InputError: says so.
    """
    if not (Path(config.init_from) / "config.json").is_file():
        raise InputError(
            f"config.init_from={config.init_from} is not a run directory; give the --workdir of a finished run"
        )


def find_donor(config: ml_collections.ConfigDict, windows: list[tuple[float, float]], like: Any) -> Donor:
    """Check, before any work, that the weights which `config.init_from` names fit. All processes call it together.

    Args:
      config: the new run's configuration.
      windows: (level, width) in HU of each channel that it reads.
      like: tree with `params` and `variables` of the new model (arrays or shapes).

    Raises:
      InputError: no such checkpoint, other windows or grey scale, or tensors that are missing, extra or of another
        shape.
    """
    workdir = Path(config.init_from)
    try:
        step = choose_step(workdir, str(config.init_checkpoint))
    except InputError as error:
        raise InputError(f"config.init_from: {error}") from None
    donor_config, preparation = configuration.read_run(workdir)
    _check_grey_values(config, windows, donor_config, preparation)
    moved, kept, left = _match(workdir, stored_shapes(workdir, step), flatten(like), config.init_scope)
    ancestors = [
        *read_ancestors(workdir),
        {
            "recipe": donor_config.recipe,
            "task": donor_config.task,
            "checkpoint_step": step,
            "seed": donor_config.seed,
            "scope": config.init_scope,
            "num_tensors_moved": len(moved),
            "dataset_fingerprint": preparation["fingerprint"],
            "patients": read_patients(workdir),
        },
    ]
    return Donor(workdir, step, moved, kept, left, ancestors)


def _check_grey_values(
    config: ml_collections.ConfigDict,
    windows: list[tuple[float, float]],
    donor: ml_collections.ConfigDict,
    preparation: dict,
) -> None:
    """An encoder is worth nothing on grey values that mean other HU than those it has learned from."""
    workdir = config.init_from
    donor_windows = data.selected_windows(preparation, data.select_channels(preparation, donor.windows))
    if windows != donor_windows:
        have, want = (", ".join(f"{level:g}/{width:g}" for level, width in pairs) for pairs in (donor_windows, windows))
        raise InputError(
            f"config.init_from={workdir} was trained on level/width {have}, this run reads {want}; set config.windows "
            "to the former (on a dataset that has it), or start from another run"
        )
    if donor.normalize != config.normalize:
        raise InputError(
            f"config.init_from={workdir} was trained with normalize={donor.normalize}; set "
            f"--config.normalize={donor.normalize}"
        )


def _match(
    workdir: Path, stored: dict[str, tuple[int, ...]], wanted: dict[str, Any], scope: str
) -> tuple[tuple[str, ...], ...]:
    """Names that move, stay and are left behind; refuses anything of the scope that is not on both sides alike."""
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
        for part, words in (("encoder", "the encoder alone fits"), ("compression", "its compression layers alone fit")):
            of_part = [
                {name: tuple(getattr(leaf, "shape", leaf)) for name, leaf in side.items() if in_scope(name, part)}
                for side in (stored, wanted)
            ]
            if part != scope and of_part[0] and of_part[0] == of_part[1]:
                remedy = f"{words}: --config.init_scope={part}"
                break
        raise InputError(
            f"config.init_from={workdir} does not fit this model ({len(missing)} tensors missing, {len(extra)} extra, "
            f"{len(shapes)} of another shape; {'; '.join(problems)}); {remedy}"
        )
    kept = [name for name in wanted if in_scope(name, "model") and name not in want]
    left = [name for name in stored if in_scope(name, "model") and name not in have]
    return tuple(want), tuple(kept), tuple(left)


def transplant(donor: Donor, state: Any) -> Any:
    """The state with the donor's tensors in place of its own; all others, the optimizer's among them, are untouched.

    Args:
      donor: from `find_donor`.
      state: tree with `params` and `variables`, arrays on their devices.
    """
    leaves = flatten(state)
    like = {
        name: jax.ShapeDtypeStruct(leaves[name].shape, leaves[name].dtype, sharding=leaves[name].sharding)
        for name in donor.moved
    }
    return unflatten(state, leaves | restore(donor.workdir, donor.step, like))


def record(donor: Donor | None, workdir: Path, let_pass: str = "") -> None:
    """Write `ancestors.json` and `transplant.json` (every tensor's name) into the directory of a run that starts.

    Args:
      donor: whose weights it starts from; None for random ones.
      workdir: of the run.
      let_pass: what `check_leakage` let pass; results of the run and of its descendants say it.
    """
    names = {"moved": donor.moved, "initialised": donor.kept, "left_behind": donor.left} if donor else {}
    ancestors = list(donor.ancestors) if donor else []
    if ancestors:
        ancestors[-1] = {**ancestors[-1], "leakage_let_pass": let_pass}
    write_json(workdir / ANCESTORS, ancestors)
    write_json(workdir / "transplant.json", names)


def check_leakage(config: ml_collections.ConfigDict, donor: Donor, key_fingerprint: str, held_out: set[str]) -> str:
    """Refuse weights that were learned from patients whom the new run is evaluated on.

    Args:
      config: the new run's configuration; `leakage` says what is let pass.
      donor: whose weights it starts from.
      key_fingerprint: of the pseudonyms of the new run's dataset.
      held_out: pseudonyms of its validation and test patients.

    Returns:
      What was let pass, in words; "" where nothing had to be.

    Raises:
      InputError: such patients occur, or the data sets cannot be compared, and `config.leakage` does not allow it.
    """
    learned_from = [ancestor["patients"] for ancestor in donor.ancestors]
    unknown = [patients["key_fingerprint"] != key_fingerprint for patients in learned_from]
    comparable = [patients for patients, other in zip(learned_from, unknown, strict=True) if not other]
    seen = {patient for patients in comparable for patient in patients["train"]} & held_out
    if seen and config.leakage != "allow":
        raise InputError(
            f"config.init_from={config.init_from}: {len(seen)} of the {len(held_out)} validation and test patients of "
            "config.dataset were in the training data of these weights, so its results would not be of held-out "
            "patients; pretrain without them (the same --pseudonym_key_file and splits), or --config.leakage=allow, "
            "which results will say"
        )
    if any(unknown) and config.leakage == "refuse":
        raise InputError(
            f"config.init_from={config.init_from} was trained on data with another pseudonym key, so whether its "
            "patients are in the validation and test splits of config.dataset cannot be checked; prepare both with one "
            "--pseudonym_key_file, or --config.leakage=allow_unchecked, which results will say"
        )
    if seen:
        return f"{len(seen)} validation and test patients were in the training data of the initial weights"
    return "overlap with the training data of the initial weights could not be checked" if any(unknown) else ""


def report(donor: Donor) -> list[str]:
    """What moved, as lines for the screen: parts of the model with their number of tensors."""
    lines = [f"start        {len(donor.moved)} tensors of checkpoint {donor.step:,} of {donor.workdir}"]
    for title, names in (("moved", donor.moved), ("initialised", donor.kept), ("left behind", donor.left)):
        if names:
            counts = collections.Counter(name.split("/")[1] for name in names)
            lines.append(f"{'':13}{title}: " + ", ".join(f"{part} ({number})" for part, number in counts.items()))
    return lines


def read_ancestors(workdir: Path) -> list[dict]:
    """Contents of a run's `ancestors.json`; empty for one that started from random weights.

    Raises:
      InputError: the file is damaged.
    """
    path = workdir / ANCESTORS
    ancestors = read_json(path) if path.exists() else []
    if not isinstance(ancestors, list) or not all("patients" in run for run in ancestors):
        raise InputError(f"{path} is damaged (it is no list of runs); bring back a copy of it")
    return ancestors


def read_patients(workdir: Path) -> dict:
    """Contents of a run's `patients.json`.

    Raises:
      InputError: the file is missing or damaged.
    """
    return read_json(workdir / "patients.json", ("key_fingerprint", "train", "validation"))
