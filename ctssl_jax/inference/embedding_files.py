"""Files of embeddings: one part a volume while the work lasts, then FILE.parquet or FILE.npz.

    FILE.parquet          a row a slice: `volume_id`, `patient_id`, `slice_index`, `position_mm`,
                          `embedding` (fixed-size list of D float32)
    FILE.volumes.parquet  a row a volume: `volume_id`, `patient_id`, `split`, `num_slices`, `mean`
                          and `max` over the slices
    FILE.npz              the same as arrays. For V volumes: `volume_id`, `patient_id`, `split`,
                          `num_slices`, `mean` and `max` [V, D]. For N slices: `slice_volume` (index
                          of the volume), `slice_index`, `position_mm`, `embedding` [N, D]

The settings that made them are JSON: under `ctssl_jax` in the metadata of both schemas, and in the
array `facts` of FILE.npz. All bytes depend on the content alone: equal embeddings, equal files.
"""

import io
import json
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.raw.scans import Refused
from data_prep.system.errors import InputError
from data_prep.system.files import write_file, written_whole

FORMATS = (".parquet", ".npz")
_METADATA = b"ctssl_jax"


class VolumeEmbedding(NamedTuple):
    """The embeddings of a volume.

    volume_id, patient_id: pseudonyms.
    split: of the dataset; "" for raw scans.
    position_mm: [S] float32, along the slice normal.
    slices: [S, D] float32, towards superior.
    mean, max: [D] float32 over the slices.
    """

    volume_id: str
    patient_id: str
    split: str
    position_mm: np.ndarray
    slices: np.ndarray
    mean: np.ndarray
    max: np.ndarray


def check_format(output: Path) -> None:
    """Refuse an output of another ending, or Parquet without pyarrow.

    Raises:
      InputError: names the remedy.
    """
    if output.suffix not in FORMATS:
        raise InputError(f"--output={output} must end in {' or '.join(FORMATS)}")
    if output.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise InputError(
                f"--output={output}: Parquet needs pyarrow; pip install pyarrow, or give an .npz"
            ) from None


def volumes_path(output: Path) -> Path:
    """FILE.parquet -> FILE.volumes.parquet."""
    return output.with_suffix(".volumes.parquet")


# ---- parts ---------------------------------------------------------------------------------------


def write_part(path: Path, content: VolumeEmbedding | Refused) -> None:
    """Write the embedding of one volume, or its refusal, in full or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **content._asdict())
    write_file(path, buffer.getvalue())


def read_part(path: Path) -> VolumeEmbedding | Refused:
    """The inverse of `write_part`."""
    with np.load(path) as arrays:
        fields = {
            name: arrays[name] if arrays[name].ndim else arrays[name].item()
            for name in arrays.files
        }
    return Refused(**fields) if "reason" in fields else VolumeEmbedding(**fields)


# ---- results -------------------------------------------------------------------------------------


def write(
    output: Path, volumes: Iterable[VolumeEmbedding], embedding_dim: int, facts: dict[str, Any]
) -> None:
    """Write the results; FILE itself is written last, and completes them.

    Args:
      output: FILE.parquet (a volume at a time is in memory) or FILE.npz (all embeddings are).
      volumes: in the order of the rows; at least one.
      embedding_dim: D.
      facts: the settings, in types of JSON.
    """
    text = json.dumps(facts, sort_keys=True)
    if output.suffix == ".parquet":
        _write_parquet(output, volumes, embedding_dim, text)
    else:
        _write_npz(output, list(volumes), text)


def read_facts(output: Path) -> dict[str, Any] | None:
    """The settings of existing results; None without results, or for other files of these names."""
    try:
        if output.suffix == ".npz":
            with np.load(output) as arrays:
                return json.loads(str(arrays["facts"]))
        import pyarrow.parquet as parquet

        facts = [
            parquet.read_schema(path).metadata[_METADATA] for path in (output, volumes_path(output))
        ]
        return json.loads(facts[0]) if facts[0] == facts[1] else None
    except Exception:  # files that are absent, damaged or of another kind are written again
        return None


def _write_parquet(
    output: Path, volumes: Iterable[VolumeEmbedding], embedding_dim: int, facts: str
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    embedding = pa.list_(pa.float32(), embedding_dim)
    names = [("volume_id", pa.string()), ("patient_id", pa.string())]
    of_slices = [
        ("slice_index", pa.int32()),
        ("position_mm", pa.float32()),
        ("embedding", embedding),
    ]
    of_volumes = [
        ("split", pa.string()),
        ("num_slices", pa.int32()),
        ("mean", embedding),
        ("max", embedding),
    ]
    metadata = {_METADATA: facts.encode()}
    slice_schema = pa.schema([*names, *of_slices], metadata)
    volume_schema = pa.schema([*names, *of_volumes], metadata)
    rows = []
    with written_whole(
        output, output.with_name(f"{output.name}.{uuid.uuid4().hex}.partial")
    ) as temporary:
        with parquet.ParquetWriter(temporary, slice_schema) as writer:
            for volume in volumes:
                number = len(volume.slices)
                columns = {
                    "volume_id": pa.array([volume.volume_id] * number),
                    "patient_id": pa.array([volume.patient_id] * number),
                    "slice_index": pa.array(np.arange(number, dtype=np.int32)),
                    "position_mm": pa.array(volume.position_mm),
                    "embedding": pa.FixedSizeListArray.from_arrays(
                        pa.array(volume.slices.ravel()), embedding_dim
                    ),
                }
                writer.write_table(pa.table(columns, schema=slice_schema))
                row = volume._asdict() | {"num_slices": number}
                rows.append({name: row[name] for name in volume_schema.names})
        buffer = io.BytesIO()
        parquet.write_table(pa.Table.from_pylist(rows, schema=volume_schema), buffer)
        write_file(volumes_path(output), buffer.getvalue())


def _write_npz(output: Path, volumes: list[VolumeEmbedding], facts: str) -> None:
    num_slices = np.array([len(volume.slices) for volume in volumes], np.int32)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        volume_id=np.array([volume.volume_id for volume in volumes]),
        patient_id=np.array([volume.patient_id for volume in volumes]),
        split=np.array([volume.split for volume in volumes]),
        num_slices=num_slices,
        mean=np.stack([volume.mean for volume in volumes]),
        max=np.stack([volume.max for volume in volumes]),
        slice_volume=np.repeat(np.arange(len(volumes), dtype=np.int32), num_slices),
        slice_index=np.concatenate([np.arange(number, dtype=np.int32) for number in num_slices]),
        position_mm=np.concatenate([volume.position_mm for volume in volumes]),
        embedding=np.concatenate([volume.slices for volume in volumes]),
        facts=np.array(facts),
    )
    write_file(output, buffer.getvalue())
