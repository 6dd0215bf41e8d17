"""Records, shards and tables of a dataset, in both directions.

Record messages are encoded here, not by the protobuf library, whose map order is not promised:
equal slices must give equal bytes on every machine.
"""

import contextlib
import csv
import functools
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from data_prep.system.errors import DatasetError
from data_prep.system.files import REMEDIES, as_cell, unique_name, written_whole

WRITER_OPTIONS = "group_size:1,zstd:1"
READER_OPTIONS = "readahead_buffer_size:0"


# ---- records -------------------------------------------------------------------------------------


def encode_record(
    image: np.ndarray,
    volume_id: str,
    slice_index: int,
    position_mm: float,
    pair_valid: bool,
    mask: np.ndarray | None = None,
) -> bytes:
    """The record of one slice (a serialised tf.train.Example, features in alphabetical order).

    `image` is [H, W, C] uint8, `mask` [H, W] uint8 (None: the record lacks this feature).
    """
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError(f"a record holds uint8 [H, W, C], not {image.dtype} {list(image.shape)}")
    if mask is not None and (mask.dtype != np.uint8 or mask.shape != image.shape[:2]):
        raise ValueError(
            f"a mask is uint8 {list(image.shape[:2])}, not {mask.dtype} {list(mask.shape)}"
        )
    features = [
        *_feature("image", 1, image.reshape(-1).data),
        *(_feature("mask", 1, mask.reshape(-1).data) if mask is not None else ()),
        *_feature("pair_valid", 3, _varint(int(pair_valid))),
        *_feature("position_mm", 2, struct.pack("<f", position_mm)),
        *_feature("slice_index", 3, _varint(slice_index)),
        *_feature("volume_id", 1, volume_id.encode()),
    ]
    return b"".join(_wrap(1, features))


def _feature(name: str, kind: int, values) -> list:
    """An entry of the feature map of a tf.train.Example; kind 1: bytes, 2: float, 3: int64."""
    return _wrap(1, _wrap(1, [name.encode()]) + _wrap(2, _wrap(kind, _wrap(1, [values]))))


def _wrap(number: int, parts: list) -> list:
    """A length-delimited protobuf field around `parts` (bytes or flat buffers), which are not
    copied."""
    return [bytes([number << 3 | 2]) + _varint(sum(map(len, parts))), *parts]


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def decode_record(record: bytes, image_shape: Sequence[int]) -> dict[str, Any]:
    """The inverse of `encode_record`: `image` is a read-only [H, W, C] uint8 view, and so is `mask`
    [H, W] where the record has one; the rest are scalars."""
    features = {}
    at, end = _payload(record, 0)
    while at < end:
        # an entry of the map of features: its name, and a list of one value
        entry, at = _payload(record, at)
        name, after = _payload(record, entry)
        values, _ = _payload(record, _payload(record, after)[0])
        features[record[name:after]] = _payload(record, values)
    slice_index = 0
    for place, byte in enumerate(record[slice(*features[b"slice_index"])]):
        slice_index |= (byte & 0x7F) << 7 * place

    def pixels(name: bytes, shape: Sequence[int]) -> np.ndarray:
        begin, end = features[name]
        return np.frombuffer(record, np.uint8, end - begin, begin).reshape(shape)

    return {
        "image": pixels(b"image", image_shape),
        **({"mask": pixels(b"mask", image_shape[:2])} if b"mask" in features else {}),
        "volume_id": record[slice(*features[b"volume_id"])].decode(),
        "slice_index": slice_index,
        "position_mm": struct.unpack_from("<f", record, features[b"position_mm"][0])[0],
        "pair_valid": record[features[b"pair_valid"][0]] == 1,
    }


def _payload(record: bytes, at: int) -> tuple[int, int]:
    """Where the payload of the length-delimited field at this place begins and ends."""
    if record[at] & 7 != 2:
        raise DatasetError(
            "a record is damaged: unexpected field type; run ctssl describe --verify"
        )
    size, shift = 0, 0
    while True:
        at += 1
        size |= (record[at] & 0x7F) << shift
        shift += 7
        if record[at] < 0x80:
            return at + 1, at + 1 + size


# ---- shards --------------------------------------------------------------------------------------


def write_records(path: Path, records: Iterable[bytes], options: str = WRITER_OPTIONS) -> int:
    """Writes an ArrayRecord file, present in full or not at all; returns the number of records.

    The bytes of the file depend on the records only.

    Raises:
        OSError: it cannot be written.
    """
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
    """ArrayRecord reports a full disk as a RuntimeError with a long text: raises the OSError."""
    try:
        yield
    except RuntimeError as error:
        code = next((code for code in REMEDIES if os.strerror(code) in str(error)), None)
        if code is None:
            raise
        raise OSError(code, os.strerror(code)) from error


def read_records(path: Path) -> Iterable[bytes]:
    """The records of an ArrayRecord file in order, a few in memory at a time."""
    reader = array_record_module.ArrayRecordReader(str(path), options=READER_OPTIONS)
    try:
        for index in range(reader.num_records()):
            yield reader.read([index])[0]
    finally:
        reader.close()


# ---- tables --------------------------------------------------------------------------------------


def write_table(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a CSV table: None is an empty cell, booleans are yes / no, floats have at most six
    decimals, texts are no formulas (`as_cell`)."""
    with writing_table(path, columns) as write_row:
        for row in rows:
            write_row(row)


@contextlib.contextmanager
def writing_table(
    path: Path, columns: Iterable[str]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """`write_table` row by row: the function that writes a row. The table appears at the end."""
    with (
        written_whole(path, unique_name(path)) as temporary,
        open(temporary, "x", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        yield lambda row: writer.writerow({name: _cell(value) for name, value in row.items()})


def _cell(value: Any) -> Any:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return repr(round(float(value), 6))
    return "" if value is None else as_cell(value) if isinstance(value, str) else value


def read_table(path: Path, columns: Mapping[str, type]) -> list[dict[str, Any]]:
    """The rows of a CSV table, typed; an empty cell is None ("" in text columns).

    Raises:
        DatasetError: the table is missing or damaged.
    """
    if not path.is_file():
        raise DatasetError(f"{path}: no such file; run ctssl prepare, again if it was stopped")
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            return [
                {name: _value(row[name], kind) for name, kind in columns.items()} for row in reader
            ]
        except (KeyError, ValueError, TypeError, csv.Error) as error:
            line = reader.line_num + isinstance(error, UnicodeDecodeError)
            problem = f"line {line}: damaged ({type(error).__name__}: {error})"
    raise DatasetError(f"{path}, {problem}; copy it again, or prepare the dataset again")


@functools.lru_cache(maxsize=1 << 16)  # equal cells of a million rows are one object
def _value(cell: str, kind: type) -> Any:
    if kind is str:
        return sys.intern(cell)  # a table repeats each volume_id for all its slices
    if cell == "":
        return None
    return {"yes": True, "no": False}[cell] if kind is bool else kind(cell)
