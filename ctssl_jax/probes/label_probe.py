"""Labels, read out of a frozen encoder by logistic regression and by nearest neighbours.

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
    """A label of a slice.

    num_classes: its classes are 0 to num_classes - 1.
    transform: (images, labels) -> images that show their labels.
    """

    num_classes: int
    transform: Callable[[jax.Array, jax.Array], jax.Array]


LABELS = {"rotation": LabelTarget(4, corruptions.rotate), "flip": LabelTarget(3, corruptions.flip)}


class LabelFeatures(NamedTuple):
    """Pooled features [N, F] float32, label [N] int32 and record_index [N] int32 of slices."""

    pooled: np.ndarray
    label: np.ndarray
    record_index: np.ndarray


def labels_of(record_index: np.ndarray, num_classes: int) -> np.ndarray:
    """The labels of these records in `ctssl_jax.evaluate`: [N] int32 -> [N] int32."""
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
      batches: from `data.batches.evaluation_batches`.
    """
    parts = []
    for batch in batches:
        inputs, label = _transform(
            target, encoder.channels, encoder.normalize, batch["images"], batch["record_index"]
        )
        fetched, label = jax.device_get((encoder.encode(encoder.state, inputs)[1], label))
        values = encoder.finish(fetched), label, batch["record_index"]
        parts.append([value[batch["weight"] > 0] for value in values])
    return LabelFeatures(*(np.concatenate(values) for values in zip(*parts, strict=True)))


class Readout(NamedTuple):
    """A fitted probe.

    probabilities: pooled [N, F] -> probabilities [N, K].
    chosen: its setting.
    """

    probabilities: Callable[[np.ndarray], np.ndarray]
    chosen: float


def _fit(models: dict[float, Any], train: LabelFeatures, validation: LabelFeatures) -> Readout:
    """Fit all models to the training slices and take the one with the highest AUROC over all
    validation slices; of several the one with the highest accuracy, then the first."""
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
    the validation slices choose the number of neighbours."""
    models = {
        number: KNeighborsClassifier(number, metric="cosine", algorithm="brute")
        for number in NEIGHBOURS
        if number <= len(train.label)
    }
    return _fit(models, train, validation)
