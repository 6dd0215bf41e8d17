r"""Measure how many slices a second reach the devices.

    python -m experiments.benchmark_loader --dataset=DATASET

Without --dataset a temporary one is made: 2,560 slices of 512 x 512, 320 different ones (with far
fewer, grain's shuffle, which takes 4 us a slice of a million and 180 us of 200, would take most of
the time). The table compares the loader of the training loop with putting one batch on the devices
that is ready in memory, the floor. Below it stands how long an accelerator would wait for data
which takes --device_speed slices a second and no time of these cores: batches are loaded and put on
this machine's device, and their computation is slept through. With --training a small recipe is
trained for some steps at 64 x 64 pixels, too, and tells what the training loop measures of itself.
`taskset -c 0` measures one core.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags

from data_prep.system import command_line
from data_prep.system.files import file_sha256

_DATASET = flags.DEFINE_string("dataset", "", "Dataset directory; empty makes a temporary one.")
_SPLIT = flags.DEFINE_string("split", "train", "Split that is read.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Slices a batch.")
_SECONDS = flags.DEFINE_float("seconds", 5.0, "Time a row.")
_THREADS = flags.DEFINE_list("threads", ["1", "2", "4", "8"], "Numbers of reading threads to try.")
_DEVICE_SPEED = flags.DEFINE_float(
    "device_speed", 1000.0, "Slices a second of the accelerator that is imagined."
)
_TRAINING = flags.DEFINE_bool(
    "training", False, "Also train a small model and tell how long it waits for data."
)


def noisy_slices(number: int, size: int, seed: int = 0) -> np.ndarray:
    """[number, size, size, 1] uint8: a body on air with noise of 15 of 255 grey values, about as
    compressible as CT."""
    random = np.random.default_rng(seed)
    rows, columns = np.meshgrid(*[np.linspace(-1, 1, size)] * 2, indexing="ij")
    body = 110.0 * (np.hypot(rows / 0.7, columns / 0.9) < 1)
    noise = random.normal(0, 15, (number, size, size)) * (body > 0)
    return np.clip(body + noise, 0, 255).astype(np.uint8)[..., None]


def slices_per_second(step: Callable[[], None], batch_size: int, seconds: float) -> float:
    """Call `step` for about `seconds`; each call delivers one batch and waits until it has
    arrived."""
    for _ in range(3):
        step()
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step()
        calls += 1
    return calls * batch_size / (time.perf_counter() - began)


def measure(
    dataset: Path, split: str, batch_size: int, threads: list[int], seconds: float
) -> list[tuple[str, float]]:
    """Rows of the table: (path, slices a second)."""
    import jax

    from ctssl_jax.data import slices
    from ctssl_jax.data.batches import training_batches
    from ctssl_jax.parallel import mesh as distributed
    from data_prep.dataset.reader import Dataset

    opened = Dataset.open(dataset)
    channels = range(opened.preparation["channels"])
    source = slices.open_source(opened, split, channels, (0,))
    mesh = distributed.make_mesh()
    batch_size = -(-batch_size // mesh.devices.size) * mesh.devices.size
    ready = next(training_batches(source, batch_size, seed=0))

    def put(batch):
        jax.block_until_ready(distributed.to_devices(mesh, batch))

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
    """Share of its time that a device waits which takes so many slices a second; the loop is one
    step ahead of it."""
    import jax

    from ctssl_jax.data import slices
    from ctssl_jax.data.batches import training_batches
    from ctssl_jax.parallel import mesh as distributed
    from data_prep.dataset.reader import Dataset

    mesh = distributed.make_mesh()
    opened = Dataset.open(dataset)
    source = slices.open_source(opened, split, range(opened.preparation["channels"]), (0,))
    batches = training_batches(source, batch_size, seed=0, num_threads=num_threads)
    jax.block_until_ready(distributed.to_devices(mesh, next(batches)))
    busy, waited = batch_size / slices_per_second, 0.0
    began = done = time.perf_counter()  # `done`: when the device has computed all that it got
    while done - began < seconds:
        jax.block_until_ready(distributed.to_devices(mesh, next(batches)))
        now = time.perf_counter()
        waited += max(0.0, now - done)
        done = max(done, now) + busy
        time.sleep(max(0.0, done - busy - time.perf_counter()))
    return waited / (done - began)


def temporary_dataset(folder: Path, number: int = 320, size: int = 512, repeats: int = 1) -> Path:
    """Write noisy slices as a dataset directory: eight volumes in `train`, each so many times, one
    in `validation`."""
    from data_prep.dataset.schema import VOLUME_COLUMNS, VOLUMES_FILE, make_preparation, shard_name
    from data_prep.dataset.storage import encode_record, write_records, write_table
    from data_prep.dataset.tfds import complete

    folder.mkdir()
    volumes, shard_lengths = [], {}
    per_volume = number // 8
    images = [noisy_slices(per_volume, size, seed=volume) for volume in range(8)]
    for split, num_volumes in (("train", 8 * repeats), ("validation", 1)):
        records = []
        for volume in range(num_volumes):
            volume_id = f"{split}{volume}"
            for index, image in enumerate(images[volume % 8]):
                last = index == per_volume - 1
                records.append(encode_record(image, volume_id, index, float(index), not last))
            row = dict.fromkeys(VOLUME_COLUMNS) | {
                "volume_id": volume_id,
                "patient_id": volume_id,
                "split": split,
                "first_record": volume * per_volume,
                "num_slices": per_volume,
                "gap_positions": "",
                "synthetic": True,
            }
            volumes.append(row)
        shard_lengths[split] = [write_records(folder / shard_name(split, 0), records)]
    write_table(folder / VOLUMES_FILE, VOLUME_COLUMNS, volumes)
    preparation = make_preparation(
        archive="none",
        windows=[{"level": 50.0, "width": 350.0}],
        image_size=size,
        volumes=volumes,
        shard_lengths=shard_lengths,
        labels={},
        masks=None,
        key_fingerprint="0" * 16,
        options={},
        versions={},
        counts={},
    )
    written = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    complete(folder, preparation, (), written)
    return folder


def waiting_share(folder: Path) -> tuple[float, float]:
    """Train a small classifier on noise for 200 steps: (slices a second, share of the time spent
    waiting for data)."""
    from configs import rotation
    from ctssl_jax.runs.reports import read_reports
    from ctssl_jax.training.loop import train

    config = rotation.get_config("small")
    config.update(dataset=str(temporary_dataset(folder / "small", 640, 64)), batch_size=64)
    config.update(num_steps=200, log_every=100, eval_every=1000)
    config.model.update(hidden=(4, 8), depth=0)
    train(config, folder / "run")
    last = read_reports(folder / "run", "train")[-1]
    return last["slices_per_second"], last["waiting_for_data"]


def main(argv: list[str]) -> int:
    """Command line."""
    from ctssl_jax.parallel.processes import configure_jax

    configure_jax()
    with tempfile.TemporaryDirectory() as folder:
        dataset = (
            Path(_DATASET.value)
            if _DATASET.value
            else temporary_dataset(Path(folder) / "dataset", repeats=8)
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
                "waiting for data"
            )
    return 0


if __name__ == "__main__":
    command_line.run(main)
