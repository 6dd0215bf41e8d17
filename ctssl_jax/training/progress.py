"""Reports of a training: speed, scores, pictures, warnings and the remaining time."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator

from ctssl_jax.models.quantizer import codebook_use
from ctssl_jax.runs import strips
from ctssl_jax.runs.reports import Reports, duration, say
from ctssl_jax.training import health
from ctssl_jax.training.scoring import render_pictures
from ctssl_jax.training.setup import Job
from ctssl_jax.training.state import TrainState
from ctssl_jax.training.step import Feed, Program, Report


@dataclasses.dataclass
class Clock:
    """Times of steps and validations. Slices/s is without validations, which stop the clock."""

    first_step: int
    step: int  # of the last lap
    began: float
    training_seconds: float = 0.0  # of all laps
    validation_seconds: float = 0.0  # of the last validation
    all_validation_seconds: float = 0.0

    @contextlib.contextmanager
    def validating(self) -> Iterator[None]:
        """Around a validation."""
        before = self.began
        with self.pausing():
            yield
        self.validation_seconds = self.began - before
        self.all_validation_seconds += self.validation_seconds

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Around work of the start, which belongs neither to steps nor to validations."""
        paused = time.monotonic()
        yield
        self.began += time.monotonic() - paused

    def lap(self, step: int) -> tuple[int, float]:
        """Steps and seconds since the last lap."""
        now = time.monotonic()
        steps, seconds = step - self.step, now - self.began
        self.step, self.began, self.training_seconds = step, now, self.training_seconds + seconds
        return steps, seconds

    @property
    def validation_share(self) -> float:
        """Share of the time up to the last lap that validations took."""
        return self.all_validation_seconds / (self.all_validation_seconds + self.training_seconds)

    def say_share(self, step: int) -> None:
        """Say how much of the time of this start went into validations."""
        if step > self.first_step:
            self.lap(step)
            say(
                f"validation   took {self.validation_share:.1%} of the time since step "
                f"{self.first_step:,}"
            )

    def left(self, num_steps: int, eval_every: int) -> float:
        """Seconds until the last step, by the speed so far."""
        training = (num_steps - self.step) * self.training_seconds / (self.step - self.first_step)
        validations = math.ceil(num_steps / eval_every) - self.step // eval_every
        return training + validations * self.validation_seconds


def show_pictures(job: Job, program: Program, state: TrainState, step: int) -> None:
    """Write the pictures of a step."""
    arrays = render_pictures(program.scorer, state, job.picture_slices, job.num_pictures)
    if job.process_index == 0:
        setting = job.picture_setting
        path = job.workdir / "pictures" / f"step_{step:08d}.png"
        strips.save_strip(path, setting.complete(arrays), setting.legend)


def show(
    job: Job,
    program: Program,
    state: TrainState,
    step: int,
    scores: dict,
    norms: dict[str, float],
    reports: Reports,
) -> None:
    """Report a validation: its numbers, pictures, and warnings of a collapse."""
    means = {name: value for name, value in scores.items() if name != "embedding_dim"}
    reports.write("validation", step, means)
    show_pictures(job, program, state, step)
    say(
        f"validation   step {step:,}  "
        + "  ".join(f"{name} {value:.4g}" for name, value in means.items())
    )
    for warning in health.warnings(job.config, scores, norms):
        say(f"WARNING      step {step:,}: {warning}")


def log(job: Job, step: int, report: Report, clock: Clock, feed: Feed, reports: Reports) -> None:
    """Report the steps since the last report, and the time that the rest will take."""
    steps, seconds = clock.lap(step)
    speed, waiting, feed.waited = (
        steps * job.config.batch_size / seconds,
        feed.waited / seconds,
        0.0,
    )
    means = (
        report.means
        | {"slices_per_second": speed, "waiting_for_data": waiting}
        | codebook_use(report.code_counts)
    )
    reports.write("train", step, means)
    reports.write("gradient_norm", step, report.layer_gradient_norms)
    left = clock.left(job.config.num_steps, job.config.eval_every)
    say(
        f"step {step:,}/{job.config.num_steps:,}  loss {means['loss']:.4g}  "
        + "  ".join(f"{name} {means[name]:.4g}" for name in job.task.reported if name in means)
        + (f"  codes {means['used_codes']}" if "used_codes" in means else "")
        + f"  {speed:.1f} slices/s ({waiting:.0%} waiting for data)  {clock.validation_share:.1%} "
        f"of the time in validation  {duration(left)} left"
    )
