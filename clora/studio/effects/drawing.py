"""Deterministic effects that redraw the picture: edges, sketches, cartoons, relief."""

import numpy as np

from clora.studio.effects.filters import (
    BLACK,
    WHITE,
    edge_mask,
    gaussian_blur,
    gradients,
    grey_image,
    grid,
    luminance,
    mix,
    quantise,
    rgb,
    rim,
    saturate,
)
from clora.studio.effects.registry import new_library

EFFECTS, effect = new_library()


@effect("turn this into a technical blueprint drawing")
def blueprint(image: np.ndarray) -> np.ndarray:
    """White outlines on deep blue paper with a pale square grid, like an architect's blueprint."""
    # Grid lines are 16 units apart, so every second 8x8 token sees the same pattern.
    rows, cols = grid(len(image))
    lines = ((rows % 16 < 2) | (cols % 16 < 2)).astype(np.float32)
    paper = mix(np.full_like(image, rgb(0.04, 0.16, 0.58)), rgb(0.3, 0.48, 0.85), lines)
    return mix(paper, WHITE, edge_mask(image))


@effect("turn this into a pencil drawing")
def pencil_sketch(image: np.ndarray) -> np.ndarray:
    """Dark grey pencil outlines on nearly white paper with very light shading and no colour."""
    shading = 0.85 + 0.15 * luminance(image)
    return grey_image(shading * (1.0 - 0.8 * edge_mask(image)))


@effect("make the outlines glow like neon signs")
def neon_edges(image: np.ndarray) -> np.ndarray:
    """The picture goes black and only outlines remain, glowing in bright saturated neon colours."""
    mask = edge_mask(image)
    soft = gaussian_blur(image, 2.0)
    # Without its grey part and at full strength, the colour of the nearest shapes.
    hue = soft - soft.min(axis=-1, keepdims=True)
    hue = hue / (hue.max(axis=-1, keepdims=True) + 0.02)
    # A grey edge has no hue of its own; the floor keeps it visible as pale light.
    colour = 0.25 + 0.75 * hue
    return colour * np.maximum(mask, 0.6 * gaussian_blur(mask, 2.0))[..., None] + rgb(0.02, 0.0, 0.06)


@effect("turn this into a cartoon drawing")
def cartoon(image: np.ndarray) -> np.ndarray:
    """Flat posterised lively colours with thick black outlines around every shape, like a comic panel."""
    flat = quantise(np.clip(saturate(gaussian_blur(image, 1.0), 1.5), 0.0, 1.0), 4)
    return mix(0.15 + 0.85 * flat, BLACK, edge_mask(image))


@effect("turn this into a chalk drawing on a school board")
def chalkboard(image: np.ndarray) -> np.ndarray:
    """Cream chalk outlines on a plain dark green board, with all fills removed."""
    board = np.full_like(image, rgb(0.1, 0.27, 0.18))
    return mix(board, rgb(0.95, 0.95, 0.85), edge_mask(image))


@effect("make it look embossed in stone")
def emboss(image: np.ndarray) -> np.ndarray:
    """Flat mid grey relief where edges are lit white on one side and shaded black on the other."""
    d_row, d_col = gradients(gaussian_blur(luminance(image), 1.0))
    return grey_image(0.5 + 5.0 * (d_row + d_col))


@effect("turn this into a woodcut drawing")
def woodcut(image: np.ndarray) -> np.ndarray:
    """Brown horizontal ink lines on cream paper that grow thicker where the picture is darker."""
    # One line per token row of 8 units, from 1 to 7.5 units thick.
    thickness = 1.0 + 6.5 * (1.0 - gaussian_blur(luminance(image), 1.5))
    ink = rim(thickness / 2 - np.abs(grid(len(image))[0] % 8 - 4))
    return mix(np.full_like(image, rgb(0.96, 0.88, 0.7)), rgb(0.25, 0.08, 0.03), ink)


@effect("make it glow softly like in a dream")
def glow(image: np.ndarray) -> np.ndarray:
    """Bright areas bleed a wide luminous halo over their surroundings, lifting the picture towards white."""
    # Screen blending: halo and picture lighten each other and cannot exceed 1.
    return 1.0 - (1.0 - 0.85 * image) * (1.0 - gaussian_blur(np.clip(2.2 * image - 0.7, 0.0, 1.0), 4.0))
