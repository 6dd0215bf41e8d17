"""Pictures of what a model sees: those of the training itself, for every kind of task."""

import functools

import jax
import numpy as np
import pytest
from PIL import Image

from ctssl_jax.ops import corruptions
from ctssl_jax.runs import strips
from ctssl_jax.training import seen, setup
from ctssl_jax.training.state import define
from data_prep.system.errors import InputError
from tests.helpers.training_runs import tiny_recipe


def pictures_of(dataset, task, step=0, **fields):
    job = setup.check(tiny_recipe(dataset, task, **fields), None)
    definition = define(job.config, job.task, len(job.channels), job.mesh)
    batch = seen.picture_batch(job.train_source, 4, 4)
    shown, labels = jax.jit(functools.partial(seen._seen, definition))(batch, step)
    return definition, batch, jax.device_get(shown), labels


def test_a_mask_is_where_the_training_puts_it(tiny_dataset):
    definition, batch, shown, labels = pictures_of(tiny_dataset, "masked_region", step=3)
    stored = batch["images"][:, 0].astype(np.float32) / 255
    keys = corruptions.example_keys(definition.train_key, batch["record_index"], 3)
    mask = definition.config.mask
    masked, _ = corruptions.mask_region(
        keys, stored, fraction=mask.fraction, unit=mask.unit, margin=mask.margin, fill=mask.fill
    )
    assert set(shown) == {"input", "target", "stored slice"} and labels is None
    np.testing.assert_allclose(shown["input"], masked, atol=1e-6)
    np.testing.assert_allclose(shown["stored slice"], stored, atol=1e-6)


def test_labels_are_those_of_the_training(tiny_dataset):
    definition, batch, shown, labels = pictures_of(tiny_dataset, "rotation")
    keys = corruptions.example_keys(definition.train_key, batch["record_index"], 0)
    np.testing.assert_array_equal(labels, corruptions.random_labels(keys, 4))
    np.testing.assert_allclose(shown["input"], corruptions.rotate(shown["stored slice"], labels))


def test_a_mix_shows_what_each_of_its_objectives_sees(tiny_dataset):
    shown = pictures_of(tiny_dataset, "mixed")[2]
    assert "lejepa: global view 1" in shown and "lejepa: input" not in shown
    alone = pictures_of(tiny_dataset, "masked_region")[2]
    assert set(alone) == {title for title in shown if ":" not in title}
    np.testing.assert_array_equal(shown["stored slice"], alone["stored slice"])


def test_a_mix_shows_the_slice_that_is_predicted(tiny_dataset):
    pairs = (("masked_region", 1.0), ("next_slice", 1.0))
    shown = pictures_of(tiny_dataset, "mixed", objectives=pairs)[2]
    assert {"next_slice: input", "next_slice: target"} <= set(shown)
    assert not np.array_equal(shown["next_slice: target"], shown["next_slice: input"])


def test_slices_of_one_patient_are_not_told_apart(tiny_dataset):
    pairs = (("flip", 1.0), ("simclr", 1.0))
    mixed = tiny_recipe(tiny_dataset, "mixed", train_fraction=0.01, objectives=pairs)
    with pytest.raises(InputError, match=r"simclr does not .*leave it out of config\.objectives$"):
        setup.check(mixed, None)
    config = tiny_recipe(tiny_dataset, "simclr", train_fraction=0.01)
    with pytest.raises(InputError, match=r"are of one patient, whose slices simclr does not"):
        setup.check(config, None)
    config.train_fraction = 1.0
    assert not setup.check(config, None)._views_lines()
    config.views.slab_mm = 0.5
    (line,) = setup.check(config, None)._views_lines()
    assert "of one slice each in 5 of 5 volumes" in line and "slab_mm=0.5 takes" in line
    spacing = max(v["slice_spacing_mm"] for v in setup.check(config, None).train_source.volumes)
    config.views.slices, config.views.slab_mm = 5, 3 * spacing  # the outer ones are reached
    assert not setup.check(config, None)._views_lines()


@pytest.mark.parametrize("task", ["lejepa", "rotation"])
def test_a_page_has_a_row_a_draw(tiny_dataset, tmp_path, task, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        seen.strips, "strip", lambda *of: drawn.append(of) or strips.Image.new("L", (9, 9))
    )
    config = tiny_recipe(tiny_dataset, task)
    path = seen.page(config, tmp_path / "new", num_slices=2, num_draws=3)
    assert path == tmp_path / "new" / "views.png" and Image.open(path).size == (9, 9)
    ((pictures, legend),) = drawn
    assert len(legend.rows) == 6 and all(len(images) == 6 for images in pictures.values())
    assert legend.rows[4].startswith("slice 2, step 2")
    assert config.recipe in legend.note
    if task == "lejepa":
        assert {"input", "global view 1", "global view 2"} <= set(pictures)
        assert not np.array_equal(pictures["global view 1"][0], pictures["global view 1"][1])
        np.testing.assert_array_equal(pictures["input"][0], pictures["input"][1])
    else:
        assert "turned" in legend.rows[0]


def test_rows_are_written_on_the_first_picture():
    image = np.zeros((2, 32, 32, 1), np.float32)
    plain, named = (
        np.asarray(strips.strip({"input": image, "view": image}, strips.Legend(rows=rows)))
        for rows in ((), ("slice 1", "slice 2"))
    )
    differ = np.argwhere((plain != named).any(axis=-1))
    assert len(differ) and differ[:, 1].max() < plain.shape[1] / 2
