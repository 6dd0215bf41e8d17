"""Orbax checkpoints of the training state, each with its configuration and preparation.

A checkpoint is one flat dictionary `name -> array` (`params/encoder/...`, `variables/...`,
`optimizer/...`, `step`), so that names stay readable and parts can be restored alone. Its JSON
metadata holds the configuration and the preparation. The position in the data is the step itself.
Beside it lies `score.json` (see `ctssl_jax.runs.scores`), once the checkpoint was validated.

Orbax and TensorStore report a full disk or a damaged file by many types of exception, bare
`Exception` among them. So all of them are caught here and become one line with the remedy.
"""

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
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
from ctssl_jax.runs.directory import absolute, remove_checkpoint, remove_incomplete
from ctssl_jax.runs.scores import Score, best_step, read_score, write_score
from data_prep.system.errors import InputError, RunFailed

_SECONDS_BETWEEN_LINES = 10.0
_MOST_SECONDS = 120.0


class Checkpoints:
    """Asynchronous checkpoints of one run, each with a score once it was validated.

    Keeps the last two and the best one: if the last one is damaged, one before it is still there.
    No checkpoint is ever written over, and none is removed before a newer one is complete. All
    processes of a run call each method together; process 0 writes scores and removes.

    Raises:
      InputError: the folder holds a checkpoint that cannot be read.
    """

    def __init__(self, workdir: Path):
        self.workdir = workdir
        self._pending: tuple[int, Any] | None = None
        self._bytes = 0
        policies = ocp.training
        if jax.process_index() == 0:
            remove_incomplete(workdir / CHECKPOINTS)
        # Orbax decides what to remove when a save begins, before the score of that checkpoint is
        # known, and it removes in place: a kill would leave half of a checkpoint under its name.
        self._checkpointer = _open(
            workdir,
            save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.preservation_policies.PreserveAll(),
            cleanup_tmp_directories=True,
        )
        self._last_step = max(step_numbers(workdir), default=None)
        score = None if self._last_step is None else read_score(_path(workdir, self._last_step))[0]
        self._last_is_scored = _as_on_process_0(score is not None)

    @property
    def last_step(self) -> int | None:
        """Step of the newest complete checkpoint, or of the one that is being saved; None before
        the first one."""
        return self._last_step

    @property
    def last_is_scored(self) -> bool:
        """Whether the checkpoint of `last_step` has a score, the same on all processes."""
        return self._last_is_scored

    def save(self, step: int, state: Any, metadata: dict) -> None:
        """Start saving `state`; returns when the last save is complete and the arrays are copied.

        Raises:
          RunFailed: this checkpoint or the one before could not be written.
        """
        self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        try:
            self._finish()
            saving = self._checkpointer.save_checkpointables_async(
                step, {"state": flatten(state)}, custom_metadata=metadata
            )
        except Exception as error:
            raise self._not_saved(error) from error
        self._pending = (step, saving)
        self._last_step, self._last_is_scored = step, False

    def check(self) -> None:
        """Notice a save that has failed; does not wait.

        Raises:
          RunFailed: it could not be written.
        """
        try:
            if self._pending is not None:
                self._pending[1].result(timeout=0)
        except TimeoutError:
            pass  # still under way, or too late: `score` and `close` tell
        except Exception as error:
            raise self._not_saved(error) from error

    def wait(self) -> None:
        """Wait until the save that is under way is complete.

        Raises:
          RunFailed: it could not be written.
        """
        try:
            if self._pending is not None:
                self._result(self._pending)
        except Exception as error:
            raise self._not_saved(error) from error

    def score(self, score: Score) -> None:
        """Write the score beside the last checkpoint, once that is complete.

        Raises:
          RunFailed: the checkpoint or its score could not be written.
        """
        try:
            self._complete()
            if jax.process_index() == 0:
                write_score(_path(self.workdir, self._last_step), score)
        except Exception as error:
            raise self._not_saved(error) from error
        self._last_is_scored = True
        self._retain()

    def close(self) -> None:
        """Wait until everything is on disk.

        Raises:
          RunFailed: the last checkpoint could not be written.
        """
        try:
            self._finish()
            self._checkpointer.close()
        except Exception as error:
            raise self._not_saved(error) from error

    def _complete(self) -> None:
        """Wait for the save that is under way, and write its checksums."""
        pending, self._pending = self._pending, None
        if pending is not None and self._result(pending) and jax.process_index() == 0:
            write_sums(self.workdir, pending[0])

    def _result(self, pending: tuple[int, Any]) -> bool:
        """Wait for a save, and say so every ten seconds. Several processes wait for each other no
        longer than two minutes, and a second for 10 MB: Orbax would wait for twenty."""
        step, saving = pending
        began = time.monotonic()
        while True:
            asked = time.monotonic()
            try:
                return saving.result(timeout=_SECONDS_BETWEEN_LINES)
            except TimeoutError:
                if time.monotonic() - asked < _SECONDS_BETWEEN_LINES - 1:
                    raise  # Orbax's own
            waited = time.monotonic() - began
            if jax.process_count() > 1 and waited > _MOST_SECONDS + self._bytes / 1e7:
                raise RuntimeError(f"not written by all processes within {waited:.0f} s")
            if jax.process_index() == 0:
                by_all = " by all processes" if jax.process_count() > 1 else ""
                print(
                    f"waiting      for checkpoint {step:,} to be written{by_all} ({waited:.0f} s)",
                    flush=True,
                )

    def _finish(self) -> None:
        """Complete a save whose checkpoint gets no score, because the run stops."""
        if self._pending is not None:
            self._complete()
            self._retain()

    def _retain(self) -> None:
        """Remove all complete checkpoints but the last two and the best one."""
        if jax.process_index() == 0:
            steps = step_numbers(self.workdir)
            kept = {*steps[-2:], best_step(_read_scores(self.workdir, steps)[0])}
            for step in steps:
                if step not in kept:
                    remove_checkpoint(_path(self.workdir, step))

    def _not_saved(self, error: Exception) -> RunFailed:
        code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's, which Orbax keeps
        number = int(code[1]) if code else getattr(error, "errno", None)
        reason = os.strerror(number) if number else first_line(error)
        return RunFailed(
            f"a checkpoint could not be saved in {self.workdir} ({reason}); make room "
            "or permit writing there and run again: it resumes from the last complete checkpoint"
        )


def _path(workdir: Path, step: int) -> Path:
    return workdir / CHECKPOINTS / str(step)


def _as_on_process_0(value: bool) -> bool:
    """A shared file system may show a new file to one host later than to another."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def _read_scores(workdir: Path, steps: Sequence[int]) -> tuple[dict[int, Score], list[str]]:
    """The scores by step, and a line for each that is there and cannot be used."""
    found = {step: read_score(_path(workdir, step)) for step in steps}
    scores = {step: score for step, (score, _) in found.items() if score is not None}
    return scores, [problem for _, problem in found.values() if problem]


def _open(workdir: Path, **options: Any) -> ocp.training.Checkpointer:
    folder = workdir / CHECKPOINTS
    try:
        return ocp.training.Checkpointer(absolute(folder), **options)
    except Exception as error:
        raise InputError(
            f"a checkpoint in {folder} is damaged ({first_line(error)}); remove the newest one and "
            "run again"
        ) from error


class Chosen(NamedTuple):
    """A checkpoint that was chosen.

    step: its step.
    score: its score; None if it has none.
    why: the choice in words, `best masked_mse 0.0223`.
    warnings: a line for each damaged score, whose checkpoint counts as unscored.
    """

    step: int
    score: Score | None
    why: str
    warnings: tuple[str, ...] = ()

    @property
    def facts(self) -> dict[str, Any]:
        """The fields of results: `checkpoint_step`, and `checkpoint_score` (`name` and `value` on
        the validation slices; None if it has none)."""
        score = self.score and {"name": self.score.name, "value": self.score.value}
        return {"checkpoint_step": self.step, "checkpoint_score": score}


def choose(workdir: Path, which: str = "best") -> Chosen:
    """A checkpoint that exists.

    Args:
      workdir: run directory.
      which: `best` (by the score that the run's recipe names; never step 0), `last`, `last_good`
        (the last undamaged one) or a step number. Where no checkpoint has a score, `best` is the
        last one: the run was stopped before its first validation, or an older version of this
        program made it, which stored the loss alone.

    Raises:
      InputError: the run has no such checkpoint.
    """
    steps = step_numbers(workdir)
    if not steps:
        raise InputError(
            f"{workdir} has no checkpoint; give the --workdir of a run of ctssl_jax.train"
        )
    scores, problems = _read_scores(workdir, steps)
    warnings = tuple(f"{problem}; its checkpoint counts as unscored" for problem in problems)
    if which == "best":
        step = best_step(scores)
        if step is not None:
            name = scores[max(scores)].name
            value = scores[step].scores[name]
            score = scores[step]._replace(name=name, value=value)
            return Chosen(step, score, f"best {name} {value:.4g}", warnings)
        if any((_path(workdir, step) / "metrics").exists() for step in steps):
            why = "the last one, since an older version made this run, which stored the loss alone"
        elif scores:
            why = f"the last one, since {scores[max(scores)].name} was undefined in each validation"
        else:
            why = "the last one, unscored, since no checkpoint of this run has a score"
        return Chosen(steps[-1], scores.get(steps[-1]), why, warnings)
    if which == LAST_GOOD:
        step = next((step for step in reversed(steps) if not is_damaged(workdir, step)), None)
        if step is None:
            raise InputError(f"all checkpoints of {workdir} are damaged")
    elif which == "last":
        step = steps[-1]
    elif which.isdigit() and int(which) in steps:
        step = int(which)
    else:
        raise InputError(
            f"{workdir} has no checkpoint {which!r}; there are steps "
            f"{', '.join(map(str, steps))}, and the names best, last and last_good"
        )
    score = scores.get(step)
    value = None if score is None else score.value
    why = "unscored" if value is None else f"{score.name} {value:.4g}"
    return Chosen(step, score, why if which.isdigit() else f"{which}, {why}", warnings)


def choose_step(workdir: Path, which: str = "best") -> int:
    """Step of the checkpoint that `choose` gives."""
    return choose(workdir, which).step


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
    path = absolute(_path(workdir, step))
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
        stored = ocp.checkpointables_metadata(absolute(_path(workdir, step))).metadata["state"]
        return {name: tuple(stored[name].shape) for name in stored}
    except Exception as error:
        raise damaged(workdir, step, error) from error


def read_metadata(workdir: Path, step: int) -> dict:
    """The JSON that was saved with a checkpoint: `config`, `preparation`."""
    path = absolute(_path(workdir, step))
    return dict(ocp.checkpointables_metadata(path).custom_metadata)


def saved_with(workdir: Path) -> dict | None:
    """The JSON that was saved with the newest checkpoint that agrees with its checksums; None if
    no checkpoint does."""
    step = newest_vouched_for(workdir)
    return None if step is None else read_metadata(workdir, step)
