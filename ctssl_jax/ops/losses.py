"""Loss terms as pure functions. Each returns one value an example, [B] float32, which the caller
weights and averages.
"""

import jax
import jax.numpy as jnp


def mse(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error over all pixels and channels: [B, H, W, C] twice -> [B] float32."""
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(jnp.square(difference), axis=(1, 2, 3))


def masked_mse(prediction: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean squared error over the masked pixels, all channels.

    Args:
        prediction, target: [B, H, W, C].
        mask: [B, H, W, 1], 1 where the pixel counts, else 0.

    Returns:
        [B] float32; 0 for an example whose mask is empty.
    """
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return _masked_mean(jnp.square(difference), mask)


def masked_l1(prediction: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean absolute error over the masked pixels (SimMIM); arguments and result as `masked_mse`."""
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return _masked_mean(jnp.abs(difference), mask)


def _masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    total = jnp.sum(values * mask, axis=(1, 2, 3))
    count = jnp.sum(mask, axis=(1, 2, 3)) * values.shape[-1]
    return total / jnp.maximum(count, 1)


def vector_quantization_loss(
    codebook_loss: jax.Array, commitment_loss: jax.Array, beta: float = 0.25
) -> jax.Array:
    """codebook_loss + beta * commitment_loss, each [B] -> [B] (van den Oord et al. 2017, eq. 3)."""
    return codebook_loss + beta * commitment_loss


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Negative log-probability of the true class, [B] float32 >= 0.

    Args:
        logits: [B, K].
        labels: [B] int in [0, K).
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]


def double_softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy with the softmax applied twice: [B, K] and [B] int in [0, K) -> [B] float32.

    The paper's Table II appears to report this value, although it is a poor loss: with K classes it
    cannot fall below ln(e + K - 1) - 1, which is 0.7437 for four classes (the paper's rotation:
    0.7436) and 0.5514 for three.
    """
    return cross_entropy(jax.nn.softmax(logits.astype(jnp.float32)), labels)


def binary_cross_entropy(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over pixels of the negative log-probability of the mask: [B, H, W] logits and [B, H, W]
    0/1 mask -> [B] float32.
    """
    logits, mask = logits.astype(jnp.float32), mask.astype(jnp.float32)
    return jnp.mean(jax.nn.softplus(logits) - logits * mask, axis=(1, 2))


def soft_dice(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """1 - (2 sum(p m) + 1) / (sum p + sum m + 1) with probabilities p and 0/1 mask m.

    [B, H, W] twice -> [B] float32 in [0, 1]. The added pixel gives an empty mask a loss: 0 if all
    probabilities are 0, else 1 - 1 / (sum p + 1).
    """
    probabilities, mask = jax.nn.sigmoid(logits.astype(jnp.float32)), mask.astype(jnp.float32)
    intersection = jnp.sum(probabilities * mask, axis=(1, 2))
    total = jnp.sum(probabilities, axis=(1, 2)) + jnp.sum(mask, axis=(1, 2))
    return 1 - (2 * intersection + 1) / (total + 1)
