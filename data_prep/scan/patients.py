"""Who is the same patient: Patient IDs that are spelled in several ways, missing in part, or differ
between copies of one scan.

Training, validation and test are split by patient, so two names of one patient may put the same
images into two splits. Patient keys (`Header.patient_key`: the Patient ID, or a name made of the
Study Instance UID where the ID is missing) are one patient where

- the IDs differ only in case, blanks, width of letters (NFKC), or an issuer as HL7 appends it
  (`4711^^^HOSPITAL`);
- images of one Series Instance UID, one Study Instance UID or one SOP Instance UID carry them.

A UID that more than four IDs share is a placeholder that names nothing, and so is a SOP Instance
UID that recurs within a series, or a UID that a man and a woman share, or two whose ages differ by
more than two years. (If their pixels are the same, `data_prep.pipeline.known_patients` joins them.)
Otherwise doubtful cases are joined: to join two patients by mistake costs the splits a patient; not
to join one patient costs the test its worth.

    people = People()
    people.add(identities(headers))      # of any part of an archive, in any order
    patients = people.resolve()
    headers = [patients.named(header) for header in headers]
"""

import array
import collections
import dataclasses
import hashlib
import itertools
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data_prep.scan.headers import Header

_NOBODY = "study:"  # the key of images without Patient ID and Study Instance UID
# HL7 (CX): check digit and its scheme, mostly empty, then the issuer
_ISSUER = re.compile(r" ?\^([0-9]?\^[a-z0-9]{0,3})\^[^^]*(\^.*)?$", re.IGNORECASE)
_SAME_AGE = 2  # years
_MOST_IDS = 4  # of one patient under one UID; more mean a placeholder


class Identity(NamedTuple):
    """What some images say about their patient."""

    patient_key: str
    patient_id: str
    key_before: str  # `patient_key` of programs before version 2 of the rules
    study_uid: str
    series_uid: str
    sex: str
    age: int | None

    @property
    def spelling(self) -> str:
        """`spelling_of` the Patient ID."""
        return spelling_of(self.patient_id)


def identities(headers: Iterable[Header]) -> dict[Identity, list[int]]:
    """The identities of images, each with a digest of the SOP Instance UID of each image."""
    found: dict[Identity, list[int]] = collections.defaultdict(list)
    for header in headers:
        study, before = header.study_instance_uid, header.patient_id_before
        key = header.patient_id or _key_of_study(study)
        identity = Identity(
            key,
            header.patient_id,
            key if before is None else before or _key_of_study(study),
            study,
            header.series_instance_uid,
            header.sex,
            header.age,
        )
        digests = found[identity]
        if header.sop_instance_uid:
            content = header.sop_instance_uid.encode("utf-8", "backslashreplace")
            digests.append(int.from_bytes(hashlib.sha256(content).digest()[:8]))
    return dict(found)


@dataclasses.dataclass(frozen=True)
class Patients:
    """The patients of an archive that have several keys.

    key_of: key -> the one key of its patient.
    keys_of: one key of a patient -> all keys by which datasets may know the patient.
    reasons: one key of a patient -> why its keys are one patient.
    num_placeholders: UIDs that too many Patient IDs share to name anything, or different people.
    study_of: Series Instance UID -> its Study Instance UID, of series that lack it in part.
    """

    key_of: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keys_of: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    reasons: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    num_placeholders: int = 0
    study_of: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def named(self, header: Header) -> Header:
        """The header under the one key of its patient, in the study of its series."""
        study = header.study_instance_uid or self.study_of.get(header.series_instance_uid)
        if study and not header.study_instance_uid:
            header = dataclasses.replace(header, study_instance_uid=study)
        key = self.key_of.get(header.patient_key)
        return header if key is None else dataclasses.replace(header, patient=key)


class People:
    """Collects the identities of an archive, about 16 bytes an image."""

    def __init__(self, known: Iterable[Sequence[str]] = ()) -> None:
        """`known`: keys that earlier runs took for one patient."""
        self._numbers: dict[Identity, int] = {}
        self._instances = array.array("Q")  # digests, 8 bytes an image
        self._owners = array.array("I")  # numbers of identities
        self._known = [tuple(keys) for keys in known]

    def add(self, found: Mapping[Identity, Sequence[int]]) -> None:
        """Adds a part of the archive."""
        for identity, digests in found.items():
            number = self._numbers.setdefault(identity, len(self._numbers))
            self._instances.extend(digests)
            self._owners.extend(itertools.repeat(number, len(digests)))

    def resolve(self) -> Patients:
        """The patients with several keys. The order of `add` makes no difference."""
        study_of = self._studies()
        everything = [_in_study(identity, study_of) for identity in self._numbers]
        joins, num_placeholders = self._joins(everything)
        reasons_of_key: dict[str, set[str]] = collections.defaultdict(set)
        for keys, reason in joins:
            for key in keys:
                reasons_of_key[key].add(reason)
        before: dict[str, set[str]] = collections.defaultdict(set)
        for identity in everything:
            if identity.key_before not in (identity.patient_key, _NOBODY):
                before[identity.patient_key].add(identity.key_before)
        present = {identity.patient_key: identity.patient_id for identity in everything}
        key_of, keys_of, reasons = {}, {}, {}
        for group in merged([*(keys for keys, _ in joins), *([key] for key in before)]):
            here = group & present.keys()
            if not here:
                continue
            one = min(here, key=lambda key: (not present[key], key))  # an ID, if there is one
            if len(here) > 1:
                key_of |= dict.fromkeys(here, one)
                reasons[one] = tuple(sorted(set().union(*(reasons_of_key[key] for key in here))))
            keys_of[one] = tuple(sorted(group.union(*(before[key] for key in here))))
        return Patients(key_of, keys_of, reasons, num_placeholders, study_of)

    def _joins(self, everything: Sequence[Identity]) -> tuple[list[tuple[set[str], str]], int]:
        """(keys of one patient, reason), and the number of UIDs that name nobody."""
        sharing = [
            (people, kind)
            for kind in ("spelling", "series_uid", "study_uid")
            for people in _sharing(everything, kind)
        ]
        sharing += [(people, "instances") for people in self._sharing_instances(everything)]
        sharing = [(people, kind) for people, kind in sharing if len(people) > 1]
        joins = [
            (set(people), kind.removesuffix("_uid"))
            for people, kind in sharing
            if kind == "spelling" or _is_one(people.values())
        ]
        known = [(set(keys), "earlier run") for keys in self._known]
        return [*joins, *known], len(sharing) - len(joins)

    def _studies(self) -> dict[str, str]:
        studies: dict[str, set[str]] = collections.defaultdict(set)
        for identity in self._numbers:
            if identity.series_uid:
                studies[identity.series_uid].add(identity.study_uid)
        return {
            series: max(of_series)
            for series, of_series in studies.items()
            if len(of_series) == 2 and "" in of_series
        }

    def _sharing_instances(self, everything: Sequence[Identity]) -> list[dict[str, Identity]]:
        """The identities under which one SOP Instance UID lies, by patient key."""
        if not self._instances:
            return []
        instances = np.frombuffer(self._instances, np.uint64)
        owners = np.frombuffer(self._owners, np.uint32)
        order = np.lexsort((owners, instances))
        instances, owners = instances[order], owners[order]
        same = instances[1:] == instances[:-1]
        recurring = instances[1:][same & (owners[1:] == owners[:-1])]
        several = np.setdiff1d(instances[1:][same], recurring)
        if not len(several):
            return []
        chosen = np.isin(instances, several)
        starts = np.flatnonzero(np.diff(instances[chosen])) + 1
        groups = {tuple(group.tolist()) for group in np.split(owners[chosen], starts)}
        members = ([everything[number] for number in group] for group in groups)
        return [{i.patient_key: i for i in of if i.patient_key != _NOBODY} for of in members]


def spelling_of(patient_id: str) -> str:
    """A Patient ID without the differences that people and systems make: case, wide letters, an
    issuer, blanks except between two numbers (`P 1 11` is not `P 11 1`)."""
    text = " ".join(unicodedata.normalize("NFKC", patient_id).split()).casefold()
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", _ISSUER.sub("", text))


def spellings_like(patient_key: str) -> set[str]:
    """Usual spellings of a patient key whose `spelling_of` is the same, to look it up by name."""
    text = " ".join(unicodedata.normalize("NFKC", patient_key).split())
    issuer = _ISSUER.search(text)
    plain = text[: issuer.start()] if issuer else text
    bases = {patient_key, text, plain, re.sub(r"(?<![0-9]) | (?![0-9])", "", plain)}
    if patient_key.startswith(_NOBODY):
        return {patient_key}
    return bases | {base.upper() for base in bases} | {base.lower() for base in bases}


def merged(groups: Iterable[Iterable[str]]) -> list[set[str]]:
    """Groups that share a member become one."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    for group in groups:
        first, *others = sorted(group)
        root(first)
        for other in others:
            a, b = sorted((root(first), root(other)))
            parent[b] = a
    members: dict[str, set[str]] = collections.defaultdict(set)
    for name in parent:
        members[root(name)].add(name)
    return list(members.values())


def _sharing(everything: Sequence[Identity], field: str) -> list[dict[str, Identity]]:
    """The identities under which one value of a field lies, by patient key, if they are several."""
    first: dict[str, str] = {}
    people: dict[str, dict[str, Identity]] = {}
    for identity in everything:
        value = getattr(identity, field)
        if value and identity.patient_key != _NOBODY:
            if first.setdefault(value, identity.patient_key) != identity.patient_key:
                people[value] = {}
    del first  # which mostly holds all
    if people:
        some = [one for one in everything if getattr(one, field) in people]
        for identity in sorted(some, key=repr):  # whatever the order of `add`
            if identity.patient_key != _NOBODY:
                people[getattr(identity, field)][identity.patient_key] = identity
    return list(people.values())


def _is_one(people: Collection[Identity]) -> bool:
    """Whether the people who share a UID may be one patient."""
    spellings = {person.spelling for person in people} - {""}
    sexes = {person.sex for person in people} & {"F", "M"}
    ages = [person.age for person in people if person.age is not None]
    same_age = not ages or max(ages) - min(ages) <= _SAME_AGE
    return len(spellings) <= _MOST_IDS and len(sexes) < 2 and same_age


def _in_study(identity: Identity, study_of: Mapping[str, str]) -> Identity:
    study = identity.study_uid or study_of.get(identity.series_uid, "")
    key = identity.patient_id or _key_of_study(study)
    if (study, key) == (identity.study_uid, identity.patient_key):
        return identity  # a million of them need no copies
    return identity._replace(study_uid=study, patient_key=key)


def _key_of_study(study_uid: str) -> str:
    return f"study:{study_uid}"
