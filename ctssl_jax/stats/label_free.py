"""Probes that need no label: where in the chest a slice lies, by its embedding.

Every scan says where its slices lie, so that real scans without any label can tell frozen encoders
apart. All functions are of embeddings, the volume of each slice and its place in mm. Linear probes
are fitted to the slices of some patients, choose their penalty by patients left out of the fit, and
are scored on other patients. A score is one number a volume, so that intervals can be by patient.

    position    relative place between the lowest (0) and the highest (1) slice of the volume, by
                ridge regression: R^2 (1 is perfect, 0 is the volume's mean, below 0 is worse).
                What is predicted beyond 0 or 1 counts as 0 or 1, where all places are: else one
                scan unlike all others, with an R^2 of -100, would decide a mean
    order       which of two slices of a volume lies higher, by logistic regression of the
                difference of their embeddings: AUROC (chance .5)
    neighbours  the nearest slices by cosine, among the slices of all scored volumes: the share of
                them that lie within 10 mm in the same volume, with as many retrieved as lie there.
                Nothing is fitted. Chance is their share of all slices, so that the measure compares
                encoders on the same slices, and not data.

These are tasks of this project, not of the paper.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from ctssl_jax.stats.binary import auroc, curve, rank

PENALTIES = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)  # of ridge regression
INVERSE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # of logistic regression (C)
PAIRS = 200  # of a volume
DISTANCE_MM = (3.0, 30.0)  # of the two slices of a pair: farther ones are told apart by anything
RADIUS_MM = 10.0  # of neighbours
_ROUNDING_MM = 1e-3  # places are kept as float32: 10 mm between two slices may read as 10.00001
_FOLDS = 4


class PlacedSlices(NamedTuple):
    """Slices of some volumes.

    embedding: [N, F] float.
    volume: [N] int or str, the volume of each slice.
    z_mm: [N] float, place along the body; grows towards superior (`position_mm` of a dataset).
    patient: [N] int or str, the patient of each slice.
    """

    embedding: np.ndarray
    volume: np.ndarray
    z_mm: np.ndarray
    patient: np.ndarray


def relative_position(slices: PlacedSlices) -> np.ndarray:
    """[N] float64: 0 for the lowest slice of each volume, 1 for its highest; NaN for a volume of
    one place."""
    place = np.full(len(slices.z_mm), np.nan)
    for volume in np.unique(slices.volume):
        inside = slices.volume == volume
        z = np.asarray(slices.z_mm[inside], np.float64)
        if np.ptp(z) > 0:
            place[inside] = (z - z.min()) / np.ptp(z)
    return place


def position_r2(train: PlacedSlices, test: PlacedSlices) -> np.ndarray:
    """R^2 of the relative position within each volume.

    Args:
      train: two patients or more; fit the regression, and choose its penalty by patients left out.
      test: other patients.

    Returns:
      [V] float64 in the order of `np.unique(test.volume)`, 1 at best, and with even spacing above
      -3 (all predicted at one end) unless the order is reversed; NaN for a volume of one place, and
      everywhere where fewer than two patients can be fitted to.
    """
    target = relative_position(train)
    kept = ~np.isnan(target)
    if len(np.unique(train.patient[kept])) < 2:
        return np.full(len(np.unique(test.volume)), np.nan)
    model = _search(Ridge(), {"ridge__alpha": PENALTIES}, train.patient[kept])
    model.fit(_features(train)[kept], target[kept], groups=train.patient[kept])
    predicted, target = np.clip(model.predict(_features(test)), 0, 1), relative_position(test)
    scores = []
    for volume in np.unique(test.volume):
        inside = test.volume == volume
        spread = np.sum((target[inside] - target[inside].mean()) ** 2)
        error = np.sum((target[inside] - predicted[inside]) ** 2)
        scores.append(1 - error / spread if spread > 0 else np.nan)
    return np.array(scores)


def slice_pairs(
    slices: PlacedSlices,
    *,
    number: int = PAIRS,
    distance_mm: Sequence[float] = DISTANCE_MM,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of slices of a volume, in random order.

    Args:
      slices: the slices.
      number: pairs of a volume at most, drawn without replacement.
      distance_mm: the least and the greatest distance of the two.
      seed: of the choice and of the order; equal arguments give equal pairs.

    Returns:
      [P, 2] int places of the two slices, and [P] bool, whether the first lies higher.
    """
    random = np.random.default_rng(seed)
    chosen = [np.zeros((0, 2), np.int64)]
    for volume in np.unique(slices.volume):
        inside = np.flatnonzero(slices.volume == volume)
        z = np.asarray(slices.z_mm, np.float64)[inside]
        higher = z[:, None] - z[None, :]
        low, high = distance_mm
        pairs = np.argwhere((higher >= low - _ROUNDING_MM) & (higher <= high + _ROUNDING_MM))
        pairs = pairs[random.permutation(len(pairs))[:number]]
        chosen.append(inside[pairs])
    pairs = np.concatenate(chosen)
    first_higher = random.random(len(pairs)) < 0.5
    return np.where(first_higher[:, None], pairs, pairs[:, ::-1]), first_higher


def order_auroc(
    train: PlacedSlices,
    test: PlacedSlices,
    *,
    number: int = PAIRS,
    distance_mm: Sequence[float] = DISTANCE_MM,
    seed: int = 0,
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
) -> np.ndarray:
    """AUROC of which of two slices of a volume lies higher.

    Args:
      train: two patients or more; fit the regression, and choose its penalty by patients left out.
      test: other patients.
      number, distance_mm, seed: as in `slice_pairs`.
      inverse_penalties: that are tried.

    Returns:
      [V] float64 in [0, 1], in the order of `np.unique(test.volume)`; NaN for a volume without such
      pairs, or whose pairs are all in one order, and everywhere where fewer than two patients, or
      parts of them whose pairs are all in one order, can be fitted to.
    """
    pairs, label = slice_pairs(train, number=number, distance_mm=distance_mm, seed=seed)
    groups = train.patient[pairs[:, 0]]
    folds = list(_folds(groups).split(pairs, groups=groups)) if len(np.unique(groups)) > 1 else []
    # of few pairs a part may have one order alone, which nothing can be fitted to
    if not folds or any(np.ptp(label[part].astype(int)) == 0 for fold in folds for part in fold):
        return np.full(len(np.unique(test.volume)), np.nan)
    # one scale for both slices of a pair; without an intercept, exchanged slices get the other sign
    scale = StandardScaler().fit(_features(train))
    first, second = (scale.transform(_features(train))[pairs[:, side]] for side in (0, 1))
    model = GridSearchCV(
        LogisticRegression(fit_intercept=False, max_iter=1000),
        {"C": inverse_penalties},
        scoring="roc_auc",
        cv=folds,
    ).fit(first - second, label)
    pairs, label = slice_pairs(test, number=number, distance_mm=distance_mm, seed=seed)
    first, second = (scale.transform(_features(test))[pairs[:, side]] for side in (0, 1))
    scores = model.decision_function(first - second) if len(pairs) else np.zeros(0)
    of_pair = test.volume[pairs[:, 0]]
    return np.array(
        [_auroc(label[of_pair == one], scores[of_pair == one]) for one in np.unique(test.volume)]
    )


def neighbour_recall(slices: PlacedSlices, *, radius_mm: float = RADIUS_MM) -> np.ndarray:
    """Share of the true neighbours of a slice among its nearest slices by embedding.

    Args:
      slices: of all scored volumes; each is searched for among all others.
      radius_mm: a slice of the same volume within it is a true neighbour. As many are retrieved as
        there are, so that the share of those found is the share of right ones, too.

    Returns:
      [V] float64 in [0, 1], mean over the slices that have neighbours, in the order of
      `np.unique(slices.volume)`; NaN for a volume without any.
    """
    features = normalize(StandardScaler().fit_transform(_features(slices)))
    z, found = np.asarray(slices.z_mm, np.float64), np.full(len(features), np.nan)
    reach = radius_mm + _ROUNDING_MM
    for index, feature in enumerate(features):
        near = (slices.volume == slices.volume[index]) & (np.abs(z - z[index]) <= reach)
        near[index] = False
        number = np.count_nonzero(near)
        if number:
            likeness = features @ feature
            likeness[index] = -np.inf
            nearest = np.argpartition(-likeness, number - 1)[:number]
            found[index] = np.mean(near[nearest])
    of_volumes = [found[slices.volume == one] for one in np.unique(slices.volume)]
    return np.array(
        [np.nan if np.isnan(values).all() else np.nanmean(values) for values in of_volumes]
    )


def label_free_scores(
    train: PlacedSlices, test: PlacedSlices, *, seed: int = 0
) -> dict[str, np.ndarray]:
    """All three probes with their own settings.

    Returns:
      `position/linear/r2`, `order/linear/auroc` and `neighbours/knn/recall` -> [V] float64, in the
      order of `np.unique(test.volume)`.
    """
    return {
        "position/linear/r2": position_r2(train, test),
        "order/linear/auroc": order_auroc(train, test, seed=seed),
        "neighbours/knn/recall": neighbour_recall(test),
    }


def position_r2_across(slices: PlacedSlices) -> np.ndarray:
    """`position_r2` without slices to fit to: each patient is scored by a fit to other patients.

    Args:
      slices: of three patients or more, who are scored in at most four parts.

    Returns:
      [V] float64, in the order of `np.unique(slices.volume)`.
    """
    return _across(position_r2, slices)


def order_auroc_across(slices: PlacedSlices) -> np.ndarray:
    """`order_auroc` without slices to fit to, as `position_r2_across`.

    It is for validations, which should be short: at most 2,000 pairs of all volumes (ten of each at
    least), and one penalty.
    """
    number = max(10, min(PAIRS, 2_000 // len(np.unique(slices.volume))))
    score = functools.partial(order_auroc, number=number, inverse_penalties=(1e-2,))
    return _across(score, slices)


def _across(
    score: Callable[[PlacedSlices, PlacedSlices], np.ndarray], slices: PlacedSlices
) -> np.ndarray:
    volumes = np.unique(slices.volume)
    scores = np.full(len(volumes), np.nan)
    folds = _folds(slices.patient).split(slices.z_mm, groups=slices.patient)
    for others, held_out in folds:
        train, test = (PlacedSlices(*(a[part] for a in slices)) for part in (others, held_out))
        scores[np.isin(volumes, test.volume)] = score(train, test)
    return scores


def _features(slices: PlacedSlices) -> np.ndarray:
    return np.asarray(slices.embedding, np.float64)


def _folds(groups: np.ndarray) -> GroupKFold:
    return GroupKFold(min(_FOLDS, len(np.unique(groups))))


def _search(model: Ridge, settings: dict[str, tuple], groups: np.ndarray) -> GridSearchCV:
    """The model on standardised features with the setting that is best for patients left out."""
    return GridSearchCV(
        make_pipeline(StandardScaler(), model),
        settings,
        scoring="neg_mean_squared_error",
        cv=_folds(groups),
    )


def _auroc(label: np.ndarray, scores: np.ndarray) -> float:
    if not 0 < np.count_nonzero(label) < len(label):
        return np.nan
    return float(auroc(curve(rank(label, scores), np.ones(len(label)))))
