"""Decoders of compressed pixel data: pydicom's machinery with imagecodecs as its plugin.

pydicom finds a frame among its fragments, shapes it, and honours bits allocated, bits stored and
pixel representation. imagecodecs (BSD) decodes the frame. The decoders are objects of this module,
so that pydicom's own decoders stay unchanged.
"""

from __future__ import annotations

import itertools
import struct

import imagecodecs
import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import Decoder, DecodeRunner
from pydicom.uid import UID

_JPEG = {
    "1.2.840.10008.1.2.4.50",  # baseline, 8 bits
    "1.2.840.10008.1.2.4.51",  # extended, 12 bits
    "1.2.840.10008.1.2.4.53",  # spectral selection (retired)
    "1.2.840.10008.1.2.4.55",  # full progression (retired)
    "1.2.840.10008.1.2.4.57",  # lossless
    "1.2.840.10008.1.2.4.70",  # lossless, first-order prediction
}
_JPEG_LS = {"1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"}
_JPEG_2000 = {
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.91",
    "1.2.840.10008.1.2.4.201",  # high-throughput JPEG 2000
    "1.2.840.10008.1.2.4.202",
    "1.2.840.10008.1.2.4.203",
}
_RLE = {"1.2.840.10008.1.2.5"}
_END_OF_IMAGE = b"\xff\xd9"  # the last marker in JPEG, JPEG-LS and JPEG 2000
DECODER_DEPENDENCIES = {UID(uid): ("imagecodecs",) for uid in _JPEG | _JPEG_LS | _JPEG_2000 | _RLE}


def is_available(uid: str) -> bool:
    """Part of pydicom's plugin interface."""
    return uid in DECODER_DEPENDENCIES


def decode_frame(frame: bytes, runner: DecodeRunner) -> bytes:
    """One frame's pixels as bytes; part of pydicom's plugin interface.

    Raises:
        ValueError: the frame ends early, or has another matrix than Rows x Columns, or several
          channels.
        RuntimeError: imagecodecs cannot decode it.
    """
    syntax = runner.transfer_syntax
    if syntax not in _RLE and not frame.rstrip(b"\0").endswith(_END_OF_IMAGE):
        # Here the JPEG decoder fills in pixels silently, and the JPEG-LS decoder may take minutes.
        raise ValueError("the frame ends early")
    if syntax not in _RLE:
        _check_matrix(frame, runner.rows, runner.columns)
    if syntax in _RLE:
        _check_segments(frame, runner.bits_allocated // 8)
        sample = np.dtype(f"<u{runner.bits_allocated // 8}")
        values = np.frombuffer(imagecodecs.dicomrle_decode(frame, sample), sample)
        if values.size < runner.rows * runner.columns:
            raise ValueError("too few run-length coded values")
        values = values[: runner.rows * runner.columns].reshape(runner.rows, runner.columns)
    elif syntax in _JPEG:
        values = imagecodecs.jpeg8_decode(frame)
    elif syntax in _JPEG_LS:
        values = imagecodecs.jpegls_decode(frame)
    else:
        values = imagecodecs.jpeg2k_decode(frame)
    if values.shape != (runner.rows, runner.columns):
        raise ValueError(
            f"the frame is {values.shape}, the header says {(runner.rows, runner.columns)}"
        )
    runner.set_option("bits_allocated", 8 * values.dtype.itemsize)
    return values.tobytes()


def _check_matrix(frame: bytes, rows: int, columns: int) -> None:
    """Raises ValueError if a frame names another matrix than the header.

    Decoders allocate the matrix of the frame, so a damaged one could fill the memory.
    """
    # JPEG, JPEG-LS: segments up to the start of frame (SOF0 .. SOF15, SOF55)
    if frame[:2] == b"\xff\xd8":
        at = 2
        while at + 9 <= len(frame):
            marker = frame[at + 1]
            if frame[at] != 0xFF:
                break
            if marker == 0xFF:  # a fill byte
                at += 1
                continue
            if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
                matrix = struct.unpack_from(">HH", frame, at + 5)
                if matrix != (rows, columns):
                    raise ValueError(f"the frame is {matrix}, the header says {(rows, columns)}")
                return
            at += 2 + struct.unpack_from(">H", frame, at + 2)[0]
    # JPEG 2000: SOC, SIZ
    elif (at := frame.find(b"\xff\x4f\xff\x51")) >= 0 and at + 24 <= len(frame):
        right, bottom, left, top = struct.unpack_from(">4I", frame, at + 8)
        if (bottom - top, right - left) == (rows, columns):
            return
    raise ValueError("the frame does not name the matrix of the header")


def _check_segments(frame: bytes, number: int) -> None:
    """Raises ValueError if the header of a run-length coded frame is damaged.

    The decoder reads wherever the header points to.
    """
    if len(frame) < 64:
        raise ValueError("the frame ends within its header")
    segments, *offsets = struct.unpack_from("<16I", frame)
    offsets = [*offsets[:number], len(frame)]
    if segments != number or offsets[0] < 64 or any(a >= b for a, b in itertools.pairwise(offsets)):
        raise ValueError("the segments of the frame are not where its header says")


def _make_decoder(uid: UID) -> Decoder:
    decoder = Decoder(uid)
    decoder.add_plugin("imagecodecs", (__name__, "decode_frame"))
    return decoder


_DECODERS = {uid: _make_decoder(uid) for uid in DECODER_DEPENDENCIES}


def decode(source: Dataset | bytes, syntax: str, frame: int, **properties: str | int) -> np.ndarray:
    """The stored values [rows, columns] of one frame.

    Args:
        source: a compressed data set, or the value of its Pixel Data alone.
        syntax: Transfer Syntax UID.
        frame: number of the frame, from 0.
        properties: of the image, where `source` is not a data set: pydicom's `rows`, `columns`,
          `bits_allocated`, ...

    Raises:
        Exception: of many kinds, from pydicom and imagecodecs, on undecodable pixel data.
    """
    return _DECODERS[UID(syntax)].as_array(source, index=frame, raw=True, **properties)[0]
