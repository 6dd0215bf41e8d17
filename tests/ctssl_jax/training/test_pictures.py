"""What belongs to the pictures of a run: names of classes, the window, and a lung window."""

import json

import numpy as np
import pytest

from ctssl_jax.data.slices import open_source
from ctssl_jax.tasks.slice_label import _middle_slice
from ctssl_jax.tasks.table import get_task
from ctssl_jax.training.pictures import setting
from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import write_preparation
from tests.helpers.example_dataset import write_example_dataset
from tests.helpers.training_runs import tiny_recipe

RECORDS = np.array([3, 4])


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Masks and labels; the second of two channels is half as bright."""
    folder = tmp_path_factory.mktemp("pictures") / "dataset"
    given = {"masks": True, "slice_labels": True, "volume_labels": True}
    return write_example_dataset(folder, image_size=16, channels=2, **given)


def setting_of(folder, recipe, **fields):
    config, dataset = tiny_recipe(folder, recipe, **fields), Dataset.open(folder)
    task = get_task(config.task)
    source = open_source(dataset, "validation", (0,), task.offsets(config), task.targets(config))
    return setting(config, dataset, (0,), source, RECORDS)


def with_windows(folder, *windows, **more):
    preparation = json.loads((folder / "preparation.json").read_text())
    named = [{"level": float(level), "width": float(width)} for level, width in windows]
    write_preparation(folder, preparation | {"windows": named, **more})


def test_classes_have_the_names_of_the_task_or_of_the_label(labelled):
    assert setting_of(labelled, "rotation").class_names[1] == "turned 90°"
    assert len(setting_of(labelled, "flip").class_names) == 3
    smoker = setting_of(labelled, "pe", label="smoker")
    assert smoker.class_names == ("no", "yes") and smoker.legend.classified == "smoker"
    shown = smoker.complete({"input": np.zeros((2, 16, 16, 1))})
    assert shown["class_names"].tolist() == ["no", "yes"]
    assert setting_of(labelled, "denoising").class_names == ()


def test_nodules_are_shown_in_a_lung_window_or_it_is_said_why_not(labelled):
    with_windows(labelled, (50, 350), (-600, 1500))
    lung = setting_of(labelled, "nodules")
    assert lung.legend.window == (-600, 1500) and lung.legend.note == "Window -600/1500 HU."
    records = Dataset.open(labelled).source("validation")
    shown = lung.complete({"input": np.zeros((1, 16, 16, 1))})["input"]
    np.testing.assert_allclose(shown[0, ..., 0], records[3]["image"][..., 1] / 255, atol=1e-6)
    assert setting_of(labelled, "pe", label="smoker").legend.window == (50, 350)

    with_windows(labelled, (50, 350), (40, 400))
    other = setting_of(labelled, "nodules")
    assert other.images is None and other.legend.window == (50, 350)
    assert "this dataset has none (prepare it with --window=-600,1500, too)" in other.legend.note

    with_windows(labelled, (50, 350), (-600, 1500), masks={"source": "masks_dir"})
    assert setting_of(labelled, "nodules").legend.window == (50, 350)  # a mask of who knows what


def test_no_scale_in_hu_where_each_slice_is_stretched(labelled):
    legend = setting_of(labelled, "denoising", normalize="slice_minmax").legend
    assert legend.window is None and "each slice stretched" in legend.note
    assert legend.label == "SYNTHETIC"


def test_of_adjacent_slices_the_one_with_the_label_is_shown():
    assert _middle_slice(np.arange(3).reshape(1, 1, 1, 3), 3).ravel().tolist() == [1]
    assert _middle_slice(np.arange(6).reshape(1, 1, 1, 6), 3).ravel().tolist() == [2, 3]
    assert _middle_slice(np.arange(2).reshape(1, 1, 1, 2), 1).ravel().tolist() == [0, 1]
