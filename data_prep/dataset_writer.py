"""Writing a dataset directory (`data_prep.dataset`): records, shards, tables, metadata.

Every file is there in full or not at all. Record messages are encoded here, not by the protobuf library, whose map
order is not promised: equal slices must give equal bytes on every machine.
"""

import contextlib
import csv
import io
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dataset import PREPARATION_FILE, preparation_sha256, shard_name
from data_prep.system.files import REMEDIES, unique_name, write_file, written_whole

WRITER_OPTIONS = "group_size:1,zstd:1"

# ---- records -----------------------------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _wrap(number: int, parts: list) -> list:
    """A length-delimited protobuf field around `parts` (bytes or flat buffers), which are not copied."""
    return [bytes([number << 3 | 2]) + _varint(sum(map(len, parts))), *parts]


def _feature(name: str, kind: int, values) -> list:
    """An entry of the feature map of a tf.train.Example; kind 1: bytes, 2: float, 3: int64."""
    return _wrap(1, _wrap(1, [name.encode()]) + _wrap(2, _wrap(kind, _wrap(1, [values]))))


def encode_record(
    image: np.ndarray,
    volume_id: str,
    slice_index: int,
    position_mm: float,
    pair_valid: bool,
    mask: np.ndarray | None = None,
) -> bytes:
    """The record of one slice (a serialised tf.train.Example, features in alphabetical order).

    `image` is [H, W, C] uint8, `mask` [H, W] uint8 (the record has no such feature if it is None).
    """
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError(f"a record holds uint8 [H, W, C], not {image.dtype} {list(image.shape)}")
    if mask is not None and (mask.dtype != np.uint8 or mask.shape != image.shape[:2]):
        raise ValueError(f"a mask is uint8 {list(image.shape[:2])}, not {mask.dtype} {list(mask.shape)}")
    features = [
        *_feature("image", 1, image.reshape(-1).data),
        *(_feature("mask", 1, mask.reshape(-1).data) if mask is not None else ()),
        *_feature("pair_valid", 3, _varint(int(pair_valid))),
        *_feature("position_mm", 2, struct.pack("<f", position_mm)),
        *_feature("slice_index", 3, _varint(slice_index)),
        *_feature("volume_id", 1, volume_id.encode()),
    ]
    return b"".join(_wrap(1, features))


# ---- files ----------------------------------------------------------------------------------------


def write_records(path: Path, records: Iterable[bytes], options: str = WRITER_OPTIONS) -> int:
    """Writes an ArrayRecord file, present in full or not at all; returns the number of records.

    The bytes of the file depend on the records only.

    Raises:
        OSError: it cannot be written.
    """
    from array_record.python import array_record_module

    number = 0
    with written_whole(path, unique_name(path)) as temporary, _errors_of_writing():
        writer = array_record_module.ArrayRecordWriter(str(temporary), options)
        for record in records:
            writer.write(record)
            number += 1
        writer.close()
    return number


@contextlib.contextmanager
def _errors_of_writing() -> Iterator[None]:
    """ArrayRecord tells of a full disk by a RuntimeError of many clauses."""
    try:
        yield
    except RuntimeError as error:
        code = next((code for code in REMEDIES if os.strerror(code) in str(error)), None)
        if code is None:
            raise
        raise OSError(code, os.strerror(code)) from error


def write_table(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a CSV table: None is an empty cell, booleans are yes / no, floats keep all their digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    write_file(path, text.getvalue().encode())


def _cell(value: Any) -> Any:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return repr(round(float(value), 6))
    return "" if value is None else value


def write_tfds_metadata(
    dataset_dir: Path,
    image_shape: Sequence[int],
    shard_lengths: Mapping[str, Sequence[int]],
    description: str,
    *,
    masks: bool = False,
) -> None:
    """Writes dataset_info.json and features.json. `shard_lengths`: records of each shard, by split; `masks`: whether
    the records have masks."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import naming

    template = naming.ShardedFileTemplate(
        data_dir=dataset_dir,
        template="{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
        dataset_name="chest_ct",
        filetype_suffix="array_record",
    )
    splits = []
    for split, lengths in shard_lengths.items():
        num_bytes = sum((dataset_dir / shard_name(split, shard)).stat().st_size for shard in range(len(lengths)))
        splits.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=list(lengths), num_bytes=num_bytes, filename_template=template
            )
        )
    features = {
        "image": tfds.features.Tensor(shape=tuple(image_shape), dtype=np.uint8, encoding="bytes"),
        "volume_id": tfds.features.Text(),
        "slice_index": np.int32,
        "position_mm": np.float32,
        "pair_valid": np.bool_,
    }
    if masks:
        features["mask"] = tfds.features.Tensor(shape=tuple(image_shape[:2]), dtype=np.uint8, encoding="bytes")
    tfds.folder_dataset.write_metadata(
        data_dir=dataset_dir,
        features=tfds.features.FeaturesDict(features),
        split_infos=splits,
        filename_template=template,
        check_data=False,  # True needs TensorFlow
        description=description,
    )


def write_preparation(dataset_dir: Path, preparation: Mapping[str, Any]) -> None:
    """Writes preparation.json, the last file of a dataset, with its checksum of itself."""
    preparation = {**preparation, "sha256": preparation_sha256(preparation)}
    write_file(dataset_dir / PREPARATION_FILE, (json.dumps(preparation, indent=2) + "\n").encode())
