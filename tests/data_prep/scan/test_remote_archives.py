"""Archives on object stores: the list, the bytes and the dataset of a local copy; failures and
refusals by name."""

import csv
import errno
import gzip
import importlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.dataset.reader import Dataset
from data_prep.pipeline import plan
from data_prep.pipeline.accounting import num_failed_for_now
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.prepare import prepare
from data_prep.scan import archives, remote_archives
from data_prep.scan.headers import Header, NotAnImage, read_header
from data_prep.scan.loading import read_headers
from data_prep.scan.remote_archives import archive_directory
from data_prep.scan.series import plan_series
from data_prep.scan.volume import load_volume
from data_prep.system import stores
from data_prep.system.errors import InputError
from tests.helpers import dicom_files

OPTIONS = Options(image_size=48, shard_size_mb=0.05)
NUM_SLICES = 21


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """Four patients, the last in a zip file; a text file, an empty file and a broken zip file."""
    folder = tmp_path_factory.mktemp("archive") / "scans"
    for number in range(1, 5):
        slices = dicom_files.slices(
            dicom_files.thorax(NUM_SLICES, seed=number), study=number, patient=f"patient-{number}"
        )
        dicom_files.write(folder / f"scan{number}", slices)
    with zipfile.ZipFile(folder / "four.ZIP", "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted((folder / "scan4").iterdir()):
            file.write(path, f"inside/{path.name}")
    shutil.rmtree(folder / "scan4")
    (folder / "notes.txt").write_text("nothing to see")
    (folder / "scan1.a").write_bytes(b"")  # "." sorts before "/"
    (folder / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, scans, key_file) -> Directories:
    folder = tmp_path_factory.mktemp("prepared")
    places = Directories(scans, folder / "dataset", folder / "private")
    prepare(OPTIONS, places, num_workers=1, pseudonym_key_file=key_file)
    return places


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def test_packed_files_of_a_store_are_read_in_place(store):
    """By their names alone: a look into every file would cost a request each."""
    folder = store.objects / "bucket" / "packed"
    folder.mkdir(parents=True)
    files = [dicom_files.to_bytes(ds) for ds in dicom_files.slices(dicom_files.thorax(3))]
    (folder / "0.dcm.gz").write_bytes(gzip.compress(files[0]))
    with tarfile.open(folder / "scan.tar", "w") as tar:
        for number, data in enumerate(files[1:]):
            member = tarfile.TarInfo(f"{number}.dcm")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    remote = archive_directory("example://bucket/packed")
    listed = list(archives.list_sources(remote))
    assert listed == list(archives.list_sources(folder)) and len(listed) == 3
    assert [archives.read_bytes(remote, source) for source in listed] == files
    (folder / "scan.tar").rename(folder / "scan")
    (unnamed,) = [s for s in archives.list_sources(remote) if s.path == "scan"]
    entry = read_header(remote, unnamed)
    assert entry.reason == "packed" and "name it .zip, .tar or .gz" in entry.detail


def test_the_list_and_the_bytes_are_those_of_a_local_copy(store, scans):
    shutil.copytree(scans, store.objects / "bucket" / "scans")
    remote = archive_directory("example://bucket/scans/")
    listed = list(archives.list_sources(remote))
    assert listed == list(archives.list_sources(scans))
    assert plan.list_archive(remote) == plan.list_archive(scans)
    sources = [entry for entry in listed if isinstance(entry, archives.Source)]
    assert [archives.read_bytes(remote, s) for s in sources] == [
        archives.read_bytes(scans, s) for s in sources
    ]
    assert [read_header(remote, source) for source in sources] == [
        read_header(scans, source) for source in sources
    ]


def test_a_header_costs_one_small_request(store):
    [dataset] = dicom_files.slices(dicom_files.thorax(1, size=512), study=1, patient="p")
    dicom_files.write(store.objects / "scans", [dataset])
    archive = archive_directory("example://scans")
    [source] = archives.list_sources(archive)
    store.requests()
    assert isinstance(read_header(archive, source), Header)
    got = [size for kind, size, _ in store.requests() if kind == "got"]
    assert got == [remote_archives.HEADER_BLOCK] and source.size > 512 * 512 * 2


def test_reading_ahead_asks_for_everything_once(store, scans):
    shutil.copytree(scans / "scan1", store.objects / "scan1")
    archive = archive_directory("example://scan1")
    sources = tuple(archives.list_sources(archive))
    store.requests()
    headers = read_headers(archive, sources, read_header)
    requests = store.requests()
    assert sorted(path for kind, _, path in requests if kind == "read") == [
        f"scan1/{s.path}" for s in sources
    ]
    assert headers == read_headers(scans / "scan1", sources, read_header)
    [candidate] = plan_series(headers, OPTIONS.rules)
    volume = load_volume(archive, candidate, OPTIONS.rules)
    requests = [path for kind, _, path in store.requests() if kind == "read"]
    assert len(requests) == len(set(requests)) == NUM_SLICES
    assert np.array_equal(volume.hu, load_volume(scans / "scan1", candidate, OPTIONS.rules).hu)


def test_the_dataset_is_that_of_a_local_copy(store, scans, prepared, tmp_path, key_file):
    shutil.copytree(scans, store.objects / "scans")
    places = Directories(
        archive_directory("example://scans"), tmp_path / "dataset", tmp_path / "private"
    )
    prepare(OPTIONS, places, num_workers=2, pseudonym_key_file=key_file)
    assert content(places.output_dir) == content(prepared.output_dir)
    assert content(places.audit_dir) == content(prepared.audit_dir)
    # the other way round nothing has changed
    local = Directories(scans, places.output_dir, places.audit_dir)
    assert prepare(OPTIONS, local, num_workers=1, pseudonym_key_file=key_file)[1] is False


def test_what_the_store_fails_to_give_is_tried_again(
    store, scans, prepared, tmp_path, key_file, monkeypatch
):
    """Two headers, then the pixels of another scan, of which the headers were read."""
    shutil.copytree(scans, store.objects / "scans")
    places = Directories(
        archive_directory("example://scans"), tmp_path / "dataset", tmp_path / "private"
    )
    plan_archive = plan.plan_archive

    def plan_then_fail(*arguments):
        plans = plan_archive(*arguments)
        store.fail("read scans/scan3/IM0004")
        return plans

    store.fail("read scans/scan2/IM0003", "read scans/notes.txt")
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.pipeline.steps.plan_archive", plan_then_fail)
        preparation, _ = prepare(OPTIONS, places, num_workers=1, pseudonym_key_file=key_file)
    assert preparation["counts"]["files_not_images"]["failed_for_now"] == 2
    assert preparation["counts"]["series_rejected"] == {"failed_for_now": 1}
    assert num_failed_for_now(preparation["counts"]) == 3
    with open(places.audit_dir / "sources.csv", newline="") as file:
        details = {
            row["detail"] for row in csv.DictReader(file) if row["reason"] == "failed_for_now"
        }
    assert details == {"the store failed: RuntimeError"}
    store.fail()
    again, changed = prepare(OPTIONS, places, num_workers=1, pseudonym_key_file=key_file)
    assert changed and num_failed_for_now(again["counts"]) == 0
    assert (
        len(Dataset.open(places.output_dir).volumes())
        == len(Dataset.open(prepared.output_dir).volumes())
        == 4
    )


def test_failed_reads_are_told_from_damaged_files(store):
    with zipfile.ZipFile(store.objects / "a.zip", "w") as file:
        file.writestr("member", b"content" * 100)
    (store.objects / "plain").write_bytes(b"x" * 200)
    archive = archive_directory("example://")
    member, plain = archives.list_sources(archive)
    store.fail("read a.zip", "read plain")
    for read, source in (
        (archives.read_bytes, member),
        (archives.read_bytes, plain),
        (read_header, plain),
    ):
        with pytest.raises(OSError) as failure:
            read(archive, source)
        assert (failure.value.errno, failure.value.strerror) == (
            errno.EIO,
            "the store failed: RuntimeError",
        )
    store.fail()
    assert archives.read_bytes(archive, member) == b"content" * 100
    (store.objects / "plain").write_bytes(b"x" * 100)  # shorter than it was when it was listed
    with pytest.raises(OSError) as failure:
        read_header(archive, plain)
    assert failure.value.errno == errno.EIO
    content = bytearray((store.objects / "a.zip").read_bytes())
    content[50] ^= 1
    (store.objects / "b.zip").write_bytes(content)
    with pytest.raises(OSError, match=r"b\.zip: member: damaged member") as failure:
        archives.read_bytes(archive, member._replace(path="b.zip"))
    assert failure.value.errno is None


def test_a_folder_that_cannot_be_listed_ends_the_run_and_not_the_scan(store, scans, tmp_path):
    shutil.copytree(scans, store.objects / "scans")
    store.fail("list scans/scan3")
    archive = archive_directory("example://scans")
    with pytest.raises(OSError, match=r"example://scans: cannot be listed .*run again"):
        list(archives.list_sources(archive))
    store.fail("read scans/four.ZIP")
    with pytest.raises(OSError, match="example://scans: cannot be listed"):
        list(archives.list_sources(archive))
    store.fail("*")
    assert not archive.is_dir()


def test_zip_files_are_known_by_their_names(store):
    with zipfile.ZipFile(store.objects / "scan", "w") as file:
        file.writestr("member", b"content")
    archive = archive_directory("example://")
    [source] = archives.list_sources(archive)
    entry = read_header(archive, source)
    assert isinstance(entry, NotAnImage) and entry.reason == "bad_zip" and ".zip" in entry.detail


def test_refusals_name_the_url_and_the_remedy(store, tmp_path):
    (store.objects / "file").write_text("x")
    for url, words in (
        (
            "nosuch://bucket/scans",
            "nosuch://bucket/scans: Protocol not known: nosuch; give a directory, or a URL",
        ),
        ("example://lost/", "--input_dir=example://lost: no such bucket or folder; check the name"),
        ("example://file", "--input_dir=example://file: is a file; give the folder of the scans"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            Directories(archive_directory(url), tmp_path / "dataset", tmp_path / "private").check()
    store.fail("info *")
    with pytest.raises(
        ValueError,
        match=r"example://file: the store refuses or cannot be reached \(RuntimeError: 503",
    ):
        Directories(
            archive_directory("example://file"), tmp_path / "dataset", tmp_path / "private"
        ).check()


def test_missing_packages_are_named(monkeypatch):
    registry = importlib.import_module("fsspec.registry")  # `fsspec.registry` is a dict
    for protocol, package in (("gs", "gcsfs"), ("s3", "s3fs")):
        monkeypatch.setitem(sys.modules, package, None)  # as if it was not installed
        monkeypatch.delitem(registry._registry, protocol, raising=False)
        with pytest.raises(
            InputError, match=re.escape(f"{protocol}://b/c: needs a package that is not inst")
        ):
            stores.open_store(f"{protocol}://b/c")
        with pytest.raises(InputError, match=f"pip install '{package}"):
            stores.open_store(f"simplecache::{protocol}://b/c")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--input_dir=scans", "--output_dir=gs://b/out"],
            ("--output_dir=gs://b/out", "gcloud storage cp"),
        ),
        (
            ["--input_dir=example://", "--output_dir=out", "--audit_dir=s3://b/a"],
            ("--audit_dir=s3://b/a", "here"),
        ),
    ],
)
def test_outputs_are_refused_in_one_line(flags, words, store):
    command = [sys.executable, "-m", "data_prep.prepare", *flags]
    done = subprocess.run(command, cwd=store.folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not store.requests() and not (store.folder / "out").exists()


def test_file_urls_are_local_paths(scans, monkeypatch):
    assert archive_directory(f"file://{scans}") == scans
    monkeypatch.setenv("HOME", "/nowhere")
    assert archive_directory("~/scans") == Path("/nowhere/scans")
    assert (
        not stores.is_url("scans")
        and not stores.is_url("/a/b:c")
        and stores.is_url("simplecache::gs://b/c")
    )


def test_train_csv_of_the_challenge_is_read_from_the_store(store):
    from data_prep.labels import rsna_pe

    archive = archive_directory("example://pe")
    (store.objects / "pe").mkdir()
    with pytest.raises(ValueError, match=r"example://pe: no train\.csv"):
        rsna_pe.check_train_csv(archive)
    (store.objects / "pe" / "train.csv").write_text(",".join(rsna_pe.COLUMNS) + "\n")
    path = rsna_pe.check_train_csv(archive_directory("example://pe/"))
    assert (
        path.read_text().startswith("StudyInstanceUID")
        and path.parent.stat().st_mode & 0o777 == 0o700
    )
