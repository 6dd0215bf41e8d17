"""From headers to series that may become volumes: grouping, order along the slice normal, checks of
headers."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import posixpath
import re
from collections.abc import Iterable

import numpy as np

from data_prep.scan.geometry import StackMeasure, canonical_axes, field_fault, measure_stack
from data_prep.scan.headers import CT_IMAGE_STORAGE, OTHER_QUANTITY, Header
from data_prep.scan.rules import Rules

_SAME_POSITION_MM = 0.05
_MEETING_SLICES = 1.5  # slice spacings that two acquisitions in a row may share
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_LOCALIZER = {"LOCALIZER", "SCOUT", "SCANOGRAM", "TOPOGRAM", "SURVIEW"}
_PROJECTED = {
    "MIP",
    "MINIP",
    "MAXIP",
    "MNIP",
    "MAX_IP",
    "MIN_IP",
    "PROJECTION IMAGE",
    "VRT",
    "SSD",
    "3D",
    "VOLREN",
}
# images beside the slices of a series; they do not count as lost slices
_EXTRAS = {"secondary_capture", "derived_image", "not_grey"}
# Rescale Types of other quantities: the terms of DICOM, and units as vendors write them
_NOT_HU_RESCALE = re.compile(
    f"(OD|MGML|Z_?EFF|ED|EDW|HU_?MOD|PCT|{OTHER_QUANTITY})|.*([/%]|IODINE|DENSITY).*"
)
_NOT_CHEST = {
    "HEAD",
    "BRAIN",
    "SKULL",
    "ORBIT",
    "SINUS",
    "KNEE",
    "ANKLE",
    "FOOT",
    "HAND",
    "WRIST",
    "ELBOW",
}


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A series, or a part of a series, that is not taken. `detail` is free of identifiers."""

    series_key: str
    headers: tuple[Header, ...]
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class SeriesCandidate:
    """A stack of slices that passed the header checks.

    `headers`, `duplicates` and `position_mm` run along the slices, towards superior. Further
    headers at a slice's position are its duplicates. `load_volume` compares their pixels.
    """

    # the Series Instance UID, with a suffix where a series has several stacks; unique in its exam
    series_key: str
    exam_key: tuple[str, str]  # patient key, Study Instance UID
    patient_key: str
    headers: tuple[Header, ...]
    duplicates: tuple[tuple[Header, ...], ...]
    position_mm: tuple[float, ...]
    slice_spacing_mm: float  # median
    slice_thickness_mm: float  # the thickest slice; the spacing where all slices lack it
    gantry_tilt_degrees: float
    dropped: tuple[tuple[Header, str], ...]  # each with its reason
    notes: tuple[str, ...]  # names of `data_prep.scan.reasons.NOTES`
    preference: tuple  # smaller is preferred within an exam

    @property
    def groups(self) -> list[tuple[Header, ...]]:
        """For each slice its header, followed by its duplicates."""
        pairs = zip(self.headers, self.duplicates, strict=True)
        return [(first, *others) for first, others in pairs]

    @property
    def all_headers(self) -> tuple[Header, ...]:
        """Every header of the stack: slices, duplicates and dropped headers."""
        extra = [header for group in self.duplicates for header in group]
        return (*self.headers, *extra, *(header for header, _ in self.dropped))

    def rejected(self, reason: str, detail: str) -> Rejection:
        """The whole stack as a rejection."""
        return Rejection(self.series_key, self.all_headers, reason, detail)


def plan_series(headers: Iterable[Header], rules: Rules) -> list[SeriesCandidate | Rejection]:
    """Groups images into stacks and checks their headers.

    Images of one Series Instance UID, study and patient are a series. It is split by orientation
    and, where several acquisitions cover the same range, by Acquisition Number. Acquisitions that
    follow each other (step and shoot) stay one stack, even if they share a slice. Localizers,
    reformats in other planes and captures within a series are dropped. Where the slices of a stack
    differ in matrix or pixel spacing, the most frequent grid is kept if at most
    `max_lost_fraction` of the slices differ from it. Otherwise the stack is refused.

    Returns:
        One entry for each stack, in an order that depends on the headers alone. Every header is in
        exactly one entry.
    """
    series = collections.defaultdict(list)
    for header in headers:
        series_key = (
            header.series_instance_uid or f"no-series-uid:{posixpath.dirname(_location(header))}"
        )
        series[series_key, header.study_instance_uid, header.patient_key].extend(
            slice_headers(header)
        )
    planned = []
    for key in sorted(series):
        slices = sorted(series[key], key=lambda header: (header.source, header.frame))
        planned.extend(_plan_one(key[0], slices, rules))
    return planned


def slice_headers(header: Header) -> list[Header]:
    """One header for each slice: the header itself, or a header for each frame with the frame's own
    geometry and rescale."""
    if not header.frames:
        if header.number_of_frames == 1:
            return [header]
        return [
            dataclasses.replace(header, frame=i, position=None)
            for i in range(header.number_of_frames)
        ]
    names = [field.name for field in dataclasses.fields(header.frames[0])]
    return [
        dataclasses.replace(
            header, frame=i, frames=(), **{name: getattr(frame, name) for name in names}
        )
        for i, frame in enumerate(header.frames)
    ]


def _location(header: Header) -> str:
    return (
        f"{header.source.path}/{header.source.member}"
        if header.source.member
        else header.source.path
    )


def _plan_one(
    series_key: str, slices: list[Header], rules: Rules
) -> list[SeriesCandidate | Rejection]:
    if not slices[0].series_instance_uid:
        return [Rejection(series_key, tuple(slices), "missing_series_uid", "")]
    foreign = {id(h): reason for h in slices if (reason := _foreign(h))}
    images = [h for h in slices if id(h) not in foreign]
    aside = [(h, foreign[id(h)]) for h in slices if id(h) in foreign]
    if len(images) < rules.min_slices and len(aside) > len(images):
        return [_reject_most_common(series_key, slices, aside)]
    if len(images) < rules.min_slices:
        return [_too_few(series_key, slices, len(images), rules)]
    faulty = {id(h): reason for h in images if (reason := _fault(h, rules))}
    good = [h for h in images if id(h) not in faulty]
    faults = [(h, faulty[id(h)]) for h in images if id(h) in faulty]
    # The mark may be missing on other slices.
    if any(reason == "burned_in_annotation" for _, reason in faults):
        return [Rejection(series_key, tuple(slices), "burned_in_annotation", "")]
    lost = sum(reason not in _EXTRAS for _, reason in faults)
    if lost > rules.max_lost_fraction * (lost + len(good)) or (
        faults and len(good) < rules.min_slices
    ):
        return [_reject_most_common(series_key, slices, faults)]

    stacks = []
    for oriented in _cluster(good, _same_orientation):
        stacks.extend(_stacks_of(oriented, rules))
    largest = max(range(len(stacks)), key=lambda i: len(stacks[i][0]))
    planned = []
    for i, (stack, dropped, split_by) in enumerate(stacks):
        key = series_key if len(stacks) == 1 else f"{series_key}#{_stack_name(stack)}"
        extra = aside + faults if i == largest else []
        planned.append(_check_stack(key, stack, dropped + extra, split_by, rules))
    return planned


def _foreign(header: Header) -> str | None:
    """Why an image is not an axial CT slice at all."""
    if header.modality != "CT" and (
        header.modality or header.sop_class_uid not in CT_IMAGE_STORAGE
    ):
        return "not_ct"
    if _LOCALIZER & set(header.image_type):
        return "localizer"
    if header.orientation is not None:
        axes = canonical_axes(header.orientation)
        if axes is None:
            return "unknown_orientation"
        if not axes.axial:
            return "not_axial"
    return None


def _fault(header: Header, rules: Rules) -> str | None:
    """Why an axial CT image cannot be a slice of a volume.

    By their Image Type, secondary captures, DERIVED\\SECONDARY images and projections are without
    CT numbers. ORIGINAL\\SECONDARY (some scanners' own images after a transfer) and
    DERIVED\\PRIMARY (axial reconstructions, lossy copies) have them.
    """
    if header.sop_class_uid == _SECONDARY_CAPTURE or header.sop_class_uid.startswith(
        _SECONDARY_CAPTURE + "."
    ):
        return "secondary_capture"
    if header.image_type[:2] == ("DERIVED", "SECONDARY"):
        return "derived_image"
    if _PROJECTED & set(header.image_type[2:]) or _NOT_HU_RESCALE.fullmatch(header.rescale_type):
        return "derived_image"
    if header.samples_per_pixel != 1 or header.photometric not in (
        "MONOCHROME1",
        "MONOCHROME2",
        "",
    ):
        return "not_grey"
    if header.burned_in_annotation:
        return "burned_in_annotation"
    if header.orientation is None:
        return "unknown_orientation"
    if header.position is None:
        return "missing_position"
    if header.pixel_spacing is None:
        return "missing_pixel_spacing"
    if rules.require_lung and header.body_part in _NOT_CHEST:
        return "no_chest"
    return None


def _reject_most_common(
    series_key: str, slices: list[Header], faults: list[tuple[Header, str]]
) -> Rejection:
    counts = collections.Counter(reason for _, reason in faults)
    reason, count = max(sorted(counts.items()), key=lambda item: item[1])
    return Rejection(series_key, tuple(slices), reason, f"{count} of {len(slices)} images")


def _too_few(series_key: str, slices: Iterable[Header], count: int, rules: Rules) -> Rejection:
    return Rejection(series_key, tuple(slices), "too_few_slices", too_few_detail(count, rules))


def too_few_detail(count: int, rules: Rules) -> str:
    """The detail of the reason `too_few_slices`."""
    return f"{count} {'slice' if count == 1 else 'slices'}, at least {rules.min_slices} asked"


def _cluster(headers: list[Header], same) -> list[list[Header]]:
    clusters: list[list[Header]] = []
    for header in headers:
        cluster = next((c for c in clusters if same(c[0], header)), None)
        if cluster is None:
            clusters.append([header])
        else:
            cluster.append(header)
    return clusters


def _same_orientation(a: Header, b: Header) -> bool:
    # The tolerance is 0.3 degrees.
    return a.orientation == b.orientation or bool(
        np.allclose(a.orientation, b.orientation, atol=0.005)
    )


def _same_grid(a: Header, b: Header) -> bool:
    if (a.rows, a.columns) != (b.rows, b.columns):
        return False
    return a.pixel_spacing == b.pixel_spacing or bool(
        np.allclose(a.pixel_spacing, b.pixel_spacing, rtol=0.002)
    )


# slices; dropped headers with their reasons; how the series was split, or ""
Stack = tuple[list[Header], list[tuple[Header, str]], str]


def _stacks_of(headers: list[Header], rules: Rules) -> list[Stack]:
    """Slices of one orientation, as stacks. A stack whose grid varies too much is marked as split
    by "grid"."""
    if _acquisitions_overlap(headers, rules):
        by_acquisition = collections.defaultdict(list)
        for header in headers:
            by_acquisition[header.acquisition_number].append(header)
        groups = [
            (by_acquisition[number], "acquisition") for number in sorted(by_acquisition, key=str)
        ]
    else:
        groups = [(headers, "")]
    stacks = []
    for group, split_by in groups:
        grids = sorted(_cluster(group, _same_grid), key=len, reverse=True)
        others = [(header, "other_grid") for grid in grids[1:] for header in grid]
        if len(others) > rules.max_lost_fraction * len(group):
            stacks.append((group, [], "grid"))
        else:
            stacks.append((grids[0], others, split_by))
    return stacks


def _acquisitions_overlap(headers: list[Header], rules: Rules) -> bool:
    """Whether the ranges of two acquisitions overlap by more than `_MEETING_SLICES`.

    A few slices without an Acquisition Number may belong to any acquisition. Many of them count as
    an acquisition.
    """
    positions = collections.defaultdict(list)
    for header, position in zip(*_order(headers), strict=True):
        positions[header.acquisition_number].append(position)
    if len(positions[None]) <= rules.max_lost_fraction * len(headers):
        del positions[None]
    if len(positions) < 2:
        return False
    steps = np.concatenate([np.diff(along) for along in positions.values()])
    steps = steps[steps >= _SAME_POSITION_MM]
    if not len(steps):
        return False
    ranges = sorted((along[0], along[-1]) for along in positions.values())
    ends = itertools.accumulate((end for _, end in ranges), max)
    allowed = _MEETING_SLICES * float(np.median(steps))
    return any(
        min(end_before, end) - start > allowed
        for end_before, (start, end) in zip(ends, ranges[1:], strict=False)
    )


def _order(headers: list[Header]) -> tuple[list[Header], list[float]]:
    """Headers sorted towards superior, and their positions (mm) along the canonical normal."""
    normal = canonical_axes(headers[0].orientation).normal
    positions = np.array([header.position for header in headers]) @ normal
    order = np.argsort(positions, kind="stable")
    return [headers[i] for i in order], [float(positions[i]) for i in order]


def _stack_name(stack: list[Header]) -> str:
    """A suffix that stays the same when other stacks join the series."""
    first = stack[0]
    cosines = ",".join(f"{value:.4f}" for value in first.orientation)
    return f"acquisition={first.acquisition_number}#orientation={cosines}"


def _check_stack(
    series_key: str,
    stack: list[Header],
    dropped: list[tuple[Header, str]],
    split_by: str,
    rules: Rules,
) -> SeriesCandidate | Rejection:
    everything = (*stack, *(header for header, _ in dropped))
    if split_by == "grid":
        sizes = collections.Counter((h.rows, h.columns, *h.pixel_spacing) for h in stack)
        return Rejection(
            series_key, everything, "grid_varies", f"{len(sizes)} matrices or pixel spacings"
        )
    if fault := field_fault(stack[0].rows, stack[0].columns, stack[0].pixel_spacing):
        return Rejection(series_key, everything, "implausible_spacing", fault)
    ordered, positions = _order(stack)
    slices: list[list[Header]] = []
    slice_positions: list[float] = []
    for header, position in zip(ordered, positions, strict=True):
        if slices and position - slice_positions[-1] < _SAME_POSITION_MM:
            slices[-1].append(header)
        else:
            slices.append([header])
            slice_positions.append(position)
    for group in slices:
        group.sort(key=lambda header: (header.acquisition_number or 0, header.source, header.frame))
    if len(slices) < rules.min_slices:
        return _too_few(series_key, everything, len(slices), rules)

    headers = tuple(group[0] for group in slices)
    measured = measure_stack(
        np.array(slice_positions), np.array([header.position for header in headers])
    )
    thicknesses = [
        header.slice_thickness for header in headers if header.slice_thickness is not None
    ]
    thickness = max(thicknesses, default=measured.spacing_mm)
    notes = [f"split_by_{split_by}"] if split_by else []
    if not (headers[0].patient or headers[0].patient_id):
        notes.append("no_patient_id")
    if headers[0].patient:
        notes.append("patient_ids_joined")
    if not thicknesses:
        notes.append("no_slice_thickness")
    if any(reason == "other_grid" for _, reason in dropped):
        notes.append("other_grid_dropped")
    if thickness > rules.max_slice_thickness_mm + 1e-4:
        detail = f"{thickness:g} mm, at most {rules.max_slice_thickness_mm:g} mm asked"
        return Rejection(series_key, everything, "too_thick", detail)
    fault = irregularity(measured, len(headers), rules)
    if fault:
        return Rejection(series_key, everything, *fault)
    tilt = round(measured.tilt_degrees, 3)
    if tilt < 0.5:  # degrees; the tag counts only where the slices show no tilt
        tilt = abs(headers[0].gantry_tilt or 0.0)
    if tilt >= 0.5:
        notes.append("gantry_tilt")
    first = headers[0]
    return SeriesCandidate(
        series_key=series_key,
        exam_key=(first.patient_key, first.study_instance_uid or series_key),
        patient_key=first.patient_key,
        headers=headers,
        duplicates=tuple(tuple(group[1:]) for group in slices),
        position_mm=tuple(slice_positions),
        slice_spacing_mm=measured.spacing_mm,
        slice_thickness_mm=thickness,
        gantry_tilt_degrees=tilt,
        dropped=tuple(dropped),
        notes=tuple(notes),
        preference=_preference(first, thickness, len(headers), series_key, rules),
    )


def irregularity(measured: StackMeasure, num_slices: int, rules: Rules) -> tuple[str, str] | None:
    """(reason, detail) if a stack lost too many slices, or if it is irregular and the rules refuse
    irregular stacks; else None."""
    total = num_slices + measured.missing
    if measured.missing > rules.max_lost_fraction * total:
        return "too_many_lost", f"{measured.missing} of {total} slices missing"
    if rules.irregular == "refuse" and measured.missing:
        return "irregular", f"{measured.missing} of {total} slices missing"
    if rules.irregular == "refuse" and measured.uneven:
        return "irregular", "uneven slice spacing"
    if rules.irregular == "refuse" and measured.jumps:
        return "irregular", "the origin jumps within the plane"
    return None


def kernel_class(header: Header) -> str:
    """`"soft"`, `"sharp"` or `"unknown"`, from the name of a convolution kernel.

    Names by vendor: Siemens has letters and a number (B31f, Br40d, I70f), sharp from 50 on. GE has
    words. Philips has letters. Canon has FC numbers: 01 to 29 for body, from 30 on for bone and
    lung.
    """
    name = header.kernel.upper()
    if match := re.fullmatch(r"FC\s*(\d+).*", name):
        return "soft" if int(match[1]) < 30 else "sharp"
    if match := re.fullmatch(r"[A-Z]{1,2}\s*(\d{2})[A-Z]*", name):
        return "soft" if int(match[1]) < 50 else "sharp"
    if re.search(r"LUNG|BONE|EDGE|SHARP|CHST|ULTRA|^(D|E|L|Y[A-D])$", name):
        return "sharp"
    if re.search(r"STAND|STD|SOFT|SMOOTH|DETAIL|BODY|^(A|B|C|CB|SA|SB)$", name):
        return "soft"
    return "unknown"


def _preference(
    first: Header, thickness: float, num_slices: int, series_key: str, rules: Rules
) -> tuple:
    kernel = kernel_class(first)
    rank = 0 if rules.preferred_kernel in ("any", kernel) else 1 if kernel == "unknown" else 2
    return (
        rank,
        round(thickness, 2),
        -num_slices,
        first.image_type[:1] != ("ORIGINAL",),
        series_key,
    )


def select_reconstructions(
    candidates: Iterable[SeriesCandidate], rules: Rules
) -> list[list[SeriesCandidate]]:
    """The candidates of each exam (patient and study) in order of preference; with
    `reconstructions="all"` a list for each candidate.

    The order: the preferred kernel class (soft tissue by default; unknown kernels next), then
    thinner slices, then more slices, then ORIGINAL before DERIVED, then the smaller series key.
    """
    ordered = sorted(candidates, key=lambda candidate: (candidate.exam_key, candidate.preference))
    if rules.reconstructions == "all":
        return [[candidate] for candidate in ordered]
    exams = collections.defaultdict(list)
    for candidate in ordered:
        exams[candidate.exam_key].append(candidate)
    return list(exams.values())
