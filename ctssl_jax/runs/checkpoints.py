"""Orbax checkpoints of the training state, each with its configuration and preparation.

A checkpoint is one flat dictionary `name -> array` (`params/encoder/...`, `variables/...`,
`optimizer/...`, `step`), so that names stay readable and parts can be restored alone. Its JSON
metadata holds the configuration and the preparation. The position in the data is the step itself.

Orbax and TensorStore report a full disk or a damaged file by many types of exception, bare
`Exception` among them. So all of them are caught here and become one line with the remedy.
"""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from ctssl_jax.ops.trees import flatten, unflatten
from ctssl_jax.runs.damage import (
    CHECKPOINTS,
    LAST_GOOD,
    check_undamaged,
    damaged,
    first_line,
    is_damaged,
    newest_vouched_for,
    step_numbers,
    write_sums,
)
from data_prep.system.errors import InputError, RunFailed


class Checkpoints:
    """Asynchronous checkpoints of one run.

    Keeps the one with the lowest validation loss and the last two: if the last one is damaged, one
    before it is still there.

    Raises:
      InputError: the folder holds a checkpoint that cannot be read.
    """

    def __init__(self, workdir: Path):
        self.workdir = workdir
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
        """Whether the newest checkpoint has a validation loss; a request to stop saves without
        one."""
        latest = self._checkpointer.latest
        return latest is not None and bool(latest.metrics)

    def save(self, step: int, state: Any, metadata: dict, validation_loss: float | None) -> None:
        """Start saving `state`; returns when the last save is complete and the arrays are copied.

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
            write_sums(self.workdir, step)

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
            f"a checkpoint could not be saved in {self.workdir} ({first_line(error)}); make room "
            "or permit writing there and run again: it resumes from the last complete checkpoint"
        )


def _open(workdir: Path, **options: Any) -> ocp.training.Checkpointer:
    folder = workdir / CHECKPOINTS
    try:
        return ocp.training.Checkpointer(folder.resolve(), **options)
    except Exception as error:
        raise InputError(
            f"a checkpoint in {folder} is damaged ({first_line(error)}); remove the newest one and "
            "run again"
        ) from error


def _steps(workdir: Path) -> list[Any]:
    if not (steps := step_numbers(workdir)):
        return []
    for step in steps:  # the small files hold the losses that decide which one is the best
        check_undamaged(workdir, step, small_files_only=True)
    with _open(workdir) as checkpointer:
        return list(checkpointer.checkpoints)


def choose_step(workdir: Path, which: str = "best") -> int:
    """Step of a checkpoint that exists.

    Args:
      workdir: run directory.
      which: `best` (lowest validation loss), `last`, `last_good` (the last undamaged one) or a
        step number.

    Raises:
      InputError: the run has no such checkpoint, or `best` and `last` could not be told because
        one is damaged.
    """
    numbers = step_numbers(workdir)
    if which.isdigit() and int(which) in numbers:
        return int(which)
    if which == LAST_GOOD and numbers:
        good = (step for step in reversed(numbers) if not is_damaged(workdir, step))
        if (step := next(good, None)) is None:
            raise InputError(f"all checkpoints of {workdir} are damaged")
        return step
    steps = _steps(workdir)
    if not steps:
        raise InputError(
            f"{workdir} has no checkpoint; give the --workdir of a run of ctssl_jax.train"
        )
    numbers = [item.step for item in steps]
    if which == "last":
        return numbers[-1]
    if which == "best":
        scored = [(item.metrics["loss"], item.step) for item in steps if item.metrics]
        return min(scored)[1] if scored else numbers[-1]
    existing = ", ".join(map(str, numbers))
    raise InputError(
        f"{workdir} has no checkpoint {which!r}; there are steps {existing}, and the names best, "
        "last and last_good"
    )


def restore(workdir: Path, step: int, template: Any) -> Any:
    """Restore a whole state, or a part of one.

    Args:
      workdir: run directory.
      step: a step that `choose_step` gave.
      template: tree of `jax.ShapeDtypeStruct` or arrays; the result has their shardings, on any
        number of devices. Parts of the checkpoint that the template lacks are not read.

    Raises:
      InputError: tensors are missing or have another shape, and the message names them; or the
        checkpoint is damaged.
    """
    path = (workdir / CHECKPOINTS / str(step)).resolve()
    check_undamaged(workdir, step)
    wanted = flatten(template)
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
            f"checkpoint {step} of {workdir} does not fit this model ({len(missing)} tensors "
            f"missing, {len(shapes)} of another shape; {'; '.join(problems)}); use the "
            "configuration that it was trained with"
        )
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            loaded = ocp.load_checkpointables(path, {"state": wanted})["state"]
    except Exception as error:
        raise damaged(workdir, step, error) from error
    return unflatten(template, loaded)


def stored_shapes(workdir: Path, step: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint.

    Raises:
      InputError: the checkpoint is damaged.
    """
    try:
        stored = ocp.checkpointables_metadata(
            (workdir / CHECKPOINTS / str(step)).resolve()
        ).metadata["state"]
        return {name: tuple(stored[name].shape) for name in stored}
    except Exception as error:
        raise damaged(workdir, step, error) from error


def read_metadata(workdir: Path, step: int) -> dict:
    """The JSON that was saved with a checkpoint: `config`, `preparation`."""
    path = (workdir / CHECKPOINTS / str(step)).resolve()
    return dict(ocp.checkpointables_metadata(path).custom_metadata)


def saved_with(workdir: Path) -> dict | None:
    """The JSON that was saved with the newest checkpoint that agrees with its checksums; None if
    no checkpoint does."""
    step = newest_vouched_for(workdir)
    return None if step is None else read_metadata(workdir, step)
