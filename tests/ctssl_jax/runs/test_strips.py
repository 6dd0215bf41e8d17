"""Strips of pictures: the meaning of a colour, the layout, and what is kept as arrays."""

import numpy as np
import pytest
from PIL import Image

from ctssl_jax.runs import strips

SIDE, HEADER = 192, 20
BLUE, RED, GREY = [70, 150, 255], [255, 60, 40], [150, 150, 150]


def constant(value, size=32):
    return np.full((2, size, size, 1), value, np.float32)


def has(sheet, colour):
    return (sheet == np.uint8(colour)).all(axis=-1)


def classified(probabilities, label=1, **images):
    values = np.array([probabilities, probabilities], np.float32)
    names = np.array([f"class {k}" for k in range(len(probabilities))])
    labels = np.array([label, label], np.int32)
    return {
        "input": constant(0.5),
        **images,
        "label": labels,
        "probabilities": values,
        "class_names": names,
    }


def test_difference_is_grey_where_equal_red_where_too_bright_blue_where_too_dark():
    image = np.array([[[0.5], [0.75], [0.25], [1.0], [0.0]]])
    colours = strips.difference(image, np.full_like(image, 0.5))[0]
    np.testing.assert_array_equal(
        colours, [[128] * 3, [191, 64, 64], [64, 64, 191], [255, 0, 0], [0, 0, 255]]
    )


def test_grey_shows_the_first_channel_and_clips():
    image = np.stack([np.array([[-1.0, 0.0, 0.5, 2.0]]), np.ones((1, 4))], axis=-1)
    np.testing.assert_array_equal(strips.grey(image)[0, :, 0], [0, 0, 128, 255])


def test_strip_has_a_row_a_slice_four_columns_and_a_scale(tmp_path):
    shown = {"input": constant(0), "target": constant(1.0), "prediction": constant(0.75)}
    legend = strips.Legend("SYNTHETIC", (50.0, 350.0), "Window 50/350 HU.")
    strips.save_strip(tmp_path / "made" / "strip.png", shown, legend)
    sheet = np.asarray(Image.open(tmp_path / "made" / "strip.png"))
    assert sheet.shape[1] == 4 * SIDE + 3 * 2
    for row in (0, 1):
        y = 2 * HEADER + row * (SIDE + 2) + SIDE // 2
        cells = [sheet[y, column * (SIDE + 2) + SIDE // 2].tolist() for column in range(4)]
        assert cells == [[0] * 3, [255] * 3, [191] * 3, [64, 64, 191]]
    scale = sheet[2 * HEADER + 2 * (SIDE + 2) + 4, 3 * (SIDE + 2) :]
    assert scale[0].tolist() == [0, 0, 255] and scale[-1].tolist() == [255, 0, 0]
    assert scale[SIDE // 2, 0] == pytest.approx(128, abs=1)
    unlabelled = np.asarray(strips.strip(shown))
    assert unlabelled.shape[0] == sheet.shape[0] - HEADER  # no line for a label that is not there
    in_shares = np.asarray(strips.strip(shown, legend._replace(window=None)))
    assert (in_shares != sheet).any()  # HU where the window is known


def test_outlines_leave_what_the_mask_holds_visible():
    image, mask = np.full((8, 8, 3), 9, np.uint8), np.zeros((8, 8), bool)
    mask[3:5, 3:5] = True
    drawn = strips.outlined(image, mask, (255, 0, 0))
    assert (drawn[mask] == 9).all() and has(drawn, [255, 0, 0]).sum() == 8
    assert not has(strips.outlined(image, ~mask & False, (255, 0, 0)), [255, 0, 0]).any()


def test_a_segmentation_outlines_truth_and_prediction_apart():
    truth, found = constant(0), constant(0)
    truth[:, 4:8, 4:8] = 1
    found[:, 20:24, 20:24] = 1
    shown = {
        **dict.fromkeys(("input", "target", "prediction"), constant(0.5)),
        "target_mask": truth,
        "prediction_mask": found,
    }
    sheet = np.asarray(strips.strip(shown))
    columns = [sheet[:, k * (SIDE + 2) : k * (SIDE + 2) + SIDE] for k in range(4)]
    assert [has(column, BLUE).any() for column in columns] == [False, True, False, False]
    assert [has(column, RED).any() for column in columns] == [False, False, True, False]
    assert has(columns[3], [255, 0, 0]).sum() == has(columns[3], [0, 0, 255]).sum() == 2 * 24**2


def test_a_label_has_the_truth_and_the_probabilities_and_no_difference():
    sheet = np.asarray(strips.strip(classified([0.125, 0.75, 0.125])))
    assert sheet.shape[1] == SIDE + 2 + SIDE * 3 // 2
    bars = sheet[:, SIDE + 2 :]
    assert has(bars, BLUE).any() and has(bars, GREY).any() and not has(bars, RED).any()
    assert has(bars, BLUE).sum() == pytest.approx(6 * has(bars, GREY).sum() / 2, rel=0.03)
    wrong = np.asarray(strips.strip(classified([0.75, 0.25])))
    assert has(wrong, RED).sum() == pytest.approx(3 * has(wrong, BLUE).sum(), rel=0.03)


def test_a_transformation_also_shows_the_slice_as_it_was_and_as_predicted():
    images = {"target": constant(0.25), "prediction": constant(0.75)}
    sheet = np.asarray(strips.strip(classified([0.5, 0.5], **images)))
    y = HEADER + SIDE // 2
    assert [sheet[y, k * (SIDE + 2) + 90, 0] for k in range(3)] == [128, 64, 191]


def test_of_many_classes_the_truth_and_the_most_probable_are_shown():
    probabilities = np.linspace(0.01, 0.06, 30)
    bars = np.asarray(strips.strip(classified(probabilities, label=0)))[:, SIDE + 2 :]
    assert has(bars, BLUE).any() and has(bars, RED).any()
    column = has(bars[HEADER : HEADER + SIDE], GREY)[:, 8]
    starts = np.count_nonzero(column[1:] & ~column[:-1])
    assert starts == 6  # of 30 classes eight are drawn, with the truth and the chosen one


def test_arrays_come_back(tmp_path):
    shown = classified([0.25, 0.75], target=constant(1.0))
    strips.save_arrays(tmp_path / "a.npz", shown)
    back = strips.load_arrays(tmp_path / "a.npz")
    assert back.keys() == shown.keys() and back["class_names"].tolist() == ["class 0", "class 1"]
    np.testing.assert_allclose(back["input"], shown["input"], atol=1 / 255)
    np.testing.assert_array_equal(back["probabilities"], shown["probabilities"])
