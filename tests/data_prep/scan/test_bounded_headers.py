"""Headers that would keep pydicom busy for hours take a second, and what is sound stays."""

import time
import zlib

import numpy as np
import pytest

from data_prep.privacy import leaks
from data_prep.scan.archives import Source
from data_prep.scan.headers import Header, NotAnImage, read_header
from tests.helpers import dicom_files
from tests.helpers.dicom_files import convert, only_volume

ITEM, END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0\0\0\0\0"
PIXELS = b"\xe0\x7f\x10\x00OW"
THORAX = dicom_files.thorax()
SECONDS = 20  # for what takes one; some of these files would take minutes


def timed_read(folder, content: bytes) -> Header | NotAnImage:
    (folder / "file").write_bytes(content)
    start = time.perf_counter()
    entry = read_header(folder, Source("file", "", len(content)))
    assert time.perf_counter() - start < SECONDS
    return entry


def slice_bytes(number: int = 0) -> bytes:
    return dicom_files.to_bytes(dicom_files.slices(THORAX)[number])


def with_inserted(content: bytes, element: bytes) -> bytes:
    """The file with an element before its pixels."""
    at = content.rindex(PIXELS)
    return content[:at] + element + content[at:]


# ---- two further members -------------------------------------------------------------------------


def test_zeros_behind_a_sound_header(tmp_path):
    """The slice is known and lost, the other slices are a volume."""
    datasets = dicom_files.slices(THORAX)
    folder = dicom_files.write(tmp_path / "scan", datasets[:-1])
    content = dicom_files.to_bytes(datasets[-1])
    content = content[: content.rindex(PIXELS)] + bytes(20 << 20)
    assert isinstance(timed_read(tmp_path, content), Header)
    (folder / "cut").write_bytes(content)
    volume = only_volume(convert(folder))
    np.testing.assert_array_equal(volume.hu, THORAX[:-1])
    assert [reason for _, reason in volume.dropped] == ["truncated_pixel_data"]


def test_sequences_of_undefined_length_with_many_items(tmp_path):
    """In an element that no scan needs, as explicit lengths would be passed over."""
    items = (ITEM + bytes(4)) * 200_000
    content = with_inserted(slice_bytes(), b"\x40\0\x75\x02SQ\0\0\xff\xff\xff\xff" + items + END)
    entry = timed_read(tmp_path, content)
    assert entry.reason == "unreadable" and "elements" in entry.detail


@pytest.mark.parametrize("bomb", ["items", "zeros"])
def test_a_deflated_file_of_many_elements(tmp_path, bomb):
    dataset = dicom_files.slices(THORAX)[0]
    content = dicom_files.to_bytes(dataset)
    if bomb == "items":
        items = (ITEM + bytes(4)) * 200_000
        content = with_inserted(content, b"\x40\0\x75\x02SQ\0\0\xff\xff\xff\xff" + items + END)
    else:
        content = content[: content.rindex(PIXELS)] + bytes(5 << 20)
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    meta = dicom_files.to_bytes(dataset)
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    data = deflate.compress(content[meta_end(content) :]) + deflate.flush()
    entry = timed_read(tmp_path, meta[: meta_end(meta)] + data)
    assert len(data) < 50_000
    if bomb == "items":
        assert entry.reason == "unreadable" and "elements" in entry.detail
    else:
        assert isinstance(entry, Header)


def meta_end(content: bytes) -> int:
    """Where the data set begins."""
    return 144 + int.from_bytes(content[140:144], "little")


@pytest.mark.parametrize("filler", [b"\0", b"\xff", b" ", b"\x09\0\x01\0LO\0\0", b"\2\0\1\0UL\0\0"])
def test_files_that_hold_one_filler(tmp_path, filler):
    content = bytes(128) + b"DICM" + filler * ((4 << 20) // len(filler))
    entry = timed_read(tmp_path, content)
    assert isinstance(entry, NotAnImage) and entry.reason == "unreadable"
    assert leaks.header_elements(content)[2] == (filler not in (b"\xff", b" "))


def test_zeros_behind_the_meta_information(tmp_path):
    """The file is 4 GB large and has no blocks on the disk."""
    content = slice_bytes()
    with open(tmp_path / "file", "wb") as file:
        file.write(content[: meta_end(content)])
        file.truncate(4 << 30)
    entry = read_header(tmp_path, Source("file", "", 4 << 30))
    assert entry.reason == "unreadable" and "an interrupted copy" in entry.detail


# ---- what the cases stand for --------------------------------------------------------------------


@pytest.mark.parametrize("undefined", [False, True])
def test_empty_items_in_per_frame_groups(tmp_path, undefined):
    items = (ITEM + bytes(4)) * 400_000
    length = b"\xff\xff\xff\xff" if undefined else len(items).to_bytes(4, "little")
    element = b"\x00\x52\x30\x92SQ\0\0" + length + items + END * undefined
    entry = timed_read(tmp_path, with_inserted(slice_bytes(3), element))
    if undefined:
        assert entry.reason == "unreadable"
    else:  # groups of other frames than the image has say nothing about it
        assert entry.position == (-170.0, -160.0, -292.5)
