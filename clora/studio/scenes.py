"""Procedural scenes with a known scene graph, so that the exact result of an edit is known.

A scene is a background and one to four shapes, drawn back to front; every pair (colour, kind) occurs once, so
that "the red circle" names one shape. Images are float32 ``[64, 64, 3]`` in [0, 1].
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

SIZE = 64
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.14, 0.14),
    "orange": (0.95, 0.55, 0.10),
    "yellow": (0.95, 0.88, 0.20),
    "green": (0.16, 0.65, 0.25),
    "cyan": (0.15, 0.78, 0.82),
    "blue": (0.15, 0.28, 0.85),
    "purple": (0.52, 0.20, 0.72),
    "pink": (0.95, 0.55, 0.75),
    "brown": (0.48, 0.30, 0.15),
    "white": (0.95, 0.95, 0.95),
    "grey": (0.50, 0.50, 0.50),
    "black": (0.07, 0.07, 0.07),
}
KINDS = ("circle", "square", "triangle", "diamond", "ring", "cross")
PATTERNS = ("plain", "gradient", "stripes", "checks", "blobs", "rings")


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape: centre and radius in pixels, rotation in radians, shading as the brightness drop to its lower edge."""

    kind: str
    colour: str
    centre: tuple[float, float]
    radius: float
    angle: float
    shading: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True, slots=True)
class Background:
    """A pattern between two colours: direction in radians, period in pixels, noise as standard deviation."""

    pattern: str
    colours: tuple[str, str]
    angle: float
    period: float
    phase: float
    noise: float
    seed: int


@dataclass(frozen=True, slots=True)
class Scene:
    background: Background
    shapes: tuple[Shape, ...]


def make_scene(seed: int) -> Scene:
    """Draws the scene of a seed; equal seeds make equal scenes."""
    rng = np.random.default_rng([seed, 0xC10A])
    background = random_background(rng)
    # A shape in a colour of the background would not stand out from it.
    colours = [colour for colour in COLOURS if colour not in background.colours]
    names = list(itertools.product(colours, KINDS))
    chosen = rng.permutation(len(names))[: rng.integers(1, 5)]
    return Scene(background, tuple(_random_shape(rng, *names[i]) for i in chosen))


def random_background(rng: np.random.Generator, colour: str | None = None) -> Background:
    """Draws a background; ``colour`` fixes the first of its two colours and makes it plain."""
    colours = (colour or str(rng.choice(list(COLOURS))), str(rng.choice(list(COLOURS))))
    return Background(
        pattern=str(rng.choice(PATTERNS if colour is None else ("plain",))),
        colours=colours,
        angle=float(rng.uniform(0, 2 * np.pi)),
        period=float(rng.uniform(14, 40)),
        phase=float(rng.uniform(0, 2 * np.pi)),
        noise=float(rng.choice([0.0, 0.0, 0.015, 0.03])),
        seed=int(rng.integers(1 << 31)),
    )


def _random_shape(rng: np.random.Generator, colour: str, kind: str) -> Shape:
    return Shape(
        kind=kind,
        colour=colour,
        centre=(float(rng.uniform(10, SIZE - 10)), float(rng.uniform(10, SIZE - 10))),
        radius=float(rng.uniform(8, 19)),
        angle=float(rng.uniform(-0.5, 0.5)),
        shading=float(rng.uniform(0.0, 0.35)),
    )


def render(scene: Scene) -> np.ndarray:
    """Draws a scene: float32 ``[64, 64, 3]`` in [0, 1], edges antialiased over one pixel."""
    image = render_background(scene.background)
    for shape in scene.shapes:
        image = draw_shape(image, shape)
    return image


def pixel_grid() -> tuple[np.ndarray, np.ndarray]:
    """Returns pixel centre coordinates ``(y, x)``, each ``[64, 64]``."""
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    return np.meshgrid(axis, axis, indexing="ij")


def render_background(background: Background) -> np.ndarray:
    y, x = pixel_grid()
    first, second = (np.array(COLOURS[c], np.float32) for c in background.colours)
    # Towards the first colour: shapes must stand out from the pattern.
    second = first + 0.6 * (second - first)
    mix = _pattern_mix(background, y, x)[..., None].astype(np.float32)
    image = first + mix * (second - first)
    # One value for all channels: noise of brightness, not of colour.
    noise = np.random.default_rng(background.seed).standard_normal((SIZE, SIZE, 1))
    return np.clip(image + background.noise * noise, 0, 1).astype(np.float32)


def _pattern_mix(background: Background, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Returns the share of the second colour in each pixel, in [0, 1]."""
    # The pixel along the pattern's direction and across it.
    along = np.cos(background.angle) * x + np.sin(background.angle) * y
    across = np.cos(background.angle) * y - np.sin(background.angle) * x
    wave = 2 * np.pi / background.period
    if background.pattern == "plain":
        return np.zeros_like(x)
    if background.pattern == "gradient":
        return (along - along.min()) / (along.max() - along.min())
    if background.pattern == "stripes":
        return _soft_step(np.sin(wave * along + background.phase))
    if background.pattern == "checks":
        return _soft_step(np.sin(wave * along + background.phase) * np.sin(wave * across))
    if background.pattern == "rings":
        return _soft_step(np.sin(wave * np.hypot(x - SIZE / 2, y - SIZE / 2) + background.phase))
    return 0.5 + 0.5 * np.sin(wave * along + background.phase) * np.sin(0.7 * wave * across + 1.7 * background.phase)


def _soft_step(value: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + 3.0 * value, 0, 1)


def draw_shape(image: np.ndarray, shape: Shape) -> np.ndarray:
    """Draws one shape over an image ``[64, 64, 3]``; returns a new image."""
    y, _ = pixel_grid()
    shade = 1 - shape.shading * np.clip((y - shape.centre[1]) / (2 * shape.radius) + 0.5, 0, 1)
    paint = np.array(COLOURS[shape.colour], np.float32) * shade[..., None]
    # Over the image in proportion to the share of each pixel that the shape covers.
    cover = coverage(shape)[..., None]
    return (image + cover * (paint - image)).astype(np.float32)


def coverage(shape: Shape) -> np.ndarray:
    """Returns the share of each pixel that the shape covers: ``[64, 64]`` in [0, 1]."""
    # An edge is antialiased over the pixel that it crosses.
    return np.clip(0.5 - signed_distance(shape), 0, 1)


def signed_distance(shape: Shape) -> np.ndarray:
    """Returns the distance in pixels to the shape's edge, negative inside (approximate at corners): ``[64, 64]``."""
    y, x = pixel_grid()
    dx = x - shape.centre[0]
    dy = y - shape.centre[1]
    # (u, v): the pixel in the shape's own axes, turned back by its rotation.
    u = np.cos(shape.angle) * dx + np.sin(shape.angle) * dy
    v = np.cos(shape.angle) * dy - np.sin(shape.angle) * dx
    r = shape.radius
    if shape.kind == "circle":
        return np.hypot(u, v) - r
    if shape.kind == "ring":
        return np.abs(np.hypot(u, v) - 0.78 * r) - 0.25 * r
    if shape.kind == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.85 * r
    if shape.kind == "diamond":
        return (np.abs(u) + np.abs(v) - 1.2 * r) / np.sqrt(2)
    if shape.kind == "cross":
        upright = np.maximum(np.abs(u) - 0.32 * r, np.abs(v) - r)
        level = np.maximum(np.abs(u) - r, np.abs(v) - 0.32 * r)
        return np.minimum(upright, level)
    # The triangle: two slanted sides (cos 30 and sin 30 degrees) and the level one.
    return np.maximum(np.abs(u) * 0.866 + v * 0.5, -v) - 0.55 * r
