"""Distributions as HTML that needs no picture: bars in tables, and a histogram of grey values."""

import collections
import html
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from data_prep.system.pages import table

STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr));
  gap: 1.5rem }
figure { margin: 0 } figcaption { margin-bottom: .4rem }
.bars { width: 100%; font-size: .85rem } .bars td, .bars th { padding: .1rem .3rem; border: 0;
  font-weight: normal; white-space: nowrap }
.bars td { width: 70% } .bars i { display: inline-block; height: .8em; background: var(--bar);
  margin-right: .4rem }
svg { width: 100%; max-width: 40rem; height: auto } svg text { fill: var(--text); font-size: 11px }
svg .axis { stroke: var(--line) } svg polyline { fill: none; stroke-width: 1.5 }
"""
_MOST_BARS = 12
_LINES = ("var(--one)", ""), ("var(--two)", "6 3"), ("var(--three)", "2 2")  # colour, dashes
_GREY_BINS = 64
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 420, 190, 44, 30  # of the histogram, its axes
_SHARES = (1.0, 0.1, 0.01, 0.001, 0.0001)  # ticks of the logarithmic axis


def number_chart(title: str, values: Sequence[float | None]) -> str:
    """Bars of how many values are equal, or lie in ranges of equal width, if they are many.

    Args:
        title: with the unit.
        values: None where unknown.
    """
    known = [value for value in values if value is not None]
    if not known:
        return _bars(title, "not recorded", [])
    low, high = min(known), max(known)
    summary = f"median {statistics.median(known):.4g}, from {low:.4g} to {high:.4g}"
    if low == high:
        summary = f"always {low:.4g}"
    if len(known) < len(values):
        summary += f"; unknown in {len(values) - len(known)} of {len(values)}"
    return _bars(title, summary, ranges(known))


def text_chart(title: str, values: Sequence[str]) -> str:
    """Bars of the most frequent texts; "" is unknown."""
    counts = collections.Counter(value or "not recorded" for value in values)
    items = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if rest := sum(number for _, number in items[_MOST_BARS - 1 :][1:]):
        number = len(items) - _MOST_BARS + 1
        items = [*items[: _MOST_BARS - 1], (f"{number} others", rest + items[_MOST_BARS - 1][1])]
    summary = f"{len(counts)} different, most often {items[0][0]}" if items else "not recorded"
    return _bars(title, summary, items)


def ranges(values: Sequence[float]) -> list[tuple[str, int]]:
    """(range, number of values in it), without a hole between: the values themselves if at most
    12 differ."""
    distinct = collections.Counter(float(f"{value:.4g}") for value in values)
    if len(distinct) <= _MOST_BARS:
        return [(f"{value:g}", number) for value, number in sorted(distinct.items())]
    least = (max(values) - min(values)) / (_MOST_BARS - 1)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= least)
    numbers = collections.Counter(math.floor(value / step + 1e-9) for value in values)
    return [
        (f"{at * step:.6g} to {(at + 1) * step:.6g}", numbers[at])
        for at in range(min(numbers), max(numbers) + 1)
    ]


def _bars(title: str, summary: str, items: Sequence[tuple[str, int]]) -> str:
    most = max((number for _, number in items), default=1)
    rows = "".join(
        f'<tr><th scope=row>{html.escape(name)}<td><i style="width:{70 * number / most:.1f}%"></i>'
        f"{number}"
        for name, number in items
    )
    caption = f"<b>{html.escape(title)}</b>: {html.escape(summary)}"
    return f"<figure><figcaption>{caption}</figcaption><table class=bars>{rows}</table></figure>"


def grey_chart(counts: Mapping[str, np.ndarray], window: Mapping[str, float]) -> str:
    """Histogram of the grey values of each split, and a table of their means and ends.

    Args:
        counts: split -> [256] int, pixels of each grey value.
        window: `level` and `width` in HU; grey 0 is its lower end and below, 255 its upper end and
            above.
    """
    low, high = (window["level"] + side * window["width"] / 2 for side in (-1, 1))
    lines, legend, rows, means = [], [], [], []
    for (split, of_split), (colour, dashes) in zip(counts.items(), _LINES, strict=False):
        shares = of_split / max(of_split.sum(), 1)
        points = " ".join(
            f"{_x((bin_ + 0.5) / _GREY_BINS):.1f},{_y(share):.1f}"
            for bin_, share in enumerate(shares.reshape(_GREY_BINS, -1).sum(1))
        )
        stroke = f'stroke="{colour}" stroke-dasharray="{dashes}"'
        lines.append(f'<polyline {stroke} points="{points}"/>')
        at = _LEFT + 20 + 120 * len(legend)
        legend.append(
            f'<line {stroke} stroke-width="2" x1="{at}" x2="{at + 24}" y1="8" y2="8"/>'
            f'<text x="{at + 29}" y="12">{html.escape(split)}</text>'
        )
        mean = f"{float(shares @ np.arange(256)):.1f}"
        means.append(f"{split} {mean}")
        rows.append((split, mean, f"{100 * shares[0]:.1f} %", f"{100 * shares[-1]:.1f} %"))
    axes = "".join(
        f'<line class=axis x1="{_LEFT}" x2="{_WIDTH}" y1="{_y(share):.1f}" y2="{_y(share):.1f}"/>'
        f'<text x="{_LEFT - 4}" y="{_y(share) + 4:.1f}" text-anchor="end">{100 * share:g} %</text>'
        for share in _SHARES
    )
    for at, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        hu = low + at * window["width"]
        axes += f'<text x="{_x(at)}" y="{_HEIGHT - 12}" text-anchor="{anchor}">{hu:g} HU</text>'
    said = html.escape(f"histogram of the grey values 0 to 255; their means: {', '.join(means)}")
    drawn = "".join((axes, *lines, *legend))
    caption = (
        f"<b>Window {window['level']:g}/{window['width']:g} HU</b>: share of the pixels in each "
        f"of {_GREY_BINS} steps, on a logarithmic scale"
    )
    head = ("split", "mean grey", f"{low:g} HU or below", f"{high:g} HU or above")
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<svg role=img aria-label="{said}" viewBox="0 0 {_WIDTH} {_HEIGHT}">{drawn}</svg>'
        f"{table(rows, head)}</figure>"
    )


def _x(fraction: float) -> float:
    return _LEFT + fraction * (_WIDTH - _LEFT)


def _y(share: float) -> float:
    """Of a share of the pixels, on a logarithmic scale; smaller shares lie on the axis."""
    place = math.log(max(share, _SHARES[-1]) / _SHARES[-1]) / math.log(_SHARES[0] / _SHARES[-1])
    return _HEIGHT - _BOTTOM - place * (_HEIGHT - _BOTTOM - 20)
