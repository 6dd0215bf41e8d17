"""Which bits of a pixel are its value: Bits Stored, High Bit, the sign, and overlays.

Nearly all files say it right, and their values are within the stored bits. What lies beyond them is
explained by the header (an overlay in the pixels, padding) or by the image itself, or refused.
"""

from __future__ import annotations

import numpy as np

from data_prep.scan.headers import Header

# A padding value lies below all that can be tissue.
BELOW_ANY_TISSUE_HU = -1500

_LOWEST_HIGH_BIT = 7  # a lower High Bit is a default of its writer
# How much smaller the steps at the edge of the pixels in doubt are, in the reading that is right.
_CLEARER, _MUCH_CLEARER = 0.5, 0.25


class PixelError(ValueError):
    """Pixels that cannot be read. `reason` is a name of `data_prep.scan.reasons.REASONS`; the
    message is the detail."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def stored_values(values: np.ndarray, header: Header, precision: int | None = None) -> np.ndarray:
    """The values of allocated pixels [rows, columns], without a copy where all are as they should.

    Args:
        values: all bits of the pixels, with the sign of Pixel Representation (0028,0103).
        header: of the slice, with Bits Stored (0028,0101), High Bit (0028,0102) and the bits of
          overlays (60xx,0102).
        precision: bits that the coding of a compressed frame gives a value.

    Raises:
        PixelError: Bits Stored and High Bit do not fit the values, or an overlay lies within them.
    """
    allocated = 8 * values.itemsize
    stored = min(header.bits_stored, allocated) if header.bits_stored > 0 else allocated
    overlays = [bit for bit in header.overlay_bits if bit < allocated]
    shift = header.high_bit + 1 - stored
    if 0 < shift <= allocated - stored:
        return _justified(values, stored, shift, overlays)
    bits = min(stored, precision or allocated)
    if header.high_bit >= _LOWEST_HIGH_BIT:
        bits = min(bits, header.high_bit + 1)
    overlays = [bit for bit in overlays if bit]  # bit 0 is what writers of no overlay leave there
    if overlays:
        values = _without_overlays(values, overlays)
    unsigned = values.dtype.kind == "u"
    if bits == allocated and not unsigned:
        return values
    highest = int(values.max())
    if unsigned and highest >> (allocated - 1):
        padded = _with_negative_padding(values, bits, header)
        if padded is not None:
            return padded
    lowest = 0 if unsigned else int(values.min())
    if bits == allocated or _fit(values, lowest, highest, bits):
        return values
    return _within(values, bits, lowest)


def _fit(values: np.ndarray, lowest: int, highest: int, bits: int) -> bool:
    if values.dtype.kind == "u":
        return highest < 1 << bits
    return -(1 << bits - 1) <= lowest and highest < 1 << bits - 1


def low_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """The lowest bits alone, the highest of them being the sign in signed values."""
    unused = 8 * values.itemsize - bits
    return (values << unused) >> unused


def _justified(values: np.ndarray, stored: int, shift: int, overlays: list[int]) -> np.ndarray:
    """Values that end at High Bit, beyond Bits Stored. If the bits below them are not empty, High
    Bit is wrong, and the values begin at bit 0."""
    below = sum(1 << bit for bit in range(shift) if bit not in overlays)
    left = not (values & values.dtype.type(below)).any()
    right = _fit(values, int(values.min()), int(values.max()), stored)
    if left and right and values.any():
        raise PixelError("undecodable_pixels", "the values may begin at bit 0 or end at High Bit")
    if right:
        return values
    if not left:
        raise PixelError(
            "undecodable_pixels", f"values beyond the {stored} bits of Bits Stored, and below those"
        )
    allocated = 8 * values.itemsize
    return (values << (allocated - stored - shift)) >> (allocated - stored)


def _without_overlays(values: np.ndarray, overlays: list[int]) -> np.ndarray:
    """Values without the bits that the header says to be an overlay's, although Bits Stored may
    include them. The bits above these must be empty, or repeat the sign."""
    allocated, lowest = 8 * values.itemsize, min(overlays)
    signed = values.dtype.kind == "i"
    others = [bit for bit in range(lowest, allocated) if bit not in overlays]
    if signed and not others:
        return low_bits(values, lowest)
    bits = values.view(f"u{values.itemsize}")
    planes = bits.dtype.type(sum(1 << bit for bit in overlays))
    cleared = bits & ~planes
    if signed:
        cleared[bits >> others[-1] & 1 == 1] |= planes
    cleared = cleared.view(values.dtype)
    if not _fit(cleared, int(cleared.min()), int(cleared.max()), lowest + signed):
        raise PixelError("undecodable_pixels", f"an overlay in bit {lowest} of the values")
    return cleared


def _with_negative_padding(values: np.ndarray, bits: int, header: Header) -> np.ndarray | None:
    """Unsigned values, but for one that is padding of a negative number (-2000 is 63536), as signed
    values; None if that is not what they are."""
    signed = values.view(f"i{values.itemsize}")
    padding = signed < 0
    lowest = int(signed.min())
    slope, intercept = header.rescale_slope or 1.0, header.rescale_intercept or 0.0
    if (
        lowest * slope + intercept >= BELOW_ANY_TISSUE_HU
        or (signed[padding] != lowest).any()
        or int(signed.max()) >> bits
    ):
        return None
    return signed


def _within(values: np.ndarray, bits: int, lowest: int) -> np.ndarray:
    """Values of which some lie beyond Bits Stored: the bits above are an overlay's or unused, or
    Bits Stored is too small. The right reading continues at the edge of these pixels.

    Signed values without a negative one have no sign in the bits above, if Bits Stored is right.
    """
    cut = low_bits(values, bits)
    doubtful = cut != values
    whole_step, cut_step = _step(values, doubtful), _step(cut, doubtful)
    if whole_step <= _CLEARER * cut_step:
        return values
    if values.dtype.kind == "i" and lowest >= 0 and cut_step <= _CLEARER * whole_step:
        return cut
    usual = _step(cut, np.zeros_like(doubtful))
    if cut_step <= _MUCH_CLEARER * whole_step and cut_step <= 2 * usual + 20:
        return cut
    raise PixelError("undecodable_pixels", f"values beyond the {bits} bits of Bits Stored")


def _step(values: np.ndarray, marked: np.ndarray) -> float:
    """Mean difference of neighbours of which one is marked; of all neighbours if there are none."""
    values = values.astype(np.int64)
    steps = [np.abs(np.diff(values, axis=axis)) for axis in (0, 1)]
    edges = [np.diff(marked, axis=axis) for axis in (0, 1)]
    count = sum(np.count_nonzero(edge) for edge in edges)
    if not count:
        return float(sum(step.sum() for step in steps)) / max(1, sum(step.size for step in steps))
    return float(sum(step[edge].sum() for step, edge in zip(steps, edges, strict=True))) / count
