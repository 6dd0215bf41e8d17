"""LIDC-IDRI: the XML of the readers' annotations -> masks of each reader -> consensus nodules.

    reading = read_reading(Path("158.xml").read_bytes())
    nodules = consensus_nodules(reading, slice_uids, (512, 512), slice_thickness_mm=2.5)
    mask = slice_mask(nodules, 57, (512, 512))

Four readers each drew every nodule of 3 mm and more, slice by slice. A contour is a list of pixels
just outside the nodule. Nodules of different readers are one nodule where their contours come
close. A voxel belongs to a nodule where enough readers include it. The defaults give the numbers of
the paper's Table I exactly (`experiments.table1`): 10,005 slices of nodules, 840 patients.
Coordinates are pixels of the source matrix, x a column and y a row, from 0.
"""

import collections
import statistics
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from data_prep.labels.annotation_files import xml_files
from data_prep.scan.reasons import LeftOut
from data_prep.system.errors import InputError

CONSENSUS = 0.7
MIN_AREA_PX = 20
CHARACTERISTICS = (
    *("subtlety", "internalStructure", "calcification", "sphericity", "margin"),
    *("lobulation", "spiculation", "texture", "malignancy"),
)
# (Series Instance UID, session, nodule ID) of readings that are in the XML and not in the curated
# annotations of the collection. The paper's counts are without them. LIDC-IDRI-0101: 23 contours,
# malignancy 4.
EXCLUDED_READINGS = {("1.3.6.1.4.1.14519.5.2.1.6279.6001.340202188094259402036602717327", 0, "2")}

_NAMESPACE = "{http://www.nih.gov}"
_X, _Y = f"{_NAMESPACE}xCoord", f"{_NAMESPACE}yCoord"
_MAX_READERS = 4
_TOLERANCE_FACTOR = 0.9
_MIN_TOLERANCE = 0.1


class LidcError(InputError):
    """Annotations that cannot be used, in one line."""


class ContradictoryReading(LidcError):
    """A second reading of a series that differs from the first."""


class ContourOutside(LidcError):
    """A contour leaves the image."""


class Contour(NamedTuple):
    """One outline (`roi`) of a nodule on one slice."""

    sop_instance_uid: str  # imageSOP_UID
    position_mm: float  # imageZposition
    inclusion: bool  # False: a hole
    # [N, 2] int64, (x, y), pixels just outside the nodule (of a hole: in the hole)
    points: np.ndarray


class ReaderNodule(NamedTuple):
    """One reader's nodule of 3 mm and more (`unblindedReadNodule`)."""

    nodule_id: str  # noduleID, the reader's own numbering
    characteristics: dict[str, int]  # `CHARACTERISTICS`, 1 to 5 or 6
    contours: tuple[Contour, ...]


class Reading(NamedTuple):
    """The annotations of one CT series by all its readers."""

    series_instance_uid: str
    study_instance_uid: str
    # one for each reader; () where the reader saw no nodule of 3 mm
    sessions: tuple[tuple[ReaderNodule, ...], ...]

    @property
    def contours(self) -> list[Contour]:
        """The contours of all readers."""
        return [c for session in self.sessions for nodule in session for c in nodule.contours]


class Votes(NamedTuple):
    """All annotations of one nodule, before the consensus."""

    first_slice: int
    top: int
    left: int
    votes: np.ndarray  # [S, h, w] uint8, number of annotations that include the voxel
    num_annotations: int  # more than `num_readers` where a reader drew it as two nodules
    num_readers: int  # distinct
    malignancy: int  # median of the annotations; of an even number the upper median


class Nodule(NamedTuple):
    """A consensus nodule: a box and the mask within it. Slices that were not kept are empty."""

    first_slice: int
    top: int
    left: int
    mask: np.ndarray  # [S, h, w] bool; the first and last slice, row and column are not empty
    malignancy: int  # 1 to 5, as in `Votes`
    num_readers: int  # distinct


# ---- reading -------------------------------------------------------------------------------------


def read_reading(content: bytes, name: str = "annotations") -> Reading | None:
    """The annotations of a CT series from an XML file; None for other studies (radiographs).

    Nodules below 3 mm and non-nodules are left out: their characteristics are missing, blank or
    zero. Single points are left out, too.

    Args:
        content: the content of the file.
        name: the name of the file, for messages.

    Raises:
        LidcError: the XML is damaged, or lacks the series, or has unreadable numbers.
    """
    try:
        root = ElementTree.fromstring(content)
    # LookupError and ValueError: an encoding that does not exist.
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise LidcError(f"{name}: damaged XML ({error}); fetch the file again") from error
    if root.tag != f"{_NAMESPACE}LidcReadMessage":
        return None
    try:
        header = _child(root, "ResponseHeader")
        sessions = tuple(
            _read_session(session) for session in root.findall(f"{_NAMESPACE}readingSession")
        )
        return Reading(
            _text(header, "SeriesInstanceUid"), _text(header, "StudyInstanceUID"), sessions
        )
    except ValueError as error:
        raise LidcError(f"{name}: {error}; fetch the file again") from error


def _read_session(session: ElementTree.Element) -> tuple[ReaderNodule, ...]:
    nodules = []
    for element in session.findall(f"{_NAMESPACE}unblindedReadNodule"):
        scores = element.find(f"{_NAMESPACE}characteristics")
        if scores is None:
            continue
        texts = [(scores.findtext(f"{_NAMESPACE}{name}") or "").strip() for name in CHARACTERISTICS]
        if any(text in ("", "0") for text in texts):
            continue
        if not all(text.isdecimal() for text in texts):
            raise ValueError("a characteristic (subtlety to malignancy) is not a whole number")
        contours = (_read_contour(roi) for roi in element.findall(f"{_NAMESPACE}roi"))
        contours = tuple(contour for contour in contours if len(contour.points) > 1)
        if contours:
            characteristics = dict(zip(CHARACTERISTICS, map(int, texts), strict=True))
            nodules.append(ReaderNodule(_text(element, "noduleID"), characteristics, contours))
    return tuple(nodules)


def _read_contour(roi: ElementTree.Element) -> Contour:
    inclusion = _text(roi, "inclusion").upper()
    if inclusion not in ("TRUE", "FALSE"):
        raise ValueError("inclusion is neither TRUE nor FALSE")
    uid, position = _text(roi, "imageSOP_UID"), _text(roi, "imageZposition")
    edges = roi.findall(f"{_NAMESPACE}edgeMap")
    try:
        position_mm = float(position)
        points = [(int(edge.findtext(_X, "")), int(edge.findtext(_Y, ""))) for edge in edges]
    except ValueError:
        raise ValueError("a coordinate or imageZposition of a contour is not a number") from None
    return Contour(uid, position_mm, inclusion == "TRUE", np.array(points, np.int64).reshape(-1, 2))


def _child(element: ElementTree.Element, name: str) -> ElementTree.Element:
    child = element.find(f"{_NAMESPACE}{name}")
    if child is None:
        raise ValueError(f"{name} is missing")
    return child


def _text(element: ElementTree.Element, name: str) -> str:
    text = (_child(element, name).text or "").strip()
    if not text:
        raise ValueError(f"{name} is empty")
    return text


def read_readings(path: str | Path, left_out: list[LeftOut] | None = None) -> dict[str, Reading]:
    """Every CT reading below a folder (packed files included) or in a tar file, by Series Instance
    UID.

    The collection has the readings of six series in 2 to 6 files that differ in their headers. Such
    a series counts once.

    Args:
        path: folder or tar file.
        left_out: collects the files that cannot be used; None raises. A series with two different
            readings has none.

    Raises:
        LidcError: a file is damaged or contradicts another, or `path` has no reading.
        InputError: `path` does not exist, or is a tar file that expands too far.
        OSError: a file cannot be read.
    """
    strict, left_out = left_out is None, [] if left_out is None else left_out
    readings: dict[str, Reading] = {}
    contradictory: set[str] = set()
    for name, content in xml_files(Path(path), left_out):
        try:
            reading = read_reading(content, name)
            if reading is None:
                continue
            first = readings.setdefault(reading.series_instance_uid, reading)
            if first is not reading and not same_contours(first, reading):
                contradictory.add(reading.series_instance_uid)
                raise ContradictoryReading(
                    f"{name}: a second, different reading of its series; "
                    "leave one of the two files out"
                )
        except LidcError as error:
            if strict:
                raise
            reason = "contradicts" if isinstance(error, ContradictoryReading) else "damaged"
            left_out.append(LeftOut(name, reason, str(error).removeprefix(f"{name}: ")))
    if not readings:
        details = sorted({entry.detail for entry in left_out})
        others = f"; {len(left_out)} files cannot be used ({details[0]})" if details else ""
        raise LidcError(
            f"{path}: no CT reading of LIDC-IDRI (XML, root LidcReadMessage); "
            f"give the folder or tar file{others}"
        )
    return {uid: reading for uid, reading in readings.items() if uid not in contradictory}


def same_contours(first: Reading, second: Reading) -> bool:
    """Whether two readings are equal except for the order of their sessions and nodules."""

    def contents(reading: Reading) -> list:
        return sorted(
            sorted(
                (
                    sorted(
                        (c.sop_instance_uid, c.inclusion, c.points.tolist())
                        for c in nodule.contours
                    ),
                    sorted(nodule.characteristics.items()),
                )
                for nodule in session
            )
            for session in reading.sessions
        )

    return contents(first) == contents(second)


def slices_from_positions(reading: Reading, slice_spacing_mm: float) -> dict[str, int]:
    """The `slice_uids` of `consensus_nodules` without images: slices are numbered by
    imageZposition, from the lowest contour.

    In two series of the collection two images share a position: both get the same number.

    Raises:
        LidcError: the spacing is not positive.
    """
    if not slice_spacing_mm > 0:
        raise LidcError(
            f"slice spacing {slice_spacing_mm} mm; give the distance of neighbouring slices, "
            "above 0"
        )
    lowest = min((c.position_mm for c in reading.contours), default=0.0)
    return {
        c.sop_instance_uid: round((c.position_mm - lowest) / slice_spacing_mm)
        for c in reading.contours
    }


# ---- masks ---------------------------------------------------------------------------------------


def reader_masks(
    contours: Sequence[Contour], slices: Sequence[int], box: Sequence[int]
) -> np.ndarray:
    """One reader's nodule as voxels.

    The pixels of a contour lie outside the nodule, so they are not in the mask. Inclusions are
    united. A hole removes its filled region with the pixels of its contour.

    Args:
        contours: one nodule of one reader.
        slices: for each contour the number of its slice.
        box: (first slice, top, left, number of slices, height, width) around all contours.

    Returns:
        bool, [S, h, w].
    """
    first, top, left, *shape = box
    inside, holes = np.zeros(shape, bool), np.zeros(shape, bool)
    for contour, number in zip(contours, slices, strict=True):
        columns, rows = (contour.points - (left, top)).T
        x0, y0 = columns.min(), rows.min()
        width, height = columns.max() - x0 + 1, rows.max() - y0 + 1
        image = Image.new("1", (int(width), int(height)))
        outline = np.column_stack([columns - x0, rows - y0])
        ImageDraw.Draw(image).polygon(outline.reshape(-1).tolist(), fill=1, outline=1)
        filled = np.array(image)
        filled[rows - y0, columns - x0] = not contour.inclusion
        target = inside if contour.inclusion else holes
        target[number - first, y0 : y0 + height, x0 : x0 + width] |= filled
    return inside & ~holes


def cluster_annotations(points: Sequence[np.ndarray], slice_thickness_mm: float) -> np.ndarray:
    """Groups annotations of different readers into nodules.

    Two annotations belong together where their contours come closer than a tolerance, directly or
    through others. Distances are in voxel indices and the tolerance is the number of the slice
    thickness without its unit, as in the collection's curated annotations. Distances in mm would
    not give the paper's counts. While a group has more than four members, the tolerance shrinks by
    a tenth, down to 0.1.

    Args:
        points: for each annotation its contour pixels, [N, 3] (x, y, slice).
        slice_thickness_mm: DICOM (0018,0050).

    Returns:
        int, [annotations], the group of each annotation, from 0.
    """
    number = len(points)
    trees = [KDTree(array) for array in points]
    distances = np.full((number, number), np.inf)
    for i in range(number):
        for j in range(i):
            gap = np.maximum(trees[i].mins - trees[j].maxes, trees[j].mins - trees[i].maxes)
            # Otherwise the boxes of the two are too far apart already.
            if np.linalg.norm(np.maximum(gap, 0)) <= slice_thickness_mm:
                distances[i, j] = trees[j].query(points[i])[0].min()
    tolerance = slice_thickness_mm
    while True:
        groups = connected_components(distances <= tolerance, directed=False)[1]
        tolerance *= _TOLERANCE_FACTOR
        if np.bincount(groups).max(initial=0) <= _MAX_READERS or tolerance < _MIN_TOLERANCE:
            return groups


def nodule_votes(
    reading: Reading,
    slice_uids: Sequence[str] | Mapping[str, int],
    shape: tuple[int, int],
    slice_thickness_mm: float,
    *,
    keep_excluded: bool = False,
) -> list[Votes]:
    """The nodules of a series before the consensus; arguments and errors as in
    `consensus_nodules`."""
    if not slice_thickness_mm > 0:
        raise LidcError(f"slice thickness {slice_thickness_mm} mm; give the scan's, above 0")
    by_uid = isinstance(slice_uids, Mapping)
    slice_of = slice_uids if by_uid else {uid: number for number, uid in enumerate(slice_uids)}
    number_of = _slice_numbers(reading, slice_of)
    annotations, slices, points = [], [], []
    for session, nodules in enumerate(reading.sessions):
        for nodule in nodules:
            if (
                reading.series_instance_uid,
                session,
                nodule.nodule_id,
            ) in EXCLUDED_READINGS and not keep_excluded:
                continue
            numbers = [
                number_of[contour.sop_instance_uid, contour.position_mm]
                for contour in nodule.contours
            ]
            for contour in nodule.contours:
                if (contour.points < 0).any() or (contour.points >= shape[::-1]).any():
                    raise ContourOutside(
                        f"a contour leaves the image of {shape[0]} x {shape[1]} pixels; "
                        "is it its scan?"
                    )
            annotations.append((session, nodule))
            slices.append(numbers)
            stacked = zip(nodule.contours, numbers, strict=True)
            points.append(
                np.concatenate(
                    [np.insert(contour.points, 2, number, axis=1) for contour, number in stacked]
                )
            )
    if not annotations:
        return []
    groups = cluster_annotations(points, slice_thickness_mm)
    return [
        _votes([(*annotations[i], slices[i], points[i]) for i in np.flatnonzero(groups == group)])
        for group in range(groups.max() + 1)
    ]


def _slice_numbers(reading: Reading, slice_of: Mapping[str, int]) -> dict[tuple[str, float], int]:
    """The slice of every (image, position) with a contour.

    The image tells the slice, unless a reading names one image at two positions (LIDC-IDRI-0396:
    the slice below has the UID of its neighbour). Then the position tells it, interpolated between
    the positions of the other images.
    """
    named = sorted({(c.position_mm, c.sop_instance_uid) for c in reading.contours})
    if any(uid not in slice_of for _, uid in named):
        raise LidcError(
            "a contour lies on an image that the series does not have; is the scan complete?"
        )
    count = collections.Counter(uid for _, uid in named)
    certain = [(position, slice_of[uid]) for position, uid in named if count[uid] == 1]
    numbers = {(uid, position): slice_of[uid] for position, uid in named}
    for position, uid in named:
        if count[uid] > 1 and certain and certain[0][0] < position < certain[-1][0]:
            numbers[uid, position] = round(float(np.interp(position, *zip(*certain, strict=True))))
    return numbers


def _votes(members: list[tuple[int, ReaderNodule, list[int], np.ndarray]]) -> Votes:
    points = np.concatenate([member[3] for member in members])
    corner = points.min(axis=0)[::-1]
    box = (*corner, *(points.max(axis=0)[::-1] - corner + 1))
    votes = np.zeros(box[3:], np.uint8)
    for _, nodule, slices, _ in members:
        votes += reader_masks(nodule.contours, slices, box)
    malignancy = statistics.median_high(
        nodule.characteristics["malignancy"] for _, nodule, _, _ in members
    )
    num_readers = len({session for session, _, _, _ in members})
    return Votes(*map(int, corner), votes, len(members), num_readers, malignancy)


def consensus_nodule(
    votes: Votes, consensus: float = CONSENSUS, min_area_px: int = MIN_AREA_PX
) -> Nodule | None:
    """The voxels that at least the share `consensus` of the annotations include, on slices with
    more than `min_area_px` such voxels; None if all slices have fewer."""
    if not 0 < consensus <= 1 or min_area_px < 0:
        raise LidcError(
            f"consensus {consensus}, smallest area {min_area_px}; "
            "give a share in (0, 1] and at least 0"
        )
    mask = votes.votes >= consensus * votes.num_annotations - 1e-9
    mask &= (mask.sum(axis=(1, 2)) > min_area_px)[:, None, None]
    voxels = np.argwhere(mask)
    if not len(voxels):
        return None
    low, high = voxels.min(axis=0), voxels.max(axis=0) + 1
    kept = mask[tuple(map(slice, low, high))]
    corner = np.add(low, (votes.first_slice, votes.top, votes.left)).tolist()
    return Nodule(*corner, kept, votes.malignancy, votes.num_readers)


def consensus_nodules(
    reading: Reading,
    slice_uids: Sequence[str] | Mapping[str, int],
    shape: tuple[int, int],
    slice_thickness_mm: float,
    *,
    consensus: float = CONSENSUS,
    min_area_px: int = MIN_AREA_PX,
    keep_excluded: bool = False,
) -> list[Nodule]:
    """The nodules of a series.

    Args:
        reading: the annotations.
        slice_uids: SOP Instance UIDs in slice order, along the normal, in either direction; or for
          each UID the number of its slice, where a slice has several UIDs (a second image at the
          same position).
        shape: (rows, columns) of the source matrix.
        slice_thickness_mm: DICOM (0018,0050).
        consensus: share of a nodule's annotations that must include a voxel, in (0, 1].
        min_area_px: a slice is kept where the nodule has more pixels than this.
        keep_excluded: also take `EXCLUDED_READINGS`.

    Returns:
        The nodules that have at least one slice.

    Raises:
        ContourOutside: a contour leaves `shape`.
        LidcError: a contour lies on an image that is not in `slice_uids`, or a value is out of its
          range.
    """
    votes = nodule_votes(
        reading, slice_uids, shape, slice_thickness_mm, keep_excluded=keep_excluded
    )
    nodules = (consensus_nodule(nodule, consensus, min_area_px) for nodule in votes)
    return [nodule for nodule in nodules if nodule is not None]


def slice_mask(nodules: Sequence[Nodule], number: int, shape: tuple[int, int]) -> np.ndarray:
    """The union of all nodules on slice `number`: bool, [rows, columns]."""
    mask = np.zeros(shape, bool)
    for nodule in nodules:
        inside = number - nodule.first_slice
        if 0 <= inside < len(nodule.mask):
            height, width = nodule.mask.shape[1:]
            mask[nodule.top : nodule.top + height, nodule.left : nodule.left + width] |= (
                nodule.mask[inside]
            )
    return mask


def finding(malignancy: int) -> str:
    """The paper's classes (Table I): `no cancer` for scores 1 and 2, `ambiguous` for 3, `cancer`
    for 4 and 5."""
    return "ambiguous" if malignancy == 3 else "cancer" if malignancy > 3 else "no cancer"
