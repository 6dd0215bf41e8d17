"""A dataset of noise, for measurements of the loader."""

from pathlib import Path

import numpy as np

from data_prep.dataset.schema import VOLUME_COLUMNS, VOLUMES_FILE, make_preparation, shard_name
from data_prep.dataset.storage import encode_record, write_records, write_table
from data_prep.dataset.tfds import complete
from data_prep.system.files import file_sha256


def noisy_slices(number: int, size: int, seed: int = 0) -> np.ndarray:
    """[number, size, size, 1] uint8: a body in air, with noise of 15 of 255 grey values, which
    compresses about as CT does."""
    random = np.random.default_rng(seed)
    rows, columns = np.meshgrid(*[np.linspace(-1, 1, size)] * 2, indexing="ij")
    body = 110.0 * (np.hypot(rows / 0.7, columns / 0.9) < 1)
    noise = random.normal(0, 15, (number, size, size)) * (body > 0)
    return np.clip(body + noise, 0, 255).astype(np.uint8)[..., None]


def write_noisy_dataset(folder: Path, number: int = 320, size: int = 512, repeats: int = 1) -> Path:
    """Write a dataset directory of noise.

    Args:
      folder: the directory, which must not exist.
      number: of different slices, in eight volumes of `train`; `validation` has the first volume.
      size: height and width in pixels.
      repeats: copies of each volume in `train`.
    """
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
