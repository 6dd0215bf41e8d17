"""The inventory of an archive: killed and run again it reads what is missing, and plans the same to
the byte."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.pipeline import plan as planning
from data_prep.scan.archives import list_sources
from data_prep.scan.headers import read_header
from data_prep.scan.loading import header_reader, source_of
from data_prep.scan.rules import Rules
from data_prep.system.workers import WorkerPool
from tests.helpers import dicom_files

NUM_SCANS, NUM_SLICES = 4, 10


def logged_read(input_dir, source):
    """In a worker: `read_header`, noted in a file beside the archive; other files there say what
    goes wrong."""
    beside = input_dir.parent
    with open(beside / "log", "a") as file:
        file.write(f"{source.path}\n")
    if (beside / "slow").exists():
        time.sleep(0.01)
    if (beside / "unreadable").exists() and source.path == (beside / "unreadable").read_text():
        raise OSError(errno.EIO, "Input/output error")
    if (beside / "deadly").exists() and source.path == (beside / "deadly").read_text():
        os.kill(os.getpid(), signal.SIGKILL)
    return read_header(input_dir, source)


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(1) as pool:
        yield pool


@pytest.fixture
def archive(tmp_path) -> Path:
    for number in range(NUM_SCANS):
        hu = dicom_files.thorax(NUM_SLICES, size=16, seed=number)
        scan = dicom_files.slices(hu, study=number, patient=f"patient-{number}")
        dicom_files.write(tmp_path / "scans" / f"scan{number}", scan)
    (tmp_path / "scans" / "notes.txt").write_text("nothing to see")
    return tmp_path / "scans"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(planning, "SOURCES_PER_TASK", 4)


def plan(archive: Path, folder: Path, pool: WorkerPool) -> tuple[dict[str, bytes], list[str]]:
    """The plan files, and the paths of the files that were read."""
    log = archive.parent / "log"
    log.write_text("")
    number, _ = planning.list_archive(archive, folder / "listing")
    arguments = (archive, folder / "plan", Rules(), number, pool, logged_read, folder / "listing")
    plans = {path.name: path.read_bytes() for path in planning.plan_archive(*arguments)}
    return plans, log.read_text().splitlines()


def chunk_of(archive: Path, path: str) -> list[str]:
    """The files that are listed together with one."""
    listed = [source_of(entry).path for entry in list_sources(archive)]
    first = listed.index(path) // 4 * 4
    return listed[first : first + 4]


def test_a_killed_scan_reads_only_what_is_missing(tmp_path, archive, pool):
    expected, read = plan(archive, tmp_path / "undisturbed", pool)
    assert len(read) == len(set(read)) == NUM_SCANS * NUM_SLICES + 1
    program = (
        "import sys; from pathlib import Path; from tests.experiments import "
        "test_inventory\ntest_inventory.planning.SOURCES_PER_TASK = 4\nwith "
        "test_inventory.WorkerPool(1) as pool:\n    test_inventory.plan(*map(Path, sys.argv[1:]), "
        "pool)\n"
    )
    (tmp_path / "slow").touch()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    staged = tmp_path / "killed" / "plan" / "staged"
    numbers = []
    for wanted in (1, 5):  # each run is killed a little later
        process = subprocess.Popen(
            [sys.executable, "-c", program, archive, tmp_path / "killed"], env=environment
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(staged.glob("*[0-9]"))) >= wanted:
                break
            time.sleep(0.002)
        process.kill()
        process.wait()
        numbers.append(len(list(staged.glob("*[0-9]"))))
    assert 1 <= numbers[0] < numbers[-1] < 11, numbers
    (tmp_path / "slow").unlink()
    time.sleep(0.3)  # a worker outlives its killed parent by a moment
    num_staged = len(list(staged.glob("*[0-9]")))
    plans, read = plan(archive, tmp_path / "killed", pool)
    assert plans == expected
    assert len(read) <= 41 - 4 * num_staged + 3
    assert plan(archive, tmp_path / "killed", pool) == (expected, [])


def test_changed_new_and_removed_files_are_read_anew(tmp_path, archive, pool):
    plan(archive, tmp_path, pool)
    changed = archive / "scan1" / "IM0003"
    content, status = changed.read_bytes(), changed.stat()
    changed.write_bytes(content.replace(b"STANDARD", b"BONEPLUS"))  # as long as before
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    plans, read = plan(archive, tmp_path, pool)
    assert read == chunk_of(archive, "scan1/IM0003")
    assert any(b"BONEPLUS" in content for content in plans.values())
    dicom_files.write(
        archive / "scan4",
        dicom_files.slices(dicom_files.thorax(3, size=16), study=9, patient="new"),
    )
    (archive / "scan3" / "IM0002").unlink()
    plans, read = plan(archive, tmp_path, pool)
    assert plans == plan(archive, tmp_path / "fresh", pool)[0]
    assert "scan0/IM0003" not in read


def test_staged_files_that_are_damaged_are_made_again(tmp_path, archive, pool):
    expected, _ = plan(archive, tmp_path, pool)
    staged = sorted((tmp_path / "plan" / "staged").iterdir())
    staged[2].write_bytes(staged[2].read_bytes()[:-5])
    content = staged[4].read_bytes()
    staged[4].write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    staged[6].write_bytes(b"")
    plans, read = plan(archive, tmp_path, pool)
    assert plans == expected and len(read) == 3 * 4


def test_another_reader_or_more_buckets_take_nothing_over(tmp_path, archive, pool, monkeypatch):
    plan(archive, tmp_path, pool)
    plans = planning.plan_archive(
        archive, tmp_path / "plan", Rules(), 41, pool, header_reader("nifti")
    )
    assert not any(planning.read_plan(path).exams for path in plans)
    assert len(plan(archive, tmp_path, pool)[1]) == 41
    monkeypatch.setattr(planning, "_HEADERS_PER_BUCKET", 0.5)
    assert len(plan(archive, tmp_path, pool)[1]) == 41


@pytest.mark.parametrize("fault", ["unreadable", "deadly"])
def test_what_could_not_be_read_for_now_is_tried_again(tmp_path, archive, pool, fault):
    expected, _ = plan(archive, tmp_path / "undisturbed", pool)
    (tmp_path / fault).write_text("scan2/IM0005")
    plans, _ = plan(archive, tmp_path, pool)
    failed = [
        entry for name in plans for entry in planning.read_plan(tmp_path / "plan" / name).not_images
    ]
    assert [entry.source.path for entry in failed if entry.reason == "failed_for_now"] == [
        "scan2/IM0005"
    ]
    (tmp_path / fault).unlink()
    plans, read = plan(archive, tmp_path, pool)
    assert plans == expected
    assert read == chunk_of(archive, "scan2/IM0005")
