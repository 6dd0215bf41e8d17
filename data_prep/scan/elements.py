"""A DICOM file -> its elements up to the pixels, in bounded time and memory.

pydicom finds the elements. By itself it takes hours for a few megabytes of zeros or of empty items,
inflates a deflated file as a whole, and keeps values of any length. Here a file that has more
elements than its size can need is refused, and zeros end the header.
"""

import io
import struct
import warnings
import zlib
from typing import BinaryIO

import pydicom
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_partial

DEFLATED = "1.2.840.10008.1.2.1.99"
# Deflate cannot pass 1032. CT slices stay below 10, blank slices below 100.
MAX_COMPRESSION_RATIO = 200
RATIO_FREE_BYTES = 16 << 20  # what expands to this size is harmless at any ratio

_META_BYTES = 4096  # the transfer syntax is within these first bytes
_MAX_META_ELEMENTS = 100
_SHORT_HEADER_BYTES = 32 << 10
_INFLATED_CHUNK = 1 << 20
_PIXELS = frozenset((0x7FE00008, 0x7FE00009, 0x7FE00010))  # hashes of tags are fast, not ==
_PIXEL_TAGS = frozenset(  # in little and big endian
    struct.pack(order + "HH", tag >> 16, tag & 0xFFFF) for tag in _PIXELS for order in "<>"
)
# A read finds an element or an item, or its value. A frame of an enhanced file takes up to 200
# reads and has kilobytes of pixels.
_FREE_READS, _BYTES_PER_READ, _MAX_READS = 20_000, 200, 1_000_000
_MAX_BYTES = 256 << 20  # of all values; an enhanced file of 20,000 frames has 40 MB
_NO_ELEMENT, _MAX_ZEROS = bytes(8), 100  # no element begins so
_ITEMS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # the tag of an item, little and big endian
_EXPLICIT = b"1.2.840.10008.1.2.1\0\0\0"  # as long as `DEFLATED`


class BoundError(ValueError):
    """A file beyond all headers. `reason` is a name of `data_prep.scan.reasons.REASONS`; the
    message is the detail."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def read_elements(
    file: BinaryIO, size: int, tags: list[int] | None = None
) -> tuple[pydicom.FileDataset, int | None]:
    """The data set before its pixels, and the offset of the element that follows it (None: the data
    set is deflated).

    Args:
        file: at its start.
        size: of the file in bytes.
        tags: the elements to keep; None keeps all.

    Raises:
        BoundError: more elements or a longer value than a header has, or a deflated file that
          expands too far.
        Exception: pydicom raises many kinds on damaged bytes.
    """
    place, start = file.tell(), file.read(_SHORT_HEADER_BYTES)
    file.seek(place)
    inflated = _inflated(file, start)
    if inflated is not None:
        size, file = len(inflated), io.BytesIO(inflated)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote values
        if inflated is None and (found := _short_header(start, tags)):
            dataset, length = found
            return dataset, place + length
        try:
            dataset = read_partial(
                _Bounded(file, size), stop_when=_header_ends, force=True, specific_tags=tags
            )
        except OSError as error:  # pydicom's own, where the bound is met between two items
            if isinstance(error.__context__, BoundError):
                raise error.__context__ from None
            raise
    if inflated is not None:
        dataset.file_meta.TransferSyntaxUID = DEFLATED
        return dataset, None
    return dataset, file.tell()


def items(dataset: Dataset, tag: int, at_most: int) -> list[Dataset]:
    """The items of a sequence; [] if it is missing, or holds more than `at_most` items with those
    within items."""
    if tag not in dataset or too_many_items(dataset.get_item(tag), at_most):
        return []
    value = dataset[tag].value
    return [item for item in value or () if isinstance(item, Dataset)]


def too_many_items(element: DataElement | RawDataElement, at_most: int) -> bool:
    """Whether an element that is not parsed yet holds more items than that, at any depth."""
    if not isinstance(element, RawDataElement) or not element.value:
        return False
    return element.value.count(_ITEMS[not element.is_little_endian]) > at_most


def _header_ends(tag: int, vr: str | None, length: int) -> bool:
    """At the pixels, or where a copy was interrupted: no data set has the group 0000."""
    return tag in _PIXELS or not (tag or length)


def _short_header(start: bytes, tags: list[int] | None) -> tuple[pydicom.FileDataset, int] | None:
    """The data set before its pixels and its length, where the pixels begin within the first bytes
    of a file, as those of nearly all slices do; None for any other file. It is bounded by these
    bytes."""
    file = io.BytesIO(start)
    try:
        dataset = read_partial(file, stop_when=_header_ends, force=True, specific_tags=tags)
    except Exception:  # damaged or cut by the end of these bytes: read again, and reported, there
        return None
    length = file.tell()
    return (dataset, length) if file.read(4) in _PIXEL_TAGS else None


class _Bounded:
    """A file of which a bounded number of bytes is read, in a bounded number of reads."""

    def __init__(self, file: BinaryIO, size: int):
        self._read, self._size = file.read, size
        self._reads_left = min(_FREE_READS + size // _BYTES_PER_READ, _MAX_READS)
        self._bytes_left = _MAX_BYTES
        self._zeros_in_a_row = 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, number: int = -1) -> bytes:
        self._reads_left -= 1
        self._bytes_left -= self._size if number < 0 else min(number, self._size)
        if self._reads_left < 0 or self._bytes_left < 0:
            raise BoundError("unreadable", "more or longer elements than the header of an image")
        content = self._read(number)
        self._zeros_in_a_row = self._zeros_in_a_row + 1 if content == _NO_ELEMENT else 0
        if self._zeros_in_a_row > _MAX_ZEROS:
            raise BoundError("unreadable", "zeros behind its start (an interrupted copy)")
        return content


def _inflated(file: BinaryIO, start: bytes) -> bytes | None:
    """A file of the deflated transfer syntax with its data set inflated, as one of Explicit VR
    Little Endian; None for other files. The position in the file stays the same.

    Args:
        file: at its start.
        start: its first bytes, at least `_META_BYTES` if it has as many.

    Raises:
        BoundError: it expands further than a zip member may.
    """
    if DEFLATED.encode() not in start[:_META_BYTES]:
        return None
    place = file.tell()
    try:
        at, data = 132 if start[128:132] == b"DICM" else 0, file.read()
        # the file meta elements, explicit little endian and not deflated
        for _ in range(_MAX_META_ELEMENTS):
            if data[at : at + 2] != b"\x02\x00":
                break
            if data[at + 4 : at + 6] in (b"OB", b"UN"):
                at += 12 + int.from_bytes(data[at + 8 : at + 12], "little")
            else:
                at += 8 + int.from_bytes(data[at + 6 : at + 8], "little")
        meta = data[:at].replace(DEFLATED.encode(), _EXPLICIT)
        try:
            content = _expanded(memoryview(data)[at:])
        except zlib.error:
            return None  # pydicom reports the damage
        if content is None:
            raise BoundError("too_large", "a deflated file that expands beyond any scan")
        return meta + content
    finally:
        file.seek(place)


def _expanded(content: memoryview) -> bytes | None:
    """What deflated bytes expand to; None if it is larger than any scan."""
    allowed = max(RATIO_FREE_BYTES, MAX_COMPRESSION_RATIO * len(content))
    decompressor, chunks, length = zlib.decompressobj(-zlib.MAX_WBITS), [], 0
    while content and not decompressor.eof:
        chunks.append(decompressor.decompress(content, _INFLATED_CHUNK))
        length += len(chunks[-1])
        if length > allowed:
            return None
        content = memoryview(decompressor.unconsumed_tail)
    return b"".join(chunks)
