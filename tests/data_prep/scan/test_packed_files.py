"""Compressed slices and tar files are read in place or named with their remedy; names are no
content."""

import gzip
import io
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest

from data_prep.labels.lookup import LabelSources
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.prepare import prepare
from data_prep.raw.scans import plan_scans, read_scan
from data_prep.scan.archives import Source, Unreadable, list_sources, read_bytes
from data_prep.scan.headers import read_header
from data_prep.system.errors import InputError
from tests.helpers import dicom_files

THORAX = dicom_files.thorax()


def tar_of(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def slice_files(**options) -> dict[str, bytes]:
    datasets = dicom_files.slices(THORAX, **options)
    return {f"./scan/{i:02d}.dcm": dicom_files.to_bytes(ds) for i, ds in enumerate(datasets)}


def only_hu(path: Path) -> np.ndarray:
    """The HU of the one volume of a scan, by the door of single scans."""
    plan = plan_scans(path)
    (exam,) = plan.exams
    return read_scan(plan.input_dir, exam, [(50.0, 350.0)], 64).volume.hu


def reasons(folder: Path) -> dict[str, str]:
    """{path and member: reason} of the files without an image."""
    found = {}
    for entry in list_sources(folder):
        entry = entry if isinstance(entry, Unreadable) else read_header(folder, entry)
        if reason := getattr(entry, "reason", None):
            found[f"{entry.source.path} {entry.source.member}".strip()] = reason
    return found


# ---- two further members -------------------------------------------------------------------------


def test_a_tar_file_of_a_mac_with_links_folders_and_a_second_name(tmp_path):
    files = slice_files()
    path = tar_of(tmp_path / "in" / "export", files | {"._00.dcm": b"\0\5\x16\7" + bytes(80)})
    with tarfile.open(path, "a") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "./scan/00.dcm"
            tar.addfile(member)
        second = tarfile.TarInfo("./scan/01.dcm")
        tar.addfile(second, io.BytesIO(b""))
        outside = tarfile.TarInfo("../outside.dcm")
        outside.size = 3
        tar.addfile(outside, io.BytesIO(b"abc"))
    np.testing.assert_array_equal(only_hu(tmp_path / "in"), THORAX)
    np.testing.assert_array_equal(only_hu(path), THORAX)
    assert reasons(tmp_path / "in") == {
        "export ._00.dcm": "not_dicom",
        "export link": "outside_archive",
        "export ./scan/01.dcm": "bad_packed",
        "export ../outside.dcm": "outside_archive",
    }


def test_one_compressed_multi_frame_file(tmp_path):
    order = list(np.random.default_rng(0).permutation(len(THORAX)))
    enhanced = dicom_files.enhanced(THORAX, intercepts=[-1024] * len(THORAX), order=order)
    path = tmp_path / "scan.dcm.gz"
    path.write_bytes(gzip.compress(dicom_files.to_bytes(enhanced)))
    np.testing.assert_array_equal(only_hu(path), THORAX)


def test_what_cannot_be_read_in_place_is_named_with_the_remedy(tmp_path):
    files = slice_files()
    tar_of(tmp_path / "a.tar.gz", files, "w:gz")
    tar_of(tmp_path / "b.txz", files, "w:xz")
    one = files["./scan/00.dcm"]
    (tmp_path / "c.dcm.xz").write_bytes(lzma.compress(one))
    (tmp_path / "d.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(60))
    (tmp_path / "e.rar").write_bytes(b"Rar!\x1a\7" + bytes(60))
    with zipfile.ZipFile(tmp_path / "f.zip", "w") as archive:
        archive.writestr("0.dcm.gz", gzip.compress(one))
    (tmp_path / "g.dcm.gz").write_bytes(gzip.compress(one)[:-900])
    (tmp_path / "h.dcm.gz").write_bytes(gzip.compress(bytes(128) + b"DICM" + bytes(60 << 20)))
    assert reasons(tmp_path) == {
        "a.tar.gz": "packed",
        "b.txz": "packed",
        "c.dcm.xz": "packed",
        "d.7z": "packed",
        "e.rar": "packed",
        "f.zip 0.dcm.gz": "packed",
        "g.dcm.gz": "bad_packed",
        "h.dcm.gz": "too_large",
    }
    with pytest.raises(InputError, match="unpack"):
        plan_scans(tmp_path)


def test_folders_and_tar_members_whose_names_are_no_utf8(tmp_path):
    """A folder name of Latin-1 and a member of an old tar file, which are as good as any."""
    folder = os.fsencode(tmp_path / "in") + b"/Th\xf6rax"
    os.makedirs(folder)
    files = list(slice_files().values())
    for number, content in enumerate(files[:12]):
        with open(folder + b"/%d" % number, "wb") as file:
            file.write(content)
    members = {f"\udce4{number}": content for number, content in enumerate(files[12:])}
    with tarfile.open(tmp_path / "in" / "x.tar", "w", encoding="utf-8") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    np.testing.assert_array_equal(only_hu(tmp_path / "in"), THORAX)


# ---- what the case stands for --------------------------------------------------------------------


def test_compressed_slices_and_slices_of_a_tar_file(tmp_path):
    files = list(slice_files().values())
    for number, content in enumerate(files[:12]):
        (tmp_path / f"{number}.dcm.gz").write_bytes(gzip.compress(content))
    tar_of(tmp_path / "rest.tar", dict(enumerate_names(files[12:])))
    np.testing.assert_array_equal(only_hu(tmp_path), THORAX)
    sources = [entry for entry in list_sources(tmp_path) if isinstance(entry, Source)]
    assert sorted(read_bytes(tmp_path, source) for source in sources) == sorted(files)
    assert sorted(source.size for source in sources) == sorted(map(len, files))


def enumerate_names(files):
    return ((f"{number}.dcm", content) for number, content in enumerate(files))


def test_nifti_files_whose_names_are_no_utf8(tmp_path):
    """With a mask and a table that name them: such names match nothing, and the rest goes on."""
    scans, masks = tmp_path / "scans", tmp_path / "masks"
    os.makedirs(scans), os.makedirs(masks)
    affine = np.diag([-5.5, -5.5, 2.5, 1.0])
    for number, name in enumerate((b"M\xfcller", b"plain")):
        image = nibabel.Nifti1Image(dicom_files.thorax(20, seed=number).transpose(2, 1, 0), affine)
        image.to_filename(tmp_path / "a.nii")
        os.rename(tmp_path / "a.nii", os.fsencode(scans) + b"/" + name + b".nii")
        empty = nibabel.Nifti1Image(np.zeros(image.shape, np.uint8), affine)
        empty.to_filename(tmp_path / "a.nii")
        os.rename(tmp_path / "a.nii", os.fsencode(masks) + b"/" + name + b".nii")
    (tmp_path / "t.csv").write_text("VolumeName,x\nplain,1\nother,2\n")
    sources = LabelSources("nifti", labels_csv=(tmp_path / "t.csv",), masks_dir=masks)
    directories = Directories(scans, tmp_path / "out", tmp_path / "audit")
    options = Options("nifti", image_size=32, splits=(1.0, 0.0, 0.0))
    preparation, _ = prepare(options, directories, sources=sources, num_workers=1)
    assert preparation["counts"]["files_in_volumes"] == 2
    assert preparation["counts"]["masks_without_match"] == 0
