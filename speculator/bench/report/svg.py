"""Small SVG charts: a frame with linear axes, and lines, bands, bars, points and cells inside it.

Owns: geometry and escaping. Colours are classes, so that the page decides them for light and dark.
Must never know what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 26, 16, 48
SERIES = 6  # colour classes s0..s5

Point = tuple[float, float]


class Axis(NamedTuple):
    """One axis from `low` to `high`; `ticks` are pairs (value, text)."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]


def unit_axis(label: str) -> Axis:
    """From 0 to 1, in per cent."""
    return Axis(label, 0.0, 1.0, [(share / 100, f"{share} %") for share in (0, 25, 50, 75, 100)])


def value_axis(label: str, high: float) -> Axis:
    """From 0 to a round number at or above `high`, with at most six ticks."""
    step = _round_step(max(high, 1e-12) / 5)
    count = max(1, math.ceil(high / step - 1e-9))
    return Axis(label, 0.0, count * step, [(i * step, f"{i * step:.4g}") for i in range(count + 1)])


def step_axis(label: str, names: Sequence[str]) -> Axis:
    """Names at 0, 1, 2, ..., half a step of room on both sides."""
    return Axis(label, -0.5, len(names) - 0.5, list(enumerate(names)))


def _round_step(raw: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(raw))
    return next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))


class Chart:
    """One chart, in the units of its axes. `describes` is read out in place of the picture."""

    def __init__(self, describes: str, x: Axis, y: Axis, height: int = HEIGHT) -> None:
        self._describes, self._x, self._y, self._height = describes, x, y, height
        self._marks: list[str] = []
        self._names: list[tuple[int, str]] = []

    # ---- marks ----

    def line(self, points: Iterable[Point], series: int = 0, extra: str = "") -> None:
        path = " ".join(f"{self._at_x(x):.1f},{self._at_y(y):.1f}" for x, y in points)
        self._marks.append(f'<polyline class="line s{series % SERIES} {extra}" points="{path}"/>')

    def band(self, points: Iterable[tuple[float, float, float]], series: int = 0) -> None:
        """An area between (x, low) and (x, high)."""
        points = list(points)
        edge = [(x, high) for x, _, high in points] + [(x, low) for x, low, _ in reversed(points)]
        path = " ".join(f"{self._at_x(x):.1f},{self._at_y(y):.1f}" for x, y in edge)
        self._marks.append(f'<polygon class="band s{series % SERIES}" points="{path}"/>')

    def whisker(self, x: float, low: float, high: float, series: int = 0) -> None:
        at = self._at_x(x)
        ends = f'x1="{at:.1f}" x2="{at:.1f}" y1="{self._at_y(low):.1f}" y2="{self._at_y(high):.1f}"'
        self._marks.append(f'<line class="whisker s{series % SERIES}" {ends}/>')

    def dot(self, x: float, y: float, says: str, series: int = 0, radius: float = 4.0) -> None:
        place = f'cx="{self._at_x(x):.1f}" cy="{self._at_y(y):.1f}" r="{radius:.1f}"'
        self._marks.append(f'<circle class="dot s{series % SERIES}" {place}>{_says(says)}</circle>')

    def box(self, left: float, right: float, low: float, high: float, says: str, series: int = 0) -> None:
        """A filled rectangle between two values of each axis."""
        self._marks.append(self._rect(left, right, low, high, f'class="box s{series % SERIES}"', says))

    def cell(self, left: float, right: float, low: float, high: float, share: float, text: str, says: str) -> None:
        """A rectangle shaded by `share` in 0..1, with a text in its middle."""
        style = f'class="cell" fill-opacity="{0.08 + 0.8 * min(1.0, max(0.0, share)):.3f}"'
        self._marks.append(self._rect(left, right, low, high, style, says))
        strong = " strong" if share > 0.55 else ""
        self._text((left + right) / 2, (low + high) / 2, text, f"value{strong}")

    def note(self, x: float, y: float, text: str) -> None:
        """A short text above a point."""
        place = f'x="{self._at_x(x):.1f}" y="{self._at_y(y) - 7:.1f}"'
        self._marks.append(f'<text class="value" text-anchor="middle" {place}>{escape(text)}</text>')

    def row_name(self, y: float, text: str) -> None:
        """A text inside the frame, at its left edge and just below `y`."""
        place = f'x="{LEFT + 6}" y="{self._at_y(y) + 13:.1f}"'
        self._marks.append(f'<text class="row" {place}>{escape(text)}</text>')

    def name(self, series: int, text: str) -> None:
        """An entry of the legend, shown below the chart."""
        self._names.append((series % SERIES, text))

    # ---- the whole ----

    def svg(self) -> str:
        head = f'<svg viewBox="0 0 {WIDTH} {self._height}" role="img" aria-label="{escape(self._describes)}">'
        return "".join([head, self._frame(), *self._marks, "</svg>", self._legend()])

    def _legend(self) -> str:
        entries = (f'<span><i class="key s{series}"></i>{escape(text)}</span>' for series, text in self._names)
        return f'<div class="legend">{"".join(entries)}</div>' if self._names else ""

    def _frame(self) -> str:
        right, bottom = WIDTH - RIGHT, self._height - BOTTOM
        parts = []
        for value, text in self._y.ticks:
            y = self._at_y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" text-anchor="end" x="{LEFT - 8}" y="{y + 4:.1f}">{escape(text)}</text>')
        for value, text in self._x.ticks:
            place = f'x="{self._at_x(value):.1f}" y="{bottom + 18}"'
            parts.append(f'<text class="tick" text-anchor="middle" {place}>{escape(text)}</text>')
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        return "".join([*parts, self._labels(bottom)])

    def _labels(self, bottom: int) -> str:
        middle, low = (LEFT + WIDTH - RIGHT) / 2, (TOP + bottom) / 2
        places = (f'x="{middle:.0f}" y="{bottom + 38}"', f'transform="translate(14 {low:.0f}) rotate(-90)"')
        pairs = zip(places, (self._x.label, self._y.label), strict=True)
        return "".join(f'<text class="label" text-anchor="middle" {at}>{escape(text)}</text>' for at, text in pairs)

    # ---- geometry ----

    def _at_x(self, value: float) -> float:
        return LEFT + _share(value, self._x) * (WIDTH - LEFT - RIGHT)

    def _at_y(self, value: float) -> float:
        bottom = self._height - BOTTOM
        return bottom - _share(value, self._y) * (bottom - TOP)

    def _rect(self, left: float, right: float, low: float, high: float, style: str, says: str) -> str:
        x, y = self._at_x(left), self._at_y(high)
        size = f'width="{max(0.0, self._at_x(right) - x):.1f}" height="{max(0.0, self._at_y(low) - y):.1f}"'
        return f'<rect {style} x="{x:.1f}" y="{y:.1f}" {size}>{_says(says)}</rect>'

    def _text(self, x: float, y: float, text: str, style: str) -> None:
        place = f'x="{self._at_x(x):.1f}" y="{self._at_y(y) + 4:.1f}"'
        self._marks.append(f'<text class="{style}" text-anchor="middle" {place}>{escape(text)}</text>')


def _share(value: float, axis: Axis) -> float:
    return (value - axis.low) / (axis.high - axis.low) if axis.high > axis.low else 0.5


def _says(text: str) -> str:
    return f"<title>{escape(text)}</title>"
