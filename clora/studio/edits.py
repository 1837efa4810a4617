"""General edits: what the studio's base model can do, each with its exact result from the scene graph.

The base is trained on these and the general stream of the distillation uses them. They share no outcome with the
effect library; several have random outcomes, so that the base has learned random texture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from clora.studio.effects import filters
from clora.studio.effects.filters import grey_image, luminance, mix, rgb
from clora.studio.scenes import (
    COLOURS,
    KINDS,
    SIZE,
    Scene,
    Shape,
    coverage,
    draw_shape,
    pixel_grid,
    random_background,
    render,
    signed_distance,
)

Outcome = tuple[np.ndarray, str, str]
"""A result, not yet clipped, and the words for the slots ``{a}`` and ``{b}`` of the instruction."""


@dataclass(frozen=True, slots=True)
class Edit:
    """An instruction and its exact result ``[64, 64, 3]``; the kind of edit and the words in the instruction's slots."""

    family: str
    instruction: str
    result: np.ndarray
    slots: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of edit.

    Attributes:
        phrasings: of its instruction, with slots.
        apply: draws one edit of a scene.
        random: its instruction leaves the outcome open.
        share: how often it is drawn, in proportion.
    """

    phrasings: tuple[str, ...]
    apply: Callable[[Scene, np.random.Generator], Outcome]
    random: bool
    share: float


# The order is part of every seeded draw of an edit.
FAMILIES: dict[str, Family] = {}


def sample_edit(scene: Scene, rng: np.random.Generator, family: str | None = None) -> Edit:
    """Draws an edit of the scene; ``family`` fixes its kind."""
    name = family or str(rng.choice(list(FAMILIES), p=SHARES))
    kind = FAMILIES[name]
    result, a, b = kind.apply(scene, rng)
    instruction = str(rng.choice(kind.phrasings)).format(a=a, b=b)
    return Edit(name, instruction, np.clip(result, 0, 1).astype(np.float32), (a, b))


def edit(*phrasings: str, random: bool = False, share: float = 1.0) -> Callable:
    """Makes a function the kind of edit of its name."""

    def add(function: Callable[[Scene, np.random.Generator], Outcome]) -> Callable:
        FAMILIES[function.__name__] = Family(phrasings, function, random, share)
        return function

    return add


def _colour(rng: np.random.Generator, *but: str) -> str:
    return str(rng.choice([c for c in COLOURS if c not in but]))


def _rgb(colour: str) -> np.ndarray:
    return rgb(*COLOURS[colour])


def _pick(scene: Scene, rng: np.random.Generator) -> int:
    return int(rng.integers(len(scene.shapes)))


@edit(
    "keep the image as it is",
    "change nothing",
    "leave everything the same",
    "return the picture unchanged",
    "do not edit this image",
    share=1.2,
)
def keep(scene: Scene, rng: np.random.Generator) -> Outcome:
    return render(scene), "", ""


@edit(
    "make the {a} {b}",
    "change the {a} to {b}",
    "paint the {a} {b}",
    "turn the {a} {b}",
    "recolour the {a} in {b}",
    share=2.0,
)
def recolour(scene: Scene, rng: np.random.Generator) -> Outcome:
    i = _pick(scene, rng)
    shape = scene.shapes[i]
    colour = _colour(rng, shape.colour)
    shapes = (*scene.shapes[:i], replace(shape, colour=colour), *scene.shapes[i + 1 :])
    return render(replace(scene, shapes=shapes)), shape.name, colour


@edit("make every shape {a}", "paint all the shapes {a}", "turn all objects {a}")
def recolour_all(scene: Scene, rng: np.random.Generator) -> Outcome:
    colour = _colour(rng)
    return render(replace(scene, shapes=tuple(replace(s, colour=colour) for s in scene.shapes))), colour, ""


@edit("remove the {a}", "delete the {a}", "take the {a} away", "erase the {a}", "get rid of the {a}", share=1.6)
def remove(scene: Scene, rng: np.random.Generator) -> Outcome:
    i = _pick(scene, rng)
    return render(replace(scene, shapes=scene.shapes[:i] + scene.shapes[i + 1 :])), scene.shapes[i].name, ""


@edit("remove all shapes", "leave only the background", "erase every object")
def remove_all(scene: Scene, rng: np.random.Generator) -> Outcome:
    return render(replace(scene, shapes=())), "", ""


@edit(
    "make the background {a}",
    "change the background to {a}",
    "put everything on a {a} background",
    "replace the backdrop with plain {a}",
    share=1.6,
)
def background(scene: Scene, rng: np.random.Generator) -> Outcome:
    colour = _colour(rng, *scene.background.colours)
    return render(replace(scene, background=replace(random_background(rng, colour), noise=0.0))), colour, ""


@edit("add a {a}", "put a {a} somewhere in the picture", "draw a {a} on it", random=True, share=1.2)
def add_shape(scene: Scene, rng: np.random.Generator) -> Outcome:
    kind = str(rng.choice(KINDS))
    colour = _colour(rng)
    centre = (float(rng.uniform(12, SIZE - 12)), float(rng.uniform(12, SIZE - 12)))
    shape = Shape(kind, colour, centre, float(rng.uniform(8, 12)), 0.0, 0.1)
    return draw_shape(render(scene), shape), shape.name, ""


@edit("outline every shape in {a}", "draw {a} contours around the shapes", "give all objects a {a} outline", share=1.2)
def outline(scene: Scene, rng: np.random.Generator) -> Outcome:
    colour = _colour(rng)
    image = render(scene)
    for shape in scene.shapes:
        image = mix(image, _rgb(colour), np.clip(1.8 - np.abs(signed_distance(shape)), 0, 1))
    return image, colour, ""


@edit("brighten the image", "make it brighter", "increase the brightness", "turn up the light")
def brighten(scene: Scene, rng: np.random.Generator) -> Outcome:
    return render(scene) * 0.8 + 0.22, "", ""


@edit("darken the image", "make it darker", "lower the brightness", "turn down the light")
def darken(scene: Scene, rng: np.random.Generator) -> Outcome:
    return render(scene) * 0.5, "", ""


@edit("increase the contrast", "make it more contrasty", "boost contrast")
def contrast(scene: Scene, rng: np.random.Generator) -> Outcome:
    return render(scene) * 1.5 - 0.25, "", ""


@edit("fade the picture", "wash out the image", "lower the contrast")
def fade(scene: Scene, rng: np.random.Generator) -> Outcome:
    return render(scene) * 0.45 + 0.28, "", ""


@edit("make it black and white", "convert to greyscale", "remove all colour", "turn it grey")
def grey(scene: Scene, rng: np.random.Generator) -> Outcome:
    return grey_image(luminance(render(scene))), "", ""


@edit("make the colours stronger", "increase the saturation", "more vivid colours")
def saturate(scene: Scene, rng: np.random.Generator) -> Outcome:
    return filters.saturate(render(scene), 1.6), "", ""


@edit("make it warmer", "give it a warm tone", "warm up the colours")
def warm(scene: Scene, rng: np.random.Generator) -> Outcome:
    return render(scene) * rgb(1.15, 0.97, 0.72), "", ""


@edit("make it cooler", "give it a cold tone", "cool down the colours")
def cool(scene: Scene, rng: np.random.Generator) -> Outcome:
    return render(scene) * rgb(0.75, 0.95, 1.18), "", ""


@edit("tint everything {a}", "apply a {a} tint", "put a {a} filter over it")
def tint(scene: Scene, rng: np.random.Generator) -> Outcome:
    colour = _colour(rng, "black", "white", "grey")
    return 0.6 * render(scene) + 0.4 * _rgb(colour), colour, ""


@edit("add a {a} border", "put a {a} edge around the image", "surround it with a {a} line")
def border(scene: Scene, rng: np.random.Generator) -> Outcome:
    colour = _colour(rng)
    y, x = pixel_grid()
    edge = np.minimum(np.minimum(x, y), np.minimum(SIZE - x, SIZE - y))
    # The border is 4 px wide, antialiased over the pixel that its inner edge crosses.
    inside = np.clip(edge - 4.0 + 0.5, 0, 1)[..., None]
    return inside * render(scene) + (1 - inside) * _rgb(colour), colour, ""


@edit("tint the {a} half {b}", "put a {b} filter on the {a} side")
def half(scene: Scene, rng: np.random.Generator) -> Outcome:
    colour = _colour(rng)
    side = str(rng.choice(["left", "right", "top", "bottom"]))
    y, x = pixel_grid()
    # Coordinates are those of pixel centres: none lies on the middle.
    mask = {"left": x < 32, "right": x > 32, "top": y < 32, "bottom": y > 32}[side][..., None]
    image = render(scene)
    return np.where(mask, 0.45 * image + 0.55 * _rgb(colour), image), side, colour


@edit("sprinkle a few {a} dots over it", "add some small {a} dots", "scatter {a} spots on the picture", random=True)
def dots(scene: Scene, rng: np.random.Generator) -> Outcome:
    colour = _colour(rng)
    image = render(scene)
    for _ in range(int(rng.integers(5, 9))):
        centre = (float(rng.uniform(2, SIZE - 2)), float(rng.uniform(2, SIZE - 2)))
        dot = Shape("circle", colour, centre, float(rng.uniform(2.2, 3.4)), 0.0, 0.0)
        image = mix(image, _rgb(colour), coverage(dot))
    return image, colour, ""


@edit("draw a few {a} lines across", "add random {a} lines", "cross the picture with {a} strokes", random=True)
def lines(scene: Scene, rng: np.random.Generator) -> Outcome:
    colour = _colour(rng)
    y, x = pixel_grid()
    image = render(scene)
    for _ in range(3):
        angle = rng.uniform(0, np.pi)
        offset = rng.uniform(-20, 20)
        # From the line at `offset` from the centre of the image, whose normal has this angle.
        distance = np.abs(np.cos(angle) * (x - SIZE / 2) + np.sin(angle) * (y - SIZE / 2) - offset)
        image = mix(image, _rgb(colour), np.clip(2.0 - distance, 0, 1))
    return image, colour, ""


@edit("put a {b} {a} bar somewhere", "add one {b} bar in {a}", random=True)
def bar(scene: Scene, rng: np.random.Generator) -> Outcome:
    colour = _colour(rng)
    upright = bool(rng.integers(2))
    y, x = pixel_grid()
    centre = rng.uniform(12, SIZE - 12)
    width = rng.uniform(4, 7)
    mask = np.clip(width - np.abs((x if upright else y) - centre), 0, 1)
    return mix(render(scene), _rgb(colour), mask), colour, "upright" if upright else "level"


SHARES = np.array([f.share for f in FAMILIES.values()]) / sum(f.share for f in FAMILIES.values())
