"""From headers to series that may become volumes: grouping, order along the slice normal, checks of
headers."""

from __future__ import annotations

import collections
import dataclasses
import posixpath
import re
from collections.abc import Callable, Hashable, Iterable

import numpy as np

from data_prep.scan.geometry import (
    MAX_ROTATION_DEGREES,
    StackMeasure,
    canonical_axes,
    field_fault,
    measure_stack,
)
from data_prep.scan.headers import Header
from data_prep.scan.image_kinds import NOT_CHEST, fault, foreign, is_lossy
from data_prep.scan.rules import Rules
from data_prep.scan.slices import (
    group_by_position,
    most_common,
    origins,
    same_grid,
    strays_of,
    thickness_of,
)
from data_prep.scan.stacks import Stack, canonical_grid, separate_stacks

# images beside the slices of a series; they do not count as lost slices
_EXTRAS = {"secondary_capture", "derived_image", "not_grey"}
_NOTED_DEGREES = 0.5  # smaller tilts and rotations are not noted


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A series, or a part of a series, that is not taken. `detail` is free of identifiers."""

    series_key: str
    headers: tuple[Header, ...]
    reason: str
    detail: str
    # [h, w] uint8, a slice from its middle; None: no pixels were read
    thumbnail: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)


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
    # of the thickest slice, but for a few odd ones; the spacing where all slices lack it
    slice_thickness_mm: float
    # between rows, between columns of the oriented images: the most frequent one
    pixel_spacing_mm: tuple[float, float]
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

    Images of one Series Instance UID, study and patient are a series. It is split by plane and,
    where several stacks are mixed, by the elements that tell them apart (`stacks`). Acquisitions
    that follow each other (step and shoot) stay one stack, even if they share a slice. Localizers,
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
    aside, images = _sorted_out(slices, foreign)
    if len(images) < rules.min_slices and len(aside) > len(images):
        return [_reject_most_common(series_key, slices, aside)]
    if len(images) < rules.min_slices:
        return [_too_few(series_key, slices, len(images), rules)]
    faults, good = _sorted_out(images, fault)
    # The mark may be missing on other slices.
    if any(reason == "burned_in_annotation" for _, reason in faults):
        return [Rejection(series_key, tuple(slices), "burned_in_annotation", "")]
    lost = sum(reason not in _EXTRAS for _, reason in faults)
    if lost > rules.max_lost_fraction * (lost + len(good)) or (
        faults and len(good) < rules.min_slices
    ):
        return [_reject_most_common(series_key, slices, faults)]

    planes = _cluster(good, lambda header: header.orientation, _same_plane)
    stacks = [
        (stack, _stack_name(stack))
        for plane in planes
        for stack in separate_stacks(plane, rules.max_lost_fraction)
    ]
    largest = max(range(len(stacks)), key=lambda i: len(stacks[i][0].headers))
    planned = []
    for i, (stack, name) in enumerate(stacks):
        key = series_key if len(stacks) == 1 else f"{series_key}#{name}"
        planned.append(_check_stack(key, stack, aside + faults if i == largest else [], rules))
    return planned


def _sorted_out(
    headers: Iterable[Header], reason_of: Callable[[Header], str | None]
) -> tuple[list[tuple[Header, str]], list[Header]]:
    """The headers with a reason against them, and the others."""
    out, rest = [], []
    for header in headers:
        if reason := reason_of(header):
            out.append((header, reason))
        else:
            rest.append(header)
    return out, rest


_NAMED_BY = {
    "missing_position": {"Image Position (Patient)"},
    "missing_pixel_spacing": {"Pixel Spacing"},
    "unknown_orientation": {"Image Orientation (Patient)"},
}


def _reject_most_common(
    series_key: str, slices: list[Header], faults: list[tuple[Header, str]]
) -> Rejection:
    counts = collections.Counter(reason for _, reason in faults)
    reason, count = max(sorted(counts.items()), key=lambda item: item[1])
    detail = f"{count} of {len(slices)} images"
    names = {name for header, why in faults if why == reason for name in header.unreadable}
    if named := names & _NAMED_BY.get(reason, set()):
        detail += f", whose {' and '.join(sorted(named))} is no number"
    return Rejection(series_key, tuple(slices), reason, detail)


def _too_few(series_key: str, slices: Iterable[Header], count: int, rules: Rules) -> Rejection:
    return Rejection(series_key, tuple(slices), "too_few_slices", too_few_detail(count, rules))


def too_few_detail(count: int, rules: Rules) -> str:
    """The detail of the reason `too_few_slices`."""
    return f"{count} {'slice' if count == 1 else 'slices'}, at least {rules.min_slices} asked"


def _cluster(
    headers: list[Header],
    key: Callable[[Header], Hashable],
    same: Callable[[Header, Header], bool],
) -> list[list[Header]]:
    """Headers that are the same as the first one of their cluster. Equal keys are the same."""
    clusters: list[list[Header]] = []
    number_of: dict[Hashable, int] = {}
    for header in headers:
        number = number_of.get(key(header))
        if number is None:
            fitting = (i for i, cluster in enumerate(clusters) if same(cluster[0], header))
            number = number_of[key(header)] = next(fitting, len(clusters))
            if number == len(clusters):
                clusters.append([])
        clusters[number].append(header)
    return clusters


def _same_plane(a: Header, b: Header) -> bool:
    """Whether two images have the same axes once they are oriented, however they are stored.

    The tolerance is 0.3 degrees.
    """
    axes = canonical_axes(a.orientation), canonical_axes(b.orientation)
    return bool(
        np.allclose(axes[0].left, axes[1].left, atol=0.005)
        and np.allclose(axes[0].posterior, axes[1].posterior, atol=0.005)
    )


def _stack_name(stack: Stack) -> str:
    """A suffix that stays the same when other stacks join the series."""
    first = stack.headers[0]
    acquisition, *others = stack.name.split("#")
    if not acquisition.startswith("acquisition="):
        acquisition, others = f"acquisition={first.acquisition_number}", [stack.name]
    cosines = ",".join(f"{value:.4f}" for value in first.orientation)
    return "#".join([acquisition, f"orientation={cosines}", *filter(None, others)])


def _check_stack(
    series_key: str, stack: Stack, extras: list[tuple[Header, str]], rules: Rules
) -> SeriesCandidate | Rejection:
    everything = (*stack.headers, *(header for header, _ in extras))

    def rejected(reason: str, detail: str) -> Rejection:
        elsewhere = rules.require_lung and named_body_part(stack.headers)
        if elsewhere:  # it needs no look at its pixels, as a chest of such a name would
            body_part = f"Body Part Examined is {elsewhere}"
            reason, detail = "no_chest", f"{body_part}; and {reason}: {detail}"
        return Rejection(series_key, everything, reason, detail)

    if stack.fault:
        return rejected(*stack.fault)
    grids = _cluster(stack.headers, canonical_grid, same_grid)
    grids.sort(key=len, reverse=True)
    others = [header for grid in grids[1:] for header in grid]
    if len(others) > rules.max_lost_fraction * len(stack.headers):
        return rejected("grid_varies", f"{len(grids)} matrices or pixel spacings")
    one = grids[0][0]
    if unsound := field_fault(one.rows, one.columns, one.pixel_spacing):
        return rejected("implausible_spacing", unsound)
    dropped = [(header, "other_grid") for header in others] + extras
    slices, positions = group_by_position(grids[0])
    images = {(h.sop_instance_uid or h.source, h.frame) for h in grids[0]}
    if len(slices) == 1 and len(images) >= max(2, rules.min_slices):
        return rejected("missing_position", f"the same in all {len(images)} images")
    if len(slices) < rules.min_slices:
        return rejected("too_few_slices", too_few_detail(len(slices), rules))
    strays = strays_of(slices)
    for group, astray in zip(slices, strays, strict=True):
        dropped += [(header, "other_origin") for header in astray]
        group[:] = [header for header in group if header not in astray]

    headers = tuple(group[0] for group in slices)
    first = headers[0]
    thickness, odd = thickness_of(headers, positions, rules)
    measured = measure_stack(positions, origins(headers), thickness)
    rotation = canonical_axes(first.orientation).rotation_degrees
    if rotation > MAX_ROTATION_DEGREES:
        return rejected(
            "rotated", f"{rotation:.1f} degrees, at most {MAX_ROTATION_DEGREES:g} are taken"
        )
    notes = [f"split_by_{name}" for name in stack.split_by]
    if not (first.patient or first.patient_id):
        notes.append("no_patient_id")
    if first.patient:
        notes.append("patient_ids_joined")
    if thickness is None:
        notes.append("no_slice_thickness")
        thickness = measured.spacing_mm
    if thickness > rules.max_slice_thickness_mm + 1e-4:
        return rejected(
            "too_thick", f"{thickness:g} mm, at most {rules.max_slice_thickness_mm:g} mm asked"
        )
    if irregular := irregularity(measured, len(headers), rules):
        return rejected(*irregular)
    tilt = round(measured.tilt_degrees, 3)
    if tilt < _NOTED_DEGREES:  # the tag counts only where the slices show no tilt
        tilt = abs(first.gantry_tilt or 0.0)
    flags = {
        "odd_slice_thickness": odd,
        "other_grid_dropped": bool(others),
        "other_origin_dropped": any(strays),
        "gantry_tilt": tilt >= _NOTED_DEGREES,
        "rotated": rotation >= _NOTED_DEGREES,
        "other_body_part": rules.require_lung and bool(named_body_part(headers)),
    }
    return SeriesCandidate(
        series_key=series_key,
        exam_key=(first.patient_key, first.study_instance_uid or series_key),
        patient_key=first.patient_key,
        headers=headers,
        duplicates=tuple(tuple(group[1:]) for group in slices),
        position_mm=tuple(positions.tolist()),
        slice_spacing_mm=measured.spacing_mm,
        slice_thickness_mm=thickness,
        pixel_spacing_mm=most_common([canonical_grid(header)[2] for header in headers]),
        gantry_tilt_degrees=tilt,
        dropped=tuple(dropped),
        notes=(*notes, *(name for name, raised in flags.items() if raised)),
        preference=_preference(headers, thickness, series_key, rules),
    )


def named_body_part(headers: Iterable[Header]) -> str:
    """The part of the body, one without lung, that most headers name, or ""."""
    counts = collections.Counter(header.body_part for header in headers)
    most = max(counts, key=lambda name: counts[name], default="")
    return most if most in NOT_CHEST else ""


def irregularity(measured: StackMeasure, num_slices: int, rules: Rules) -> tuple[str, str] | None:
    """(reason, detail) if a stack lost too many slices, or if it is irregular and the rules refuse
    irregular stacks; else None."""
    total = num_slices + measured.missing
    if measured.crowded > rules.max_lost_fraction * num_slices:
        return "mixed_stacks", (
            f"{measured.crowded} of {num_slices - 1} steps are half the spacing or less, and no "
            "element parts the slices"
        )
    if measured.missing > rules.max_lost_fraction * total:
        return "too_many_lost", f"{measured.missing} of {total} slices missing"
    if rules.irregular == "refuse" and measured.missing:
        return "irregular", f"{measured.missing} of {total} slices missing"
    if rules.irregular == "refuse" and (measured.uneven or measured.irregular):
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
    headers: tuple[Header, ...], thickness: float, series_key: str, rules: Rules
) -> tuple:
    first = headers[0]
    kernel = kernel_class(first)
    rank = 0 if rules.preferred_kernel in ("any", kernel) else 1 if kernel == "unknown" else 2
    return (
        rank,
        round(thickness, 2),
        sum(map(is_lossy, headers)) > len(headers) / 2,
        -len(headers),
        first.image_type[:1] != ("ORIGINAL",),
        series_key,
    )


def select_reconstructions(
    candidates: Iterable[SeriesCandidate], rules: Rules
) -> list[list[SeriesCandidate]]:
    """The candidates of each exam (patient and study) in order of preference; with
    `reconstructions="all"` a list for each candidate.

    The order: the preferred kernel class (soft tissue by default; unknown kernels next), then
    thinner slices, then no loss by compression, then more slices, then ORIGINAL before DERIVED,
    then the smaller series key.
    """
    ordered = sorted(candidates, key=lambda candidate: (candidate.exam_key, candidate.preference))
    if rules.reconstructions == "all":
        return [[candidate] for candidate in ordered]
    exams = collections.defaultdict(list)
    for candidate in ordered:
        exams[candidate.exam_key].append(candidate)
    return list(exams.values())
