"""The official measure of the RSNA STR Pulmonary Embolism Detection challenge (2020): a weighted log loss over the
labels of exams and images. Lower is better.

The weight of an image is `IMAGE_WEIGHT` times the share of positive images of its exam, so that the images of an exam
without embolism count nothing.
"""

import numpy as np

from data_prep.system.errors import InputError

EXAM_WEIGHTS = {
    "negative_exam_for_pe": 0.0736196319,
    "indeterminate": 0.09202453988,
    "chronic_pe": 0.1042944785,
    "acute_and_chronic_pe": 0.1042944785,
    "central_pe": 0.1877300613,
    "leftsided_pe": 0.06257668712,
    "rightsided_pe": 0.06257668712,
    "rv_lv_ratio_gte_1": 0.2346625767,
    "rv_lv_ratio_lt_1": 0.0782208589,
}
EXAM_LABELS = tuple(EXAM_WEIGHTS)
IMAGE_WEIGHT = 0.07361963
CLIP = 1e-15  # probabilities are kept this far from 0 and 1: one that is surely wrong costs 34.5, not infinitely much


def rsna_log_loss(
    exam_labels: np.ndarray,
    exam_probabilities: np.ndarray,
    image_labels: np.ndarray,
    image_probabilities: np.ndarray,
    exam_index: np.ndarray,
) -> float:
    """Weighted log loss of a set of exams.

    With q the share of positive images of an exam and n their number, the sum over exams of (sum of w_j times the
    cross-entropy of label j + IMAGE_WEIGHT q times the sum of the images' cross-entropies) is divided by the sum over
    exams of (sum of w_j + IMAGE_WEIGHT q n).

    Args:
      exam_labels: [E, 9] 0 or 1, columns in the order of `EXAM_LABELS`.
      exam_probabilities: [E, 9] in [0, 1].
      image_labels: [N] 0 or 1, `pe_present_on_image`.
      image_probabilities: [N] in [0, 1].
      exam_index: [N] int in [0, E), the exam of each image.

    Returns:
      0 (all certain and right, up to `CLIP`) to 34.5 (all certain and wrong).

    Raises:
      InputError: shapes that do not fit, an exam without an image, a label other than 0 and 1, a probability outside
        [0, 1] or NaN.
    """
    exam_labels, image_labels = np.asarray(exam_labels, np.float64), np.asarray(image_labels, np.float64)
    exam_probabilities = np.asarray(exam_probabilities, np.float64)
    image_probabilities, exam_index = np.asarray(image_probabilities, np.float64), np.asarray(exam_index, np.int64)
    _check("exam", exam_labels, exam_probabilities, (len(exam_labels), len(EXAM_LABELS)))
    _check("image", image_labels, image_probabilities, (len(image_labels),))
    num_exams = len(exam_labels)
    if exam_index.shape != image_labels.shape or np.any((exam_index < 0) | (exam_index >= num_exams)):
        raise InputError(f"exam_index {list(exam_index.shape)} must name for each image one of the {num_exams} exams")
    num_images = np.bincount(exam_index, minlength=num_exams)
    if not num_images.all():
        raise InputError(f"exam {int(np.argmin(num_images))} has no image; leave it out, or give its images")
    weights = np.array(list(EXAM_WEIGHTS.values()))
    positive_share = np.bincount(exam_index, image_labels, num_exams) / num_images
    of_images = np.bincount(exam_index, _cross_entropy(image_labels, image_probabilities), num_exams)
    loss = _cross_entropy(exam_labels, exam_probabilities) @ weights + IMAGE_WEIGHT * positive_share * of_images
    weight = weights.sum() + IMAGE_WEIGHT * positive_share * num_images
    return float(loss.sum() / weight.sum())


def _check(what: str, labels: np.ndarray, probabilities: np.ndarray, shape: tuple[int, ...]) -> None:
    if labels.shape != shape or probabilities.shape != shape or labels.size == 0:
        columns = f"[exams, {len(EXAM_LABELS)}]" if what == "exam" else "[images]"
        raise InputError(
            f"{what} labels {list(labels.shape)} and probabilities {list(probabilities.shape)} must both be {columns}, "
            "not empty"
        )
    if not np.isin(labels, (0, 1)).all():
        raise InputError(f"{what} labels must be 0 or 1; leave exams without labels out")
    if not np.all((probabilities >= 0) & (probabilities <= 1)):
        raise InputError(f"{what} probabilities must lie in [0, 1]")


def _cross_entropy(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    probabilities = np.clip(probabilities, CLIP, 1 - CLIP)
    return -(labels * np.log(probabilities) + (1 - labels) * np.log1p(-probabilities))
