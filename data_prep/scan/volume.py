"""From a planned series to a volume in Hounsfield units, canonically oriented, or to a named reason
against it."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from data_prep.scan.anatomy import ChestSummary, covers_chest, summarise
from data_prep.scan.archives import ArchiveDirectory, reading_ahead, will_read
from data_prep.scan.geometry import canonical_axes, measure_stack, orient
from data_prep.scan.headers import NIFTI, Header
from data_prep.scan.hounsfield import PlausibilityCount, has_rescale, to_hu
from data_prep.scan.image_kinds import is_lossy_copy
from data_prep.scan.pixels import PixelReader
from data_prep.scan.rules import Rules
from data_prep.scan.series import (
    Rejection,
    SeriesCandidate,
    irregularity,
    named_body_part,
    too_few_detail,
)
from data_prep.scan.slice_scale import SAMPLE_STEP, slices_on_another_scale
from data_prep.scan.slices import origins
from data_prep.scan.stored_bits import PixelError
from data_prep.scan.window import grey_thumbnail

_SAMPLE_STEP = 8  # slices; see `_no_lung_in_sample`
_SAMPLE_MM = 25.0
_SAMPLE_LUNG_ML = 100.0
_READ_AHEAD = 8  # slices that the disk fetches while one slice is decoded


@dataclasses.dataclass(frozen=True)
class Volume:
    """A CT volume: rows to posterior, columns to the patient's left, slices to superior."""

    candidate: SeriesCandidate
    headers: tuple[Header, ...]  # one for each slice, in the order of `hu`
    hu: np.ndarray  # [S, H, W] int16; float32 where a value is fractional or beyond int16
    position_mm: np.ndarray  # [S] float64, along the slice normal, increasing
    pair_valid: np.ndarray  # [S] bool: the next slice is the neighbour, with no gap or jump between
    pixel_spacing_mm: tuple[float, float]  # between rows, between columns, after orientation
    slice_spacing_mm: float  # median
    slice_thickness_mm: float
    gantry_tilt_degrees: float
    chest: ChestSummary
    notes: tuple[str, ...]  # names of `data_prep.scan.reasons.NOTES`
    # headers without a slice in the volume, each with its reason
    dropped: tuple[tuple[Header, str], ...]


def load_volume(
    input_dir: ArchiveDirectory, candidate: SeriesCandidate, rules: Rules
) -> Volume | Rejection:
    """Reads the pixels of a candidate, once. Never raises for the content of the files.

    At most one volume is in memory. Slices that cannot be decoded are dropped, up to
    `rules.max_lost_fraction`, and so are slices on another scale than the slices around them
    (`slice_scale`), and slices without rescale tags among others with tags. Identical slices at one
    position count once. Where two acquisitions
    meet, each may have its own image at one position, and both are right: the first acquisition's
    image is taken, at up to `rules.max_lost_fraction` of the positions. Different images of one
    acquisition at one position refuse the volume. Padding and all values below -1500 HU become air,
    -1000 HU. The volume must be plausible as HU and, with `rules.require_lung`, cover the chest.

    Raises:
        OSError: the archive cannot be read any more.
    """
    input_dir = reading_ahead(input_dir, (h.source for group in candidate.groups for h in group))
    reader = PixelReader(input_dir)
    sampled = candidate.headers[0].transfer_syntax == NIFTI or named_body_part(candidate.headers)
    if rules.require_lung and sampled:
        if refused := _no_lung_in_sample(reader, candidate):
            return refused
    loader = _SliceLoader(reader, len(candidate.headers))
    loaded = _load_slices(input_dir, candidate, rules, loader)
    if isinstance(loaded, Rejection):
        return dataclasses.replace(loaded, thumbnail=loader.thumbnail())
    return loaded


def _load_slices(
    input_dir: ArchiveDirectory, candidate: SeriesCandidate, rules: Rules, loader: _SliceLoader
) -> Volume | Rejection:
    tagged = {has_rescale(header) for header in candidate.headers}
    kept: list[int] = []
    lost: list[tuple[Header, str]] = []
    repeated: list[tuple[Header, str]] = []
    meeting: list[tuple[Header, str]] = []
    lossy: list[tuple[Header, str]] = []
    used: list[Header] = []
    will_read(input_dir, (header.source for header in candidate.headers[:_READ_AHEAD]))
    for i, group in enumerate(candidate.groups):
        taken = None
        following = candidate.headers[i + _READ_AHEAD : i + _READ_AHEAD + 1]
        will_read(input_dir, (header.source for header in following))
        for header in group:
            try:
                if len(tagged) == 2 and not has_rescale(header):
                    raise PixelError("missing_rescale", "other slices have rescale tags")
                if taken is None:
                    loader.add(header)
                    taken = header
                elif loader.equals_last(header):
                    repeated.append((header, "duplicate_slice"))
                elif is_lossy_copy(header, taken):
                    lossy.append((header, "lossy_copy"))
                elif _acquisitions_differ(header, taken):
                    meeting.append((header, "acquisitions_meet"))
                else:
                    return candidate.rejected(
                        "contradictory_duplicates", f"different images at slice {i + 1}"
                    )
            except PixelError as error:
                lost.append((header, error.reason))
        if taken is not None:
            kept.append(i)
            used.append(taken)

    hu, odd = loader.volume(used)
    # Where most are odd, none is right to compare with.
    reason = "other_scale" if 2 * len(odd) <= len(used) else "implausible_hu"
    lost += [(used[i], reason) for i in odd]
    kept = [position for i, position in enumerate(kept) if i not in odd]
    used = [header for i, header in enumerate(used) if i not in odd]
    total = len(candidate.headers)
    if total - len(kept) > rules.max_lost_fraction * total or not kept:
        reason = collections.Counter(reason for _, reason in lost).most_common(1)[0][0]
        return candidate.rejected(reason, f"{total - len(kept)} of {total} slices")
    if len(meeting) > rules.max_lost_fraction * total:
        return candidate.rejected(
            "contradictory_duplicates", f"different images at {len(meeting)} of {total} slices"
        )
    position_mm = np.array(candidate.position_mm)[kept]
    measured = measure_stack(position_mm, origins(used), candidate.slice_thickness_mm)
    if fault := irregularity(measured, len(kept), rules):
        return candidate.rejected(*fault)
    if len(kept) < rules.min_slices:
        return candidate.rejected("too_few_slices", too_few_detail(len(kept), rules))
    if fault := loader.plausibility.fault(without=odd):
        if tagged != {False}:
            return candidate.rejected("implausible_hu", fault)
        unreadable = [name for name in used[0].unreadable if name.startswith("Rescale")]
        detail = "".join(f"{name} is no number; " for name in unreadable) + fault
        return candidate.rejected("missing_rescale", detail)

    pixel_spacing_mm = candidate.pixel_spacing_mm
    chest = summarise(hu, pixel_spacing_mm, measured.spacing_mm)
    if rules.require_lung and not covers_chest(chest):
        return candidate.rejected("no_chest", _lung(chest, used))
    flags = {
        "gaps": measured.missing > 0,
        "uneven_spacing": measured.uneven,
        "in_plane_jump": measured.jumps,
        "irregular_part": measured.irregular,
        "sparse_slices": measured.sparse,
        "slices_lost": len(kept) < total,
        "duplicates_dropped": bool(repeated),
        "acquisitions_meet": bool(meeting),
        "lossy_copies_dropped": bool(lossy),
        "no_rescale_tags": tagged == {False},
        "hu_against_table": loader.hu_against_table,
        "fractional_hu": hu.dtype != np.int16,
    }
    return Volume(
        candidate=candidate,
        headers=tuple(used),
        hu=hu,
        position_mm=position_mm,
        pair_valid=measured.pair_valid,
        pixel_spacing_mm=pixel_spacing_mm,
        slice_spacing_mm=measured.spacing_mm,
        slice_thickness_mm=candidate.slice_thickness_mm,
        gantry_tilt_degrees=candidate.gantry_tilt_degrees,
        chest=chest,
        notes=(
            *candidate.notes,
            *used[0].notes,
            *(name for name, raised in flags.items() if raised),
        ),
        dropped=(*candidate.dropped, *repeated, *meeting, *lossy, *lost),
    )


def _no_lung_in_sample(reader: PixelReader, candidate: SeriesCandidate) -> Rejection | None:
    """The rejection `no_chest` if a file of many slices has hardly any lung in every 8th of them
    (at least every 25 mm), so that the others need not be computed. None leaves the judgement to
    the whole volume."""
    step = min(_SAMPLE_STEP, int(_SAMPLE_MM / candidate.slice_spacing_mm))
    sample = candidate.headers[step // 2 :: step] if step > 1 else ()
    if len(sample) < _SAMPLE_STEP:
        return None
    loader = _SliceLoader(reader, len(sample))
    try:
        for header in sample:
            loader.add(header)
    except PixelError:
        return None
    hu, odd = loader.volume(sample)
    if odd:
        return None
    chest = summarise(hu, candidate.pixel_spacing_mm, step * candidate.slice_spacing_mm)
    found = chest.first_lung_slice is not None or chest.lung_volume_ml > _SAMPLE_LUNG_ML
    if found or loader.plausibility.fault():
        return None
    of_all = f"{len(sample)} of {len(candidate.headers)} slices"
    refused = candidate.rejected("no_chest", f"{_lung(chest, candidate.headers)}, by {of_all}")
    return dataclasses.replace(refused, thumbnail=loader.thumbnail())


def _lung(chest: ChestSummary, headers: Sequence[Header]) -> str:
    """How much lung there is, and the part of the body that explains it."""
    body_part = named_body_part(headers)
    named = f"; Body Part Examined is {body_part}" if body_part else ""
    return f"{chest.lung_volume_ml:.0f} ml of lung{named}"


def _acquisitions_differ(a: Header, b: Header) -> bool:
    return (
        None not in (a.acquisition_number, b.acquisition_number)
        and a.acquisition_number != b.acquisition_number
    )


class _SliceLoader:
    """Decodes slices one after the other into one array."""

    def __init__(self, reader: PixelReader, num_slices: int):
        self.plausibility = PlausibilityCount()
        self._reader = reader
        self._num_slices = num_slices
        self._hu: np.ndarray | None = None
        self._stored: list[np.ndarray] = []  # of each slice, sampled
        self._whole: list[bool] = []  # of each slice: int16

    def add(self, header: Header) -> None:
        """Appends a slice.

        Raises:
            PixelError: the pixels cannot be read; nothing is appended.
        """
        stored = self._reader.read(header)
        header = self._reader.rescaled(header)
        image = orient(to_hu(stored, header), canonical_axes(header.orientation))
        if self._hu is None:
            self._hu = np.empty((self._num_slices, *image.shape), dtype=image.dtype)
        elif image.dtype == np.float32 and self._hu.dtype == np.int16:
            self._hu = self._hu.astype(np.float32)
        self._hu[len(self._whole)] = image
        self._whole.append(image.dtype == np.int16)
        self._stored.append(stored[::SAMPLE_STEP, ::SAMPLE_STEP].copy())
        self.plausibility.add(stored, header)

    def equals_last(self, header: Header) -> bool:
        """Whether this slice is the same image as the slice that was added last.

        Raises:
            PixelError: the pixels cannot be read.
        """
        stored = self._reader.read(header)
        hu = to_hu(stored, self._reader.rescaled(header))
        image = orient(hu, canonical_axes(header.orientation))
        return np.array_equal(image, self._hu[len(self._whole) - 1])

    @property
    def hu_against_table(self) -> bool:
        """Whether values were taken as they stand, against the metadata table."""
        return self._reader.hu_against_table

    def thumbnail(self) -> np.ndarray | None:
        """`grey_thumbnail` of the middle one of the added slices; None: there is none."""
        number = len(self._whole)
        return grey_thumbnail(self._hu[number // 2]) if number else None

    def volume(self, headers: Sequence[Header]) -> tuple[np.ndarray, list[int]]:
        """The added slices [S, H, W] with these headers, without those on another scale; and the
        numbers of these."""
        if self._hu is None:
            return np.empty((0, 0, 0), np.int16), []
        hu = self._hu[: len(self._whole)]
        odd = slices_on_another_scale(hu, headers, self._stored)
        if not odd:
            return hu, odd
        hu = np.delete(hu, odd, axis=0)
        return hu.astype(np.int16) if all(np.delete(self._whole, odd)) else hu, odd
