"""Losses of joint-embedding objectives: pure functions of the projections of a whole batch.

z is [B, V, D] float32: V views of B items. Under `jit` over a batch that is split over devices, a
mean over B is the mean over the global batch, so that all numbers are those of one device.
Sources: LeJEPA arXiv 2511.08544, VISReg 2606.02572, VICReg 2105.04906, SimCLR 2002.05709, DINO
2104.14294.
"""

import jax
import jax.numpy as jnp

SIGREG_KNOTS = 17  # of the trapezoid rule on [0, SIGREG_END]
SIGREG_END = 3.0


def invariance(z: jax.Array, num_global: int) -> jax.Array:
    """Mean squared distance of all views from the mean of the global ones: [B, V, D] -> [B].

    Args:
      z: the global views first.
      num_global: their number.
    """
    centroid = jnp.mean(z[:, :num_global], axis=1, keepdims=True)
    return jnp.mean(jnp.square(z - centroid), axis=(1, 2))


def unit_directions(key: jax.Array, number: int, dim: int) -> jax.Array:
    """Directions drawn uniformly from the unit sphere: [number, dim] float32."""
    directions = jax.random.normal(key, (number, dim))
    return directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)


def sigreg(z: jax.Array, directions: jax.Array, *, number: int | None = None) -> jax.Array:
    """How far projections are from an isotropic Gaussian (LeJEPA): the Epps-Pulley statistic,
    averaged over directions and views.

    For each direction a and view: N * integral |phi(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt, where
    phi is the empirical characteristic function of the B numbers a . z. The integrand is even: the
    integral is twice the trapezoid sum of 17 knots on [0, 3]. Its gradient vanishes where all z
    are equal.

    Args:
      z: [B, V, D] float32.
      directions: [M, D], from `unit_directions`.
      number: N, the items of a step, of which z may be a microbatch; None takes B.

    Returns:
      Scalar >= 0: 1.053 N / B is expected of samples of N(0, I), and it is 0.402 N if all z are 0.
    """
    knots = jnp.linspace(0.0, SIGREG_END, SIGREG_KNOTS)
    step = SIGREG_END / (SIGREG_KNOTS - 1)
    rule = jnp.full(SIGREG_KNOTS, step).at[jnp.array([0, -1])].multiply(0.5)
    gaussian = jnp.exp(-jnp.square(knots) / 2)
    along = jnp.einsum("bvd,md->bvm", z, directions, precision="highest")
    angles = along[..., None] * knots
    real, imaginary = jnp.mean(jnp.cos(angles), axis=0), jnp.mean(jnp.sin(angles), axis=0)
    distance = jnp.square(real - gaussian) + jnp.square(imaginary)
    integral = 2 * jnp.sum(distance * gaussian * rule, axis=-1)
    return (number or len(z)) * jnp.mean(integral)


def visreg(z: jax.Array, directions: jax.Array) -> dict[str, jax.Array]:
    """The three terms of VISReg's regulariser, means over the views; its loss adds them.

    Here the quantiles have unit variance, as the standardised samples have. The paper's n / (N + 1)
    have .94 for a batch of 128 and .72 for one of 16: their shape term pulls projections together,
    and at 16 it wins over the scale term, so that all projections end at one point.

    Args:
      z: [B, V, D] float32.
      directions: [K, D], from `unit_directions`.

    Returns:
      `center`, the mean squared mean of a dimension; `scale`, the mean squared distance of its
      standard deviation from 1; `shape`, the mean squared distance of the sorted standardised
      projections on each direction from the quantiles of a Gaussian. Scalars; their gradient does
      not vanish where all z are equal.
    """
    mean = jnp.mean(z, axis=0)
    centred = z - mean
    deviation = jnp.sqrt(jnp.mean(jnp.square(centred), axis=0) + 1e-8)
    ranks = jnp.arange(1, len(z) + 1) / (len(z) + 1)
    quantiles = jnp.sqrt(2.0) * jax.scipy.special.erfinv(2 * ranks - 1)
    quantiles /= jnp.std(quantiles)
    standardised = centred / jax.lax.stop_gradient(deviation)
    along = jnp.einsum("bvd,md->vmb", standardised, directions, precision="highest")
    return {
        "center": jnp.mean(jnp.square(mean)),
        "scale": jnp.mean(jnp.square(1 - deviation)),
        "shape": jnp.mean(jnp.square(jnp.sort(along, axis=-1) - quantiles)),
    }


def vicreg(z: jax.Array) -> dict[str, jax.Array]:
    """The three terms of VICReg, each a scalar >= 0.

    Args:
      z: [B, V, D] float32, V >= 2. For more than two views the terms are means over pairs of views,
        in the scale of two.

    Returns:
      `invariance`, the mean squared difference of two views; `variance`, the mean over dimensions
      of relu(1 - sqrt(var + 1e-4)), and `covariance`, the sum of the squared off-diagonal elements
      of the covariance matrix over D, each summed over both views (unbiased, by B - 1).
    """
    number, num_views, dim = z.shape
    # over pairs of views, the mean squared difference is twice the unbiased variance of the views
    between_views = jnp.square(z - jnp.mean(z, axis=1, keepdims=True))
    agreement = 2 * jnp.mean(between_views) * num_views / (num_views - 1)
    centred = z - jnp.mean(z, axis=0)
    variances = jnp.sum(jnp.square(centred), axis=0) / (number - 1)
    hinge = jax.nn.relu(1 - jnp.sqrt(variances + 1e-4))
    products = jnp.einsum("bvi,bvj->vij", centred, centred, precision="highest") / (number - 1)
    squares = jnp.sum(jnp.square(products), axis=(1, 2)) - jnp.sum(jnp.square(variances), axis=1)
    return {
        "invariance": agreement,
        "variance": 2 * jnp.mean(hinge),
        "covariance": 2 * jnp.mean(squares) / dim,
    }


def nt_xent(z: jax.Array, patient: jax.Array, temperature: float) -> jax.Array:
    """SimCLR's loss of each item, without negatives of the same patient: [B] float32.

    Slices of a volume look alike and would be false negatives. Of an item without negatives the
    loss is 0.

    Args:
      z: [B, V, D] float32, V >= 2; each pair of an item's views is a positive pair.
      patient: [B] int32, the patient of each item.
      temperature: of the cosines.
    """
    number, num_views, dim = z.shape
    unit = (z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-12)).reshape(-1, dim)
    similarity = jnp.einsum("id,jd->ij", unit, unit, precision="highest") / temperature
    similarity = similarity.reshape(number, num_views, number, num_views)
    other_patient = (patient[:, None] != patient[None, :])[:, None, :, None]
    negatives = jax.nn.logsumexp(jnp.where(other_patient, similarity, -1e9), axis=(2, 3))
    positives = jnp.einsum("iviw->ivw", similarity)
    losses = jnp.logaddexp(positives, negatives[..., None]) - positives
    pairs = 1 - jnp.eye(num_views)
    return jnp.sum(losses * pairs, axis=(1, 2)) / jnp.sum(pairs)


def self_distillation(
    student: jax.Array,
    teacher: jax.Array,
    centre: jax.Array,
    *,
    student_temperature: float,
    teacher_temperature: jax.Array | float,
) -> jax.Array:
    """DINO's loss of each item: the cross-entropy of the student's prototypes against the
    teacher's, over all pairs of different views: [B] float32.

    Args:
      student: [B, V, P] float32 scores of all views, the global ones first.
      teacher: [B, G, P] of the global views; it passes no gradient.
      centre: [P], subtracted from the teacher's scores.
      student_temperature, teacher_temperature: of the two softmax.
    """
    targets = jax.nn.softmax((jax.lax.stop_gradient(teacher) - centre) / teacher_temperature)
    log_probabilities = jax.nn.log_softmax(student / student_temperature)
    entropies = -jnp.einsum("bgp,bvp->bgv", targets, log_probabilities, precision="highest")
    different = 1 - jnp.eye(teacher.shape[1], student.shape[1])
    return jnp.sum(entropies * different, axis=(1, 2)) / jnp.sum(different)
