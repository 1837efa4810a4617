"""Grids and curves of reports."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from clora.report.drawing import draw_curve, draw_grid, smooth


def test_grid_shows_every_picture_enlarged_by_a_whole_number():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16, 3), dtype=np.uint8)
    grid = draw_grid(("source", "teacher, 80 passes, of the first LoRA", "clora"), ("snow", "colour_static"), pixels)
    for r in range(2):
        for c in range(3):
            # The grid ends at its last row and column: cells of 192 pixels with a gap of 6 after each.
            bottom = grid.shape[0] - (1 - r) * 198 - 6
            right = grid.shape[1] - (2 - c) * 198 - 6
            assert np.array_equal(grid[bottom - 192 : bottom : 12, right - 192 : right : 12], pixels[r, c])


def test_curve_is_a_png():
    assert Image.open(io.BytesIO(draw_curve([(0, 1.0), (1, 2.0)]))).format == "PNG"


def test_smooth_keeps_a_line_and_the_length():
    line = np.arange(100.0)
    assert np.allclose(smooth(line), line)
    assert smooth(np.array([3.0])).tolist() == [3.0]
