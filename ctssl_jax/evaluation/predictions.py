"""The predictions of a model for each slice of a split, stored beside its results, so that arms of
an experiment can be compared in pairs.

The file contains labels, probabilities and pixel counts, and names slices, volumes and patients by
pseudonyms.
"""

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.system.errors import InputError
from data_prep.system.files import written_whole


class Predictions(NamedTuple):
    """One entry a slice, in the order of the records.

    patient_id, volume_id: [N] str, pseudonyms.
    slice_index: [N] int32, within the volume.
    label: [N] int32 true class; None for a segmentation.
    probabilities: [N, K] float32; None for a segmentation.
    intersection_px, predicted_px, target_px: [N] float32, pixels in both masks, in the predicted
      mask and in the true mask; None for a classification.
    """

    patient_id: np.ndarray
    volume_id: np.ndarray
    slice_index: np.ndarray
    label: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    intersection_px: np.ndarray | None = None
    predicted_px: np.ndarray | None = None
    target_px: np.ndarray | None = None


def path_of(result: Path) -> Path:
    """RESULT.json -> RESULT.predictions.npz."""
    return result.with_suffix(".predictions.npz")


def write(result: Path, predictions: Predictions) -> None:
    """Write the predictions beside RESULT.json."""
    present = {name: value for name, value in predictions._asdict().items() if value is not None}
    with written_whole(path_of(result)) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **present)


def read(result: Path) -> Predictions:
    """Read the predictions beside RESULT.json.

    Raises:
      InputError: there are none, or they are damaged.
    """
    path = path_of(result)
    try:
        with np.load(path) as arrays:
            return Predictions(**{name: arrays[name] for name in arrays.files})
    except (OSError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}); evaluate the run again"
        ) from error
