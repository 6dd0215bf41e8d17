"""Vector quantization with a straight-through gradient (van den Oord et al. 2017)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

KMEANS_ITERATIONS = 10


class CodebookState(nnx.Variable):
    """The codebook under EMA updates and the statistics that move it: state without gradient."""


def nearest_codes(vectors: jax.Array, codebook: jax.Array) -> jax.Array:
    """Index of the code nearest to each vector, by squared distance: [N, D], [K, D] -> [N] int32.

    |z - e|^2 without its constant term |z|^2: one matrix product, in full float32 on every device.
    Of equally near codes the first is taken. (`jnp.argmin` gives the same, several times slower on
    CPU.)
    """
    products = jnp.dot(vectors, codebook.T, precision="highest")
    distances = jnp.sum(jnp.square(codebook), axis=1) - 2 * products
    nearest = distances == jnp.min(distances, axis=1, keepdims=True)
    last = len(codebook) - 1
    index = jax.lax.broadcasted_iota(jnp.int32, distances.shape, 1)
    return jnp.min(jnp.where(nearest, index, last), axis=1)


def sum_by_matrix_product(vectors: jax.Array, codes: jax.Array, num_codes: int) -> jax.Array:
    """`sum_by_code` as the product of the one-hot codes [K, N] and the vectors, in full float32."""
    one_hot = codes[None, :] == jax.lax.broadcasted_iota(jnp.int32, (num_codes, len(codes)), 0)
    return jnp.dot(one_hot.astype(vectors.dtype), vectors, precision="highest")


def sum_by_code(vectors: jax.Array, codes: jax.Array, num_codes: int) -> jax.Array:
    """Sum of the vectors assigned to each code: [N, D], [N] int32 -> [K, D]; 0 for an unused code.

    On CPU the vectors are added one after the other. On accelerators this is a matrix product: they
    would add by atomic operations, which wait for each other where many latents share few codes
    (85 % of a training step of the reference model on an H200), and whose order, and so the last
    bits of the result, differs from run to run.
    """
    return jax.lax.platform_dependent(
        vectors,
        codes,
        cpu=lambda vectors, codes: jax.ops.segment_sum(vectors, codes, num_codes),
        default=lambda vectors, codes: sum_by_matrix_product(vectors, codes, num_codes),
    )


def select_by_matrix_product(codebook: jax.Array, codes: jax.Array) -> jax.Array:
    """`select_codes` as the product of the one-hot codes [N, K] and a finite codebook: exact, since
    "highest" splits each float32 into parts whose products with 1 and sum are exact."""
    one_hot = codes[:, None] == jax.lax.broadcasted_iota(jnp.int32, (1, len(codebook)), 1)
    return jnp.dot(one_hot.astype(codebook.dtype), codebook, precision="highest")


@jax.custom_vjp
def select_codes(codebook: jax.Array, codes: jax.Array) -> jax.Array:
    """The code of each index: [K, D], [N] int32 -> [N, D]. Its gradient is `sum_by_code`.

    On TPUs a matrix product: they fetch rows one after the other.
    """
    return jax.lax.platform_dependent(
        codebook,
        codes,
        tpu=select_by_matrix_product,
        default=lambda codebook, codes: codebook[codes],
    )


def _select_codes_forward(codebook, codes):
    return select_codes(codebook, codes), (codebook, codes)


def _select_codes_backward(residuals, gradient):
    codebook, codes = residuals
    return sum_by_code(gradient, codes, len(codebook)), None


select_codes.defvjp(_select_codes_forward, _select_codes_backward)


def _counts_and_sums(
    vectors: jax.Array, codes: jax.Array, num_codes: int
) -> tuple[jax.Array, jax.Array]:
    """Number [K] and sum [K, D] of the vectors [N, D] assigned to each code."""
    counts = sum_by_code(jnp.ones((len(codes), 1), jnp.float32), codes, num_codes)
    return counts[:, 0], sum_by_code(vectors, codes, num_codes)


def _random_vectors(key: jax.Array, vectors: jax.Array, count: int) -> jax.Array:
    """`count` random rows of vectors [N, D], different ones while N suffices."""
    rows = jax.random.choice(key, len(vectors), (count,), replace=len(vectors) < count)
    return vectors[rows]


def kmeans(
    key: jax.Array, vectors: jax.Array, num_codes: int, iterations: int = KMEANS_ITERATIONS
) -> jax.Array:
    """Lloyd's k-means from random vectors: [N, D] -> [num_codes, D]. A centre without vectors stays
    where it is.
    """

    def step(_, centres):
        counts, sums = _counts_and_sums(vectors, nearest_codes(vectors, centres), num_codes)
        return jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, 1)[:, None], centres)

    return jax.lax.fori_loop(0, iterations, step, _random_vectors(key, vectors, num_codes))


class VectorQuantizer(nnx.Module):
    """Replaces each latent by its nearest code.

    update="gradient": `codebook` is an `nnx.Param`, trained by the codebook loss.
    update="ema": `codebook` is a `CodebookState`. After each training batch it becomes the running
    mean of the latents assigned to each code (running sums / running counts); a code without
    latents stays where it is. With init="data" the first training batch places the codes by
    k-means. With revive_every = N, every N-th training step moves each code whose running count is
    below revive_below of an equal share onto a random latent of the batch. The result depends only
    on parameters, state, batch and key; under jit over a sharded batch it is the result of the
    global batch.
    """

    def __init__(
        self,
        num_codes: int,
        embedding_dim: int,
        *,
        update: str = "gradient",
        ema_decay: float = 0.99,
        init: str = "uniform",
        revive_every: int = 0,
        revive_below: float = 0.05,
        rngs: nnx.Rngs,
    ):
        bound = 1 / num_codes
        values = jax.random.uniform(
            rngs.params(), (num_codes, embedding_dim), jnp.float32, -bound, bound
        )
        self.update, self.ema_decay = update, ema_decay
        self.revive_every, self.revive_below = revive_every, revive_below
        self.needs_key = init == "data" or revive_every > 0
        if update == "gradient":
            self.codebook = nnx.Param(values)
            return
        self.codebook = CodebookState(values)
        self.counts = CodebookState(jnp.zeros(num_codes, jnp.float32))
        self.sums = CodebookState(jnp.zeros((num_codes, embedding_dim), jnp.float32))
        self.steps = CodebookState(jnp.zeros((), jnp.int32))
        self.initialised = CodebookState(jnp.asarray(init == "uniform"))

    def __call__(
        self, latents: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        """Quantize.

        Args:
            latents: [B, h, w, D] float32.
            train: update the codebook's state (EMA); False changes nothing.
            key: for init="data" and revive_every; needed in training with either.

        Returns:
            quantized [B, h, w, D] float32, whose gradient passes straight to `latents`;
            codes [B, h, w] int32;
            codebook_loss [B] float32, 0 under EMA;
            commitment_loss [B] float32.

        Raises:
            ValueError: the key is missing.
        """
        vectors = jax.lax.stop_gradient(latents).reshape(-1, latents.shape[-1])
        if train and self.update == "ema":
            codes, codebook = self._learn(vectors, key)
        else:
            codebook = self.codebook[...]
            codes = nearest_codes(vectors, jax.lax.stop_gradient(codebook))
        selected = select_codes(codebook, codes).reshape(latents.shape)

        commitment_loss = jnp.mean(
            jnp.square(latents - jax.lax.stop_gradient(selected)), axis=(1, 2, 3)
        )
        if self.update == "gradient":
            codebook_loss = jnp.mean(
                jnp.square(jax.lax.stop_gradient(latents) - selected), axis=(1, 2, 3)
            )
        else:
            codebook_loss = jnp.zeros_like(commitment_loss)
        # Exactly the selected codes, since the difference is 0, with the gradient of the latents.
        quantized = jax.lax.stop_gradient(selected) + (latents - jax.lax.stop_gradient(latents))
        return quantized, codes.reshape(latents.shape[:-1]), codebook_loss, commitment_loss

    def _learn(self, vectors: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Assign vectors [N, D] to codes and move the stored codebook.

        Returns:
            codes [N], and the codebook [K, D] before the move, which they refer to.
        """
        num_codes = len(self.codebook[...])
        codebook = self.codebook[...]
        if self.needs_key:
            if key is None:
                raise ValueError('training with vq_init="data" or vq_revive_every needs a key')
            init_key, revive_key = jax.random.split(key)
            codebook = jax.lax.cond(
                self.initialised[...],
                lambda: codebook,
                lambda: kmeans(init_key, vectors, num_codes),
            )
        codes = nearest_codes(vectors, codebook)
        batch_counts, batch_sums = _counts_and_sums(vectors, codes, num_codes)
        counts = self.ema_decay * self.counts[...] + (1 - self.ema_decay) * batch_counts
        sums = self.ema_decay * self.sums[...] + (1 - self.ema_decay) * batch_sums
        moved = jnp.where(
            counts[:, None] > 1e-6, sums / jnp.maximum(counts, 1e-6)[:, None], codebook
        )
        steps = self.steps[...] + 1

        if self.revive_every:
            # Running counts start at 0: after t steps they hold 1 - decay^t of their final weight.
            weight = 1 - self.ema_decay**steps
            dead = counts < self.revive_below * weight * len(vectors) / num_codes

            def revive(moved, counts, sums):
                fresh = _random_vectors(revive_key, vectors, num_codes)
                return (
                    jnp.where(dead[:, None], fresh, moved),
                    jnp.where(dead, 1.0, counts),
                    jnp.where(dead[:, None], fresh, sums),
                )

            def keep(moved, counts, sums):
                return moved, counts, sums

            moved, counts, sums = jax.lax.cond(
                steps % self.revive_every == 0, revive, keep, moved, counts, sums
            )

        self.codebook[...], self.counts[...], self.sums[...] = moved, counts, sums
        self.steps[...] = steps
        self.initialised[...] = jnp.ones((), bool)
        return codes, codebook


def code_counts(codes: jax.Array, num_codes: int, weight: jax.Array | None = None) -> jax.Array:
    """How often each code occurs: codes [B, h, w] int32 -> [num_codes] float32.

    Args:
        weight: [B], 0 for padded examples; None counts every example once.
    """
    weight = jnp.ones(len(codes), jnp.float32) if weight is None else weight.astype(jnp.float32)
    weights = jnp.broadcast_to(weight[:, None, None], codes.shape)
    return sum_by_code(weights.reshape(-1, 1), codes.reshape(-1), num_codes)[:, 0]


def perplexity(counts: jax.Array | np.ndarray) -> float:
    """Exponential of the entropy of the code frequencies: [K] -> 1 (one code used) to K (all used
    equally); 0 if all counts are 0.
    """
    counts = np.asarray(counts, np.float64)
    if counts.sum() == 0:
        return 0.0
    frequency = counts[counts > 0] / counts.sum()
    return float(np.exp(-np.sum(frequency * np.log(frequency))))


def used_codes(counts: jax.Array | np.ndarray) -> int:
    """Number of codes that occur at least once: [K] -> int."""
    return int(np.count_nonzero(np.asarray(counts) > 0))


def codebook_use(counts: jax.Array | np.ndarray | None) -> dict[str, float]:
    """`perplexity`, `used_codes`, `dead_codes` of code counts [K]; empty for None (no codebook)."""
    if counts is None:
        return {}
    used = used_codes(counts)
    return {"perplexity": perplexity(counts), "used_codes": used, "dead_codes": len(counts) - used}
