"""Compressed frames as archives have them: bytes behind the end marker, no end marker, odd lengths,
fragments, and pixel data that are coded otherwise than the transfer syntax says."""

import numpy as np
import pydicom
import pytest

from tests.data_prep.scan.test_dicom_pixels import (
    CODINGS,
    JPEG_LS,
    RLE,
)
from tests.helpers import dicom_files
from tests.helpers.dicom_files import convert, only_rejection, only_volume

END = b"\xff\xd9"
BEHIND = {
    "anything": np.random.default_rng(0).integers(0, 256, 501, np.uint8).tobytes(),
}


def item(data: bytes) -> bytes:
    """An item of encapsulated pixel data, of any length."""
    return b"\xfe\xff\x00\xe0" + len(data).to_bytes(4, "little") + data


def encapsulated(*fragments: bytes) -> bytes:
    return item(b"") + b"".join(map(item, fragments)) + b"\xfe\xff\xdd\xe0\0\0\0\0"


def compressed(syntax, encode, change, count=24):
    """The HU [S, H, W], and a data set for each slice with a changed frame."""
    hu = dicom_files.thorax(count)
    datasets = dicom_files.slices(hu)
    for ds in datasets:
        dicom_files.compress(ds, syntax, lambda image: change(encode(image)))
    return hu, datasets


@pytest.mark.xfail(strict=True, reason="issue 17: bytes behind the end marker")
@pytest.mark.parametrize(("syntax", "encode"), [p for p in CODINGS if p.id != "rle"])
def test_anything_behind_the_end_marker_is_passed_over(tmp_path, syntax, encode):
    hu, datasets = compressed(syntax, encode, lambda frame: frame + BEHIND["anything"])
    volume = only_volume(convert(dicom_files.write(tmp_path, datasets)))
    np.testing.assert_array_equal(volume.hu, hu)


@pytest.mark.xfail(strict=True, reason="issue 17: no end marker")
@pytest.mark.parametrize(("syntax", "encode"), [p for p in CODINGS if p.id != "rle"])
def test_whole_frames_without_an_end_marker_in_items_of_odd_length(tmp_path, syntax, encode):
    hu, datasets = compressed(syntax, encode, lambda frame: frame)
    for ds in datasets:
        frame = pydicom.encaps.get_frame(ds.PixelData, 0).rstrip(b"\0").removesuffix(END)
        ds.PixelData = encapsulated(frame)
    volume = only_volume(convert(dicom_files.write(tmp_path, datasets)))
    np.testing.assert_array_equal(volume.hu, hu)


@pytest.mark.xfail(strict=True, reason="issue 17: native pixels under a compressed syntax")
@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("syntax", [JPEG_LS, RLE])
def test_native_pixels_under_a_compressed_syntax(tmp_path, syntax, implicit):
    hu = dicom_files.thorax()
    datasets = dicom_files.slices(hu, signed=True)
    native = "1.2.840.10008.1.2" if implicit else "1.2.840.10008.1.2.1"
    for ds in datasets:
        ds.file_meta.TransferSyntaxUID = pydicom.uid.UID(native)
    folder = dicom_files.write(tmp_path, datasets)
    for path in folder.iterdir():
        data = path.read_bytes()
        at = data.index(native.encode())
        padded = len(native) + len(native) % 2
        named = syntax.encode() + bytes(len(syntax) % 2)
        length = int.from_bytes(data[140:144], "little") + len(named) - padded
        data = (
            data[:140]
            + length.to_bytes(4, "little")
            + data[144 : at - 2]
            + (len(named).to_bytes(2, "little") + named + data[at + padded :])
        )
        path.write_bytes(data)
    np.testing.assert_array_equal(only_volume(convert(folder)).hu, hu)


@pytest.mark.xfail(strict=True, reason="issue 17: compressed pixels under a native syntax")
@pytest.mark.parametrize(("syntax", "encode"), CODINGS)
def test_compressed_pixels_under_a_native_syntax(tmp_path, syntax, encode):
    """The frame says by itself how it is coded."""
    hu, datasets = compressed(syntax, encode, lambda frame: frame)
    folder = dicom_files.write(tmp_path, datasets)
    for path in folder.iterdir():
        named = syntax.encode()
        native = b"1.2.840.10008.1.2.1".ljust(len(named), b"\0")
        path.write_bytes(path.read_bytes().replace(named, native, 1))
    np.testing.assert_array_equal(only_volume(convert(folder)).hu, hu)


@pytest.mark.parametrize(("syntax", "encode"), CODINGS)
@pytest.mark.parametrize("lost", [3, 40])
def test_frames_that_miss_data_are_refused_with_and_without_bytes_behind(
    tmp_path, syntax, encode, lost
):
    for behind in (b"", b"\n\n", bytes(100)):
        folder = tmp_path / str(len(behind))
        _, datasets = compressed(
            syntax, encode, lambda frame, behind=behind: frame[:-lost] + behind, count=20
        )
        rejection = only_rejection(convert(dicom_files.write(folder, datasets)))
        assert rejection.reason == "undecodable_pixels"
