"""Edits that redraw the picture, lay a pattern over it or fade a part of it."""

import numpy as np

from clora.studio.edits.registry import HUES, SIDES, Outcome, Source, new_families, rgb_of
from clora.studio.effects.filters import (
    UNITS,
    border_distance,
    cell_mean,
    gaussian_blur,
    gradients,
    grid,
    luminance,
    mix,
    outlines,
    polar,
    rim,
    upsample,
)

FAMILIES, edit = new_families()


@edit("blur it {a}", "soften the picture {a}", "make it {a} blurred")
def blur(source: Source) -> Outcome:
    amount = source.one_of(("slightly", "clearly", "heavily"))
    return gaussian_blur(source.image, {"slightly": 0.8, "clearly": 1.8, "heavily": 3.5}[amount]), amount, ""


@edit("sharpen the image", "make the details crisper", "increase the sharpness")
def sharpen(source: Source) -> Outcome:
    return source.image + 1.2 * (source.image - gaussian_blur(source.image, 1.0)), "", ""


@edit("draw the edges in {a} on {b}", "trace the outlines in {a} over plain {b}", "{a} line drawing on {b}", share=2.0)
def edges(source: Source) -> Outcome:
    line = source.colour()
    paper = source.colour(line)
    plain = np.broadcast_to(rgb_of(paper), source.image.shape)
    return mix(plain, rgb_of(line), outlines(source.image)), line, paper


@edit("press it into {a} paper", "make a {a} relief of it", "stamp the picture into {a}", share=1.5)
def relief(source: Source) -> Outcome:
    colour = source.one_of(HUES)
    d_row, d_col = gradients(gaussian_blur(luminance(source.image), 1.0))
    return (0.6 + 3.0 * (d_row + d_col))[..., None] * (0.35 + 0.65 * rgb_of(colour)), colour, ""


@edit("pixelate it into {a} blocks", "make it of {a} square blocks", "show it in {a} pixels")
def blocks(source: Source) -> Outcome:
    kind = source.one_of(("small", "large"))
    count = {"small": 16, "large": 8}[kind]
    return upsample(cell_mean(source.image, count), source.size), kind, ""


@edit("draw a {a} grid over it", "lay {a} grid lines over the picture", "cover it with a {a} mesh")
def mesh(source: Source) -> Outcome:
    colour = source.colour()
    y, x = grid(source.size)
    near = np.minimum(np.abs((y + 8) % 16 - 8), np.abs((x + 8) % 16 - 8))
    return mix(source.image, rgb_of(colour), (near < 1).astype(np.float32)), colour, ""


@edit("lay {a} {b} stripes over it", "stripe the picture with {b} bands of {a}", "add {b} stripes in {a}")
def stripes(source: Source) -> Outcome:
    colour = source.colour()
    way = source.one_of(("upright", "level", "slanted"))
    y, x = grid(source.size)
    along = {"upright": x, "level": y, "slanted": x + y}[way]
    return mix(source.image, rgb_of(colour), 0.6 * (along % 16 < 8).astype(np.float32)), colour, way


@edit("add a {a} border", "put a {a} edge around the image", "surround it with a {a} line")
def border(source: Source) -> Outcome:
    colour = source.colour()
    outside = rim(4.0 - border_distance(source.size))
    return mix(source.image, rgb_of(colour), outside), colour, ""


@edit("tint the {a} half {b}", "put a {b} filter on the {a} side")
def half(source: Source) -> Outcome:
    colour = source.colour()
    side = source.one_of(SIDES)
    mask = (_depth(source.size, side) < UNITS / 2).astype(np.float32)
    return mix(source.image, rgb_of(colour), 0.55 * mask), side, colour


@edit("fade the {a} edge to {b}", "let the {a} side vanish into {b}", "blend the {a} side into {b}", share=1.5)
def fade_side(source: Source) -> Outcome:
    colour = source.colour()
    side = source.one_of(SIDES)
    return mix(source.image, rgb_of(colour), np.clip(1 - _depth(source.size, side) / 40, 0, 1)), side, colour


@edit("put a {a} ring of fog around the middle", "fade the corners to {a}", "soften all corners into {a}")
def corners(source: Source) -> Outcome:
    colour = source.colour("black", "white")
    distance, _ = polar(source.size)
    return mix(source.image, rgb_of(colour), np.clip((distance - 20) / 20, 0, 1)), colour, ""


def _depth(size: int, side: str) -> np.ndarray:
    """Returns the distance of every pixel from a side, in units: ``[S, S]``."""
    y, x = grid(size)
    return {"left": x, "right": UNITS - x, "top": y, "bottom": UNITS - y}[side]


@edit("flip it from left to right", "mirror the image sideways", "swap left and right", share=1.5)
def flip(source: Source) -> Outcome:
    return source.image[:, ::-1], "", ""
