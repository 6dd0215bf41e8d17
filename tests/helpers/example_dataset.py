"""A small synthetic dataset directory, written by the real writer."""

from pathlib import Path

import numpy as np

from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import (
    LABELS_FILE,
    REGIONS_FILE,
    REJECTED_COLUMNS,
    REJECTED_FILE,
    SLICES_FILE,
    VOLUME_COLUMNS,
    VOLUMES_FILE,
    dataset_fingerprint,
    make_preparation,
    shard_name,
    table_columns,
    write_preparation,
)
from data_prep.dataset.storage import encode_record, write_records, write_table
from data_prep.dataset.tfds import complete
from data_prep.system.files import file_sha256


def write_example_dataset(
    dataset_dir: Path,
    *,
    image_size: int = 32,
    channels: int = 1,
    slices_per_volume: int = 12,
    volumes_per_split: dict[str, int] | None = None,
    volumes_per_shard: int = 2,
    seed: int = 0,
    masks: bool = False,
    slice_labels: bool = False,
    volume_labels: bool = False,
) -> Path:
    """Smooth discs that drift from slice to slice; a volume a patient; slice 5 is followed by a
    gap.

    `masks`: region 1 is the disc's core on the slices 2 to 7, region 2 one pixel on slice 4
    (malignancy 1 + number of the volume, and 5). `slice_labels`: "pe_present_on_image" is 1 on
    slices whose disc lies in the left half, missing on slice 0. `volume_labels`: "pe_positive_exam"
    (volume) is the number of the volume modulo 2, "smoker" (patient) is "no", "yes", missing, ...
    in turn.
    """
    dataset_dir.mkdir(parents=True)
    labels, slice_rows, label_rows, region_rows = {}, [], [], []
    if slice_labels:
        labels["pe_present_on_image"] = {"level": "slice", "classes": ["0", "1"]}
    if volume_labels:
        labels["pe_positive_exam"] = {"level": "volume", "classes": ["0", "1"]}
        labels["smoker"] = {"level": "patient", "classes": ["no", "yes"]}
    facts_of_masks = {"source": "lidc_idri", "consensus": 0.7, "min_area_px": 20} if masks else None
    random = np.random.default_rng(seed)
    rows, shard_lengths = [], {}
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, image_size)] * 2, indexing="ij"))
    for split, num_volumes in (
        volumes_per_split or {"train": 5, "validation": 2, "test": 2}
    ).items():
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
                mask = np.zeros((image_size, image_size), np.uint8) if masks else None
                if masks and 2 <= index <= 7:
                    mask[np.hypot(*offset) < 0.25] = 1
                if masks and index == 4:
                    mask[0, 0] = 2
                slice_row = {"volume_id": volume_id, "slice_index": index}
                if masks:
                    slice_row["mask_area_px"] = int(np.count_nonzero(mask))
                if slice_labels:
                    left = int(centre[1] + index * drift[1] < 0)
                    slice_row["pe_present_on_image"] = None if index == 0 else left
                slice_rows.append(slice_row)
                records.append(
                    encode_record(
                        np.rint(255 * image).astype(np.uint8),
                        volume_id,
                        index,
                        2.5 * (index + (index > 5)),
                        not last and index != 5,
                        mask,
                    )
                )
            label_rows.append(
                {
                    "volume_id": volume_id,
                    "pe_positive_exam": number % 2,
                    "smoker": (0, 1, None)[number % 3],
                }
            )
            for region, first, final, malignancy in ((1, 2, 7, 1 + number % 5), (2, 4, 4, 5)):
                region_rows.append(
                    {
                        "volume_id": volume_id,
                        "region": region,
                        "first_slice": first,
                        "last_slice": final,
                        "volume_mm3": 100.0 / region,
                        "diameter_mm": 6 / region,
                        "malignancy": malignancy,
                        "num_readers": 4,
                    }
                )
            row = dict.fromkeys(VOLUME_COLUMNS) | {
                "volume_id": volume_id,
                "patient_id": f"p{volume_id[1:]}",
                "exam_id": f"e{volume_id[1:]}",
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
                path = dataset_dir / shard_name(split, len(shard_lengths[split]))
                shard_lengths[split].append(write_records(path, records))
                records = []
    write_table(dataset_dir / VOLUMES_FILE, VOLUME_COLUMNS, rows)
    write_table(dataset_dir / REJECTED_FILE, REJECTED_COLUMNS, [])
    tables = {SLICES_FILE: slice_rows, LABELS_FILE: label_rows, REGIONS_FILE: region_rows}
    for name, columns in table_columns({"labels": labels, "masks": facts_of_masks}).items():
        write_table(dataset_dir / name, columns, tables[name])
    preparation = make_preparation(
        archive="dicom",
        windows=[{"level": 50.0, "width": 350.0}] * channels,
        image_size=image_size,
        volumes=rows,
        shard_lengths=shard_lengths,
        labels=labels,
        masks=facts_of_masks,
        key_fingerprint="0" * 16,
        options={},
        versions={},
        counts={},
    )
    written = {path.name: file_sha256(path) for path in sorted(dataset_dir.iterdir())}
    complete(dataset_dir, preparation, (), written)
    return dataset_dir


def change_preparation(dataset_dir: Path, **fields) -> None:
    """Other values in preparation.json, with the checksum of itself that goes with them."""
    write_preparation(dataset_dir, Dataset.open(dataset_dir).preparation | fields)


def renew_checksums(dataset_dir: Path) -> None:
    """preparation.json agrees with the other files, after a test changed some of them."""
    checksums = Dataset.open(dataset_dir).preparation["checksums"]
    checksums = {name: file_sha256(dataset_dir / name) for name in checksums}
    change_preparation(dataset_dir, checksums=checksums, fingerprint=dataset_fingerprint(checksums))
