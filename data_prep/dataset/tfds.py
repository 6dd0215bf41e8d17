"""The last files of a dataset: metadata for TFDS, and preparation.json, whose presence means
"complete"."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dataset.schema import dataset_fingerprint, description, shard_name, write_preparation
from data_prep.system.files import file_sha256


def complete(
    dataset_dir: Path,
    preparation: Mapping[str, Any],
    tables: Iterable[str],
    shard_checksums: Mapping[str, str],
) -> dict[str, Any]:
    """Writes the last files of a dataset and returns the content of preparation.json.

    Args:
        dataset_dir: directory with the shards and the tables.
        preparation: from `make_preparation`.
        tables: file names of the tables.
        shard_checksums: SHA-256 of each shard.
    """
    _write_tfds_metadata(dataset_dir, preparation)
    names = (*tables, "dataset_info.json", "features.json")
    checksums = {**shard_checksums, **{name: file_sha256(dataset_dir / name) for name in names}}
    preparation = {
        **preparation,
        "fingerprint": dataset_fingerprint(checksums),
        "checksums": dict(sorted(checksums.items())),
    }
    write_preparation(dataset_dir, preparation)
    return preparation


def _write_tfds_metadata(dataset_dir: Path, preparation: Mapping[str, Any]) -> None:
    """Writes dataset_info.json and features.json."""
    # Not at the top: the import would delay every worker process of a preparation by a second.
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import naming

    template = naming.ShardedFileTemplate(
        data_dir=dataset_dir,
        template="{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
        dataset_name="chest_ct",
        filetype_suffix="array_record",
    )
    splits = []
    for split, facts in preparation["splits"].items():
        lengths = facts["shard_lengths"]
        num_bytes = sum(
            (dataset_dir / shard_name(split, shard)).stat().st_size for shard in range(len(lengths))
        )
        splits.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template
            )
        )
    size = preparation["image_size"]
    features = {
        "image": tfds.features.Tensor(
            shape=(size, size, preparation["channels"]), dtype=np.uint8, encoding="bytes"
        ),
        "volume_id": tfds.features.Text(),
        "slice_index": np.int32,
        "position_mm": np.float32,
        "pair_valid": np.bool_,
    }
    if preparation["masks"]:
        features["mask"] = tfds.features.Tensor(
            shape=(size, size), dtype=np.uint8, encoding="bytes"
        )
    tfds.folder_dataset.write_metadata(
        data_dir=dataset_dir,
        features=tfds.features.FeaturesDict(features),
        split_infos=splits,
        filename_template=template,
        check_data=False,  # True needs TensorFlow
        description=description(preparation),
    )
