"""The most like slices of other patients: which they are, and the picture."""

import numpy as np
import pytest
from PIL import Image

from ctssl_jax.probes.neighbours import _in_words, nearest, neighbours, spread_queries
from data_prep.system.errors import InputError
from tests.helpers.training_runs import save_untrained, tiny_recipe


def test_the_most_like_slice_of_another_patient_comes_first():
    angle = 2 * np.pi * np.arange(8) / 8
    path = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    features = np.concatenate([path, 3 * path])  # cosine: lengths do not matter
    patient = np.repeat(["a", "b"], 8)
    found = nearest(features, patient, np.array([0, 3, 15]))
    assert found.shape == (3, 5)
    np.testing.assert_array_equal(found[:, 0], [8, 11, 7])
    assert (patient[found] != patient[[0, 3, 15]][:, None]).all()
    assert nearest(features[:10], patient[:10], np.array([0])).shape == (1, 2)  # b has two


def test_queries_are_of_all_volumes_and_places():
    volume = np.repeat(np.arange(4), 24)
    place = np.tile(np.arange(24) / 23, 4)
    queries = spread_queries(volume, place, 4)  # equal steps would all be in the middle
    assert volume[queries].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(place[queries], [0.125, 0.375, 0.625, 0.875], atol=0.025)
    few = spread_queries(volume[:24], place[:24], 6)
    assert len(set(few.tolist())) == 6 and np.all(np.diff(place[few]) > 0.1)


def test_a_picture_of_the_pixels(tiny_dataset, tmp_path):
    save_untrained(tiny_recipe(tiny_dataset, "rotation"), tmp_path / "run")
    output = tmp_path / "new" / "n.png"
    found = neighbours(tmp_path / "run", None, output, encoder="pixels", num_slices=4)
    assert len(found["places"]) == 4 and np.shape(found["found"]) == (4, 5)
    assert all(0 <= place <= 1 for row in found["found"] for place in row)
    assert Image.open(output).size[1] > 4 * 190
    assert _in_words(0.123) == "0.12" and _in_words(float("nan")) == "-"  # of a lone slice
    with pytest.raises(InputError, match=r"n\.jpg must end in \.png"):
        neighbours(tmp_path / "run", None, tmp_path / "n.jpg", encoder="pixels")
