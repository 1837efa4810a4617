"""Outlines of things that lie scattered over a picture.

Each function maps positions (x to the right, y down, in radii of the thing) to how far inside its outline they are.
"""

import numpy as np

from clora.studio.next.effects.filters import UNITS, grid, rim

# Radii of half a maple leaf, from its tip to its stem, by angle in degrees: five lobes with notches between.
MAPLE_ANGLES = np.radians([0, 14, 26, 52, 62, 75, 104, 118, 135, 160, 172, 180])
MAPLE_RADII = np.array([1.0, 0.62, 0.5, 0.98, 0.62, 0.5, 0.85, 0.5, 0.55, 0.4, 0.22, 0.2])


def scatter(rng: np.random.Generator, per_side: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws `count` jittered points, each in its own cell of a `per_side` x `per_side` grid: (rows, cols) ``[count]`` in units.

    Independent points would often clump; one per cell keeps coverage, and so the look, alike between draws.
    """
    cells = rng.permutation(per_side**2)[:count]
    points = (np.stack([cells // per_side, cells % per_side]) + rng.uniform(0.2, 0.8, (2, count))) * (UNITS / per_side)
    rows, cols = points.astype(np.float32)
    return rows, cols


def around(size: int, row: float, col: float, angle: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Returns each pixel's position (x, y) from a point in units, turned by an angle: ``[size, size]`` each."""
    rows, cols = grid(size)
    down, right = rows - row, cols - col
    return right * np.cos(angle) + down * np.sin(angle), down * np.cos(angle) - right * np.sin(angle)


def discs(size: int, rows: np.ndarray, cols: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Masks ``[n, size, size]`` of discs with a soft rim; centres and radii ``[n]`` in units."""
    grid_rows, grid_cols = grid(size)
    distance = np.sqrt((grid_rows - rows[:, None, None]) ** 2 + (grid_cols - cols[:, None, None]) ** 2)
    return rim(radii[:, None, None] - distance)


def maple(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A maple leaf, its tip to the right, with a stem."""
    blade = np.interp(np.abs(np.arctan2(y, x)), MAPLE_ANGLES, MAPLE_RADII) - np.sqrt(x**2 + y**2)
    stem = np.minimum(0.07 - np.abs(y), 0.55 - np.abs(x + 0.6))
    return np.maximum(blade, stem)


def willow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A pointed oval leaf, its tip to the right, with a stem: what two circles have in common."""
    blade = 1.35 - np.sqrt(x**2 + (np.abs(y) + 0.9) ** 2)
    stem = np.minimum(0.07 - np.abs(y), 0.3 - np.abs(x + 1.1))
    return np.maximum(blade, stem)


def heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A heart that stands on its point."""
    x, y = 0.6 * np.abs(x), 0.6 * (0.95 - y)
    lobe = np.sqrt(2) / 4 - np.sqrt((x - 0.25) ** 2 + (y - 0.75) ** 2)
    middle = np.maximum(x + y, 0.0) / 2
    to_sides = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - middle) ** 2 + (y - middle) ** 2))
    return np.where(x + y > 1, lobe, to_sides * np.sign(y - x)) / 0.6


def blob(x: np.ndarray, y: np.ndarray, waves: np.ndarray) -> np.ndarray:
    """A splash: a disc whose outline has waves of random heights and phases ``[2, n]``, of 3, 4, ... to a turn."""
    angle = np.arctan2(y, x)
    outline = 0.75 + sum(height * np.cos((3 + n) * angle + phase) for n, (height, phase) in enumerate(waves.T))
    return outline - np.sqrt(x**2 + y**2)


def line(size: int, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Returns each pixel's distance from a straight line between two points (row, col) in units: ``[size, size]``."""
    rows, cols = grid(size)
    along = end - start
    share = ((rows - start[0]) * along[0] + (cols - start[1]) * along[1]) / max(float(along @ along), 1e-6)
    share = np.clip(share, 0.0, 1.0)
    return np.sqrt((rows - start[0] - share * along[0]) ** 2 + (cols - start[1] - share * along[1]) ** 2)
