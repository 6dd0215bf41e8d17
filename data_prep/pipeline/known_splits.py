"""Splits that patients have in other datasets, for --same_splits_as: no one learns from another's test patients."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.dataset import Dataset
from data_prep.privacy import pseudonyms
from data_prep.system.errors import InputError

KEY_FILE = "pseudonym_key"  # in an audit directory


@dataclasses.dataclass(frozen=True)
class KnownSplits:
    """Of the datasets that the user named."""

    directories: tuple[Path, ...]
    fingerprints: tuple[str, ...]
    key_fingerprint: str
    split_of: Mapping[str, str]  # patient -> split

    @property
    def named(self) -> str:
        return "--same_splits_as=" + ",".join(map(str, self.directories))


def read_known_splits(directories: Sequence[Path]) -> KnownSplits | None:
    """None: no dataset was named.

    Raises:
        InputError: they have different pseudonym keys, or a patient in different splits.
        data_prep.dataset.DatasetError: one of them is not a complete dataset.
    """
    if not directories:
        return None
    preparations = [Dataset.open(directory).preparation for directory in directories]
    split_of: dict[str, str] = {}
    found = KnownSplits(
        directories=tuple(directories),
        fingerprints=tuple(preparation["fingerprint"] for preparation in preparations),
        key_fingerprint=preparations[0]["key_fingerprint"],
        split_of=split_of,
    )
    if len({preparation["key_fingerprint"] for preparation in preparations}) > 1:
        raise InputError(f"{found.named}: have different pseudonym keys; name those of one key")
    for directory in directories:
        here = {row["patient_id"]: row["split"] for row in Dataset.open(directory).volumes()}
        if differing := number_that_differ(here, split_of):
            raise InputError(f"{found.named}: {differing} patients are in different splits of them; leave one out")
        split_of |= here
    return found


def refuse_other_key(known: KnownSplits, key_file: Path | None, audit_dir: Path) -> None:
    """Raises InputError unless the key of this preparation is the one of the known splits."""
    path = key_file or audit_dir / KEY_FILE
    if not path.is_file() or pseudonyms.key_fingerprint(pseudonyms.read_key(path)) != known.key_fingerprint:
        raise InputError(
            f"{known.named}: has another pseudonym key, so its patients cannot be told here; give the key it was "
            "prepared with as --pseudonym_key_file"
        )


def refuse_other_splits(known: KnownSplits, own: Mapping[str, str]) -> None:
    """Raises InputError if patients of this dataset (`own`: patient -> split) were put into other splits earlier."""
    if differing := number_that_differ(own, known.split_of):
        raise InputError(
            f"{known.named}: {differing} patients are in another split there than in this dataset, where they stay; "
            "prepare it anew with another --output_dir"
        )


def number_that_differ(a: Mapping[str, str], b: Mapping[str, str]) -> int:
    """Number of patients that are in both with different splits."""
    return sum(b.get(patient, split) != split for patient, split in a.items())
