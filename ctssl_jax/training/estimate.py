"""The cost of a training run, from a few timed steps on the real data."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from ctssl_jax.parallel.meeting import gather
from ctssl_jax.runs.reports import say
from ctssl_jax.training import fitting
from ctssl_jax.training.setup import check
from ctssl_jax.training.step import Feed, Program, run_step
from data_prep.dataset.reader import Dataset

WARM_STEPS = 2
FEWEST_STEPS = 3
MOST_STEPS = 50
SECONDS = 15.0


@fitting.with_end_of_memory
def estimate(
    config: ml_collections.ConfigDict,
    devices: Sequence[Any] | None = None,
    *,
    dataset: Dataset | None = None,
) -> None:
    """Print what a training run with this configuration will cost. No file is written.

    Args:
      config: a recipe.
      devices: JAX devices to use, by default all of all processes.
      dataset: the dataset of `config.dataset`, if it is open already.

    Raises:
      InputError: something in the configuration or the dataset cannot work.
    """
    job = check(config, None, devices, dataset)
    program, needed = job.compile()
    say(fitting.memory_line(program, needed))
    times = timed_steps(program, job.training_batches())
    for line in lines(times, job.config, len(job.train_source), state_bytes(program.template)):
        say(line)


def state_bytes(state: Any) -> int:
    """Bytes of all arrays of a state (arrays or shapes): the size of a checkpoint before
    compression."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def timed_steps(program: Program, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, float]:
    """Train for a few steps from random weights and throw the result away.

    Returns:
      `slices_per_second`, `seconds_a_step` and `waiting_for_data` (share of the time), over
      `num_timed_steps`.
    """
    config = program.definition.config
    state, feed = (
        program.initial_state(),
        Feed(program.definition.mesh, batches, config.microbatches),
    )

    def seconds_of(steps: int) -> float:
        nonlocal state
        started = time.perf_counter()
        for _ in range(steps):
            state = run_step(program, state, feed.parts)
            feed.advance(state.step)
        jax.block_until_ready(state)
        return time.perf_counter() - started

    seconds_of(WARM_STEPS)
    feed.waited = 0.0
    seconds = seconds_of(FEWEST_STEPS)
    more = min(MOST_STEPS, int(SECONDS * FEWEST_STEPS / seconds)) - FEWEST_STEPS
    more = max(0, gather("the timed steps", more)[0])  # the same number on all processes
    seconds, taken = seconds + seconds_of(more), FEWEST_STEPS + more
    return {
        "slices_per_second": taken * config.batch_size / seconds,
        "seconds_a_step": seconds / taken,
        "waiting_for_data": feed.waited / seconds,
        "num_timed_steps": taken,
    }


def lines(
    times: dict[str, float],
    config: ml_collections.ConfigDict,
    num_slices: int,
    checkpoint_bytes: int,
) -> list[str]:
    """The estimate as lines for the screen.

    Args:
      times: from `timed_steps`.
      config: the training configuration.
      num_slices: items of an epoch.
      checkpoint_bytes: from `state_bytes`.
    """
    speed, run_slices = times["slices_per_second"], config.num_steps * config.batch_size
    gib = checkpoint_bytes / 2**30
    size = f"{gib:,.2f} GiB" if gib >= 1 else f"{1024 * gib:,.1f} MiB"
    return [
        f"speed        {speed:,.1f} slices/s, {1000 * times['seconds_a_step']:,.0f} ms a step of "
        f"{config.batch_size} ({times['num_timed_steps']} timed; {times['waiting_for_data']:.0%} "
        "waiting for data)",
        f"an epoch     {num_slices / speed / 3600:,.2f} hours for {num_slices:,} slices",
        f"this run     {run_slices / speed / 3600:,.2f} hours for {config.num_steps:,} steps, "
        f"{run_slices / num_slices:,.1f} epochs; validation and start-up come on top",
        f"a checkpoint {size} before compression; up to three are kept",
    ]
