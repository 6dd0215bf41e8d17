import numpy as np
import pytest

from data_prep.scan.window import (
    _grey_float32,
    needs_resize,
    resize_box,
    resize_mask,
    resize_slice,
    resized_spacing_mm,
    window_to_uint8,
)


def test_window_values_and_both_ways_agree():
    hu = np.arange(-32768, 32768).astype(np.int16).reshape(256, 256)
    windows = [(50, 350), (-600, 1500), (40.5, 80.25)]
    grey = window_to_uint8(hu, windows)
    assert grey.shape == (256, 256, 3) and grey.dtype == np.uint8
    for channel, (level, width) in enumerate(windows):
        expected = np.rint(255 * np.clip((hu.astype(float) - (level - width / 2)) / width, 0, 1))
        np.testing.assert_array_equal(grey[..., channel], expected)
    np.testing.assert_array_equal(window_to_uint8(hu.astype(np.float32), windows), grey)
    # not contiguous
    np.testing.assert_array_equal(window_to_uint8(hu[:, ::-1], windows), grey[:, ::-1])
    assert window_to_uint8(np.array([-125, 50, 225], np.int16), [(50, 350)])[:, 0].tolist() == [
        0,
        128,
        255,
    ]


def test_where_float32_would_round_otherwise_the_table_decides():
    hu = np.arange(-32768, 32768).astype(np.int16)
    # half a grey value off zero every 235 HU: some fall on the other side in float32
    level, width = 0.0, 60000.0
    exact = np.rint(255 * np.clip((hu.astype(float) - (level - width / 2)) / width, 0, 1))
    assert not np.array_equal(_grey_float32(hu, level, width), exact)
    np.testing.assert_array_equal(window_to_uint8(hu, [(level, width)])[:, 0], exact)


@pytest.mark.parametrize("windows", [[], [(50, 0)], [(50, -1)], [(float("nan"), 10)]])
def test_impossible_windows(windows):
    with pytest.raises(ValueError, match="window"):
        window_to_uint8(np.zeros(3, np.int16), windows)


def test_what_fits_is_untouched():
    hu = np.arange(16, dtype=np.int16).reshape(4, 4)
    assert resize_slice(hu, (0.7, 0.7), 4) is hu
    assert not needs_resize((4, 4), (0.7, 0.7), 4)
    assert needs_resize((4, 4), (0.7, 0.8), 4) and needs_resize((4, 4), (0.7, 0.7), 8)


def test_shrinking_by_two_is_the_antialiased_triangle():
    hu = np.random.default_rng(0).normal(0, 300, (32, 32)).astype(np.int16)
    resized = resize_slice(hu, (1, 1), 16)
    weights = np.zeros((16, 32))
    for i in range(16):  # triangle of half-width 2 source pixels around the target pixel's centre
        distance = np.abs(np.arange(32) + 0.5 - 2 * (i + 0.5))
        weights[i] = np.maximum(0, 1 - distance / 2)
    weights /= weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(resized, weights @ hu @ weights.T, atol=0.01)
    assert resized.dtype == np.float32


def test_resizing_is_the_same_every_time():
    hu = np.random.default_rng(0).normal(0, 300, (50, 40)).astype(np.int16)
    first, second = (resize_slice(hu, (0.8, 0.7), 64) for _ in range(2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((60, 40), (1, 1)), ((40, 60), (1, 1)), ((60, 60), (1, 0.5)), ((64, 50), (0.9, 1.3))],
)
def test_a_disc_stays_a_disc_in_the_middle(shape, spacing):
    y, x = ((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True))
    radius = 12.0
    hu = np.where(y[:, None] ** 2 + x**2 < radius**2, 0, -1000).astype(np.int16)
    resized = resize_slice(hu, spacing, 128)
    edge = resized_spacing_mm(shape, spacing, 128)
    inside = resized > -500
    rows, columns = np.nonzero(inside)
    assert resized.shape == (128, 128)
    assert inside.sum() * edge**2 == pytest.approx(np.pi * radius**2, rel=0.06)
    assert np.ptp(rows) * edge == pytest.approx(2 * radius, abs=1.5)
    assert np.ptp(columns) * edge == pytest.approx(2 * radius, abs=1.5)
    assert rows.mean() == pytest.approx(63.5, abs=0.6) and columns.mean() == pytest.approx(
        63.5, abs=0.6
    )
    assert resized[0, 0] == pytest.approx(-1000)
    assert edge * 128 == pytest.approx(max(shape[0] * spacing[0], shape[1] * spacing[1]))

    box = resize_box((*_extent(hu > -500, 1), *_extent(hu > -500, 0)), shape, spacing, 128)
    assert (
        box[0] <= rows.min()
        and rows.max() < box[1]
        and box[2] <= columns.min()
        and columns.max() < box[3]
    )
    assert (box[1] - box[0]) * edge < 2 * radius + 4


def _extent(mask, axis):
    used = np.flatnonzero(mask.any(axis=axis))
    return used[0], used[-1] + 1


def test_a_mask_of_the_image_size_stays_as_it_is():
    mask = np.random.default_rng(0).integers(0, 4, (8, 8), np.uint8)
    np.testing.assert_array_equal(resize_mask(mask, (0.7, 0.7), 8), mask)


def test_a_shrunk_mask_takes_the_region_that_covers_most_and_at_least_half():
    mask = np.zeros((8, 8), np.uint8)
    mask[:4, :4] = 1
    mask[:4, 4:] = 2
    mask[4:, :4] = 3
    resized = resize_mask(mask, (1.0, 1.0), 4)
    assert (resized[0, 0], resized[0, 3], resized[3, 0], resized[3, 3]) == (1, 2, 3, 0)
    assert set(np.unique(resized)) <= {0, 1, 2, 3} and resized.dtype == np.uint8
    # mirror
    np.testing.assert_array_equal(
        resize_mask(mask[:, ::-1], (1.0, 1.0), 4) > 0, resized[:, ::-1] > 0
    )
    lone = np.zeros((8, 8), np.uint8)
    lone[3, 3] = 1  # covers a quarter of a pixel at most
    assert not resize_mask(lone, (1.0, 1.0), 4).any()


def test_a_mask_goes_where_the_image_goes():
    """A field that is not square, pixels that are not square: the bright block stays under its
    mask."""
    hu, mask = np.full((40, 60), -1000, np.int16), np.zeros((40, 60), np.uint8)
    hu[8:28, 30:50], mask[8:28, 30:50] = 1000, 7
    image = resize_slice(hu, (0.9, 0.7), 32)
    resized = resize_mask(mask, (0.9, 0.7), 32)
    np.testing.assert_array_equal(resized == 7, image >= 0)
    assert 100 < (resized == 7).sum() < 32 * 32 / 2
