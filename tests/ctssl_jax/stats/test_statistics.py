"""Binary measures, bootstrap by patient, comparisons and subgroups: scikit-learn's numbers,
hand-computed cases."""

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from ctssl_jax.evaluation import comparisons
from ctssl_jax.evaluation.predictions import Predictions
from ctssl_jax.stats import binary, bootstrap, subgroups
from data_prep.system.errors import InputError


def predictions_of_patients(num_patients=40, slices=10, seed=0, signal=1.5):
    """Labels, probabilities with ties and patients of slices, positives in half of the patients."""
    random = np.random.default_rng(seed)
    patient_ids = np.repeat([f"p{number:03d}" for number in range(num_patients)], slices)
    labels = (
        random.random(num_patients * slices) < np.repeat(np.arange(num_patients) % 2 * 0.5, slices)
    ).astype(int)
    scores = (
        random.normal(size=len(labels))
        + signal * labels
        + np.repeat(random.normal(size=num_patients), slices)
    )
    return labels, np.round(1 / (1 + np.exp(-scores)), 2), patient_ids


# ---- Measures ----


def test_ranked_measures_equal_scikit_learn_with_weights():
    random = np.random.default_rng(0)
    for _ in range(20):
        labels = random.integers(0, 2, 60)
        probabilities = np.round(random.random(60), 1)  # many ties
        weights = random.integers(0, 4, 60).astype(float)
        found = binary.binary_statistic(labels, probabilities)(weights)
        assert found["auroc"] == pytest.approx(
            roc_auc_score(labels, probabilities, sample_weight=weights)
        )
        expected = average_precision_score(labels, probabilities, sample_weight=weights)
        assert found["average_precision"] == pytest.approx(expected)


def test_measures_by_hand():
    found = binary.binary_statistic([1, 0, 1, 0], [0.9, 0.8, 0.3, 0.1], 0.5)(np.ones(4))
    assert found["auroc"] == 0.75  # of four pairs one is the wrong way round
    assert found["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["brier"] == pytest.approx((0.01 + 0.64 + 0.49 + 0.01) / 4)
    assert found["ece"] == pytest.approx((0.1 + 0.8 + 0.7 + 0.1) / 4)  # each in a bin of its own
    assert (found["sensitivity"], found["specificity"]) == (0.5, 0.5)
    twice = binary.binary_statistic([1, 0, 1, 0], [0.9, 0.8, 0.3, 0.1], 0.5)(
        np.array([3.0, 1, 1, 0])
    )
    assert (twice["sensitivity"], twice["specificity"]) == (0.75, 0)


def test_calibration_error_cancels_within_a_bin_and_not_between_bins():
    shared = binary.binary_statistic([1, 0], [0.5, 0.5])(np.ones(2))
    assert shared["ece"] == 0
    found = binary.binary_statistic([1, 1, 0, 0], [1.0, 0.95, 0.0, 0.05])(np.ones(4))
    # 1 belongs to the last of 15 bins, 0 to the first
    assert found["ece"] == pytest.approx((0.05 + 0.05) / 4)


def test_the_threshold_counts_as_positive_and_one_class_is_undefined():
    found = binary.binary_statistic([1, 1], [0.5, 0.4], 0.5)(np.ones(2))
    assert found["sensitivity"] == 0.5
    assert (
        math.isnan(found["specificity"])
        and math.isnan(found["auroc"])
        and found["average_precision"] == 1
    )
    none = binary.binary_statistic([0, 0], [0.5, 0.4], 0.5)(np.ones(2))
    assert (
        math.isnan(none["average_precision"])
        and math.isnan(none["sensitivity"])
        and none["specificity"] == 0.5
    )


def test_youden_threshold():
    labels, probabilities, _ = predictions_of_patients()
    threshold = binary.youden_threshold(labels, probabilities)
    assert threshold not in probabilities  # half-way
    false, true, _ = roc_curve(labels, probabilities)
    found = binary.binary_statistic(labels, probabilities, threshold)(np.ones(len(labels)))
    assert found["sensitivity"] + found["specificity"] - 1 == pytest.approx(np.max(true - false))
    assert binary.youden_threshold([0, 1, 0, 1], [0.1, 0.9, 0.3, 0.7]) == 0.5
    # nothing can be told: everything is positive
    assert binary.youden_threshold([0, 1], [0.4, 0.4]) == 0.4
    with pytest.raises(InputError, match="all validation labels are the same"):
        binary.youden_threshold([1, 1], [0.2, 0.3])


def test_exam_scores():
    probabilities, exam = [0.1, 0.9, 0.5, 0.2, 0.4], [1, 0, 1, 0, 0]
    np.testing.assert_allclose(binary.exam_scores(probabilities, exam, 2), [0.9, 0.5])
    np.testing.assert_allclose(binary.exam_scores(probabilities, exam, 2, top_k=2), [0.65, 0.3])
    np.testing.assert_allclose(binary.exam_scores(probabilities, exam, 2, top_k=9), [0.5, 0.3])
    np.testing.assert_array_equal(binary.exam_scores([0, 1, 0, 0, 0], exam, 2), [1, 0])
    with pytest.raises(InputError, match="every one of the 3 exams needs a slice"):
        binary.exam_scores(probabilities, exam, 3)
    with pytest.raises(InputError, match="top_k=0"):
        binary.exam_scores(probabilities, exam, 2, top_k=0)


def test_several_classes():
    labels = np.array([0, 0, 1, 1, 2, 2])
    probabilities = np.array(
        [
            [0.8, 0.1, 0.1],
            [0.5, 0.3, 0.2],
            [0.6, 0.3, 0.1],
            [0.1, 0.8, 0.1],
            [0.1, 0.1, 0.8],
            [0.3, 0.3, 0.4],
        ]
    )
    statistic = binary.multiclass_statistic(labels, probabilities, ["a", "b", "c"])
    found = statistic(np.ones(6))
    assert found["auroc/a"] == 7 / 8 and found["auroc/c"] == 1 and found["accuracy"] == 5 / 6
    expected = roc_auc_score(labels, probabilities, multi_class="ovr")
    assert found["auroc"] == pytest.approx(expected)
    # a draw that lacks a class
    assert math.isnan(statistic(np.array([1.0, 1, 1, 1, 0, 0]))["auroc"])
    four = np.concatenate([probabilities * 0.9, np.full((6, 1), 0.1)], axis=1)
    with_absent = binary.multiclass_statistic(labels, four, ["a", "b", "c", "d"])(np.ones(6))
    assert math.isnan(with_absent["auroc/d"]) and with_absent["auroc"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0, 1], [0.5], "must be lists of equal length"),
        ([], [], "not empty"),
        ([0, 2], [0.5, 0.5], "labels must be 0 or 1"),
        ([0, 1], [0.5, 1.5], r"probabilities must lie in \[0, 1\]"),
        ([0, 1], [0.5, math.nan], "1 of 2 are NaN"),
    ],
)
def test_wrong_predictions(labels, probabilities, message):
    with pytest.raises(InputError, match=message):
        binary.binary_statistic(labels, probabilities)


def test_wrong_requests():
    with pytest.raises(InputError, match="need a threshold"):
        binary.binary_statistic([0, 1], [0.1, 0.2], names=["sensitivity"])
    with pytest.raises(InputError, match="choose among auroc"):
        binary.binary_statistic([0, 1], [0.1, 0.2], names=["f1"])
    with pytest.raises(InputError, match="1 patient_ids for 2 labels"):
        binary.binary_summary([0, 1], [0.1, 0.2], ["p"])
    with pytest.raises(InputError, match="do not fit 2 labels of 3 classes"):
        binary.multiclass_statistic([0, 1], [[0.5, 0.5], [0.5, 0.5]], ["a", "b", "c"])
    with pytest.raises(InputError, match="labels must be 0 to 1"):
        binary.multiclass_statistic([0, 2], [[0.5, 0.5], [0.5, 0.5]], ["a", "b"])
    with pytest.raises(InputError, match="no slice or volume"):
        bootstrap.patient_bootstrap(bootstrap.weighted_mean("mean", []), [])


# ---- Bootstrap ----


def test_whole_patients_are_drawn():
    patient_ids, seen = ["b", "a", "b", "c", "a", "b"], []

    def of_patients(patient_index, num_patients):
        # the items of a patient have one number, and so are drawn together
        assert patient_index.tolist() == [1, 0, 1, 2, 0, 1] and num_patients == 3
        return lambda times: seen.extend(times.tolist()) or {"n": times[:, 0]}

    statistic = bootstrap.Statistic(6, of_patients)
    estimates, draws = bootstrap.patient_bootstrap(statistic, patient_ids, num_resamples=50)
    assert seen[0] == [1, 1, 1] and estimates == {"n": 1} and len(seen) == 51
    assert all(sum(times) == 3 for times in seen)  # as many patients as there are
    assert draws["n"].tolist() == [times[0] for times in seen[1:]]
    assert len({tuple(times) for times in seen}) > 5


def test_draws_are_the_same_in_blocks_of_any_size(monkeypatch):
    """All measures; curves and pairs of patients give the same AUROC to the last bit."""
    labels, probabilities, patient_ids = predictions_of_patients()
    index = np.unique(patient_ids, return_inverse=True)[1]
    found = []
    for block, most_pairs in ((2**20, 2**24), (900, 0)):
        monkeypatch.setattr(bootstrap, "BLOCK", block)
        monkeypatch.setattr(binary, "_MOST_PAIRS", most_pairs)
        times = np.concatenate(list(bootstrap.draw_patients(40, 60, 3)))
        statistic = binary.binary_statistic(labels, probabilities, 0.5)
        auroc = binary.binary_statistic(labels, probabilities, names=["auroc"])
        values = statistic.of_patients(index, 40)(times)
        np.testing.assert_array_equal(auroc.of_patients(index, 40)(times)["auroc"], values["auroc"])
        assert times.shape == (60, 40)
        for row in (0, 59):  # a patient that is drawn twice weighs twice
            alone = statistic(times[row, index])
            assert {name: value[row] for name, value in values.items()} == pytest.approx(alone)
        found.append({"times": times, **values})
    for name, values in found[0].items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-14, err_msg=name)


def test_interval_by_patient_is_that_of_patient_means():
    """A mean whose slices agree within patients: the interval has the width of as many patients,
    not of slices."""
    random = np.random.default_rng(0)
    values = random.normal(size=100)
    patient_ids = np.repeat([f"p{number}" for number in range(100)], 40)
    statistic = bootstrap.weighted_mean("mean", np.repeat(values, 40))
    found = bootstrap.summaries(statistic, patient_ids, {"mean": "none"}, volume_ids=patient_ids)[
        "mean"
    ]
    low, high = found["ci95"]
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.1)
    assert found["mean"] == pytest.approx(values.mean())
    assert (found["num_slices"], found["num_volumes"], found["num_patients"]) == (4000, 100, 100)
    again = bootstrap.summaries(statistic, patient_ids, {"mean": "none"}, volume_ids=patient_ids)[
        "mean"
    ]
    assert again == found
    other = bootstrap.summaries(statistic, patient_ids, {"mean": "none"}, seed=1)["mean"]
    assert other["ci95"] != found["ci95"] and "num_slices" not in other


def test_intervals_cover_the_truth():
    """Of 60 intervals of AUROCs whose true value is known, about 95 % contain it."""
    truth = 0.8556  # of two normal distributions 1.5 standard deviations apart: Phi(1.5 / sqrt 2)
    covered = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        labels = np.arange(200) % 2
        probabilities = 1 / (1 + np.exp(-random.normal(size=200) - 1.5 * labels))
        patients = [f"p{number}" for number in range(200)]
        statistic = binary.binary_statistic(labels, probabilities, names=["auroc"])
        found = bootstrap.summaries(statistic, patients, {"auroc": ""}, num_resamples=200)["auroc"]
        covered += found["ci95"][0] <= truth <= found["ci95"][1]
    assert 53 <= covered <= 60


def test_undefined_draws_are_dropped_and_counted():
    found = binary.binary_summary([1, 0, 0], [0.9, 0.2, 0.4], ["a", "b", "c"], num_resamples=1000)
    auroc = found["auroc"]
    assert auroc["mean"] == 1 and auroc["ci95"] == [1, 1]
    # of 27 draws 8 lack the positive and 1 has nothing else
    assert auroc["num_undefined_draws"] == pytest.approx(1000 * 9 / 27, abs=50)
    assert found["brier"]["num_undefined_draws"] == 0
    alone = binary.binary_summary([1, 0], [0.9, 0.2], ["a", "a"], 0.5, num_resamples=10)
    assert all(value["ci95"] is None and value["num_patients"] == 1 for value in alone.values())
    one_class = binary.binary_summary([0, 0], [0.9, 0.2], ["a", "b"], num_resamples=10)["auroc"]
    assert one_class["mean"] is None and one_class["ci95"] is None


def test_summary_of_slices():
    labels, probabilities, patient_ids = predictions_of_patients()
    found = binary.binary_summary(labels, probabilities, patient_ids, 0.5, volume_ids=patient_ids)
    assert set(found) == set(binary.MEASURES)
    for name, value in found.items():
        assert set(value) == {
            "mean",
            "sd",
            "ci95",
            "num_slices",
            "num_volumes",
            "num_patients",
            "unit",
            "num_undefined_draws",
        }
        # never below 0
        assert value["ci95"][0] <= value["mean"] <= value["ci95"][1] or name == "ece"
        assert value["num_slices"] == 400 and value["num_patients"] == 40


# ---- Comparisons ----


def test_the_paired_interval_is_narrower_than_the_arms_own():
    labels, probabilities, patient_ids = predictions_of_patients()
    worse = np.clip(probabilities + np.random.default_rng(1).normal(0, 0.1, len(labels)), 0, 1)
    arms = [binary.binary_statistic(labels, arm, names=["auroc"]) for arm in (probabilities, worse)]
    found = comparisons.paired_difference([arms[0]], [arms[1]], patient_ids, num_resamples=500)
    assert found["a"] == pytest.approx(roc_auc_score(labels, probabilities))
    assert found["b"] == pytest.approx(roc_auc_score(labels, worse))
    assert found["difference"] == found["a"] - found["b"] > 0
    (low, high), own = (
        found["ci95"],
        bootstrap.summaries(arms[0], patient_ids, {"auroc": ""})["auroc"]["ci95"],
    )
    assert low < found["difference"] < high and high - low < own[1] - own[0]
    back = comparisons.paired_difference([arms[1]], [arms[0]], patient_ids, num_resamples=500)
    assert back["difference"] == -found["difference"] and back["p"] == found["p"]


def test_p_values():
    labels, probabilities, patient_ids = predictions_of_patients(signal=3)
    arm = binary.binary_statistic(labels, probabilities, names=["auroc"])
    noise = np.random.default_rng(1).random(len(labels))
    chance = binary.binary_statistic(labels, noise, names=["auroc"])
    same = comparisons.paired_difference([arm], [arm], patient_ids, num_resamples=99)
    assert same["p"] == 1 and same["ci95"] == [0, 0]
    better = comparisons.paired_difference([arm, arm], [chance], patient_ids, num_resamples=99)
    assert better["p"] == pytest.approx(2 / 100) and better["ci95"][0] > 0


def test_p_values_of_equal_arms_are_uniform():
    """Two arms that are equally good: about one in ten comparisons has p below 0.1."""
    below = 0
    for seed in range(80):
        random = np.random.default_rng(seed)
        arms = [[bootstrap.weighted_mean("dice", random.normal(size=60))] for _ in range(2)]
        found = comparisons.paired_difference(
            *arms, [f"p{number}" for number in range(60)], num_resamples=300
        )
        below += found["p"] < 0.1
    assert 2 <= below <= 17


def test_seeds_are_averaged():
    values = [
        bootstrap.weighted_mean("dice", np.array(numbers))
        for numbers in ([0.2, 0.4], [0.6, 0.8], [0.1, 0.3])
    ]
    found = comparisons.paired_difference(values[:2], values[2:], ["a", "b"], num_resamples=20)
    assert found["a"] == pytest.approx(0.5) and found["difference"] == pytest.approx(0.3)
    assert found["ci95"] == pytest.approx([0.3, 0.3])  # the same for both patients


def classified(labels, probabilities, patient_ids):
    """Predictions of two classes, every slice of a patient in one volume."""
    both = np.stack([1 - probabilities, probabilities], axis=1).astype(np.float32)
    return Predictions(
        patient_ids, patient_ids, np.arange(len(labels), dtype=np.int32), labels, both
    )


def test_arms_are_compared_by_their_predictions():
    labels, probabilities, patient_ids = predictions_of_patients()
    arm, other = (
        classified(labels, probabilities, patient_ids),
        classified(labels, 1 - probabilities, patient_ids),
    )
    found = comparisons.paired_comparison([arm], [other], "auroc", num_resamples=50)
    assert found["a"] + found["b"] == pytest.approx(1) and found["p"] == pytest.approx(2 / 51)
    reordered = Predictions(*(value[::-1] if value is not None else None for value in arm))
    with pytest.raises(InputError, match="not measured on the same slices"):
        comparisons.paired_comparison([arm], [reordered], "auroc")
    with pytest.raises(InputError, match="dice cannot be compared"):
        comparisons.paired_comparison([arm], [other], "dice")
    with pytest.raises(InputError, match="has no run"):
        comparisons.paired_comparison([], [other], "auroc")
    alone = arm._replace(patient_id=np.full(len(labels), "p"))
    with pytest.raises(InputError, match="1 patients cannot be compared"):
        comparisons.paired_comparison([alone], [alone], "auroc")
    one_class = classified(np.zeros_like(labels), probabilities, patient_ids)
    with pytest.raises(InputError, match="one class only"):
        comparisons.paired_comparison([one_class], [one_class], "auroc", num_resamples=5)


def test_masks_are_compared_on_annotated_slices():
    names, index, areas = np.array(["a", "a", "b"]), np.arange(3), np.array([4.0, 0, 4])
    arms = [
        Predictions(
            names,
            names,
            index,
            intersection_px=np.array(both),
            predicted_px=np.array(predicted),
            target_px=areas,
        )
        for both, predicted in (([4.0, 0, 2], [4.0, 0, 4]), ([2.0, 0, 0], [4.0, 9, 4]))
    ]
    found = comparisons.paired_comparison(arms[:1], arms[1:], "dice", num_resamples=20)
    # the slice without a true mask counts for neither
    assert (found["a"], found["b"]) == (0.75, 0.25)


def test_holm():
    np.testing.assert_allclose(comparisons.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(comparisons.holm([0.5, 0.9]), [1, 1])
    assert comparisons.holm([]) == [] and comparisons.holm([0.2]) == [0.2]
    for wrong in ([0.5, math.nan], [1.1]):
        with pytest.raises(InputError, match="outside"):
            comparisons.holm(wrong)


def test_draws_follow_the_rows_and_a_correction_that_cannot_succeed_is_refused():
    assert [comparisons.draws_of_family(rows) for rows in (1, 50, 90)] == [20_000, 20_000, 36_000]
    for rows in (1, 90, 5_000):
        smallest = comparisons.smallest_p(comparisons.draws_of_family(rows), 100)
        assert max(comparisons.holm([smallest] * rows, [smallest] * rows)) < 0.01
    old = comparisons.smallest_p(2000, 100)
    with pytest.raises(
        InputError, match=r"90 comparisons cannot give a p below 0.05.*36,000 draws"
    ):
        comparisons.holm([old] * 90, [old] * 90)
    few = comparisons.smallest_p(20_000, 4)  # draws do not make up for patients
    assert few == 2 / 2**4
    with pytest.raises(InputError, match=r"each p is 0.12 or more.*of 6 patients or more"):
        comparisons.holm([few], [few])
    assert comparisons.holm([0.03125], [comparisons.smallest_p(20_000, 6)]) == [0.03125]


def test_p_of_few_patients_and_of_arms_that_rounding_alone_parts():
    numbers = np.array([0.1, 0.2, 0.3])
    arms = [[bootstrap.weighted_mean("dice", numbers + more)] for more in (0.5, 0.0)]
    found = comparisons.paired_difference(*arms, ["a", "b", "c"])
    assert found["ci95"][0] > 0 and found["p"] == 0.25 == found["smallest_p"]
    assert found["num_draws"] == 20_000
    values = [bootstrap.weighted_mean("dice", numbers + seed / 3) for seed in range(3)]
    found = comparisons.paired_difference(values, values[::-1], ["a", "b", "c"])
    assert found["p"] == 1


# ---- Subgroups ----


def test_performance_by_group():
    labels, probabilities, patient_ids = predictions_of_patients(num_patients=60)
    number = np.array([int(name[1:]) for name in patient_ids])
    groups = np.where(number < 20, "F", np.where(number < 40, "M", np.where(number < 46, "O", "")))
    worse = np.where(groups == "M", 1 - probabilities, probabilities)
    found = subgroups.performance_by_group(labels, worse, patient_ids, groups, num_resamples=200)
    assert set(found["groups"]) == {"F", "M"} and found["num_without_group"] == 140
    assert found["too_small"] == {"O": {"num_positive_patients": 3, "num_negative_patients": 6}}
    for name in "FM":
        own = groups == name
        group = found["groups"][name]
        assert group["mean"] == pytest.approx(roc_auc_score(labels[own], worse[own]))
        assert (group["num_items"], group["num_patients"]) == (200, 20)
    gap = found["gap"]
    assert gap["mean"] == pytest.approx(found["groups"]["F"]["mean"] - found["groups"]["M"]["mean"])
    assert gap["ci95"][0] > 0.2 and (gap["highest"], gap["lowest"], gap["num_patients"]) == (
        "F",
        "M",
        40,
    )


def test_one_group_has_no_gap_and_none_is_refused():
    labels, probabilities, patient_ids = predictions_of_patients()
    settings = {"threshold": 0.5, "num_resamples": 20}
    found = subgroups.performance_by_group(
        labels, probabilities, patient_ids, ["F"] * 400, "sensitivity", **settings
    )
    assert found["gap"] is None and found["groups"]["F"]["mean"] == np.mean(
        probabilities[labels == 1] >= 0.5
    )
    with pytest.raises(InputError, match="no group has 5 patients"):
        subgroups.performance_by_group(labels, probabilities, patient_ids, patient_ids)


def test_age_bands():
    bands = [subgroups.age_band(age) for age in (0, 9, 59, 60, 89, 90, None)]
    assert bands == ["0-9", "0-9", "50-59", "60-69", "80-89", "90+", ""]


@pytest.mark.parametrize("num_patients", [4, 13])
def test_differences_of_few_patients_are_not_found_where_there_are_none(num_patients):
    """Of 300 comparisons without a difference about 15 intervals may exclude 0; the percentiles of
    the draws alone would exclude it in 60 and 27."""
    random = np.random.default_rng(5)
    patients = [str(patient) for patient in range(num_patients)]
    excluded, small = 0, 0
    for seed in range(300):
        values = random.normal(size=(2, num_patients))
        arms = [[bootstrap.weighted_mean("mse", side)] for side in values]
        found = comparisons.paired_difference(*arms, patients, num_resamples=400, seed=seed)
        low, high = found["ci95"]
        excluded += low * high > 0
        small += found["p"] < 0.05
    assert excluded <= 27 and small <= 27


def test_equal_differences_of_all_patients_leave_no_doubt_but_their_number():
    arms = [[bootstrap.weighted_mean("mse", np.full(13, value))] for value in (0.3, 0.1)]
    found = comparisons.paired_difference(*arms, [str(n) for n in range(13)])
    assert found["ci95"] == pytest.approx([0.2, 0.2]) and found["p"] == found["smallest_p"]
