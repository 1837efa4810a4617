"""Deterministic effects on the layout: mosaics, frames, glass, mirrors and blur.

Periodic patterns are aligned to the grid of latent tokens, 8 units each.
"""

import numpy as np

from clora.studio.effects.filters import (
    BLACK,
    UNITS,
    WHITE,
    border_distance,
    cell_mean,
    gaussian_blur,
    grid,
    mix,
    paper_noise,
    polar,
    rgb,
    rim,
    sampled,
    saturate,
    screen,
    smoothstep,
    upsample,
)
from clora.studio.effects.registry import new_library

EFFECTS, effect = new_library()

CENTRE = UNITS / 2


@effect("turn this into a picture of big pixels")
def pixelate(image: np.ndarray) -> np.ndarray:
    """The picture is reduced to a sixteen by sixteen mosaic of flat coloured squares."""
    return upsample(cell_mean(image, 16), len(image))


@effect("build it out of plastic toy bricks")
def toy_bricks(image: np.ndarray) -> np.ndarray:
    """Square plastic bricks with round studs, each in one strong colour, make up the picture."""
    size = len(image)
    rows, cols = grid(size)
    bricks = upsample(np.clip(saturate(cell_mean(image, 8), 1.8) * 0.9 + 0.05, 0.0, 1.0), size)
    down, right = rows % 8 - 4, cols % 8 - 4
    radius = np.sqrt(down**2 + right**2)
    # A stud lit from above left, with its shadow below right, and dark seams between the bricks.
    stud = rim(2.6 - radius)
    shadow = rim(2.9 - np.sqrt((down - 0.9) ** 2 + (right - 0.9) ** 2)) * (1.0 - stud)
    side = np.clip(-(down + right) / 5, -1.0, 1.0) * stud * rim(radius - 1.9)
    seam = rim(np.maximum(np.abs(down), np.abs(right)) - 3.7)
    return bricks * (1.0 - 0.4 * shadow - 0.35 * seam + 0.08 * stud)[..., None] + 0.35 * side[..., None]


@effect("make it look like an old television screen")
def scanlines(image: np.ndarray) -> np.ndarray:
    """Dark horizontal lines cross the picture on a glowing blue green tube with round black corners."""
    rows, cols = grid(len(image))
    lines = 0.62 + 0.48 * np.cos((rows - 1) * (2 * np.pi / 4))
    glowing = (1.15 * saturate(image, 0.7) * rgb(0.75, 1.0, 1.0) + rgb(0.02, 0.08, 0.08)) * np.clip(lines, 0.15, 1.1)[
        ..., None
    ]
    x, y = np.abs(cols - CENTRE) / 31, np.abs(rows - CENTRE) / 31
    return glowing * (1.0 - smoothstep(x**6 + y**6, 0.75, 1.0))[..., None]


@effect("show it through a ribbed glass door")
def ribbed_glass(image: np.ndarray) -> np.ndarray:
    """Vertical ribs of glass each squeeze and repeat a slice of the picture, with pale edges between."""
    rows, cols = grid(len(image))
    local = cols % 8 - 4
    squeezed = sampled(gaussian_blur(image, 0.5), rows, cols + 1.4 * local)
    edge = smoothstep(np.abs(local), 2.6, 4.0)
    return mix(0.95 * squeezed + 0.05, rgb(0.85, 0.93, 0.95), 0.5 * edge)


@effect("make the corners dark like a vintage lens")
def vignette(image: np.ndarray) -> np.ndarray:
    """A smooth black vignette darkens edges and corners while the centre keeps its brightness."""
    return mix(image, BLACK, 0.96 * smoothstep(polar(len(image))[0], 17.0, 42.0))


@effect("put a golden frame around the picture")
def gold_frame(image: np.ndarray) -> np.ndarray:
    """A wide carved golden frame with lit and shaded bevels surrounds the otherwise unchanged picture."""
    size = len(image)
    rows, cols = grid(size)
    depth = border_distance(size)
    # The bevel rises from the border and falls to the picture; light comes from above left.
    lit = np.where((rows + cols < UNITS), 1.0, -1.0) * np.cos(depth / 8 * np.pi)
    gold = rgb(0.8, 0.6, 0.16) * (1.0 + 0.38 * lit + 0.12 * np.cos(depth * np.pi))[..., None]
    shadow = 1.0 - 0.45 * (1.0 - smoothstep(depth, 8.0, 10.5))
    return mix(image * shadow[..., None], gold, rim(8.0 - depth))


@effect("make it look like an instant photo")
def instant_photo(image: np.ndarray) -> np.ndarray:
    """Faded warm colours show inside a white paper frame with a much wider margin at the bottom."""
    rows, cols = grid(len(image))
    faded = 0.16 + 0.78 * saturate(image, 0.75) * rgb(1.05, 1.0, 0.85) + rgb(0.03, 0.01, 0.0)
    inside = np.minimum(np.minimum(rows - 5, 48 - rows), np.minimum(cols - 5, 59 - cols))
    paper = np.full_like(image, rgb(0.96, 0.95, 0.92)) * (1.0 - 0.12 * np.exp(-np.abs(inside)))[..., None]
    return mix(paper, faded, rim(inside))


@effect("make it a frame of a film strip")
def film_strip(image: np.ndarray) -> np.ndarray:
    """Black bands with a row of white square holes run along the top and bottom of the picture."""
    rows, cols = grid(len(image))
    edge = np.minimum(rows, UNITS - rows)
    strip = mix(image, rgb(0.04, 0.04, 0.05), rim(12.0 - edge))
    hole = 2.2 - np.maximum(np.abs(cols % 8 - 4), np.abs(edge - 5.5))
    return mix(strip, rgb(0.96, 0.96, 0.94), rim(hole))


@effect("show it through the round window of a ship")
def porthole(image: np.ndarray) -> np.ndarray:
    """Only a central circle of the picture is visible inside a bolted brass ring on a dark blue wall."""
    size = len(image)
    radius, angle = polar(size)
    brass = rgb(0.8, 0.62, 0.28) * (0.85 + 0.35 * np.cos(angle + 2.36) * np.clip(26 - radius, -1.0, 1.0))[..., None]
    bolts = rim(1.3 - np.sqrt((radius - 26) ** 2 + (26 * ((angle + np.pi / 8) % (np.pi / 4) - np.pi / 8)) ** 2))
    ring = mix(brass, rgb(0.4, 0.28, 0.1), bolts)
    out = mix(image, ring, rim(radius - 22))
    return mix(out, rgb(0.08, 0.15, 0.26), rim(radius - 30))


@effect("make the picture symmetric like a butterfly")
def mirror(image: np.ndarray) -> np.ndarray:
    """The right half is replaced by a mirror image of the left half."""
    left = image[:, : len(image) // 2]
    return np.concatenate([left, left[:, ::-1]], axis=1)


@effect("make it look reflected in water")
def water_reflection(image: np.ndarray) -> np.ndarray:
    """The lower half becomes rippling blue water that shows a darker mirror image of the upper half."""
    rows, cols = grid(len(image))
    below = np.maximum(rows - CENTRE, 0.0)
    ripple = np.sin(below * (2 * np.pi / 8))
    mirrored = sampled(image, CENTRE - below - 0.5 * ripple, cols + 2.2 * ripple * below / CENTRE)
    water = 0.72 * saturate(mirrored, 0.7) * rgb(0.65, 0.88, 1.0) + rgb(0, 0.06, 0.13) + 0.06 * ripple[..., None]
    return mix(image, water, rim(rows - CENTRE))


@effect("put the whole scene deep under water")
def underwater(image: np.ndarray) -> np.ndarray:
    """Everything wobbles in turquoise blue light with slanted bright rays from above and darkness below."""
    size = len(image)
    rows, cols = grid(size)
    wobbling = sampled(image, rows + 0.8 * np.sin(cols * (np.pi / 8)), cols + 1.6 * np.sin(rows * (np.pi / 8)))
    tinted = (0.8 * saturate(wobbling, 0.45) * rgb(0.35, 0.85, 1.0) + rgb(0.0, 0.14, 0.24)) * (
        1.15 - 0.6 * rows / UNITS
    )[..., None]
    beams = smoothstep(
        np.cos((cols - 0.45 * rows) * (2 * np.pi / 20)) + 0.4 * np.cos(cols * (2 * np.pi / 13)), 0.3, 1.3
    )
    return screen(tinted, (0.5 * beams * (1.0 - rows / 58).clip(0))[..., None] * rgb(0.6, 1.0, 1.0))


@effect("show it through a frozen winter window")
def frost(image: np.ndarray) -> np.ndarray:
    """White feathery ice covers the cold blue picture from all edges and leaves the middle clear."""
    size = len(image)
    radius, angle = polar(size)
    # Needles of ice point to the middle; each has its own length.
    needles = 6.0 * np.abs((angle * (72 / (2 * np.pi)) + 3 * paper_noise(size, 8)) % 2 - 1)
    uneven = 16.0 * (paper_noise(size, 16) - 0.5)
    ice = smoothstep(0.7 * radius - 0.5 * border_distance(size) + needles + uneven, 11.0, 20.0)
    cold = 0.88 * saturate(image, 0.5) * rgb(0.85, 0.97, 1.12) + rgb(0.0, 0.03, 0.06)
    crystals = WHITE - rgb(0.2, 0.08, 0.01) * (1.0 - paper_noise(size, 32))[..., None]
    return mix(cold, crystals, 0.93 * ice)
