"""Patients with several pseudonyms: the one that new volumes get, so that a grown dataset keeps its
pseudonyms and splits.

A patient has several pseudonyms where the scans carry several Patient IDs
(`data_prep.scan.patients`), where the same pixels lie under several patients, or where programs
before version 2 of the rules read the Patient ID otherwise.
"""

import array
import collections
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.pipeline.assemble import NewVolume
from data_prep.pipeline.notes import read_note
from data_prep.pipeline.options import Directories
from data_prep.pipeline.splits import KnownSplits
from data_prep.privacy.pseudonyms import patient_pseudonym
from data_prep.scan.patients import Patients, merged, spellings_like
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


def other_spellings(
    key: bytes, patient_keys: Iterable[str], known: Collection[str]
) -> list[set[str]]:
    """The pseudonyms of patients whom a dataset knows under another spelling of the Patient ID.

    Args:
        key: of the pseudonyms.
        patient_keys: of the archive.
        known: pseudonyms in datasets.
    """
    if not known:
        return []
    groups = []
    for patient_key in patient_keys:
        others = {patient_pseudonym(key, one) for one in spellings_like(patient_key)}
        if others := others.intersection(known):
            groups.append({patient_pseudonym(key, patient_key), *others})
    return groups


def people_counts(
    key: bytes, patients: Patients, same_pixels: Iterable[Iterable[str]]
) -> dict[str, int]:
    """Parts of the counts of preparation.json, without zeros.

    `patients_joined`: patients whose scans carry several names. `placeholder_uids`: UIDs that too
    many, or different, patients share to name one.
    """
    joined = ((one, k) for k, one in patients.key_of.items())
    groups = [{patient_pseudonym(key, one), patient_pseudonym(key, k)} for one, k in joined]
    num_joined = sum(len(group) > 1 for group in merged([*groups, *same_pixels]))
    counts = {"patients_joined": num_joined, "placeholder_uids": patients.num_placeholders}
    return {name: number for name, number in counts.items() if number}


def sharing_pixels(
    directories: Directories,
    old_volumes: Iterable[Mapping[str, Any]],
    new_volumes: Mapping[str, NewVolume],
    chosen: Mapping[str, str],
) -> list[set[str]]:
    """Groups of pseudonyms of patients whose volumes have the same images, whole or in part.

    Args:
        directories: where the notes lie.
        old_volumes: rows of volumes.csv of earlier runs.
        new_volumes: by key of the note.
        chosen: of `chosen_pseudonyms`.
    """

    def volumes() -> Iterator[tuple[str, Sequence[str]]]:
        for row in old_volumes if new_volumes else ():
            path = directories.kept_notes_dir / f"{row['volume_id']}.json"
            yield row["patient_id"], read_note(path).pixels
        for name, volume in new_volumes.items():
            patient = chosen.get(volume.patient_id, volume.patient_id)
            yield patient, read_note(directories.notes_dir / f"{name}.json").pixels

    return patients_sharing(volumes())


def patients_sharing(volumes: Iterable[tuple[str, Sequence[str]]]) -> list[set[str]]:
    """Groups of patients of whom two volumes share `pixel_digests`; volumes: (patient, digests)."""
    patients, numbers = [], array.array("I")
    digests = array.array("Q")  # 8 bytes each: a million volumes have 16 million
    for patient, of_volume in volumes:
        patients.append(patient)
        numbers.append(len(of_volume))
        digests.extend(int(digest, 16) for digest in of_volume)
    owners = np.repeat(np.arange(len(patients), dtype=np.uint32), numbers)
    images = np.array(digests, np.uint64)
    order = np.argsort(images, kind="stable")  # of one image, the first volume comes first
    images, owners = images[order], owners[order]
    again = np.flatnonzero(images[1:] == images[:-1]) + 1
    first = np.searchsorted(images, images[again])
    shared = collections.Counter(zip(owners[first].tolist(), owners[again].tolist(), strict=True))
    return merged(
        {patients[first], patients[other]}
        for (first, other), number in shared.items()
        if patients[first] != patients[other]
        and number >= min(_SHARED_IMAGES, numbers[first], numbers[other])
    )


def under_one_pseudonym(
    row: dict[str, Any], chosen: Mapping[str, str], same_pixels: Iterable[set[str]]
) -> dict[str, Any]:
    """A row of volumes.csv under the chosen pseudonym of its patient; a note says so where pixels
    told the patient."""
    patient = chosen.get(row["patient_id"], row["patient_id"])
    notes = row["notes"].split()
    if any(name in group for group in same_pixels for name in (patient, row["patient_id"])):
        notes = [*dict.fromkeys([*notes, "patient_ids_joined"])]
    return row | {"patient_id": patient, "notes": " ".join(notes)}


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
