"""Run directories: Orbax checkpoints of the training state with the configuration and preparation they belong to.

Layout of a run directory:

    config.json           the configuration of the run
    patients.json         pseudonyms of the patients of the training and validation splits
    preparation.json      how the slices were prepared (window, size, key fingerprint), as the dataset recorded it
    checkpoints/STEP      Orbax checkpoints: the last one and the best one by validation loss
    metrics.jsonl         one line a report: step, losses, slices/s
    tensorboard/          the same as event files
    pictures/             input | target | prediction | difference of fixed validation slices

A checkpoint is one flat dictionary `name -> array` (`params/encoder/...`, `variables/...`, `optimizer/...`, `step`),
so that names stay readable and parts can be taken alone; its JSON metadata holds the configuration, the preparation
and the position in the data order.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from ctssl_jax.command_line import InputError

CHECKPOINTS = "checkpoints"


def flatten(tree: Any) -> dict[str, Any]:
    """A tree as a flat dictionary with `/`-joined names, e.g. `params/encoder/blocks/0/conv1/kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(like: Any, flat: dict[str, Any]) -> Any:
    """The inverse of `flatten`: the leaves of `flat` in the structure of `like`."""
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    return jax.tree_util.tree_unflatten(structure, [flat[name] for name in names])


class Checkpoints:
    """Asynchronous checkpoints of one run: keeps the last one and the one with the lowest validation loss."""

    def __init__(self, workdir: Path, keep_last: int = 1):
        policies = ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            (workdir / CHECKPOINTS).resolve(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep_last),
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

    def save(self, step: int, state: Any, metadata: dict, validation_loss: float | None) -> None:
        """Start saving `state`; returns as soon as the device arrays are copied. Skips a step already saved."""
        if self.last_step is not None and step <= self.last_step:
            return
        self._checkpointer.save_checkpointables_async(
            step,
            {"state": flatten(state)},
            metrics=None if validation_loss is None else {"loss": validation_loss},
            custom_metadata=metadata,
        )

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._checkpointer.close()


def _steps(workdir: Path) -> list[Any]:
    folder = workdir / CHECKPOINTS
    if not folder.is_dir():
        return []
    with ocp.training.Checkpointer(folder.resolve()) as checkpointer:
        return list(checkpointer.checkpoints)


def choose_step(workdir: Path, which: str = "best") -> int:
    """Resolve `best` (lowest validation loss), `last` or a step number to a checkpoint that exists.

    Raises:
      InputError: no such run, no checkpoint, or not that step.
    """
    steps = _steps(workdir)
    if not steps:
        raise InputError(f"{workdir} holds no checkpoint; give the --workdir of a run of ctssl_jax.train")
    numbers = [item.step for item in steps]
    if which == "last":
        return numbers[-1]
    if which == "best":
        scored = [(item.metrics["loss"], item.step) for item in steps if item.metrics]
        return min(scored)[1] if scored else numbers[-1]
    if which.isdigit() and int(which) in numbers:
        return int(which)
    known = ", ".join(str(number) for number in numbers)
    raise InputError(f"{workdir} has no checkpoint {which!r}; there are steps {known}, and the names best and last")


def restore(workdir: Path, step: int, like: Any) -> Any:
    """Restore a whole state, or a part of one.

    Args:
      workdir: run directory.
      step: a step that `choose_step` gave.
      like: tree of `jax.ShapeDtypeStruct` (or arrays) with the shardings wanted, which may be of another number of
        devices than the run that saved it. Parts of the checkpoint that `like` lacks are not read.

    Raises:
      InputError: tensors are missing or have another shape; the message names them.
    """
    path = (workdir / CHECKPOINTS / str(step)).resolve()
    wanted = flatten(like)
    stored = ocp.checkpointables_metadata(path).metadata["state"]
    missing = [name for name in wanted if name not in stored]
    shapes = [
        f"{name} {tuple(stored[name].shape)} instead of {tuple(leaf.shape)}"
        for name, leaf in wanted.items()
        if name in stored and tuple(stored[name].shape) != tuple(leaf.shape)
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
    with context:
        loaded = ocp.load_checkpointables(path, {"state": wanted})["state"]
    return unflatten(like, loaded)


def read_metadata(workdir: Path, step: int) -> dict:
    """The JSON that was saved with a checkpoint: `config`, `preparation`, `data`."""
    path = (workdir / CHECKPOINTS / str(step)).resolve()
    return dict(ocp.checkpointables_metadata(path).custom_metadata)


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one step, as `write_text`."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
