"""What the pictures of a run show beside its arrays: names of classes, window, a lung window."""

from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from ctssl_jax.data.labels import label_classes
from ctssl_jax.data.slices import NeighbourSource, selected_windows
from ctssl_jax.runs.strips import Legend
from ctssl_jax.tasks.table import get_task
from data_prep.dataset.reader import Dataset

LUNG_LEVELS = (-800, -400)  # HU, of windows in which nodules are seen beside the lung
_NO_LUNG_WINDOW = (
    "Nodules are seen best in a lung window; this dataset has none (prepare it with "
    "--window=-600,1500, too)."
)


class Setting(NamedTuple):
    """What belongs to the pictures of some slices.

    legend: see `Legend`.
    class_names: of the probabilities; empty without.
    images: [N, H, W, 1] float32 in [0, 1], shown instead of the model's input; None shows that.
    """

    legend: Legend
    class_names: tuple[str, ...]
    images: np.ndarray | None

    def complete(self, pictures: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays of `render_pictures`, for `strips`."""
        pictures = dict(pictures)
        if self.images is not None:
            pictures["input"] = self.images[: len(pictures["input"])]
        if self.class_names:
            pictures["class_names"] = np.array(self.class_names)
        return pictures


def setting(
    config: ml_collections.ConfigDict,
    dataset: Dataset,
    channels: Sequence[int],
    source: NeighbourSource,
    record_index: np.ndarray,
) -> Setting:
    """The setting of the pictures of records. Nodules are shown in a lung window of the dataset.

    Args:
      config: the training configuration.
      dataset: the dataset.
      channels: its channels that the model sees.
      source: of the split.
      record_index: [N], the records.
    """
    preparation, task = dataset.preparation, get_task(config.task)
    (window, *_), note, images = selected_windows(preparation, channels), "", None
    stretched = config.normalize != "window"
    if source.targets.mask and preparation["masks"]["source"] == "lidc_idri":
        windows = selected_windows(preparation, range(preparation["channels"]))
        low, high = LUNG_LEVELS
        lung = [number for number, (level, _) in enumerate(windows) if low <= level <= high]
        note = "" if lung else _NO_LUNG_WINDOW
        if lung:
            window, stretched = windows[lung[0]], False
            images = source.channel(record_index, lung[0])[..., None].astype(np.float32) / 255
    shown = f"Window {window[0]:g}/{window[1]:g} HU"
    if stretched:
        shown += ", each slice stretched"
    label = source.targets.label
    legend = Legend(
        label="SYNTHETIC" if preparation["synthetic"] else "",
        window=None if stretched else window,
        note=f"{shown}. {note}".strip(),
        classified=label or "each class",
    )
    class_names = label_classes(dataset, label)[0] if label else task.class_names
    return Setting(legend, class_names, images)
