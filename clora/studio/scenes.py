"""Scenes with a known scene graph, so that the exact result of an edit is known.

A scene is a background and objects that lie apart: up to two on a part of a photograph, up to three on a pattern. An object is a
shape or, on a photograph and once at most, a cut-out with a white rim, as a sticker has. Every name ("red circle", "apple")
occurs once, so that it names one object. Of most nouns training has one or two pictures: by the rim, a base still finds the thing.

Lengths are in units of 1/64 of the side: a scene can be drawn at any size S. Images are float32 ``[S, S, 3]`` in [0, 1].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from clora.studio.effects.filters import LUMA, UNITS, grid, rim
from clora.studio.photographs import Cutout, Photographs, load_photographs

SIZE = 64
"""Side of the demo's pictures."""
SIZES = (64, 128)
"""Sides of pictures that the studio is trained and measured on; the second is what people look at."""
"""Of the demo's pictures."""
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


PATTERN_SHARE = 0.2
"""Of backgrounds."""
CUTOUT_SHARE = 0.7
"""Of the photographs with objects; their other objects, and all on patterns, are shapes."""
MAX_OBJECTS = {"photograph": 2, "pattern": 3}
STICKER_RIM = 1.0
"""Width of the white rim around a cut-out, in units."""
PLACES = 30
"""Tries to place an object apart from the others."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape: centre and radius in units, rotation in radians, shading as the brightness drop to its lower edge."""

    kind: str
    colour: str
    centre: tuple[float, float]
    radius: float
    angle: float
    shading: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def reach(self) -> float:
        """How far it extends from its centre, in units; squares and diamonds have the farthest corners."""
        return 1.21 * self.radius


@dataclass(frozen=True, slots=True, eq=False)
class Thing:
    """A cut-out in a picture, with a white rim: centre and half of its longer side in units; painted in a colour, or None."""

    cutout: Cutout
    centre: tuple[float, float]
    radius: float
    flipped: bool
    colour: str | None = None

    @property
    def name(self) -> str:
        return self.cutout.noun

    @property
    def reach(self) -> float:
        """How far it extends from its centre, in units: to the corners of its picture, and its rim."""
        height, width = self.cutout.image.shape[:2]
        return self.radius * math.hypot(height, width) / max(height, width) + STICKER_RIM


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern between two colours: direction in radians, period in units, noise as standard deviation."""

    pattern: str
    colours: tuple[str, str]
    angle: float
    period: float
    phase: float
    noise: float
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A square part of a photograph ``[H, W, 3]`` uint8: its corner and side in the photograph's pixels."""

    photograph: np.ndarray
    left: int
    top: int
    side: int
    flipped: bool

    @property
    def colours(self) -> tuple[str, ...]:
        """The names of its colours: none is known."""
        return ()


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    background: Pattern | Part
    objects: tuple[Shape | Thing, ...]


def make_scene(seed: int, split: str = "train", min_objects: int = 0, photographs: Photographs | None = None) -> Scene:
    """Draws the scene of a seed; equal arguments make equal scenes.

    Args:
        split: whose photographs it is made of: "train", "validation" or "held_out".
        photographs: None for those that ship.
    """
    photographs = photographs or load_photographs()
    cutouts = photographs.cutouts(split)
    rng = np.random.default_rng([seed, 0xC10A])
    if rng.random() < PATTERN_SHARE:
        background: Pattern | Part = random_pattern(rng)
        count = int(rng.integers(max(1, min_objects), MAX_OBJECTS["pattern"] + 1))
        has_cutout = False
    else:
        background = _random_part(rng, photographs.backgrounds(split))
        count = int(rng.integers(min_objects, MAX_OBJECTS["photograph"] + 1))
        has_cutout = bool(count and rng.random() < CUTOUT_SHARE)
    objects: list[Shape | Thing] = []
    if has_cutout:
        noun = str(rng.choice(sorted({cutout.noun for cutout in cutouts})))
        objects.append(random_thing(rng, cutouts, noun))
    # A shape in a colour of the background would not stand out from it.
    colours = [colour for colour in COLOURS if colour not in background.colours]
    names = list(itertools.product(colours, KINDS))
    for i in rng.permutation(len(names))[: count - has_cutout]:
        objects += _random_shape(rng, *names[i], objects)
    return Scene(background, tuple(objects))


def random_thing(rng: np.random.Generator, cutouts: Sequence[Cutout], noun: str) -> Thing:
    """Draws one of the cut-outs of a noun, where it lies and how large it is."""
    own = [cutout for cutout in cutouts if cutout.noun == noun]
    return Thing(
        cutout=own[int(rng.integers(len(own)))],
        centre=(float(rng.uniform(14, UNITS - 14)), float(rng.uniform(14, UNITS - 14))),
        radius=float(rng.uniform(12, 20)),
        flipped=bool(rng.integers(2)),
    )


def _random_part(rng: np.random.Generator, photographs: Sequence[np.ndarray]) -> Part:
    photograph = photographs[int(rng.integers(len(photographs)))]
    height, width = photograph.shape[:2]
    shorter = min(height, width)
    # Its logarithm is uniform: as often 115 to 182 pixels of 288 as 182 to 288. A smaller part would be blurred at 128 x 128.
    least = min(shorter, max(0.4 * shorter, 128))
    side = int(np.exp(rng.uniform(np.log(least), np.log(shorter))))
    left = int(rng.integers(width - side + 1))
    top = int(rng.integers(height - side + 1))
    return Part(photograph, left, top, side, bool(rng.integers(2)))


def random_pattern(rng: np.random.Generator, colour: str | None = None) -> Pattern:
    """Draws a pattern; ``colour`` fixes the first of its two colours and makes it plain."""
    colours = (colour or str(rng.choice(list(COLOURS))), str(rng.choice(list(COLOURS))))
    return Pattern(
        pattern=str(rng.choice(PATTERNS if colour is None else ("plain",))),
        colours=colours,
        angle=float(rng.uniform(0, 2 * np.pi)),
        period=float(rng.uniform(14, 40)),
        phase=float(rng.uniform(0, 2 * np.pi)),
        noise=float(rng.choice([0.0, 0.0, 0.015, 0.03])),
        seed=int(rng.integers(1 << 31)),
    )


def _random_shape(rng: np.random.Generator, colour: str, kind: str, others: Sequence[Shape | Thing]) -> list[Shape]:
    """Draws a shape apart from other objects, or none where there is no room."""
    for _ in range(PLACES):
        shape = Shape(
            kind=kind,
            colour=colour,
            centre=(float(rng.uniform(10, UNITS - 10)), float(rng.uniform(10, UNITS - 10))),
            radius=float(rng.uniform(8, 15)),
            angle=float(rng.uniform(-0.5, 0.5)),
            shading=float(rng.uniform(0.0, 0.35)),
        )
        if all(math.dist(shape.centre, other.centre) > shape.reach + other.reach for other in others):
            return [shape]
    return []


def render(scene: Scene, size: int = SIZE) -> np.ndarray:
    """Draws a scene ``[size, size, 3]``, edges antialiased over one pixel."""
    image = render_background(scene.background, size)
    for thing in scene.objects:
        image = draw(image, thing)
    return image


def render_background(background: Pattern | Part, size: int = SIZE) -> np.ndarray:
    """Draws a background ``[size, size, 3]``."""
    if isinstance(background, Part):
        left, top, side = background.left, background.top, background.side
        part = Image.fromarray(background.photograph).resize(
            (size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side)
        )
        image = np.asarray(part, np.float32) / 255
        return image[:, ::-1].copy() if background.flipped else image
    y, x = grid(size)
    first, second = (np.array(COLOURS[c], np.float32) for c in background.colours)
    # Towards the first colour: shapes must stand out from the pattern.
    second = first + 0.6 * (second - first)
    mix = _pattern_mix(background, y, x)[..., None].astype(np.float32)
    image = first + mix * (second - first)
    # One value for all channels: noise of brightness, not of colour.
    noise = np.random.default_rng(background.seed).standard_normal((size, size, 1))
    return np.clip(image + background.noise * noise, 0, 1).astype(np.float32)


def _pattern_mix(background: Pattern, y: np.ndarray, x: np.ndarray) -> np.ndarray:
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
        return _soft_step(np.sin(wave * np.hypot(x - UNITS / 2, y - UNITS / 2) + background.phase))
    return 0.5 + 0.5 * np.sin(wave * along + background.phase) * np.sin(0.7 * wave * across + 1.7 * background.phase)


def _soft_step(value: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + 3.0 * value, 0, 1)


def draw(image: np.ndarray, thing: Shape | Thing) -> np.ndarray:
    """Draws one object over an image ``[S, S, 3]``; returns a new image."""
    paint, cover = painted(thing, len(image))
    # Over the image in proportion to the share of each pixel that the object covers.
    return (image + cover[..., None] * (paint - image)).astype(np.float32)


def painted(thing: Shape | Thing, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Returns an object's colours ``[S, S, 3]`` and the share of each pixel that it covers, ``[S, S]`` in [0, 1]."""
    if isinstance(thing, Thing):
        return _placed(thing, size)
    y, _ = grid(size)
    shade = 1 - thing.shading * np.clip((y - thing.centre[1]) / (2 * thing.radius) + 0.5, 0, 1)
    return np.array(COLOURS[thing.colour], np.float32) * shade[..., None], rim(-signed_distance(thing, size))


def _placed(thing: Thing, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Resizes a cut-out to its place in a picture, and paints it."""
    scale = size / UNITS
    pixels = thing.cutout.image[:, ::-1] if thing.flipped else thing.cutout.image
    height, width = pixels.shape[:2]
    shrink = 2 * thing.radius * scale / max(height, width)
    height, width = max(1, round(height * shrink)), max(1, round(width * shrink))
    small = Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.BICUBIC)
    whole = Image.new("RGBA", (size, size))
    whole.paste(small, (round(thing.centre[0] * scale - width / 2), round(thing.centre[1] * scale - height / 2)))
    rgba = np.asarray(whole, np.float32) / 255
    colours, inside = rgba[..., :3], rgba[..., 3]
    if thing.colour is not None:
        # Its own light and shade, in the new colour.
        colours = np.clip((0.35 + (colours @ LUMA)[..., None]) * np.array(COLOURS[thing.colour], np.float32), 0, 1)
    # The rim: white wherever the cut-out is near.
    reach = 2 * round(STICKER_RIM * scale) + 1
    cover = np.asarray(whole.getchannel("A").filter(ImageFilter.MaxFilter(reach)), np.float32) / 255
    return 1 + inside[..., None] * (colours - 1), cover


def recoloured(thing: Shape | Thing, colour: str) -> Shape | Thing:
    """Returns an object in another colour."""
    return replace(thing, colour=colour)


def signed_distance(shape: Shape, size: int = SIZE) -> np.ndarray:
    """Returns the distance in units to the shape's edge, negative inside (approximate at corners): ``[S, S]``."""
    y, x = grid(size)
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
