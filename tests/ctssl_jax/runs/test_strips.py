"""Strips of pictures: the meaning of a colour, and the layout."""

import numpy as np
from PIL import Image

from ctssl_jax.runs import strips


def constant(value, size=32):
    return np.full((2, size, size, 1), value, np.float32)


def test_difference_is_grey_where_equal_red_where_too_bright_blue_where_too_dark():
    image = np.array([[[0.5], [0.75], [0.25], [1.0], [0.0]]])
    colours = strips.difference(image, np.full_like(image, 0.5))[0]
    np.testing.assert_array_equal(
        colours, [[128] * 3, [191, 64, 64], [64, 64, 191], [255, 0, 0], [0, 0, 255]]
    )


def test_grey_shows_the_first_channel_and_clips():
    image = np.stack([np.array([[-1.0, 0.0, 0.5, 2.0]]), np.ones((1, 4))], axis=-1)
    np.testing.assert_array_equal(strips.grey(image)[0, :, 0], [0, 0, 128, 255])


def test_strip_has_a_row_a_slice_and_four_columns(tmp_path):
    shown = {"input": constant(0), "target": constant(1.0), "prediction": constant(0.75)}
    strips.save_strip(tmp_path / "made" / "strip.png", shown, "SYNTHETIC")
    sheet = np.asarray(Image.open(tmp_path / "made" / "strip.png"))
    side = 192
    assert sheet.shape == (16 + 2 * side + 2, 4 * side + 3 * 2, 3)
    for row in (0, 1):
        y = 16 + row * (side + 2) + side // 2
        cells = [sheet[y, column * (side + 2) + side // 2].tolist() for column in range(4)]
        assert cells == [[0] * 3, [255] * 3, [191] * 3, [64, 64, 191]]
    unlabelled = np.asarray(strips.strip(shown))
    assert (unlabelled[:16] != sheet[:16]).any() and (unlabelled[16:] == sheet[16:]).all()
