"""Pseudonyms, and the values of a header that may be published.

A pseudonym is an HMAC-SHA256 under a key that stays with the archive's owner. Without the key it
cannot be traced back by trying patient IDs or UIDs. With the same key it is the same in every run,
so that re-runs and grown archives agree. Only `public_fields` of the headers leave the archive.
Dates, names, UIDs, accession numbers, institutions and free-text descriptions stay.
"""

import dataclasses
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.privacy.spellings import is_known_group, is_known_kernel
from data_prep.scan.archives import Source
from data_prep.scan.deciding_elements import deciding
from data_prep.scan.headers import Header
from data_prep.scan.series import Rejection, SeriesCandidate
from data_prep.system.errors import InputError
from data_prep.system.files import write_file
from data_prep.system.spreadsheets import is_missing

KEY_FILE = "pseudonym_key"  # in an audit directory

_PSEUDONYM_LENGTH = 32  # hexadecimal digits: 128 bits
_SHORTEST_KEY = 16  # bytes
_NUM_PIXEL_DIGESTS = 16  # of a volume: those that come first, so that copies keep the same
_NOT_PUBLIC = re.compile(r"[^A-Za-z0-9 .,_+/()-]")
_LONGEST_TEXT = 32
_TUBE_VOLTAGE_KVP = (40.0, 200.0)
_OTHER = "other"  # replaces values that may be private
_NO_CONTRAST = {
    *("NO", "NONE", "N", "NIL", "WITHOUT", "W/O", "WO", "NATIVE", "PLAIN", "OHNE", "SANS", "SIN"),
    *("NO CONTRAST", "NON CONTRAST", "NON-CONTRAST", "WITHOUT CONTRAST", "W/O CONTRAST"),
}
_VENDORS = set(
    "siemens ge gems imatron philips picker marconi elscint adac toshiba canon hitachi fujifilm "
    "shimadzu uih neusoft nms pnms samsung neurologica anke minfound sinovision varian elekta "
    "accuray mediso carestream planmeca".split()
) | {"general electric", "united imaging"}
_VENDOR_WORDS = set(
    "ag ab and co company corp corporation ct electric electronics gmbh health healthcare "
    "healthineers inc international limited llc ltd mec medical nuclear oy shanghai solutions "
    "system "
    "systems technologies technology xray".split()
)


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A row of rejected.csv with its files.

    element: private; see `deciding`.
    thumbnail: private; a JPEG in base64, "" if no pixels were read.
    """

    series_id: str
    reason: str
    detail: str
    sources: list[Source]
    element: str = ""
    thumbnail: str = ""


def default_audit_dir(output_dir: Path) -> Path:
    """The private directory of a dataset, beside it."""
    named = output_dir if output_dir.name not in ("", "..") else output_dir.resolve()
    return named.with_name(named.name + "-audit")


def read_key(path: Path) -> bytes:
    """The pseudonym key in a file, without blanks around it.

    Raises:
        InputError: the file is missing or too short.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such key file; leave out --pseudonym_key_file to have a key made in the "
            "audit directory"
        )
    key = path.read_bytes().strip()
    if len(key) < _SHORTEST_KEY:
        raise InputError(
            f"{path}: a pseudonym key has at least {_SHORTEST_KEY} bytes, this one {len(key)}"
        )
    return key


def make_key(path: Path) -> bytes:
    """Makes a random key file that only its owner can read, unless it exists, and returns the
    key."""
    if not path.exists():
        write_file(path, f"{secrets.token_hex(32)}\n".encode(), mode=0o600)
    return read_key(path)


def key_fingerprint(key: bytes) -> str:
    """A name of a key that does not reveal it. Datasets with equal fingerprints have comparable
    patient pseudonyms."""
    return _digest(key, "key fingerprint")[:16]


def patient_pseudonym(key: bytes, patient_key: str) -> str:
    """Pseudonym of a patient; `patient_key` as in `Header.patient_key`."""
    return _digest(key, "patient", patient_key)


def series_pseudonym(key: bytes, patient_key: str, study_uid: str, series_key: str) -> str:
    """Pseudonym of a series or of a stack in it: the `volume_id` of a volume, the `series_id` of a
    rejection."""
    return _digest(key, "series", patient_key, study_uid, series_key)


def volume_id(key: bytes, candidate: SeriesCandidate) -> str:
    """Pseudonym of a volume: `volume_id` of volumes.csv."""
    return series_pseudonym(key, *candidate.exam_key, candidate.series_key)


def exam_id(key: bytes, patient_key: str, study_uid: str) -> str:
    """Pseudonym of an exam: `exam_id` of volumes.csv."""
    return series_pseudonym(key, patient_key, study_uid, "")


def rejected_row(key: bytes, rejection: Rejection) -> Rejected:
    """The row of a rejection that was made from the headers."""
    first = rejection.headers[0]
    series_id = series_pseudonym(
        key, first.patient_key, first.study_instance_uid, rejection.series_key
    )
    return rejected(series_id, rejection)


def rejected(series_id: str, rejection: Rejection) -> Rejected:
    """The row of a rejection under a pseudonym."""
    sources = sources_of(rejection.headers)
    return Rejected(series_id, rejection.reason, rejection.detail, sources, deciding(rejection))


def slice_id(key: bytes, header: Header) -> str:
    """A private name of a slice that does not depend on the place of its file."""
    parts = (
        header.series_instance_uid,
        header.sop_instance_uid,
        str(header.frame),
        repr(header.position),
    )
    return private_digest(key, "slice", *parts)


def pixel_digests(key: bytes, hu: np.ndarray) -> list[str]:
    """Private names of some slices of a volume that depend on their pixels alone.

    Two volumes that share many slices share many names, whatever their UIDs are. Slices without
    content (all values equal) have none. Every fourth row and column counts, as in whole HU.

    Args:
        key: of the pseudonyms.
        hu: [S, H, W], canonical orientation.
    """
    names = set()
    for image in hu[:, ::4, ::4]:
        pixels = np.rint(image).astype("<i4")
        if pixels.min() < pixels.max():
            content = repr(pixels.shape).encode() + pixels.tobytes()
            names.add(hashlib.blake2b(content, digest_size=8, key=_pixel_key(key)).hexdigest())
    return sorted(names)[:_NUM_PIXEL_DIGESTS]


def _pixel_key(key: bytes) -> bytes:
    return _digest(key, "pixels").encode()


def sources_of(headers: Iterable[Header]) -> list[Source]:
    """The files of some headers, each once: a multi-frame file has many headers."""
    return sorted({header.source for header in headers})


def shuffling_number(key: bytes, pseudonym: str) -> str:
    """The sort key of splits and shards: as good as random, and the same in every run."""
    return _digest(key, "order", pseudonym)


def private_digest(key: bytes, *parts: str) -> str:
    """A name of private facts (file lists) that does not reveal them."""
    return _digest(key, "private", *parts)


def _digest(key: bytes, kind: str, *parts: str) -> str:
    # names of NIfTI files may be no UTF-8
    encoded = [part.encode("utf-8", "surrogateescape") for part in (kind, *parts)]
    message = b"".join(len(part).to_bytes(4, "big") + part for part in encoded)
    return hmac.new(key, message, hashlib.sha256).hexdigest()[:_PSEUDONYM_LENGTH]


def public_manufacturer(value: str) -> str:
    """The source's own spelling if it has only names of CT manufacturers and words that go with
    such names; else "other"."""
    rest = " " + " ".join(re.split(r"[\W_]+", value.casefold())) + " "
    named = False
    for vendor in _VENDORS:
        named |= f" {vendor} " in rest
        rest = rest.replace(f" {vendor} ", " ")
    is_vendor = named and set(rest.split()) <= _VENDOR_WORDS
    return _clean(value) if is_vendor or not value.strip() else _OTHER


def public_kernel(value: str) -> str:
    """The kernel if it is a known spelling (`data_prep.privacy.spellings`) of at most 32 letters,
    digits and ` .,_+/()-`; else "other"."""
    text = _clean(value)
    known = not text or (len(text) <= _LONGEST_TEXT and is_known_kernel(text))
    return text if known else _OTHER


def public_ethnic_group(value: str) -> str:
    """The group if it is made of known words (`data_prep.privacy.spellings`) and a code of at most
    two letters and digits, such as `group_a`; else "other"."""
    text = " ".join(value.split())
    plain = len(text) <= _LONGEST_TEXT and re.fullmatch(r"|[0-9A-Za-z][A-Za-z0-9 _/-]*", text)
    return text if plain and (not text or is_known_group(text)) else _OTHER


def public_number(value: float | None, lowest: float, highest: float) -> float | None:
    """The number if it lies within the bounds; else None."""
    return value if value is not None and lowest <= value <= highest else None


def _clean(value: str) -> str:
    return " ".join(_NOT_PUBLIC.sub(" ", value).split())


def _contrast(agent: str) -> bool | None:
    text = " ".join(agent.upper().split())
    return None if is_missing(text) and text != "NONE" else text not in _NO_CONTRAST


def public_fields(header: Header) -> dict[str, Any]:
    """The allow-list: all values that `volumes.csv` takes from a header, except geometry.

    They are Manufacturer (0008,0070), Convolution Kernel (0018,1210), KVP (0018,0060), whether
    Contrast/Bolus Agent (0018,0010) names an agent (True) or says that there was none (False; None
    where it is missing or empty, as in de-identified files), Patient's Age (0010,1010) in whole
    years with 90 for an age above 89, Patient's Sex (0010,0040), Ethnic Group (0010,2160), and
    whether Quality Control Subject (0010,0200) marks a phantom. The three texts are published only
    in their usual form, since people write private facts into any field.
    """
    return {
        "manufacturer": public_manufacturer(header.manufacturer),
        "kernel": public_kernel(header.kernel),
        "tube_voltage_kvp": public_number(header.marks.tube_voltage, *_TUBE_VOLTAGE_KVP),
        "contrast": _contrast(header.contrast_agent),
        "age": None if header.age is None else min(header.age, 90),
        "sex": header.sex,
        "ethnic_group": public_ethnic_group(header.ethnic_group),
        "synthetic": header.quality_control_subject,
    }
