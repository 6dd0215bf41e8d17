"""Image corruptions of the pretext tasks: pure functions of (keys, batch).

The key of each example is made from the record's index, so that an example looks the same at every
batch size, order of records and number of devices or hosts.
"""

import math

import jax
import jax.numpy as jnp


def example_keys(
    key: jax.Array, record_index: jax.Array, step: jax.Array | int | None = None
) -> jax.Array:
    """One random key an example: fold_in(fold_in(key, step), record_index).

    Args:
        key: the jax key of the run.
        record_index: [B] int32, the index of each example's record within its split.
        step: training step; None (evaluation) leaves it out, so that each record is always
            corrupted the same way.

    Returns:
        [B] keys.
    """
    if step is not None:
        key = jax.random.fold_in(key, step)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, record_index)


def mask_side(height: int, width: int, *, fraction: float, unit: str = "area") -> int:
    """Side of the square mask in pixels.

    "area": the mask covers `fraction` of the image area, side = sqrt(fraction * height * width)
    rounded to the nearest pixel (512 px: 114, 162, 229, 294 for 5, 10, 20, 33 %), so the covered
    area is within side + 1/2 pixels of the requested area. "side": side = fraction * width rounded
    down, as in the authors' release (512 px: 25, 51, 102, 168).

    Raises:
        ValueError: fraction outside (0, 1), an unknown unit, or a side of less than one pixel.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"mask fraction must lie between 0 and 1, got {fraction}")
    if unit == "area":
        side = round(math.sqrt(fraction * height * width))
    elif unit == "side":
        side = math.floor(fraction * width + 1e-9)
    else:
        raise ValueError(f'mask unit must be "area" or "side", got "{unit}"')
    if side < 1:
        raise ValueError(
            f"a mask of {fraction:g} ({unit}) is less than a pixel of a {height} x {width} image; "
            "raise the fraction"
        )
    return side


def mask_region(
    keys: jax.Array,
    images: jax.Array,
    *,
    fraction: float,
    unit: str = "area",
    margin: int = 0,
    fill: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Cover one square region of every image, at a uniformly random position.

    Args:
        keys: [B] one key an example, from `example_keys`.
        images: [B, H, W, C] float.
        fraction: how much to cover, see `mask_side`.
        unit: "area" or "side", see `mask_side`.
        margin: rows at the bottom and columns at the right that stay uncovered (the authors'
            release: 100); with 0 the mask may lie anywhere it fits.
        fill: value of the covered pixels.

    Returns:
        inputs [B, H, W, C]: the images with the region filled, and mask [B, H, W, 1] float32: 1 in
        the region, else 0.

    Raises:
        ValueError: as `mask_side`, or the mask and the margin do not fit into the image.
    """
    _, height, width, _ = images.shape
    side = mask_side(height, width, fraction=fraction, unit=unit)
    if margin < 0 or side + margin > min(height, width):
        raise ValueError(
            f"a mask of {side} pixels with margin {margin} does not fit into a {height} x {width} "
            "image; use a margin of 0 or more, and lower the margin or the fraction"
        )

    def mask_one(key):
        row_key, column_key = jax.random.split(key)
        row = jax.random.randint(row_key, (), 0, height - side - margin + 1)
        column = jax.random.randint(column_key, (), 0, width - side - margin + 1)
        row_offset, column_offset = jnp.arange(height) - row, jnp.arange(width) - column
        in_rows = (row_offset >= 0) & (row_offset < side)
        in_columns = (column_offset >= 0) & (column_offset < side)
        return in_rows[:, None] & in_columns[None, :]

    mask = jax.vmap(mask_one)(keys)[..., None]
    return jnp.where(mask, jnp.asarray(fill, images.dtype), images), mask.astype(jnp.float32)


def num_blocks(height: int, width: int, *, fraction: float, side: int) -> int:
    """Blocks of a mask of `mask_blocks`: the number whose area is nearest to the fraction, at least
    one and not all.

    Raises:
        ValueError: fraction outside (0, 1), or a side that does not divide the image, or that gives
            fewer than two blocks.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"mask fraction must lie between 0 and 1, got {fraction}")
    if side < 1 or height % side or width % side or height * width < 2 * side * side:
        raise ValueError(
            f"blocks of {side} pixels do not tile an image of {height} x {width}; choose a divisor"
        )
    total = (height // side) * (width // side)
    return min(max(round(fraction * total), 1), total - 1)


def mask_blocks(
    keys: jax.Array, images: jax.Array, *, fraction: float, side: int, fill: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Cover some squares of a grid, drawn uniformly, the same number in every image (SimMIM).

    Args:
        keys: [B] one key an example, from `example_keys`.
        images: [B, H, W, C] float.
        fraction: of the area, see `num_blocks`.
        side: of a square in pixels.
        fill: value of the covered pixels.

    Returns:
        As `mask_region`.

    Raises:
        ValueError: as `num_blocks`.
    """
    _, height, width, _ = images.shape
    number = num_blocks(height, width, fraction=fraction, side=side)
    rows, columns = height // side, width // side

    def mask_one(key):
        drawn = jax.random.uniform(key, (rows * columns,))
        return (drawn < jnp.sort(drawn)[number]).reshape(rows, columns)  # without a gather

    mask = jax.vmap(mask_one)(keys)
    mask = jnp.repeat(jnp.repeat(mask, side, axis=1), side, axis=2)[..., None]
    return jnp.where(mask, jnp.asarray(fill, images.dtype), images), mask.astype(jnp.float32)


def salt_and_pepper(keys: jax.Array, images: jax.Array, *, fraction: float = 0.5) -> jax.Array:
    """Turn random pixels white (salt) or black (pepper).

    Every pixel is noisy with probability `fraction`, independently of all others, and a noisy pixel
    is white or black with equal probability. The share of noisy pixels is therefore `fraction` in
    expectation, with binomial variance. All channels of a pixel get the same noise.

    Args:
        keys: [B] one key an example, from `example_keys`.
        images: [B, H, W, C] float in [0, 1].
        fraction: probability that a pixel is noisy.

    Returns:
        [B, H, W, C]: 1 where white, 0 where black, elsewhere the image.

    Raises:
        ValueError: fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"noise fraction must lie above 0 and be at most 1, got {fraction}")
    draw = jax.vmap(lambda key: jax.random.uniform(key, (*images.shape[1:3], 1)))(keys)
    salt_or_image = jnp.where(draw < fraction, jnp.ones((), images.dtype), images)
    return jnp.where(draw < fraction / 2, jnp.zeros((), images.dtype), salt_or_image)


def random_labels(keys: jax.Array, num_classes: int) -> jax.Array:
    """A uniformly random class an example: keys [B] -> [B] int32 in [0, num_classes)."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, num_classes))(keys)


def rotate(images: jax.Array, quarter_turns: jax.Array) -> jax.Array:
    """Rotate each image counterclockwise by multiples of 90 degrees, exactly (no interpolation).

    Args:
        images: [B, N, N, C].
        quarter_turns: [B] int32; 0, 1, 2, 3 are 0, 90, 180 and 270 degrees, and 4 is 0 again.

    Returns:
        [B, N, N, C].

    Raises:
        ValueError: the images are not square.
    """
    _, height, width, _ = images.shape
    if height != width:
        raise ValueError(f"only square images can be rotated by 90 degrees, got {height} x {width}")
    turns = quarter_turns[:, None, None, None] % 4
    images = jnp.where(turns >= 2, images[:, ::-1, ::-1], images)
    return jnp.where(turns % 2 == 1, jnp.rot90(images, axes=(1, 2)), images)


def flip(images: jax.Array, direction: jax.Array) -> jax.Array:
    """Mirror each image; a second flip in the same direction restores it.

    Args:
        images: [B, H, W, C].
        direction: [B] int32; 0 leaves the image, 1 flips it horizontally (swaps left and right),
            2 vertically.

    Returns:
        [B, H, W, C].
    """
    direction = direction[:, None, None, None]
    images = jnp.where(direction == 1, images[:, :, ::-1], images)
    return jnp.where(direction == 2, images[:, ::-1], images)
