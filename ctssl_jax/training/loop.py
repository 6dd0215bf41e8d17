"""The training loop: from where a run stopped, a warm start or random weights to the last step."""

import collections
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from ctssl_jax.models.quantizer import codebook_use
from ctssl_jax.parallel.lost_host import leave_soon
from ctssl_jax.parallel.meeting import WAIT_SECONDS, gather, refusing_together, require_writable
from ctssl_jax.parallel.processes import bound_waits_of_orbax
from ctssl_jax.parallel.stopping import stop_requests
from ctssl_jax.runs.checkpoints import Checkpoints
from ctssl_jax.runs.directory import run_directory
from ctssl_jax.runs.lock import LOST_SECONDS, TrainingLock
from ctssl_jax.runs.reports import Reports, say
from ctssl_jax.runs.scores import make_score
from ctssl_jax.tasks.interface import HIGHER_IS_BETTER
from ctssl_jax.training import fitting, health, warm_start
from ctssl_jax.training.feature_scores import feature_scores
from ctssl_jax.training.headline import headline_scores
from ctssl_jax.training.profiling import StepTrace
from ctssl_jax.training.progress import Clock, log, show, show_pictures
from ctssl_jax.training.scoring import evaluate_split
from ctssl_jax.training.setup import Job, check
from ctssl_jax.training.state import TrainState, check_finite, check_state, resume
from ctssl_jax.training.step import Feed, Program, run_step, take_report
from data_prep.dataset.reader import Dataset

STEPS_IN_FLIGHT = 2  # that the devices have still to do when the next one is prepared
# The state's own counter is given to the next step.
_copied = jax.jit(lambda step: step + 0)


@fitting.with_end_of_memory
def train(
    config: ml_collections.ConfigDict,
    workdir: str | Path,
    devices: Sequence[Any] | None = None,
    *,
    dataset: Dataset | None = None,
    set_aside_damaged: bool = False,
    profile_steps: int = 0,
) -> bool:
    """Train, or resume training, until `config.num_steps`.

    Args:
      config: a recipe, e.g. `configs.masked_region.get_config()`.
      workdir: the run directory, see `ctssl_jax.runs.run`.
      devices: JAX devices to use, by default all of all processes.
      dataset: the dataset of `config.dataset`, if it is open already.
      set_aside_damaged: move damaged checkpoints aside and resume from the last good one.
      profile_steps: steps to trace into `RUN/profile`, see `ctssl_jax.training.profiling`.

    Returns:
      True if the run is complete, False if a signal stopped it before.

    Raises:
      InputError: something in the configuration, the dataset or the run directory cannot work.
      TrainingDiverged: the loss or a gradient was not finite; the last checkpoint is from before
        (its own validation loss may be what was not finite).
    """
    with TrainingLock() as lock:
        with refusing_together("taking the lock of --workdir", LOST_SECONDS + WAIT_SECONDS):
            workdir = run_directory(workdir)
            lock.take_if_there(workdir)
        job = check(config, workdir, devices, dataset, set_aside_damaged=set_aside_damaged)
        program, _ = job.compile()
        checkpoints = job.open_run(lock)  # nothing was written before
        return _train(job, program, checkpoints, profile_steps)


def _train(job: Job, program: Program, checkpoints: Checkpoints, profile_steps: int) -> bool:
    workdir, start = checkpoints.workdir, checkpoints.last_step
    leaves = jax.tree.leaves(program.template)
    bound_waits_of_orbax(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves))
    # In this order: resume, else a warm start (from another run or a weight file), else random
    # weights.
    if start is not None:
        state = resume(workdir, start, program.template)
        say(f"resuming     from step {start:,} of {workdir}")
    else:
        state = warm_start.begin(job.config, program.initial_state(), job.warm_start)
    with stop_requests() as should_stop:  # before, there was nothing to save
        reports = Reports(
            workdir,
            -1 if start is None else start,
            validates_again=not checkpoints.last_is_scored,
        )
        trace = StepTrace(
            workdir, profile_steps, start or 0, job.config.num_steps, job.config.eval_every
        )
        try:
            step, finished = _steps(job, program, state, checkpoints, reports, should_stop, trace)
        except BaseException as error:
            leave_soon(error)  # to close the checkpoints may mean to wait for the others
            raise
        finally:
            trace.stop()
            job.train_source.close()
            checkpoints.close()
            reports.close()
        # A launcher may end all when the first one ends. Process 0 reads the whole checkpoint.
        gather("saving the last checkpoint", seconds=600)
    end = "finished" if finished else "stopped"
    say(f"{end}     at step {step:,}; checkpoints in {workdir}")
    return finished


def _steps(
    job: Job,
    program: Program,
    state: TrainState,
    checkpoints: Checkpoints,
    reports: Reports,
    should_stop: Callable[[], bool],
    trace: StepTrace,
) -> tuple[int, bool]:
    """Train; returns the step at which training ended, and whether it is complete."""
    config, step, norms = job.config, checkpoints.last_step or 0, {}
    began = step
    running: collections.deque[jax.Array] = collections.deque()
    saved, scored, undefined_said = step, checkpoints.last_is_scored, False
    feed = (
        Feed(job.mesh, job.training_batches(step), config.microbatches)
        if step < config.num_steps
        else None
    )
    clock = Clock(step, step, time.monotonic())

    def should_stop_here() -> bool:
        checkpoints.check()
        return should_stop()

    # In this order: save, validate, write the score, step, fetch the next batch. So a score never
    # lacks its checkpoint, and the position in the data is the step: a resumed run sees equal
    # batches. A run that was stopped between save and score writes that score first.
    while True:
        at_end, stopping = step >= config.num_steps, should_stop()
        due = step > 0 and (at_end or step % config.eval_every == 0)
        if step == 0 and not stopping:
            with clock.pausing():
                show_pictures(job, program, state, step)
        if step != saved and (due or stopping):
            check_state(config, state, checkpoints.workdir, checkpoints.last_step)
            reports.flush()
            require_writable(checkpoints.workdir)
            checkpoints.save(step, state, job.metadata)
            if saved == began:  # before hours of training a run knows that it can save
                checkpoints.wait()
            saved, scored = step, False
        if due and not scored and not stopping:
            with clock.validating():
                scores = validate(job, program, state, step, should_stop_here)
                if scores is not None:
                    check_finite(
                        config, scores["loss"], step, checkpoints.workdir, checkpoints.last_step
                    )
                    show(job, program, state, step, scores, norms, reports)
            if scores is not None:  # its file waits for the checkpoint, which is no validation
                score = make_score(config.best_by, HIGHER_IS_BETTER[config.best_by], scores)
                if score.value is None and not undefined_said:
                    say(
                        f"WARNING      step {step:,}: config.best_by={config.best_by} is "
                        "undefined on the validation slices, so no checkpoint can be chosen by "
                        "it, and the last one is taken as the best"
                    )
                    undefined_said = True
                checkpoints.score(score)
                scored = True
            stopping = scores is None
        if at_end or stopping or feed is None:  # no batches are left at the end
            trace.end(step, state, at_once=True)
            clock.say_share(step)
            return step, at_end and not stopping
        with trace.step(step, state):
            state = run_step(program, state, feed.parts)
            step += 1
            running.append(_copied(state.step))
            checkpoints.check()
            if step < config.num_steps:
                feed.advance(state.step)
            if len(running) > STEPS_IN_FLIGHT:  # a request to stop waits for no more
                jax.block_until_ready(running.popleft())
        trace.end(step, state)
        if step % config.log_every == 0:
            check_state(config, state, checkpoints.workdir, checkpoints.last_step)
            state, report = take_report(program, state)
            norms = health.norms_of_learning(config, step, report.layer_gradient_norms)
            log(job, step, report, clock, feed, reports)


def validate(
    job: Job, program: Program, state: TrainState, step: int, should_stop: Callable[[], bool]
) -> dict[str, float] | None:
    """Scores of the validation split, named as those of `evaluate`, how codebook and embedding are
    used, and what the embedding tells without labels; None if a request to stop came first."""
    batches = job.validation_batches()
    # All processes have as many batches, and stop at the same one.
    batches = itertools.takewhile(lambda batch: not should_stop(), batches)
    result = evaluate_split(program.scorer, state, batches, embeddings=True)
    if result is None or len(result.record_index) < len(job.validation_items):
        return None
    means = headline_scores(result, job.validation_source)
    return {
        **means,
        **codebook_use(result.code_counts),
        **health.embedding_use(result.embedding_moments),
        **feature_scores(result, job.validation_source, job.validation_places),
    }
