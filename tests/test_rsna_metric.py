"""The challenge's weighted log loss on cases computed by hand."""

import math

import numpy as np
import pytest

from ctssl_jax.rsna_metric import EXAM_LABELS, EXAM_WEIGHTS, IMAGE_WEIGHT, rsna_log_loss
from data_prep.system.errors import InputError

NEGATIVE = np.array([label == "negative_exam_for_pe" for label in EXAM_LABELS], float)
POSITIVE = np.isin(EXAM_LABELS, ["central_pe", "leftsided_pe", "rv_lv_ratio_lt_1"]).astype(float)


def test_weights_of_an_exam_add_up_to_one():
    assert len(EXAM_LABELS) == 9
    assert sum(EXAM_WEIGHTS.values()) == pytest.approx(1, abs=1e-9)
    assert EXAM_WEIGHTS["rv_lv_ratio_gte_1"] == max(EXAM_WEIGHTS.values())


def test_everything_a_half_is_the_logarithm_of_two():
    loss = rsna_log_loss([POSITIVE], np.full((1, 9), 0.5), [0, 1, 1], [0.5] * 3, [0, 0, 0])
    assert loss == pytest.approx(math.log(2))


def test_one_exam():
    exam = np.full(9, 0.2)
    loss = rsna_log_loss([POSITIVE], [exam], [1, 0, 0, 1], [0.9, 0.1, 0.5, 0.5], [0] * 4)
    of_labels = sum(
        -weight * math.log(0.2 if positive else 0.8)
        for weight, positive in zip(EXAM_WEIGHTS.values(), POSITIVE, strict=True)
    )
    of_images = IMAGE_WEIGHT * 0.5 * (-2 * math.log(0.9) - 2 * math.log(0.5))
    assert loss == pytest.approx((of_labels + of_images) / (1 + IMAGE_WEIGHT * 0.5 * 4), abs=1e-9)


def test_two_exams_share_one_denominator():
    """Not the mean of two losses: an exam of more positive images weighs more."""
    labels, probabilities = [NEGATIVE, POSITIVE], [np.abs(NEGATIVE - 0.1), np.abs(POSITIVE - 0.4)]
    images, scores = [0, 0, 1, 1, 0], [0.7, 0.7, 0.9, 0.8, 0.3]
    loss = rsna_log_loss(labels, probabilities, images, scores, [0, 0, 1, 1, 1])
    of_images = IMAGE_WEIGHT * (2 / 3) * -(math.log(0.9) + math.log(0.8) + math.log(0.7))
    expected = (-math.log(0.9) - math.log(0.6) + of_images) / (2 + IMAGE_WEIGHT * (2 / 3) * 3)
    assert loss == pytest.approx(expected, abs=1e-9)
    mixed = rsna_log_loss(labels, probabilities, [1, 0, 0, 1, 0], [0.9, 0.7, 0.7, 0.8, 0.3], [1, 0, 0, 1, 1])
    assert mixed == pytest.approx(loss)  # images of an exam need not stand together


def test_images_of_a_negative_exam_count_nothing():
    exam = np.abs(NEGATIVE - 0.1)
    for scores in ([0, 0], [1, 1]):
        assert rsna_log_loss([NEGATIVE], [exam], [0, 0], scores, [0, 0]) == pytest.approx(-math.log(0.9))


def test_certain_predictions_are_clipped():
    assert 0 <= rsna_log_loss([POSITIVE], [POSITIVE], [1, 0], [1, 0], [0, 0]) < 1e-12
    wrong = rsna_log_loss([POSITIVE], [1 - POSITIVE], [1, 0], [0, 1], [0, 0])
    assert wrong == pytest.approx(-math.log(1e-15), rel=1e-3)
    assert wrong == rsna_log_loss([POSITIVE], np.float32([1 - POSITIVE]), [1, 0], np.float32([0, 1]), [0, 0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"exam_labels": np.zeros((1, 8))}, r"exam labels \[1, 8\]"),
        ({"exam_probabilities": np.zeros((2, 9))}, r"probabilities \[2, 9\] must both be \[exams, 9\]"),
        ({"image_probabilities": [0.5]}, r"image labels \[2\] and probabilities \[1\]"),
        ({"image_labels": [], "image_probabilities": [], "exam_index": []}, "not empty"),
        ({"exam_index": [0, 1]}, "must name for each image one of the 1 exams"),
        ({"exam_index": [0]}, "must name for each image"),
        ({"exam_labels": [POSITIVE] * 2, "exam_probabilities": [POSITIVE] * 2}, "exam 1 has no image"),
        ({"image_labels": [0, 2]}, "image labels must be 0 or 1"),
        ({"image_probabilities": [0.5, 1.5]}, "image probabilities must lie"),
        ({"exam_probabilities": np.full((1, 9), np.nan)}, "exam probabilities must lie"),
    ],
)
def test_wrong_inputs(changed, message):
    given = {"exam_labels": [POSITIVE], "exam_probabilities": [POSITIVE], "image_labels": [0, 1],
             "image_probabilities": [0.5, 0.5], "exam_index": [0, 0]}  # fmt: skip
    with pytest.raises(InputError, match=message):
        rsna_log_loss(**given | changed)
