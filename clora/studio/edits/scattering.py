"""Edits with random outcomes: scattered marks and grain."""

from collections.abc import Callable

import numpy as np

from clora.studio.edits.registry import HUES, Outcome, Source, new_families, rgb_of
from clora.studio.effects.filters import UNITS, gaussian_blur, mix, upsample
from clora.studio.effects.marks import Marks, draw_marks

FAMILIES, edit = new_families()


@edit(
    "sprinkle a few {a} dots over it",
    "add some small {a} dots",
    "scatter {a} spots on the picture",
    random=True,
)
def dots(source: Source) -> Outcome:
    return _scattered(source, source.colour(), 0.3, (1.2, 2.2), Marks.discs)


def _scattered(
    source: Source, colour: str, share: float, radii: tuple[float, float], draw: Callable[[Marks], np.ndarray]
) -> Outcome:
    """Paints marks in one colour; ``draw`` makes their mask ``[S, S]``."""
    marks = draw_marks(source.size, source.rng, share, radii)
    return mix(source.image, rgb_of(colour), draw(marks)), colour, ""


@edit("scatter large {a} discs over it", "throw some {a} balls into the picture", "add big {a} spots", random=True)
def discs(source: Source) -> Outcome:
    return _scattered(source, source.colour(), 0.2, (2.4, 3.4), Marks.discs)


@edit("scatter {a} rings over it", "let {a} rings float in the picture", "add many {a} rings", random=True)
def rings(source: Source) -> Outcome:
    return _scattered(source, source.colour(), 0.25, (2.4, 3.4), lambda marks: marks.rings(1.2))


@edit(
    "let soft {a} lights float in it",
    "add blurred {a} glows",
    "put {a} light spots into the air",
    random=True,
)
def glows(source: Source) -> Outcome:
    return _scattered(source, source.colour("black", "brown"), 0.3, (2.6, 3.4), Marks.glows)


@edit("draw short {a} strokes all over", "scatter {a} sticks over it", "add many small {a} lines", random=True)
def strokes(source: Source) -> Outcome:
    colour = source.colour()
    return _scattered(source, colour, 0.3, (2.6, 3.4), lambda marks: marks.turned(source.rng).strokes(1.6))


@edit("let {a} drops fall over it", "make it rain {a} streaks", "add upright {a} dashes", random=True)
def streaks(source: Source) -> Outcome:
    return _scattered(source, source.colour(), 0.4, (2.6, 3.4), lambda marks: marks.strokes(1.2))


@edit("sprinkle dots of all colours over it", "add colourful dots everywhere", "scatter bright spots", random=True)
def bright_dots(source: Source) -> Outcome:
    marks = draw_marks(source.size, source.rng, 0.35, (1.4, 2.6))
    palette = np.stack([rgb_of(colour) for colour in HUES])
    return mix(source.image, marks.one_of(palette, source.rng), marks.discs()), "", ""


@edit("add {a} grain", "cover it with {a} noise", "make the picture {a} grainy", random=True)
def grain(source: Source) -> Outcome:
    kind = source.one_of(("light", "heavy"))
    # Of cells of 2 units, in one value for all channels.
    cells = source.rng.standard_normal((UNITS // 2, UNITS // 2, 1))
    noise = gaussian_blur(upsample(cells, source.size), 0.8)
    return source.image + {"light": 0.12, "heavy": 0.3}[kind] * noise, kind, ""
