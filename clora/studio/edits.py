"""General edits: what the studio's base model knows, each with its exact result from the scene graph.

The base is trained on these and the general stream of the distillation uses them. They share no outcome with the
effect library; several have random outcomes, so that the base knows random texture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from clora.studio.effects.filters import LUMA
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

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Edit:
    """An instruction and its exact result ``[64, 64, 3]``; the kind of edit and the words in the instruction's slots."""

    family: str
    instruction: str
    result: np.ndarray
    slots: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of edit: phrasings (with ``{a}``, ``{b}`` slots), whether its outcome is random, and how often it is drawn."""

    phrasings: Words
    apply: Callable[[Scene, np.random.Generator], tuple[np.ndarray, str, str]]
    random: bool = False
    share: float = 1.0


def sample_edit(scene: Scene, rng: np.random.Generator, family: str | None = None) -> Edit:
    """Draws an edit of the scene; ``family`` fixes its kind."""
    name = family or str(rng.choice(list(FAMILIES), p=SHARES))
    kind = FAMILIES[name]
    result, a, b = kind.apply(scene, rng)
    instruction = str(rng.choice(kind.phrasings)).format(a=a, b=b)
    return Edit(name, instruction, np.clip(result, 0, 1).astype(np.float32), (a, b))


def _colour(rng: np.random.Generator, *but: str) -> str:
    return str(rng.choice([c for c in COLOURS if c not in but]))


def _rgb(colour: str) -> np.ndarray:
    return np.array(COLOURS[colour], np.float32)


def _pick(scene: Scene, rng: np.random.Generator) -> int:
    return int(rng.integers(len(scene.shapes)))


def _keep(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    return render(scene), "", ""


def _recolour(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    i = _pick(scene, rng)
    shape = scene.shapes[i]
    colour = _colour(rng, shape.colour)
    shapes = (*scene.shapes[:i], replace(shape, colour=colour), *scene.shapes[i + 1 :])
    return render(replace(scene, shapes=shapes)), shape.name, colour


def _recolour_all(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    colour = _colour(rng)
    return render(replace(scene, shapes=tuple(replace(s, colour=colour) for s in scene.shapes))), colour, ""


def _remove(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    i = _pick(scene, rng)
    return render(replace(scene, shapes=scene.shapes[:i] + scene.shapes[i + 1 :])), scene.shapes[i].name, ""


def _remove_all(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    return render(replace(scene, shapes=())), "", ""


def _background(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    colour = _colour(rng, *scene.background.colours)
    return render(replace(scene, background=replace(random_background(rng, colour), noise=0.0))), colour, ""


def _add_shape(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    kind, colour = str(rng.choice(KINDS)), _colour(rng)
    centre = (float(rng.uniform(12, SIZE - 12)), float(rng.uniform(12, SIZE - 12)))
    shape = Shape(kind, colour, centre, float(rng.uniform(8, 12)), 0.0, 0.1)
    return draw_shape(render(scene), shape), f"{colour} {kind}", ""


def _outline(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    colour = _colour(rng)
    image = render(scene)
    for shape in scene.shapes:
        line = np.clip(1.8 - np.abs(signed_distance(shape)), 0, 1)[..., None]
        image = image + line * (_rgb(colour) - image)
    return image, colour, ""


def _light(gain: float, lift: float) -> Callable[[Scene, np.random.Generator], tuple[np.ndarray, str, str]]:
    def apply(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
        return render(scene) * gain + lift, "", ""

    return apply


def _grey(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    grey = render(scene) @ LUMA
    return np.repeat(grey[..., None], 3, axis=-1), "", ""


def _saturate(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    image = render(scene)
    grey = (image @ LUMA)[..., None]
    return grey + 1.6 * (image - grey), "", ""


def _balance(r: float, g: float, b: float) -> Callable[[Scene, np.random.Generator], tuple[np.ndarray, str, str]]:
    def apply(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
        return render(scene) * np.array([r, g, b], np.float32), "", ""

    return apply


def _tint(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    colour = _colour(rng, "black", "white", "grey")
    return 0.6 * render(scene) + 0.4 * _rgb(colour), colour, ""


def _border(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    colour = _colour(rng)
    y, x = pixel_grid()
    edge = np.minimum(np.minimum(x, y), np.minimum(SIZE - x, SIZE - y))
    inside = np.clip(edge - 4.0 + 0.5, 0, 1)[..., None]
    return inside * render(scene) + (1 - inside) * _rgb(colour), colour, ""


def _half(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    colour = _colour(rng)
    side = str(rng.choice(["left", "right", "top", "bottom"]))
    y, x = pixel_grid()
    mask = {"left": x < 32, "right": x > 32, "top": y < 32, "bottom": y > 32}[side][..., None]
    image = render(scene)
    return np.where(mask, 0.45 * image + 0.55 * _rgb(colour), image), side, colour


def _dots(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    colour = _colour(rng)
    image = render(scene)
    for _ in range(int(rng.integers(5, 9))):
        centre = (float(rng.uniform(2, SIZE - 2)), float(rng.uniform(2, SIZE - 2)))
        dot = coverage(Shape("circle", colour, centre, float(rng.uniform(2.2, 3.4)), 0.0, 0.0))[..., None]
        image = image + dot * (_rgb(colour) - image)
    return image, colour, ""


def _lines(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    colour = _colour(rng)
    y, x = pixel_grid()
    image = render(scene)
    for _ in range(3):
        angle, offset = rng.uniform(0, np.pi), rng.uniform(-20, 20)
        distance = np.abs(np.cos(angle) * (x - SIZE / 2) + np.sin(angle) * (y - SIZE / 2) - offset)
        line = np.clip(2.0 - distance, 0, 1)[..., None]
        image = image + line * (_rgb(colour) - image)
    return image, colour, ""


def _bar(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    colour = _colour(rng)
    upright = bool(rng.integers(2))
    y, x = pixel_grid()
    centre, width = rng.uniform(12, SIZE - 12), rng.uniform(4, 7)
    bar = np.clip(width - np.abs((x if upright else y) - centre), 0, 1)[..., None]
    image = render(scene)
    return image + bar * (_rgb(colour) - image), colour, "upright" if upright else "level"


FAMILIES: dict[str, Family] = {
    "keep": Family(
        (
            "keep the image as it is",
            "change nothing",
            "leave everything the same",
            "return the picture unchanged",
            "do not edit this image",
        ),
        _keep,
        share=1.2,
    ),
    "recolour": Family(
        (
            "make the {a} {b}",
            "change the {a} to {b}",
            "paint the {a} {b}",
            "turn the {a} {b}",
            "recolour the {a} in {b}",
        ),
        _recolour,
        share=2.0,
    ),
    "recolour_all": Family(("make every shape {a}", "paint all the shapes {a}", "turn all objects {a}"), _recolour_all),
    "remove": Family(
        ("remove the {a}", "delete the {a}", "take the {a} away", "erase the {a}", "get rid of the {a}"),
        _remove,
        share=1.6,
    ),
    "remove_all": Family(("remove all shapes", "leave only the background", "erase every object"), _remove_all),
    "background": Family(
        (
            "make the background {a}",
            "change the background to {a}",
            "put everything on a {a} background",
            "replace the backdrop with plain {a}",
        ),
        _background,
        share=1.6,
    ),
    "add_shape": Family(
        ("add a {a}", "put a {a} somewhere in the picture", "draw a {a} on it"), _add_shape, random=True, share=1.2
    ),
    "outline": Family(
        ("outline every shape in {a}", "draw {a} contours around the shapes", "give all objects a {a} outline"),
        _outline,
        share=1.2,
    ),
    "brighten": Family(
        ("brighten the image", "make it brighter", "increase the brightness", "turn up the light"), _light(0.8, 0.22)
    ),
    "darken": Family(
        ("darken the image", "make it darker", "lower the brightness", "turn down the light"), _light(0.5, 0.0)
    ),
    "contrast": Family(("increase the contrast", "make it more contrasty", "boost contrast"), _light(1.5, -0.25)),
    "fade": Family(("fade the picture", "wash out the image", "lower the contrast"), _light(0.45, 0.28)),
    "grey": Family(("make it black and white", "convert to greyscale", "remove all colour", "turn it grey"), _grey),
    "saturate": Family(("make the colours stronger", "increase the saturation", "more vivid colours"), _saturate),
    "warm": Family(("make it warmer", "give it a warm tone", "warm up the colours"), _balance(1.15, 0.97, 0.72)),
    "cool": Family(("make it cooler", "give it a cold tone", "cool down the colours"), _balance(0.75, 0.95, 1.18)),
    "tint": Family(("tint everything {a}", "apply a {a} tint", "put a {a} filter over it"), _tint),
    "border": Family(("add a {a} border", "put a {a} edge around the image", "surround it with a {a} line"), _border),
    "half": Family(("tint the {a} half {b}", "put a {b} filter on the {a} side"), _half),
    "dots": Family(
        ("sprinkle a few {a} dots over it", "add some small {a} dots", "scatter {a} spots on the picture"),
        _dots,
        random=True,
    ),
    "lines": Family(
        ("draw a few {a} lines across", "add random {a} lines", "cross the picture with {a} strokes"),
        _lines,
        random=True,
    ),
    "bar": Family(("put a {b} {a} bar somewhere", "add one {b} bar in {a}"), _bar, random=True),
}
SHARES = np.array([f.share for f in FAMILIES.values()]) / sum(f.share for f in FAMILIES.values())
