"""Stored pixel values of one slice, for every transfer syntax and for NIfTI files.

Pixel data are read at the offset from the header. Uncompressed pixels (nearly all archives) are
taken straight from the bytes. Compressed pixels go through pydicom's decoders, backed by
imagecodecs (`data_prep.scan.decoders`).
"""

from __future__ import annotations

import io
import re
import struct
import warnings

import numpy as np
import pydicom
from pydicom.filereader import read_dataset
from pydicom.pixels import pixel_array

from data_prep.scan.archives import ArchiveDirectory, Source, changed, read_bytes
from data_prep.scan.decoders import DECODER_DEPENDENCIES, decode
from data_prep.scan.elements import DEFLATED
from data_prep.scan.headers import NATIVE_SYNTAXES, NIFTI, Header
from data_prep.scan.nifti import NiftiError, read_frames

MAX_PIXELS = 1 << 26  # of a slice: 8192 x 8192


class PixelError(ValueError):
    """Pixels that cannot be read. `reason` is a name of `data_prep.scan.reasons.REASONS`; the
    message is the detail."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class PixelReader:
    """Reads the stored values of slices. Keeps the last file, since it may have more frames."""

    def __init__(self, input_dir: ArchiveDirectory):
        self._input_dir = input_dir
        self._source: Source | None = None
        self._data = b""
        self._dataset: pydicom.Dataset | None = None
        self._frames: np.ndarray | None = None  # of a NIfTI file

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
            self._data = read_bytes(self._input_dir, header.source)
            self._source = None
            if header.transfer_syntax not in (NIFTI, DEFLATED) and not _holds_instance(
                self._data, header
            ):
                raise changed(header.source, "was replaced since its header was read")
            self._source, self._dataset, self._frames = header.source, None, None
        if header.transfer_syntax == NIFTI:
            return self._nifti(header)
        if header.transfer_syntax in NATIVE_SYNTAXES and header.bits_allocated in (16, 32):
            return _native(self._data, header)
        return self._decode(header)

    def _nifti(self, header: Header) -> np.ndarray:
        if self._frames is None:
            data, self._data = self._data, b""
            try:
                self._frames = read_frames(data, header)
            except NiftiError as error:
                self._source = None
                raise PixelError(error.reason, str(error)) from error
        values = self._frames[header.frame]
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise PixelError("undecodable_pixels", "values that are no finite numbers")
        return values

    def _decode(self, header: Header) -> np.ndarray:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compressed = header.transfer_syntax in DECODER_DEPENDENCIES
                single = compressed and header.number_of_frames == 1 and not header.frames
                if self._dataset is None:
                    self._dataset = (
                        _pixel_data_element(self._data, header)
                        if single
                        else pydicom.dcmread(io.BytesIO(self._data), force=True)
                    )
                # pydicom leaves out an element that does not end.
                if "PixelData" not in self._dataset:
                    raise PixelError(
                        "truncated_pixel_data", "the pixel data do not end within the file"
                    )
                if single:
                    value = self._dataset["PixelData"].value
                    values = decode(value, header.transfer_syntax, 0, **_image_properties(header))
                elif compressed:
                    values = decode(self._dataset, header.transfer_syntax, header.frame)
                else:  # deflated, or uncompressed with other bits allocated
                    values = pixel_array(self._dataset, index=header.frame, raw=True)
        except PixelError:
            raise
        except NotImplementedError as error:
            raise PixelError("unsupported_transfer_syntax", header.transfer_syntax) from error
        except Exception as error:  # decoders raise many kinds on damaged bytes
            raise PixelError("undecodable_pixels", type(error).__name__) from error
        if values.shape != (header.rows, header.columns) or values.dtype.kind not in "iu":
            raise PixelError("undecodable_pixels", "decoded to another shape than Rows x Columns")
        return values


def _pixel_data_element(data: bytes, header: Header) -> pydicom.Dataset:
    """The end of a compressed file, from its Pixel Data element on."""
    file = io.BytesIO(data)
    file.seek(header.pixel_data_offset)
    return read_dataset(file, is_implicit_VR=False, is_little_endian=True)


def _image_properties(header: Header) -> dict[str, str | int]:
    """The properties of an image that pydicom's decoders need."""
    return {
        "rows": header.rows,
        "columns": header.columns,
        "samples_per_pixel": header.samples_per_pixel,
        "number_of_frames": 1,
        "photometric_interpretation": header.photometric,
        "bits_allocated": header.bits_allocated,
        "bits_stored": header.bits_stored,
        "pixel_representation": header.pixel_representation,
        "pixel_keyword": "PixelData",
    }


def _holds_instance(data: bytes, header: Header) -> bool:
    """Whether a file still is the image that its header named. Without a proper SOP Instance UID
    the answer is yes."""
    uid = header.sop_instance_uid
    return not re.fullmatch(r"[0-9.]{8,64}", uid) or uid.encode() in data


def _native(data: bytes, header: Header) -> np.ndarray:
    big = header.transfer_syntax == NATIVE_SYNTAXES[2]
    start, end = _native_extent(data, header, ">" if big else "<")
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
    return _mask_unused_bits(values.reshape(header.rows, header.columns), header)


def _native_extent(data: bytes, header: Header, order: str) -> tuple[int, int]:
    """Where the value of the (7FE0,0010) element begins and ends."""
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
    if length == 0xFFFFFFFF:
        raise PixelError(
            "undecodable_pixels", "compressed pixel data under an uncompressed transfer syntax"
        )
    damaged = length % 2 or (
        start + length > len(data) and header.transfer_syntax != NATIVE_SYNTAXES[0]
    )
    # A damaged VR read as a length would shift the image by two values.
    if not explicit and damaged:
        raise PixelError("undecodable_pixels", "the pixel data element is damaged")
    return start, min(len(data), start + length)


def _mask_unused_bits(values: np.ndarray, header: Header) -> np.ndarray:
    """Drops the bits above the stored bits (old overlays), and extends the sign.

    Raises:
        PixelError: High Bit is not the last stored bit, as DICOM asks. One of the two is wrong, so
          the values would be wrong.
    """
    bits = header.bits_allocated
    stored = header.bits_stored
    if stored == bits:
        return values
    if not 0 < stored == header.high_bit + 1 <= bits:
        raise PixelError(
            "undecodable_pixels", f"bits stored {stored}, high bit {header.high_bit}, of {bits}"
        )
    return (values << (bits - 1 - header.high_bit)) >> (bits - stored)
