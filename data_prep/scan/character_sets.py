"""Text of DICOM elements: bytes -> values, by Specific Character Set (0008,0005)."""

import functools
import warnings

from pydicom import charset

ESCAPE = b"\x1b"
_LEFT_BY_PYDICOM = "\x1b$)A"  # before text of GB 2312, which Python decodes without its escape
_BLANKS = " \0\t\r\n"
_DELIMITERS = set(b"\\\t\n\f\r")  # they end a stretch of an escaped set
# Of these, and of unknown sets, files do not say the truth often enough: text that is UTF-8 is read
# as such.
_ANY = frozenset(("", "ISO_IR 6", "ISO 2022 IR 6", "ISO_IR 100", "ISO_IR 192"))
# Python's codecs of the sets with escapes, which are tried also where a file does not declare them.
_ESCAPED = tuple(dict.fromkeys(charset.CODES_TO_ENCODINGS.values()))


@functools.lru_cache(maxsize=4096)  # most values repeat from file to file
def decode_texts(raw: bytes, character_set: bytes = b"") -> tuple[str, ...]:
    r"""The values of a text element, stripped.

    Escapes (ISO 2022) are followed. A byte 5C within a character of several bytes parts no values,
    since the text is decoded first. Bytes that the declared set lacks are read as UTF-8, else as
    Latin-1. A value with control characters is damaged (it may hold parts of other elements) and
    counts as missing.

    Args:
        raw: the value field.
        character_set: the value field of (0008,0005), b"" if it is missing.
    """
    parts = tuple(part.strip(_BLANKS) for part in _decoded(raw, character_set).split("\\"))
    return () if any(character < " " for part in parts for character in part) else parts


def first_text_before(raw: bytes) -> str:
    """The first value as programs before version 2 of the rules (`data_prep.scan.rules`) read it,
    for the pseudonyms of their datasets: without (0008,0005), "" if there were escapes."""
    text = _utf8_or_latin1(raw).split("\\")
    parts = [part.strip(_BLANKS) for part in text]
    return "" if any(character < " " for part in parts for character in part) else parts[0]


def _decoded(raw: bytes, character_set: bytes) -> str:
    if raw.isascii() and ESCAPE not in raw:
        return raw.decode("ascii")
    terms = [term.strip(_BLANKS) for term in character_set.decode("latin-1").split("\\")]
    declared = [term if term in charset.python_encoding else "" for term in terms]
    if ESCAPE not in raw and declared[0] in _ANY:
        return _utf8_or_latin1(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encodings = [*charset.convert_encodings(declared), *_ESCAPED]
        # pydicom puts U+FFFD for bytes that it cannot decode
        text = charset.decode_bytes(raw, encodings, _DELIMITERS).replace(_LEFT_BY_PYDICOM, "")
    if "\ufffd" in text or "\x1b" in text:
        return _utf8_or_latin1(raw.replace(ESCAPE, b""))
    return text


def _utf8_or_latin1(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")
