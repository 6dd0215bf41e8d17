"""A windowed order: exact, from the position alone, and of few shards at a time."""

import contextlib
import itertools
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from ctssl_jax.data import slices
from ctssl_jax.data.batches import Windows, bytes_of_windows, training_batches
from ctssl_jax.data.windowed import WindowedOrder, most_shards
from data_prep.dataset import cache as dataset_cache
from data_prep.dataset.reader import Dataset
from data_prep.system.errors import DatasetError
from tests.helpers.example_dataset import write_example_dataset
from tests.helpers.training_runs import PROJECT

URL = "example://data/many"


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """Thirty training shards of one volume with twelve slices."""
    return write_example_dataset(
        tmp_path_factory.mktemp("data") / "many",
        image_size=16,
        volumes_per_split={"train": 30, "validation": 2},
        volumes_per_shard=1,
        slice_labels=True,
    )


@pytest.fixture(scope="module")
def source(many_shards):
    return slices.open_source(Dataset.open(many_shards), "train", (0,), (0,))


def orders(num_items, num_shards, window, num_streams, seed=3):
    shards = np.sort(np.random.default_rng(0).integers(0, num_shards, num_items))
    return [
        WindowedOrder(np.arange(num_items), shards, seed, window, stream, num_streams)
        for stream in range(num_streams)
    ]


@pytest.mark.parametrize(
    ("num_items", "num_shards", "window", "num_streams"),
    [(60, 3, 7, 1), (61, 5, 8, 2), (61, 5, 8, 4), (3, 2, 2, 4), (100, 7, 1, 3), (50, 1, 999, 2)],
)
def test_all_streams_together_have_each_item_once_an_epoch(
    num_items, num_shards, window, num_streams
):
    streams = orders(num_items, num_shards, window, num_streams)
    order = [
        streams[number % num_streams][number // num_streams] for number in range(4 * num_items)
    ]
    epochs = [order[start : start + num_items] for start in range(0, len(order), num_items)]
    assert all(sorted(epoch) == list(range(num_items)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = orders(num_items, num_shards, window, num_streams)[0]
    for position in np.random.default_rng(1).permutation(len(order) // num_streams):
        assert again[position] == order[position * num_streams]


def test_a_window_lies_in_few_shards_and_its_order_is_random():
    begun = []
    items = np.arange(1_000)
    order = WindowedOrder(items, items // 100, 0, 200, begun=begun.append)
    windows = [[order[200 * window + place] for place in range(200)] for window in range(5)]
    for number, window in enumerate(windows):
        shards = {item // 100 for item in window}
        assert len(shards) == 2 and shards <= set(begun[number])
        if number:
            assert shards <= set(begun[number - 1])  # they were asked for one window ahead
        assert abs(np.corrcoef(np.arange(200), window)[0, 1]) < 0.9
    assert most_shards([100] * 10, 200) >= 2 and most_shards([100, 100, 0], 10**6) == 2


def joined(source, number, *, processes, start_step=0, windows, microbatches=1):
    """Record numbers of the next global batches, from all processes."""
    iterators = [
        training_batches(
            source,
            8,
            3,
            microbatches=microbatches,
            start_step=start_step,
            process_index=index,
            process_count=processes,
            windows=windows,
        )
        for index in range(processes)
    ]
    return [
        [
            record
            for _ in range(microbatches)
            for iterator in iterators
            for record in next(iterator)["record_index"].tolist()
        ]
        for _ in range(number)
    ]


def test_one_two_and_four_processes_share_the_streams_of_one_order(source):
    windows = Windows(30, 4)
    expected = joined(source, 50, processes=1, windows=windows)
    for processes, microbatches in ((2, 1), (4, 1), (2, 2)):
        if microbatches == 1:
            assert joined(source, 50, processes=processes, windows=windows) == expected
        for start_step in (1, 44):
            options = {"windows": windows, "microbatches": microbatches}
            rest = joined(source, 3, processes=processes, start_step=start_step, **options)
            whole = joined(source, start_step + 3, processes=processes, **options)
            assert rest == whole[start_step:]
    assert sorted(itertools.chain(*expected[:45])) == list(range(360))
    assert joined(source, 50, processes=1, windows=Windows(30, 2)) != expected


def test_a_share_of_positive_slices_is_kept(many_shards):
    targets = slices.Targets(label="pe_present_on_image", positive_share=0.5)
    source = slices.open_source(Dataset.open(many_shards), "train", (0,), (0,), targets)
    batches = training_batches(source, 8, 0, windows=Windows(40, 2))
    labels = np.concatenate([next(batches)["label"] for _ in range(20)])
    assert np.mean(labels > 0) == pytest.approx(0.5, abs=0.02)


# ---- a dataset on a store ------------------------------------------------------------------------


@pytest.fixture
def remote(store, many_shards, tmp_path, monkeypatch):
    """The store with the dataset, and an empty folder for copies."""
    shutil.copytree(many_shards, store.objects / "data" / "many")
    monkeypatch.setenv("CTSSL_CACHE_DIR", str(tmp_path / "copies"))
    dataset_cache._open.cache_clear()
    yield store
    dataset_cache._open.cache_clear()


def shards_read(store):
    return [
        path.rsplit("/", 1)[-1]
        for kind, _, path in store.requests()
        if kind == "read" and ".array_record-" in path
    ]


def shard_files(copies):
    """Name -> bytes; as two looks in a row see them, since files come and go meanwhile."""
    seen = None
    while True:
        files = {}
        for path in copies.rglob("*.array_record-*"):
            with contextlib.suppress(FileNotFoundError):
                files[path.name] = path.stat().st_size
        if files == seen:
            return files
        seen = files


def test_each_process_reads_its_part_and_holds_no_more_than_the_bound(remote, source, tmp_path):
    sizes = dataset_cache.shard_bytes(URL, "train")
    windows = Windows(12, 2)
    bound = bytes_of_windows(source, sizes, windows, 4, 1, process_count=2)
    assert bound < sum(sizes)
    expected = joined(source, 45, processes=2, windows=windows)
    remote.requests()
    for process in range(2):
        opened = slices.open_source(Dataset.open(URL), "train", (0,), (0,), most_bytes=bound)
        batches = training_batches(
            opened, 8, 3, process_index=process, process_count=2, num_threads=1, windows=windows
        )
        for step in range(45):  # an epoch
            own = next(batches)["record_index"].tolist()
            assert own == expected[step][4 * process : 4 * process + 4]
            assert sum(shard_files(tmp_path / "copies").values()) <= bound
        opened.close()
        read = shards_read(remote)
        assert len(read) <= 22  # half of thirty, and what was fetched ahead


def test_what_an_ended_process_left_is_used_again(remote, tmp_path):
    first = Dataset.open(URL).source("train", 1e9)
    assert first[0]["slice_index"] == 0
    second = Dataset.open(URL).source("train", 1e9)  # at the same time: a folder of its own
    assert second[12]["slice_index"] == 0
    assert sorted(shards_read(remote)) == ["train.array_record-00000", "train.array_record-00001"]
    first.close()
    second.close()
    third = Dataset.open(URL).source("train", 1e9)
    assert third[0]["slice_index"] == 0 and shards_read(remote) == []
    third.close()


def test_a_shard_that_fails_leaves_nothing_and_is_asked_for_again(remote, tmp_path):
    source = Dataset.open(URL).source("train", 1e9)
    remote.fail("read *train.array_record-00003")
    with pytest.raises(
        DatasetError, match=r"00003: the store refuses.*; run again to continue with the shards"
    ):
        source[36]
    assert shard_files(tmp_path / "copies") == {}
    remote.fail("nothing")
    assert source[36]["slice_index"] == 0
    source.close()


def test_a_fetch_that_was_killed_leaves_no_part_that_counts_against_the_bound(remote, tmp_path):
    remote.hang("read *train.array_record-00002")
    code = (
        "from data_prep.dataset.reader import Dataset\n"
        f"source = Dataset.open({URL!r}).source('train', 1e9)\n"
        "source[0], source[12], source[24]\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT)
    deadline, parts = time.time() + 60, []
    while not parts and time.time() < deadline:
        time.sleep(0.05)
        parts = list((tmp_path / "copies").rglob("train.array_record-00002.partial"))
    process.kill()
    process.wait()
    [part] = parts
    part.write_bytes(bytes(1000))  # had arrived
    remote.hang()
    remote.requests()
    sizes = dataset_cache.shard_bytes(URL, "train")
    bound = sum(sizes[:3])
    source = Dataset.open(URL).source("train", bound)
    assert [source[record]["slice_index"] for record in (0, 12, 24)] == [0, 0, 0]
    assert shards_read(remote) == ["train.array_record-00002"]
    assert sum(shard_files(tmp_path / "copies").values()) == bound and not part.exists()
    assert source[36]["slice_index"] == 0
    assert sum(shard_files(tmp_path / "copies").values()) <= bound
    source.close()
