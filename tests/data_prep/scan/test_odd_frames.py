"""Compressed frames as archives have them: bytes behind the end marker, no end marker, odd lengths,
fragments, and pixel data that are coded otherwise than the transfer syntax says."""

import numpy as np
import pydicom
import pytest

from data_prep.scan import decoders
from tests.data_prep.scan.test_dicom_pixels import (
    CODINGS,
    JPEG_LS,
    RLE,
)
from tests.helpers import dicom_files
from tests.helpers.dicom_files import convert, only_volume

END = b"\xff\xd9"
ANYTHING = np.random.default_rng(0).integers(0, 256, 501, np.uint8).tobytes()
MARKED = [coding for coding in CODINGS if coding.id != "rle"]  # they end with a marker


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


@pytest.mark.parametrize(("syntax", "encode"), MARKED)
def test_anything_behind_the_end_marker_is_passed_over(tmp_path, syntax, encode):
    hu, datasets = compressed(syntax, encode, lambda frame: frame + ANYTHING)
    volume = only_volume(convert(dicom_files.write(tmp_path, datasets)))
    np.testing.assert_array_equal(volume.hu, hu)


@pytest.mark.parametrize(("syntax", "encode"), MARKED)
def test_whole_frames_without_an_end_marker_in_items_of_odd_length(tmp_path, syntax, encode):
    hu, datasets = compressed(syntax, encode, lambda frame: frame)
    for ds in datasets:
        frame = pydicom.encaps.get_frame(ds.PixelData, 0).rstrip(b"\0").removesuffix(END)
        ds.PixelData = encapsulated(frame)
    volume = only_volume(convert(dicom_files.write(tmp_path, datasets)))
    np.testing.assert_array_equal(volume.hu, hu)


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


@pytest.mark.parametrize(("syntax", "encode"), CODINGS)
def test_compressed_pixels_under_a_native_syntax(tmp_path, syntax, encode):
    """The frame says by itself how it is coded; half of the files give a length of the items."""
    hu, datasets = compressed(syntax, encode, lambda frame: frame)
    folder = dicom_files.write(tmp_path, datasets)
    for number, path in enumerate(sorted(folder.iterdir())):
        named = syntax.encode()
        native = b"1.2.840.10008.1.2.1".ljust(len(named), b"\0")
        data = path.read_bytes().replace(named, native, 1)
        if number % 2:
            start = data.index(b"\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff") + 12
            length = len(data) - start - 8  # without the end of the sequence
            data = data[: start - 4] + length.to_bytes(4, "little") + data[start:-8]
        path.write_bytes(data)
    np.testing.assert_array_equal(only_volume(convert(folder)).hu, hu)


@pytest.mark.parametrize("encode", [pytest.param(p.values[1], id=p.id) for p in MARKED])
@pytest.mark.parametrize("behind", [b"\n\n", bytes(9), b"\xff" * 4, ANYTHING], ids=repr)
def test_frames_that_miss_data_are_refused_with_any_bytes_behind(encode, behind):
    for image in dicom_files.thorax(3).astype(np.uint16) + 1024:
        frame = encode(image)
        for lost in (5, 40, len(frame) // 2):
            for damaged in (frame[:-lost], frame[:-lost] + behind):
                with pytest.raises((ValueError, RuntimeError)):
                    decoders.decode(damaged, *image.shape, 2)


@pytest.mark.parametrize("encode", [pytest.param(p.values[1], id=p.id) for p in CODINGS])
def test_bytes_of_any_kind_and_number_behind_a_frame(encode):
    for image in dicom_files.thorax(3).astype(np.uint16) + 1024:
        frame = encode(image)
        for behind in (b"\n\n", b"\x5a", b"\xff" * 9, bytes(3000), b"\xff\xd8\xff", ANYTHING):
            values = decoders.decode(frame + behind, *image.shape, 2).values
            np.testing.assert_array_equal(values, image)


@pytest.mark.parametrize("with_offsets", [False, True])
@pytest.mark.parametrize(("syntax", "encode"), MARKED)
def test_frames_of_an_enhanced_file_in_several_fragments(tmp_path, syntax, encode, with_offsets):
    """Shuffled frames, with bytes behind their end markers."""
    hu, order = dicom_files.thorax(24), [5, *range(5), *range(23, 5, -1)]
    ds = dicom_files.enhanced(hu, intercepts=[-1024] * 24, order=order)
    parts, offsets = [], []
    for i in order:
        frame = encode((hu[i].astype(np.int32) + 1024).astype(np.uint16)) + b"\xff" * 30
        frame += bytes(len(frame) % 2)
        offsets.append(sum(map(len, parts)))
        parts += [item(frame[:600]), item(frame[600:])]
    table = np.array(offsets if with_offsets else [], "<u4").tobytes()
    ds.PixelData = item(table) + b"".join(parts) + b"\xfe\xff\xdd\xe0\0\0\0\0"
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    volume = only_volume(convert(dicom_files.write(tmp_path, [ds])))
    np.testing.assert_array_equal(volume.hu, hu)
