"""Pseudonyms, and what of a header may be published.

A pseudonym is an HMAC-SHA256 under a key that stays with the archive's owner: without the key it
cannot be traced back by trying patient IDs or UIDs, with the same key it is the same in every run,
so that re-runs and grown archives agree. Of the headers only `public_fields` leave the archive: no
dates, names, UIDs, accession numbers, institutions or free-text descriptions.
"""

import dataclasses
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep.scan.archives import Source
from data_prep.scan.headers import Header
from data_prep.scan.series import Rejection, SeriesCandidate
from data_prep.system.errors import InputError
from data_prep.system.files import write_file

KEY_FILE = "pseudonym_key"  # in an audit directory

_PSEUDONYM_LENGTH = 32  # hexadecimal digits: 128 bits
_SHORTEST_KEY = 16  # bytes
_NOT_PUBLIC = re.compile(r"[^A-Za-z0-9 .,_+/()-]")
_LONGEST_TEXT = 16
_OTHER = "other"  # stands for what may hold anything
_VENDORS = set(
    "siemens ge imatron philips picker marconi elscint toshiba canon hitachi fujifilm shimadzu "
    "uih neusoft samsung neurologica anke minfound sinovision".split()
) | {"general electric", "united imaging"}
_VENDOR_WORDS = set(
    "ag co company corp corporation ct electronics gmbh healthcare healthineers inc international "
    "ltd mec medical solutions system systems technologies".split()
)


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A row of rejected.csv with the files that it stands for."""

    series_id: str
    reason: str
    detail: str
    sources: list[Source]


def default_audit_dir(output_dir: Path) -> Path:
    """The private directory of a dataset, beside it."""
    named = output_dir if output_dir.name not in ("", "..") else output_dir.resolve()
    return named.with_name(named.name + "-audit")


def read_key(path: Path) -> bytes:
    """The pseudonym key in a file, without surrounding blanks.

    Raises:
        InputError: the file is absent or too short.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such key file; leave out --pseudonym_key_file to have a key made in the "
            f"audit directory"
        )
    key = path.read_bytes().strip()
    if len(key) < _SHORTEST_KEY:
        raise InputError(
            f"{path}: a pseudonym key has at least {_SHORTEST_KEY} bytes, this one {len(key)}"
        )
    return key


def make_key(path: Path) -> bytes:
    """Makes a random key file that only its owner can read, and returns the key; an existing one is
    read instead."""
    if not path.exists():
        write_file(path, f"{secrets.token_hex(32)}\n".encode(), mode=0o600)
    return read_key(path)


def key_fingerprint(key: bytes) -> str:
    """Names a key without giving it away: datasets with equal fingerprints have comparable patient
    pseudonyms."""
    return _digest(key, "key fingerprint")[:16]


def patient_pseudonym(key: bytes, patient_key: str) -> str:
    """Pseudonym of a patient. `patient_key` is Patient ID (0010,0020) or what stands in for it."""
    return _digest(key, "patient", patient_key)


def series_pseudonym(key: bytes, patient_key: str, study_uid: str, series_key: str) -> str:
    """Pseudonym of a series, or of one stack of it: the `volume_id` of a volume, the `series_id` of
    a rejection."""
    return _digest(key, "series", patient_key, study_uid, series_key)


def volume_id(key: bytes, candidate: SeriesCandidate) -> str:
    """Pseudonym of a volume: `volume_id` of volumes.csv."""
    return series_pseudonym(key, *candidate.exam_key, candidate.series_key)


def exam_id(key: bytes, patient_key: str, study_uid: str) -> str:
    """Pseudonym of an exam: `exam_id` of volumes.csv."""
    return series_pseudonym(key, patient_key, study_uid, "")


def rejected_row(key: bytes, rejection: Rejection) -> Rejected:
    """A rejection that was made from the headers."""
    first = rejection.headers[0]
    series_id = series_pseudonym(
        key, first.patient_key, first.study_instance_uid, rejection.series_key
    )
    return Rejected(series_id, rejection.reason, rejection.detail, sources_of(rejection.headers))


def slice_id(key: bytes, header: Header) -> str:
    """Names a slice wherever its file lies: in a renamed folder, in a zip file."""
    parts = (
        header.series_instance_uid,
        header.sop_instance_uid,
        str(header.frame),
        repr(header.position),
    )
    return private_digest(key, "slice", *parts)


def sources_of(headers: Iterable[Header]) -> list[Source]:
    """The files of some headers; a multi-frame file has many headers."""
    return sorted({header.source for header in headers})


def shuffling_number(key: bytes, pseudonym: str) -> str:
    """What splits and shards are ordered by: as good as random, and the same in every run."""
    return _digest(key, "order", pseudonym)


def private_digest(key: bytes, *parts: str) -> str:
    """A name for private facts (file lists) that tells nothing of them."""
    return _digest(key, "private", *parts)


def _digest(key: bytes, kind: str, *parts: str) -> str:
    message = b"".join(
        len(part.encode()).to_bytes(4, "big") + part.encode() for part in (kind, *parts)
    )
    return hmac.new(key, message, hashlib.sha256).hexdigest()[:_PSEUDONYM_LENGTH]


def public_manufacturer(value: str) -> str:
    """The source's own spelling if it is made of names of CT manufacturers and of words that go
    with them."""
    rest = " " + " ".join(re.split(r"[\W_]+", value.casefold())) + " "
    named = False
    for vendor in _VENDORS:
        named |= f" {vendor} " in rest
        rest = rest.replace(f" {vendor} ", " ")
    known = named and set(rest.split()) <= _VENDOR_WORDS
    return _clean(value) if known or not value.strip() else _OTHER


def public_kernel(value: str) -> str:
    """At most 16 letters, digits and ` .,_+/()-`, and nothing like a number of five digits; else
    "other"."""
    text = _clean(value)
    too_many_digits = re.search(r"[0-9]{5}", re.sub(r"[^A-Za-z0-9 ]", "", text))
    return _OTHER if len(text) > _LONGEST_TEXT or too_many_digits else text


def public_ethnic_group(value: str) -> str:
    """At most 16 letters, digits, blanks, hyphens and `_` that begin with a letter and hold two
    digits at most (a code such as `group_a`), or one digit; else "other"."""
    text = " ".join(value.split())
    short = re.fullmatch(rf"|[0-9]|[A-Za-z][A-Za-z0-9 _-]{{0,{_LONGEST_TEXT - 1}}}", text)
    return text if short and len(re.findall("[0-9]", text)) < 3 else _OTHER


def _clean(value: str) -> str:
    return " ".join(_NOT_PUBLIC.sub(" ", value).split())


def public_fields(header: Header) -> dict[str, Any]:
    """The allow-list: everything that `volumes.csv` takes from a header, but for geometry.

    Manufacturer (0008,0070), Convolution Kernel (0018,1210), KVP (0018,0060), whether
    Contrast/Bolus Agent (0018,0010) is filled, Patient's Age (0010,1010) in whole years with 90 for
    everything above 89, Patient's Sex (0010,0040), Ethnic Group (0010,2160), and whether Quality
    Control Subject (0010,0200) marks a phantom. The three texts are limited to what such texts look
    like, since people write anything anywhere.
    """
    return {
        "manufacturer": public_manufacturer(header.manufacturer),
        "kernel": public_kernel(header.kernel),
        "tube_voltage_kvp": header.kvp,
        "contrast": header.contrast_agent.strip().upper() not in ("", "NONE", "NO"),
        "age": None if header.age is None else min(header.age, 90),
        "sex": header.sex,
        "ethnic_group": public_ethnic_group(header.ethnic_group),
        "synthetic": header.quality_control_subject,
    }
