r"""Measure how many slices a second reach the devices.

    ctssl benchmark_loader --dataset=DATASET

Without --dataset a temporary one is made: 2,560 slices of 512 x 512, 320 different ones. With far
fewer, grain's shuffle would take most of the time: 180 us a slice of 200, 4 us a slice of a
million.

The table compares the loader of the training loop with its floor, putting one batch that is ready
in memory on the devices. Below the table stands how long an accelerator would wait for data if it
took --device_speed slices a second and no time of these cores: batches are loaded and put on the
device of this machine, and the program sleeps in the place of their computation. With --training
a small recipe is trained for some steps at 64 x 64 pixels, too, and prints the numbers that the
training loop measures. `taskset -c 0` measures one core.
"""

if __name__ == "__main__":  # the imports below take their time
    from data_prep.system import early_stop

    early_stop.leave_at_once()

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags

from ctssl_jax.data.batches import training_batches
from ctssl_jax.data.slices import NeighbourSource, open_source
from ctssl_jax.parallel.mesh import make_mesh, to_devices
from ctssl_jax.parallel.processes import configure_jax
from ctssl_jax.runs.reports import read_reports
from ctssl_jax.training.loop import train
from ctssl_jax.training.recipe_files import load_recipe
from data_prep.dataset.reader import Dataset
from data_prep.system import command_line

from .bench.noisy_dataset import write_noisy_dataset

_DATASET = flags.DEFINE_string("dataset", "", "Dataset directory; empty makes a temporary one.")
_SPLIT = flags.DEFINE_string("split", "train", "Split that is read.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Slices a batch.")
_SECONDS = flags.DEFINE_float("seconds", 5.0, "Time a row.")
_THREADS = flags.DEFINE_list("threads", ["1", "2", "4", "8"], "Numbers of reading threads to try.")
_DEVICE_SPEED = flags.DEFINE_float(
    "device_speed", 1000.0, "Slices a second of the imagined accelerator."
)
_TRAINING = flags.DEFINE_bool(
    "training", False, "Also train a small model and print how long it waits for data."
)


def slices_per_second(step: Callable[[], None], batch_size: int, seconds: float) -> float:
    """Call `step`, which delivers one batch and waits for its arrival, for about `seconds`."""
    for _ in range(3):
        step()
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step()
        calls += 1
    return calls * batch_size / (time.perf_counter() - began)


def open_all_channels(dataset: Path, split: str) -> NeighbourSource:
    """The slices of a split with all channels."""
    opened = Dataset.open(dataset)
    return open_source(opened, split, range(opened.preparation["channels"]), (0,))


def measure(
    dataset: Path, split: str, batch_size: int, threads: list[int], seconds: float
) -> list[tuple[str, float]]:
    """Rows of the table: (path, slices a second)."""
    source = open_all_channels(dataset, split)
    mesh = make_mesh()
    batch_size = -(-batch_size // mesh.devices.size) * mesh.devices.size
    ready = next(training_batches(source, batch_size, seed=0))

    def put(batch):
        jax.block_until_ready(to_devices(mesh, batch))

    rows = [("a ready batch (floor)", slices_per_second(lambda: put(ready), batch_size, seconds))]
    for number in threads:
        batches = training_batches(source, batch_size, seed=0, num_threads=number)
        speed = slices_per_second(lambda: put(next(batches)), batch_size, seconds)
        rows.append((f"loader, {number} thread{'s' * (number > 1)}", speed))
    return rows


def waiting_of_a_device(
    dataset: Path,
    split: str,
    batch_size: int,
    num_threads: int,
    slices_per_second: float,
    seconds: float,
) -> float:
    """Share of the time that a device of this speed waits; the loop is one step ahead of it."""
    mesh = make_mesh()
    source = open_all_channels(dataset, split)
    batches = training_batches(source, batch_size, seed=0, num_threads=num_threads)
    jax.block_until_ready(to_devices(mesh, next(batches)))
    busy, waited = batch_size / slices_per_second, 0.0
    began = done = time.perf_counter()  # `done`: when the device has computed all that it got
    while done - began < seconds:
        jax.block_until_ready(to_devices(mesh, next(batches)))
        now = time.perf_counter()
        waited += max(0.0, now - done)
        done = max(done, now) + busy
        time.sleep(max(0.0, done - busy - time.perf_counter()))
    return waited / (done - began)


def waiting_share(folder: Path) -> tuple[float, float]:
    """Train a small classifier on noise for 200 steps.

    Returns:
      Slices a second, and the share of the time that it waited for data.
    """
    config = load_recipe("rotation", "small")
    config.update(dataset=str(write_noisy_dataset(folder / "small", 640, 64)), batch_size=64)
    config.update(num_steps=200, log_every=100, eval_every=1000)
    config.model.update(hidden=(4, 8), depth=0)
    train(config, folder / "run")
    last = read_reports(folder / "run", "train")[-1]
    return last["slices_per_second"], last["waiting_for_data"]


def main(argv: list[str]) -> int:
    """Command line."""
    configure_jax()
    with tempfile.TemporaryDirectory() as folder:
        dataset = (
            Path(_DATASET.value)
            if _DATASET.value
            else write_noisy_dataset(Path(folder) / "dataset", repeats=8)
        )
        threads = [int(number) for number in _THREADS.value]
        rows = measure(dataset, _SPLIT.value, _BATCH_SIZE.value, threads, _SECONDS.value)
        print(f"{'path':24}slices/s")
        for name, speed in rows:
            print(f"{name:24}{speed:8,.0f}", flush=True)
        number = max(rows[1:], key=lambda row: row[1])[0]
        best = threads[[name for name, _ in rows[1:]].index(number)]
        speed = _DEVICE_SPEED.value
        share = waiting_of_a_device(
            dataset, _SPLIT.value, _BATCH_SIZE.value, best, speed, 2 * _SECONDS.value
        )
        print(
            f"a device that takes {speed:,.0f} slices/s, {number}: {share:.2%} of the time waiting "
            "for data",
            flush=True,
        )
        if _TRAINING.value:
            sys.stdout.flush()
            speed, share = waiting_share(Path(folder))
            print(
                f"training a small model, 64 x 64: {speed:,.0f} slices/s, {share:.2%} of the time "
                "waiting for data",
                flush=True,
            )
    command_line.suggest("benchmark_training", aside=True)
    return 0


if __name__ == "__main__":
    command_line.run(main)
