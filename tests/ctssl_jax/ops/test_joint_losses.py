"""Losses of joint embeddings: known values, gradients at collapse, the whole batch on 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctssl_jax.ops import joint_losses
from ctssl_jax.parallel.mesh import make_mesh, split_along_batch

KEY = jax.random.key(0)
DIRECTIONS = joint_losses.unit_directions(jax.random.key(7), 64, 6)
Z = jax.random.normal(KEY, (16, 3, 6)) * jnp.array([1.0, 2.0, 0.5, 1.0, 1.0, 0.1]) + 0.3
PATIENT = jnp.arange(16) // 2


def epps_pulley(values):
    """N times the weighted distance of a sample's characteristic function from the Gaussian's."""
    t = np.linspace(-3, 3, 33)
    phi = np.exp(1j * np.outer(t, values)).mean(axis=1)
    integrand = np.abs(phi - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2)
    return len(values) * np.trapezoid(integrand, t)


def test_directions_are_uniform_on_the_sphere():
    drawn = np.asarray(joint_losses.unit_directions(KEY, 4000, 5))
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(drawn.T @ drawn / 4000, np.eye(5) / 5, atol=0.02)


def test_sigreg_by_hand_and_its_known_values():
    along = np.einsum("bvd,md->vmb", Z, DIRECTIONS)
    by_hand = np.mean([[epps_pulley(values) for values in view] for view in along])
    assert float(joint_losses.sigreg(Z, DIRECTIONS)) == pytest.approx(by_hand, rel=1e-4)
    gaussian = jax.random.normal(KEY, (512, 4, 6))
    # N E|phi - g|^2 = 1 - g^2: the integral of (1 - exp(-t^2)) exp(-t^2 / 2) over [-3, 3]
    t = np.linspace(-3, 3, 33)
    expected = np.trapezoid((1 - np.exp(-(t**2))) * np.exp(-(t**2) / 2), t)
    assert expected == pytest.approx(1.053, abs=2e-3)
    assert float(joint_losses.sigreg(gaussian, DIRECTIONS)) == pytest.approx(expected, rel=0.2)
    collapsed = float(joint_losses.sigreg(jnp.zeros((512, 1, 6)), DIRECTIONS))
    assert collapsed == pytest.approx(epps_pulley(np.zeros(512)), rel=1e-4)
    assert collapsed == pytest.approx(0.402 * 512, rel=2e-3)
    assert float(joint_losses.sigreg(3 * gaussian, DIRECTIONS)) > 20


def test_sigreg_of_a_microbatch_counts_the_items_of_the_step():
    alone = float(joint_losses.sigreg(Z, DIRECTIONS))
    assert float(joint_losses.sigreg(Z, DIRECTIONS, number=64)) == pytest.approx(4 * alone)


def test_gradients_at_collapse():
    """Where all z are equal, SIGReg has one gradient for all of them, which moves them together;
    at the centre it has none. VISReg pushes them apart."""
    same = jnp.zeros((8, 1, 6))
    assert np.abs(jax.grad(joint_losses.sigreg)(same, DIRECTIONS)).max() < 1e-6

    def total(z):
        return sum(joint_losses.visreg(z, DIRECTIONS).values())

    for z in (same, same + 0.5):
        gradient = np.asarray(jax.grad(total)(z))
        assert np.isfinite(gradient).all() and np.ptp(gradient, axis=0).max() > 1


def test_visreg_by_hand():
    terms = joint_losses.visreg(Z, DIRECTIONS)
    z = np.asarray(Z, np.float64)
    mean, deviation = z.mean(0), z.std(0)
    assert float(terms["center"]) == pytest.approx(np.mean(mean**2), rel=1e-4)
    assert float(terms["scale"]) == pytest.approx(np.mean((1 - deviation) ** 2), rel=1e-4)
    from scipy.stats import norm

    quantiles = norm.ppf(np.arange(1, 17) / 17)
    quantiles /= quantiles.std()
    along = np.sort(np.einsum("bvd,md->vmb", (z - mean) / deviation, DIRECTIONS), axis=-1)
    assert float(terms["shape"]) == pytest.approx(np.mean((along - quantiles) ** 2), rel=1e-3)
    perfect = jnp.asarray(quantiles, jnp.float32)[:, None, None]
    one = joint_losses.visreg(perfect, jnp.ones((1, 1)))
    assert float(one["shape"]) < 1e-6 and float(one["scale"]) < 1e-6


@pytest.mark.parametrize("number", [8, 16, 64])
def test_visreg_keeps_small_batches_apart(number):
    """Projections in a plane and close together, as a new projector gives them: whoever follows
    the gradient of their size finds them apart."""
    keys = jax.random.split(jax.random.key(3), 2)
    plane = jax.random.normal(keys[0], (number, 2)) @ jax.random.normal(keys[1], (2, 64))
    plane = ((plane - jnp.mean(plane, axis=0)) / jnp.std(plane, axis=0))[:, None]
    directions = joint_losses.unit_directions(jax.random.key(4), 512, 64)
    gradient = jax.jit(
        jax.grad(lambda size: sum(joint_losses.visreg(size * plane, directions).values()))
    )
    size = 0.3
    for _ in range(100):
        size -= 0.1 * float(gradient(size))
    assert 0.6 < size < 1


def test_invariance_is_the_distance_from_the_global_centre():
    z = np.asarray(Z)
    expected = np.square(z - z[:, :2].mean(1, keepdims=True)).mean((1, 2))
    np.testing.assert_allclose(joint_losses.invariance(Z, 2), expected, rtol=1e-5)
    assert np.all(joint_losses.invariance(jnp.ones((4, 3, 2)), 2) == 0)


def test_vicreg_of_two_views_by_hand():
    z = np.asarray(Z[:, :2], np.float64)
    terms = joint_losses.vicreg(Z[:, :2])
    covariances = [np.cov(z[:, view].T) for view in (0, 1)]
    hinge = [np.maximum(0, 1 - np.sqrt(np.diag(c) + 1e-4)).mean() for c in covariances]
    off = [(np.square(c).sum() - np.square(np.diag(c)).sum()) / 6 for c in covariances]
    assert float(terms["invariance"]) == pytest.approx(np.mean((z[:, 0] - z[:, 1]) ** 2), rel=1e-4)
    assert float(terms["variance"]) == pytest.approx(sum(hinge), rel=1e-4)
    assert float(terms["covariance"]) == pytest.approx(sum(off), rel=1e-3)


def test_nt_xent_by_hand():
    z, temperature = np.asarray(Z[:4, :2], np.float64), 0.3
    unit = (z / np.linalg.norm(z, axis=-1, keepdims=True)).reshape(8, -1)
    likeness = np.exp(unit @ unit.T / temperature)
    losses = []
    for anchor in range(8):
        pair = anchor ^ 1
        others = [k for k in range(8) if k // 2 != anchor // 2]
        total = likeness[anchor, pair] + likeness[anchor, others].sum()
        losses.append(-np.log(likeness[anchor, pair] / total))
    found = joint_losses.nt_xent(Z[:4, :2], jnp.arange(4), temperature)
    np.testing.assert_allclose(found, np.reshape(losses, (4, 2)).mean(1), rtol=1e-4)


def test_a_second_slice_of_a_patient_is_no_negative_of_it():
    """Its loss is that of a batch without the second slice."""
    z = Z[:5, :2]
    twice = joint_losses.nt_xent(z, jnp.array([0, 1, 2, 3, 0]), 0.2)
    once = joint_losses.nt_xent(z[:4], jnp.arange(4), 0.2)
    assert float(twice[0]) == pytest.approx(float(once[0]), rel=1e-6)
    assert np.all(twice[1:4] > once[1:4])  # to the others it is one more
    alone = joint_losses.nt_xent(z, jnp.zeros(5, jnp.int32), 0.2)
    np.testing.assert_allclose(alone, 0, atol=1e-6)
    gradient = jax.grad(lambda z: jnp.sum(joint_losses.nt_xent(z, jnp.zeros(5, int), 0.2)))(z)
    assert np.isfinite(gradient).all()


def test_self_distillation_by_hand():
    student, teacher, centre = Z, Z[:, :2] * 0.7, jnp.full(6, 0.1)
    found = joint_losses.self_distillation(
        student, teacher, centre, student_temperature=0.1, teacher_temperature=0.05
    )

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    targets = softmax((np.asarray(teacher, np.float64) - 0.1) / 0.05)
    logs = np.log(softmax(np.asarray(student, np.float64) / 0.1))
    pairs = [(g, v) for g in (0, 1) for v in (0, 1, 2) if g != v]
    expected = np.mean([-(targets[:, g] * logs[:, v]).sum(-1) for g, v in pairs], axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


LOSSES = {
    "lejepa": lambda z: (
        joint_losses.sigreg(z, DIRECTIONS) + jnp.mean(joint_losses.invariance(z, 2))
    ),
    "visreg": lambda z: sum(joint_losses.visreg(z, DIRECTIONS).values()),
    "vicreg": lambda z: sum(joint_losses.vicreg(z).values()),
    "simclr": lambda z: jnp.mean(joint_losses.nt_xent(z, PATIENT, 0.2)),
    "dino": lambda z: jnp.mean(
        joint_losses.self_distillation(
            z, z[:, :2], jnp.zeros(6), student_temperature=0.1, teacher_temperature=0.05
        )
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_eight_devices_compute_the_loss_of_the_whole_batch(name):
    mesh = make_mesh(jax.devices()[:8])
    loss = jax.jit(jax.value_and_grad(LOSSES[name]))
    value, gradient = loss(jax.device_put(Z, split_along_batch(mesh)))
    one, one_gradient = loss(jax.device_put(Z, jax.devices()[0]))
    assert len(gradient.sharding.device_set) == 8
    assert float(value) == pytest.approx(float(one), rel=1e-5)
    np.testing.assert_allclose(gradient, one_gradient, rtol=1e-3, atol=1e-6)
    halves = [LOSSES[name](Z[:8]), LOSSES[name](Z[8:])] if name != "simclr" else [0.0]
    if name != "dino":  # its loss is a mean over items; the others compare them
        assert abs(float(np.mean(halves)) - float(one)) > 1e-3
