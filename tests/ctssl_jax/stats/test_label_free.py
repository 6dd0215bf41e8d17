"""Label-free probes on embeddings whose answer is known."""

import numpy as np
import pytest

from ctssl_jax.stats.label_free import (
    PlacedSlices,
    label_free_scores,
    neighbour_recall,
    order_auroc,
    order_auroc_across,
    position_r2,
    position_r2_across,
    relative_position,
    slice_pairs,
)


def volumes(names, random, *, slices=40, spacing=2.5):
    """Volumes of random lengths of the same anatomy: place along the body, and its volume."""
    volume, z = [], []
    for name in names:
        number = slices + random.integers(0, 10)
        volume += [name] * number
        z += list(random.uniform(-300, 300) + spacing * np.arange(number))
    return np.array(volume), np.array(z)


def placed(names, embed, seed=0):
    """Slices whose embedding is a function of (relative position, random)."""
    random = np.random.default_rng(seed)
    volume, z = volumes(names, random)
    empty = PlacedSlices(np.zeros((len(z), 1)), volume, z, volume)
    return empty._replace(embedding=embed(relative_position(empty), random))


def informed(position, random):
    """The position along three directions of twenty, with noise."""
    noise = 0.1 * random.normal(size=(len(position), 20))
    noise[:, :3] += np.stack([position, np.sin(3 * position), position**2], axis=1)
    return noise


def uninformed(position, random):
    return random.normal(size=(len(position), 20))


def test_an_embedding_that_knows_the_position_gets_high_scores():
    train, test = placed("abcdef", informed), placed("xyz", informed, seed=1)
    scores = label_free_scores(train, test)
    assert list(scores) == ["position/linear/r2", "order/linear/auroc", "neighbours/knn/recall"]
    assert all(len(values) == 3 for values in scores.values())
    assert scores["position/linear/r2"].min() > 0.8
    assert scores["order/linear/auroc"].min() > 0.85


def test_noise_is_at_chance():
    train, test = placed("abcdef", uninformed), placed("xyz", uninformed, seed=1)
    scores = label_free_scores(train, test)
    assert np.abs(scores["position/linear/r2"]).max() < 0.1  # the strongest penalty: the mean
    assert np.abs(scores["order/linear/auroc"].mean() - 0.5) < 0.15
    chance = 8 / (len(test.z_mm) - 1)  # 4 neighbours on either side within 10 mm
    assert scores["neighbours/knn/recall"].mean() == pytest.approx(chance, abs=0.03)


def test_recall_counts_true_neighbours_of_the_same_volume():
    angle = np.linspace(0, np.pi, 9)
    path = np.stack([np.cos(angle), np.sin(angle), np.zeros(9)], axis=1)
    two = np.concatenate([path, path * [-1, -1, 0] + [0, 0, 9]])  # far from the first
    volume = np.repeat([0, 1], 9)
    slices = PlacedSlices(two, volume, np.tile(10.0 * np.arange(9), 2), volume)
    np.testing.assert_allclose(neighbour_recall(slices), 1.0)
    shuffled = slices._replace(z_mm=np.tile(10.0 * np.random.default_rng(0).permutation(9), 2))
    assert neighbour_recall(shuffled).mean() < 0.5
    np.testing.assert_array_equal(neighbour_recall(slices, radius_mm=5), [np.nan, np.nan])


def test_pairs_have_the_distance_and_the_order():
    slices = placed("ab", uninformed)
    pairs, first_higher = slice_pairs(slices, number=50, distance_mm=(5, 12), seed=3)
    assert pairs.shape == (100, 2)
    distance = slices.z_mm[pairs[:, 0]] - slices.z_mm[pairs[:, 1]]
    np.testing.assert_array_equal(distance > 0, first_higher)
    assert np.abs(distance).min() >= 5 and np.abs(distance).max() <= 12
    assert (slices.volume[pairs[:, 0]] == slices.volume[pairs[:, 1]]).all()
    assert len(np.unique(np.sort(pairs, axis=1), axis=0)) == 100
    assert 30 < first_higher.sum() < 70
    again = slice_pairs(slices, number=50, distance_mm=(5, 12), seed=3)
    np.testing.assert_array_equal(pairs, again[0])


def test_what_is_undefined_is_nan_and_stands_at_its_place():
    train, test = placed("abcd", informed), placed("xz", informed, seed=1)
    alone = PlacedSlices(test.embedding[:1], np.array(["y"]), np.array([4.0]), np.array(["y"]))
    together = PlacedSlices(
        *(np.concatenate([one, other]) for one, other in zip(test, alone, strict=True))
    )
    for values in label_free_scores(train, together).values():
        np.testing.assert_array_equal(np.isnan(values), [False, True, False])
    two = placed("ab", informed)
    for one in (placed("a", informed), two._replace(patient=np.zeros(len(two.volume)))):
        assert np.isnan(position_r2(one, test)).all() and np.isnan(order_auroc(one, test)).all()


def test_units_and_offsets_of_the_position_do_not_matter():
    train, test = placed("abcd", informed), placed("xyz", informed, seed=1)
    moved = test._replace(z_mm=test.z_mm + 1000)
    np.testing.assert_allclose(position_r2(train, test), position_r2(train, moved))
    turned = test._replace(z_mm=-test.z_mm)
    assert order_auroc(train, turned).max() < 0.15


def test_without_slices_to_fit_to_each_patient_is_scored_by_the_others():
    slices = placed("abcdef", informed)
    patient = np.where(np.isin(slices.volume, ["a", "b"]), "first", slices.volume)
    slices = slices._replace(patient=patient)
    scores = position_r2_across(slices)
    assert scores.shape == (6,) and scores.min() > 0.8
    others = ~np.isin(slices.volume, ["a", "b"])  # with four other patients: a part of its own
    train, test = (PlacedSlices(*(a[part] for a in slices)) for part in (others, ~others))
    np.testing.assert_allclose(scores[:2], position_r2(train, test))
    assert order_auroc_across(slices).min() > 0.85
    noise = order_auroc_across(placed("abcdef", uninformed)._replace(patient=patient))
    assert noise.shape == (6,) and np.abs(noise.mean() - 0.5) < 0.15


def test_one_scan_unlike_all_others_does_not_decide_the_mean():
    train, test = placed("abcdef", informed), placed("xyz", informed, seed=1)
    strange = np.where(test.volume == "x", 1e3, 1.0)[:, None] * test.embedding
    scores = position_r2(train, test._replace(embedding=strange))
    assert -6 < scores[0] < 0 and scores[1:].min() > 0.8


def test_the_penalty_is_chosen_by_patients_left_out():
    """Ten volumes of each of two patients, whose features tell the patient's own order: volumes
    left out of the same patient would take it for knowledge."""
    random = np.random.default_rng(0)
    slices = placed("abcdefghij", uninformed)
    second = np.isin(slices.volume, list("fghij"))
    place = relative_position(slices)
    turned = np.where(second, 1 - place, place)
    slices = slices._replace(
        patient=second.astype(int),
        embedding=turned[:, None] + 0.1 * random.normal(size=(len(place), 4)),
    )
    other = placed("xyz", uninformed, seed=1)
    other = other._replace(embedding=np.tile(relative_position(other)[:, None], 4))
    assert np.abs(position_r2(slices, other)).max() < 0.2  # nothing holds for a new patient


def test_few_pairs_of_one_order_are_undefined_and_no_crash():
    train, test = placed("abc", informed), placed("xy", informed, seed=1)
    first = np.concatenate([np.flatnonzero(train.volume == v)[:2] for v in "abc"])
    few = PlacedSlices(*(values[first] for values in train))  # a pair a volume
    for seed in range(5):
        scores = order_auroc(few, test, seed=seed)
        assert scores.shape == (2,) and np.isnan(scores).all()


def test_places_kept_as_float32_lose_no_neighbour_and_no_pair():
    """Spacing of 5 mm: both slices 10 mm away are neighbours, wherever the volume begins."""
    exact = 5.0 * np.arange(24)
    rounded = (exact - 146.6).astype(np.float32).astype(np.float64)
    assert np.any(np.diff(rounded[::2]) > 10)
    embedding = np.random.default_rng(0).normal(size=(24, 8))
    volume = np.array(["a"] * 24)

    def scores(first):
        slices = PlacedSlices(embedding, volume, (exact + first).astype(np.float32), volume)
        return neighbour_recall(slices)[0], slice_pairs(slices, distance_mm=(5.0, 30.0))[0].tolist()

    assert {scores(first)[0] for first in (0, -146.6, 33.37, 1011.1)} == {scores(0)[0]}
    assert scores(-146.6)[1] == scores(0)[1]
