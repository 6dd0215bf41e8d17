"""Augmentation of training slices: pure functions of (keys, batch), with one key for each example.

The kinds of augmentation are contrast, shift, scale, rotation and cutout, as the winner of the RSNA
challenge applied them to slices, and a horizontal flip. Each kind draws from its own part of the
key, so switching one off does not change the others. A strength of 0 leaves the values unchanged to
the bit.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from data_prep.system.errors import InputError

_CONTRAST, _GEOMETRY, _CUTOUT, _FLIP = range(4)  # parts of an example's key
_ROWS_AT_ONCE = 8  # of the output: 8 x 512 x 512 float32 a plane are 8 MiB


def check(strengths: Mapping) -> None:
    """Refuse strengths that `augment` cannot take.

    Raises:
        InputError: names the field.
    """
    limits = {
        "contrast": 1,
        "shift": 1,
        "scale": 0.99,
        "rotation_degrees": 180,
        "cutout_side": 1,
        "cutout_holes": 100,
    }
    fields = sorted([*limits, "flip"])
    for name in strengths:
        if name not in fields:
            raise InputError(
                f"config.augmentation.{name} is not known; choose among {', '.join(fields)}"
            )
    for name, limit in limits.items():
        value = strengths.get(name, 0)
        if not 0 <= value <= limit:
            raise InputError(
                f"config.augmentation.{name}={value}: must be 0 (off) or more and at most {limit}"
            )
    if strengths.get("cutout_holes", 0) != int(strengths.get("cutout_holes", 0)):
        raise InputError(
            f"config.augmentation.cutout_holes={strengths['cutout_holes']}: must be a whole number"
        )
    if bool(strengths.get("cutout_holes", 0)) != bool(strengths.get("cutout_side", 0)):
        raise InputError(
            "config.augmentation: cutout_holes and cutout_side work together; set both above 0, "
            "or both to 0"
        )


def augment(
    keys: jax.Array,
    images: jax.Array,
    *,
    contrast: float = 0.0,
    shift: float = 0.0,
    scale: float = 0.0,
    rotation_degrees: float = 0.0,
    cutout_holes: int = 0,
    cutout_side: float = 0.0,
    flip: bool = False,
) -> jax.Array:
    """Augment each image with draws of its own, which all of its channels share.

    In this order: contrast; one affine map, resampled once, bilinear, 0 where it looks outside the
    image; flip; cutout.

    Args:
        keys: [B] one key an example.
        images: [B, H, W, C] float32 in [0, 1].
        contrast: the distance of each value from its channel's mean is multiplied by 1 - contrast
            to 1 + contrast.
        shift: the image moves by up to this part of each side, each way.
        scale: enlargement about the centre by 1 - scale to 1 + scale.
        rotation_degrees: rotation about the centre by up to this angle, each way.
        cutout_holes: number of rectangles set to 0, centred anywhere and cut off at the border.
        cutout_side: largest height and width of a rectangle, as parts of the image's height and
            width; both uniform from 0.
        flip: swap left and right with probability 1/2.

    Returns:
        [B, H, W, C] float32 in [0, 1].
    """
    if contrast:
        images = _change_contrast(_part(keys, _CONTRAST), images, contrast)
    coordinates = _source_coordinates(keys, images.shape[1:3], shift, scale, rotation_degrees)
    if coordinates is not None:
        images = _resample(images, *coordinates, order=1)
    if flip:
        images = _flip(_part(keys, _FLIP), images)
    if cutout_holes and cutout_side:
        images = jnp.where(
            _holes(keys, images.shape[1:3], cutout_holes, cutout_side)[..., None], 0, images
        )
    return images


def augment_with_masks(
    keys: jax.Array, images: jax.Array, masks: jax.Array, **strengths: float
) -> tuple[jax.Array, jax.Array]:
    """`augment` of images, and the same geometry for their masks: nearest pixel, 0 outside and in
    cutout rectangles.

    Args:
        keys: [B] one key an example.
        images: [B, H, W, C] float32 in [0, 1].
        masks: [B, H, W], any number type.
        strengths: as in `augment`.

    Returns:
        images [B, H, W, C] float32 in [0, 1], the same as without masks; masks [B, H, W] of the
        same type, whose values all occurred before or are 0.
    """
    unchanged_values = masks[..., None].astype(jnp.float32)
    affine = {name: strengths.get(name, 0.0) for name in ("shift", "scale", "rotation_degrees")}
    coordinates = _source_coordinates(keys, masks.shape[1:3], **affine)
    if coordinates is not None:
        unchanged_values = _resample(unchanged_values, *coordinates, order=0)
    rest = {
        name: strengths[name]
        for name in ("flip", "cutout_holes", "cutout_side")
        if name in strengths
    }
    moved = augment(keys, unchanged_values, **rest)
    return augment(keys, images, **strengths), moved[..., 0].astype(masks.dtype)


def crop_to_box(images: jax.Array, boxes: jax.Array) -> jax.Array:
    """Enlarge a box of each image to the whole image, bilinear; height and width are stretched
    independently.

    Args:
        images: [B, H, W, C] float32.
        boxes: [B, 4] float32: top, left, bottom, right in pixels, bottom and right behind the last
            row and column. Parts outside the image are left out; a box without an inside gives the
            whole image.

    Returns:
        [B, H, W, C] float32; a box of the whole image gives the image.
    """
    height, width = images.shape[1:3]
    size = jnp.array([height, width], jnp.float32)

    def source_of_one(box):
        start, end = jnp.clip(box[:2], 0, size), jnp.clip(box[2:], 0, size)
        inside = jnp.all(end - start >= 1)
        start, end = jnp.where(inside, start, 0), jnp.where(inside, end, size)
        # Sampled at pixel centres, and never half a pixel beyond the box's border, where the
        # pixels are left out.
        return [
            jnp.clip(
                start[axis] + (jnp.arange(n) + 0.5) * ((end[axis] - start[axis]) / n) - 0.5,
                start[axis],
                end[axis] - 1,
            )
            for axis, n in enumerate((height, width))
        ]

    rows, columns = jax.vmap(source_of_one)(boxes.astype(jnp.float32))
    return _resample(images, rows[:, :, None], columns[:, None, :], order=1)


def _part(keys: jax.Array, part: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, part)


def _uniform(keys: jax.Array, limit: float, count: int) -> jax.Array:
    """[B, count] in [-limit, limit]."""
    return jax.vmap(lambda key: jax.random.uniform(key, (count,), minval=-limit, maxval=limit))(
        keys
    )


def _change_contrast(keys: jax.Array, images: jax.Array, contrast: float) -> jax.Array:
    factors = 1 + _uniform(keys, contrast, 1)[:, :, None, None]
    mean = jnp.mean(images, axis=(1, 2), keepdims=True)
    return jnp.clip(mean + factors * (images - mean), 0, 1)


def _source_coordinates(
    keys: jax.Array, size: tuple[int, int], shift: float, scale: float, rotation_degrees: float
) -> tuple[jax.Array, jax.Array] | None:
    """Where each pixel of the output looks in the input: its row and its column, as `_resample`
    takes them; None for the identity.
    """
    if not (shift or scale or rotation_degrees):
        return None
    height, width = size
    draws = _uniform(_part(keys, _GEOMETRY), 1.0, 4)
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2], jnp.float32)

    def of_one(draw):
        offset = draw[:2] * shift * jnp.array(size, jnp.float32)
        rows, columns = (
            (jnp.arange(n, dtype=jnp.float32) - centre[axis] - offset[axis]) / (1 + scale * draw[2])
            for axis, n in enumerate(size)
        )
        rows, columns = rows[:, None], columns[None, :]
        if rotation_degrees:
            angle = jnp.deg2rad(draw[3] * rotation_degrees)
            rows, columns = (
                jnp.cos(angle) * rows - jnp.sin(angle) * columns,
                jnp.sin(angle) * rows + jnp.cos(angle) * columns,
            )
        return rows + centre[0], columns + centre[1]

    return jax.vmap(of_one)(draws)


def _resample(images: jax.Array, rows: jax.Array, columns: jax.Array, order: int) -> jax.Array:
    """Values of images between their pixels; 0 outside.

    On TPUs by matrix products: they fetch pixels one after the other.

    Args:
        images: [B, H, W, C].
        rows, columns: [B, H, W], where each pixel of the output looks. [B, H, 1] and [B, 1, W] if
            all pixels of an output row look at one row, and all of a column at one column.
        order: 1 bilinear, 0 nearest.

    Returns:
        [B, H, W, C].
    """
    return jax.lax.platform_dependent(
        images,
        rows,
        columns,
        tpu=functools.partial(resample_by_matrix_products, order=order),
        default=functools.partial(resample_by_gathers, order=order),
    )


def resample_by_gathers(
    images: jax.Array, rows: jax.Array, columns: jax.Array, *, order: int
) -> jax.Array:
    """`_resample` for devices that fetch single pixels quickly."""

    def of_one(image, rows, columns):
        where = list(jnp.broadcast_arrays(rows, columns))
        return jax.vmap(
            lambda plane: map_coordinates(plane, where, order), in_axes=-1, out_axes=-1
        )(image)

    return jax.vmap(of_one)(images, rows, columns)


def resample_by_matrix_products(
    images: jax.Array, rows: jax.Array, columns: jax.Array, *, order: int
) -> jax.Array:
    """`_resample` for devices that fetch single pixels slowly. "high" keeps 16 bits of each factor.

    If rows and columns are independent these are two products, 2 H W (H + W) operations a plane.
    Else each row of the output is one product and a weighted sum, 2 H^2 W^2 operations (0.14 TFLOP
    at 512 x 512; a training step of the reference model does 10), in blocks of rows, one after the
    other.
    """
    height, width = images.shape[1:3]
    if rows.shape[2] == columns.shape[1] == 1:
        return jnp.einsum(
            "bir,brsc,bjs->bijc",
            _weights(rows[:, :, 0], height, order),
            images,
            _weights(columns[:, 0], width, order),
            precision="high",
            optimize="optimal",
        )

    def rows_of_output(where):
        """[B, W] rows and columns of one row of the output -> [B, W, C]."""
        fetched = jnp.einsum(
            "bjs,brsc->bjrc", _weights(where[1], width, order), images, precision="high"
        )
        return jnp.einsum(
            "bjr,bjrc->bjc", _weights(where[0], height, order), fetched, precision="high"
        )

    where = (rows.swapaxes(0, 1), columns.swapaxes(0, 1))
    return jax.lax.map(rows_of_output, where, batch_size=_ROWS_AT_ONCE).swapaxes(0, 1)


def _weights(coordinates: jax.Array, size: int, order: int) -> jax.Array:
    """[..., N] coordinates -> [..., N, size]: the weight of each pixel of an axis; none outside."""
    if order == 0:
        nearest = jax.lax.round(coordinates)  # halves as `map_coordinates` rounds them
        return (nearest[..., None] == jnp.arange(size)).astype(jnp.float32)
    return jnp.maximum(1 - jnp.abs(coordinates[..., None] - jnp.arange(size)), 0)


def _flip(keys: jax.Array, images: jax.Array) -> jax.Array:
    flipped = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)


def _holes(keys: jax.Array, size: tuple[int, int], count: int, side: float) -> jax.Array:
    """[B, H, W] bool: inside one of the rectangles."""

    def of_one(key):
        centre_key, side_key = jax.random.split(key)
        inside = []
        for axis, n in enumerate(size):
            centre = jax.random.uniform(jax.random.fold_in(centre_key, axis), (count, 1), maxval=n)
            length = jax.random.uniform(
                jax.random.fold_in(side_key, axis), (count, 1), maxval=side * n
            )
            inside.append(jnp.abs(jnp.arange(n) + 0.5 - centre) < length / 2)
        return jnp.any(inside[0][:, :, None] & inside[1][:, None, :], axis=0)

    return jax.vmap(of_one)(_part(keys, _CUTOUT))
