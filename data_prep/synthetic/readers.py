"""Four imperfect readers of the phantom's nodules, and their reading as an LIDC-IDRI XML file.

As in LIDC-IDRI, a nodule of 3 mm or more is outlined slice by slice one pixel outside its border
and rated on nine scales; a smaller one is a single point without ratings; anything else that a
reader marks is a point, too.
"""

import dataclasses
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from data_prep.synthetic.findings import Findings, Nodule
from data_prep.synthetic.render import NoduleField, Rendering

NAMESPACE = "http://www.nih.gov"
NUM_READERS = 4
# clockwise on the screen
SIDE_STEPS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))


@dataclasses.dataclass(frozen=True)
class Region:
    """An outline on one slice of the written images: `points` [N, 2] int (column, row), first =
    last if N > 1; `inclusion` is False for an outline of a hole that does not belong to the nodule.
    """

    slice_index: int
    inclusion: bool
    points: np.ndarray


@dataclasses.dataclass(frozen=True)
class Mark:
    """What one reader says of one place: `ratings` by name for a nodule of 3 mm or more, None for a
    smaller one; `is_nodule` False for something that only looks like a nodule."""

    regions: tuple[Region, ...]
    ratings: dict[str, int] | None
    is_nodule: bool


def read_scan(
    findings: Findings,
    rendering: Rendering,
    pixel_spacing_mm: float,
    slice_spacing_mm: float,
    as_written: Callable[[np.ndarray], np.ndarray],
    rng: np.random.Generator,
) -> list[list[Mark]]:
    """The marks of each of the four readers. `as_written` turns masks [..., H, W] of the rendering
    into the written images' rows and columns."""
    spacing = (slice_spacing_mm, pixel_spacing_mm, pixel_spacing_mm)
    shape = rendering.hu.shape
    readers = []
    for _ in range(NUM_READERS):
        marks = []
        for nodule, field in zip(findings.nodules, rendering.nodules, strict=True):
            # Three in ten of the smallest are missed, hardly any large one.
            if field is None or rng.random() < 0.45 * np.exp(-nodule.diameter_mm / 8):
                continue
            regions = _outline(nodule, field, shape, spacing, as_written, rng)
            if regions:
                marks.append(Mark(regions, rate(nodule, rng), True))
        for field in rendering.dots:
            if field is not None and rng.random() < 0.5:
                marks.append(
                    Mark((_point(field.paste(field.distance < 0, shape), as_written),), None, True)
                )
        for _ in range(int(rng.integers(0, 3))):
            voxel = np.zeros(shape, bool)
            voxel[
                int(rng.integers(shape[0])),
                int(rng.integers(shape[1])),
                int(rng.integers(shape[2])),
            ] = True
            marks.append(Mark((_point(voxel, as_written),), None, False))
        readers.append(marks)
    return readers


def reader_mask(
    field: NoduleField,
    spacing_mm: tuple[float, float, float],
    offset_mm: np.ndarray,
    growth_mm: float,
) -> np.ndarray:
    """[s, h, w] bool: the nodule's body displaced by (z, y, x) mm and grown by some mm, as a reader
    sees it."""
    moved = ndimage.shift(
        field.distance, np.asarray(offset_mm) / spacing_mm, order=1, mode="nearest"
    )
    return moved < growth_mm


def rate(nodule: Nodule, rng: np.random.Generator) -> dict[str, int]:
    """The nine characteristics of LIDC-IDRI as one reader rates them."""

    def about(value: float, spread: float) -> int:
        return int(np.clip(round(value + rng.normal(0, spread)), 1, 5))

    sharp = nodule.texture == 5
    return {
        "subtlety": about(2.2 + nodule.diameter_mm / 7 - (0 if sharp else 1.2), 0.5),
        "internalStructure": 4 if nodule.cavity_mm else 1,
        "calcification": 3 if nodule.calcified else 6,
        "sphericity": about(5 - 12 * nodule.lobulation, 0.5),
        "margin": about((5.2 if sharp else 3.6) - 0.6 * (nodule.malignancy - 1), 0.5),
        "lobulation": about(0.8 + 24 * nodule.lobulation, 0.5),
        "spiculation": about(1 + 6 * nodule.spiculation, 0.5),
        "texture": about(nodule.texture, 0.3),
        "malignancy": about(nodule.malignancy, 0.55),
    }


def _outline(nodule, field, shape, spacing, as_written, rng) -> tuple[Region, ...]:
    """One reader's outlines of a nodule: the hand shakes by some tenths of a millimetre."""
    growth = float(np.clip(rng.normal(0, 0.05) * nodule.diameter_mm / 2, -0.8, 0.8))
    mask = reader_mask(field, spacing, rng.normal(0, 0.25, 3), growth)
    hole = (
        field.distance < nodule.cavity_mm - nodule.diameter_mm / 2
        if nodule.cavity_mm
        else np.zeros_like(mask)
    )
    regions = []
    for index in np.flatnonzero(mask.any(axis=(1, 2))):
        for part, inclusion in ((mask[index], True), (hole[index], False)):
            part = _largest(part)
            if part is None:
                continue
            whole = np.zeros(shape[1:], bool)
            rows, columns = (
                slice(o, o + n) for o, n in zip(field.origin[1:], part.shape, strict=True)
            )
            whole[rows, columns] = part
            whole = as_written(whole)
            points = border(ndimage.binary_dilation(whole) if inclusion else whole)
            regions.append(Region(field.origin[0] + int(index), inclusion, points))
    return tuple(regions)


def _largest(mask: np.ndarray) -> np.ndarray | None:
    """The largest connected part of a mask [H, W] without its holes; None if it is empty."""
    parts, count = ndimage.label(mask)
    if not count:
        return None
    return ndimage.binary_fill_holes(
        parts == 1 + np.argmax(ndimage.sum_labels(mask, parts, np.arange(1, count + 1)))
    )


def _point(mask: np.ndarray, as_written) -> Region:
    """The middle voxel of a small mask [S, H, W]."""
    voxels = np.argwhere(mask)
    index, row, column = voxels[len(voxels) // 2]
    single = np.zeros(mask.shape[1:], bool)
    single[row, column] = True
    return Region(int(index), True, np.argwhere(as_written(single))[:, ::-1])


def border(mask: np.ndarray) -> np.ndarray:
    """The outer border pixels of a connected mask [H, W], in order around it and closed: [N, 2] int
    (column, row)."""
    padded = np.pad(mask, 1)
    row, column = (int(v) for v in np.argwhere(padded)[0])
    start, points, came_from = (row, column), [(column - 1, row - 1)], 6
    first_move = None
    while True:
        # Turn clockwise from the side that we came from, to the first neighbour in the mask
        # (Moore's neighbourhood).
        for turn in range(8):
            side = (came_from + turn) % 8
            down, across = SIDE_STEPS[side]
            if padded[row + down, column + across]:
                break
        else:
            return np.array(points)
        if (row, column) == start and side == first_move:
            return np.array(points)
        first_move = side if first_move is None else first_move
        row, column = row + down, column + across
        points.append((column - 1, row - 1))
        came_from = (side + 6) % 8 if side % 2 == 0 else (side + 5) % 8


def reading_xml(
    readers: list[list[Mark]],
    series_uid: str,
    study_uid: str,
    instance_uids: list[str],
    z_positions_mm: list[float],
    rng: np.random.Generator,
) -> bytes:
    """The `LidcReadMessage` of a series; slice i has the SOP Instance UID and the position z of
    index i."""
    root = ElementTree.Element("LidcReadMessage", {"xmlns": NAMESPACE, "uid": f"{series_uid}.0"})
    header = ElementTree.SubElement(root, "ResponseHeader")
    for name, text in (
        ("Version", "1.8.1"),
        ("MessageId", str(int(rng.integers(10**9)))),
        ("TaskDescription", "Second unblinded read"),
        ("SeriesInstanceUid", series_uid),
        ("ResponseDescription", "SYNTHETIC phantom, not a patient"),
        ("StudyInstanceUID", study_uid),
    ):
        ElementTree.SubElement(header, name).text = text
    for marks in readers:
        session = ElementTree.SubElement(root, "readingSession")
        ElementTree.SubElement(session, "annotationVersion").text = "3.12"
        ElementTree.SubElement(session, "servicingRadiologistID").text = str(
            int(rng.integers(10**9))
        )
        first_number = int(rng.integers(1, 200))
        for number, mark in enumerate(marks, start=first_number):
            _add_mark(session, mark, number, instance_uids, z_positions_mm)
    ElementTree.indent(root, " ")
    return ElementTree.tostring(root, encoding="UTF-8", xml_declaration=True)


def _add_mark(
    session, mark: Mark, number: int, instance_uids: list[str], z_positions_mm: list[float]
) -> None:
    element = ElementTree.SubElement(
        session, "unblindedReadNodule" if mark.is_nodule else "nonNodule"
    )
    ElementTree.SubElement(
        element, "noduleID" if mark.is_nodule else "nonNoduleID"
    ).text = f"{number:03d}"
    if mark.ratings is not None:
        characteristics = ElementTree.SubElement(element, "characteristics")
        for name, value in mark.ratings.items():
            ElementTree.SubElement(characteristics, name).text = str(value)
    for region in mark.regions:
        parent = ElementTree.SubElement(element, "roi") if mark.is_nodule else element
        ElementTree.SubElement(
            parent, "imageZposition"
        ).text = f"{z_positions_mm[region.slice_index]:.6f}"
        ElementTree.SubElement(parent, "imageSOP_UID").text = instance_uids[region.slice_index]
        if mark.is_nodule:
            ElementTree.SubElement(parent, "inclusion").text = str(region.inclusion).upper()
        for column, row in region.points:
            edge = ElementTree.SubElement(parent, "edgeMap" if mark.is_nodule else "locus")
            ElementTree.SubElement(edge, "xCoord").text = str(int(column))
            ElementTree.SubElement(edge, "yCoord").text = str(int(row))
