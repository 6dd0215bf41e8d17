"""prepare under Beam on a Dask cluster of real processes: the local runner's bytes, and one line
about a cluster that can't do the work."""

import json
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from data_prep.pipeline import dask_cluster, notes
from data_prep.pipeline.options import Directories, Options, parse_beam_options
from data_prep.pipeline.prepare import prepare
from data_prep.pipeline.progress import ExamProgress
from data_prep.system.errors import InputError, RunFailed
from tests.helpers import dicom_files
from tests.helpers.dask_processes import Cluster

OPTIONS = Options(image_size=48, shard_size_mb=0.05)
NUM_EXAMS = 4


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A scheduler; a test starts its two workers."""
    pytest.importorskip("distributed", reason="needs Dask: pip install '.[dask]'")
    pytest.importorskip("apache_beam", reason="needs Apache Beam: pip install '.[dask]'")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with Cluster(tmp_path_factory.mktemp("cluster"), port) as processes:
        processes.start_scheduler()
        yield processes


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    for number in range(1, NUM_EXAMS + 1):
        hu = dicom_files.thorax(21, seed=number)
        dicom_files.write(
            folder / str(number), dicom_files.slices(hu, study=number, patient=f"patient-{number}")
        )
    return folder


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_cluster_without_workers_is_refused(cluster, monkeypatch):
    monkeypatch.setattr(dask_cluster, "_WORKER_SECONDS", 0.3)
    with pytest.raises(
        InputError, match=f"^--dask_scheduler={cluster.address}: .* no workers; start some: dask"
    ):
        dask_cluster.check_cluster(cluster.address)


def test_same_bytes_as_the_local_runner(cluster, archive, tmp_path, key_file, capfd):
    for number in (1, 2):
        cluster.start_worker(number)
    local, dask = (
        Directories(archive, tmp_path / name / "dataset", tmp_path / name / "private")
        for name in ("local", "dask")
    )
    prepare(OPTIONS, local, num_workers=1, pseudonym_key_file=key_file)
    capfd.readouterr()
    command = [
        *(sys.executable, "-m", "data_prep.prepare", "--runner=dask"),
        *(f"--dask_scheduler={cluster.address}", f"--input_dir={archive}"),
        *(f"--output_dir={dask.output_dir}", f"--audit_dir={dask.audit_dir}"),
        *(f"--pseudonym_key_file={key_file}", "--num_workers=1"),
        *(f"--image_size={OPTIONS.image_size}", f"--shard_size_mb={OPTIONS.shard_size_mb}"),
    ]
    subprocess.run(command, check=True)
    lines = capfd.readouterr().err.splitlines()
    assert content(dask.output_dir) == content(local.output_dir)
    assert content(dask.audit_dir) == content(local.audit_dir)
    # neither Beam nor Dask adds a line of its own
    starts = {"listing:", "reading", "planning:", "converting:", "writing"}
    assert {line.split()[0] for line in lines} == starts, lines
    assert any(line.endswith(f"; {NUM_EXAMS} of {NUM_EXAMS} exams") for line in lines)


def test_a_worker_with_another_program_is_refused(cluster, monkeypatch):
    facts = dask_cluster._facts()
    for name, value in (("data_prep", "0123456789ab"), ("dask", "2020.1.0")):
        monkeypatch.setattr(dask_cluster, "_facts", lambda n=name, v=value: facts | {n: v})
        with pytest.raises(
            InputError, match=rf"the scheduler has {name} .*, not {value}; install the same"
        ):
            dask_cluster._refuse_other_facts("the scheduler", facts, dask_cluster._facts())
    with pytest.raises(InputError, match=r"can't run this program \(No module named 'data_prep'\)"):
        error = ModuleNotFoundError("No module named 'data_prep'")
        dask_cluster._refuse_other_facts("the worker tcp://127.0.0.2:1", error, facts)


def test_a_worker_that_lacks_a_directory_is_refused(cluster, tmp_path):
    missing = tmp_path / "not mounted"
    for readable, writable in (([missing], []), ([], [missing])):
        with pytest.raises(
            InputError, match=r"the worker tcp://127\.0\.0\.\d:\d+ can't use .*/not mounted: No "
        ):
            dask_cluster.check_directories(cluster.address, readable, writable, tmp_path)


def test_a_scheduler_that_does_not_answer_is_refused(cluster, monkeypatch):
    monkeypatch.setattr(dask_cluster, "_CONNECT_SECONDS", 1)
    with pytest.raises(InputError, match=r"^--dask_scheduler=tcp://127\.0\.0\.1:9: no Dask sched"):
        dask_cluster.check_cluster("tcp://127.0.0.1:9")


@pytest.mark.parametrize(
    ("statuses", "connection", "words"),
    [
        (["cancelled"], "closed", "scheduler at tcp://host:1 is gone"),
        (["cancelled"], "running", "scheduler at tcp://host:1 is gone"),
        (["finished"], "running", None),
        (["pending"] * 99, "running", "cluster at tcp://host:1 has no workers left"),
    ],
)
def test_a_pipeline_without_its_cluster_is_not_done(
    cluster, monkeypatch, statuses, connection, words
):
    """Beam says DONE where the tasks were lost with the scheduler."""
    monkeypatch.setattr(dask_cluster, "_ALONE_SECONDS", 0)

    class Result:
        client = SimpleNamespace(status=connection, nthreads=dict, close=lambda timeout: None)
        futures = (SimpleNamespace(status=statuses[0], result=list),)

        def wait_until_finish(self, duration):
            if statuses.pop() == "pending":
                raise TimeoutError
            return "DONE"

    if words is None:
        assert dask_cluster.wait_until_finish(Result(), "tcp://host:1") == ([], set())
        return
    with pytest.raises(RunFailed, match=words):
        dask_cluster.wait_until_finish(Result(), "tcp://host:1")


def test_failed_tasks_run_again_on_other_workers(cluster, monkeypatch):
    import dask

    monkeypatch.setattr(dask_cluster, "wait_until_finish", lambda result, address: result)
    started = []

    def start_with_bad_workers(number: int):
        def start(elements):
            started.append((list(elements), dask.get_annotations().get("workers")))
            bad = elements[: number if len(started) == 1 else max(number - 1, 0)]
            failures = [dask_cluster.Failure(one, f"tcp://{one}", "no room") for one in bad]
            return failures, {"tcp://1", "tcp://2", "tcp://3"}

        return start

    dask_cluster.run_tasks([1, 2, 3], start_with_bad_workers(1), "tcp://host:1")
    assert started == [([1, 2, 3], None), ([1], ["tcp://2", "tcp://3"])]
    started.clear()
    with pytest.raises(RunFailed, match=r"^3 tasks failed, one of them on .* tcp://1: no room$"):
        dask_cluster.run_tasks([1, 2, 3], start_with_bad_workers(3), "tcp://host:1")
    assert len(started) == 1  # there is no worker on which none failed
    started.clear()
    with pytest.raises(RunFailed, match=r"^1 tasks failed, one of them on .* tcp://1: no room$"):
        dask_cluster.run_tasks([1, 2, 3], start_with_bad_workers(2), "tcp://host:1")
    assert [workers for _, workers in started] == [None, *3 * [["tcp://3"]]]
    started.clear()
    monkeypatch.setattr(dask_cluster, "_MOST_TASKS", 2)
    dask_cluster.run_tasks([1, 2, 3], start_with_bad_workers(0), "tcp://host:1")
    assert started == [([1, 2], None), ([3], None)]


@pytest.mark.parametrize("address", [None, "", "host:8786", "tcp://host", "http://host:80"])
def test_an_address_that_is_none_is_refused(monkeypatch, address):
    monkeypatch.setattr("data_prep.pipeline.options.require", lambda *names: None)
    with pytest.raises(InputError, match=r"^--dask_scheduler=.*: give the address that"):
        parse_beam_options("dask", "", address)


def test_a_scheduler_for_another_runner_is_refused():
    for runner in ("local", "beam"):
        with pytest.raises(InputError, match="--dask_scheduler needs --runner=dask"):
            parse_beam_options(runner, "", "tcp://host:8786")


def test_progress_follows_the_notes(tmp_path, capsys):
    """Exams, reasons, and what was left out; notes of an earlier try do not count."""

    def write(key: str, reason: str) -> None:
        rejected = [{"series_id": "", "reason": reason, "detail": "", "sources": []}]
        note = notes.ExamNote(key, None if reason else {"volume_id": key}, 0, [], [], [])
        fields = vars(note) | {"rejected": rejected if reason else []}
        (tmp_path / f"{key}.new").write_text(json.dumps(fields))
        (tmp_path / f"{key}.new").replace(tmp_path / f"{key}.json")

    write("d", "failed_for_now")
    with ExamProgress(5, 50) as progress:
        progress.advance(10, "", already_there=True)
        with progress.following(tmp_path, dict.fromkeys("abcd", 10)) as missing:
            write("a", "")
            write("b", "no_lung")
            write("other", "")
        assert missing == {"c": 10, "d": 10}
        with progress.following(tmp_path, missing):
            write("d", "failed_for_now")
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("converting: 40 of 50 slices, ")
    assert line.endswith(" left; 4 of 5 exams, refused: 1 no_lung, 1 failed_for_now")
