"""A trace of some training steps by JAX's profiler, for TensorBoard and XProf: `--profile=N`."""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from ctssl_jax.runs.damage import first_line
from ctssl_jax.runs.reports import say

FOLDER = "profile"
# The first steps fill the queues of batches, and load the compiled program.
WARM_STEPS = 5


class StepTrace:
    """Traces some steps of a run into `RUN/profile`, after `WARM_STEPS` steps of this process.

    Process 0 alone writes a trace, of its own devices.

    Args:
      workdir: the run directory.
      number: steps to trace; 0 traces nothing.
      step: steps that were taken before.
      num_steps: last step of the run. The warm-up is shorter where too few are left.
      eval_every: steps between validations; the trace begins after one instead of containing it.
    """

    def __init__(self, workdir: Path, number: int, step: int, num_steps: int, eval_every: int):
        self._folder = workdir / FOLDER
        self._number = number if jax.process_index() == 0 else 0
        self._first = step + max(0, min(WARM_STEPS, num_steps - step - number))
        due = -(-self._first // eval_every) * eval_every
        if due < self._first + number <= due + number <= num_steps:
            self._first = due
        self._running, self._taken, self._began = False, 0, 0.0
        if self._number and step >= num_steps:
            say("profile      no step is left to trace; give a larger --config.num_steps")

    @contextlib.contextmanager
    def step(self, step: int, state: Any) -> Iterator[None]:
        """Around a step and the fetch of the next batch.

        Args:
          step: steps that were taken before.
          state: the state before the step.
        """
        if self._taken < self._number and not self._running and step >= self._first:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # else each call of a function is an event
            # The profiler writes to file systems alone, and the run may be in a bucket.
            self._local = tempfile.TemporaryDirectory(prefix="ctssl_profile_")
            jax.profiler.start_trace(self._local.name, profiler_options=options)
            self._running, self._began = True, time.perf_counter()
        if not self._running:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
            yield
        self._taken += 1

    def end(self, step: int, state: Any, *, at_once: bool = False) -> None:
        """End the trace if it has all its steps, or `at_once`; say where it is and what it lacks.

        Args:
          step: steps that were taken.
          state: the state after them.
          at_once: the run ends here.
        """
        if not self._running or (self._taken < self._number and not at_once):
            return
        jax.block_until_ready(state)
        seconds = time.perf_counter() - self._began
        self._running = False
        with self._local:
            try:
                jax.profiler.stop_trace()
                (trace,) = Path(self._local.name).rglob("*.xplane.pb")
                shown = seconds_with_operations(trace) / seconds
                _copy(Path(self._local.name), self._folder)
            except (OSError, RuntimeError, ValueError) as error:  # the training goes on
                say(f"WARNING      {self._folder} cannot be written ({first_line(error)})")
                return
        say(
            f"profile      steps {step - self._taken + 1:,} to {step:,} in {self._folder}, "
            f"{1000 * seconds / self._taken:,.0f} ms each while traced; to see it: "
            f"pip install xprof && xprof {self._folder}"
        )
        unseen = (
            ": on a CPU convolutions run in threads of a library that the trace does not see"
            if jax.default_backend() == "cpu"
            else ""
        )
        say(f"{'':13}it shows operations in {shown:.0%} of this time{unseen}")

    def stop(self) -> None:
        """End a trace that is under way, and leave it."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            self._local.cleanup()


def _copy(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            copied = target / path.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(path.read_bytes())


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
