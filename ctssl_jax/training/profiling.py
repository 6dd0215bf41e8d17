"""A trace of some training steps by JAX's profiler, for TensorBoard and XProf: `--profile=N`."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from ctssl_jax.runs.reports import say

FOLDER = "profile"
# The first steps fill the queues of batches, and load the compiled program.
WARM_STEPS = 5


class StepTrace:
    """Traces `number` steps, after `WARM_STEPS` steps of this process, into `RUN/profile`.

    One process writes: process 0. Its trace holds its own devices.
    """

    def __init__(self, workdir: Path, number: int, first_step: int):
        """A `number` of 0 traces nothing. `first_step`: the steps that were taken before."""
        self._folder = workdir / FOLDER
        self._number = number if jax.process_index() == 0 else 0
        self._first = first_step + WARM_STEPS
        self._running, self._taken, self._began = False, 0, 0.0

    @contextlib.contextmanager
    def step(self, step: int, state: Any) -> Iterator[None]:
        """Around the step after `step` and the fetch of the next batch; `state` is what the step
        begins with."""
        if self._number and not self._running and step >= self._first:
            jax.block_until_ready(state)
            self._start()
        if not self._running:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
            yield
        self._taken += 1

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # each call of a function would be an event
        jax.profiler.start_trace(self._folder, profiler_options=options)
        self._running, self._began = True, time.perf_counter()

    def end(self, step: int, state: Any, *, at_once: bool = False) -> None:
        """After each step: ends the trace once it has all its steps, or `at_once`; says where it
        is and what it does not show."""
        if not self._running or (self._taken < self._number and not at_once):
            return
        jax.block_until_ready(state)
        seconds = time.perf_counter() - self._began
        jax.profiler.stop_trace()
        self._running, self._number = False, 0
        newest = max(self._folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        milliseconds = 1000 * seconds / max(self._taken, 1)
        say(
            f"profile      steps {step - self._taken + 1:,} to {step:,}, {milliseconds:,.0f} ms a "
            f"step, in {self._folder}; pip install xprof && xprof --logdir={self._folder}"
        )
        shown = seconds_with_operations(newest) / seconds
        text = f"{'':13}it shows operations in {shown:.0%} of this time"
        if jax.default_backend() == "cpu":
            text += (
                ": on a CPU convolutions run in threads of a library that the trace does not see"
            )
        say(text)


def seconds_with_operations(trace: Path) -> float:
    """Seconds in which a trace (`*.xplane.pb`) shows an operation of XLA on any device or thread.

    On a device that is the time in which one of its streams is busy, on a CPU the time in which one
    of XLA's threads is.
    """
    spans = []
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        on_device = plane.name.startswith("/device:")
        for line in plane.lines:
            if on_device and not line.name.startswith(("Stream", "XLA Ops")):
                continue  # sums over the streams
            spans += [
                (event.start_ns, event.start_ns + event.duration_ns)
                for event in line.events
                if on_device or any(name == "hlo_op" for name, _ in event.stats)
            ]
    total, until = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total / 1e9
