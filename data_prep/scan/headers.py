"""Headers of DICOM images, reduced to the plain and small values that planning needs.

pydicom only finds the elements. Their raw values are parsed here, so that a broken value (a word
where a number belongs, a wrong VR) becomes "missing" and never an exception.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import re
import struct
from collections.abc import Iterable
from typing import Any, BinaryIO

import pydicom
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset

from data_prep.scan.archives import ArchiveDirectory, Source, open_source, read_bytes
from data_prep.scan.character_sets import ESCAPE, decode_texts, first_text_before
from data_prep.scan.demographics import age_in_years, sex_of
from data_prep.scan.elements import BoundError, items, read_elements
from data_prep.scan.packed_files import (
    PACKED_START,
    READ_COMPRESSED,
    READ_IN_PLACE,
    ZIP,
    how_packed,
)

MAX_FRAMES = 20_000
_LARGEST_NUMBER = 1e9
# IS: Number of Frames; Series, Acquisition and Instance Number, Temporal Position Identifier
_INTEGER_STRINGS = (0x00280008, 0x00200011, 0x00200012, 0x00200013, 0x00200100)
# DS that decide on a scan, with field and name: "missing" and "no number" are told apart
_JUDGED = {
    0x00180050: ("slice_thickness", "Slice Thickness"),
    0x00200032: ("position", "Image Position (Patient)"),
    0x00200037: ("orientation", "Image Orientation (Patient)"),
    0x00280030: ("pixel_spacing", "Pixel Spacing"),
    0x00281052: ("rescale_intercept", "Rescale Intercept"),
    0x00281053: ("rescale_slope", "Rescale Slope"),
}
_MEDIA_STORAGE_DIRECTORY = "1.2.840.10008.1.3.10"
_IMPLICIT_LITTLE, _EXPLICIT_LITTLE, _EXPLICIT_BIG = (
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.2",
)
# plain, enhanced, converted
CT_IMAGE_STORAGE = {f"1.2.840.10008.5.1.4.1.1.2{suffix}" for suffix in ("", ".1", ".2")}
NATIVE_SYNTAXES = (_IMPLICIT_LITTLE, _EXPLICIT_LITTLE, _EXPLICIT_BIG)
# Items within Per-frame Functional Groups: of any image, and for each of its frames
_ITEMS_OF_AN_IMAGE, _ITEMS_OF_A_FRAME = 10_000, 1_000
OTHER_QUANTITY = "NO HU"  # stands for the Rescale Type of Real World Values that are not HU
_HU_CODES = {"[HNSF'U]", "HU"}
NIFTI = "nifti"  # stands for the transfer syntax of a NIfTI file (`data_prep.scan.nifti`)

# All tags that this module reads, also within sequences. pydicom skips other elements, which saves
# a fifth of the time.
# fmt: off
_TAGS = [pydicom.tag.Tag(tag) for tag in (
    0x00041220, 0x00080005, 0x00080008, 0x00080016, 0x00080018, 0x0008002A, 0x00080032, 0x00080060,
    0x00080070, 0x00080100, 0x00080104, 0x0008103E, 0x00089007, 0x00100020, 0x00100040, 0x00100200,
    0x00101010, 0x00102160, 0x00180010, 0x00180012, 0x00180015, 0x00180050, 0x00180060, 0x00181060,
    0x00181120, 0x00181210, 0x00185100, 0x00189074, 0x00189118, 0x00189304, 0x00189314, 0x00189316,
    0x00189325, 0x00189329, 0x0020000D, 0x0020000E, 0x00200011, 0x00200012, 0x00200013, 0x00200032,
    0x00200037, 0x00200052, 0x00200100, 0x00209056, 0x00209111, 0x00209113, 0x00209116, 0x00209128,
    0x00209153, 0x00209156, 0x00209241, 0x00209245, 0x00209252, 0x00209253, 0x00280002, 0x00280004,
    0x00280008, 0x00280010, 0x00280011, 0x00280030, 0x00280100, 0x00280101, 0x00280102, 0x00280103,
    0x00280120, 0x00280121, 0x00280301, 0x00281052, 0x00281053, 0x00281054, 0x00282110, 0x00289110,
    0x00289145, 0x004008EA, 0x00409096, 0x00409224, 0x00409225,
    0x52009229, 0x52009230,
)]
# fmt: on
# Overlay Bits Allocated and Bit Position of the sixteen overlays
_OVERLAYS = [(group << 16 | 0x100, group << 16 | 0x102) for group in range(0x6000, 0x6020, 2)]
_TAGS += [pydicom.tag.Tag(tag) for pair in _OVERLAYS for tag in pair]

logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its messages quote element values


Elements = dict[int, DataElement | RawDataElement]  # keyed by tag


@dataclasses.dataclass(frozen=True, slots=True)
class StackMarks:
    """What may tell the stacks of one series apart, besides the values that a slice needs anyway
    (`data_prep.scan.stacks`). A missing value is None, or "" for text."""

    series_number: int | None = None  # (0020,0011)
    series_description: str = ""  # (0008,103E), private: it is compared and never published
    frame_of_reference_uid: str = ""  # (0020,0052)
    stack_id: str = ""  # (0020,9056), of enhanced files
    # Temporal Position Index (0020,9128) or Identifier (0020,0100)
    temporal_position: int | None = None
    cardiac_phase: float | None = None  # Nominal Percentage of Cardiac Phase (0020,9241)
    respiratory_phase: float | None = None  # Nominal Percentage of Respiratory Phase (0020,9245)
    # ms: nominal or actual Cardiac Trigger Delay Time (0020,9153; 0020,9252), or Trigger Time
    # (0018,1060)
    trigger_time: float | None = None
    tube_voltage: float | None = None  # KVP (0018,0060), of the frame in enhanced files
    # Frame Acquisition DateTime (0018,9074), Acquisition DateTime (0008,002A) or Acquisition Time
    # (0008,0032), as written
    acquisition_time: str = ""
    instance_number: int | None = None  # (0020,0013); the same for all frames of a file


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
    """One frame of an enhanced multi-frame file; the fields have the names and meanings of
    `Header`."""

    image_type: tuple[str, ...]
    acquisition_number: int | None
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    pixel_spacing: tuple[float, ...] | None
    slice_thickness: float | None
    gantry_tilt: float | None
    rescale_slope: float | None
    rescale_intercept: float | None
    rescale_type: str
    kernel: str
    marks: StackMarks = StackMarks()
    unreadable: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """One image. A missing or unusable value is None, or "" for text.

    A multi-frame file is read as one header with `number_of_frames` > 1 and its `frames`. Planning
    turns it into one header for each frame, which differ only in `frame` and the geometry.
    Everywhere else a header is one slice.
    """

    source: Source
    transfer_syntax: str
    # of the (7FE0,0010) element in the file; None: unknown, it must be searched
    pixel_data_offset: int | None
    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    patient_id: str
    # as programs before version 2 of the rules read it, "" if they took it for missing; None: alike
    patient_id_before: str | None
    modality: str
    image_type: tuple[str, ...]
    body_part: str
    acquisition_number: int | None
    rows: int
    columns: int
    position: tuple[float, ...] | None  # Image Position (Patient), mm
    # Image Orientation (Patient): row cosines, column cosines
    orientation: tuple[float, ...] | None
    pixel_spacing: tuple[float, ...] | None  # mm between rows, between columns
    slice_thickness: float | None  # mm
    gantry_tilt: float | None  # Gantry/Detector Tilt, degrees
    patient_position: str
    rescale_slope: float | None
    rescale_intercept: float | None
    rescale_type: str
    samples_per_pixel: int
    photometric: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    pixel_representation: int
    padding_value: int | None  # stored value, sign as Pixel Representation says
    padding_limit: int | None
    overlay_bits: tuple[int, ...]  # bits of the pixels that overlays use, from 0
    burned_in_annotation: bool
    quality_control_subject: bool
    manufacturer: str
    kernel: str
    contrast_agent: str
    age: int | None  # whole years, > 89 is 90
    sex: str  # "M", "F", "O" or ""
    ethnic_group: str
    number_of_frames: int = 1
    frames: tuple[Frame, ...] = ()
    frame: int = 0
    rescale_from_table: bool = False  # of the metadata table beside a NIfTI file
    notes: tuple[str, ...] = ()  # names of `data_prep.scan.reasons.NOTES`
    marks: StackMarks = StackMarks()
    # names of elements that are there without a usable number; their fields are None
    unreadable: tuple[str, ...] = ()
    lossy: bool = False  # Lossy Image Compression (0028,2110) is 01
    # the one key of a patient with several ("" otherwise): `data_prep.scan.patients`
    patient: str = ""

    @property
    def patient_key(self) -> str:
        """The Patient ID, or a name made of the Study Instance UID where the ID is missing; one for
        all IDs of a patient."""
        return self.patient or self.patient_id or f"study:{self.study_instance_uid}"


@dataclasses.dataclass(frozen=True, slots=True)
class NotAnImage:
    """A file without an image; `reason` is a name of `data_prep.scan.reasons.REASONS`."""

    source: Source
    reason: str
    detail: str


def read_header(input_dir: ArchiveDirectory, source: Source) -> Header | NotAnImage:
    """The header of one source, without its pixels. Never raises for the content of a file.

    Raises:
        OSError: the file cannot be read, has changed its size, or is a damaged zip member.
    """
    if source.member:
        return _read(io.BytesIO(read_bytes(input_dir, source)), source)
    with open_source(input_dir, source) as file:
        return _read(file, source)


def _read(file: BinaryIO, source: Source) -> Header | NotAnImage:
    start = file.read(PACKED_START)
    file.seek(0)
    is_nifti = (source.member or source.path).lower().endswith(READ_COMPRESSED)
    if (kind := how_packed(start)) and not is_nifti:
        return NotAnImage(source, *_refusal_of_packed(kind, source))
    if not _looks_like_dicom(start):
        return NotAnImage(source, "not_dicom", "")
    if start[128:132] == b"DICM" and len(start) == PACKED_START and not any(start[132:]):
        return NotAnImage(
            source, "unreadable", "zeros behind DICM (an interrupted copy); copy the file again"
        )
    try:
        dataset, offset = read_elements(file, source.size, _TAGS)
        return _header(dataset, source, offset)
    except BoundError as error:
        return NotAnImage(source, error.reason, str(error))
    # pydicom raises a dozen kinds on damaged bytes. The kind becomes the detail.
    except Exception as error:
        # from the disk, not from pydicom
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return NotAnImage(source, "unreadable", f"{type(error).__name__} while reading the header")


def _refusal_of_packed(kind: str, source: Source) -> tuple[str, str]:
    if source.member:
        reason = "nested_zip" if kind == ZIP else "packed"
        return reason, f"{kind} within another packed file; unpack it first"
    if kind not in READ_IN_PLACE:
        return "packed", f"{kind}, which is not read in place; unpack it first"
    # elsewhere its members are listed
    reason = "bad_zip" if kind == ZIP else "packed"
    return reason, f"{kind} on a store whose name does not say so; name it .zip, .tar or .gz"


def _looks_like_dicom(start: bytes) -> bool:
    """Whether a file begins with a preamble and DICM or, without a preamble, with an element of
    group 0002 or 0008."""
    if start[128:132] == b"DICM":
        return True
    if len(start) < 12:
        return False
    little, big = struct.unpack("<HH", start[:4]), struct.unpack(">HH", start[:4])
    return any(group in (0x0002, 0x0008) and element <= 0x2000 for group, element in (little, big))


def _header(dataset: Dataset, source: Source, offset: int | None) -> Header | NotAnImage:
    elements = dict(dataset.items())
    meta = dict(getattr(dataset, "file_meta", Dataset()).items())
    sop_class = _text(elements, 0x00080016) or _text(meta, 0x00020002)
    if _text(meta, 0x00020002) == _MEDIA_STORAGE_DIRECTORY or 0x00041220 in elements:
        return NotAnImage(source, "dicomdir", "")
    rows, columns = _integer(elements, 0x00280010) or 0, _integer(elements, 0x00280011) or 0
    bits_allocated = _integer(elements, 0x00280100) or 0
    if not (rows and columns and bits_allocated):
        modality = _text(elements, 0x00080060)
        if not sop_class and not modality:
            lacks = "no SOP Class, no Modality, no image matrix"
            if dataset.preamble is None:
                return NotAnImage(source, "not_dicom", lacks)
            return NotAnImage(source, "unreadable", f"{lacks} behind DICM; copy the file again")
        if sop_class in CT_IMAGE_STORAGE:
            return NotAnImage(
                source, "unreadable", "a CT image whose header ends early or is damaged"
            )
        return NotAnImage(
            source, "no_pixel_data", modality if re.fullmatch("[A-Z]{2,12}", modality) else ""
        )
    syntax = _transfer_syntax(dataset, meta)
    number_of_frames = max(1, _integer(elements, 0x00280008) or 1)
    if number_of_frames > MAX_FRAMES:
        return NotAnImage(source, "unreadable", f"Number of Frames is {number_of_frames}")
    representation = _integer(elements, 0x00280103) or 0
    bits_stored = _integer(elements, 0x00280101) or bits_allocated
    return Header(
        source=source,
        transfer_syntax=syntax,
        pixel_data_offset=offset,
        sop_class_uid=sop_class,
        sop_instance_uid=_text(elements, 0x00080018),
        study_instance_uid=_text(elements, 0x0020000D),
        series_instance_uid=_text(elements, 0x0020000E),
        patient_id=_text(elements, 0x00100020),
        patient_id_before=_patient_id_before(elements),
        modality=_text(elements, 0x00080060).upper(),
        body_part=_text(elements, 0x00180015).upper(),
        rows=rows,
        columns=columns,
        patient_position=_text(elements, 0x00185100).upper(),
        samples_per_pixel=_integer(elements, 0x00280002) or 1,
        photometric=_text(elements, 0x00280004).upper(),
        bits_allocated=bits_allocated,
        bits_stored=bits_stored,
        high_bit=bits_stored - 1 if (high := _integer(elements, 0x00280102)) is None else high,
        pixel_representation=representation,
        padding_value=_stored_value(_integer(elements, 0x00280120), bits_allocated, representation),
        padding_limit=_stored_value(_integer(elements, 0x00280121), bits_allocated, representation),
        overlay_bits=_overlay_bits(elements),
        burned_in_annotation=_text(elements, 0x00280301).upper() == "YES",
        quality_control_subject=_text(elements, 0x00100200).upper() == "YES",
        manufacturer=_text(elements, 0x00080070),
        contrast_agent=_text(elements, 0x00180010) or _enhanced_contrast(dataset),
        age=age_in_years(_text(elements, 0x00101010)),
        sex=sex_of(_text(elements, 0x00100040)),
        ethnic_group=_text(elements, 0x00102160),
        number_of_frames=number_of_frames,
        frames=_frames(dataset, elements, number_of_frames),
        lossy=_text(elements, 0x00282110) == "01",
        **_frame_fields([elements], [dataset]),
    )


def _transfer_syntax(dataset: Dataset, meta: Elements) -> str:
    """Transfer Syntax UID. Where it is uncompressed or missing, the encoding that pydicom detected
    counts."""
    named = _text(meta, 0x00020010)
    if named and named not in NATIVE_SYNTAXES:
        return named
    implicit, little = dataset.original_encoding
    if not little:
        return _EXPLICIT_BIG
    return _IMPLICIT_LITTLE if implicit else _EXPLICIT_LITTLE


def _frame_fields(groups: list[Elements], holders: list[Dataset]) -> dict[str, Any]:
    """The fields that `Frame` and `Header` share, each from the first of `groups` that has it;
    `holders` may have Real World Value maps."""
    merged: Elements = {}
    for group in reversed(groups):
        merged.update((tag, element) for tag, element in group.items() if element.value)

    def first(read, *tags):
        return next((value for tag in tags if (value := read(merged, tag)) not in (None, "")), None)

    orientation, position = _numbers(merged, 0x00200037), _numbers(merged, 0x00200032)
    spacing, thickness = _numbers(merged, 0x00280030), _number(merged, 0x00180050)
    image_type = _texts(merged, 0x00089007) or _texts(merged, 0x00080008)
    fields = {
        "image_type": tuple(word.upper() for word in image_type),
        "acquisition_number": first(_integer, 0x00209156, 0x00200012),
        "position": position if len(position) == 3 else None,
        "orientation": orientation if len(orientation) == 6 else None,
        "pixel_spacing": spacing if len(spacing) == 2 and min(spacing) > 0 else None,
        "slice_thickness": thickness if thickness is not None and thickness > 0 else None,
        "gantry_tilt": _number(merged, 0x00181120),
        **_rescale(
            _number(merged, 0x00281053),
            _number(merged, 0x00281052),
            _text(merged, 0x00281054).upper(),
            holders,
        ),
        "kernel": first(_text, 0x00181210, 0x00189316) or "",
        "marks": StackMarks(
            series_number=_integer(merged, 0x00200011),
            series_description=_text(merged, 0x0008103E),
            frame_of_reference_uid=_text(merged, 0x00200052),
            stack_id=_text(merged, 0x00209056),
            temporal_position=first(_integer, 0x00209128, 0x00200100),
            cardiac_phase=_number(merged, 0x00209241),
            respiratory_phase=_number(merged, 0x00209245),
            trigger_time=first(_number, 0x00209153, 0x00209252, 0x00181060),
            tube_voltage=_number(merged, 0x00180060),
            acquisition_time=first(_text, 0x00189074, 0x0008002A, 0x00080032) or "",
            instance_number=_integer(merged, 0x00200013),
        ),
    }
    return fields | {
        "unreadable": tuple(
            name
            for tag, (field, name) in _JUDGED.items()
            if fields[field] is None and _text(merged, tag)
        )
    }


def _rescale(
    slope: float | None, intercept: float | None, kind: str, holders: list[Dataset]
) -> dict[str, Any]:
    """The rescale fields. Where the tags are missing, or Rescale Type is unspecified, a Real World
    Value map (0040,9096) in HU stands in, and maps of other quantities alone say so."""
    if None in (slope, intercept) or kind == "US":
        maps = [entry for at in holders for entry in items(at, 0x00409096, _ITEMS_OF_AN_IMAGE)]
        kinds = set()
        for entry in maps:
            for unit in items(entry, 0x004008EA, _ITEMS_OF_AN_IMAGE):
                kinds.add(code := _text(dict(unit.items()), 0x00080100).upper())
                values = dict(entry.items())
                if code in _HU_CODES and _number(values, 0x00409225) is not None:
                    slope, intercept = _number(values, 0x00409225), _number(values, 0x00409224)
        if kinds and not kinds & _HU_CODES:
            kind = OTHER_QUANTITY
    return {"rescale_slope": slope, "rescale_intercept": intercept, "rescale_type": kind}


def _frames(dataset: Dataset, elements: Elements, number_of_frames: int) -> tuple[Frame, ...]:
    """Per-frame values of an enhanced file.

    Per-frame functional groups come first, then shared groups, then the top level.
    """
    at_most = _ITEMS_OF_AN_IMAGE + _ITEMS_OF_A_FRAME * number_of_frames
    per_frame = items(dataset, 0x52009230, at_most)
    if len(per_frame) < number_of_frames or (number_of_frames == 1 and not per_frame):
        return ()
    shared = [
        group for item in items(dataset, 0x52009229, at_most) for group in _functional_groups(item)
    ]
    holders = [*items(dataset, 0x52009229, at_most), dataset]
    return tuple(
        Frame(**_frame_fields([*_functional_groups(item), *shared, elements], [item, *holders]))
        for item in per_frame[:number_of_frames]
    )


_FUNCTIONAL_GROUPS = (
    0x00209111,  # frame content
    0x00209113,  # plane position
    0x00209116,  # plane orientation
    0x00289110,  # pixel measures
    0x00289145,  # pixel value transformation
    0x00189118,  # cardiac synchronization
    0x00209253,  # respiratory synchronization
    0x00189325,  # CT X-ray details
    0x00189329,  # CT image frame type
    0x00189304,  # CT acquisition details
    0x00189314,  # CT reconstruction
)


def _functional_groups(item: Dataset) -> list[Elements]:
    return [
        dict(group.items())
        for tag in _FUNCTIONAL_GROUPS
        for group in items(item, tag, _ITEMS_OF_AN_IMAGE)
    ]


def _enhanced_contrast(dataset: Dataset) -> str:
    """Code Meaning of the Contrast/Bolus Agent Sequence."""
    agents = items(dataset, 0x00180012, _ITEMS_OF_AN_IMAGE)
    return next((_text(dict(item.items()), 0x00080104) for item in agents), "")


def _bytes(elements: Elements, tag: int) -> tuple[bytes, str]:
    """The raw bytes of an element and the byte order of its binary values, "<" or ">"."""
    element = elements.get(tag)
    if element is None or element.value is None:
        return b"", "<"
    if isinstance(element, RawDataElement):
        return element.value, "<" if element.is_little_endian else ">"
    value = element.value  # pydicom has converted it already, as in the file meta information
    if isinstance(value, bytes):
        return value, "<"
    parts = [value] if isinstance(value, str) or not isinstance(value, Iterable) else value
    return "\\".join(str(part) for part in parts).encode("utf-8", "replace"), "<"


def _text(elements: Elements, tag: int) -> str:
    """The first value of a text element, stripped."""
    return texts[0] if (texts := _texts(elements, tag)) else ""


def _texts(elements: Elements, tag: int) -> tuple[str, ...]:
    """All values of a text element, stripped, by Specific Character Set (0008,0005); () if they are
    damaged (`data_prep.scan.character_sets`)."""
    raw = _bytes(elements, tag)[0]
    if not raw:
        return ()
    if raw.isascii() and ESCAPE not in raw:
        return decode_texts(raw)
    return decode_texts(raw, _bytes(elements, 0x00080005)[0])


def _patient_id_before(elements: Elements) -> str | None:
    raw = _bytes(elements, 0x00100020)[0]
    if raw.isascii() and ESCAPE not in raw:
        return None
    before = first_text_before(raw)
    return None if before == _text(elements, 0x00100020) else before


def _numbers(elements: Elements, tag: int) -> tuple[float, ...]:
    """All values of a decimal string; () if any value is not a usable number."""
    try:
        values = tuple(float(_with_point(part)) for part in _texts(elements, tag))
    except ValueError:
        return ()
    return values if all(abs(value) < _LARGEST_NUMBER for value in values) else ()


def _with_point(text: str) -> str:
    """A decimal string with a point where some computers write a comma. DICOM parts values by a
    backslash and knows no commas in numbers, so a single one can mean nothing else."""
    return text.replace(",", ".") if text.count(",") == 1 and "." not in text else text


def _number(elements: Elements, tag: int) -> float | None:
    """First value of a decimal string, or of a double or float (FD, FL)."""
    raw, order = _bytes(elements, tag)
    try:
        value = float(_with_point(raw.decode("latin-1").split("\\")[0].strip(" \0")))
    except ValueError:
        if _vr(elements, tag) not in ("FD", "FL") or len(raw) < 4:
            return None
        value = struct.unpack_from(order + ("f" if len(raw) < 8 else "d"), raw)[0]
    return value if abs(value) < _LARGEST_NUMBER else None  # False for nan, too


def _integer(elements: Elements, tag: int) -> int | None:
    """First value of an integer string, or of an unsigned short or long. A signed short is returned
    as its 16 bits."""
    raw, order = _bytes(elements, tag)
    if tag in _INTEGER_STRINGS or not isinstance(elements.get(tag), RawDataElement):
        try:
            return int(float(raw.decode("latin-1").split("\\")[0].strip(" \0")))
        except (ValueError, OverflowError):
            return None
    if len(raw) < 2:
        return None
    return struct.unpack_from(
        order + ("I" if len(raw) == 4 and _vr(elements, tag) == "UL" else "H"), raw
    )[0]


def _vr(elements: Elements, tag: int) -> str | None:
    """The element's VR, from the dictionary where the file does not name it (implicit, or UN)."""
    vr = elements[tag].VR if tag in elements else None
    return dictionary_VR(tag) if vr in (None, "UN") else vr


def _stored_value(value: int | None, bits: int, representation: int) -> int | None:
    """Pixel Padding Value with the sign that Pixel Representation asks for, at any VR."""
    if value is None or not representation or bits not in (8, 16, 32):
        return value
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _overlay_bits(elements: Elements) -> tuple[int, ...]:
    """The bits of overlays within the pixels, as DICOM had it until 2004; an overlay of its own has
    one bit allocated."""
    return tuple(
        _integer(elements, position) or 0
        for allocated, position in _OVERLAYS
        if allocated in elements and (_integer(elements, allocated) or 1) > 1
    )
