"""The cohort of a dataset: table of volumes, patients and labels, and a sheet of random slices."""

import collections
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import MASK_AREA_COLUMN

_THIN_MM = 3.0
_TILE = 192
_FONT_SIZE = 16
_LABEL_HEIGHT = 46
_TITLE_HEIGHT = 26
_MAX_COLUMNS = 4


def label_rows(dataset: Dataset) -> list[tuple[str, str, str]]:
    """(group, item, value) rows of a dataset with labels or masks: numbers of slices, volumes or
    patients of each class by split, and of regions by split and malignancy."""
    volumes, slices, regions = dataset.volumes(), dataset.slices(), dataset.regions()
    split_of = {v["volume_id"]: v["split"] for v in volumes}
    patient_of = {v["volume_id"]: v["patient_id"] for v in volumes}
    splits = list(dict.fromkeys(split_of.values()))
    rows = []

    def add(group: str, item: str, splits_of_items: list[str]) -> None:
        numbers = collections.Counter(splits_of_items)
        rows.append((group, item, ", ".join(f"{split} {numbers[split]}" for split in splits)))

    for name, facts in dataset.preparation["labels"].items():
        level = facts["level"]
        values = [
            (row["volume_id"], row[name])
            for row in (slices if level == "slice" else dataset.labels())
        ]
        if level == "patient":  # one volume stands for its patient
            values = list(
                {patient_of[volume]: (volume, value) for volume, value in values}.values()
            )
        for index, text in [*enumerate(facts["classes"]), (None, "missing")]:
            class_splits = [split_of[volume] for volume, value in values if value == index]
            if class_splits or index is not None:
                add(f"Label {name} ({level}s)", text, class_splits)
    if slices and MASK_AREA_COLUMN in slices[0]:
        add(
            "Masks",
            "slices with foreground",
            [split_of[row["volume_id"]] for row in slices if row[MASK_AREA_COLUMN]],
        )
        unknown = [split_of[row["volume_id"]] for row in slices if row[MASK_AREA_COLUMN] is None]
        if unknown:
            add("Masks", "slices of scans without a mask", unknown)
        add("Masks", "regions", [split_of[row["volume_id"]] for row in regions])
    for score in sorted({row.get("malignancy") for row in regions} - {None}):
        rated = [split_of[row["volume_id"]] for row in regions if row["malignancy"] == score]
        add("Masks", f"nodules of malignancy {score}", rated)
    return rows


def cohort_table(
    volumes: list[dict[str, Any]], rejected: list[dict[str, str]]
) -> list[tuple[str, str, str]]:
    """(group, item, value) rows: the characteristics of the paper's Table I, and rejections by
    reason."""
    known = [v for v in volumes if v["slice_thickness_mm"] is not None]
    groups = {
        "Volumes, slices": volumes,
        "Slice thickness < 3 mm: volumes, slices": [
            v for v in known if v["slice_thickness_mm"] < _THIN_MM
        ],
        "Slice thickness 3 mm: volumes, slices": [
            v for v in known if v["slice_thickness_mm"] == _THIN_MM
        ],
        "Contrast-enhanced: volumes, slices": [v for v in volumes if v["contrast"]],
        "Contrast unknown: volumes, slices": [v for v in volumes if v["contrast"] is None],
    }
    rows = [
        ("Dataset", item, f"{len(group)}, {sum(volume['num_slices'] for volume in group)}")
        for item, group in groups.items()
    ]
    for split, number in collections.Counter(v["split"] for v in volumes).items():
        patients = {v["patient_id"] for v in volumes if v["split"] == split}
        rows.append(("Split", f"{split}: volumes, patients", f"{number}, {len(patients)}"))
    by_patient = {v["patient_id"]: v for v in volumes}  # one volume stands for its patient
    rows.append(("Patients", "Patients", str(len(by_patient))))
    ages = [v["age"] for v in by_patient.values() if v["age"] is not None]
    deviation = f" +/- {statistics.stdev(ages):.1f}" if len(ages) > 1 else ""
    age = (
        f"{statistics.mean(ages):.1f}{deviation} years (of {len(ages)} patients)"
        if ages
        else "not recorded"
    )
    rows.append(("Patients", "Age, mean +/- sd", age))
    sexes = _counts(v["sex"] or "not recorded" for v in by_patient.values())
    words = {"F": "Female", "M": "Male", "O": "Other"}
    rows += [("Sex", words.get(item, item), str(number)) for item, number in sexes]
    ethnic_groups = _counts(v["ethnic_group"] or "not recorded" for v in by_patient.values())
    rows += [("Ethnic group", item, str(number)) for item, number in ethnic_groups]
    makers = _counts(v["manufacturer"].upper() or "NOT RECORDED" for v in volumes)
    rows += [("Manufacturer", item, f"{number} volumes") for item, number in makers]
    notes = _counts(note for v in volumes for note in v["notes"].split())
    rows += [("Noted", item, f"{number} volumes") for item, number in notes]
    for reason, number in _counts(row["reason"] for row in rejected):
        files = sum(int(row["num_files"]) for row in rejected if row["reason"] == reason)
        rows.append(("Rejected", reason, f"{number} series, {files} files"))
    return rows


def _counts(items: Iterable[str]) -> list[tuple[str, int]]:
    return sorted(collections.Counter(items).items(), key=lambda item: (-item[1], item[0]))


def table_text(rows: list[tuple[str, str, str]], title: str) -> str:
    """The table as aligned text."""
    width = max(len(item) for _, item, _ in rows)
    lines, group = [title], None
    for name, item, value in rows:
        if name != group:
            lines.append(name)
            group = name
        lines.append(f"  {item:<{width}}  {value}")
    return "\n".join(lines)


def choose_slices(
    volumes: list[dict[str, Any]], number: int, random: np.random.Generator
) -> list[tuple[dict[str, Any], int]]:
    """(volume, slice index) of random slices, one of each volume in turn. A slice repeats only
    after all others."""
    order = random.permutation(len(volumes))[:number]
    chosen = []
    while len(chosen) < number:
        left = [(volumes[i], list(random.permutation(volumes[i]["num_slices"]))) for i in order]
        while left and len(chosen) < number:
            chosen += [
                (volume, int(indices.pop())) for volume, indices in left[: number - len(chosen)]
            ]
            left = [(volume, indices) for volume, indices in left if indices]
    return chosen


def contact_sheet(dataset: Dataset, num_slices: int, seed: int) -> Image.Image:
    """Random slices (`choose_slices`), each labelled with volume, split and slice. The title says
    SYNTHETIC if the dataset is. Several windows stand side by side in each tile."""
    preparation, volumes = dataset.preparation, dataset.volumes()
    random = np.random.default_rng(seed)
    chosen = choose_slices(volumes, num_slices, random)
    tile_width = _TILE * preparation["channels"]
    columns = min(max(1, _MAX_COLUMNS // preparation["channels"]), num_slices)
    rows = -(-num_slices // columns)
    size = columns * tile_width, rows * (_TILE + _LABEL_HEIGHT) + _TITLE_HEIGHT
    sheet = Image.new("L", size, 0)
    draw = ImageDraw.Draw(sheet)
    windows = "  ".join(f"{w['level']:g}/{w['width']:g}" for w in preparation["windows"])
    title = f"{'SYNTHETIC  ' * preparation['synthetic']}window level/width {windows} HU"
    font = ImageFont.load_default(_FONT_SIZE)
    draw.text((4, 3), title, fill=255, font=font)
    sources = {split: dataset.source(split) for split in preparation["splits"]}
    for number, (volume, index) in enumerate(chosen):
        image = sources[volume["split"]][volume["first_record"] + index]["image"]
        left = number % columns * tile_width
        top = number // columns * (_TILE + _LABEL_HEIGHT) + _TITLE_HEIGHT
        for channel in range(image.shape[-1]):
            tile = Image.fromarray(np.ascontiguousarray(image[..., channel])).resize((_TILE, _TILE))
            sheet.paste(tile, (left + channel * _TILE, top))
        label = f"{volume['volume_id'][:8]} {volume['split']}"
        label += f"\nslice {index + 1} of {volume['num_slices']}"
        draw.text((left + 4, top + _TILE + 2), label, fill=255, font=font)
    return sheet


def notes_on_parts(dataset: Dataset) -> Iterator[str]:
    """A line for each part of a view that has changed since it was merged."""
    for part in dataset.parts:
        if part.now is None:
            yield (
                f"its part {part.directory} is not a complete dataset now: being changed, moved "
                "or removed"
            )
        elif part.now != part.merged:
            yield (
                f"its part {part.directory} has grown since; data_prep.merge into a new directory "
                "takes in its new volumes"
            )
