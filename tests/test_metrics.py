"""SSIM against scikit-image, codebook statistics, statistics over volumes and patients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctssl_jax import metrics


def image_pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    noise = rng.random((3, 40, 56, 1))
    smooth = 0.5 + 0.5 * np.sin(
        np.arange(40)[:, None, None] / 7 + np.arange(56)[:, None] / 11 + np.arange(3)[:, None, None, None]
    )
    return {
        "noise": (noise, rng.random(noise.shape)),
        "slightly different": (smooth, np.clip(smooth + 0.02 * rng.standard_normal(smooth.shape), 0, 1)),
        "flat and bright": (1 - 0.01 * noise, 1 - 0.01 * rng.random(noise.shape)),
        "constant": (np.zeros((1, 16, 16, 1)), np.full((1, 16, 16, 1), 0.1)),
        "three channels": (rng.random((2, 32, 32, 3)), rng.random((2, 32, 32, 3))),
        "smallest": (rng.random((2, 11, 11, 1)), rng.random((2, 11, 11, 1))),
    }


@pytest.mark.parametrize("name", image_pairs())
def test_ssim_agrees_with_scikit_image(name):
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    first, second = (images.astype(np.float32) for images in image_pairs()[name])
    expected = [
        structural_similarity(
            x.astype(np.float64),
            y.astype(np.float64),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=-1,
        )
        for x, y in zip(first, second, strict=True)
    ]
    np.testing.assert_allclose(jax.jit(metrics.ssim)(first, second), expected, atol=1e-5)


def test_ssim_of_equal_images_is_one_and_its_gradient_is_finite():
    x = jax.random.uniform(jax.random.key(0), (2, 16, 16, 1))
    np.testing.assert_allclose(jax.jit(metrics.ssim)(x, x), 1, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: metrics.ssim(x, jnp.zeros_like(x)).sum()))(x)
    assert np.all(np.isfinite(gradient)) and np.any(gradient != 0)


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match="at least 11"):
        metrics.ssim(jnp.zeros((1, 10, 16, 1)), jnp.zeros((1, 10, 16, 1)))


def test_ssim_adds_no_large_constants_to_the_program():
    shape = jax.ShapeDtypeStruct((1, 512, 512, 1), jnp.float32)
    assert len(jax.jit(metrics.ssim).lower(shape, shape).as_text()) < 50_000


def test_unit_range_clips_or_rescales():
    images = jnp.array([[-1.0, 0.0], [1.0, 3.0]]).reshape(1, 2, 2, 1)
    np.testing.assert_allclose(metrics.to_unit_range(images).ravel(), [0, 0, 1, 1])
    np.testing.assert_allclose(metrics.to_unit_range(images, rescale=True).ravel(), [0, 0.25, 0.5, 1])
    assert np.all(metrics.to_unit_range(jnp.full((1, 4, 4, 1), 7.0), rescale=True) == 0)


def test_code_statistics():
    codes = jnp.array([[[0, 1], [1, 3]], [[2, 2], [2, 2]]])
    np.testing.assert_array_equal(metrics.code_counts(codes, 5), [1, 2, 4, 1, 0])
    counts = metrics.code_counts(codes, 5, weight=jnp.array([1.0, 0.0]))
    np.testing.assert_array_equal(counts, [1, 2, 0, 1, 0])
    assert metrics.used_codes(counts) == 3
    assert metrics.perplexity(counts) == pytest.approx(2**1.5)
    assert metrics.perplexity(np.ones(64)) == pytest.approx(64)
    assert metrics.perplexity(np.eye(8)[0]) == pytest.approx(1)
    assert metrics.perplexity(np.zeros(8)) == 0


def test_slices_are_averaged_within_volumes():
    means = metrics.volume_means([1.0, 3.0, 10.0, 5.0], [0, 0, 1, 0], 2)
    np.testing.assert_allclose(means, [3, 10])
    with pytest.raises(ValueError, match="volume 1"):
        metrics.volume_means([1.0], [0], 2)


def test_summary_over_volumes_and_patients():
    summary = metrics.volume_summary([1.0, 2.0, 3.0, 6.0], ["a", "a", "b", "c"], seed=3)
    assert summary["mean"] == 3 and summary["sd"] == pytest.approx(np.std([1, 2, 3, 6], ddof=1))
    assert summary["num_volumes"] == 4 and summary["num_patients"] == 3
    low, high = summary["ci95"]
    assert low < 3 < high and 1.5 <= low and high <= 6
    assert metrics.volume_summary([1.0, 2.0, 3.0, 6.0], ["a", "a", "b", "c"], seed=3) == summary


def test_interval_is_drawn_by_patient_not_by_volume():
    rng = np.random.default_rng(0)
    patients = np.repeat([f"patient{i}" for i in range(20)], 10)
    values = np.repeat(rng.standard_normal(20), 10) + 0.01 * rng.standard_normal(200)
    low, high = metrics.volume_summary(values, patients)["ci95"]
    assert metrics.volume_summary(values, patients, seed=1)["ci95"] != [low, high]
    by_volume = metrics.volume_summary(values, [str(i) for i in range(200)])["ci95"]
    assert high - low > 2 * (by_volume[1] - by_volume[0])
    # Width of the normal approximation for 20 independent patients.
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / np.sqrt(20), rel=0.15)


def test_summary_of_one_volume_has_neither_spread_nor_interval():
    assert metrics.volume_summary([0.5], ["a"]) == {
        "mean": 0.5,
        "sd": None,
        "ci95": None,
        "num_volumes": 1,
        "num_patients": 1,
    }
    with pytest.raises(ValueError, match="at least one"):
        metrics.volume_summary([], [])


def test_auroc_counts_the_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 40) / 6, rng.random(40) < 0.4  # many ties
    pairs = scores[positive][:, None] - scores[~positive][None, :]
    expected = np.mean((pairs > 0) + 0.5 * (pairs == 0))
    assert metrics.auroc(scores, positive) == pytest.approx(expected, abs=1e-12)
    assert metrics.auroc(positive * 1.0, positive) == 1 and metrics.auroc(~positive * 1.0, positive) == 0
    assert np.isnan(metrics.auroc(scores, np.ones(40, bool)))


def test_auroc_one_vs_rest_is_the_mean_over_defined_classes():
    rng = np.random.default_rng(1)
    probabilities, labels = rng.random((30, 3)), rng.integers(0, 3, 30)
    areas = [metrics.auroc(probabilities[:, k], labels == k) for k in range(3)]
    assert metrics.auroc_one_vs_rest(probabilities, labels) == pytest.approx(np.mean(areas))
    absent = metrics.auroc_one_vs_rest(np.pad(probabilities, ((0, 0), (0, 1))), labels)
    assert absent == pytest.approx(np.mean(areas))
    assert np.isnan(metrics.auroc_one_vs_rest(probabilities, np.zeros(30, int)))


def test_codebook_use():
    assert metrics.codebook_use(np.array([2.0, 2.0, 0.0])) == {
        "perplexity": pytest.approx(2), "used_codes": 2, "dead_codes": 1,
    }  # fmt: skip
    assert metrics.codebook_use(None) == {}
