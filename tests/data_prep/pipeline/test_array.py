"""Array jobs over a manifest: one run's bytes for any tasks in any order, entries that fail are
named and come later, and what is refused."""

import functools
import hashlib
import http.server
import os
import shutil
import signal
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from data_prep.labels.lookup import LabelSources
from data_prep.pipeline import array as arrays
from data_prep.pipeline import downloads as downloading
from data_prep.pipeline.array import Array, assemble, progress_text, run_task
from data_prep.pipeline.downloads import Downloads, fetched
from data_prep.pipeline.manifest import in_words, read_manifest
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.prepare import prepare
from data_prep.scan.headers import Header, NotAnImage, read_header
from data_prep.scan.packed_files import Source
from data_prep.system.errors import InputError, RunFailed
from data_prep.system.files import lock_directory
from data_prep.system.stores import Access
from tests.helpers import dicom_files

OPTIONS = Options(image_size=48, shard_size_mb=0.05)
NUM_SLICES = 21


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def add_series(folder: Path, number: int, patient: str, kernel: str = "STANDARD", **names) -> None:
    hu = dicom_files.thorax(NUM_SLICES, seed=number)
    series = dicom_files.slices(hu, patient=patient, **{"study": number} | names)
    for dataset in series:
        dataset.ConvolutionKernel = kernel
    dicom_files.write(folder, series)


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Five series of four patients: one is of an exam whose preferred series lies elsewhere, and
    one names its patient in another spelling. And a text."""
    folder = tmp_path_factory.mktemp("scans")
    add_series(folder / "a", 1, "patient-1", "BONE")
    add_series(folder / "b", 2, "patient-2")
    add_series(folder / "c", 9, "patient-1", study=1, series=2)
    add_series(folder / "d", 4, "PATIENT-2")
    add_series(folder / "e", 5, "patient-5")
    (folder / "e" / "notes.txt").write_text("nothing to see")
    return folder


def results(where: Directories) -> dict[str, bytes]:
    """The dataset, and the private outcome of each file."""
    private = content(where.audit_dir)
    tables = {name: private[name] for name in ("sources.csv", "refused.csv", "splits.json")}
    return content(where.output_dir) | tables


@pytest.fixture(scope="module")
def plain(tmp_path_factory, archive, key_file) -> dict[str, bytes]:
    """What one run makes."""
    folder = tmp_path_factory.mktemp("plain")
    options = Options(image_size=48, shard_size_mb=0.05, splits=(0.5, 0.25, 0.25))
    where = Directories(archive, folder / "dataset", folder / "audit")
    prepare(options, where, num_workers=1, pseudonym_key_file=key_file)
    return results(where)


def job(folder: Path, manifest: Path, key_file: Path, **downloads) -> Array:
    where = Directories(None, folder / "dataset", folder / "audit")
    options = Options(image_size=48, shard_size_mb=0.05, splits=(0.5, 0.25, 0.25))
    access = Access(timeout_s=2.5)  # a busy machine answers late, too
    to = Downloads(folder / "downloads", access, **downloads)
    return Array(read_manifest(manifest), options, where, LabelSources(), to, key_file)


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_tasks_in_any_order_and_again_give_the_bytes_of_one_run(
    tmp_path, archive, plain, key_file, monkeypatch
):
    manifest = written(tmp_path / "m.txt", *(f"{archive}/{name}/" for name in "abcde"))
    array = job(tmp_path, manifest, key_file)
    assert run_task(array, 1, 2, num_workers=1) == (2, 0)
    with pytest.raises(InputError, match=r"taken 3 of 5 .*lines 1, 3 and 5.*--task_index=0 of"):
        assemble(array, task_count=2, num_workers=1)
    assert "       2 staged" in progress_text(array) and "3 not taken yet" in progress_text(array)
    with lock_directory(array.directories.output_dir, shared=True):  # another task is at work
        assert run_task(array, 0, 1, num_workers=1) == (5, 2)
        with pytest.raises(InputError, match="another run is at work"):
            assemble(array, num_workers=1)
    assert run_task(array, 2, 3, num_workers=1) == (1, 1)
    assert list(array.downloads.folder.iterdir()) == []  # local files are not copied
    _, changed, gathering = assemble(array, num_workers=1)
    assert changed and gathering.failed == []
    assert results(array.directories) == plain
    assert not assemble(array, num_workers=1)[1]


# ---- downloads -----------------------------------------------------------------------------------


class Server(http.server.SimpleHTTPRequestHandler):
    """A folder, with losses: path -> what happens to it."""

    losses: ClassVar[dict[str, str]] = {}

    def do_GET(self):
        loss = self.losses.get(self.path, "")
        content = (Path(self.directory) / self.path[1:]).read_bytes()
        if loss in ("404", "403"):
            self.send_error(int(loss))
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if loss == "truncated":
            content = content[:1000]
        elif loss == "changed":
            content = content[:-1] + bytes([content[-1] ^ 1])
        elif loss == "silent":
            silence.wait(20)
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


silence = threading.Event()


@pytest.fixture
def served(archive, monkeypatch) -> Iterator[str]:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(downloading, "_SECONDS_BETWEEN_TRIES", 0.0)
    monkeypatch.setattr(Server, "losses", {})
    silence.clear()
    handler = functools.partial(Server, directory=str(archive))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    silence.set()
    server.shutdown()


def test_what_cannot_be_downloaded_is_named_and_comes_with_the_next_run(
    tmp_path, archive, plain, key_file, served
):
    rows = ["series,url,size,sha256"]
    for name in "abcde":
        for path in sorted((archive / name).iterdir()):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            size = path.stat().st_size
            rows.append(f"{name},{served}/{name}/{path.name},{size},{digest}")
    manifest = written(tmp_path / "m.csv", *rows)
    lines = {row.split(",")[1].removeprefix(served): line for line, row in enumerate(rows, start=1)}
    Server.losses = {
        "/a/IM0003": "404",
        "/b/IM0004": "truncated",
        "/c/IM0005": "changed",
        "/d/IM0006": "silent",
        "/e/IM0007": "403",
    }
    array = job(tmp_path, manifest, key_file, remove=True)
    with pytest.raises(RunFailed) as failure:
        run_task(array, 0, 1, num_workers=4)
    silence.set()
    said = str(failure.value)
    for path, reason in (
        ("/a/IM0003", "not found"),
        ("/b/IM0004", "was cut off, 3 times"),
        ("/c/IM0005", "has another sha256 than the manifest says"),
        ("/d/IM0006", "no answer in time, 3 times"),
        ("/e/IM0007", "no permission to read it"),
    ):
        assert f"line {lines[path]}: {reason}" in said
    assert "5 of 5 entries" in said and served not in said and "IM00" not in said
    Server.losses = {}
    assert run_task(array, 0, 1, num_workers=1) == (5, 0)
    assert list(array.downloads.folder.iterdir()) == []
    assemble(array, num_workers=1)
    assert results(array.directories) == plain


def test_the_rest_is_exact_and_what_failed_is_added_later(tmp_path, archive, key_file):
    """As `prepare` on the archive without the missing series, and then on all of it."""
    scans = tmp_path / "scans"
    shutil.copytree(archive, scans)
    gone = tmp_path / "gone"
    (scans / "e").rename(gone)
    one = Directories(scans, tmp_path / "one", tmp_path / "one-audit")
    manifest = written(tmp_path / "m.txt", *(f"scans/{name}/*" for name in "abcde"))
    array = job(tmp_path, manifest, key_file)
    options = Options(image_size=48, shard_size_mb=0.05, splits=(1.0, 0.0, 0.0))
    array = Array(**vars(array) | {"options": options})
    with pytest.raises(RunFailed, match=r"line 5: no such file or folder"):
        run_task(array, 0, 1, num_workers=1)
    assert [entry.number for entry, _ in assemble(array, num_workers=1)[2].failed] == [4]
    prepare(options, one, num_workers=1, pseudonym_key_file=key_file)
    assert results(array.directories) == results(one)
    gone.rename(scans / "e")
    assert run_task(array, 0, 1, num_workers=1) == (5, 4)
    assert assemble(array, num_workers=1)[1]
    prepare(options, one, num_workers=1, pseudonym_key_file=key_file)
    assert results(array.directories) == results(one)


# ---- manifests -----------------------------------------------------------------------------------


def test_lines_of_s5cmd_and_urls(tmp_path):
    manifest = written(
        tmp_path / "m.txt",
        "# of a data portal",
        "cp s3://bucket/aaa/* DEST",
        "cp --show-progress 's3://bucket/b b/*' .",
        "",
        "s3://bucket/ccc/1.dcm",
        "s3://bucket/ccc/2.dcm",
    )
    read = read_manifest(manifest)
    assert read.root == "s3://bucket"
    found = [[(p.line, p.path, p.is_folder) for p in entry.places] for entry in read.entries]
    files = [(5, "ccc/1.dcm", False), (6, "ccc/2.dcm", False)]
    assert found == [[(2, "aaa", True)], [(3, "b b", True)], files]
    parts = [read.of_task(index, 2) for index in range(2)]
    assert [[entry.number for entry in part] for part in parts] == [[0, 2], [1]]
    read = read_manifest(manifest, "s3://bucket/")
    assert read.entries[0].places[0].path == "aaa"
    assert in_words(range(1, 9)) == "lines 1, 2, 3, 4, 5 and 3 more"


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("m.txt", ["# nothing"], "names no files"),
        ("m.txt", ["s3://b/*/x"], "line 1: of wildcards only"),
        ("m.txt", ["s3:/b/x"], "line 1: .*write s3://b/x"),
        ("m.txt", ["cp a b c"], "line 1: is not `cp SOURCE DEST`"),
        ("m.txt", ["s3://b/x/", "s3://b/y/", "s3://b/x/1"], "lines 1 and 3: name the same files"),
        ("m.csv", ["series,uri", "1,s3://b/x/"], "0 columns are named url"),
        ("m.csv", ["url,size", "s3://b/x/1,many"], "line 2: a size is a number"),
        ("m.csv", ["url,md5", "s3://b/x/1,12"], "line 2: md5 has 32"),
        ("m.csv", ["url,md5", f"s3://b/x/*,{'0' * 32}"], "line 2: a folder has no md5"),
    ],
)
def test_wrong_manifests_are_refused_in_a_line(tmp_path, name, lines, message):
    with pytest.raises(InputError, match=message):
        read_manifest(written(tmp_path / name, *lines))


def test_a_place_outside_of_the_root_is_refused(tmp_path):
    manifest = written(tmp_path / "m.txt", "s3://b/x/*")
    with pytest.raises(InputError, match="line 1: lies outside --input_dir=s3://b/y"):
        read_manifest(manifest, "s3://b/y")


def test_a_spread_series_is_refused_by_name_and_taken_as_one_entry(tmp_path, archive, key_file):
    scans = tmp_path / "scans"
    for name in "bc":
        shutil.copytree(archive / name, scans / name)
    (scans / "more").mkdir()
    (scans / "b" / "IM0010").rename(scans / "more" / "IM0010")
    manifest = written(tmp_path / "m.txt", *(f"scans/{name}/" for name in ("b", "c", "more")))
    array = job(tmp_path, manifest, key_file)
    run_task(array, 0, 1, num_workers=1)
    with pytest.raises(InputError, match=r"series [0-9a-f]{32} \(lines 1 and 3\) lie in several"):
        assemble(array, num_workers=1)
    rows = ["url,series", "scans/b/,1", "scans/c/,", "scans/more/,1"]
    array = job(tmp_path, written(tmp_path / "m.csv", *rows), key_file)
    options = Options(image_size=48, splits=(1.0, 0.0, 0.0))
    array = Array(**vars(array) | {"options": options})
    run_task(array, 0, 1, num_workers=1)
    assemble(array, num_workers=1)
    one = Directories(scans, tmp_path / "one", tmp_path / "one-audit")
    prepare(options, one, num_workers=1, pseudonym_key_file=key_file)
    assert results(array.directories) == results(one)


# ---- what is refused -----------------------------------------------------------------------------


class Flags(types.SimpleNamespace):
    """The flags of a command line, as absl gives them."""

    def __init__(self, **given):
        values = dict.fromkeys(("manifest", "input_dir", "pseudonym_key_file", "beam_options"), "")
        values |= dict.fromkeys(("task_index", "task_count"), None)
        values |= {"runner": "local", "assemble": False, "dry_run": False}
        super().__init__(**values | given, given=given)

    def __getitem__(self, name: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(present=name in self.given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give --input_dir, the folder of the scans, or --manifest"),
        ({"input_dir": "A", "task_index": 0}, "--task_index goes with --manifest"),
        ({"input_dir": "A", "assemble": True}, "--assemble goes with --manifest"),
        ({"manifest": "M", "runner": "beam"}, "--manifest goes with --runner=local"),
        ({"manifest": "M", "task_index": 0, "task_count": 2}, "needs --pseudonym_key_file"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        arrays.check_flags(Flags(**given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "needs --task_index and --task_count"),
        ({"task_index": 0}, "needs --task_index and --task_count"),
        ({"assemble": True, "task_index": 0}, "--assemble is no task"),
        ({"task_index": 0, "task_count": 2, "dry_run": True}, "--dry_run goes with --assemble"),
    ],
)
def test_half_a_task_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        arrays.check_flags(Flags(manifest="M", pseudonym_key_file="K", **given))


def test_what_does_not_go_with_a_manifest_is_refused(tmp_path, archive, key_file):
    array = job(tmp_path, written(tmp_path / "m.txt", f"{archive}/a/"), key_file)
    with pytest.raises(InputError, match=r"--task_index=2: is one of 0 to 1"):
        run_task(array, 2, 2)
    for change, message in (
        ({"options": Options("rsna_pe")}, "--archive=rsna_pe has tables among the scans"),
        ({"sources": LabelSources("nifti", metadata_csv=key_file)}, "--metadata_csv needs a local"),
        ({"downloads": Downloads(tmp_path / "dataset" / "x")}, "lies inside --output_dir"),
        ({"pseudonym_key_file": tmp_path / "none"}, "no such file; give that of all tasks"),
    ):
        with pytest.raises(InputError, match=message):
            run_task(Array(**vars(array) | change), 0, 1)


def deadly_read(input_dir: Path, source: Source) -> Header | NotAnImage:
    """A header that kills the process that reads it."""
    if source.path.endswith("notes.txt"):
        os.kill(os.getpid(), signal.SIGKILL)
    return read_header(input_dir, source)


def test_a_file_that_kills_its_worker_costs_itself_only(
    tmp_path, archive, plain, key_file, monkeypatch
):
    manifest = written(tmp_path / "m.txt", *(f"{archive}/{name}/" for name in "abcde"))
    array = job(tmp_path, manifest, key_file)
    monkeypatch.setattr(arrays, "header_reader", lambda archive: deadly_read)
    with pytest.raises(RunFailed, match="line 5: a file or series could not be read for now"):
        run_task(array, 0, 1, num_workers=1)
    prepared, *_ = assemble(array, num_workers=1)
    assert prepared["counts"]["files_not_images"] == {"failed_for_now": 1}
    assert results(array.directories)["volumes.csv"] == plain["volumes.csv"]


def test_a_folder_of_googles_store_is_downloaded(tmp_path, emulated_bucket):
    gcsfs = pytest.importorskip("gcsfs")
    store = gcsfs.GCSFileSystem(token="anon")
    for name in ("a/1", "a/b/2", "ab/3"):
        store.pipe_file(f"gs://{emulated_bucket}/scans/{name}", name.encode())
    manifest = written(tmp_path / "m.txt", f"gs://{emulated_bucket}/scans/a/*")
    [entry] = read_manifest(manifest).entries
    with fetched(entry, "key", Downloads(tmp_path / "downloads", remove=True)) as files:
        assert content(files) == {"1": b"a/1", "b/2": b"a/b/2"}
