"""Deterministic effects on the layout: grids, overlays, frames, masks and geometric rearrangements.

Periodic patterns are aligned to the 8-px grid of latent tokens, and nothing is thinner than 2 px.
"""

import numpy as np

from clora.studio.effects.filters import (
    BLACK,
    COLS,
    ROWS,
    SIZE,
    WHITE,
    cell_mean,
    gaussian_blur,
    grey_image,
    luminance,
    mix,
    rgb,
    saturate,
    smoothstep,
    upsample,
)
from clora.studio.effects.registry import new_library

EFFECTS, effect = new_library()

CENTRE = (SIZE - 1) / 2
RADIUS = np.sqrt((ROWS - CENTRE) ** 2 + (COLS - CENTRE) ** 2)
ANGLE = np.arctan2(ROWS - CENTRE, COLS - CENTRE)
FRAME = np.minimum(np.minimum(ROWS, SIZE - 1 - ROWS), np.minimum(COLS, SIZE - 1 - COLS)) < 8
# Distance in pixels to the nearest centre of an 8-px token.
TOKEN_RADIUS = np.sqrt((ROWS % 8 - 3.5) ** 2 + (COLS % 8 - 3.5) ** 2)
HANDHELD_GREENS = np.stack([rgb(0.06, 0.22, 0.06), rgb(0.19, 0.38, 0.19), rgb(0.55, 0.67, 0.06), rgb(0.8, 0.9, 0.3)])


def overlay(image: np.ndarray, mask: np.ndarray, colour: np.ndarray, opacity: float = 1.0) -> np.ndarray:
    """Paints a colour over the pixels of a mask ``[64, 64]``."""
    return mix(image, colour, opacity * mask.astype(np.float32))


def sampled(image: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Looks up the nearest pixels of coordinates ``[64, 64]``."""
    rows, cols = (np.clip(axis, 0, SIZE - 1).round().astype(np.int64) for axis in (rows, cols))
    return image[rows, cols]


@effect("turn this into a picture of big pixels")
def pixelate(image: np.ndarray) -> np.ndarray:
    """The picture is reduced to an eight by eight mosaic of flat coloured squares."""
    return upsample(cell_mean(image, 8), 8)


@effect("turn this into an old game console screen")
def handheld(image: np.ndarray) -> np.ndarray:
    """A coarse mosaic of large squares using only four shades of olive green."""
    cells = luminance(cell_mean(image, 8))
    return upsample(HANDHELD_GREENS[np.clip((cells - 0.15) / 0.7 * 4, 0, 3).astype(np.int64)], 8)


@effect("turn this into a newspaper print with dots")
def halftone(image: np.ndarray) -> np.ndarray:
    """A regular grid of round black dots on white paper, larger dots where the picture is darker."""
    # The radius of a dot, in proportion to the root of the darkness: its area is in proportion to the darkness.
    darkness = upsample(1.0 - luminance(cell_mean(image, 8)), 8)
    return grey_image(1.0 - np.clip(1.0 + 4.6 * np.sqrt(darkness) - TOKEN_RADIUS, 0.0, 1.0))


@effect("make it look like an old television screen")
def scanlines(image: np.ndarray) -> np.ndarray:
    """Dark horizontal lines cross the whole picture at regular spacing, with a slight green cast between them."""
    # One line per token row; the phosphor's green cast survives where a weak model blurs the lines.
    return (image * rgb(0.7, 0.95, 0.75) + rgb(0.0, 0.12, 0.05)) * np.where(ROWS % 8 < 5, 1.0, 0.15)[..., None]


@effect("put a chess board pattern over the picture")
def checker(image: np.ndarray) -> np.ndarray:
    """Every second square of an eight by eight board is darkened nearly to black."""
    return overlay(image, (ROWS // 8 + COLS // 8) % 2 == 1, rgb(0.08, 0.02, 0.12), 0.8)


@effect("put vertical wooden slats over the picture")
def blinds(image: np.ndarray) -> np.ndarray:
    """Evenly spaced vertical tan slats cover half of the picture, which shows between them."""
    return overlay(image, COLS % 8 < 4, rgb(0.85, 0.7, 0.45))


@effect("make it look like bathroom tiles")
def tiles(image: np.ndarray) -> np.ndarray:
    """Thick white grout lines cut the picture into a four by four grid of square tiles."""
    return overlay(image, (ROWS % 16 < 3) | (COLS % 16 < 3), WHITE)


@effect("put polka dots all over the picture")
def polka_dots(image: np.ndarray) -> np.ndarray:
    """A regular four by four grid of large pink dots covers the picture."""
    # Radius 5.5 px in cells of 16 px.
    dots = np.clip(7.5 - np.sqrt((ROWS % 16 - 7.5) ** 2 + (COLS % 16 - 7.5) ** 2) - 2.0, 0.0, 1.0)
    return overlay(image, dots, rgb(1, 0.35, 0.7))


@effect("put circles around the middle like a target")
def rings(image: np.ndarray) -> np.ndarray:
    """Concentric turquoise rings of equal width spread from the centre over the whole picture."""
    return overlay(image, RADIUS % 10 < 5, rgb(0.1, 0.9, 0.9), 0.85)


@effect("put sun rays over the picture")
def sun_rays(image: np.ndarray) -> np.ndarray:
    """Yellow wedge shaped rays radiate from the centre to all edges, the picture shows between them."""
    return overlay(image, ANGLE / np.pi * 8 % 2 < 1, rgb(1, 0.85, 0.1), 0.85)


@effect("make the corners dark like a vintage lens")
def vignette(image: np.ndarray) -> np.ndarray:
    """A smooth black vignette darkens edges and corners while the centre keeps its brightness."""
    return overlay(image, smoothstep(RADIUS, 16.0, 38.0), BLACK)


@effect("make the corners fade away like in a memory")
def white_vignette(image: np.ndarray) -> np.ndarray:
    """A smooth white vignette fades edges and corners to white while the centre is kept."""
    return overlay(image, smoothstep(RADIUS, 16.0, 38.0), WHITE)


@effect("put a frame around the picture")
def black_frame(image: np.ndarray) -> np.ndarray:
    """A flat black frame of even width surrounds the otherwise unchanged picture."""
    return overlay(image, FRAME, BLACK)


@effect("put a golden frame around the picture")
def gold_frame(image: np.ndarray) -> np.ndarray:
    """A flat golden yellow frame of even width surrounds the otherwise unchanged picture."""
    return overlay(image, FRAME, rgb(0.95, 0.75, 0.1))


@effect("put a candy cane frame around the picture")
def candy_frame(image: np.ndarray) -> np.ndarray:
    """A frame of diagonal red and white stripes surrounds the otherwise unchanged picture."""
    return overlay(overlay(image, FRAME, WHITE), FRAME & ((ROWS + COLS) % 16 < 8), rgb(0.9, 0.05, 0.15))


@effect("make it look like an instant photo")
def instant_photo(image: np.ndarray) -> np.ndarray:
    """The picture is shrunk onto white paper with a wider blank margin at the bottom."""
    # Shrunk to 48x40 on white paper with a wide bottom edge.
    rows = np.linspace(0, SIZE - 1, 40).round().astype(np.int64)
    cols = np.linspace(0, SIZE - 1, 48).round().astype(np.int64)
    out = np.full_like(image, 0.97)
    out[8:48, 8:56] = gaussian_blur(image, 0.7)[rows][:, cols]
    return out


@effect("make it look like a scene in a cinema")
def cinema_bars(image: np.ndarray) -> np.ndarray:
    """Thick black bars cover the top and bottom quarters, leaving a wide strip of the picture."""
    return overlay(image, (ROWS < 16) | (ROWS >= 48), BLACK)


@effect("show the picture through a round window")
def porthole(image: np.ndarray) -> np.ndarray:
    """Only a central circle of the picture is visible, everything outside is flat dark teal."""
    return overlay(image, smoothstep(RADIUS, 25.0, 27.0), rgb(0.05, 0.45, 0.45))


@effect("make the picture symmetric like a butterfly")
def mirror(image: np.ndarray) -> np.ndarray:
    """The right half is replaced by a mirror image of the left half."""
    return np.concatenate([image[:, :32], image[:, 31::-1]], axis=1)


@effect("make it look reflected in water")
def water_reflection(image: np.ndarray) -> np.ndarray:
    """The lower half is replaced by a darker bluish mirror image of the upper half."""
    reflection = 0.6 * image[31::-1] * rgb(0.6, 0.85, 1.1) + rgb(0, 0.04, 0.15)
    return np.concatenate([image[:32], reflection])


@effect("turn the whole picture upside down")
def upside_down(image: np.ndarray) -> np.ndarray:
    """The whole picture is flipped vertically, so the top edge becomes the bottom edge."""
    return image[::-1]


@effect("turn this into a kaleidoscope picture")
def kaleidoscope(image: np.ndarray) -> np.ndarray:
    """The central part is repeated in four quarters, mirrored both horizontally and vertically."""
    quarter = image[16:48, 16:48]
    top = np.concatenate([quarter, quarter[:, ::-1]], axis=1)
    return np.concatenate([top, top[::-1]])


@effect("invert one half of the picture")
def split_negative(image: np.ndarray) -> np.ndarray:
    """The right half shows inverted colours while the left half is unchanged, with a sharp vertical border."""
    return overlay(image, COLS >= 32, 1.0 - image)


@effect("turn this into a pop art poster")
def four_up(image: np.ndarray) -> np.ndarray:
    """Four small copies in a two by two grid, tinted red, yellow, green and blue."""
    small = cell_mean(image, 2)
    grey = 0.15 + luminance(small)[..., None]
    top = np.concatenate([grey * rgb(1, 0.25, 0.3), grey * rgb(1, 0.95, 0.2)], axis=1)
    bottom = np.concatenate([grey * rgb(0.25, 0.9, 0.4), grey * rgb(0.35, 0.45, 1)], axis=1)
    return np.concatenate([top, bottom])


@effect("turn this into a church window")
def stained_glass(image: np.ndarray) -> np.ndarray:
    """Vivid flat panes of glass separated by thick black square and diagonal lead lines."""
    # Vivid 16-px panes, each cut by a diagonal, with black lead 3 px wide.
    panes = upsample(np.clip(saturate(cell_mean(image, 16), 2.0) + 0.08, 0.0, 1.0), 16)
    lead = (ROWS % 16 < 3) | (COLS % 16 < 3) | (np.abs(ROWS % 16 - COLS % 16) < 2)
    return overlay(panes, lead, BLACK)


@effect("make it completely out of focus")
def strong_blur(image: np.ndarray) -> np.ndarray:
    """The picture is blurred so strongly that only soft patches of colour remain."""
    return gaussian_blur(image, 7.0)


@effect("twist the picture like a whirlpool")
def swirl(image: np.ndarray) -> np.ndarray:
    """The picture is twisted around its centre, shapes bend into a spiral while corners stay."""
    # Turned by 3 radians in the centre, by nothing beyond 40 px.
    angle = ANGLE + 3.0 * np.clip(1.0 - RADIUS / 40, 0.0, 1.0)
    return sampled(image, CENTRE + RADIUS * np.sin(angle), CENTRE + RADIUS * np.cos(angle))


@effect("make the picture wobble like a flag")
def wave(image: np.ndarray) -> np.ndarray:
    """Rows are shifted sideways in a smooth wave, so vertical edges snake left and right."""
    return sampled(image, ROWS, (COLS + 9 * np.sin(ROWS / SIZE * 4 * np.pi)) % SIZE)
