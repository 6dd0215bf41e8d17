"""Short versions of the campaigns under tests/campaigns, and what they found."""

import errno
import os
import random
import resource
import shutil
import time
from pathlib import Path

import imagecodecs
import numpy as np
import pytest

from data_prep.dataset import verify
from data_prep.dataset.reader import Dataset
from data_prep.dataset.storage import write_records
from data_prep.pipeline import steps
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.prepare import prepare
from data_prep.scan import decoders
from data_prep.system.files import PARTIAL, explain, write_file
from data_prep.system.workers import WorkerPool
from tests.campaigns import faults, kill_points, kills, mutated_dicom
from tests.helpers import dicom_files
from tests.helpers.training_runs import save_scored

JPEG_LS = "1.2.840.10008.1.2.4.80"


@pytest.fixture(scope="module")
def small_files() -> list[bytes]:
    plain, compressed = dicom_files.slices(dicom_files.thorax(2))
    dicom_files.compress(compressed, JPEG_LS, imagecodecs.jpegls_encode)
    return [dicom_files.to_bytes(plain), dicom_files.to_bytes(compressed)]


def test_mutants_of_generated_files(small_files):
    outcomes = mutated_dicom.run(small_files, 240, seed=0)
    assert mutated_dicom.defects(outcomes) == {}
    assert (
        sum(map(len, outcomes.values())) == 240
        and len(outcomes["equal to pydicom"]) > 20
        and len(outcomes) > 5
    )


def test_mutants_of_real_files(real_data):
    outcomes = mutated_dicom.run(
        mutated_dicom.load_files(real_data / "transfer_syntaxes"), 120, seed=0
    )
    assert mutated_dicom.defects(outcomes) == {}


def test_a_mutant_is_the_same_every_time(small_files):
    assert all(
        mutated_dicom.mutate(small_files, 3, n) == mutated_dicom.mutate(small_files, 3, n)
        for n in range(24)
    )


@pytest.mark.parametrize("syntax, encode, sof", [
    (JPEG_LS, imagecodecs.jpegls_encode, b"\xff\xf7"),
    ("1.2.840.10008.1.2.4.70", imagecodecs.ljpeg_encode, b"\xff\xc3"),
])  # fmt: skip
def test_a_frame_that_names_a_huge_matrix_is_refused_before_it_is_decoded(
    tmp_path, monkeypatch, syntax, encode, sof
):
    (dataset,) = dicom_files.slices(dicom_files.thorax(1))
    dicom_files.compress(dataset, syntax, encode)
    data = bytearray(dicom_files.to_bytes(dataset))
    at = data.index(sof, data.index(b"\xff\xd8"))
    data[at + 5 : at + 9] = np.array([30000, 30000], ">u2").tobytes()
    (tmp_path / "mutant").write_bytes(data)
    for name in ("jpegls_decode", "jpeg8_decode"):
        monkeypatch.setattr(imagecodecs, name, lambda frame: pytest.fail("decoded"))
    assert mutated_dicom.read_mutant(tmp_path, "frame_size") in (
        "rejected undecodable_pixels",
        "pixels undecodable_pixels",
    )


@pytest.mark.parametrize(
    "header",
    [(2, 64, 8_401_538), (2, 0, 64), (3, 64, 70), (1, 64), (15, *[2**32 - 1] * 15), (2, 70, 70)],
)
def test_a_run_length_frame_that_points_outside_itself_is_not_decoded(header, monkeypatch):
    """The decoder would read there, which ends the process."""
    monkeypatch.setattr(imagecodecs, "dicomrle_decode", lambda *arguments: pytest.fail("decoded"))
    frame = np.array([*header, *[0] * (16 - len(header))], "<u4").tobytes() + bytes(100)
    for damaged in (frame, frame[:40]):
        with pytest.raises(ValueError, match=r"segments of the frame|ends within its header"):
            decoders.decode(damaged, 4, 4, 2)


def test_a_high_bit_that_does_not_fit_the_values_is_refused(tmp_path):
    """Values of 12 bits that begin at bit 0, said to be 10 bits that end at bit 15."""
    (dataset,) = dicom_files.slices(dicom_files.thorax(1))
    dataset.BitsStored, dataset.HighBit = 10, 15
    (tmp_path / "mutant").write_bytes(dicom_files.to_bytes(dataset))
    assert mutated_dicom.read_mutant(tmp_path, "absurd_value") == "pixels undecodable_pixels"


@pytest.mark.parametrize("head", [b"OW\0\x40", b"NW\0\x40", b"OW\x20\0"])
def test_a_damaged_vr_of_the_pixels_does_not_shift_the_image(tmp_path, head):
    (dataset,) = dicom_files.slices(dicom_files.thorax(1))
    data = bytearray(dicom_files.to_bytes(dataset))
    at = data.index(b"\xe0\x7f\x10\0OW\0\0")
    data[at + 4 : at + 8] = head
    (tmp_path / "mutant").write_bytes(data)
    assert mutated_dicom.read_mutant(tmp_path, "start_of_pixels") in (
        "pixels undecodable_pixels",
        "pixels truncated_pixel_data",
    )


# ---- kill -9 at random moments: tests/campaigns/kills.py notices what is wrong -------------------


@pytest.fixture(scope="module")
def small_archive(tmp_path_factory) -> Path:
    """Four patients of 20 slices."""
    archive = tmp_path_factory.mktemp("kills") / "archive"
    for number in range(4):
        series = dicom_files.slices(
            dicom_files.thorax(20, seed=number), study=number, patient=f"patient-{number}"
        )
        dicom_files.write(archive / f"scan{number}", series)
    return archive


def test_the_campaign_notices_a_lost_and_a_changed_file(small_archive, tmp_path):
    """A stage whose second run leaves another result."""

    def copying(folder: Path) -> kills.Stage:
        runs.append(folder)
        number = min(len(runs), 2)
        return kills.Stage([["cp", "-r", str(tmp_path / str(number)), str(folder / "copy")]], ())

    runs: list[Path] = []
    for number in (1, 2):
        shutil.copytree(small_archive / "scan0", tmp_path / str(number))
    (tmp_path / "2" / "IM0000").unlink()
    (tmp_path / "2" / "IM0001").write_bytes(b"half")
    (tmp_path / "2" / "rest.partial").write_bytes(b"")
    outcome = kills.campaign(copying, tmp_path / "work", tmp_path, 0, random.Random(0), warm_up=0)
    assert outcome.wrong == [
        "differs: copy/IM0001",
        "left over: copy/rest.partial",
        "missing: copy/IM0000",
    ]


# ---- Disk, files and clock: the short version of tests/campaigns/faults.py -----------------------


def test_a_preparation_that_may_write_small_files_only(small_archive, tmp_path):
    """Staged volumes are larger than the limit: one line, and then the same bytes."""
    stage = kills.prepare_stage(tmp_path / "output", small_archive)
    assert not kills.attempt(stage, tmp_path)[1]
    expected = kills.contents(tmp_path / "output")
    shutil.rmtree(tmp_path / "output")
    ended = faults.run(stage.commands[0], tmp_path, file_limit=20_000)
    assert (
        ended.code == 1
        and "File too large; permit larger files there and run the same command again" in ended.text
    )
    assert faults.check(stage.commands[0], tmp_path / "output", tmp_path, expected, ended) == []


def test_what_counts_as_a_wrong_message():
    assert (
        faults.faults_of_message(faults.Ended(2, "reading\nerror: x: disk full; make room\n")) == []
    )
    assert faults.faults_of_message(
        faults.Ended(1, "Traceback (most recent call last):\nOSError")
    ) == [
        "traceback on the screen",
        "0 lines begin with error:",
    ]


@pytest.fixture
def small_files_only():
    """No file grows beyond 4000 bytes in this process."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, small_files_only):
    path = tmp_path / "table.csv"
    write_file(path, b"old")
    records = [os.urandom(3000) for _ in range(9)]
    for write in (
        lambda: write_file(path, bytes(9000)),
        lambda: write_records(path, records),
    ):
        with pytest.raises(OSError, match="File too large") as error:
            write()
        assert explain(error.value) == (
            f"{path}: File too large; permit larger files there and run the same command again"
        )
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_files_that_are_being_written_have_names_of_their_own(tmp_path, monkeypatch):
    """Two machines that share a directory may have processes of the same number."""
    names = set()
    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(Path, "replace", lambda self, path: names.add(self.name))
    for _ in range(2):
        write_file(tmp_path / "table.csv", b"")
    assert len(names) == 2 and all(name.endswith(PARTIAL) for name in names)


def test_files_that_change_between_header_and_pixels(tmp_path, monkeypatch):
    """Their scans are left for the next run, which then finds them as they were; nothing is lost or
    guessed."""
    archive = tmp_path / "archive"
    for number in range(8):
        series = dicom_files.slices(
            dicom_files.thorax(20, seed=number), study=number, patient=f"patient-{number}"
        )
        dicom_files.write(archive / f"scan{number}", series)
    shutil.copytree(archive, tmp_path / "copy")
    victims = [archive / f"scan{number}" / "IM0005" for number in range(5)]
    convert = steps.convert_exams

    def change_and_convert(*arguments):
        truncated, appended, replaced, vanished, folder = victims
        os.truncate(truncated, 4000)
        appended.write_bytes(appended.read_bytes() + bytes(20))
        others = (tmp_path / "copy" / "scan2").iterdir()
        same_size = [path for path in others if path.stat().st_size == replaced.stat().st_size]
        shutil.copy(next(path for path in same_size if path.name != replaced.name), replaced)
        vanished.unlink()
        folder.unlink()
        folder.mkdir()
        convert(*arguments)

    where = Directories(archive, tmp_path / "dataset", tmp_path / "private")
    options = Options(image_size=48)
    with monkeypatch.context() as patch:
        patch.setattr(steps, "convert_exams", change_and_convert)
        made, _ = prepare(options, where, num_workers=1)
    assert made["counts"]["series_rejected"] == {"failed_for_now": 5}
    first = {path.name: path.read_bytes() for path in where.output_dir.glob("*.array_record-*")}
    shutil.rmtree(archive)
    shutil.copytree(tmp_path / "copy", archive)
    made, changed = prepare(options, where, num_workers=1)
    assert changed and made["counts"]["series_rejected"] == {}
    assert len(Dataset.open(where.output_dir).volumes()) == 8
    assert all((where.output_dir / name).read_bytes() == content for name, content in first.items())
    with WorkerPool(1) as pool:
        assert verify.verify(Dataset.open(where.output_dir), pool) == []


def test_a_stage_time_that_cannot_be_written_does_not_stop_the_next_quickstart(
    tmp_path, monkeypatch
):
    from experiments.quickstart import StageTimes

    StageTimes(tmp_path / "seconds.json")["training"] = 3.0
    with monkeypatch.context() as patch:
        patch.setattr(
            os,
            "fsync",
            lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")),
        )
        with pytest.raises(OSError):
            StageTimes(tmp_path / "seconds.json")["training"] = 5.0
    assert StageTimes(tmp_path / "seconds.json").known == {"training": 3.0}


def test_reports_go_on_when_the_clock_is_set_back(tmp_path, monkeypatch):
    from ctssl_jax.runs.reports import Reports, read_reports

    written = Reports(tmp_path, -1)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 365 * 86400)
    for step in range(30):  # more than a queue would hold
        written.write("train", step, {"loss": 0.5})
    written.close()
    assert [line["step"] for line in read_reports(tmp_path, "train")] == list(range(30))
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"train/loss") == 30


def test_reports_that_cannot_be_written_end_the_run_with_its_name(tmp_path, small_files_only):
    from ctssl_jax.runs.reports import Reports, read_reports

    written = Reports(tmp_path, -1)
    with pytest.raises(OSError, match="File too large") as error:
        for step in range(200):
            written.write("train", step, {"loss": 0.5})
    assert explain(error.value).startswith(f"{tmp_path}: File too large; permit larger files")
    steps = [line["step"] for line in read_reports(tmp_path, "train")]
    assert steps == list(range(len(steps))) and len(steps) > 20


def test_the_campaign_at_system_calls_sees_lost_and_damaged_checkpoints(tmp_path):
    """Its attempts run in `.ci/run`: they need a process that has not used JAX."""
    states = {
        step: ({"step": np.full(9, step)}, kill_points.ERRORS[step]) for step in (2, 4, 6, 8, 10)
    }
    save_scored(tmp_path, states)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["10", "8"]
    assert kill_points.faults_of_checkpoints(tmp_path, 10) == []
    assert kill_points.faults_of_checkpoints(tmp_path, 12) == [
        "checkpoint 12 was complete, the newest is [10]"
    ]
    shutil.copytree(folder / "8", tmp_path / "8")
    (folder / "8" / "_CHECKPOINT_METADATA").unlink()
    assert "checkpoint 8 is damaged" in kill_points.faults_of_checkpoints(tmp_path, 10)
    shutil.rmtree(folder / "8")
    assert kill_points.faults_of_checkpoints(tmp_path, 10) == ["the best is 10 instead of 8"]
