"""Run directories: Orbax checkpoints of the training state with the configuration and preparation they belong to.

Layout of a run directory:

    config.json           the configuration of the run
    patients.json         pseudonyms of the patients of the training and validation splits
    ancestors.json        the runs that its first weights come from, see `ctssl_jax.transplant`
    transplant.json       which tensors came from there
    training_data.json    share, studies and slices of the training split that the run learns from
    preparation.json      how the slices were prepared (window, size, key fingerprint), as the dataset recorded it
    checkpoints/STEP      Orbax checkpoints: the last two and the best one by validation loss
    metrics.jsonl         one line a report: step, losses, slices/s
    tensorboard/          the same as event files
    pictures/             input | target | prediction | difference of fixed validation slices

A checkpoint is one flat dictionary `name -> array` (`params/encoder/...`, `variables/...`, `optimizer/...`, `step`),
so that names stay readable and parts can be taken alone; its JSON metadata holds the configuration and the preparation.
The position in the order of the data is the step itself.

Orbax does not notice a changed bit in the numbers of a tensor. So every checkpoint gets a file SHA256SUMS once it is
complete (with the next one, or when the run ends or stops): of its own files and of the run's files that never change.
What is restored is compared with it first; a checkpoint without one, of a killed process or of an older version, is
taken as it is. `sha256sum -c STEP/SHA256SUMS` in `checkpoints/` does the same.

Orbax and TensorStore report a full disk or a damaged file by many types of exception, bare `Exception` among them;
whatever they raise here becomes one line with the remedy.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from data_prep.system.errors import InputError, RunFailed
from data_prep.system.files import file_sha256, write_text

CHECKPOINTS = "checkpoints"
SET_ASIDE = "damaged_checkpoints"
SUMS = "SHA256SUMS"
_SUM = re.compile(r"(?P<sha256>[0-9a-f]{64})  (?P<name>(?:\.\./|\d+/).+)")  # a line of it
LAST_GOOD = "last_good"
_SMALL_BYTES = 1 << 20  # of the files that are compared whenever the list of checkpoints is read
_NEVER_CHANGE = ("ancestors.json", "imported.json", "patients.json", "training_data.json", "transplant.json")


def flatten(tree: Any) -> dict[str, Any]:
    """A tree as a flat dictionary with `/`-joined names, e.g. `params/encoder/blocks/0/conv1/kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(like: Any, flat: dict[str, Any]) -> Any:
    """The inverse of `flatten`: the leaves of `flat` in the structure of `like`."""
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    return jax.tree_util.tree_unflatten(structure, [flat[name] for name in names])


def fingerprint(flat: dict[str, Any]) -> str:
    """SHA-256 over names and bytes of a model's tensors, the `model_fingerprint` of results."""
    digest = hashlib.sha256()
    for name in sorted(flat):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(jax.device_get(flat[name])).tobytes())
    return digest.hexdigest()


class Checkpoints:
    """Asynchronous checkpoints of one run.

    Keeps the one with the lowest validation loss and the last two: should the last one be damaged, one before it is
    still there.

    Raises:
      InputError: the folder holds a checkpoint that cannot be read.
    """

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._pending: tuple[int, Any] = (0, None)
        policies = ocp.training.preservation_policies
        self._checkpointer = _open(
            workdir,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(2),
                    policies.BestN(
                        n=1,
                        get_metric_fn=lambda metrics: metrics["loss"],
                        reverse=True,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            cleanup_tmp_directories=True,
        )

    @property
    def last_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    @property
    def last_is_scored(self) -> bool:
        """Whether the newest checkpoint has a validation loss; one that was saved on request to stop has none."""
        latest = self._checkpointer.latest
        return latest is not None and bool(latest.metrics)

    def save(self, step: int, state: Any, metadata: dict, validation_loss: float | None) -> None:
        """Start saving `state`; returns when the save before is complete and the device arrays are copied.

        A checkpoint of the same step without a validation loss is replaced.

        Raises:
          RunFailed: this checkpoint or the one before could not be written.
        """
        try:
            self._complete()
            saving = self._checkpointer.save_checkpointables_async(
                step,
                {"state": flatten(state)},
                metrics=None if validation_loss is None else {"loss": validation_loss},
                custom_metadata=metadata,
                overwrite=step == self.last_step,
            )
            self._pending = (step, saving)
        except Exception as error:
            raise self._not_saved(error) from error

    def _complete(self) -> None:
        """Wait for the save that is under way, and write its checksums."""
        (step, saving), self._pending = self._pending, (0, None)
        if saving is not None and saving.result() and jax.process_index() == 0:
            write_sums(self._workdir, step)

    def close(self) -> None:
        """Wait until everything is on disk.

        Raises:
          RunFailed: the last checkpoint could not be written.
        """
        try:
            self._complete()
            self._checkpointer.close()
        except Exception as error:
            raise self._not_saved(error) from error

    def _not_saved(self, error: Exception) -> RunFailed:
        return RunFailed(
            f"a checkpoint could not be saved in {self._workdir} ({_first_line(error)}); make room or permit writing "
            "there and run again: it goes on from the last complete checkpoint"
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _open(workdir: Path, **options: Any) -> ocp.training.Checkpointer:
    folder = workdir / CHECKPOINTS
    try:
        return ocp.training.Checkpointer(folder.resolve(), **options)
    except Exception as error:
        raise InputError(
            f"a checkpoint in {folder} is damaged ({_first_line(error)}); remove the newest one and run again"
        ) from error


def write_sums(workdir: Path, step: int) -> None:
    """Write the SHA256SUMS of a complete checkpoint, if it is still there."""
    folder = workdir / CHECKPOINTS / str(step)
    if not folder.is_dir():
        return
    # The run's files first: a list that is cut then always lacks files of the checkpoint, which is noticed.
    files = [workdir / name for name in _NEVER_CHANGE if (workdir / name).is_file()]
    files += [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SUMS]
    lines = [f"{file_sha256(path)}  {os.path.relpath(path, folder.parent)}\n" for path in files]
    write_text(folder / SUMS, "".join(lines))


def _differing(workdir: Path, step: int, of_run: bool, small_files_only: bool = False) -> str:
    """The first file, of the checkpoint or of its run, that is not as SHA256SUMS says, in words; "" if none is."""
    folder = workdir / CHECKPOINTS / str(step)
    if not (folder / SUMS).exists():
        return ""
    try:
        text = (folder / SUMS).read_text()
    except (OSError, UnicodeDecodeError) as error:
        return f"{SUMS} cannot be read: {_first_line(error)}"
    lines = [_SUM.fullmatch(line) for line in text.splitlines()]
    if not all(lines) or not text.endswith("\n"):
        return f"{SUMS} is cut or no list of checksums"
    sums = {line["name"]: line["sha256"] for line in lines if line["name"].startswith("../") == of_run}
    if not of_run:
        if other := [name.split("/")[0] for name in sums if not name.startswith(f"{step}/")]:
            return f"it is that of step {other[0]}"
        there = {os.path.relpath(path, folder.parent) for path in folder.rglob("*") if path.is_file()}
        if unknown := sorted(there - sums.keys() - {f"{step}/{SUMS}"}):
            return f"{SUMS} lacks {unknown[0]}"
    for name, sha256 in sums.items():
        path = workdir / CHECKPOINTS / name
        if not path.is_file():
            return f"{path.name} is missing"
        if not (small_files_only and path.stat().st_size > _SMALL_BYTES) and file_sha256(path) != sha256:
            return f"{path.name} has another checksum"
    return ""


def check_undamaged(workdir: Path, step: int, *, small_files_only: bool = False) -> None:
    """Refuse a checkpoint that is not as it was saved, one that has the place of another, and damaged files of its run.

    Raises:
      InputError: names the file and the remedy.
    """
    if found := _differing(workdir, step, of_run=False, small_files_only=small_files_only):
        raise _damaged(workdir, step, found)
    if found := _differing(workdir, step, of_run=True):
        raise InputError(
            f"{workdir} is damaged ({found}; it was not when checkpoint {step} was saved); bring back a copy of it"
        )


def check_all_undamaged(workdir: Path) -> None:
    """Refuse a run with a damaged checkpoint: the newest one is compared as a whole, of others the small files.

    Raises:
      InputError: names the file and the remedy.
    """
    steps = _step_numbers(workdir)
    for step in steps:
        check_undamaged(workdir, step, small_files_only=step != steps[-1])


def set_aside_damaged(workdir: Path) -> list[int]:
    """Move damaged checkpoints into `damaged_checkpoints/`: a run then goes on from the last good one.

    Returns:
      The steps that were moved.

    Raises:
      InputError: all are damaged; nothing is moved.
    """
    steps = _step_numbers(workdir)
    moved = [step for step in steps if _is_damaged(workdir, step)]
    if steps and moved == steps:
        raise InputError(f"all checkpoints of {workdir} are damaged; start again in another --workdir")
    for step in moved:
        (workdir / SET_ASIDE).mkdir(exist_ok=True)
        os.replace(workdir / CHECKPOINTS / str(step), _free(workdir / SET_ASIDE / str(step)))
    return moved


def _free(path: Path) -> Path:
    number = 0
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name.split('_')[0]}_{number}")
    return path


def _is_damaged(workdir: Path, step: int) -> bool:
    folder = workdir / CHECKPOINTS / str(step)
    if (folder / SUMS).exists():
        return bool(_differing(workdir, step, of_run=False))
    try:  # without checksums, whether all of it can be read
        stored = ocp.checkpointables_metadata(folder.resolve()).metadata["state"]
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for name, leaf in stored.items()}
        ocp.load_checkpointables(folder.resolve(), {"state": like})
        return False
    except Exception:  # of many types, see above
        return True


def _step_numbers(workdir: Path) -> list[int]:
    folder = workdir / CHECKPOINTS
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def holds_checkpoint(workdir: Path) -> bool:
    """Whether a run directory holds a complete checkpoint, readable or not."""
    return bool(_step_numbers(workdir))


def _steps(workdir: Path) -> list[Any]:
    if not holds_checkpoint(workdir):
        return []
    for step in _step_numbers(workdir):  # the losses, by which the best one is chosen
        check_undamaged(workdir, step, small_files_only=True)
    with _open(workdir) as checkpointer:
        return list(checkpointer.checkpoints)


def choose_step(workdir: Path, which: str = "best") -> int:
    """Resolve `best` (lowest validation loss), `last`, `last_good` (the last one that is not damaged) or a step number
    to a checkpoint that exists.

    Raises:
      InputError: no such run, no checkpoint, or not that step; of `best` and `last`, if one of them is damaged.
    """
    numbers = _step_numbers(workdir)
    if which.isdigit() and int(which) in numbers:
        return int(which)
    if which == LAST_GOOD and numbers:
        good = (step for step in reversed(numbers) if not _is_damaged(workdir, step))
        if (step := next(good, None)) is None:
            raise InputError(f"all checkpoints of {workdir} are damaged")
        return step
    steps = _steps(workdir)
    if not steps:
        raise InputError(f"{workdir} holds no checkpoint; give the --workdir of a run of ctssl_jax.train")
    numbers = [item.step for item in steps]
    if which == "last":
        return numbers[-1]
    if which == "best":
        scored = [(item.metrics["loss"], item.step) for item in steps if item.metrics]
        return min(scored)[1] if scored else numbers[-1]
    known = ", ".join(str(number) for number in numbers)
    raise InputError(
        f"{workdir} has no checkpoint {which!r}; there are steps {known}, and the names best, last and last_good"
    )


def restore(workdir: Path, step: int, like: Any) -> Any:
    """Restore a whole state, or a part of one.

    Args:
      workdir: run directory.
      step: a step that `choose_step` gave.
      like: tree of `jax.ShapeDtypeStruct` (or arrays) with the shardings wanted, which may be of another number of
        devices than the run that saved it. Parts of the checkpoint that `like` lacks are not read.

    Raises:
      InputError: tensors are missing or have another shape, and the message names them; or the checkpoint is damaged.
    """
    path = (workdir / CHECKPOINTS / str(step)).resolve()
    check_undamaged(workdir, step)
    wanted = flatten(like)
    stored = stored_shapes(workdir, step)
    missing = [name for name in wanted if name not in stored]
    shapes = [
        f"{name} {stored[name]} instead of {tuple(leaf.shape)}"
        for name, leaf in wanted.items()
        if name in stored and stored[name] != tuple(leaf.shape)
    ]
    if missing or shapes:
        problems = ([f"missing: {', '.join(missing[:5])}"] if missing else []) + (
            [f"of another shape: {', '.join(shapes[:5])}"] if shapes else []
        )
        raise InputError(
            f"checkpoint {step} of {workdir} does not fit this model ({len(missing)} tensors missing, {len(shapes)} of "
            f"another shape; {'; '.join(problems)}); use the configuration that it was trained with"
        )
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            loaded = ocp.load_checkpointables(path, {"state": wanted})["state"]
    except Exception as error:
        raise _damaged(workdir, step, error) from error
    return unflatten(like, loaded)


def stored_shapes(workdir: Path, step: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint.

    Raises:
      InputError: the checkpoint is damaged.
    """
    try:
        stored = ocp.checkpointables_metadata((workdir / CHECKPOINTS / str(step)).resolve()).metadata["state"]
        return {name: tuple(stored[name].shape) for name in stored}
    except Exception as error:
        raise _damaged(workdir, step, error) from error


def _damaged(workdir: Path, step: int, what: Exception | str) -> InputError:
    what = what if isinstance(what, str) else _first_line(what)
    others = [
        other for other in _step_numbers(workdir) if other != step and not _differing(workdir, other, of_run=False)
    ]
    remedy = "there is no other one"
    if others:
        remedy = (
            f"good ones are: {', '.join(map(str, others))}; --checkpoint={LAST_GOOD} takes the last of them, and "
            "ctssl_jax.train --set_aside_damaged goes on from it"
        )
    return InputError(f"checkpoint {step} of {workdir} is damaged ({what}); {remedy}")


def read_metadata(workdir: Path, step: int) -> dict:
    """The JSON that was saved with a checkpoint: `config`, `preparation`."""
    path = (workdir / CHECKPOINTS / str(step)).resolve()
    return dict(ocp.checkpointables_metadata(path).custom_metadata)


def saved_with(workdir: Path) -> dict | None:
    """The JSON that was saved with the newest checkpoint whose checksums vouch for it; None if there is none."""
    for step in reversed(_step_numbers(workdir)):
        if (workdir / CHECKPOINTS / str(step) / SUMS).exists():
            if not _differing(workdir, step, of_run=False, small_files_only=True):
                return read_metadata(workdir, step)
    return None
