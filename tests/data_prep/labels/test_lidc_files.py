"""Odd files among the readers' XML are left out by name; archives of XML are read in bounds."""

import io
import tarfile

import pytest

from data_prep.labels import annotation_files, lidc
from data_prep.system.errors import InputError
from tests.data_prep.labels.test_lidc import OUTLINE, SCORES, xml, xml_nodule

ONE = [xml_nodule(OUTLINE, SCORES)]
OTHER = [xml_nodule(OUTLINE, SCORES | {"malignancy": 5})]
APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(60)


class Blanks(io.RawIOBase):
    """A file of blanks, which are not held in memory."""

    def __init__(self, size: int):
        super().__init__()
        self.left = size

    def read(self, number: int = -1) -> bytes:
        number = min(number if number > 0 else 1 << 20, self.left)
        self.left -= number
        return b" " * number


def tar_with(path, name: str, size: int, **pax_headers) -> None:
    with tarfile.open(path, "w:xz", pax_headers=pax_headers) as archive:
        member = tarfile.TarInfo(name)
        member.size = size
        archive.addfile(member, Blanks(size))


# ---- two further members -------------------------------------------------------------------------


def test_xml_that_is_damaged_or_contradicts_costs_its_own_series_alone(tmp_path):
    (tmp_path / "1.xml").write_bytes(xml(ONE))
    (tmp_path / "2.xml").write_bytes(xml(ONE, series="second"))
    (tmp_path / "3.xml").write_bytes(xml(OTHER, series="second"))
    (tmp_path / "4.xml").write_bytes(xml(ONE, series="third")[:-30])
    (tmp_path / "5.xml").write_bytes(xml(ONE, series="fourth").replace(b"TRUE", b"MAYBE"))
    (tmp_path / "6.xml").write_bytes(b'<?xml version="1.0" encoding="no-such"?><a/>')
    (tmp_path / "7.xml").write_bytes(b"")
    (tmp_path / "._1.xml").write_bytes(APPLE_DOUBLE)
    left_out = []
    assert set(lidc.read_readings(tmp_path, left_out)) == {"series"}
    assert [(entry.path, entry.reason) for entry in left_out] == [
        ("._1.xml", "system_file"),
        ("3.xml", "contradicts"),
        ("4.xml", "damaged"),
        ("5.xml", "damaged"),
        ("6.xml", "damaged"),
        ("7.xml", "damaged"),
    ]


@pytest.mark.parametrize("name", ["notes.txt", "a.xml"])
def test_archives_that_expand_beyond_all_annotations_are_refused(tmp_path, name, monkeypatch):
    """Also by members that are not read, and by headers that are."""
    monkeypatch.setattr(annotation_files, "_ARCHIVE_FREE_BYTES", 1 << 20)
    tar_with(tmp_path / "a.tar.xz", name, 8 << 20)
    with pytest.raises(InputError, match=r"a\.tar\.xz: expands beyond all annotations"):
        lidc.read_readings(tmp_path / "a.tar.xz", [])
    tar_with(tmp_path / "b.tar.xz", "a.xml", 10, comment="x" * (8 << 20))
    with pytest.raises(InputError, match=r"b\.tar\.xz: expands beyond all annotations"):
        lidc.read_readings(tmp_path / "b.tar.xz", [])
