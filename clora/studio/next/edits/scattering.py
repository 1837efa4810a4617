"""Edits with random outcomes: scattered marks, lines and grain."""

import numpy as np

from clora.studio.next.edits.registry import Outcome, Source, new_families, rgb_of
from clora.studio.next.effects.filters import UNITS, gaussian_blur, grid, mix, rim, upsample
from clora.studio.next.scenes import Shape, painted

FAMILIES, edit = new_families()


@edit(
    "sprinkle a few {a} dots over it",
    "add some small {a} dots",
    "scatter {a} spots on the picture",
    random=True,
    share=1.5,
)
def dots(source: Source) -> Outcome:
    return _scattered(source, int(source.rng.integers(5, 13)), (1.6, 3.4))


@edit(
    "scatter large {a} discs over it",
    "throw some {a} balls into the picture",
    "add big {a} spots",
    random=True,
    share=1.5,
)
def discs(source: Source) -> Outcome:
    return _scattered(source, int(source.rng.integers(3, 7)), (4.0, 8.0))


def _scattered(source: Source, count: int, radii: tuple[float, float]) -> Outcome:
    colour = source.colour()
    image = source.image
    for _ in range(count):
        centre = (float(source.rng.uniform(0, UNITS)), float(source.rng.uniform(0, UNITS)))
        disc = Shape("circle", colour, centre, float(source.rng.uniform(*radii)), 0.0, 0.0)
        image = mix(image, rgb_of(colour), painted(disc, source.size)[1])
    return image, colour, ""


@edit(
    "let soft {a} lights float in it",
    "add blurred {a} glows",
    "put {a} light spots into the air",
    random=True,
    share=1.5,
)
def glows(source: Source) -> Outcome:
    colour = source.colour("black", "brown")
    y, x = grid(source.size)
    image = source.image
    for _ in range(int(source.rng.integers(4, 9))):
        distance = np.hypot(x - source.rng.uniform(0, UNITS), y - source.rng.uniform(0, UNITS))
        image = mix(image, rgb_of(colour), 0.9 * np.exp(-((distance / source.rng.uniform(3, 6)) ** 2)))
    return image, colour, ""


@edit("draw a few {a} lines across", "add random {a} lines", "cross the picture with {a} strokes", random=True)
def lines(source: Source) -> Outcome:
    colour = source.colour()
    y, x = grid(source.size)
    image = source.image
    for _ in range(3):
        angle = source.rng.uniform(0, np.pi)
        offset = source.rng.uniform(-20, 20)
        # From the line at `offset` from the centre of the image, whose normal has this angle.
        distance = np.abs(np.cos(angle) * (x - UNITS / 2) + np.sin(angle) * (y - UNITS / 2) - offset)
        image = mix(image, rgb_of(colour), rim(1.5 - distance))
    return image, colour, ""


@edit("put a {b} {a} bar somewhere", "add one {b} bar in {a}", random=True)
def bar(source: Source) -> Outcome:
    colour = source.colour()
    upright = bool(source.rng.integers(2))
    y, x = grid(source.size)
    centre = source.rng.uniform(12, UNITS - 12)
    width = source.rng.uniform(4, 7)
    mask = rim(width - np.abs((x if upright else y) - centre))
    return mix(source.image, rgb_of(colour), mask), colour, "upright" if upright else "level"


@edit("add {a} grain", "cover it with {a} noise", "make the picture {a} grainy", random=True, share=1.5)
def grain(source: Source) -> Outcome:
    kind = source.one_of(("light", "heavy"))
    # Of cells of 2 units, in one value for all channels.
    cells = source.rng.standard_normal((UNITS // 2, UNITS // 2, 1))
    noise = gaussian_blur(upsample(cells, source.size), 0.8)
    return source.image + {"light": 0.12, "heavy": 0.3}[kind] * noise, kind, ""
