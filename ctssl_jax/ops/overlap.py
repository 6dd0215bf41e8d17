"""How well a predicted mask covers the true one: hard Dice and IoU at probability 0.5.

Both are computed from three counts a slice (pixels in both masks, in the predicted mask, in the
true mask), so that masks need not be kept. The counts of slices add up to the counts of their
volume or patient. The score is 1 where both masks are empty, 0 where exactly one is empty.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


def counts(logits: jax.Array, masks: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pixels in both masks, in the predicted mask, and in the true mask.

    Args:
      logits: [B, H, W]; above 0 (probability above 0.5) is foreground.
      masks: [B, H, W], above 0 is foreground.

    Returns:
      Three arrays [B] float32, exact up to 2 ** 24 pixels.
    """
    predicted, target = logits > 0, masks > 0
    both = predicted & target
    return tuple(
        jnp.sum(chosen, axis=(1, 2), dtype=jnp.float32) for chosen in (both, predicted, target)
    )


def dice(intersection: Array, predicted: Array, target: Array) -> Array:
    """2 * intersection / (predicted + target) in [0, 1]; arrays of jax or numpy of one shape."""
    total = predicted + target
    empty = total == 0  # counted as one pixel that is right
    return (2 * intersection + empty) / (total + empty)


def iou(intersection: Array, predicted: Array, target: Array) -> Array:
    """intersection / (predicted + target - intersection) in [0, 1]; arrays as in `dice`."""
    union = predicted + target - intersection
    empty = union == 0
    return (intersection + empty) / (union + empty)


def add_up(
    intersection: np.ndarray,
    predicted: np.ndarray,
    target: np.ndarray,
    index: np.ndarray,
    number: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts [number] of volumes or patients from the counts [N] of their slices.

    Args:
      index: [N] int in [0, number), the volume or patient of each slice.
    """
    return tuple(np.bincount(index, values, number) for values in (intersection, predicted, target))
