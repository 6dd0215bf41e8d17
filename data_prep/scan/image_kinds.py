"""What kind of image a header describes: an axial CT slice, or why it is none."""

from __future__ import annotations

import functools
import re

from data_prep.scan.geometry import canonical_axes
from data_prep.scan.headers import CT_IMAGE_STORAGE, OTHER_QUANTITY, Header

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_LOCALIZER = {"LOCALIZER", "SCOUT", "SCANOGRAM", "TOPOGRAM", "SURVIEW"}
_PROJECTED_VALUES = {"3D"}  # whole values only: AIDR 3D is a reconstruction with CT numbers
# Words within a value, such as CT_SOM5 MIP, MIP THIN or THINMIP10, whatever stands between words.
_PROJECTED_WORDS = re.compile(
    r"\b(?:AX|AXIAL|COR|SAG|THIN|THICK|SLAB|TH|ST|CT)*"
    r"(?:MIPS?|MAX ?IP|MIN ?IP|MNIP|MXIP|MIPMAX|MIPMIN|MAXIMUM|MINIMUM"
    r"|MAX INTENSITY|MIN INTENSITY|(?<!BACK )PROJECTION|RAY ?SUM|RAY ?CAST"
    r"|VRT|VOLREN|VOLUME ?RENDER(?:ED|ING)?|SURFACE ?RENDER(?:ED|ING)?|SSD|SHADED"
    r"|CPR|CURVED|STRAIGHTENED|SUBTRACTION|SUBTRACTED)"
    r"(?:AX|AXIAL|THIN|THICK|SLAB|MM|\d)*\b"
)
# Values of Image Type and Rescale Type of maps that are no HU.
_MAP_WORDS = re.compile(
    r"\b(?:EFF ATOMIC NUM|ELECTRON DENSITY|MAT (?:SPECIFIC|FRACTIONAL|VALUE BASED)|STD DEVIATION"
    r"|PERFUSION|CBF|CBV|MTT|TTP)\b"
)
# Rescale Types of other quantities: the terms of DICOM, and units as vendors write them
_NOT_HU_RESCALE = re.compile(
    f"(OD|MGML|Z_?EFF|ED|EDW|HU_?MOD|PCT|{OTHER_QUANTITY})|.*([/%]|IODINE|DENSITY).*"
)
# JPEG baseline and extended, JPEG-LS near-lossless
_LOSSY_SYNTAXES = {f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 81)}
# JPEG 2000 and High-Throughput JPEG 2000, which may have lost nothing
_PERHAPS_LOSSY_SYNTAXES = {f"1.2.840.10008.1.2.4.{number}" for number in (91, 93, 203)}
# Parts of the body without lung. The protocol's default often stands for a chest, so the lungs
# decide.
NOT_CHEST = {
    "HEAD",
    "BRAIN",
    "SKULL",
    "ORBIT",
    "SINUS",
    "KNEE",
    "ANKLE",
    "FOOT",
    "HAND",
    "WRIST",
    "ELBOW",
}


def foreign(header: Header) -> str | None:
    """Why an image is not an axial CT slice at all; a name of `data_prep.scan.reasons.REASONS`."""
    if header.modality != "CT" and (
        header.modality or header.sop_class_uid not in CT_IMAGE_STORAGE
    ):
        return "not_ct"
    if any(_LOCALIZER & set(_words(value).split()) for value in header.image_type):
        return "localizer"
    if header.orientation is not None:
        axes = canonical_axes(header.orientation)
        if axes is None:
            return "unknown_orientation"
        if not axes.axial:
            return "not_axial"
    return None


def fault(header: Header) -> str | None:
    """Why an axial CT image cannot be a slice of a volume.

    By their Image Type, secondary captures, DERIVED\\SECONDARY images, projections and maps are
    without CT numbers. ORIGINAL\\SECONDARY (some scanners' own images after a transfer) and
    DERIVED\\PRIMARY (axial reconstructions, lossy copies) have them.
    """
    if header.sop_class_uid == _SECONDARY_CAPTURE or header.sop_class_uid.startswith(
        _SECONDARY_CAPTURE + "."
    ):
        return "secondary_capture"
    if header.image_type[:2] == ("DERIVED", "SECONDARY") or _is_derived(header.image_type[2:]):
        return "derived_image"
    if _NOT_HU_RESCALE.fullmatch(header.rescale_type):
        return "derived_image"
    if header.samples_per_pixel != 1 or header.photometric not in (
        "MONOCHROME1",
        "MONOCHROME2",
        "",
    ):
        return "not_grey"
    if header.burned_in_annotation:
        return "burned_in_annotation"
    if header.orientation is None:
        return "unknown_orientation"
    if header.position is None:
        return "missing_position"
    if header.pixel_spacing is None:
        return "missing_pixel_spacing"
    return None


@functools.lru_cache(maxsize=1024)  # most values repeat from slice to slice
def _is_derived(values: tuple[str, ...]) -> bool:
    """Whether values of Image Type, from the third on, name a projection, a rendering or a map."""
    return any(
        value in _PROJECTED_VALUES
        or _PROJECTED_WORDS.search(_words(value))
        or _MAP_WORDS.search(_words(value))
        for value in values
    )


@functools.lru_cache(maxsize=1024)
def _words(value: str) -> str:
    """The words of a value with single blanks between them."""
    return " ".join(re.split(r"[\W_]+", value)).strip()


def is_lossy(header: Header) -> bool:
    """Whether the values were changed by compression, as Lossy Image Compression or the transfer
    syntax say."""
    return header.lossy or header.transfer_syntax in _LOSSY_SYNTAXES


def may_be_lossy(header: Header) -> bool:
    """Whether the values may have been changed by compression."""
    return is_lossy(header) or header.transfer_syntax in _PERHAPS_LOSSY_SYNTAXES


def is_lossy_copy(header: Header, original: Header) -> bool:
    """Whether an image with other values at the same position is a lossy copy of the original."""
    if header.sop_instance_uid == original.sop_instance_uid:
        return may_be_lossy(header) and not may_be_lossy(original)
    return is_lossy(header) and not is_lossy(original)
