"""Views of slices for joint-embedding objectives: pure functions of (keys, batch) on the device.

A view is a part of one slice of an item, resized, with changed grey values. Nothing fetches single
pixels: a part is resized by two matrix products, a slice is chosen by a sum, and a blur is a sum of
shifted images. So a view costs little on TPUs, too, and is the same on any number of devices.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from data_prep.system.errors import InputError

LARGEST_ASPECT = 4 / 3  # of width and height of a part, and its inverse
_SLICE, _PART, _FLIP, _GREY, _BLUR, _NOISE = range(6)  # parts of a view's key
_BLUR_RADIUS = 3  # pixels; the largest sigma is 1.5


class Views(NamedTuple):
    """The views of B items.

    large: [B, num_global, global_size, global_size, C] float32 in [0, 1].
    small: [B, num_local, local_size, local_size, C]; num_local may be 0.
    """

    large: jax.Array
    small: jax.Array


def check(settings: ml_collections.ConfigDict, image_size: int, stride: int) -> None:
    """Refuse views that cannot be made.

    Args:
      settings: `config.views`.
      image_size: side of the slices in pixels.
      stride: the encoder's; it must divide the sides of the views.

    Raises:
      InputError: names the field.
    """
    kinds = ("global", "local") if settings.num_local else ("global",)
    for name in (f"{kind}_size" for kind in kinds):
        size = settings[name]
        if size % stride or size > image_size:
            raise InputError(
                f"config.views.{name}={size}: must be a multiple of {stride} and at most "
                f"config.image_size={image_size}"
            )
    for name in (f"{kind}_area" for kind in kinds):
        area = tuple(settings[name])
        if len(area) != 2 or area[0] > area[1]:
            raise InputError(
                f"config.views.{name}={area}: must hold the smallest and the largest share, e.g. "
                f"--config.views.{name}='(0.3, 1.0)'"
            )


def slice_offsets(number: int) -> tuple[int, ...]:
    """Offsets of the slices of an item in steps of `slice_step_mm`: (0,), (-1, 0), (-1, 0, 1)."""
    return tuple(range(-(number // 2), number - number // 2))


def slice_step_mm(number: int, slab_mm: float) -> float:
    """Distance of two neighbours among `number` slices that lie within a slab of this thickness."""
    return slab_mm / max(1, number - 1)


def make_views(
    keys: jax.Array, images: jax.Array, settings: ml_collections.ConfigDict | dict[str, Any]
) -> Views:
    """The views of each item, with draws of their own.

    Args:
      keys: [B] one key an example, from `corruptions.example_keys`.
      images: [B, K, H, W, C] float32 in [0, 1], the slices of each item.
      settings: `config.views`, see `ctssl_jax.training.fields`.
    """

    def views(first: int, number: int, size: int, area: tuple[float, float]) -> jax.Array:
        shape = (len(images), 0, size, size, images.shape[-1])
        if not number:
            return jnp.zeros(shape, jnp.float32)
        make = functools.partial(_view, size=size, area=tuple(area), settings=settings)
        # a loop, since all slices of all views at once would be ten times the batch
        made = jax.lax.map(
            lambda view: jax.vmap(make, (0, 0, None))(keys, images, view),
            jnp.arange(first, first + number),
        )
        return jnp.moveaxis(made, 0, 1)

    number = settings["num_global"]
    return Views(
        views(0, number, settings["global_size"], settings["global_area"]),
        views(number, settings["num_local"], settings["local_size"], settings["local_area"]),
    )


def _view(
    key: jax.Array,
    slices: jax.Array,
    view: jax.Array,
    *,
    size: int,
    area: tuple[float, float],
    settings: ml_collections.ConfigDict | dict[str, Any],
) -> jax.Array:
    """View number `view` of an item: [K, H, W, C] -> [size, size, C]."""
    # Views in a row see different slices: all count from one place, which the item draws.
    first = jax.random.randint(jax.random.fold_in(key, _SLICE), (), 0, len(slices))
    chosen = jnp.arange(len(slices)) == (first + view) % len(slices)
    image = jnp.sum(jnp.where(chosen[:, None, None, None], slices, 0), axis=0)

    key = jax.random.fold_in(jax.random.fold_in(key, len(slices)), view)
    image = crop_and_resize(jax.random.fold_in(key, _PART), image, size, area)
    if settings["flip"]:
        flipped = jax.random.bernoulli(jax.random.fold_in(key, _FLIP))
        image = jnp.where(flipped, image[:, ::-1], image)
    image = change_grey_values(
        jax.random.fold_in(key, _GREY),
        image,
        shift=settings["window_shift"],
        width=settings["window_width"],
        gamma=settings["gamma"],
    )
    if settings["blur"]:
        image = blur(jax.random.fold_in(key, _BLUR), image, settings["blur"])
    if settings["noise"]:
        strength_key, noise_key = jax.random.split(jax.random.fold_in(key, _NOISE))
        strength = jax.random.uniform(strength_key, maxval=settings["noise"])
        image = image + strength * jax.random.normal(noise_key, image.shape)
    return jnp.clip(image, 0, 1)


def crop_and_resize(
    key: jax.Array, image: jax.Array, size: int, area: tuple[float, float]
) -> jax.Array:
    """A random rectangle of an image, resized with antialiasing.

    Args:
      key: for its area (uniform), its aspect (width / height from 3/4 to 4/3, uniform in the
        logarithm) and its place.
      image: [H, W, C] float32.
      size: side of the result.
      area: smallest and largest share of the image's area.

    Returns:
      [size, size, C] float32.
    """
    whole = jnp.array(image.shape[:2], jnp.float32)
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    share = jax.random.uniform(area_key, minval=area[0], maxval=area[1])
    aspect = jax.random.uniform(aspect_key, minval=-1, maxval=1) * math.log(LARGEST_ASPECT) / 2
    sides = jnp.sqrt(share) * whole * jnp.exp(jnp.stack([-aspect, aspect]))
    sides = jnp.minimum(sides, whole)
    start = jax.random.uniform(place_key, (2,)) * (whole - sides)
    scale = size / sides
    return jax.image.scale_and_translate(
        image,
        (size, size, image.shape[-1]),
        (0, 1),
        scale,
        -start * scale,
        method="linear",
        precision="high",
    )


def change_grey_values(
    key: jax.Array, image: jax.Array, *, shift: float, width: float, gamma: float
) -> jax.Array:
    """Another window within the stored one, and a gamma curve: [H, W, C] in [0, 1] to the same.

    Args:
      key: for the three draws, each uniform.
      image: [H, W, C] float32 in [0, 1].
      shift: the level moves by up to this share of the width, both ways.
      width: the width is multiplied by 1 - width to 1 + width.
      gamma: values are raised to a power of 1 - gamma to 1 + gamma.
    """
    draws = jax.random.uniform(key, (3,), minval=-1, maxval=1)
    level, new_width = 0.5 + shift * draws[0], 1 + width * draws[1]
    image = jnp.clip((image - level) / new_width + 0.5, 0, 1)
    return image ** (1 + gamma * draws[2]) if gamma else image


def blur(key: jax.Array, image: jax.Array, sigma: float) -> jax.Array:
    """Gaussian blur with a standard deviation drawn uniformly from 0 to `sigma` pixels.

    Args:
      key: for the draw.
      image: [H, W, C] float32; edges are repeated.
      sigma: at most 1.5, since the kernel ends after three pixels.
    """
    drawn = jax.random.uniform(key, maxval=sigma)
    places = jnp.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1)
    weights = jnp.exp(-0.5 * jnp.square(places / jnp.maximum(drawn, 1e-3)))
    weights = weights / jnp.sum(weights)
    for axis in (0, 1):
        length = image.shape[axis]
        pads = [(_BLUR_RADIUS, _BLUR_RADIUS) if a == axis else (0, 0) for a in range(3)]
        padded = jnp.pad(image, pads, mode="edge")
        image = sum(
            weights[place] * jax.lax.slice_in_dim(padded, place, place + length, axis=axis)
            for place in range(2 * _BLUR_RADIUS + 1)
        )
    return image
