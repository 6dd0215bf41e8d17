"""Corruptions: pure functions of (key, record), the right share of pixels, the right place, exact
transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctssl_jax.ops import corruptions

example_keys = jax.jit(corruptions.example_keys)
mask_region = jax.jit(
    corruptions.mask_region, static_argnames=("fraction", "unit", "margin", "fill")
)


def keys_of(count: int, step: int | None = None, start: int = 0) -> jax.Array:
    return example_keys(jax.random.key(0), jnp.arange(start, start + count), step)


def first_masked(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First masked row and column of each mask [B, H, W]."""
    return mask.any(2).argmax(1), mask.any(1).argmax(1)


def test_keys_depend_on_run_step_and_record_only():
    keys = jax.random.key_data(keys_of(6, step=3))
    assert len(np.unique(keys, axis=0)) == 6
    np.testing.assert_array_equal(jax.random.key_data(keys_of(3, step=3, start=2)), keys[2:5])
    assert not np.array_equal(jax.random.key_data(keys_of(6, step=4)), keys)
    assert not np.array_equal(jax.random.key_data(keys_of(6)), keys)
    expected = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 3), 5)
    np.testing.assert_array_equal(keys[5], jax.random.key_data(expected))


def test_an_example_is_corrupted_the_same_way_in_any_batch():
    images = jax.random.uniform(jax.random.key(1), (8, 40, 40, 1))
    whole, mask = mask_region(keys_of(8, step=1), images, fraction=0.1)
    again, _ = mask_region(keys_of(8, step=1), images, fraction=0.1)
    np.testing.assert_array_equal(again, whole)
    order = np.array([5, 2, 7])
    keys = corruptions.example_keys(jax.random.key(0), jnp.asarray(order), 1)
    part, part_mask = corruptions.mask_region(keys, images[order], fraction=0.1)
    np.testing.assert_array_equal(part, whole[order])
    np.testing.assert_array_equal(part_mask, mask[order])


@pytest.mark.parametrize("fraction", [0.05, 0.10, 0.20, 0.33])
@pytest.mark.parametrize("size", [50, 512])
def test_masked_area_is_the_fraction_asked_for(fraction, size):
    images = jnp.ones((2, size, size, 1))
    inputs, mask = mask_region(keys_of(2), images, fraction=fraction)
    side = corruptions.mask_side(size, size, fraction=fraction)
    areas = np.asarray(mask).sum((1, 2, 3))
    np.testing.assert_array_equal(areas, side**2)
    assert np.all(np.abs(areas - fraction * size**2) <= side + 0.5)
    np.testing.assert_array_equal(inputs, images * (1 - mask))


def test_side_unit_gives_the_sides_of_the_authors_release():
    sides = [
        corruptions.mask_side(512, 512, fraction=f, unit="side") for f in (0.05, 0.10, 0.20, 0.33)
    ]
    assert sides == [25, 51, 102, 168]
    assert corruptions.mask_side(100, 100, fraction=0.29, unit="side") == 29


def test_mask_is_one_square_anywhere_it_fits():
    _, mask = mask_region(keys_of(2000), jnp.zeros((2000, 12, 16, 1)), fraction=0.5)
    mask = np.asarray(mask)[..., 0].astype(bool)
    side = corruptions.mask_side(12, 16, fraction=0.5)
    assert np.all(mask.any(2).sum(1) == side) and np.all(mask.any(1).sum(1) == side)
    rows, columns = first_masked(mask)
    assert set(rows) == set(range(12 - side + 1)) and set(columns) == set(range(16 - side + 1))
    counts = np.bincount(columns)
    assert counts.min() > 0.7 * counts.mean()


def test_margin_keeps_the_last_rows_and_columns_uncovered():
    _, mask = mask_region(keys_of(500), jnp.zeros((500, 16, 16, 1)), fraction=0.1, margin=6)
    mask = np.asarray(mask)[..., 0].astype(bool)
    assert not mask[:, 10:].any() and not mask[:, :, 10:].any()
    assert mask[:, 9].any() and mask[:, :, 9].any() and mask[:, 0].any() and mask[:, :, 0].any()


def test_fill_and_channels():
    images = jax.random.uniform(jax.random.key(1), (3, 16, 16, 3))
    inputs, mask = mask_region(keys_of(3), images, fraction=0.25, fill=0.5)
    assert mask.shape == (3, 16, 16, 1) and mask.dtype == jnp.float32
    np.testing.assert_array_equal(inputs, np.where(mask, 0.5, images))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 0.0}, "between 0 and 1"),
        ({"fraction": 1.0}, "between 0 and 1"),
        ({"fraction": 0.1, "unit": "volume"}, "volume"),
        ({"fraction": 0.01, "unit": "side"}, "less than a pixel"),
        ({"fraction": 0.5, "margin": 10}, "does not fit"),
        ({"fraction": 0.5, "margin": -1}, "margin"),
    ],
)
def test_impossible_masks_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        corruptions.mask_region(keys_of(1), jnp.zeros((1, 16, 16, 1)), **settings)


def test_salt_and_pepper_turns_a_quarter_white_and_a_quarter_black():
    images = jnp.full((6, 100, 100, 3), 0.25)
    noisy = np.asarray(corruptions.salt_and_pepper(keys_of(6), images))
    # one fate for all channels
    np.testing.assert_array_equal(noisy, np.broadcast_to(noisy[..., :1], noisy.shape))
    assert set(np.unique(noisy)) == {0, 0.25, 1}
    for value, share in ((1, 0.25), (0, 0.25), (0.25, 0.5)):
        assert np.mean(noisy[..., 0] == value) == pytest.approx(
            share, abs=4 * np.sqrt(share * (1 - share) / 60_000)
        )
    few = np.asarray(corruptions.salt_and_pepper(keys_of(6), images, fraction=0.1))
    assert np.mean(few != 0.25) == pytest.approx(0.1, abs=0.01)
    changed = (noisy != 0.25)[..., 0]
    neighbours = np.mean(changed[:, :, 1:] & changed[:, :, :-1])
    assert neighbours == pytest.approx(0.25, abs=0.01)  # independent of the pixel beside it
    # and of the same pixel elsewhere
    assert np.mean(changed[0] & changed[1]) == pytest.approx(0.25, abs=0.02)


def test_noise_and_labels_depend_on_the_key_only():
    images, order = jax.random.uniform(jax.random.key(1), (8, 12, 12, 1)), np.array([5, 2, 7])
    whole, labels = (
        corruptions.salt_and_pepper(keys_of(8), images),
        corruptions.random_labels(keys_of(8), 4),
    )
    keys = corruptions.example_keys(jax.random.key(0), jnp.asarray(order))
    np.testing.assert_array_equal(corruptions.salt_and_pepper(keys, images[order]), whole[order])
    np.testing.assert_array_equal(corruptions.random_labels(keys, 4), labels[order])


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_impossible_noise_is_refused(fraction):
    with pytest.raises(ValueError, match="noise fraction must lie above 0 and be at most 1"):
        corruptions.salt_and_pepper(keys_of(1), jnp.zeros((1, 8, 8, 1)), fraction=fraction)


@pytest.mark.parametrize("num_classes", [3, 4])
def test_labels_are_balanced(num_classes):
    labels = np.asarray(corruptions.random_labels(keys_of(6000), num_classes))
    counts = np.bincount(labels, minlength=num_classes)
    share = 1 / num_classes
    assert len(counts) == num_classes and labels.dtype == np.int32
    assert np.all(np.abs(counts / 6000 - share) < 4 * np.sqrt(share * (1 - share) / 6000))


def test_rotation_is_counterclockwise_and_exact():
    letters = jnp.asarray([[1, 2], [3, 4]], jnp.float32)[None, :, :, None]
    expected = ([[1, 2], [3, 4]], [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]])
    for turns, rotated in enumerate(expected):
        np.testing.assert_array_equal(
            corruptions.rotate(letters, jnp.array([turns]))[0, ..., 0], rotated
        )
    images, turns = jax.random.uniform(jax.random.key(1), (8, 5, 5, 2)), jnp.arange(8)
    rotated = corruptions.rotate(images, turns)
    for index in range(8):
        np.testing.assert_array_equal(rotated[index], np.rot90(images[index], index))
    np.testing.assert_array_equal(corruptions.rotate(rotated, -turns), images)
    with pytest.raises(ValueError, match="only square images"):
        corruptions.rotate(jnp.zeros((1, 4, 6, 1)), jnp.array([1]))


def test_flips_are_exact_and_undo_themselves():
    images, direction = jax.random.uniform(jax.random.key(1), (3, 4, 6, 2)), jnp.arange(3)
    flipped = corruptions.flip(images, direction)
    np.testing.assert_array_equal(flipped[0], images[0])
    np.testing.assert_array_equal(flipped[1], np.fliplr(images[1]))
    np.testing.assert_array_equal(flipped[2], np.flipud(images[2]))
    np.testing.assert_array_equal(corruptions.flip(flipped, direction), images)


@pytest.mark.parametrize(("fraction", "side"), [(0.6, 4), (0.25, 8), (0.01, 4), (0.99, 8)])
def test_blocks_are_squares_of_a_grid_in_the_same_number(fraction, side):
    keys = jax.random.split(jax.random.key(0), 16)
    images = jax.random.uniform(jax.random.key(1), (16, 16, 24, 2), minval=0.1)
    covered, mask = corruptions.mask_blocks(keys, images, fraction=fraction, side=side)
    assert mask.shape == (16, 16, 24, 1)
    blocks = np.asarray(mask)[..., 0].reshape(16, 16 // side, side, 24 // side, side)
    assert np.all(np.ptp(blocks, axis=(2, 4)) == 0)  # whole blocks
    number = corruptions.num_blocks(16, 24, fraction=fraction, side=side)
    assert 1 <= number < blocks[0, :, 0, :, 0].size
    assert np.all(blocks[:, :, 0, :, 0].sum((1, 2)) == number)
    np.testing.assert_array_equal(covered, np.where(mask > 0, 0, images))
    assert len({tuple(one.ravel()) for one in blocks[:, :, 0, :, 0]}) > 3  # drawn anew


@pytest.mark.parametrize(
    ("fraction", "side", "message"),
    [(0.0, 4, "must lie between 0 and 1"), (0.5, 5, "do not tile"), (0.5, 16, "do not tile")],
)
def test_blocks_that_do_not_fit_are_refused(fraction, side, message):
    with pytest.raises(ValueError, match=message):
        corruptions.num_blocks(16, 16, fraction=fraction, side=side)
