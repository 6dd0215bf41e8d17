"""Datasets on object stores: copies that are whole, fetched once, and read as the dataset
itself."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ctssl_jax.evaluation.measured_run import MeasuredRun
from ctssl_jax.runs.run import Run, check_resumable
from data_prep.dataset import cache as dataset_cache
from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import dataset_fingerprint, write_preparation
from data_prep.raw import scans
from data_prep.system.errors import DatasetError, InputError
from data_prep.system.files import file_sha256
from tests.helpers.training_runs import PROJECT, assert_same_state, numbers, tiny_config, train_on

URL = "example://data/tiny"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder for copies, and a process that has asked no store yet."""
    monkeypatch.setenv("CTSSL_CACHE_DIR", str(tmp_path / "copies"))
    dataset_cache._open.cache_clear()
    yield tmp_path / "copies"
    dataset_cache._open.cache_clear()


@pytest.fixture
def remote(store, tiny_dataset):
    """The store with the dataset."""
    shutil.copytree(tiny_dataset, store.objects / "data" / "tiny")
    return store


def reads(store) -> list[str]:
    return sorted(path.rsplit("/", 1)[-1] for kind, _, path in store.requests() if kind == "read")


def fetch_command(*flags: str) -> subprocess.Popen:
    arguments = [sys.executable, "-m", "data_prep.fetch", f"--dataset={URL}", *flags]
    return subprocess.Popen(
        arguments, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_readers_take_the_url(remote, tiny_dataset):
    assert Dataset.open(URL).preparation == Dataset.open(tiny_dataset).preparation
    assert Dataset.open(f"{URL}/").volumes() == Dataset.open(tiny_dataset).volumes()
    tables = [
        "dataset_info.json",
        "features.json",
        "preparation.json",
        "rejected.csv",
        "volumes.csv",
    ]
    assert reads(remote) == tables
    ours, theirs = Dataset.open(tiny_dataset).source("test"), Dataset.open(URL).source("test")
    assert repr(ours) == repr(theirs) and len(ours) == len(theirs)
    assert all(np.array_equal(ours[i]["image"], theirs[i]["image"]) for i in range(len(ours)))
    assert reads(remote) == ["test.array_record-00000"]  # no other split
    dataset_cache._open.cache_clear()  # another process
    Dataset.open(URL).source("test")
    assert reads(remote) == ["preparation.json"]


def test_a_run_is_the_same_from_a_url(remote, tiny_dataset, tmp_path):
    short = {"num_steps": 4, "log_every": 2, "eval_every": 4}
    config = tiny_config(URL, **short)
    assert train_on(tiny_config(tiny_dataset, **short), tmp_path / "local")
    assert train_on(config, tmp_path / "remote")
    assert_same_state(tmp_path / "remote", tmp_path / "local")
    assert numbers(tmp_path / "remote") == numbers(tmp_path / "local")
    recorded = [(tmp_path / run / "preparation.json").read_bytes() for run in ("remote", "local")]
    assert recorded[0] == recorded[1]
    assert json.loads((tmp_path / "remote" / "config.json").read_text())["dataset"] == URL
    # it may go on from there
    check_resumable(tmp_path / "local", config, Dataset.open(URL).preparation)
    assert not [name for name in reads(remote) if name.startswith("test.")]
    measured = MeasuredRun.open(Run.open(tmp_path / "local"), URL, ("test",))
    assert (
        measured.dataset.preparation == measured.run.preparation and measured.config.dataset == URL
    )


def test_a_killed_fetch_goes_on_where_it_stopped(remote, tiny_dataset, cache):
    remote.hang("read */train.array_record-00001")
    process = fetch_command("--splits=train")
    seen = []
    deadline = time.time() + 60
    # the rest: 5 files, 2 shards
    while sum(kind == "got" for kind, *_ in seen) < 7 and time.time() < deadline:
        time.sleep(0.1)
        seen += remote.requests()
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    [copy] = cache.iterdir()
    there = sorted(path.name for path in copy.glob("train.*"))
    assert there == [
        "train.array_record-00000",
        "train.array_record-00001.partial",
        "train.array_record-00002",
    ]
    remote.hang()
    remote.requests()
    process = fetch_command()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.strip() == str(copy), err
    others = ["test.array_record-00000", "validation.array_record-00000"]
    assert reads(remote) == ["preparation.json", *sorted([*others, "train.array_record-00001"])]
    names = {path.name for path in tiny_dataset.iterdir()}
    assert {path.name for path in copy.iterdir()} == names | {".lock"}
    assert all((copy / name).read_bytes() == (tiny_dataset / name).read_bytes() for name in names)


def test_a_file_goes_on_in_its_middle(remote, cache, monkeypatch):
    monkeypatch.setattr(dataset_cache, "PIECE", 1000)
    Dataset.open(URL)
    remote.requests()
    name = "test.array_record-00000"
    size = (remote.objects / "data" / "tiny" / name).stat().st_size
    answered = remote_store_that_fails_after(monkeypatch, 2)
    with pytest.raises(
        DatasetError, match=re.escape(f"{URL}/{name}: the store refuses")
    ) as failure:
        Dataset.open(URL).source("test")
    assert "run again to continue" in str(failure.value) and len(answered) == 2
    monkeypatch.undo()
    monkeypatch.setenv("CTSSL_CACHE_DIR", str(cache))
    monkeypatch.setenv("EXAMPLE_STORE", str(remote.folder))
    assert (next(cache.iterdir()) / f"{name}.partial").stat().st_size == 2000
    assert Dataset.open(URL).source("test")[0]["slice_index"] == 0
    assert (
        sum(
            number
            for kind, number, path in remote.requests()
            if kind == "got" and path.endswith(name)
        )
        == size
    )


def remote_store_that_fails_after(monkeypatch, number: int) -> list[str]:
    from tests.helpers.example_store import ExampleStore

    answered, cat_file = [], ExampleStore.cat_file

    def limited(self, path, start=None, end=None, **kwargs):
        if len(answered) == number:
            raise TimeoutError("no answer")
        answered.append(path)
        return cat_file(self, path, start, end)

    monkeypatch.setattr(ExampleStore, "cat_file", limited)
    return answered


def test_processes_that_start_together_fetch_once(remote):
    processes = [fetch_command() for _ in range(2)]
    finished = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], finished
    assert finished[0][0] == finished[1][0]
    fetched = reads(remote)
    assert fetched.count("preparation.json") == 2
    shards = [name for name in fetched if ".array_record-" in name]
    assert len(shards) == len(set(shards)) == 5


def test_damaged_and_missing_shards_are_named(remote, cache):
    shard = remote.objects / "data" / "tiny" / "test.array_record-00000"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DatasetError, match=re.escape(f"{URL}/test.array_record-00000: damaged")):
        Dataset.open(URL).source("test")
    assert reads(remote).count("test.array_record-00000") == 2  # it may have been the network
    shard.write_bytes(content[:-10])  # shorter
    with pytest.raises(DatasetError, match=re.escape(f"{URL}/test.array_record-00000: damaged")):
        Dataset.open(URL).source("test")
    assert not list(next(cache.iterdir()).glob("test.*"))
    shard.unlink()
    with pytest.raises(
        DatasetError, match=re.escape(f"{URL}/test.array_record-00000: is not there")
    ):
        Dataset.open(URL).source("test")
    assert len(Dataset.open(URL).source("validation")) == 24


def test_other_refusals_name_the_url_and_the_remedy(remote, cache, monkeypatch):
    with pytest.raises(
        DatasetError,
        match=re.escape("example://data: no complete dataset there (no preparation.js"),
    ):
        Dataset.open("example://data")
    with pytest.raises(InputError, match="Protocol not known"):
        Dataset.open("nosuch://data")
    usage = shutil.disk_usage(remote.folder)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(
            DatasetError,
            match=r"GB are to be fetched and .* has 0.0 GB left; .*\$CTSSL_CACHE_DIR",
        ):
            Dataset.open(URL)
    assert not [path for path in next(cache.iterdir()).iterdir() if path.name != ".lock"]
    path = remote.objects / "data" / "tiny" / "preparation.json"
    preparation = json.loads(path.read_text())
    preparation["checksums"]["../outside"] = "0" * 64
    path.write_text(json.dumps(preparation))
    with pytest.raises(DatasetError, match=r"tiny/preparation\.json: damaged"):
        Dataset.open(URL)
    remote.fail("read *")
    with pytest.raises(
        DatasetError,
        match=r"tiny: the store refuses or cannot be reached \(RuntimeError",
    ):
        Dataset.open(URL)
    for take in (scans.plan_scans, scans.local_input):
        with pytest.raises(InputError, match=r"--input=gs://b/scan: .*; copy scans here first"):
            take("gs://b/scan")


def test_a_changed_dataset_is_fetched_anew(remote, cache):
    folder = remote.objects / "data" / "tiny"
    first = Dataset.open(URL, ("test",)).directory
    dataset_cache._open.cache_clear()
    preparation = Dataset.open(folder).preparation
    (folder / "rejected.csv").write_text(
        "series_id,num_files,reason,detail\nx,1,too_thick,\n"
    )  # not in the fingerprint
    preparation["checksums"]["rejected.csv"] = file_sha256(folder / "rejected.csv")
    write_preparation(folder, preparation)
    assert Dataset.open(URL, ("test",)).directory == first
    assert (first / "rejected.csv").read_bytes() == (folder / "rejected.csv").read_bytes()
    assert Dataset.open(URL).preparation == preparation
    dataset_cache._open.cache_clear()
    with open(folder / "volumes.csv", "a") as file:
        file.write("\n")
    preparation["checksums"]["volumes.csv"] = file_sha256(folder / "volumes.csv")
    preparation["fingerprint"] = dataset_fingerprint(preparation["checksums"])
    write_preparation(folder, preparation)
    second = Dataset.open(URL, ("test",)).directory
    assert second != first and len(list(cache.iterdir())) == 2
    assert (
        second.name == preparation["fingerprint"] and (second / "test.array_record-00000").is_file()
    )
