"""Charts as inline SVG: lines, points, and intervals. No package, no script; colours follow the page's, light or dark.

A chart is drawn 360 units wide, so that its words can be read on a phone; the page scales it. Colours are classes
(`c0` … `c7`, `plain`) that the page's style sheet fills in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 10, 36
ROW = 34  # height of a row of intervals


@dataclass(frozen=True)
class Line:
    """A named series of points; `style`: its classes in the style sheet."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str


@dataclass(frozen=True)
class Bar:
    """A named value with the interval around it, where there is one."""

    name: str
    value: float
    interval: tuple[float, float] | None
    style: str


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within a range, at most so many or one more.

    >>> ticks(0, 10), ticks(91.2, 94.1)
    ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [92.0, 93.0, 94.0])
    """
    if not high > low:
        return [low]
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def lines(series: Sequence[Line], x: str, y: str) -> str:
    """A line for each series, with its points."""
    frame = _Frame.around([point for line in series for point in line.points])
    drawn = []
    for line in series:
        path = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in line.points)
        drawn.append(
            f'<g class="{line.style}"><title>{escape(line.name)}</title><polyline points="{path}"/></g>'
        )
    return _svg(HEIGHT, frame.axes(x, y) + "".join(drawn), f"{y} by {x}")


def points(series: Sequence[Line], x: str, y: str) -> str:
    """A mark for each point, whose name shows when it is pointed at."""
    frame = _Frame.around([point for line in series for point in line.points])
    drawn = [
        f'<g class="{line.style}"><title>{escape(line.name)}</title>'
        f'<circle cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}" r="4.5"/></g>'
        for line in series
        for a, b in line.points
    ]
    return _svg(HEIGHT, frame.axes(x, y) + "".join(drawn), f"{y} by {x}")


def bars(rows: Sequence[Bar], x: str) -> str:
    """Intervals below one another, each under its name, and a line at 0."""
    ends = [0.0, *(end for row in rows for end in (row.interval or (row.value, row.value)))]
    low, high = _widened(min(ends), max(ends))
    height = TOP + ROW * len(rows) + BOTTOM
    place = _scale(low, high, 10, WIDTH - RIGHT)
    bottom = TOP + ROW * len(rows)
    parts = [f'<line class="zero" x1="{place(0):.1f}" x2="{place(0):.1f}" y1="{TOP}" y2="{bottom}"/>']
    for tick in ticks(low, high):
        parts.append(f'<text class="tick" x="{place(tick):.1f}" y="{bottom + 14}" text-anchor="middle">'
                     f"{_short(tick)}</text>")  # fmt: skip
    for number, row in enumerate(rows):
        middle = TOP + ROW * number + 22
        parts.append(f'<g class="{row.style}"><text class="name" x="10" y="{middle - 9}">{escape(_clipped(row.name))}'
                     f'<title>{escape(row.name)}</title></text>')  # fmt: skip
        if row.interval:
            a, b = (place(end) for end in row.interval)
            parts.append(f'<line class="interval" x1="{a:.1f}" x2="{b:.1f}" y1="{middle}" y2="{middle}"/>')
        parts.append(f'<circle cx="{place(row.value):.1f}" cy="{middle}" r="4.5"/></g>')
    parts.append(
        f'<text class="label" x="{WIDTH / 2}" y="{height - 4}" text-anchor="middle">{escape(x)}</text>'
    )
    return _svg(height, "".join(parts), x)


@dataclass(frozen=True)
class _Frame:
    """Where a value lies in the chart."""

    x: Callable[[float], float]
    y: Callable[[float], float]
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]

    @staticmethod
    def around(found: Sequence[tuple[float, float]]) -> _Frame:
        """Axes that hold all points."""
        a, b = [p[0] for p in found] or [0.0], [p[1] for p in found] or [0.0]
        (left, right), (low, high) = _widened(min(a), max(a)), _widened(min(b), max(b))
        return _Frame(
            _scale(left, right, LEFT, WIDTH - RIGHT),
            _scale(low, high, HEIGHT - BOTTOM, TOP),
            ticks(left, right, 4),
            ticks(low, high),
        )

    def axes(self, x: str, y: str) -> str:
        """Grid, numbers and names."""
        parts = []
        for tick in self.y_ticks:
            at = self.y(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">'
                         f'{_short(tick)}</text>')  # fmt: skip
        for tick in self.x_ticks:
            parts.append(f'<text class="tick" x="{self.x(tick):.1f}" y="{HEIGHT - BOTTOM + 15}" '
                         f'text-anchor="middle">{_short(tick)}</text>')  # fmt: skip
        middle = (HEIGHT - BOTTOM + TOP) / 2
        parts.append(f'<text class="label" x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">'
                     f'{escape(x)}</text><text class="label" transform="translate(11 {middle}) rotate(-90)" '
                     f'text-anchor="middle">{escape(y)}</text>')  # fmt: skip
        return "".join(parts)


def _scale(low: float, high: float, begin: float, end: float) -> Callable[[float], float]:
    return lambda value: begin + (value - low) / (high - low) * (end - begin)


def _widened(low: float, high: float) -> tuple[float, float]:
    """A little room on both sides, and some where all values are one."""
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _short(value: float) -> str:
    """12.3k for 12,300."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}".replace("-", "−")


def _clipped(text: str) -> str:
    return text if len(text) <= 52 else text[:51] + "…"


def _svg(height: int, inner: str, title: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{inner}</svg>'
