"""Statistics over volumes and patients: means, intervals by patient, one-vs-rest AUROC."""

import numpy as np
import pytest

from ctssl_jax.stats import binary, bootstrap, volumes


def test_slices_are_averaged_within_volumes():
    means = volumes.volume_means([1.0, 3.0, 10.0, 5.0], [0, 0, 1, 0], 2)
    np.testing.assert_allclose(means, [3, 10])
    with pytest.raises(ValueError, match="volume 1"):
        volumes.volume_means([1.0], [0], 2)


def test_summary_over_volumes_and_patients():
    summary = volumes.volume_summary([1.0, 2.0, 3.0, 6.0], ["a", "a", "b", "c"], seed=3)
    assert summary["mean"] == 3 and summary["sd"] == pytest.approx(np.std([1, 2, 3, 6], ddof=1))
    assert summary["num_volumes"] == 4 and summary["num_patients"] == 3
    low, high = summary["ci95"]
    assert low < 3 < high and 1.5 <= low and high <= 6
    assert volumes.volume_summary([1.0, 2.0, 3.0, 6.0], ["a", "a", "b", "c"], seed=3) == summary


def test_interval_is_drawn_by_patient_not_by_volume():
    rng = np.random.default_rng(0)
    patients = np.repeat([f"patient{i}" for i in range(20)], 10)
    values = np.repeat(rng.standard_normal(20), 10) + 0.01 * rng.standard_normal(200)
    low, high = volumes.volume_summary(values, patients)["ci95"]
    assert volumes.volume_summary(values, patients, seed=1)["ci95"] != [low, high]
    by_volume = volumes.volume_summary(values, [str(i) for i in range(200)])["ci95"]
    assert high - low > 2 * (by_volume[1] - by_volume[0])
    # Width of the normal approximation for 20 independent patients.
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / np.sqrt(20), rel=0.15)


def test_summary_of_one_volume_has_neither_spread_nor_interval():
    assert volumes.volume_summary([0.5], ["a"]) == {
        "mean": 0.5,
        "sd": None,
        "ci95": None,
        "num_volumes": 1,
        "num_patients": 1,
    }
    with pytest.raises(ValueError, match="at least one"):
        volumes.volume_summary([], [])


def test_both_bootstraps_draw_the_same_patients():
    rng = np.random.default_rng(2)
    values, patients = rng.random(50), [f"p{index % 17}" for index in range(50)]
    summary = volumes.volume_summary(values, patients, seed=4)
    mean = bootstrap.summaries(
        bootstrap.weighted_mean("mse", values), patients, {"mse": ""}, seed=4
    )["mse"]
    assert summary["mean"] == pytest.approx(mean["mean"], abs=1e-12)
    np.testing.assert_allclose(summary["ci95"], mean["ci95"], rtol=0, atol=1e-12)


def test_auroc_one_vs_rest_counts_the_pairs_and_equals_that_of_weights():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 40) / 6, rng.random(40) < 0.4  # many ties
    pairs = scores[positive][:, None] - scores[~positive][None, :]
    area = volumes.auroc_one_vs_rest(np.stack([-scores, scores], axis=1), positive.astype(int))
    assert area == pytest.approx(np.mean((pairs > 0) + 0.5 * (pairs == 0)), abs=1e-12)
    assert area == pytest.approx(
        binary.binary_statistic(positive, scores)(np.ones(40))["auroc"], abs=1e-12
    )


def test_auroc_one_vs_rest_is_the_mean_over_the_classes_that_occur():
    rng = np.random.default_rng(1)
    probabilities, labels = rng.random((30, 3)), rng.integers(0, 3, 30)
    weighted = binary.multiclass_statistic(labels, probabilities, "abc")(np.ones(30))["auroc"]
    assert volumes.auroc_one_vs_rest(probabilities, labels) == pytest.approx(weighted, abs=1e-12)
    absent = volumes.auroc_one_vs_rest(np.pad(probabilities, ((0, 0), (0, 1))), labels)
    assert absent == pytest.approx(weighted, abs=1e-12)
    assert np.isnan(volumes.auroc_one_vs_rest(probabilities, np.zeros(30, int)))
