"""Stacks that are mixed in one series: which slices belong together.

    for stack in separate_stacks(headers, max_lost_fraction):   # slices of one plane
        stack.headers, stack.split_by, stack.fault

Reconstructions, energies, phases, passes and slabs may share a Series Instance UID. Where their
positions interleave, repeat, or lie closer than half the spacing, the smallest set of elements is
searched that parts the slices into regular stacks. All other series stay as they are, after a look
at their positions and at the elements that vary.

Elements are of three kinds. A *value* (kernel, energy, phase ...) changes the image: slices that
differ in it are never one volume. A *label* (Image Type, frame of reference ...) names a stack. An
*order* (acquisition number, time ...) may as well count the slices of a single stack, so it parts
them only where that leaves whole stacks and Instance Number does not count through both.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_prep.scan.geometry import SAME_POSITION_MM, canonical_axes, is_regular, measure_stack
from data_prep.scan.headers import Header

_MEETING_SLICES = 1.5  # slice spacings that two parts in a row may share
_SMALL_STEP = 0.55  # of the median step: half of it, give or take rounding
_LEAST_SLICES = 3  # that make a part of their own
_MOST_TOGETHER = 3  # elements that are searched together
_MOST_ELEMENTS = 12
_FILLED_FRACTION = (
    0.8  # of the steps of both parts together that are even where one fills the other
)
_COVERED = 1.2  # thicknesses between slices that cover the body
_ROUNDED = 1.15  # between two thicknesses that differ by more than rounding


class Element(NamedTuple):
    """What may tell two stacks apart. `name` is of `split_by_NAME` in
    `data_prep.scan.reasons.NOTES`; `read` returns None or "" for a missing value."""

    name: str
    kind: str  # "value", "label" or "order"
    read: Callable[[Header], Hashable]


def _grid(header: Header) -> Hashable:
    rows, columns, spacing = canonical_grid(header)
    return rows, columns, *(round(value, 2) for value in spacing)


def _storage(header: Header) -> Hashable:
    axes = canonical_axes(header.orientation)
    return axes.transpose, axes.flip_rows, axes.flip_columns


# The first of several elements that part the slices alike gives the parts their names.
ELEMENTS = (
    Element("acquisition", "order", lambda h: h.acquisition_number),
    Element("kernel", "value", lambda h: h.kernel.casefold()),
    Element("thickness", "value", lambda h: h.slice_thickness),
    Element("temporal_position", "value", lambda h: h.marks.temporal_position),
    Element("cardiac_phase", "value", lambda h: h.marks.cardiac_phase),
    Element("respiratory_phase", "value", lambda h: h.marks.respiratory_phase),
    Element("tube_voltage", "value", lambda h: h.marks.tube_voltage or None),
    Element("image_type", "label", lambda h: h.image_type[2:] or ""),
    Element("grid", "label", _grid),
    Element("frame_of_reference", "label", lambda h: h.marks.frame_of_reference_uid),
    Element("stack_id", "label", lambda h: h.marks.stack_id),
    Element("series_number", "label", lambda h: h.marks.series_number),
    Element("series_description", "label", lambda h: h.marks.series_description),
    Element("patient_position", "label", lambda h: h.patient_position),
    Element("contrast", "order", lambda h: h.contrast_agent),
    Element("storage", "order", _storage),
    Element("trigger_time", "order", lambda h: h.marks.trigger_time),
    Element("acquisition_time", "order", lambda h: h.marks.acquisition_time),
    Element("instance_number", "order", lambda h: h.marks.instance_number),
)
# Along these a stack may run on from value to value; slices are parted where its way turns back.
_RUNNING = {"acquisition", "acquisition_time", "instance_number"}
_FAR_APART = 5  # median gaps between the trigger times of two phases


@dataclasses.dataclass(frozen=True)
class Stack:
    """Slices that belong together. `fault` is a reason with its detail, or None."""

    headers: list[Header]
    split_by: tuple[str, ...] = ()  # names of `ELEMENTS`
    name: str = ""  # the values of these elements; unique among the stacks of one plane
    fault: tuple[str, str] | None = None


def canonical_grid(header: Header) -> tuple[int, int, tuple[float, float]]:
    """Rows, columns, and mm between rows and between columns, of the image when it is oriented."""
    between_rows, between_columns = header.pixel_spacing
    if canonical_axes(header.orientation).transpose:
        return header.columns, header.rows, (between_columns, between_rows)
    return header.rows, header.columns, (between_rows, between_columns)


def order_slices(headers: Sequence[Header]) -> tuple[list[Header], np.ndarray]:
    """Headers sorted towards superior, and their positions [S] in mm along the slice normal."""
    normal = canonical_axes(headers[0].orientation).normal
    positions = np.array([header.position for header in headers]) @ normal
    order = np.argsort(positions, kind="stable")
    return [headers[i] for i in order], positions[order]


def separate_stacks(headers: list[Header], max_lost_fraction: float) -> list[Stack]:
    """Slices of one plane, parted into the stacks that they are of.

    Args:
        headers: at least one, of slices with one normal.
        max_lost_fraction: of the slices; so many may lack or misname an element.
    """
    ordered, positions = order_slices(headers)
    varying = []
    for element in ELEMENTS:
        values = [element.read(header) for header in ordered]
        if element.name == "thickness" and values.count(values[0]) < len(values):
            values = _without_rounding(values)
        if values.count(values[0]) < len(values):
            varying.append((element, values))
    steps = np.diff(positions)
    if not varying or len(ordered) < 2 * _LEAST_SLICES:
        return [Stack(headers)]
    mixture = _Mixture(ordered, positions, varying, max_lost_fraction)
    crowded = np.any(steps <= max(SAME_POSITION_MM, _SMALL_STEP * float(np.median(steps))))
    if not (crowded or not is_regular(positions) or mixture.interleaves()):
        return [Stack(headers)]
    return mixture.parted() or [Stack(headers)]


class _Mixture:
    """Slices that may be of several stacks, sorted along the normal."""

    def __init__(
        self,
        headers: list[Header],
        positions: np.ndarray,
        varying: list[tuple[Element, list[Any]]],
        max_lost_fraction: float,
    ):
        self._headers, self._positions = headers, positions
        self._elements = [element for element, _ in varying]
        self._values = {element.name: values for element, values in varying}
        self._allowed = max_lost_fraction * len(headers)
        self._codes: dict[str, np.ndarray] = {}

    def _codes_of(self, name: str) -> np.ndarray:
        """[S] int: equal numbers for slices that an element keeps together."""
        if name not in self._codes:
            values = self._values[name]
            codes = _codes(_phases(values) if name == "trigger_time" else values)
            if name in _RUNNING:
                codes = _passes(values, self._positions, self._step_within(codes))
            self._codes[name] = codes
        return self._codes[name]

    # ---- whether anything is mixed ------------------------------------------------------------

    def interleaves(self) -> bool:
        """Whether the ranges of two values of an element overlap by more than two stacks in a row
        may. A few slices without a value may belong to any stack."""
        return any(
            self._overlap(self._codes_of(element.name), self._few_missing(element.name))
            for element in self._elements
            if element.name != "instance_number"  # not reliable: it only decides between ways out
        )

    def _few_missing(self, name: str) -> np.ndarray:
        """[S] bool: slices that count."""
        known = np.array([not _is_missing(value) for value in self._values[name]])
        return known if np.count_nonzero(~known) <= self._allowed else np.ones(len(known), bool)

    def _step_within(self, codes: np.ndarray) -> float:
        """The median step between neighbours of one value, mm."""
        order = np.lexsort((self._positions, codes))
        steps = np.diff(self._positions[order])[np.diff(codes[order]) == 0]
        steps = steps[steps >= SAME_POSITION_MM]
        return float(np.median(steps)) if len(steps) else 0.0

    def _overlap(self, codes: np.ndarray, counts: np.ndarray) -> bool:
        """Whether the ranges of two codes overlap; `counts` [S] bool: the slices that count."""
        alone = -1 - np.arange(len(codes))
        step = self._step_within(np.where(counts, codes, alone))
        if not step:
            return False
        ranges = sorted(_ranges(codes[counts], self._positions[counts]))
        ends = itertools.accumulate((end for _, end in ranges), max)
        return any(
            min(end_before, end) - start > _MEETING_SLICES * step
            for end_before, (start, end) in zip(ends, ranges[1:], strict=False)
        )

    # ---- the search ---------------------------------------------------------------------------

    def parted(self) -> list[Stack] | None:
        """The slices, parted by the smallest set of elements that leaves regular stacks; None: they
        are one stack, or nothing tells them apart."""
        names = [
            element.name
            for element in self._elements
            if len(np.unique(self._codes_of(element.name))) <= len(self._headers) / _LEAST_SLICES
        ][:_MOST_ELEMENTS]
        for size in range(1, min(_MOST_TOGETHER, len(names)) + 1):
            ways = []
            for chosen in itertools.combinations(names, size):
                parts = self._parts(chosen)
                if self._are_stacks(parts):
                    ways.append((len(parts), len(ways), chosen, parts))
            if ways:
                _, _, chosen, parts = min(ways)
                return self._judged(chosen, parts)
        return None

    def _parts(self, chosen: tuple[str, ...]) -> list[np.ndarray]:
        """Numbers of the slices of each part, ascending."""
        parts = collections.defaultdict(list)
        codes = (self._codes_of(name).tolist() for name in chosen)
        for i, key in enumerate(zip(*codes, strict=True)):
            parts[key].append(i)
        return [np.array(numbers) for numbers in parts.values()]

    def _are_stacks(self, parts: list[np.ndarray]) -> bool:
        """Whether there are several parts that overlap, each of one stack."""
        large = [part for part in parts if len(part) >= _LEAST_SLICES]
        if len(large) < 2 or len(self._headers) - sum(map(len, large)) > self._allowed:
            return False
        if not all(is_regular(self._positions[self._single(part)]) for part in large):
            return False
        codes = np.full(len(self._headers), -1)
        for number, part in enumerate(large):
            codes[part] = number
        return self._overlap(codes, codes >= 0) and not any(
            self._holds_two_values(part) for part in large
        )

    def _single(self, part: np.ndarray) -> np.ndarray:
        """A part without the copies of its images."""
        last: dict[Hashable, float] = {}
        single = []
        for i, position in zip(part.tolist(), self._positions[part].tolist(), strict=True):
            image = self._headers[i].sop_instance_uid, self._headers[i].frame
            if not image[0] or position - last.get(image, -np.inf) >= SAME_POSITION_MM:
                single.append(i)
            last[image] = position
        return np.array(single)

    def _holds_two_values(self, part: np.ndarray) -> bool:
        """Whether the ranges of two values of an element that changes the image overlap."""
        within = np.zeros(len(self._headers), bool)
        within[part] = True
        for element in self._elements:
            if element.kind != "value":
                continue
            codes = self._codes_of(element.name)
            common = [
                code
                for code, number in zip(*np.unique(codes[part], return_counts=True), strict=True)
                if number > self._allowed * len(part) / len(self._headers)
            ]
            counts = within & np.isin(codes, common) & self._few_missing(element.name)
            if len(common) > 1 and self._overlap(codes, counts):
                return True
        return False

    # ---- what the parts are -------------------------------------------------------------------

    def _judged(self, chosen: tuple[str, ...], parts: list[np.ndarray]) -> list[Stack] | None:
        """The parts as stacks; None: they fill each other's gaps and are one."""
        large = [part for part in parts if len(part) >= _LEAST_SLICES]
        fault = None
        if self._fill_each_other(large):
            kind = self._difference(large)
            fewer = len(self._headers) - max(map(len, parts))
            whole = [self._covers(part) for part in large]
            if fewer <= self._allowed or (kind != "value" and not all(whole)):
                return None
            if kind == "order" and self._numbered_through():
                return None
            fault = "mixed_stacks", f"every second slice is of another {_words(chosen)}"
        stacks = []
        for part in parts:
            lost = fault if fault and not self._covers(part) else None
            members = [self._headers[i] for i in part.tolist()]
            stacks.append(Stack(members, chosen, self._name(chosen, part), lost))
        return stacks

    def _fill_each_other(self, large: list[np.ndarray]) -> bool:
        """Whether the slices together are even, and each part has gaps or wider steps; one part is
        enough where no two parts share a position (blocks of slices with a trigger time each)."""
        together = _distinct(self._positions)
        steps = np.diff(together)
        even = np.abs(steps - np.median(steps)) <= 0.1 * np.median(steps)
        if np.mean(even) < _FILLED_FRACTION:
            return False
        missing = measure_stack(together).missing
        of_parts = [measure_stack(_distinct(self._positions[part])) for part in large]
        gaps = [
            part.spacing_mm >= 1.5 * np.median(steps) or part.missing > missing for part in of_parts
        ]
        shared = sum(len(part.pair_valid) for part in of_parts) > len(together)
        return all(gaps) or (any(gaps) and not shared)

    def _covers(self, part: np.ndarray) -> bool:
        """Whether the slices of a part cover the body by their thickness, without more gaps than
        all slices have together."""
        positions = _distinct(self._positions[part])
        measured = measure_stack(positions)
        known = [t for i in part.tolist() if (t := self._headers[i].slice_thickness)]
        if not known:
            return True
        return bool(
            measured.spacing_mm <= _COVERED * float(np.median(known))
            and measured.missing <= measure_stack(_distinct(self._positions)).missing
        )

    def _difference(self, large: list[np.ndarray]) -> str:
        """The strongest kind of element that has one value in each part, another in another."""
        kinds = set()
        for element in self._elements:
            values = self._values[element.name]
            of_parts = [{values[i] for i in part.tolist()} - {None, ""} for part in large]
            if all(len(of_part) == 1 for of_part in of_parts) and len(set.union(*of_parts)) > 1:
                kinds.add(element.kind)
        return next((kind for kind in ("value", "label") if kind in kinds), "order")

    def _numbered_through(self) -> bool:
        """Whether Instance Number counts all slices in the order of their positions."""
        numbers = [header.marks.instance_number for header in self._headers]
        if None in numbers:
            return False
        steps = np.diff(np.array(numbers))
        return bool(np.all(steps > 0) or np.all(steps < 0))

    def _name(self, chosen: tuple[str, ...], part: np.ndarray) -> str:
        names = []
        for name in chosen:
            values = {self._values[name][i] for i in part.tolist()} - {None, ""}
            names.append(f"{name}={min(values, key=_sortable) if values else None}")
        return "#".join(names)


def _codes(values: Sequence[Hashable]) -> np.ndarray:
    """[S] int: equal numbers for equal values; missing values are one value."""
    numbers: dict[Hashable, int] = {}
    known = (None if _is_missing(value) else value for value in values)
    return np.array([numbers.setdefault(value, len(numbers)) for value in known])


def _without_rounding(values: list[float | None]) -> list[float | None]:
    """Numbers that follow each other closely, as the smallest of them."""
    smallest: dict[float | None, float | None] = {None: None}
    before, first = 0.0, None
    for value in sorted({value for value in values if value is not None}):
        first = value if value > _ROUNDED * before else first
        smallest[value], before = first, value
    return [smallest[value] for value in values]


def _is_missing(value: Any) -> bool:
    return value is None or value == ""


def _phases(values: list[float | None]) -> list[float | None]:
    """Trigger times that vary a little from beat to beat, as the earliest one of their phase."""
    times = sorted({value for value in values if value is not None})
    gaps = np.diff(times)
    earliest: dict[float | None, float | None] = {None: None}
    for i, time in enumerate(times):
        later = i and gaps[i - 1] <= _FAR_APART * np.median(gaps)
        earliest[time] = earliest[times[i - 1]] if later else time
    if len(set(earliest.values())) == 2:  # with None: no gap is wide
        return values
    return [earliest[value] for value in values]


def _passes(values: list[Any], positions: np.ndarray, step: float) -> np.ndarray:
    """[S] int: the runs along the patient that the slices make in the order of their values.

    A run ends where it turns back, or where the next value's slices overlap it.
    """
    groups = collections.defaultdict(list)
    for i, value in enumerate(values):
        groups[None if _is_missing(value) else value].append(i)
    missing = groups.pop(None, [])
    along = positions.tolist()
    codes = np.full(len(values), -1)
    number, direction = 0, 0.0
    low, high, last = np.inf, -np.inf, None
    for value in sorted(groups):
        start, end = along[groups[value][0]], along[groups[value][-1]]
        way = 0.0 if last is None else (start + end) / 2 - last
        overlap = min(high, end) - max(low, start)
        back = last is not None and (abs(way) < SAME_POSITION_MM or way * direction < 0)
        if back or overlap > _MEETING_SLICES * step:
            number, direction, low, high = number + 1, 0.0, start, end
        else:
            low, high, direction = min(low, start), max(high, end), way
        codes[groups[value]] = number
        last = (start + end) / 2
    codes[missing] = number + 1
    return codes


def _ranges(codes: np.ndarray, positions: np.ndarray) -> list[tuple[float, float]]:
    """First and last position of each code; `positions` ascend."""
    _, first = np.unique(codes, return_index=True)
    _, last = np.unique(codes[::-1], return_index=True)
    starts, ends = positions[first], positions[::-1][last]
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _distinct(positions: np.ndarray) -> np.ndarray:
    """Ascending positions, each once."""
    return positions[np.diff(positions, prepend=-np.inf) >= SAME_POSITION_MM]


def _sortable(value: Any) -> tuple[bool, Any]:
    return (isinstance(value, str), value if isinstance(value, int | float | str) else str(value))


def _words(names: tuple[str, ...]) -> str:
    return " and ".join(name.replace("_", " ") for name in names)
