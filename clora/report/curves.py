"""Curves of a training as inline SVG: raw values in a light line, smoothed ones in a strong one, its phases shaded."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

Curve = Sequence[tuple[int, float]]
"""(update, value) pairs, in the order of their updates."""
Phases = Sequence[tuple[str, int]]
"""The name and the last update of each part of a training, in their order."""

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 22, 26
"""Of the frame: room for the figures beside it."""
MOST_POINTS = 400
"""Of a line; a longer curve is drawn by means of neighbours."""
LOG_FROM = 30.0
"""Ratio of the largest value to the smallest from where the axis is logarithmic."""


def draw_curve(points: Curve, phases: Phases = ()) -> str:
    """Draws one curve of finite values as an ``<svg>`` element, in the colours of the page (``currentColor``, ``--accent``)."""
    x, y = np.array(points, dtype=float).T
    raw, strong = _thinned(x, y), _thinned(x, smooth(y))
    axes = _Axes(raw, x[0], x[-1])
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="11" fill="currentColor">']
    parts += axes.phases(phases)
    parts += axes.ticks()
    for line, style in ((raw, 'stroke-opacity=".35"'), (strong, 'stroke-width="2"')):
        parts.append(f'<polyline points="{axes.path(line)}" fill="none" stroke="var(--accent)" {style}/>')
    return "".join([*parts, "</svg>"])


def smooth(y: np.ndarray) -> np.ndarray:
    """Returns the centred moving average over about a twentieth of the curve, narrower at the ends."""
    radius = max(1, len(y) // 40)
    # Sums of windows as differences of running sums.
    total = np.concatenate([[0.0], np.cumsum(y)])
    i = np.arange(len(y))
    reach = np.minimum(radius, np.minimum(i, len(y) - 1 - i))
    return (total[i + reach + 1] - total[i - reach]) / (2 * reach + 1)


def ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Returns three to six round values between two: of a logarithmic axis powers of ten, if it has three, else others."""
    if logarithmic:
        exponents = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        if len(exponents) >= 3:
            return [10.0**exponent for exponent in exponents[:: -(-len(exponents) // 6)]]
        decades = [factor * 10.0**exponent for exponent in range(-12, 13) for factor in (1, 2, 5)]
        return [value for value in decades if low <= value <= high]
    if high <= low:
        return [low]
    size = 10 ** math.floor(math.log10(high - low))
    # The largest round step of which three values lie between.
    for step in (2 * size, size, 0.5 * size, 0.2 * size, 0.1 * size):
        numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        if len(numbers) >= 3:
            break
    return [step * i for i in numbers]


class _Axes:
    """The frame of a curve: from updates and values to its pixels.

    Args:
        points: ``[N, 2]`` of the widest line.
        first, last: updates at the left and the right.
    """

    def __init__(self, points: np.ndarray, first: float, last: float):
        low, high = points[:, 1].min(), points[:, 1].max()
        self.logarithmic = bool(low > 0 and high / low >= LOG_FROM)
        if low == high:
            low, high = low - 0.5, high + 0.5
        self.low, self.high, self.first, self.last = low, high, first, max(last, first + 1)

    def x(self, update: float) -> float:
        return LEFT + (update - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        scale = math.log if self.logarithmic else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def path(self, points: np.ndarray) -> str:
        return " ".join(f"{self.x(update):.1f},{self.y(value):.1f}" for update, value in points)

    def phases(self, phases: Phases) -> Iterator[str]:
        start = self.first
        for i, (name, last) in enumerate(phases):
            left, right = self.x(max(start, self.first)), self.x(min(last, self.last))
            start = last
            if right <= left:  # not begun, or before this curve
                continue
            opacity = 0.07 if i % 2 == 0 else 0.0
            yield f'<rect x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}" '
            yield f'fill-opacity="{opacity}"/><text x="{left + 4:.1f}" y="{TOP - 8}" fill-opacity=".65">{html.escape(name)}</text>'

    def ticks(self) -> Iterator[str]:
        # As many digits as tell neighbours apart.
        largest = max(abs(self.low), abs(self.high))
        digits = max(4, 2 + math.ceil(math.log10(largest / (self.high - self.low))))
        for value in ticks(self.low, self.high, self.logarithmic):
            y = self.y(value)
            yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="currentColor" stroke-opacity=".15"/>'
            yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill-opacity=".65">{value:.{digits}g}</text>'
        for value in ticks(self.first, self.last, logarithmic=False):
            x = self.x(value)
            if value == round(value) and LEFT + 8 < x < WIDTH - 8:
                yield f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle" fill-opacity=".65">{value:.0f}</text>'


def _thinned(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns at most `MOST_POINTS` points ``[N, 2]``, means of neighbours."""
    if len(x) <= MOST_POINTS:
        return np.stack([x, y], axis=1)
    borders = np.linspace(0, len(x), MOST_POINTS + 1).astype(int)
    return np.array([(x[a:b].mean(), y[a:b].mean()) for a, b in pairwise(borders)])
