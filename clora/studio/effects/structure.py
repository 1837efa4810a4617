"""Deterministic effects on the layout: grids, overlays, frames, masks and geometric rearrangements.

Periodic patterns are aligned to the grid of latent tokens, 8 units each, and nothing is thinner than 2 units.
"""

import numpy as np

from clora.studio.effects.filters import (
    BLACK,
    UNITS,
    WHITE,
    cell_mean,
    gaussian_blur,
    grey_image,
    grid,
    luminance,
    mix,
    rgb,
    rim,
    saturate,
    smoothstep,
    upsample,
)
from clora.studio.effects.registry import new_library

EFFECTS, effect = new_library()

CENTRE = UNITS / 2
HANDHELD_GREENS = np.stack([rgb(0.06, 0.22, 0.06), rgb(0.19, 0.38, 0.19), rgb(0.55, 0.67, 0.06), rgb(0.8, 0.9, 0.3)])


def polar(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns each pixel's distance from the centre in units, and its angle in radians: ``[size, size]`` each."""
    rows, cols = grid(size)
    return np.sqrt((rows - CENTRE) ** 2 + (cols - CENTRE) ** 2), np.arctan2(rows - CENTRE, cols - CENTRE)


def cell_radius(size: int, cell: int) -> np.ndarray:
    """Returns each pixel's distance to the nearest centre of square cells of `cell` units, in units: ``[size, size]``."""
    rows, cols = grid(size)
    return np.sqrt((rows % cell - cell / 2) ** 2 + (cols % cell - cell / 2) ** 2)


def lattice(size: int, width: int) -> np.ndarray:
    """Returns the mask ``[size, size]`` of lines `width` units wide, at the top and the left of cells of 16 units."""
    rows, cols = grid(size)
    return (rows % 16 < width) | (cols % 16 < width)


def frame(size: int) -> np.ndarray:
    """Returns the mask ``[size, size]`` of a border 8 units wide."""
    rows, cols = grid(size)
    return np.minimum(np.minimum(rows, UNITS - rows), np.minimum(cols, UNITS - cols)) < 8


def overlay(image: np.ndarray, mask: np.ndarray, colour: np.ndarray, opacity: float = 1.0) -> np.ndarray:
    """Paints a colour over the pixels of a mask ``[S, S]``."""
    return mix(image, colour, opacity * mask.astype(np.float32))


def sampled(image: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Looks up the nearest pixels of positions ``[S, S]``, in units from the upper and the left border."""
    size = len(image)
    scale = size // UNITS
    rows, cols = (np.clip(scale * axis - 0.5, 0, size - 1).round().astype(np.int64) for axis in (rows, cols))
    return image[rows, cols]


@effect("turn this into a picture of big pixels")
def pixelate(image: np.ndarray) -> np.ndarray:
    """The picture is reduced to an eight by eight mosaic of flat coloured squares."""
    return upsample(cell_mean(image, 8), len(image))


@effect("turn this into an old game console screen")
def handheld(image: np.ndarray) -> np.ndarray:
    """A coarse mosaic of large squares using only four shades of olive green."""
    cells = luminance(cell_mean(image, 8))
    return upsample(HANDHELD_GREENS[np.clip((cells - 0.15) / 0.7 * 4, 0, 3).astype(np.int64)], len(image))


@effect("turn this into a newspaper print with dots")
def halftone(image: np.ndarray) -> np.ndarray:
    """A regular grid of round black dots on white paper, larger dots where the picture is darker."""
    # The radius of a dot, in proportion to the root of the darkness: its area is in proportion to the darkness.
    size = len(image)
    darkness = upsample(1.0 - luminance(cell_mean(image, 8)), size)
    return grey_image(1.0 - rim(0.5 + 4.6 * np.sqrt(darkness) - cell_radius(size, 8)))


@effect("make it look like an old television screen")
def scanlines(image: np.ndarray) -> np.ndarray:
    """Dark horizontal lines cross the whole picture at regular spacing, with a slight green cast between them."""
    # One line per token row; the phosphor's green cast survives where a weak model blurs the lines.
    lines = np.where(grid(len(image))[0] % 8 < 5, 1.0, 0.15)
    return (image * rgb(0.7, 0.95, 0.75) + rgb(0.0, 0.12, 0.05)) * lines[..., None]


@effect("put a chess board pattern over the picture")
def checker(image: np.ndarray) -> np.ndarray:
    """Every second square of an eight by eight board is darkened nearly to black."""
    rows, cols = grid(len(image))
    return overlay(image, (rows // 8 + cols // 8) % 2 == 1, rgb(0.08, 0.02, 0.12), 0.8)


@effect("put vertical wooden slats over the picture")
def blinds(image: np.ndarray) -> np.ndarray:
    """Evenly spaced vertical tan slats cover half of the picture, which shows between them."""
    return overlay(image, grid(len(image))[1] % 8 < 4, rgb(0.85, 0.7, 0.45))


@effect("make it look like bathroom tiles")
def tiles(image: np.ndarray) -> np.ndarray:
    """Thick white grout lines cut the picture into a four by four grid of square tiles."""
    return overlay(image, lattice(len(image), 3), WHITE)


@effect("put polka dots all over the picture")
def polka_dots(image: np.ndarray) -> np.ndarray:
    """A regular four by four grid of large pink dots covers the picture."""
    # Radius 5 units in cells of 16 units.
    return overlay(image, rim(5.0 - cell_radius(len(image), 16)), rgb(1, 0.35, 0.7))


@effect("put circles around the middle like a target")
def rings(image: np.ndarray) -> np.ndarray:
    """Concentric turquoise rings of equal width spread from the centre over the whole picture."""
    return overlay(image, polar(len(image))[0] % 10 < 5, rgb(0.1, 0.9, 0.9), 0.85)


@effect("put sun rays over the picture")
def sun_rays(image: np.ndarray) -> np.ndarray:
    """Yellow wedge shaped rays radiate from the centre to all edges, the picture shows between them."""
    return overlay(image, polar(len(image))[1] / np.pi * 8 % 2 < 1, rgb(1, 0.85, 0.1), 0.85)


@effect("make the corners dark like a vintage lens")
def vignette(image: np.ndarray) -> np.ndarray:
    """A smooth black vignette darkens edges and corners while the centre keeps its brightness."""
    return overlay(image, smoothstep(polar(len(image))[0], 16.0, 38.0), BLACK)


@effect("make the corners fade away like in a memory")
def white_vignette(image: np.ndarray) -> np.ndarray:
    """A smooth white vignette fades edges and corners to white while the centre is kept."""
    return overlay(image, smoothstep(polar(len(image))[0], 16.0, 38.0), WHITE)


@effect("put a frame around the picture")
def black_frame(image: np.ndarray) -> np.ndarray:
    """A flat black frame of even width surrounds the otherwise unchanged picture."""
    return overlay(image, frame(len(image)), BLACK)


@effect("put a golden frame around the picture")
def gold_frame(image: np.ndarray) -> np.ndarray:
    """A flat golden yellow frame of even width surrounds the otherwise unchanged picture."""
    return overlay(image, frame(len(image)), rgb(0.95, 0.75, 0.1))


@effect("put a candy cane frame around the picture")
def candy_frame(image: np.ndarray) -> np.ndarray:
    """A frame of diagonal red and white stripes surrounds the otherwise unchanged picture."""
    border = frame(len(image))
    rows, cols = grid(len(image))
    return overlay(overlay(image, border, WHITE), border & ((rows + cols - 0.5) % 16 < 8), rgb(0.9, 0.05, 0.15))


@effect("make it look like an instant photo")
def instant_photo(image: np.ndarray) -> np.ndarray:
    """The picture is shrunk onto white paper with a wider blank margin at the bottom."""
    # Shrunk to 48x40 units on white paper with a wide bottom edge.
    size = len(image)
    rows = np.linspace(0, size - 1, size * 5 // 8).round().astype(np.int64)
    cols = np.linspace(0, size - 1, size * 3 // 4).round().astype(np.int64)
    out = np.full_like(image, 0.97)
    margin = size // 8
    out[margin : margin + len(rows), margin:-margin] = gaussian_blur(image, 0.7)[rows][:, cols]
    return out


@effect("make it look like a scene in a cinema")
def cinema_bars(image: np.ndarray) -> np.ndarray:
    """Thick black bars cover the top and bottom quarters, leaving a wide strip of the picture."""
    rows, _ = grid(len(image))
    return overlay(image, (rows < 16) | (rows >= 48), BLACK)


@effect("show the picture through a round window")
def porthole(image: np.ndarray) -> np.ndarray:
    """Only a central circle of the picture is visible, everything outside is flat dark teal."""
    return overlay(image, smoothstep(polar(len(image))[0], 25.0, 27.0), rgb(0.05, 0.45, 0.45))


@effect("make the picture symmetric like a butterfly")
def mirror(image: np.ndarray) -> np.ndarray:
    """The right half is replaced by a mirror image of the left half."""
    left = image[:, : len(image) // 2]
    return np.concatenate([left, left[:, ::-1]], axis=1)


@effect("make it look reflected in water")
def water_reflection(image: np.ndarray) -> np.ndarray:
    """The lower half is replaced by a darker bluish mirror image of the upper half."""
    upper = image[: len(image) // 2]
    return np.concatenate([upper, 0.6 * upper[::-1] * rgb(0.6, 0.85, 1.1) + rgb(0, 0.04, 0.15)])


@effect("turn the whole picture upside down")
def upside_down(image: np.ndarray) -> np.ndarray:
    """The whole picture is flipped vertically, so the top edge becomes the bottom edge."""
    return image[::-1]


@effect("turn this into a kaleidoscope picture")
def kaleidoscope(image: np.ndarray) -> np.ndarray:
    """The central part is repeated in four quarters, mirrored both horizontally and vertically."""
    quarter_size = len(image) // 4
    quarter = image[quarter_size:-quarter_size, quarter_size:-quarter_size]
    top = np.concatenate([quarter, quarter[:, ::-1]], axis=1)
    return np.concatenate([top, top[::-1]])


@effect("invert one half of the picture")
def split_negative(image: np.ndarray) -> np.ndarray:
    """The right half shows inverted colours while the left half is unchanged, with a sharp vertical border."""
    return overlay(image, grid(len(image))[1] >= CENTRE, 1.0 - image)


@effect("turn this into a pop art poster")
def four_up(image: np.ndarray) -> np.ndarray:
    """Four small copies in a two by two grid, tinted red, yellow, green and blue."""
    small = cell_mean(image, len(image) // 2)
    grey = 0.15 + luminance(small)[..., None]
    top = np.concatenate([grey * rgb(1, 0.25, 0.3), grey * rgb(1, 0.95, 0.2)], axis=1)
    bottom = np.concatenate([grey * rgb(0.25, 0.9, 0.4), grey * rgb(0.35, 0.45, 1)], axis=1)
    return np.concatenate([top, bottom])


@effect("turn this into a church window")
def stained_glass(image: np.ndarray) -> np.ndarray:
    """Vivid flat panes of glass separated by thick black square and diagonal lead lines."""
    # Vivid panes of 16 units, each cut by a diagonal, with black lead 3 units wide.
    panes = upsample(np.clip(saturate(cell_mean(image, 4), 2.0) + 0.08, 0.0, 1.0), len(image))
    rows, cols = grid(len(image))
    diagonal = np.abs(rows % 16 - cols % 16) < 1.5
    return overlay(panes, lattice(len(image), 3) | diagonal, BLACK)


@effect("make it completely out of focus")
def strong_blur(image: np.ndarray) -> np.ndarray:
    """The picture is blurred so strongly that only soft patches of colour remain."""
    return gaussian_blur(image, 7.0)


@effect("twist the picture like a whirlpool")
def swirl(image: np.ndarray) -> np.ndarray:
    """The picture is twisted around its centre, shapes bend into a spiral while corners stay."""
    # Turned by 3 radians in the centre, by nothing beyond 40 units.
    radius, angle = polar(len(image))
    angle = angle + 3.0 * np.clip(1.0 - radius / 40, 0.0, 1.0)
    return sampled(image, CENTRE + radius * np.sin(angle), CENTRE + radius * np.cos(angle))


@effect("make the picture wobble like a flag")
def wave(image: np.ndarray) -> np.ndarray:
    """Rows are shifted sideways in a smooth wave, so vertical edges snake left and right."""
    rows, cols = grid(len(image))
    shift = 9 * np.sin((rows - 0.5) / UNITS * 4 * np.pi)
    return sampled(image, rows, (cols - 0.5 + shift) % UNITS + 0.5)
