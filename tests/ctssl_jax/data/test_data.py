"""Neighbours, channels, and an order of the slices that depends on the seed alone."""

import itertools

import numpy as np
import pytest

from ctssl_jax.data import slices
from ctssl_jax.data.batches import evaluation_batches, picture_batch, training_batches
from data_prep.dataset.reader import Dataset
from data_prep.system.errors import InputError
from tests.helpers.example_dataset import write_example_dataset
from tests.helpers.opened_files import opened_files


def volume(first_record, num_slices, gap_positions=""):
    return {"first_record": first_record, "num_slices": num_slices, "gap_positions": gap_positions}


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ((0,), [[0], [1], [2], [3], [4], [5], [6], [7]]),
        ((0, 1), [[0, 1], [2, 3], [3, 4], [6, 7]]),
        ((0, 2), [[2, 4]]),
        ((-1, 0, 1), [[2, 3, 4]]),
        ((1, 0), [[1, 0], [3, 2], [4, 3], [7, 6]]),
        ((0, 3), []),
    ],
)
def test_neighbours_stay_within_a_volume_and_cross_no_gap(offsets, expected):
    """Slices 0-1, gap, 2-4 of one volume; 5 of another; 6-7 of a third, in one row of records."""
    volumes = [volume(0, 5, "1"), volume(5, 1), volume(6, 2)]
    np.testing.assert_array_equal(
        slices.neighbour_table(volumes, offsets), np.reshape(expected, (-1, len(offsets)))
    )


def test_several_gaps_and_no_volumes():
    table = slices.neighbour_table([volume(10, 6, "0 3")], (0, 1))
    np.testing.assert_array_equal(table, [[11, 12], [12, 13], [14, 15]])
    assert slices.neighbour_table([], (0, 1)).shape == (0, 2)


def test_neighbours_are_what_the_records_say(tiny_dataset):
    records = Dataset.open(tiny_dataset).source("train")
    source = slices.open_source(Dataset.open(tiny_dataset), "train", (0,), (0, 1))
    valid = [number for number in range(len(records)) if records[number]["pair_valid"]]
    np.testing.assert_array_equal(source.table, [[number, number + 1] for number in valid])
    item = source[7]
    np.testing.assert_array_equal(item["images"][1], records[int(source.table[7][1])]["image"])
    assert item["record_index"] == source.table[7][0] and item["weight"] == 1


def joined(iterators, number, parts=1):
    """Record numbers of the next global batches, from all processes, part by part."""
    batches = []
    for _ in range(number):
        pieces = [next(iterator) for _ in range(parts) for iterator in iterators]
        batches.append([index for piece in pieces for index in piece["record_index"].tolist()])
    return batches


def training_order(source, *, number=20, seed=3, processes=1, microbatches=1, **options):
    iterators = [
        training_batches(
            source,
            8,
            seed,
            microbatches=microbatches,
            process_index=index,
            process_count=processes,
            **options,
        )
        for index in range(processes)
    ]
    return joined(iterators, number, microbatches)


@pytest.fixture(scope="module")
def source(tiny_dataset):
    return slices.open_source(Dataset.open(tiny_dataset), "train", (0,), (0,))


def test_every_slice_once_an_epoch_in_another_order_each_time(source):
    # 4 epochs of 60 slices
    order = list(itertools.chain.from_iterable(training_order(source, number=30)))
    epochs = [order[start : start + 60] for start in range(0, 240, 60)]
    assert all(sorted(epoch) == list(range(60)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert order[:60] != sorted(order[:60])


def test_order_depends_on_the_seed_alone(source):
    expected = training_order(source)
    assert training_order(source, seed=4) != expected
    for options in (
        {"processes": 2},
        {"processes": 4},
        {"num_threads": 1},
        {"microbatches": 2},
        {"processes": 2, "microbatches": 4},
    ):
        assert training_order(source, **options) == expected, options


@pytest.mark.parametrize("start_step", [1, 7, 8, 15])
def test_goes_on_exactly_where_it_stopped(source, start_step):
    for options in ({}, {"processes": 2, "microbatches": 2}):
        rest = training_order(source, number=20 - start_step, start_step=start_step, **options)
        assert rest == training_order(source)[start_step:]


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_reads_everything_once_and_pads_with_weight_0(tiny_dataset, processes):
    source = slices.open_source(Dataset.open(tiny_dataset), "validation", (0,), (0,))
    parts = [
        list(evaluation_batches(source, 10, process_index=index, process_count=processes))
        for index in range(processes)
    ]
    # 24 slices, the last batch holds 4
    assert [len(batches) for batches in parts] == [3] * processes
    batches = list(itertools.chain.from_iterable(parts))
    assert {batch["images"].shape for batch in batches} == {(10 // processes, 1, 16, 16, 1)}
    index, weight = (
        np.concatenate([batch[name] for batch in batches]) for name in ("record_index", "weight")
    )
    assert sorted(index[weight == 1]) == list(range(24))
    assert sorted(index[weight == 0]) == list(range(6))


def test_padding_begins_again_as_often_as_needed(tiny_dataset):
    source = slices.open_source(Dataset.open(tiny_dataset), "validation", (0,), (0,))
    (batch,) = evaluation_batches(source, 8, items=np.array([5, 20, 7]))
    assert batch["record_index"].tolist() == [5, 20, 7, 5, 20, 7, 5, 20]
    assert batch["weight"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def test_images_travel_as_the_dataset_holds_them(source, tiny_dataset):
    batch = next(training_batches(source, 4, seed=0))
    records = Dataset.open(tiny_dataset).source("train")
    assert batch["images"].dtype == np.uint8
    for image, index in zip(batch["images"], batch["record_index"], strict=True):
        np.testing.assert_array_equal(image[0], records[int(index)]["image"])


def test_picture_batch_is_spread_over_the_split(source):
    batch = picture_batch(source, 8, 4)
    assert batch["record_index"].tolist() == [7, 22, 37, 52, 52, 52, 52, 52]
    assert picture_batch(source, 2, 4)["record_index"].tolist() == [7, 22]


def test_windows_select_channels(tmp_path):
    folder = write_example_dataset(
        tmp_path / "two", image_size=16, channels=2, volumes_per_split={"train": 1}
    )
    preparation = {"windows": [{"level": 50.0, "width": 350.0}, {"level": -600.0, "width": 1500.0}]}
    assert slices.select_channels(preparation, ()) == (0, 1)
    assert slices.select_channels(preparation, ((-600, 1500),)) == (1,)
    assert slices.select_channels(preparation, [[-600, 1500], [50, 350]]) == (1, 0)
    with pytest.raises(
        InputError,
        match=r"level/width 100/700, but the dataset holds 50/350, -600/1500; .*--window",
    ):
        slices.select_channels(preparation, ((100, 700),))
    whole = slices.NeighbourSource(Dataset.open(folder), "train", (0, 1), (0,))[3]["images"]
    assert whole.shape == (1, 16, 16, 2)
    for channels in ((1,), (1, 0)):
        chosen = slices.NeighbourSource(Dataset.open(folder), "train", channels, (0,))[3]["images"]
        np.testing.assert_array_equal(chosen, whole[..., list(channels)])


def test_a_split_without_slices_or_neighbours_is_refused(tiny_dataset, tmp_path):
    with pytest.raises(InputError, match=r"no slices with neighbours at offsets \(0, 20\)"):
        slices.open_source(Dataset.open(tiny_dataset), "train", (0,), (0, 20))
    folder = write_example_dataset(tmp_path / "one", image_size=16, volumes_per_split={"train": 1})
    with pytest.raises(InputError, match="has no validation split; prepare it with --splits"):
        slices.open_source(Dataset.open(folder), "validation", (0,), (0,))


def test_a_source_is_named_by_its_content_not_by_its_place(tiny_dataset, source):
    assert str(tiny_dataset) not in repr(source)
    assert repr(source) == repr(slices.open_source(Dataset.open(tiny_dataset), "train", (0,), (0,)))


def test_the_data_of_a_training_are_opened_once(tmp_path):
    folder = write_example_dataset(tmp_path / "d", image_size=16, slice_labels=True, masks=True)
    tables = ("preparation.json", "volumes.csv", "slices.csv", "labels.csv")
    with opened_files(*tables) as paths:
        dataset = Dataset.open(folder)
        dataset.check_tables()
        for split in ("train", "validation"):
            slices.open_source(
                dataset, split, (0,), (0,), slices.Targets(label="pe_present_on_image")
            )
            slices.open_source(
                dataset, split, (0,), (-1, 0, 1), slices.Targets(mask=True, repeat_edges=True)
            )
    # The tables twice: for their checksums and for their rows.
    assert {path.rsplit("/", 1)[-1]: paths.count(path) for path in paths} == {
        "preparation.json": 1,
        "slices.csv": 2,
        "volumes.csv": 2,
    }


def test_slices_of_a_scan_without_a_mask_are_no_background(tmp_path):
    """Its mask is unknown, which slices.csv says by empty cells: a task with masks leaves it
    out."""
    folder = write_example_dataset(tmp_path / "d", image_size=16, masks=True)
    first = Dataset.open(folder).volumes("train")[0]
    lines = (folder / "slices.csv").read_text().splitlines()
    column = lines[0].split(",").index("mask_area_px")
    for number, line in enumerate(lines):
        cells = line.split(",")
        if cells[0] == first["volume_id"]:
            lines[number] = ",".join([*cells[:column], "", *cells[column + 1 :]])
    (folder / "slices.csv").write_text("\n".join(lines) + "\n")
    dataset = Dataset.open(folder)
    with_masks = slices.open_source(dataset, "train", (0,), (0,), slices.Targets(mask=True))
    everything = slices.open_source(dataset, "train", (0,), (0,))
    assert len(everything) - len(with_masks) == first["num_slices"]
    records = {with_masks[i]["record_index"].item() for i in range(len(with_masks))}
    own = range(first["first_record"], first["first_record"] + first["num_slices"])
    assert not records & set(own) and with_masks.positive.shape == (len(with_masks),)


@pytest.mark.parametrize("targets", [{"mask": True}, {"label": "pe_present_on_image"}])
def test_shuffled_targets_are_those_of_other_training_slices_and_of_no_others(tmp_path, targets):
    """Images, and the slices of validation, stay as they are."""
    folder = write_example_dataset(tmp_path / "d", image_size=16, slice_labels=True, masks=True)
    dataset = Dataset.open(folder)

    def read(split, shuffled, seed=0):
        asked = slices.Targets(**targets, shuffled=shuffled)
        source = slices.open_source(dataset, split, (0,), (0,), asked, seed=seed)
        arrays = source.read(np.arange(len(source)))
        target = arrays["mask" if "mask" in targets else "label"].reshape(len(source), -1)
        np.testing.assert_array_equal(target.max(axis=1) > 0, source.positive)
        return arrays["images"], target

    images, own = read("train", False)
    shuffled_images, others = read("train", True)
    np.testing.assert_array_equal(shuffled_images, images)
    assert (others != own).any() and sorted(map(bytes, others)) == sorted(map(bytes, own))
    np.testing.assert_array_equal(read("train", True)[1], others)
    assert (read("train", True, seed=1)[1] != others).any()
    for before, after in zip(read("validation", False), read("validation", True), strict=True):
        np.testing.assert_array_equal(before, after)
