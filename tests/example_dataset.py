"""A small synthetic dataset directory, written by the real writer."""

from pathlib import Path

import numpy as np

from data_prep import dataset


def write_example_dataset(
    dataset_dir: Path,
    *,
    image_size: int = 32,
    channels: int = 1,
    slices_per_volume: int = 12,
    volumes_per_split: dict[str, int] | None = None,
    volumes_per_shard: int = 2,
    seed: int = 0,
) -> Path:
    """Smooth discs that drift from slice to slice; a volume a patient; slice 5 is followed by a gap."""
    dataset_dir.mkdir(parents=True)
    random = np.random.default_rng(seed)
    rows, shard_lengths, splits = [], {}, {}
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, image_size)] * 2, indexing="ij"))
    for split, num_volumes in (volumes_per_split or {"train": 5, "validation": 2, "test": 2}).items():
        shard_lengths[split] = []
        records, first_record = [], 0
        for number in range(num_volumes):
            volume_id = f"{split[:2]}{seed:02d}{number:028d}"
            centre, drift = random.uniform(-0.4, 0.4, 2), random.uniform(-0.02, 0.02, 2)
            for index in range(slices_per_volume):
                offset = grid - (centre + index * drift)[:, None, None]
                disc = 1 / (1 + np.exp(12 * (np.hypot(*offset) - 0.5)))
                image = np.stack([disc / (channel + 1) for channel in range(channels)], axis=-1)
                last = index == slices_per_volume - 1
                records.append(
                    dataset.encode_record(
                        np.rint(255 * image).astype(np.uint8),
                        volume_id,
                        index,
                        2.5 * (index + (index > 5)),
                        not last and index != 5,
                    )
                )
            row = dict.fromkeys(dataset.VOLUME_COLUMNS) | {
                "volume_id": volume_id,
                "patient_id": f"p{volume_id[1:]}",
                "split": split,
                "first_record": first_record,
                "num_slices": slices_per_volume,
                "num_files": slices_per_volume,
                "num_dropped_files": 0,
                "source_rows": image_size,
                "source_columns": image_size,
                "pixel_spacing_row_mm": 0.7,
                "pixel_spacing_column_mm": 0.7,
                "slice_thickness_mm": 2.5,
                "slice_spacing_mm": 2.5,
                "gap_positions": "5",
                "age": 60 + number,
                "sex": "FM"[number % 2],
                "synthetic": True,
                "middle_slice": slices_per_volume // 2,
            }
            rows.append(row)
            first_record += slices_per_volume
            if (number + 1) % volumes_per_shard == 0 or number == num_volumes - 1:
                path = dataset_dir / dataset.shard_name(split, len(shard_lengths[split]))
                shard_lengths[split].append(dataset.write_records(path, records))
                records = []
        splits[split] = {
            "num_volumes": num_volumes,
            "num_patients": num_volumes,
            "num_slices": first_record,
            "shard_lengths": shard_lengths[split],
        }
    dataset.write_table(dataset_dir / dataset.VOLUMES_FILE, dataset.VOLUME_COLUMNS, rows)
    dataset.write_table(dataset_dir / dataset.REJECTED_FILE, dataset.REJECTED_COLUMNS, [])
    dataset.write_tfds_metadata(dataset_dir, (image_size, image_size, channels), shard_lengths, "Synthetic example.")
    checksums = {path.name: dataset.file_sha256(path) for path in sorted(dataset_dir.iterdir())}
    preparation = {
        "format_version": dataset.FORMAT_VERSION,
        "archive": "dicom",
        "synthetic": True,
        "windows": [{"level": 50.0, "width": 350.0}] * channels,
        "image_size": image_size,
        "channels": channels,
        "splits": splits,
        "key_fingerprint": "0" * 16,
        "fingerprint": dataset.dataset_fingerprint(checksums),
        "options": {},
        "versions": {},
        "counts": {},
        "checksums": checksums,
    }
    dataset.write_preparation(dataset_dir, preparation)
    return dataset_dir
