"""Outlines of things, as distances in units from each pixel of a picture, or in their own measure."""

import numpy as np

from clora.studio.next.effects.filters import grid, rim


def discs(size: int, rows: np.ndarray, cols: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Masks ``[n, size, size]`` of discs with a soft rim; centres and radii ``[n]`` in units."""
    grid_rows, grid_cols = grid(size)
    distance = np.sqrt((grid_rows - rows[:, None, None]) ** 2 + (grid_cols - cols[:, None, None]) ** 2)
    return rim(radii[:, None, None] - distance)


def heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns how far inside a heart that stands on its point positions are (x to the right, y down), in its radii."""
    x, y = 0.6 * np.abs(x), 0.6 * (0.95 - y)
    lobe = np.sqrt(2) / 4 - np.sqrt((x - 0.25) ** 2 + (y - 0.75) ** 2)
    middle = np.maximum(x + y, 0.0) / 2
    to_sides = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - middle) ** 2 + (y - middle) ** 2))
    return np.where(x + y > 1, lobe, to_sides * np.sign(y - x)) / 0.6


def line(size: int, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Returns each pixel's distance from a straight line between two points (row, col) in units: ``[size, size]``."""
    rows, cols = grid(size)
    along = end - start
    share = ((rows - start[0]) * along[0] + (cols - start[1]) * along[1]) / max(float(along @ along), 1e-6)
    share = np.clip(share, 0.0, 1.0)
    return np.sqrt((rows - start[0] - share * along[0]) ** 2 + (cols - start[1] - share * along[1]) ** 2)
