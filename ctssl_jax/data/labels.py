"""Labels and masks of slices as numbers; classes of labels and attributes (sex, ethnic group, age).

The training split alone decides which classes an attribute has. A class with too few training
patients cannot be learned: decades of age are joined with their neighbours, and volumes of other
small classes are left out.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import SPLITS
from data_prep.system.errors import InputError

OF_VOLUMES = ("age", "sex", "ethnic_group")  # columns of volumes.csv
LEAST_PATIENTS = 10


class AttributeLabels(NamedTuple):
    """An attribute of every volume of a dataset.

    name: the attribute.
    classes: K names.
    labels: split -> [V] int64, the class of each volume in the order of `volumes.csv`; -1 for
      volumes that are left out.
    missing: split -> volumes without a value.
    too_small: class that was left out -> its volumes, of all splits.
    """

    name: str
    classes: tuple[str, ...]
    labels: dict[str, np.ndarray]
    missing: dict[str, int]
    too_small: dict[str, int]


def join_decades(
    decades: Sequence[int], patient_ids: Sequence[str], least_patients: int
) -> list[int]:
    """Join neighbouring decades of age to classes that have enough patients.

    From the youngest on, decades are joined until a class has enough patients. Decades that are too
    few for a last class join the class before.

    Args:
      decades: N, floor(age / 10) of each volume.
      patient_ids: N patients.
      least_patients: patients that a class needs.

    Returns:
      The first decade of each class without the youngest, rising; [] if all decades are one class.
    """
    starts, patients = [], set()
    for decade in sorted(set(decades)):
        if len(patients) >= least_patients:
            starts.append(decade)
            patients = set()
        patients |= {
            patient for patient, own in zip(patient_ids, decades, strict=True) if own == decade
        }
    return starts[:-1] if starts and len(patients) < least_patients else starts


def age_classes(starts: Sequence[int]) -> tuple[str, ...]:
    """Names of the classes that begin at these decades: [5, 7] -> `0-49`, `50-69`, `70+`."""
    edges = [0, *(10 * start for start in starts)]
    return (*(f"{low}-{high - 1}" for low, high in itertools.pairwise(edges)), f"{edges[-1]}+")


class AttributeRefused(InputError):
    """An attribute that cannot be learned. `reason` is the middle of the message."""

    def __init__(self, asked_by: str, reason: str, remedy: str):
        super().__init__(f"{asked_by}: {reason}; {remedy}")
        self.reason = reason


def read_attribute(
    dataset: Dataset,
    name: str,
    least_patients: int = LEAST_PATIENTS,
    *,
    asked_by: str = "config.label",
    remedy: str = "choose another label or a dataset of more patients",
) -> AttributeLabels:
    """The classes of an attribute and the class of every volume.

    Args:
      dataset: the dataset.
      name: `age`, `sex`, `ethnic_group`, or a label of volumes or patients of the dataset.
      least_patients: training patients that a class needs.
      asked_by: the user's flag or field with the attribute, for error messages.
      remedy: for the message that classes are too small.

    Raises:
      AttributeRefused: the attribute is unknown or a label of slices, or fewer than two of its
        classes are large enough.
    """
    values = _attribute_values(dataset, name, asked_by)
    known = [
        (value, volume["patient_id"])
        for value, volume in zip(values["train"], dataset.volumes("train"), strict=True)
        if value is not None
    ]
    if not known:
        raise AttributeRefused(
            asked_by,
            f"no training volume of the dataset has a value of {name}",
            "prepare it again with --attributes_csv, or choose another one",
        )
    if name == "age":
        starts = join_decades(
            [age // 10 for age, _ in known], [patient for _, patient in known], least_patients
        )
        names, too_small = age_classes(starts), {}
        indices = {
            split: [
                -1 if age is None else int(np.searchsorted(starts, age // 10, side="right"))
                for age in of_split
            ]
            for split, of_split in values.items()
        }
    else:
        patients = {
            value: {patient for own, patient in known if own == value} for value, _ in known
        }
        names = tuple(
            sorted(value for value, members in patients.items() if len(members) >= least_patients)
        )
        others = [
            value
            for of_split in values.values()
            for value in of_split
            if value is not None and value not in names
        ]
        too_small = {value: others.count(value) for value in sorted(set(others))}
        indices = {
            split: [names.index(value) if value in names else -1 for value in of_split]
            for split, of_split in values.items()
        }
    if len(names) < 2:
        raise AttributeRefused(
            asked_by,
            f"{name} has fewer than two classes with {least_patients} training patients",
            remedy,
        )
    missing = {split: of_split.count(None) for split, of_split in values.items()}
    return AttributeLabels(
        name,
        names,
        {split: np.array(of_split, np.int64) for split, of_split in indices.items()},
        missing,
        too_small,
    )


def _attribute_values(dataset: Dataset, name: str, asked_by: str) -> dict[str, list]:
    """split -> the attribute of each volume; None where it is missing."""
    labels = dataset.preparation["labels"]
    if name in OF_VOLUMES:
        of_volume = {
            volume["volume_id"]: None if volume[name] == "" else volume[name]
            for volume in dataset.volumes()
        }
    elif name not in labels:
        of_dataset = [label for label, facts in labels.items() if facts["level"] != "slice"]
        choices = ", ".join([*OF_VOLUMES, *of_dataset])
        raise AttributeRefused(
            asked_by, f"the dataset has no attribute {name!r}", f"choose of {choices}"
        )
    elif labels[name]["level"] == "slice":
        raise AttributeRefused(
            asked_by,
            f"{name} is a label of slices, not of patients",
            f"train on it with --config.label={name}",
        )
    else:
        classes = labels[name]["classes"]
        of_volume = {
            row["volume_id"]: None if row[name] is None else classes[row[name]]
            for row in dataset.labels()
        }
    return {
        split: [of_volume[volume["volume_id"]] for volume in dataset.volumes(split)]
        for split in SPLITS
    }


def label_classes(dataset: Dataset, label: str) -> tuple[tuple[str, ...], str]:
    """Names of a label's classes, and its level: `slice`, `volume` or `patient`.

    `label` is a label of the dataset, or `sex`, `ethnic_group` or `age` (decades) of volumes.csv.

    Raises:
      InputError: the dataset has no such label, or fewer than two of its classes are large enough.
    """
    labels = dataset.preparation["labels"]
    if label in labels:
        return tuple(labels[label]["classes"]), labels[label]["level"]
    if label in OF_VOLUMES:
        return read_attribute(dataset, label).classes, "volume"
    have = ", ".join([*labels, *OF_VOLUMES])
    raise InputError(
        f"config.label={label}: the dataset {dataset.name} has no such label (it has {have}); "
        "prepare it with --labels_csv or another --archive, or choose one that it has"
    )


def labels_of_records(dataset: Dataset, split: str, label: str) -> np.ndarray:
    """Class of every record of a split, -1 where it is missing: [R] int32."""
    volumes, labels = dataset.volumes(split), dataset.preparation["labels"]
    if label not in labels:
        of_volumes = read_attribute(dataset, label).labels[split]
        return np.repeat(of_volumes, [volume["num_slices"] for volume in volumes]).astype(np.int32)
    if labels[label]["level"] == "slice":
        values = [row[label] for row in dataset.slices(split)]
    else:
        of_volume = {row["volume_id"]: row[label] for row in dataset.labels()}
        values = [
            of_volume[volume["volume_id"]]
            for volume in volumes
            for _ in range(volume["num_slices"])
        ]
    return np.array([-1 if value is None else value for value in values], np.int32)


def mask_areas(dataset: Dataset, split: str) -> np.ndarray:
    """Foreground pixels of every record of a split, -1 where its scan has no mask: [R] int64."""
    areas = [row["mask_area_px"] for row in dataset.slices(split)]
    return np.array([-1 if area is None else area for area in areas], np.int64)


def lung_boxes(volumes: Sequence[dict], image_size: int) -> dict[str, np.ndarray]:
    """The box of the lungs of each volume: volume_id -> [4] float32 (top, left, bottom, right in
    pixels). A volume without a box gets the whole slice."""
    whole = f"0 0 {image_size} {image_size}"
    return {
        volume["volume_id"]: np.array((volume["lung_box"] or whole).split(), np.float32)
        for volume in volumes
    }
