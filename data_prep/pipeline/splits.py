"""Training, validation and test split, by patient.

Datasets of one pseudonym key have the same pseudonyms and take patients in the same order. Their
splits are the same only if they were made at once from the same patients with the same options:
each dataset keeps the split of a patient in its own audit directory. With --same_splits_as a
dataset takes over the splits of others, so that no training uses test patients of another dataset.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import SPLITS
from data_prep.privacy.pseudonyms import key_fingerprint, read_key
from data_prep.system.errors import InputError


def check_numbers(
    num_patients: int, num_volumes: int, fractions: Sequence[float], holdout_volumes: int
) -> None:
    """Raises InputError if there are fewer patients than splits that must not be empty, or if the
    hold-out would be more than half of the volumes."""
    wanted = _wanted_splits(fractions, holdout_volumes)
    if num_patients < len(wanted):
        shared = (
            f" (all {num_volumes} scans have one Patient ID)"
            if num_patients == 1 < num_volumes
            else ""
        )
        raise InputError(
            f"{num_patients} patient{'s' * (num_patients != 1)} with a usable scan{shared} cannot "
            f"fill the splits {', '.join(wanted)}; give scans of {len(wanted)} patients or more. "
            "Two patients can be trained on without a test (--splits=0.5,0.5,0), one can be "
            "described and embedded (--splits=1,0,0)"
        )
    if 2 * holdout_volumes > num_volumes:
        raise InputError(
            f"--holdout_volumes={holdout_volumes}: more than half of the {num_volumes} usable "
            f"volumes; give at most {num_volumes // 2}, or 0 to go by --splits"
        )


def assign_splits(
    volumes_per_patient: Mapping[str, int],
    fractions: Sequence[float],
    holdout_volumes: int,
    known: Mapping[str, str],
) -> dict[str, str]:
    """The split of every patient.

    Patients that are `known` keep their split. The others are taken in the order of
    `volumes_per_patient`, which must not depend on anything but the patients (their keyed hash):
    with `holdout_volumes` 0, each goes to the split that lacks most of its share of patients; else
    first the test split gets the whole patients whose number of volumes comes nearest to the number
    that it lacks, and training and validation share the others. If there are as many patients as
    splits with a share, no such split is empty.

    Args:
        volumes_per_patient: number of volumes by patient, also of known patients.
        fractions: of the patients in training, validation, test; only the ratio of the first two
            counts with `holdout_volumes`.
        holdout_volumes: number of test volumes; 0: go by fractions.
        known: split by patient, from earlier runs.

    Raises:
        InputError: too few patients or volumes, or the known splits leave a split empty.
    """
    num_volumes = sum(volumes_per_patient.values())
    check_numbers(len(volumes_per_patient), num_volumes, fractions, holdout_volumes)
    wanted = _wanted_splits(fractions, holdout_volumes)
    splits = {patient: known[patient] for patient in volumes_per_patient if patient in known}
    new = [patient for patient in volumes_per_patient if patient not in known]
    if holdout_volumes:
        held = sum(
            volumes_per_patient[patient] for patient, split in splits.items() if split == "test"
        )
        lacking = set(wanted) - {"test"} - set(splits.values())
        free = new[len(lacking) :]  # the first patients are kept for splits that would be empty
        chosen = _nearest_subset(
            [volumes_per_patient[patient] for patient in free], holdout_volumes - held, held == 0
        )
        splits |= {free[index]: "test" for index in chosen}
        fractions = (fractions[0], fractions[1], 0.0)
    counted = {
        patient: split
        for patient, split in splits.items()
        if not (holdout_volumes and split == "test")
    }
    total = len(volumes_per_patient) - (len(splits) - len(counted))
    counts = {split: list(counted.values()).count(split) for split in SPLITS}
    shares = _shares(total, fractions)
    for patient in new:
        if patient in splits:
            continue
        shared = [split for split, fraction in zip(SPLITS, fractions, strict=True) if fraction > 0]
        empty = [split for split in shared if not counts[split]]
        choice = max(empty or shared, key=lambda split: shares[split] - counts[split])
        splits[patient] = choice
        counts[choice] += 1
    empty = [split for split in wanted if split not in splits.values()]
    if empty:
        raise InputError(
            f"no patient is left for the splits {', '.join(empty)}, as splits.json in the audit "
            "directory or --same_splits_as keeps all in others; give --splits that leave them out, "
            "or another --audit_dir to assign them again"
        )
    return {patient: splits[patient] for patient in volumes_per_patient}


def _wanted_splits(fractions: Sequence[float], holdout_volumes: int) -> list[str]:
    wanted = [split for split, fraction in zip(SPLITS, fractions, strict=True) if fraction > 0]
    return sorted({*wanted, "test"}, key=SPLITS.index) if holdout_volumes else wanted


def _shares(total: int, fractions: Sequence[float]) -> dict[str, int]:
    """Whole numbers near `fractions` of `total` that sum to `total`, at least 1 where the fraction
    is not 0 (if `total` suffices): largest remainders."""
    scale = sum(fractions) or 1.0
    exact = [total * fraction / scale for fraction in fractions]
    shares = [
        max(int(share), 1) if fraction > 0 else 0
        for share, fraction in zip(exact, fractions, strict=True)
    ]
    while sum(shares) < total:
        shares[max(range(3), key=lambda i: exact[i] - shares[i])] += 1
    while sum(shares) > total:
        shares[max(range(3), key=lambda i: (shares[i] > 1, shares[i] - exact[i]))] -= 1
    return dict(zip(SPLITS, shares, strict=True))


def _nearest_subset(sizes: Sequence[int], target: int, at_least_one: bool) -> list[int]:
    """Indices of a subset of `sizes` whose sum is nearest to `target`; the smaller sum of two.

    Of several such subsets, the earliest sizes that reach the sum.
    """
    reached: dict[int, int] = {0: -1}  # sum -> index of the size that reached it first
    limit = max(target, 0) + max(sizes, default=0)
    for index, size in enumerate(sizes):
        if target in reached and target > 0:
            break
        for before in list(reached):
            if before + size <= limit:
                reached.setdefault(before + size, index)
    sums = [total for total in reached if total > 0 or not at_least_one]
    if not sums:
        return []
    total = min(sums, key=lambda total: (abs(total - target), total))
    chosen = []
    while total > 0:
        chosen.append(reached[total])
        total -= sizes[reached[total]]
    return list(reversed(chosen))


def cut_into_shards(sizes: Sequence[int], shard_bytes: int) -> list[range]:
    """Consecutive ranges of volumes, each of at most `shard_bytes` unless a single volume is
    larger."""
    shards, start, filled = [], 0, 0
    for index, size in enumerate(sizes):
        if index > start and filled + size > shard_bytes:
            shards.append(range(start, index))
            start, filled = index, 0
        filled += size
    if start < len(sizes):
        shards.append(range(start, len(sizes)))
    return shards


def running_totals(values: Sequence[int]) -> list[int]:
    """The sum of all values before each value."""
    return [0, *itertools.accumulate(values)][:-1]


# ---- splits of other datasets ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class KnownSplits:
    """The splits of the datasets that the user named."""

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
        DatasetError: a directory is not a complete dataset.
    """
    if not directories:
        return None
    datasets = [Dataset.open(directory) for directory in directories]
    split_of: dict[str, str] = {}
    known = KnownSplits(
        directories=tuple(directories),
        fingerprints=tuple(dataset.fingerprint for dataset in datasets),
        key_fingerprint=datasets[0].preparation["key_fingerprint"],
        split_of=split_of,
    )
    if len({dataset.preparation["key_fingerprint"] for dataset in datasets}) > 1:
        raise InputError(f"{known.named}: have different pseudonym keys; name datasets of one key")
    for dataset in datasets:
        here = {row["patient_id"]: row["split"] for row in dataset.volumes()}
        if differing := number_that_differ(here, split_of):
            raise InputError(
                f"{known.named}: {differing} patients are in different splits of them; leave one "
                "out"
            )
        split_of |= here
    return known


def refuse_other_key(known: KnownSplits, key_file: Path) -> None:
    """Raises InputError unless this preparation has the key of the known splits."""
    if not key_file.is_file() or key_fingerprint(read_key(key_file)) != known.key_fingerprint:
        raise InputError(
            f"{known.named}: has another pseudonym key, so its patients are unknown here; give its "
            "key as --pseudonym_key_file"
        )


def refuse_other_splits(known: KnownSplits, own: Mapping[str, str]) -> None:
    """Raises InputError if patients of this dataset (`own`: patient -> split) were put into other
    splits earlier."""
    if differing := number_that_differ(own, known.split_of):
        raise InputError(
            f"{known.named}: {differing} patients are in another split there than in this dataset, "
            "where they stay; prepare it again with another --output_dir"
        )


def number_that_differ(a: Mapping[str, str], b: Mapping[str, str]) -> int:
    """Number of patients that are in both with different splits."""
    return sum(b.get(patient, split) != split for patient, split in a.items())
