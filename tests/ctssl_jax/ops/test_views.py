"""Views: shapes and ranges, nothing at strength 0, a function of key and item alone, slices of the
slab, crops against a plain computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import lejepa
from ctssl_jax.ops import views
from data_prep.system.errors import InputError

KEYS = jax.random.split(jax.random.key(0), 8)
SLICES = jax.random.uniform(jax.random.key(1), (8, 3, 32, 32, 1))
SMALL = {"num_local": 2, "global_size": 16, "local_size": 8}
OFF = dict.fromkeys(("window_shift", "window_width", "gamma", "noise", "blur"), 0.0)


def settings(**changes):
    return lejepa.get_config("small").views.to_dict() | SMALL | changes


make = jax.jit(lambda keys, slices: views.make_views(keys, slices, settings()))


def test_shapes_range_and_variety():
    made = make(KEYS, SLICES)
    assert made.large.shape == (8, 2, 16, 16, 1) and made.small.shape == (8, 2, 8, 8, 1)
    for part in made:
        assert part.dtype == jnp.float32 and part.min() >= 0 and part.max() <= 1
        assert not np.allclose(part[:, 0], part[:, 1])
    same = make(KEYS, jnp.broadcast_to(SLICES[:1], SLICES.shape))
    assert not any(np.allclose(same.large[0], other) for other in same.large[1:])


def test_an_item_does_not_depend_on_its_batch():
    made, order = make(KEYS, SLICES), jnp.array([3, 1, 0, 2, 7, 6, 5, 4])
    again = make(KEYS[order], SLICES[order])
    for part, other in zip(made, again, strict=True):
        np.testing.assert_allclose(part[order], other, atol=1e-6)


def test_views_in_a_row_see_different_slices_and_all_come_up():
    slices = jnp.broadcast_to(jnp.arange(3).reshape(1, 3, 1, 1, 1) / 2, (64, 3, 8, 8, 1))
    plain = settings(**OFF, num_global=3, global_size=8, local_size=4)
    made = views.make_views(jax.random.split(jax.random.key(2), 64), slices, plain)
    seen = np.rint(2 * np.asarray(made.large).mean((2, 3, 4))).astype(int)
    np.testing.assert_allclose(
        made.large, np.broadcast_to(seen[..., None, None, None] / 2, made.large.shape), atol=1e-6
    )
    assert all(set(row) == {0, 1, 2} for row in seen.tolist())
    assert len({tuple(row) for row in seen.tolist()}) == 3  # where they begin is drawn


def test_a_crop_is_a_linear_map_of_places():
    """Of a ramp a crop is a ramp; its area and its aspect are within their ranges."""
    places = np.stack(np.meshgrid(np.arange(32), np.arange(32), indexing="ij"), axis=-1)
    image = jnp.asarray(places, jnp.float32)
    for key in KEYS:
        out = np.asarray(views.crop_and_resize(key, image, 16, (0.3, 0.6)))
        inside = out[2:-2, 2:-2]  # at the border of the image the antialiased ramp flattens
        np.testing.assert_allclose(np.ptp(inside[..., 0], axis=1), 0, atol=1e-3)
        np.testing.assert_allclose(np.ptp(inside[..., 1], axis=0), 0, atol=1e-3)
        steps = [np.diff(inside[:, 5, 0]), np.diff(inside[5, :, 1])]
        assert all(np.ptp(step) < 0.25 for step in steps)  # the triangle kernel's own ripple
        height, width = (16 * step.mean() for step in steps)
        assert 0.29 < height * width / 32**2 < 0.61 and 0.74 < width / height < 1.34


def test_the_whole_slice_at_its_own_size_is_the_slice():
    # the aspect is drawn: a side that would be longer than the slice is cut to it
    plain = settings(**OFF, global_size=32, global_area=(2.0, 2.0), flip=False)
    made = views.make_views(KEYS[:4], SLICES[:4, :1], plain)
    assert made.large.shape == (4, 2, 32, 32, 1)
    for view in (0, 1):
        np.testing.assert_allclose(made.large[:, view], SLICES[:4, 0], atol=1e-6)


def test_grey_values_and_blur_by_hand():
    image = jnp.linspace(0, 1, 8 * 8).reshape(8, 8, 1)
    unchanged = views.change_grey_values(KEYS[0], image, shift=0, width=0, gamma=0)
    np.testing.assert_allclose(unchanged, image, atol=1e-6)
    changed = np.asarray(views.change_grey_values(KEYS[0], image, shift=0.1, width=0.1, gamma=0))
    shift, width, _ = np.asarray(jax.random.uniform(KEYS[0], (3,), minval=-1, maxval=1))
    expected = np.clip((image - (0.5 + 0.1 * shift)) / (1 + 0.1 * width) + 0.5, 0, 1)
    np.testing.assert_allclose(changed, expected, atol=1e-6)
    np.testing.assert_allclose(views.blur(KEYS[0], jnp.full((8, 8, 1), 0.3), 1.0), 0.3, atol=1e-6)
    point = jnp.zeros((15, 15, 1)).at[7, 7].set(1.0)
    blurred = np.asarray(views.blur(KEYS[1], point, 1.5))[..., 0]
    sigma = float(jax.random.uniform(KEYS[1], maxval=1.5))
    line = np.exp(-0.5 * (np.arange(-3, 4) / sigma) ** 2)
    np.testing.assert_allclose(
        blurred[4:11, 4:11], np.outer(line, line) / line.sum() ** 2, atol=1e-6
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("global_size", 18, r"config.views.global_size=18: must be a multiple of 4 and at most"),
        ("local_size", 64, r"config.views.local_size=64: must be .* config.image_size=32"),
        ("global_area", (0.9, 0.3), r"config.views.global_area=\(0.9, 0.3\): must hold the small"),
        ("local_area", (0.1,), r"config.views.local_area=\(0.1,\): must hold"),
    ],
)
def test_views_that_cannot_be_made_are_refused(field, value, message):
    config = lejepa.get_config("small")
    with config.unlocked(), config.ignore_type():
        config.views.update(SMALL | {field: value})
    with pytest.raises(InputError, match=message):
        views.check(config.views, 32, 4)
