"""Curves of a training as SVG: every point inside its frame, phases in their places, round figures at the axes."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from clora.report import curves
from clora.report.curves import draw_curve, smooth, ticks
from clora.report.html import drawn_curves


def lines(svg):
    """Returns the points ``[N, 2]`` of each line."""
    root = ElementTree.fromstring(svg)
    texts = [line.get("points") for line in root.iter("polyline")]
    return [np.array([list(map(float, point.split(","))) for point in text.split()]) for text in texts]


@pytest.mark.parametrize("values", [[3.0], [1.0, 1.0], [0.0, -2.0, 5.0], list(np.geomspace(1e-4, 10, 50))])
def test_a_curve_fills_its_frame(values):
    svg = draw_curve(list(enumerate(values, start=1)))
    for x, y in (line.T for line in lines(svg)):
        assert (x >= curves.LEFT).all()
        assert (x <= curves.WIDTH - curves.RIGHT).all()
        assert (y >= curves.TOP - 0.1).all()
        assert (y <= curves.HEIGHT - curves.BOTTOM + 0.1).all()
    raw = lines(svg)[0]
    if len(set(values)) > 1:
        assert raw[np.argmax(values), 1] == pytest.approx(curves.TOP)
        assert raw[np.argmin(values), 1] == pytest.approx(curves.HEIGHT - curves.BOTTOM)


def test_a_wide_range_of_positive_values_is_logarithmic():
    (_, first), (_, second), (_, third) = lines(draw_curve([(1, 0.01), (2, 1.0), (3, 100.0)]))[0]
    assert first - second == pytest.approx(second - third, abs=0.2)
    (_, first), (_, second), (_, third) = lines(draw_curve([(1, 1.0), (2, 2.0), (3, 11.0)]))[0]
    assert first - second == pytest.approx((second - third) / 9, abs=0.2)


def test_phases_lie_between_their_updates():
    points = [(update, 1.0 / update) for update in range(1, 101)]
    svg = draw_curve(points, [("anchoring <", 60), ("matching", 100), ("later", 200)])
    root = ElementTree.fromstring(svg)
    first, second = root.iter("rect")
    end = float(first.get("x")) + float(first.get("width"))
    x = lines(svg)[0][59, 0]
    assert end == pytest.approx(x, abs=0.2)
    assert float(second.get("x")) == pytest.approx(x, abs=0.2)
    texts = [text.text for text in root.iter("text")]
    assert {"anchoring <", "matching"} <= set(texts)
    assert "later" not in texts


def test_a_long_curve_has_few_points_and_keeps_its_mean():
    values = np.random.default_rng(0).random(10_000)
    raw, strong = lines(draw_curve(list(enumerate(values))))
    assert len(raw) == len(strong) == curves.MOST_POINTS
    assert np.ptp(strong[:, 1]) < 0.5 * np.ptp(raw[:, 1])


@pytest.mark.parametrize(
    ("low", "high", "logarithmic"),
    [(0, 1, False), (-3, 17, False), (1, 2920, False), (0.0012, 0.0013, False), (1e-5, 3.0, True), (0.02, 0.9, True)],
)
def test_ticks_are_few_and_round(low, high, logarithmic):
    found = ticks(low, high, logarithmic)
    assert 3 <= len(found) <= 6
    assert all(low <= value <= high * (1 + 1e-9) for value in found)
    assert all(re.fullmatch(r"-?\d(\.?\d{0,4})e[+-]\d+", f"{value:.4e}".replace("0000e", "e")) for value in found)


def test_marks_of_a_narrow_range_differ():
    root = ElementTree.fromstring(draw_curve([(1, 0.29981), (2, 0.299812), (3, 0.299815)]))
    texts = [text.text for text in root.iter("text") if text.get("text-anchor") == "end"]
    assert len(texts) == len(set(texts)) >= 3


def test_smooth_keeps_a_line_and_the_length():
    line = np.arange(100.0)
    assert np.allclose(smooth(line), line)
    assert smooth(np.array([3.0])).tolist() == [3.0]


def test_what_has_no_finite_value_or_only_zeros_is_not_drawn():
    found = drawn_curves({"loss": [(1, math.nan), (2, 0.5)], "dmd_bs": [(1, 0.0)], "critic": [(1, math.nan)]})
    (loss,) = found
    assert loss.title == "loss"
    assert loss.meaning
    assert len(lines(loss.svg)[0]) == 1
