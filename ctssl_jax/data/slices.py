"""Slices of a dataset as the items of batches.

An item is a tuple of neighbouring slices of one volume, named by their offsets: (0,) for most
tasks, (0, 1) for next-slice prediction, (-1, 0, 1) for three adjacent slices, or for three slices
of a slab of some mm. A task can add a label, a mask, a box or the number of the patient.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ctssl_jax.data.labels import label_classes, labels_of_records, lung_boxes, mask_areas
from data_prep.dataset.reader import Dataset
from data_prep.system.errors import InputError


def select_channels(preparation: dict, windows: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """Channels of a dataset with the wanted windows.

    Args:
      preparation: content of `preparation.json`.
      windows: (level, width) pairs in HU; empty selects all channels.

    Raises:
      InputError: the dataset was prepared without one of the windows.
    """
    prepared = [
        (float(window["level"]), float(window["width"])) for window in preparation["windows"]
    ]
    if not windows:
        return tuple(range(len(prepared)))
    wanted = [(float(level), float(width)) for level, width in windows]
    for window in wanted:
        if window not in prepared:
            have = ", ".join(f"{level:g}/{width:g}" for level, width in prepared)
            flag = f"--window={window[0]:g},{window[1]:g}"
            raise InputError(
                f"config.windows asks for level/width {window[0]:g}/{window[1]:g}, but the dataset "
                f"holds {have}; prepare it again with {flag}, or change config.windows"
            )
    return tuple(prepared.index(window) for window in wanted)


def selected_windows(preparation: dict, channels: Sequence[int]) -> list[tuple[float, float]]:
    """(level, width) in HU of some channels of a dataset."""
    windows = [preparation["windows"][channel] for channel in channels]
    return [(float(window["level"]), float(window["width"])) for window in windows]


class Targets(NamedTuple):
    """The data that a task needs beside the slices, and the slices that it uses.

    label: name of a label of the dataset; slices without it are left out. "": no label.
    mask: add the slice's mask: 0 background, k the k-th region of its volume.
    lung_box: add the box of the volume's lungs.
    repeat_edges: replace a neighbour beyond the volume's end or a gap by the slice itself; else the
      item is left out.
    middle_only: use the middle slice of each volume alone (its largest body cross-section).
    positive_share: share of slices with a positive label or with foreground in training batches;
      both kinds are used up before they repeat. 0 keeps the dataset's share.
    step_mm: offsets are multiples of this distance, see `neighbour_table`; 0: of slices.
    patient: add the number of the patient.
    shuffled: in the training split, each item has the label or mask of another one, drawn by the
      source's seed: a control.
    """

    label: str = ""
    mask: bool = False
    lung_box: bool = False
    repeat_edges: bool = False
    middle_only: bool = False
    positive_share: float = 0.0
    step_mm: float = 0.0
    patient: bool = False
    shuffled: bool = False


SLICES_ALONE = Targets()


def neighbour_table(
    volumes: Sequence[dict],
    offsets: Sequence[int],
    *,
    repeat_edges: bool = False,
    middle_only: bool = False,
    step_mm: float = 0.0,
) -> np.ndarray:
    """Record numbers of every tuple of neighbours that lies in one volume and has no gap.

    Args:
      volumes: rows of `volumes.csv` of one split (`first_record`, `num_slices`, `middle_slice`, and
        `gap_positions`: the slice indices, separated by blanks, whose next slice is missing).
      offsets: slice offsets with 0, e.g. (0, 1).
      repeat_edges: replace neighbours that do not exist by the slice at offset 0.
      middle_only: only tuples around the middle slice of each volume.
      step_mm: above 0, offsets are multiples of this distance by the volume's median spacing
        (`slice_spacing_mm`), rounded towards 0: no two neighbours are further apart than their
        offsets say. Of neighbours beyond the volume's end or a gap the last slice before it is
        taken.

    Returns:
      `[N, len(offsets)] int64`, in record order.
    """
    tables = []
    for volume in volumes:
        index = np.arange(volume["num_slices"])
        if middle_only:
            index = index[volume["middle_slice"] : volume["middle_slice"] + 1]
        steps = np.asarray(offsets)
        if step_mm:
            spacing = volume["slice_spacing_mm"] or math.inf  # of a single slice there is none
            reach = step_mm * steps + 1e-3 * np.sign(steps)  # a median spacing of 2.000001 is 2
            steps = np.trunc(reach / spacing).astype(np.int64)
        neighbours = index[:, None] + steps[None, :]
        starts = np.zeros(volume["num_slices"], np.int64)
        starts[np.array(volume["gap_positions"].split(), np.int64) + 1] = 1
        segment = np.cumsum(starts)
        if step_mm:
            first, last = (
                np.searchsorted(segment, segment[index], side) for side in ("left", "right")
            )
            neighbours = np.clip(neighbours, first[:, None], last[:, None] - 1)
        inside = (neighbours >= 0) & (neighbours < volume["num_slices"])
        exists = inside & (
            segment[np.where(inside, neighbours, index[:, None])] == segment[index[:, None]]
        )
        if repeat_edges:
            neighbours = np.where(exists, neighbours, index[:, None])
        else:
            neighbours = neighbours[exists.all(axis=1)]
        tables.append(neighbours + volume["first_record"])
    return np.concatenate(tables) if tables else np.zeros((0, len(offsets)), np.int64)


def training_subset(volumes: Sequence[dict], fraction: float, seed: int) -> list[dict]:
    """The volumes of a fraction of the studies; a larger fraction extends a smaller one.

    Args:
      volumes: rows of `volumes.csv` of one split.
      fraction: fraction of the studies, above 0 and up to 1; rounded up to whole studies.
      seed: seed of the order of the studies.
    """
    studies = sorted({volume["exam_id"] for volume in volumes})
    order = np.random.default_rng(seed).permutation(len(studies))
    taken = {studies[index] for index in order[: math.ceil(round(fraction * len(studies), 9))]}
    return [volume for volume in volumes if volume["exam_id"] in taken]


class NeighbourSource:
    """Random access to tuples of neighbouring slices of one split.

    An item has these arrays:

        images        [len(offsets), H, W, C] uint8
        record_index  int32, the record of the slice at offset 0, counted within the split
        weight        float32, 1
        label         int32, with `Targets.label`
        mask          [H, W] uint8, with `Targets.mask`
        box           [4] float32, with `Targets.lung_box`, see `labels.lung_boxes`
        patient       int32, with `Targets.patient`, the patient's number within the items

    Attributes:
      targets: see `Targets`.
      volumes: rows of `volumes.csv` of the items.
      table: [N, len(offsets)] int64 record numbers.
      labels: [N] int32 class of each item; None without a label.
      label_level: what has the label: `slice`, `volume` or `patient`; "" without a label.
      positive: [N] bool, items with a label above 0 or with foreground; None without label and
        mask.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        channels: Sequence[int],
        offsets: Sequence[int],
        targets: Targets = SLICES_ALONE,
        fraction: float = 1.0,
        seed: int = 0,
        most_bytes: float | None = None,
    ):
        preparation = dataset.preparation
        self.targets = targets
        self.volumes = dataset.volumes(split)
        self.num_studies = len({volume["exam_id"] for volume in self.volumes})
        if fraction < 1:
            self.volumes = training_subset(self.volumes, fraction, seed)
        self.table = neighbour_table(
            self.volumes,
            offsets,
            repeat_edges=targets.repeat_edges,
            middle_only=targets.middle_only,
            step_mm=targets.step_mm,
        )
        self._centre = list(offsets).index(0)
        self.labels, self.positive, self.label_level = None, None, ""
        centres = self.table[:, self._centre]
        if targets.label:
            labels = labels_of_records(dataset, split, targets.label)[centres]
            self.table, self.labels = self.table[labels >= 0], labels[labels >= 0]
            self.positive = self.labels > 0
            of_dataset = preparation["labels"].get(targets.label, {"level": "volume"})
            self.label_level = of_dataset["level"]
        elif targets.mask:
            areas = mask_areas(dataset, split)[centres]
            self.table, self.positive = self.table[areas >= 0], areas[areas >= 0] > 0
        self._of_another = None
        if targets.shuffled and split == "train":
            self._of_another = np.random.default_rng([seed, 1]).permutation(len(self.table))
            self.labels = None if self.labels is None else self.labels[self._of_another]
            self.positive = self.positive[self._of_another]
        self._records = dataset.source(split, most_bytes) if len(self.table) else None
        self._channels = (
            None if tuple(channels) == tuple(range(preparation["channels"])) else list(channels)
        )
        self._boxes = (
            lung_boxes(self.volumes, preparation["image_size"]) if targets.lung_box else {}
        )
        share = f", {fraction:g} of seed {seed}" if fraction < 1 else ""
        self._name = (
            f"NeighbourSource({dataset.fingerprint[:16]}, {split}, {channels}, {offsets}{share})"
        )
        if targets != SLICES_ALONE:
            self._name = f"{self._name[:-1]}, {targets})"

    def __len__(self) -> int:
        return len(self.table)

    @functools.cached_property
    def patients(self) -> np.ndarray:
        """[N] int64, the patient of each item, numbered from 0 in the order of the volumes."""
        starts = np.array([volume["first_record"] for volume in self.volumes])
        ids = [volume["patient_id"] for volume in self.volumes]
        numbers = {patient: number for number, patient in enumerate(dict.fromkeys(ids))}
        order = np.argsort(starts)
        of_volumes = np.array([numbers[patient] for patient in ids])[order]
        within = np.searchsorted(starts[order], self.table[:, self._centre], side="right") - 1
        return of_volumes[within]

    @functools.cached_property
    def shards(self) -> np.ndarray:
        """[N] int64, the shard of each item, numbered from 0. Volumes are never cut."""
        return self._records.shards_of(self.table[:, self._centre])

    def open(self) -> None:
        """Takes the folder of a bounded copy now, see `SliceSource.open`."""
        self._records.open()

    def close(self) -> None:
        """Ends the fetching of a bounded copy; nothing is read after it."""
        self._records.close()

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Says which shards will be read soon."""
        self._records.fetch_ahead(shards)

    def __getitem__(self, item: int) -> dict[str, np.ndarray]:
        return {name: values[0] for name, values in self.read(np.array([item])).items()}

    def read(self, items: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of items [b], with a leading axis of length b. Each slice is copied once."""
        numbers = self.table[items]
        channels = slice(None) if self._channels is None else self._channels
        records = [[self._records[number] for number in row] for row in numbers.tolist()]
        first = records[0][0]["image"][..., channels]
        images = np.empty((*numbers.shape, *first.shape), np.uint8)
        for row, place in zip(records, images, strict=True):
            for record, image in zip(row, place, strict=True):
                image[...] = record["image"][..., channels]
        centres = [row[self._centre] for row in records]
        arrays = {
            "images": images,
            "record_index": numbers[:, self._centre].astype(np.int32),
            "weight": np.ones(len(items), np.float32),
        }
        if self.labels is not None:
            arrays["label"] = self.labels[items]
        if self.targets.mask:
            masked = centres
            if self._of_another is not None:
                others = self.table[self._of_another[items], self._centre]
                masked = [self._records[number] for number in others.tolist()]
            arrays["mask"] = np.stack([record["mask"] for record in masked])
        if self.targets.lung_box:
            arrays["box"] = np.stack([self._boxes[record["volume_id"]] for record in centres])
        if self.targets.patient:
            arrays["patient"] = self.patients[items].astype(np.int32)
        return arrays

    def channel(self, record_index: np.ndarray, channel: int) -> np.ndarray:
        """A channel of the dataset, whether the items have it or not: [N] records -> [N, H, W]
        uint8."""
        images = [self._records[record]["image"] for record in record_index.tolist()]
        return np.stack([image[..., channel] for image in images])

    def position_mm(self, record_index: np.ndarray) -> np.ndarray:
        """Places along the body, growing to superior: [N] records -> [N] float64."""
        return np.array([self._records[record]["position_mm"] for record in record_index.tolist()])

    def __repr__(self) -> str:
        return self._name


def open_source(
    dataset: Dataset,
    split: str,
    channels: Sequence[int],
    offsets: Sequence[int],
    targets: Targets = SLICES_ALONE,
    *,
    fraction: float = 1.0,
    seed: int = 0,
    most_bytes: float | None = None,
) -> NeighbourSource:
    """Open a split, or a fraction of its studies.

    `most_bytes`: of shards that lie on this machine at a time, see `Dataset.source`.

    Raises:
      InputError: the split is empty, no neighbours have these offsets, or the dataset lacks the
        targets.
    """
    if targets.label:
        label_classes(dataset, targets.label)
    if targets.mask and not dataset.preparation["masks"]:
        raise InputError(
            f"the dataset {dataset.name} has no masks; prepare it with --archive=lidc_idri or with "
            "--masks_dir=DIR"
        )
    source = NeighbourSource(dataset, split, channels, offsets, targets, fraction, seed, most_bytes)
    if not source.volumes:
        raise InputError(
            f"the dataset {dataset.name} has no {split} split; prepare it with --splits that give "
            f"{split} a share (every split takes a patient or more)"
        )
    if not len(source):
        kind = f"slices with the label {targets.label}" if targets.label else "slices"
        raise InputError(
            f"the {split} split of {dataset.name} has no {kind} with neighbours at offsets "
            f"{tuple(offsets)}; choose a smaller distance, or prepare longer scans"
        )
    return source
