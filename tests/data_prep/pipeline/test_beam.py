"""prepare under Apache Beam: the local runner's bytes, whatever fails, is repeated or is killed on
the way."""

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from data_prep.pipeline import assemble, convert, notes
from data_prep.pipeline import prepare as preparation
from data_prep.pipeline.accounting import num_failed_for_now
from data_prep.pipeline.options import Directories, Options, parse_beam_options
from data_prep.pipeline.prepare import prepare
from data_prep.system.errors import InputError, RunFailed
from data_prep.system.workers import WorkerPool
from tests.helpers import dicom_files

NUM_SLICES, NUM_EXAMS = 21, 5
OPTIONS = Options(image_size=48, shard_size_mb=0.05)
# runs a bundle that fails again, as the runners of clusters do
RETRYING = ["--runner=BundleBasedDirectRunner"]


@pytest.fixture
def beam_runner():
    pytest.importorskip("apache_beam", reason="needs Apache Beam: pip install '.[beam]'")
    from data_prep.pipeline import beam

    return beam


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    for number in range(1, NUM_EXAMS + 1):
        hu = dicom_files.thorax(NUM_SLICES, seed=number)
        dicom_files.write(
            folder / str(number), dicom_files.slices(hu, study=number, patient=f"patient-{number}")
        )
    short = dicom_files.slices(dicom_files.thorax(5, seed=8), study=8, patient="patient-8")
    dicom_files.write(folder / "short", short)
    (folder / "notes.txt").write_text("nothing to see")
    return folder


@pytest.fixture(scope="module")
def local(tmp_path_factory, archive, key_file) -> Directories:
    where = directories(tmp_path_factory.mktemp("local"), archive)
    prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file)
    assert len(list(where.output_dir.glob("*.array_record-*"))) > 3
    return where


def directories(folder: Path, archive: Path) -> Directories:
    return Directories(archive, folder / "dataset", folder / "private")


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def assert_same(where: Directories, expected: Directories) -> None:
    """Also that nothing is left over of the work."""
    assert content(where.output_dir) == content(expected.output_dir)
    assert content(where.audit_dir) == content(expected.audit_dir)
    assert {path.name for path in where.output_dir.iterdir()} == {
        path.name for path in expected.output_dir.iterdir()
    }
    assert {path.name for path in where.audit_dir.iterdir()} == {
        path.name for path in expected.audit_dir.iterdir()
    }


class InProcess:
    """A worker pool without the seconds that starting processes takes."""

    def __init__(self, num_workers: int):
        pass

    def run(self, function, tasks):
        return ((task, function(*task)) for task in tasks)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture
def in_process(beam_runner, monkeypatch) -> None:
    monkeypatch.setattr(beam_runner, "WorkerPool", InProcess)
    monkeypatch.setattr(preparation, "WorkerPool", InProcess)


def kind(target: Path) -> str:
    kinds = {".json": "note", ".array_record": "volume", ".done": "sidecar"}
    return kinds.get(target.suffix, "shard")


@pytest.fixture
def published(beam_runner, monkeypatch) -> list[Path]:
    """Grows by each file that a task puts in its place."""
    targets = []
    publish = beam_runner.publish

    def publish_and_note(source: Path, target: Path) -> None:
        publish(source, target)
        targets.append(target)

    monkeypatch.setattr(beam_runner, "publish", publish_and_note)
    return targets


def test_same_bytes_as_the_local_runner_from_another_working_directory(
    beam_runner, tmp_path, archive, key_file, local, monkeypatch, capsys
):
    monkeypatch.chdir(archive)
    where = Directories(Path("."), tmp_path / "dataset", tmp_path / "private")
    _, changed = prepare(
        OPTIONS, where, num_workers=2, pseudonym_key_file=key_file, beam_options=[]
    )
    assert changed
    assert_same(where, local)
    lines = capsys.readouterr().err.splitlines()
    num_shards = len(list(where.output_dir.glob("*.array_record-*")))
    for start in (
        "planning: ",
        f"converting: {NUM_EXAMS} exams under Apache Beam",
        f"converting: {NUM_EXAMS * NUM_SLICES} of {NUM_EXAMS * NUM_SLICES} slices",
        f"writing shards: {num_shards} shards under Apache Beam",
        f"writing shards: {NUM_EXAMS * NUM_SLICES} of {NUM_EXAMS * NUM_SLICES} slices",
    ):
        assert any(line.startswith(start) for line in lines), (start, lines)


def test_a_complete_dataset_is_left_alone(
    beam_runner, in_process, archive, key_file, local, published
):
    before = {path: path.stat().st_mtime_ns for path in local.output_dir.iterdir()}
    _, changed = prepare(OPTIONS, local, pseudonym_key_file=key_file, beam_options=[])
    assert not changed and not published
    assert {path: path.stat().st_mtime_ns for path in local.output_dir.iterdir()} == before


def test_bundles_that_run_twice_do_nothing_twice(
    beam_runner, in_process, tmp_path, archive, key_file, local, monkeypatch, published
):
    where = directories(tmp_path, archive)
    calls = Counter()

    def counted(name: str) -> None:
        function = getattr(beam_runner, name)

        def call(*task):
            calls[name] += 1
            function(*task)

        monkeypatch.setattr(beam_runner, name, call)

    counted("convert_once")
    counted("write_shard_once")
    twice = ["--direct_runner_bundle_repeat=1"]
    prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file, beam_options=twice)
    num_shards = len(list(where.output_dir.glob("*.array_record-*")))
    assert calls == {"convert_once": 2 * NUM_EXAMS, "write_shard_once": 2 * num_shards}
    assert len(set(published)) == len(published) == 2 * NUM_EXAMS + 2 * num_shards
    assert_same(where, local)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_bundle_that_fails_once_is_retried(
    beam_runner, in_process, tmp_path, archive, key_file, local, monkeypatch, moment
):
    """Fails before or after each kind of file is put in its place; what has its note or sidecar is
    not done again."""
    where = directories(tmp_path, archive)
    publish = beam_runner.publish
    failed, targets = [], Counter()

    def failing_at_first(source: Path, target: Path) -> None:
        fails = kind(target) not in failed
        if fails:
            failed.append(kind(target))
        if not fails or moment == "after":
            publish(source, target)
            targets[target] += 1
        if fails:
            raise OSError("lost worker")

    monkeypatch.setattr(beam_runner, "publish", failing_at_first)
    prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file, beam_options=RETRYING)
    assert failed == ["volume", "note", "shard", "sidecar"]
    assert_same(where, local)
    # the volume whose note, and the shard whose sidecar, was not there yet
    assert sorted(kind(target) for target, number in targets.items() if number > 1) == [
        "shard",
        "volume",
    ]


def test_a_task_that_runs_twice_at_the_same_time(
    beam_runner, in_process, tmp_path, archive, key_file, local, monkeypatch
):
    """In the middle of a task the same task is run from start to end, as after a worker was given
    up for lost."""
    where = directories(tmp_path, archive)
    unhindered, write = convert.convert_exam, assemble.write_shard
    exams, shards = [], []

    def convert_exam(private, exam):
        if exam[0].exam_key not in exams:
            exams.append(exam[0].exam_key)
            run = dataclasses.replace(
                private, records_dir=where.records_dir, notes_dir=where.notes_dir
            )
            beam_runner.convert_once(run, exam, InProcess(1))
            assert notes.is_converted(run, exam)
        unhindered(private, exam)

    def write_shard(path, private, staged, num_records):
        if path.name not in shards:
            shards.append(path.name)
            beam_runner.write_shard_once(
                where.output_dir / path.name, where.records_dir, staged, num_records
            )
            assert not any(notes.records_path(where.records_dir, key).exists() for key in staged)
        return write(path, private, staged, num_records)

    monkeypatch.setattr(convert, "convert_exam", convert_exam)
    monkeypatch.setattr(assemble, "write_shard", write_shard)
    prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file, beam_options=[])
    assert len(exams) == NUM_EXAMS and len(shards) == len(
        list(where.output_dir.glob("*.array_record-*"))
    )
    assert_same(where, local)


def test_the_local_runner_continues_what_beam_began(
    beam_runner, in_process, tmp_path, archive, key_file, local, monkeypatch
):
    where = directories(tmp_path, archive)
    publish = beam_runner.publish

    def run_until_full(suffix: str, number: int) -> None:
        def publish_until_full(source: Path, target: Path) -> None:
            if target.suffix == suffix and len(list(target.parent.glob(f"*{suffix}"))) == number:
                raise OSError("disk full")
            publish(source, target)

        monkeypatch.setattr(beam_runner, "publish", publish_until_full)
        with pytest.raises(
            RunFailed,
            match=r"^the Beam pipeline failed: .*disk full.*: run the same command",
        ) as error:
            prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file, beam_options=[])
        assert "\n" not in str(error.value)

    def numbers_of_files(paths) -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in paths}

    run_until_full(".json", 2)
    notes = numbers_of_files(where.notes_dir.glob("*.json"))
    run_until_full(".done", 2)  # Beam itself goes on with the exams
    assert (
        len(notes) == 2 and notes.items() < numbers_of_files(where.notes_dir.glob("*.json")).items()
    )
    shards = numbers_of_files(
        where.output_dir / path.stem for path in where.records_dir.glob("*.done")
    )
    prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file)
    assert_same(where, local)
    assert (
        len(shards) == 2 and shards.items() < numbers_of_files(where.output_dir.iterdir()).items()
    )


def test_beam_continues_what_the_local_runner_began(
    beam_runner, in_process, tmp_path, archive, key_file, local, monkeypatch, published
):
    where = directories(tmp_path, archive)
    run = InProcess.run

    def run_until_killed(function, number: int) -> None:
        def run_some(pool, called, tasks):
            for done, result in enumerate(run(pool, called, tasks)):
                if called is function and done == number:
                    raise KeyboardInterrupt
                yield result

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(InProcess, "run", run_some)
            prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file)

    def killed(*arguments):
        raise KeyboardInterrupt

    run_until_killed(convert.convert_exam, 1)
    num_notes = len(list(where.notes_dir.glob("*.json")))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(beam_runner, "write_shards", killed)
        prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file, beam_options=[])
    assert num_notes == 2 and sum(kind(target) == "note" for target in published) == NUM_EXAMS - 2
    run_until_killed(assemble.write_shard, 1)
    num_sidecars = len(list(where.records_dir.glob("*.done")))
    prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file, beam_options=[])
    num_shards = len(list(where.output_dir.glob("*.array_record-*")))
    assert (
        num_sidecars == 2
        and sum(kind(target) == "sidecar" for target in published) == num_shards - 2
    )
    assert_same(where, local)


def test_a_killed_run_is_continued(
    beam_runner, in_process, tmp_path, archive, key_file, local, published
):
    where = directories(tmp_path, archive)
    command = [
        sys.executable,
        "-m",
        "data_prep.prepare",
        f"--input_dir={archive}",
        f"--output_dir={where.output_dir}",
    ]
    command += [
        f"--audit_dir={where.audit_dir}",
        f"--pseudonym_key_file={key_file}",
        "--num_workers=1",
    ]
    command += [
        f"--image_size={OPTIONS.image_size}",
        f"--shard_size_mb={OPTIONS.shard_size_mb}",
        "--runner=beam",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while (
        process.poll() is None
        and not any(where.notes_dir.glob("*.json"))
        and time.monotonic() < deadline
    ):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    num_notes = len(list(where.notes_dir.glob("*.json")))
    assert 1 <= num_notes < NUM_EXAMS
    prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file, beam_options=[])
    assert sum(kind(target) == "note" for target in published) == NUM_EXAMS - num_notes
    assert_same(where, local)


def kill_worker(run, exam) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_exam_that_kills_its_worker_is_noted_and_tried_again(
    beam_runner, in_process, tmp_path, archive, key_file, local, monkeypatch
):
    where = directories(tmp_path, archive)
    convert_once = beam_runner.convert_once
    deadly = []

    class Deadly:
        def run(self, function, tasks):
            with WorkerPool(1) as pool:
                yield from pool.run(kill_worker, tasks)

    def convert_first_in_deadly_pool(run, exam, pool):
        convert_once(run, exam, pool if deadly else Deadly())
        deadly.append(exam)

    with monkeypatch.context() as patched:
        patched.setattr(beam_runner, "convert_once", convert_first_in_deadly_pool)
        prepared, _ = prepare(
            OPTIONS, where, num_workers=1, pseudonym_key_file=key_file, beam_options=[]
        )
    assert num_failed_for_now(prepared["counts"]) == 1
    assert sum(facts["num_volumes"] for facts in prepared["splits"].values()) == NUM_EXAMS - 1
    old_shards = {
        path.name: path.read_bytes() for path in where.output_dir.glob("*.array_record-*")
    }
    prepared, changed = prepare(
        OPTIONS, where, num_workers=1, pseudonym_key_file=key_file, beam_options=[]
    )
    assert changed and num_failed_for_now(prepared["counts"]) == 0
    assert sum(facts["num_volumes"] for facts in prepared["splits"].values()) == NUM_EXAMS
    assert old_shards.items() < content(where.output_dir).items()


def test_neither_key_nor_identifiers_go_through_beam(
    beam_runner, in_process, tmp_path, archive, key_file, local, monkeypatch
):
    from apache_beam.internal import pickler

    where = directories(tmp_path, archive)
    dumps = pickler.dumps
    sent = []

    def dumps_and_note(content, *arguments, **options):
        sent.append(pickler.cloudpickle_pickler.cloudpickle.dumps(content))
        return dumps(content, *arguments, **options)

    monkeypatch.setattr(pickler, "dumps", dumps_and_note)
    prepare(OPTIONS, where, num_workers=1, pseudonym_key_file=key_file, beam_options=[])
    assert any(b".plan" in item for item in sent) and any(b"frozen.json" in item for item in sent)
    uid = dicom_files.slices(dicom_files.thorax(1))[0].SOPInstanceUID
    for secret in (b"patient-", b"0123456789abcdef", uid[:12].encode()):
        assert not any(secret in item for item in sent)


def test_options_that_beam_cannot_take_are_refused_in_one_line_before_any_work(
    beam_runner, tmp_path, archive
):
    where = directories(tmp_path, archive)
    for options, reason in (
        (["--runner=FlinkRuner"], "Unexpected pipeline runner: FlinkRuner"),
        (["--direct_num_workers=x"], "argument --direct_num_workers: invalid int value: 'x'"),
        (
            ["--runner=FlinkRunner", "--flink_master"],
            "argument --flink_master: expected one argument",
        ),
    ):
        with pytest.raises(
            InputError, match=f"^--beam_options={' '.join(options)}: {reason}"
        ) as error:
            prepare(OPTIONS, where, beam_options=options)
        assert "\n" not in str(error.value)
        assert not where.output_dir.exists()


def test_without_the_package_the_extra_is_named_before_any_work(tmp_path, archive, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "apache_beam" else find_spec(name, *rest),
    )
    where = directories(tmp_path, archive)
    with pytest.raises(
        InputError,
        match=r"^--runner=beam needs .*: pip install 'apache-beam[^ ]*'$",
    ):
        prepare(OPTIONS, where, beam_options=[])
    assert not where.output_dir.exists()


def test_beam_options_are_split_like_a_command_line():
    assert parse_beam_options("local", "") is None
    assert parse_beam_options("beam", "") == []
    assert parse_beam_options("beam", "--a=1 --b='{\"c\": 2}'") == ["--a=1", '--b={"c": 2}']
    with pytest.raises(InputError, match="need --runner=beam"):
        parse_beam_options("local", "--a=1")
    with pytest.raises(InputError, match="No closing quotation"):
        parse_beam_options("beam", "--a='1")
