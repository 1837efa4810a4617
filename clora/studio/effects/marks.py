"""Marks at random places: one in some of the cells of 8 x 8 pixels, and never across a border of two.

The cells are the tokens of the studio's transformer. One of its size learns to draw such marks; those that lie across borders
came out cut, since many tokens would have to agree on each. A larger picture has more marks, not larger ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from clora.studio.effects.filters import upsample

CELL = 8


@dataclass(frozen=True, slots=True)
class Marks:
    """Where marks lie, as each pixel sees that of its cell; lengths are in pixels.

    Attributes:
        x, y: the pixel's position from the mark's centre, to the right and down: ``[S, S]``.
        radius: of the mark, negative where the cell has none: ``[S, S]``.
    """

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray

    @property
    def distance(self) -> np.ndarray:
        """From the centre: ``[S, S]``."""
        return np.hypot(self.x, self.y)

    @property
    def depth(self) -> np.ndarray:
        """How far inside a disc of the mark's radius the pixel is, negative outside: ``[S, S]``."""
        return np.where(self.radius > 0, self.radius - self.distance, -CELL)

    def inside(self, depth: np.ndarray) -> np.ndarray:
        """Returns the mask of what lies inside an outline and inside the disc, soft over one pixel; ``depth`` in pixels."""
        return np.clip(np.minimum(depth, self.depth) + 0.5, 0, 1).astype(np.float32)

    def discs(self) -> np.ndarray:
        """Returns the mask of discs."""
        return self.inside(self.depth)

    def rings(self, width: float) -> np.ndarray:
        """Returns the mask of the outer ``width`` of discs."""
        return self.inside(width - self.depth)

    def strokes(self, width: float) -> np.ndarray:
        """Returns the mask of lines, upright where the marks are not turned."""
        return self.inside(width / 2 - np.abs(self.x))

    def glows(self) -> np.ndarray:
        """Returns the mask of soft lights that end with the mark's radius."""
        return np.clip(self.depth / np.maximum(self.radius, 1), 0, 1) ** 1.5

    def turned(self, rng: np.random.Generator, angles: tuple[float, float] = (0, 2 * np.pi)) -> Marks:
        """Turns each mark by an angle in radians drawn between two."""
        angle = self.each(rng.uniform(*angles, self._cells))
        x, y = np.cos(angle) * self.x + np.sin(angle) * self.y, np.cos(angle) * self.y - np.sin(angle) * self.x
        return replace(self, x=x, y=y)

    def one_of(self, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draws one of the values ``[K, ...]`` for each mark: ``[S, S, ...]``."""
        return self.each(values[rng.integers(len(values), size=self._cells)])

    def each(self, values: np.ndarray) -> np.ndarray:
        """Gives each pixel the value of its cell: ``[S / 8, S / 8, ...]`` to ``[S, S, ...]``."""
        return upsample(values, len(self.radius)).astype(np.float32)

    @property
    def _cells(self) -> tuple[int, int]:
        return (len(self.radius) // CELL,) * 2


def draw_marks(size: int, rng: np.random.Generator, share: float, radii: tuple[float, float]) -> Marks:
    """Draws marks, with radii between two (at most 3.5 pixels), in a share of the cells of a picture of this side."""
    cells = (size // CELL,) * 2
    radius = rng.uniform(*radii, cells)
    # A whole mark and its soft edge fit into the cell.
    room = CELL / 2 - 0.5 - radius
    x, y = (CELL / 2 + room * rng.uniform(-1, 1, cells) for _ in range(2))
    radius = np.where(rng.random(cells) < share, radius, -1)
    place = np.arange(size) % CELL + 0.5
    return Marks(
        x=(place[None, :] - upsample(x, size)).astype(np.float32),
        y=(place[:, None] - upsample(y, size)).astype(np.float32),
        radius=upsample(radius, size).astype(np.float32),
    )
