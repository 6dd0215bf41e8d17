"""Augmentations: nothing at strength 0, the same result in any batch, ranges, geometry of masks,
crops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctssl_jax.ops import augmentations
from data_prep.system.errors import InputError

WINNER = dict(
    contrast=0.2,
    shift=0.2,
    scale=0.2,
    rotation_degrees=20.0,
    cutout_holes=2,
    cutout_side=0.4,
    flip=True,
)
KEYS = jax.random.split(jax.random.key(0), 8)
IMAGES = jax.random.uniform(jax.random.key(1), (8, 24, 32, 2))

augment = jax.jit(lambda keys, images: augmentations.augment(keys, images, **WINNER))


def test_strength_zero_changes_nothing():
    off = dict.fromkeys(WINNER, 0) | {"flip": False}
    masks = (IMAGES[..., 0] > 0.5).astype(jnp.uint8)
    np.testing.assert_array_equal(augmentations.augment(KEYS, IMAGES, **off), IMAGES)
    images, moved = augmentations.augment_with_masks(KEYS, IMAGES, masks, **off)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(moved, masks)
    assert moved.dtype == jnp.uint8


def test_range_type_and_variety():
    out = augment(KEYS, IMAGES)
    assert out.shape == IMAGES.shape and out.dtype == jnp.float32
    assert out.min() >= 0 and out.max() <= 1
    same = augment(KEYS, jnp.broadcast_to(IMAGES[:1], IMAGES.shape))
    assert not any(np.allclose(same[0], other) for other in same[1:])


def test_an_example_does_not_depend_on_its_batch():
    out = augment(KEYS, IMAGES)
    np.testing.assert_allclose(augment(KEYS[5:6], IMAGES[5:6]), out[5:6], atol=1e-6)
    order = jnp.array([3, 1, 0, 2, 7, 6, 5, 4])
    np.testing.assert_allclose(augment(KEYS[order], IMAGES[order]), out[order], atol=1e-6)


def test_contrast_keeps_the_mean_and_scales_the_distance_from_it():
    mild = 0.5 + 0.2 * (IMAGES - 0.5)  # far from the ends of the range: nothing is clipped
    out = augmentations.augment(KEYS, mild, contrast=0.2)
    mean = mild.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(out.mean((1, 2), keepdims=True), mean, atol=1e-5)
    factors = np.asarray((out - mean) / (mild - mean))[:, 3, 4]
    np.testing.assert_allclose(factors[:, 0], factors[:, 1], atol=1e-3)  # both channels alike
    assert np.all(np.abs(factors - 1) <= 0.201) and np.ptp(factors) > 0.05


def test_flip_mirrors_columns_of_some():
    out = np.asarray(
        augmentations.augment(
            jax.random.split(jax.random.key(0), 64), jnp.tile(IMAGES, (8, 1, 1, 1)), flip=True
        )
    )
    images = np.tile(np.asarray(IMAGES), (8, 1, 1, 1))
    flipped = np.array([np.array_equal(a, b[:, ::-1]) for a, b in zip(out, images, strict=True)])
    kept = np.array([np.array_equal(a, b) for a, b in zip(out, images, strict=True)])
    assert np.all(flipped ^ kept) and 16 < flipped.sum() < 48


def _centroids(images):
    rows, columns = np.mgrid[: images.shape[1], : images.shape[2]]
    total = images.sum((1, 2))
    return np.stack(
        [(images * rows).sum((1, 2)) / total, (images * columns).sum((1, 2)) / total], axis=1
    )


def test_shift_moves_rigidly_within_its_limit():
    keys = jax.random.split(jax.random.key(2), 32)
    images = jnp.zeros((32, 40, 60, 1)).at[:, 18:22, 28:32].set(1)
    out = np.asarray(augmentations.augment(keys, images, shift=0.2))[..., 0]
    np.testing.assert_allclose(out.sum((1, 2)), 16, atol=1e-3)
    moved = _centroids(out) - np.array([19.5, 29.5])
    assert np.all(np.abs(moved) <= [8.001, 12.001])
    assert np.all(moved.max(axis=0) > [4, 6]) and np.all(moved.min(axis=0) < [-4, -6])


def test_rotation_keeps_the_distance_from_the_centre_and_its_limit():
    keys = jax.random.split(jax.random.key(3), 32)
    images = jnp.zeros((32, 41, 41, 1)).at[:, 19:22, 34:37].set(1)  # 15 pixels right of the centre
    out = np.asarray(augmentations.augment(keys, images, rotation_degrees=20.0))[..., 0]
    offset = _centroids(out) - 20
    np.testing.assert_allclose(np.hypot(*offset.T), 15, atol=0.1)
    angles = np.rad2deg(np.arctan2(offset[:, 0], offset[:, 1]))
    assert np.all(np.abs(angles) <= 20.1) and angles.max() > 10 and angles.min() < -10


def test_scale_enlarges_about_the_centre_within_its_limit():
    keys = jax.random.split(jax.random.key(4), 32)
    images = jnp.zeros((32, 41, 41, 1)).at[:, 10:31, 10:31].set(1)
    out = np.asarray(augmentations.augment(keys, images, scale=0.2))[..., 0]
    np.testing.assert_allclose(_centroids(out), 20, atol=1e-3)
    factors = np.sqrt(out.sum((1, 2))) / 21
    assert (
        np.all(factors >= 0.79)
        and np.all(factors <= 1.21)
        and factors.max() > 1.1
        and factors.min() < 0.9
    )


def test_cutout_sets_rectangles_to_zero():
    keys = jax.random.split(jax.random.key(5), 32)
    images = jnp.ones((32, 50, 50, 1))
    one = (
        np.asarray(augmentations.augment(keys, images, cutout_holes=1, cutout_side=0.4))[..., 0]
        == 0
    )
    for hole in one:
        rows, columns = hole.any(1), hole.any(0)
        np.testing.assert_array_equal(hole, rows[:, None] & columns[None])  # a rectangle
        assert rows.sum() <= 20 and columns.sum() <= 20
    assert one.any(2).sum(1).max() > 12
    two = (
        np.asarray(augmentations.augment(keys, images, cutout_holes=2, cutout_side=0.4))[..., 0]
        == 0
    )
    assert one.mean() < two.mean() <= 2 * 0.4**2


def test_masks_move_with_their_images():
    rows, columns = np.mgrid[:48, :48]
    image = ((rows - 20) ** 2 + (columns - 30) ** 2 < 64).astype(np.float32)
    images = jnp.broadcast_to(jnp.asarray(image)[None, :, :, None], (8, 48, 48, 1))
    strengths = WINNER | {"contrast": 0.0}
    out, masks = jax.jit(lambda k, i, m: augmentations.augment_with_masks(k, i, m, **strengths))(
        KEYS, images, (images[..., 0] * 3).astype(jnp.uint8)
    )
    assert set(np.unique(masks)) == {0, 3}  # no in-between values
    moved, expected = np.asarray(masks) == 3, np.asarray(out[..., 0]) > 0.5
    assert np.all(moved.sum((1, 2)) != image.sum()) or not np.array_equal(moved[0], image > 0)
    overlap = (moved & expected).sum((1, 2)) / np.maximum((moved | expected).sum((1, 2)), 1)
    empty = ~(moved.any((1, 2)) | expected.any((1, 2)))
    assert np.all((overlap > 0.85) | empty) and not np.all(empty)
    alone = jax.jit(lambda k, i: augmentations.augment(k, i, **strengths))(KEYS, images)
    np.testing.assert_allclose(out, alone, atol=2e-5)  # two programs, which may round otherwise


def test_switching_one_off_leaves_the_others():
    shifted = augmentations.augment(KEYS, IMAGES, shift=0.2)
    shifted_and_flipped = np.asarray(augmentations.augment(KEYS, IMAGES, shift=0.2, flip=True))
    for a, b in zip(np.asarray(shifted), shifted_and_flipped, strict=True):
        assert np.array_equal(a, b) or np.array_equal(a[:, ::-1], b)


def test_crop_of_the_whole_image_and_of_no_box_is_the_image():
    boxes = jnp.array([[0, 0, 24, 32]] * 6 + [[5, 5, 5, 9], [-9, -9, 99, 99]], jnp.float32)
    np.testing.assert_allclose(augmentations.crop_to_box(IMAGES, boxes), IMAGES, atol=1e-5)


def test_crop_fills_the_image_with_the_box():
    image = jnp.zeros((1, 16, 16, 1)).at[:, 4:8, 8:16].set(1)
    inside = augmentations.crop_to_box(image, jnp.array([[4.0, 8, 8, 16]]))
    np.testing.assert_allclose(inside, 1, atol=1e-6)  # nothing of what lies outside
    ramp = jnp.broadcast_to(jnp.arange(8.0)[None, :, None, None], (1, 8, 8, 1))
    rows = augmentations.crop_to_box(ramp, jnp.array([[2.0, 0, 6, 8]]))[0, :, 0, 0]
    # Row i of the output is at 2 + (i + 1/2) / 2 - 1/2 of the input, kept within rows 2 to 5.
    np.testing.assert_allclose(rows, [2, 2.25, 2.75, 3.25, 3.75, 4.25, 4.75, 5], atol=1e-6)
    columns = augmentations.crop_to_box(ramp.swapaxes(1, 2), jnp.array([[0.0, 2, 8, 6]]))[
        0, 0, :, 0
    ]
    np.testing.assert_allclose(columns, rows, atol=1e-6)


@pytest.mark.parametrize(
    ("strengths", "message"),
    [
        ({"contrast": -0.1}, "contrast=-0.1"),
        ({"scale": 1.0}, "scale=1.0"),
        ({"rotation_degrees": 200}, "rotation_degrees=200"),
        ({"cutout_holes": 2}, "work together"),
        ({"cutout_holes": 1.5, "cutout_side": 0.1}, "whole number"),
        ({"blur": 1}, "blur is not known"),
    ],
)
def test_impossible_strengths_are_refused(strengths, message):
    with pytest.raises(InputError, match=message):
        augmentations.check(strengths)
    augmentations.check(WINNER)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("rotation_degrees", [0.0, 180.0])
def test_matrix_products_resample_as_gathers_do(rotation_degrees, order):
    """TPUs take the first, other devices the second. 22 rows: not whole blocks of rows."""
    images = IMAGES[:3, :22]
    where = augmentations._source_coordinates(
        KEYS[:3], images.shape[1:3], 0.2, 0.2, rotation_degrees
    )
    moved = augmentations.resample_by_matrix_products(images, *where, order=order)
    np.testing.assert_allclose(
        moved, augmentations.resample_by_gathers(images, *where, order=order), atol=1e-6
    )
    assert np.mean(moved == 0) > 0.05 and np.mean(moved > 0) > 0.5  # some look outside
