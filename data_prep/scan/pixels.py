"""Stored pixel values of one slice, for every transfer syntax and for NIfTI files.

Pixel data are read at the offset from the header. How they are coded is told by the data: some
tools leave a wrong transfer syntax behind. Which bits of a pixel are its value is judged in
`data_prep.scan.stored_bits`.
"""

from __future__ import annotations

import dataclasses
import io
import re
import struct
import warnings

import numpy as np
import pydicom
from pydicom.encaps import get_frame
from pydicom.pixels import pixel_array

from data_prep.scan import decoders
from data_prep.scan.archives import ArchiveDirectory, Source, changed, open_source, read_bytes
from data_prep.scan.decoders import COMPRESSED_SYNTAXES
from data_prep.scan.elements import DEFLATED
from data_prep.scan.headers import NATIVE_SYNTAXES, NIFTI, Header
from data_prep.scan.nifti import NiftiError, are_hu, read_frames, with_padding
from data_prep.scan.stored_bits import PixelError, stored_values

_LARGE_BYTES = 16 << 20
MAX_PIXELS = 1 << 26  # of a slice: 8192 x 8192
_UNDEFINED_LENGTH = 0xFFFFFFFF
_ITEM, _END_OF_ITEMS = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"


class PixelReader:
    """Reads the stored values of slices. Keeps the last file, since it may have more frames."""

    def __init__(self, input_dir: ArchiveDirectory):
        self._input_dir = input_dir
        self._source: Source | None = None
        self._data = b""
        self._dataset: pydicom.Dataset | None = None
        # of a NIfTI file: its values, or why there are none
        self._frames: np.ndarray | NiftiError | None = None
        self.hu_against_table = False  # the last file; see `nifti.are_hu`

    def read(self, header: Header) -> np.ndarray:
        """The stored pixel values [rows, columns] of one slice; possibly read-only.

        DICOM gives integers with the sign of Pixel Representation, NIfTI also floats.

        Raises:
            PixelError: unsupported, undecodable or truncated pixel data.
            OSError: the file cannot be read, or was replaced since its header was read.
        """
        if header.rows * header.columns > MAX_PIXELS:
            raise PixelError("undecodable_pixels", f"matrix of {header.rows} x {header.columns}")
        if self._source != header.source:
            if _ends_in_zeros(self._input_dir, header):
                raise PixelError("truncated_pixel_data", "zeros behind the header; copy it again")
            self._data = read_bytes(self._input_dir, header.source)
            self._source = None
            if header.transfer_syntax not in (NIFTI, DEFLATED) and not _holds_instance(
                self._data, header
            ):
                raise changed(header.source, "was replaced since its header was read")
            self._source, self._dataset, self._frames = header.source, None, None
        if header.transfer_syntax == NIFTI:
            return self._nifti(header)
        if header.transfer_syntax == DEFLATED:
            return self._by_pydicom(header)
        if header.transfer_syntax not in (*NATIVE_SYNTAXES, *COMPRESSED_SYNTAXES):
            raise PixelError("unsupported_transfer_syntax", header.transfer_syntax)
        big = header.transfer_syntax == NATIVE_SYNTAXES[2]
        start, end = _extent(self._data, header, ">" if big else "<")
        if end is None:
            return _compressed(self._data, start, header)
        if header.bits_allocated in (16, 32) or (header.bits_allocated == 8 and not big):
            return _native(self._data, header, start, end)
        return self._by_pydicom(header)

    def _nifti(self, header: Header) -> np.ndarray:
        if self._frames is None:
            data, self._data = self._data, b""
            try:
                self._frames = read_frames(data, header)
                self.hu_against_table = header.rescale_from_table and are_hu(self._frames, header)
            except NiftiError as error:
                self._frames = error
        if isinstance(self._frames, NiftiError):
            raise PixelError(self._frames.reason, str(self._frames))
        values = self._frames[header.frame]
        if values.dtype.kind != "f" or np.isfinite(values).all():
            return values
        try:
            return with_padding(values, self.rescaled(header))
        except NiftiError as error:
            raise PixelError(error.reason, str(error)) from None

    def rescaled(self, header: Header) -> Header:
        """The header of a slice that was read, with the rescale that turns its values into HU."""
        if not self.hu_against_table:
            return header
        return dataclasses.replace(header, rescale_slope=1.0, rescale_intercept=0.0)

    def _by_pydicom(self, header: Header) -> np.ndarray:
        """Pixels of a deflated file, or of unusual Bits Allocated."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if self._dataset is None:
                    self._dataset = pydicom.dcmread(io.BytesIO(self._data), force=True)
                # pydicom leaves out an element that does not end.
                if "PixelData" not in self._dataset:
                    raise PixelError(
                        "truncated_pixel_data", "the pixel data do not end within the file"
                    )
                values = pixel_array(
                    self._dataset, index=header.frame, raw=True, correct_unused_bits=False
                )
        except PixelError:
            raise
        except Exception as error:  # of many kinds on damaged bytes
            raise PixelError("undecodable_pixels", type(error).__name__) from error
        _check_shape(values, header)
        return stored_values(values, header)


def _check_shape(values: np.ndarray, header: Header) -> None:
    if values.shape != (header.rows, header.columns) or values.dtype.kind not in "iu":
        raise PixelError("undecodable_pixels", "decoded to another shape than Rows x Columns")


def _ends_in_zeros(input_dir: ArchiveDirectory, header: Header) -> bool:
    """Whether zeros stand where a large file's pixel data should begin, as after an interrupted
    copy: such a file may have any size, and is not read."""
    source, offset = header.source, header.pixel_data_offset
    if source.member or source.size < _LARGE_BYTES or offset is None or offset >= source.size:
        return False
    with open_source(input_dir, source) as file:
        file.seek(offset)
        return not any(file.read(8))


def _holds_instance(data: bytes, header: Header) -> bool:
    """Whether a file still is the image that its header named. Without a proper SOP Instance UID
    the answer is yes."""
    uid = header.sop_instance_uid
    return not re.fullmatch(r"[0-9.]{8,64}", uid) or uid.encode() in data


def _extent(data: bytes, header: Header, order: str) -> tuple[int, int | None]:
    """Where the value of the (7FE0,0010) element begins and ends; the end is None where it holds
    compressed frames, whatever the transfer syntax says."""
    offset = header.pixel_data_offset
    if offset is None or data[offset : offset + 4] != struct.pack(order + "HH", 0x7FE0, 0x0010):
        raise PixelError("truncated_pixel_data", "no pixel data behind the header")
    # The bytes tell, since some files name a wrong transfer syntax. As an implicit length these VRs
    # would be odd.
    explicit = data[offset + 4 : offset + 8] in (b"OW\0\0", b"OB\0\0", b"UN\0\0")
    start = offset + (12 if explicit else 8)
    if len(data) < start:
        raise PixelError("truncated_pixel_data", "no pixel data behind the header")
    length = struct.unpack(order + "I", data[start - 4 : start])[0]
    if length == _UNDEFINED_LENGTH:
        return start, None
    native = header.transfer_syntax in NATIVE_SYNTAXES
    if length < _native_bytes(header) and data[start : start + 4] == _ITEM:
        return start, None
    damaged = length % 2 or (
        start + length > len(data) and header.transfer_syntax != NATIVE_SYNTAXES[0]
    )
    # A damaged VR read as a length would shift the image by two values.
    if not explicit and damaged:
        raise PixelError("undecodable_pixels", "the pixel data element is damaged")
    if not native and length < _native_bytes(header):
        raise PixelError(
            "undecodable_pixels", "neither compressed frames nor uncompressed pixels of full length"
        )
    return start, min(len(data), start + length)


def _native_bytes(header: Header) -> int:
    """Length of all uncompressed frames of a file."""
    return header.rows * header.columns * header.number_of_frames * header.bits_allocated // 8


def _native(data: bytes, header: Header, start: int, end: int) -> np.ndarray:
    big = header.transfer_syntax == NATIVE_SYNTAXES[2]
    count = header.rows * header.columns
    bytes_a_value = header.bits_allocated // 8
    start += header.frame * count * bytes_a_value
    if start + count * bytes_a_value > end:
        raise PixelError(
            "truncated_pixel_data", f"{max(0, end - start)} of {count * bytes_a_value} bytes"
        )
    kind = "i" if header.pixel_representation else "u"
    values = np.frombuffer(data, f"{'>' if big else '<'}{kind}{bytes_a_value}", count, start)
    if big:
        values = values.astype(values.dtype.newbyteorder("="))
    return stored_values(values.reshape(header.rows, header.columns), header)


def _compressed(data: bytes, start: int, header: Header) -> np.ndarray:
    fragments = _fragments(data, start)
    if header.number_of_frames == 1:
        frame = b"".join(fragments[1:]) if len(fragments) > 2 else fragments[-1]
    elif len(fragments) == header.number_of_frames + 1:
        frame = fragments[header.frame + 1]
    else:
        frame = _frame_of_fragments(fragments[1:], data[start:], header)
    if header.bits_allocated not in (8, 16, 32):
        raise PixelError("undecodable_pixels", f"bits allocated {header.bits_allocated}")
    try:
        values, precision = decoders.decode(
            frame, header.rows, header.columns, header.bits_allocated // 8
        )
    # of many kinds on damaged bytes
    except Exception as error:
        raise PixelError("undecodable_pixels", type(error).__name__) from error
    _check_shape(values, header)
    bits = max(header.bits_allocated, 8 * values.itemsize)
    kind = "i" if header.pixel_representation else "u"
    values = values.astype(f"u{bits // 8}", copy=False).view(f"{kind}{bits // 8}")
    return stored_values(values, header, precision)


def _fragments(data: bytes, at: int) -> list[bytes]:
    """The items of encapsulated pixel data: the offset table, and the fragments of the frames.

    Raises:
        PixelError: an item is cut off or damaged, or no fragment follows the table.
    """
    items = []
    while data[at : at + 4] == _ITEM:
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8
        if at + length > len(data):
            raise PixelError("truncated_pixel_data", "the pixel data do not end within the file")
        items.append(data[at : at + length])
        at += length
        # an odd length that does not count the byte behind it
        if length % 2 and data[at + 1 : at + 5] in (_ITEM, _END_OF_ITEMS):
            at += 1
    if len(items) < 2:
        raise PixelError(
            "undecodable_pixels" if items else "truncated_pixel_data", "no compressed frame"
        )
    if len(data) >= at + 8 and data[at : at + 4] != _END_OF_ITEMS:
        raise PixelError("undecodable_pixels", "the items of the pixel data are damaged")
    return items


def _frame_of_fragments(fragments: list[bytes], value: bytes, header: Header) -> bytes:
    """One of several frames that have several fragments each, by their first bytes, else by the
    offset table."""
    starts = [i for i, part in enumerate(fragments) if part.startswith(decoders.STARTS)]
    if len(starts) == header.number_of_frames:
        ends = [*starts[1:], len(fragments)]
        return b"".join(fragments[starts[header.frame] : ends[header.frame]])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_frame(value, header.frame, number_of_frames=header.number_of_frames)
    except Exception as error:
        raise PixelError("undecodable_pixels", type(error).__name__) from error
