"""How far a windowed order is from a uniformly random one.

    python -m experiments.bench.window_order

Of 40 shards of 23 patients with 300 slices each, in the mean of three seeds: patients in a batch,
and the share of neighbours in a batch that are of one patient, beside those of a uniform order;
and the correlation of a slice's place in the epoch with its place in the dataset (absolute value).
"""

import numpy as np

from ctssl_jax.data.windowed import WindowedOrder

SHARDS, PATIENTS, SLICES = 40, 23, 300
NUM_ITEMS = SHARDS * PATIENTS * SLICES


def windowed(window: int, num_streams: int, seed: int) -> np.ndarray:
    """An epoch's items of each stream: [num_streams, N / num_streams]."""
    items = np.arange(NUM_ITEMS)
    shards = items // (PATIENTS * SLICES)
    orders = [
        WindowedOrder(items, shards, seed, window, stream, num_streams)
        for stream in range(num_streams)
    ]
    positions = range(NUM_ITEMS // num_streams)
    return np.array([[order[position] for position in positions] for order in orders])


def measure(streams: np.ndarray, batch_size: int) -> tuple[float, float, float]:
    """Patients a batch, share of neighbours of one patient, |correlation|."""
    part = batch_size // len(streams)
    whole = streams.shape[1] // part * part
    parts = streams[:, :whole].reshape(len(streams), -1, part)
    batches = parts.transpose(1, 0, 2).reshape(-1, batch_size)
    patients = batches // SLICES
    return (
        float(np.mean([len(np.unique(batch)) for batch in patients])),
        float(np.mean(patients[:, 1:] == patients[:, :-1])),
        float(abs(np.corrcoef(np.arange(batches.size), batches.ravel())[0, 1])),
    )


def main() -> None:
    """Prints the table."""
    for batch_size in (16, 256):
        uniform = [
            measure(np.random.default_rng(seed).permutation(NUM_ITEMS)[None], batch_size)
            for seed in range(3)
        ]
        rows = [("uniform", np.mean(uniform, axis=0))]
        for window, num_streams in ((2_048, 1), (16_384, 1), (65_536, 1), (16_384, 8)):
            of_seeds = [
                measure(windowed(window, num_streams, seed), batch_size) for seed in range(3)
            ]
            rows.append((f"window {window:,}, {num_streams} streams", np.mean(of_seeds, axis=0)))
        print(f"batch of {batch_size}: patients, neighbours of one patient, |correlation|")
        for name, (patients, neighbours, correlation) in rows:
            print(f"  {name:28}{patients:8.1f}{neighbours:8.2%}{correlation:8.3f}", flush=True)


if __name__ == "__main__":
    main()
