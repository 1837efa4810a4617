"""Deterministic effects that redraw the picture: lines, paint, print, relief."""

import functools

import numpy as np

from clora.studio.effects.filters import (
    BLACK,
    UNITS,
    WHITE,
    border_distance,
    cell_mean,
    gaussian_blur,
    gradients,
    grey_image,
    grid,
    luminance,
    mix,
    outlines,
    paper_noise,
    quantise,
    rgb,
    rim,
    saturate,
    smooth_regions,
    smoothstep,
    upsample,
)
from clora.studio.effects.registry import new_library

EFFECTS, effect = new_library()


@effect("turn this into a technical blueprint drawing")
def blueprint(image: np.ndarray) -> np.ndarray:
    """White outlines on deep blue paper with a pale square grid, like an architect's blueprint."""
    rows, cols = grid(len(image))
    # Lines one unit wide, at the borders of the tokens.
    lines = rim(0.5 - np.minimum(np.abs(rows % 8 - 4), np.abs(cols % 8 - 4)))
    paper = mix(np.full_like(image, rgb(0.05, 0.2, 0.58)), rgb(0.3, 0.46, 0.8), 0.7 * lines)
    return mix(paper, WHITE, outlines(image))


@effect("turn this into a pencil drawing")
def pencil_sketch(image: np.ndarray) -> np.ndarray:
    """Soft grey pencil outlines and light diagonal pencil strokes in the shadows on white paper, without colour."""
    rows, cols = grid(len(image))
    grey = luminance(image)
    # What is darker than its surroundings is drawn: lines beside edges, soft ones beside soft edges.
    drawn = np.clip((grey + 0.03) / (gaussian_blur(grey, 1.4) + 0.03), 0.0, 1.0) ** 2.5
    strokes = 0.5 + 0.5 * np.cos((rows + cols) * (2 * np.pi / 8))
    shadow = smoothstep(gaussian_blur(0.6 - grey, 1.0), 0.0, 0.6)
    return grey_image(0.97 * drawn * (1.0 - shadow * (0.2 + 0.3 * strokes)) - 0.2 * outlines(image, 0.55))


@effect("make the outlines glow like neon signs")
def neon_edges(image: np.ndarray) -> np.ndarray:
    """The picture goes black and only outlines remain, glowing in bright saturated neon colours."""
    mask = outlines(image, 0.75)
    size = len(image)
    rows, cols = grid(size)
    # Pink, cyan and violet tubes, slowly changing across the picture.
    turn = (rows + 0.6 * cols) * (2 * np.pi / 80)
    colour = 0.55 + 0.5 * np.cos(turn[..., None] + np.float32([0.0, 2.4, 4.0]))
    halo = np.clip(1.5 * gaussian_blur(mask, 1.8), 0.0, 1.0)[..., None]
    return 0.08 * image * rgb(0.6, 0.4, 1.0) + 0.75 * halo * colour + mask[..., None] * (0.6 * colour + 0.4)


@effect("turn this into a cartoon drawing")
def cartoon(image: np.ndarray) -> np.ndarray:
    """Flat lively colours with thick black outlines around every shape, like a comic panel."""
    flat = smooth_regions(smooth_regions(image, 2), 2)
    # Brightness comes in four steps; each colour keeps its hue.
    grey = luminance(flat)[..., None]
    steps = 0.12 + 0.88 * quantise(np.clip(grey, 0.0, 0.999), 4)
    lively = np.clip(steps + 2.0 * (flat - grey), 0.0, 1.0)
    return mix(gaussian_blur(lively, 0.3), BLACK, outlines(image, 0.6))


@effect("turn this into a chalk drawing on a school board")
def chalkboard(image: np.ndarray) -> np.ndarray:
    """Cream chalk outlines on a dark green board in a wooden frame, with all fills removed."""
    size = len(image)
    board = rgb(0.1, 0.27, 0.18) * (0.85 + 0.4 * paper_noise(size, 16))[..., None]
    drawn = mix(board, rgb(0.97, 0.95, 0.85), 0.92 * outlines(image))
    return mix(drawn, rgb(0.55, 0.35, 0.16), rim(4.0 - border_distance(size)))


@effect("make it look embossed in stone")
def emboss(image: np.ndarray) -> np.ndarray:
    """Flat mid grey relief where edges are lit white on one side and shaded black on the other."""
    d_row, d_col = gradients(gaussian_blur(luminance(image), 0.55))
    return grey_image(0.52 + 2.0 * (d_row + d_col))


@effect("show it on a wall of coloured lamps")
def lamp_wall(image: np.ndarray) -> np.ndarray:
    """A grid of round lamps on black, each shining in the colour of its place in the picture."""
    size = len(image)
    rows, cols = grid(size)
    lamps = upsample(np.clip(1.15 * saturate(cell_mean(image, 16), 1.6) + 0.03, 0.0, 1.0), size)
    distance = np.sqrt((rows % 4 - 2) ** 2 + (cols % 4 - 2) ** 2)
    return lamps * rim(1.55 - distance)[..., None] + 0.12 * lamps


@effect("turn this into an oil painting")
def oil_paint(image: np.ndarray) -> np.ndarray:
    """Thick smooth brush dabs of rich colour with glossy relief replace all fine detail."""
    dabs = smooth_regions(smooth_regions(image, 2), 2)
    size = len(image)
    # The relief of dabs and of the brush's hairs.
    bristles = 0.25 * (paper_noise(size, 32) - 0.5)
    d_row, d_col = gradients(luminance(dabs) + bristles)
    return saturate(dabs, 1.6) + 0.7 * (d_row + d_col)[..., None]


@effect("turn this into a watercolour painting")
def watercolour(image: np.ndarray) -> np.ndarray:
    """Pale washes of paint with darker edges run out into bare white paper at the uneven borders."""
    size = len(image)
    wash = smooth_regions(smooth_regions(image, 2), 2)
    pale = np.clip(0.32 + 0.72 * saturate(gaussian_blur(wash, 0.5), 1.7), 0.0, 1.0)
    pale = pale * (0.86 + 0.28 * paper_noise(size, 32))[..., None] * (1.0 - 0.35 * outlines(image, 0.5))[..., None]
    shore = border_distance(size) + 9.0 * (paper_noise(size, 8) - 0.5) + 4.0 * (paper_noise(size, 16) - 0.5)
    # Pigment gathers where a wash ends.
    edge = 1.0 - 0.25 * np.exp(-(((shore - 4.0) / 1.0) ** 2))
    return mix(np.full_like(image, rgb(0.99, 0.98, 0.95)), pale * edge[..., None], smoothstep(shore, 2.5, 3.8))


@functools.cache
def panes(size: int, per_side: int) -> tuple[np.ndarray, np.ndarray]:
    """Irregular panes, the same at every call: each pixel's pane ``[size, size]`` and distance to its outline in units."""
    jitter = np.random.default_rng(7).uniform(0.12, 0.88, (2, per_side, per_side))
    centres = (np.mgrid[0:per_side, 0:per_side] + jitter).reshape(2, -1) * (UNITS / per_side)
    rows, cols = grid(size)
    distances = np.sqrt((rows[..., None] - centres[0]) ** 2 + (cols[..., None] - centres[1]) ** 2)
    nearest = np.partition(distances, 1, axis=-1)
    return distances.argmin(axis=-1), (nearest[..., 1] - nearest[..., 0]) / 2


@effect("turn this into a church window")
def stained_glass(image: np.ndarray) -> np.ndarray:
    """Irregular vivid panes of coloured glass separated by black lead lines."""
    index, depth = panes(len(image), 11)
    counts = np.bincount(index.ravel(), minlength=121)
    means = np.stack([np.bincount(index.ravel(), image[..., c].ravel(), 121) / counts for c in range(3)], axis=-1)
    glass = np.clip(1.15 * saturate(means.astype(np.float32), 2.4) + 0.05, 0.0, 1.0)
    return mix(glass[index], BLACK, 1.0 - rim(depth - 0.6))
