"""A label read out of a frozen encoder: logistic regression on features of slices, and their
nearest neighbours.

Every encoder is asked for the same labels, whatever task it was trained on. The validation split
chooses the settings. Nothing here is random.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from ctssl_jax.ops import corruptions
from ctssl_jax.ops.images import to_unit_images
from ctssl_jax.probes.encoders import NEIGHBOURS, FrozenEncoder
from ctssl_jax.stats.volumes import auroc_one_vs_rest
from ctssl_jax.training.state import evaluation_keys

# of logistic regression (C), from the strongest penalty
INVERSE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class LabelTarget(NamedTuple):
    """A label to be told from a slice: one of `num_classes`; `transform` is (images, labels) ->
    images."""

    num_classes: int
    transform: Callable[[jax.Array, jax.Array], jax.Array]


LABELS = {"rotation": LabelTarget(4, corruptions.rotate), "flip": LabelTarget(3, corruptions.flip)}


class LabelFeatures(NamedTuple):
    """What a label is to be told from: pooled [N, F] float32, label [N] int32, record_index [N]
    int32."""

    pooled: np.ndarray
    label: np.ndarray
    record_index: np.ndarray


def labels_of(record_index: np.ndarray, num_classes: int) -> np.ndarray:
    """The labels that `ctssl_jax.evaluate` gives these records: [N] -> [N] int32."""
    return np.asarray(corruptions.random_labels(evaluation_keys(record_index), num_classes))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _transform(target: LabelTarget, channels: int, normalize: str, images, record_index):
    labels = corruptions.random_labels(evaluation_keys(record_index), target.num_classes)
    return target.transform(to_unit_images(images[:, 0], channels, normalize), labels), labels


def label_features(
    encoder: FrozenEncoder, target: LabelTarget, batches: Iterable[dict[str, np.ndarray]]
) -> LabelFeatures:
    """Transform each slice by its label and encode it.

    Args:
      encoder: the encoder.
      target: the label.
      batches: from `data.evaluation_batches`.
    """
    parts = []
    for batch in batches:
        inputs, label = _transform(
            target, encoder.channels, encoder.normalize, batch["images"], batch["record_index"]
        )
        values = (
            *jax.device_get((encoder.encode(encoder.state, inputs)[1], label)),
            batch["record_index"],
        )
        parts.append([value[batch["weight"] > 0] for value in values])
    return LabelFeatures(*(np.concatenate(values) for values in zip(*parts, strict=True)))


class Readout(NamedTuple):
    """A probe that has been fitted: pooled [N, F] -> probabilities [N, K], and the setting that was
    chosen."""

    probabilities: Callable[[np.ndarray], np.ndarray]
    chosen: float


def _fit(models: dict[float, Any], train: LabelFeatures, validation: LabelFeatures) -> Readout:
    """The model with the highest AUROC over all validation slices, then the highest accuracy, then
    the first."""
    scaler = StandardScaler().fit(train.pooled.astype(np.float64))
    features = scaler.transform(train.pooled.astype(np.float64))
    unseen = scaler.transform(validation.pooled.astype(np.float64))
    scores = {}
    for setting, model in models.items():
        probabilities = model.fit(features, train.label).predict_proba(unseen)
        accuracy = np.mean(probabilities.argmax(axis=1) == validation.label)
        scores[setting] = (auroc_one_vs_rest(probabilities, validation.label), accuracy)
    chosen = max(scores, key=scores.get)
    return Readout(
        lambda pooled: models[chosen].predict_proba(scaler.transform(pooled.astype(np.float64))),
        chosen,
    )


def fit_logistic(train: LabelFeatures, validation: LabelFeatures) -> Readout:
    """Multinomial logistic regression on standardised features.

    Args:
      train: every class occurs.
      validation: two classes or more occur; chooses the inverse penalty C.
    """
    models = {
        inverse: LogisticRegression(C=inverse, max_iter=1000) for inverse in INVERSE_PENALTIES
    }
    return _fit(models, train, validation)


def fit_neighbours(train: LabelFeatures, validation: LabelFeatures) -> Readout:
    """Shares of the classes among the nearest training slices, by cosine of standardised features;
    chooses how many."""
    models = {
        number: KNeighborsClassifier(number, metric="cosine", algorithm="brute")
        for number in NEIGHBOURS
        if number <= len(train.label)
    }
    return _fit(models, train, validation)
