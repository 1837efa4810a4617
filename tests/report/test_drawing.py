"""Grids and sheets of reports."""

from __future__ import annotations

import numpy as np

from clora.report.drawing import draw_grid, draw_sheet


def test_grid_shows_every_picture_enlarged_by_a_whole_number():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16, 3), dtype=np.uint8)
    grid = draw_grid(("source", "teacher, 80 passes, of the first LoRA", "clora"), ("snow", "colour_static"), pixels)
    for r in range(2):
        for c in range(3):
            # The grid ends at its last row and column: cells of 192 pixels with a gap of 6 after each.
            bottom = grid.shape[0] - (1 - r) * 198 - 6
            right = grid.shape[1] - (2 - c) * 198 - 6
            cell = grid[bottom - 192 : bottom, right - 192 : right]
            assert np.abs(shrunk(cell, 16) - pixels[r, c]).mean() < 25  # of other noise: 85


def shrunk(cell, side):
    """Averages over the squares that single pixels have become."""
    return cell.reshape(side, len(cell) // side, side, -1, 3).mean((1, 3))


def test_a_sheet_shows_every_picture_above_its_label():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    sheet = draw_sheet(["source", "snow", "colour_static", "in several words", "OneWordOfVeryManyLetters"], pixels)
    below = (sheet.shape[0] - 14) // 2
    for i, picture in enumerate(pixels):
        y, x = 14 + i // 3 * below, 14 + i % 3 * (256 + 14)
        assert np.abs(shrunk(sheet[y : y + 256, x : x + 256], 64) - picture).mean() < 25  # of other noise: 85
        assert sheet[y + 256 : y + below - 5, x : x + 256].min() < 100, "the label is missing"
        assert (sheet[:, x + 256 : x + 256 + 14] == 255).all(), "the label leaves its column"


def test_a_sheet_of_many_or_of_large_pictures_stays_small():
    assert draw_sheet(["a"] * 51, np.zeros((51, 16, 16, 3), np.uint8)).shape[1] == 14 + 4 * (256 + 14)
    assert draw_sheet(["a"], np.zeros((1, 600, 1200, 3), np.uint8)).shape[1] == 21 + 384 + 21
