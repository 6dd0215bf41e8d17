"""Patients with several pseudonyms: the one that new volumes get, so that a grown dataset keeps its
pseudonyms and splits.

A patient has several pseudonyms where the scans carry several Patient IDs
(`data_prep.scan.patients`), where the same pixels lie under several patients, or where programs
before version 2 of the rules read the Patient ID otherwise.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from data_prep.pipeline.splits import KnownSplits
from data_prep.privacy.pseudonyms import patient_pseudonym
from data_prep.scan.patients import Patients, merged
from data_prep.system.errors import InputError

_SHARED_IMAGES = 3  # of the `pixel_digests` of two volumes: the same scan, whole or in part


@dataclasses.dataclass(frozen=True)
class KnownPatients:
    """What later runs need to know of patients with several names. Stored as JSON in the private
    audit directory.

    keys: patient keys of each such patient.
    pseudonyms: pseudonyms of each patient whose pixels lie under several patients.
    """

    keys: tuple[tuple[str, ...], ...] = ()
    pseudonyms: tuple[tuple[str, ...], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """In the types that JSON gives back; {} if there are none."""
        fields = {name: list(map(list, group)) for name, group in vars(self).items()}
        return fields if any(fields.values()) else {}

    @staticmethod
    def of(stored: Mapping[str, Any]) -> "KnownPatients":
        """From `as_dict`."""
        return KnownPatients(**{name: tuple(map(tuple, of)) for name, of in stored.items()})

    def after(self, patients: Patients, same_pixels: Iterable[Iterable[str]]) -> "KnownPatients":
        """With the patients of this run."""
        keys = (patients.keys_of[one] for one in patients.reasons)
        return KnownPatients(
            _sorted(merged([*self.keys, *keys])), _sorted(merged([*self.pseudonyms, *same_pixels]))
        )


def _sorted(groups: Iterable[Iterable[str]]) -> tuple[tuple[str, ...], ...]:
    return tuple(sorted(tuple(sorted(group)) for group in groups))


def pseudonym_groups(key: bytes, patients: Patients, known: KnownPatients) -> list[set[str]]:
    """The pseudonyms of each patient that may have several."""
    groups = [{patient_pseudonym(key, k) for k in keys} for keys in patients.keys_of.values()]
    return merged([*groups, *known.pseudonyms])


def num_joined(key: bytes, patients: Patients, same_pixels: Iterable[Iterable[str]]) -> int:
    """Number of patients whose scans carry several names."""
    joined = ((one, k) for k, one in patients.key_of.items())
    groups = [{patient_pseudonym(key, one), patient_pseudonym(key, k)} for one, k in joined]
    return sum(len(group) > 1 for group in merged([*groups, *same_pixels]))


def sharing_pixels(digests: Mapping[str, tuple[str, Iterable[str]]]) -> list[set[str]]:
    """The patients of volumes that share images.

    Args:
        digests: volume -> (pseudonym of its patient, `pixel_digests`).

    Returns:
        Groups of pseudonyms, of two or more.
    """
    volumes_of: dict[str, list[str]] = collections.defaultdict(list)
    for volume, (_, of_volume) in digests.items():
        for digest in set(of_volume):
            volumes_of[digest].append(volume)
    shared = collections.Counter(
        (first, other) for first, *others in volumes_of.values() for other in others
    )
    groups = []
    for (first, other), number in shared.items():
        (a, of_a), (b, of_b) = digests[first], digests[other]
        enough = min(_SHARED_IMAGES, len(set(of_a)), len(set(of_b)))
        if a != b and number >= enough:
            groups.append({a, b})
    return merged(groups)


def chosen_pseudonyms(
    groups: Iterable[set[str]], own: Mapping[str, str], elsewhere: KnownSplits | None
) -> dict[str, str]:
    """Pseudonym -> the one that new volumes of its patient get, where they differ.

    A pseudonym of the dataset comes first, then one of --same_splits_as, then the smallest.

    Args:
        groups: the pseudonyms of each patient; they share none.
        own: the splits of this dataset.
        elsewhere: the splits of other datasets.

    Raises:
        InputError: two pseudonyms of a patient are in different splits.
    """
    chosen = {}
    for group in groups:
        for splits, named in (
            (own, "of this dataset"),
            (elsewhere.split_of if elsewhere else {}, f"of {elsewhere.named}" if elsewhere else ""),
        ):
            by_split = {
                splits[name]: name for name in sorted(group, reverse=True) if name in splits
            }
            if len(by_split) > 1:
                raise InputError(
                    f"the patients {' and '.join(sorted(by_split.values()))} {named} are one "
                    "patient (the same images, series or study, or another spelling of the Patient "
                    f"ID), and lie in the different splits {' and '.join(sorted(by_split))}; "
                    "prepare all scans into a new --output_dir, or leave the new scans out"
                )
        known = [name for name in sorted(group) if name in own]
        known += [name for name in sorted(group) if elsewhere and name in elsewhere.split_of]
        one = (known or sorted(group))[0]
        chosen |= {name: one for name in group if name != one}
    return chosen
