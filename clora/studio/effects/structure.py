"""Deterministic effects on the layout: grids, overlays, frames, masks and geometric rearrangements.

Periodic patterns are aligned to the 8-px grid of latent tokens, and nothing is thinner than 2 px.
"""

import functools

import numpy as np

from clora.studio.effects._image import (
    COLS,
    ROWS,
    SIZE,
    cell_mean,
    gaussian_blur,
    luminance,
    mix,
    rgb,
    smoothstep,
    upsample,
)
from clora.studio.effects._registry import deterministic

WHITE = rgb(1, 1, 1)
BLACK = rgb(0, 0, 0)
CENTRE = (SIZE - 1) / 2
RADIUS = np.sqrt((ROWS - CENTRE) ** 2 + (COLS - CENTRE) ** 2)
BORDER_DISTANCE = np.minimum(np.minimum(ROWS, SIZE - 1 - ROWS), np.minimum(COLS, SIZE - 1 - COLS))
# Offsets inside an 8-px token, from -3.5 to 3.5.
TOKEN_ROW, TOKEN_COL = ROWS % 8 - 3.5, COLS % 8 - 3.5
HANDHELD_GREENS = np.stack([rgb(0.06, 0.22, 0.06), rgb(0.19, 0.38, 0.19), rgb(0.55, 0.67, 0.06), rgb(0.8, 0.9, 0.3)])


def _mask(condition: np.ndarray) -> np.ndarray:
    return condition.astype(np.float32)


def pixelate(image: np.ndarray) -> np.ndarray:
    return upsample(cell_mean(image, 8), 8)


def handheld(image: np.ndarray) -> np.ndarray:
    cells = luminance(cell_mean(image, 8))
    return upsample(HANDHELD_GREENS[np.clip((cells - 0.15) / 0.7 * 4, 0, 3).astype(np.int64)], 8)


def halftone(image: np.ndarray) -> np.ndarray:
    darkness = upsample(1.0 - luminance(cell_mean(image, 8)), 8)
    ink = np.clip(1.0 + 4.6 * np.sqrt(darkness) - np.sqrt(TOKEN_ROW**2 + TOKEN_COL**2), 0.0, 1.0)
    return (1.0 - ink)[..., None].repeat(3, axis=-1)


def scanlines(image: np.ndarray) -> np.ndarray:
    # One line per token row; the phosphor's green cast survives where a weak model blurs the lines.
    return (image * rgb(0.7, 0.95, 0.75) + rgb(0.0, 0.12, 0.05)) * np.where(ROWS % 8 < 5, 1.0, 0.15)[..., None]


OVERLAYS = {
    "checker": _mask((ROWS // 8 + COLS // 8) % 2 == 1),
    "blinds": _mask(COLS % 8 < 4),
    "tiles": _mask((ROWS % 16 < 3) | (COLS % 16 < 3)),
    "polka": np.clip(7.5 - np.sqrt((ROWS % 16 - 7.5) ** 2 + (COLS % 16 - 7.5) ** 2) - 2.0, 0.0, 1.0),
    "rings": _mask(RADIUS % 10 < 5),
    "rays": _mask(np.arctan2(ROWS - CENTRE, COLS - CENTRE) / np.pi * 8 % 2 < 1),
    "vignette": smoothstep(RADIUS, 16.0, 38.0),
    "frame": _mask(BORDER_DISTANCE < 8),
    "porthole": smoothstep(RADIUS, 25.0, 27.0),
    "bars": _mask((ROWS < 16) | (ROWS >= 48)),
    "candy": _mask((BORDER_DISTANCE < 8) & ((ROWS + COLS) % 16 < 8)),
}


def overlay(image: np.ndarray, mask: str, colour: np.ndarray, opacity: float = 1.0) -> np.ndarray:
    """Paint `colour` over the pixels of one of the fixed masks."""
    return mix(image, colour, opacity * OVERLAYS[mask])


def candy_frame(image: np.ndarray) -> np.ndarray:
    return mix(mix(image, WHITE, OVERLAYS["frame"]), rgb(0.9, 0.05, 0.15), OVERLAYS["candy"])


def instant_photo(image: np.ndarray) -> np.ndarray:
    """Shrunk to 48x40 on white paper with a wide bottom edge."""
    out = np.full_like(image, 0.97)
    rows = np.linspace(0, SIZE - 1, 40).round().astype(np.int64)
    cols = np.linspace(0, SIZE - 1, 48).round().astype(np.int64)
    out[8:48, 8:56] = gaussian_blur(image, 0.7)[rows][:, cols]
    return out


def mirror(image: np.ndarray) -> np.ndarray:
    return np.concatenate([image[:, :32], image[:, 31::-1]], axis=1)


def water_reflection(image: np.ndarray) -> np.ndarray:
    """The upper half above its own darker blue mirror image."""
    return np.concatenate([image[:32], 0.6 * image[31::-1] * rgb(0.6, 0.85, 1.1) + rgb(0, 0.04, 0.15)], axis=0)


def upside_down(image: np.ndarray) -> np.ndarray:
    return image[::-1]


def kaleidoscope(image: np.ndarray) -> np.ndarray:
    quarter = image[16:48, 16:48]
    top = np.concatenate([quarter, quarter[:, ::-1]], axis=1)
    return np.concatenate([top, top[::-1]], axis=0)


def split_negative(image: np.ndarray) -> np.ndarray:
    return mix(image, 1.0 - image, _mask(COLS >= 32))


def four_up(image: np.ndarray) -> np.ndarray:
    small = cell_mean(image, 2)
    grey = luminance(small)[..., None]
    tints = (rgb(1, 0.25, 0.3), rgb(1, 0.95, 0.2), rgb(0.25, 0.9, 0.4), rgb(0.35, 0.45, 1))
    red, yellow, green, blue = ((0.15 + grey) * tint for tint in tints)
    return np.concatenate([np.concatenate([red, yellow], axis=1), np.concatenate([green, blue], axis=1)], axis=0)


def stained_glass(image: np.ndarray) -> np.ndarray:
    """Vivid 16-px panes, each cut by a diagonal, with black lead 3 px wide."""
    cells = cell_mean(image, 16)
    grey = luminance(cells)[..., None]
    panes = upsample(np.clip(grey + 2.0 * (cells - grey) + 0.08, 0.0, 1.0), 16)
    lead = (ROWS % 16 < 3) | (COLS % 16 < 3) | (np.abs(ROWS % 16 - COLS % 16) < 2)
    return mix(panes, BLACK, _mask(lead))


def strong_blur(image: np.ndarray) -> np.ndarray:
    return gaussian_blur(image, 7.0)


def _sampled(rows: np.ndarray, cols: np.ndarray) -> functools.partial:
    index = np.clip(rows, 0, SIZE - 1).round().astype(np.int64), np.clip(cols, 0, SIZE - 1).round().astype(np.int64)
    return functools.partial(sample, rows=index[0], cols=index[1])


def sample(image: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Nearest-pixel lookup at fixed integer coordinates ``[64, 64]``."""
    return image[rows, cols]


_ANGLE = np.arctan2(ROWS - CENTRE, COLS - CENTRE) + 3.0 * np.clip(1.0 - RADIUS / 40, 0.0, 1.0)
SWIRL = _sampled(CENTRE + RADIUS * np.sin(_ANGLE), CENTRE + RADIUS * np.cos(_ANGLE))
WAVE = _sampled(ROWS, (COLS + 9 * np.sin(ROWS / SIZE * 4 * np.pi)) % SIZE)


def _overlay(mask: str, colour: np.ndarray, opacity: float = 1.0) -> functools.partial:
    return functools.partial(overlay, mask=mask, colour=colour, opacity=opacity)


EFFECTS = (
    deterministic(
        "pixelate",
        pixelate,
        "turn this into a picture of big pixels",
        "the picture is reduced to an eight by eight mosaic of flat coloured squares",
    ),
    deterministic(
        "handheld",
        handheld,
        "turn this into an old game console screen",
        "a coarse mosaic of large squares using only four shades of olive green",
    ),
    deterministic(
        "halftone",
        halftone,
        "turn this into a newspaper print with dots",
        "a regular grid of round black dots on white paper, larger dots where the picture is darker",
    ),
    deterministic(
        "scanlines",
        scanlines,
        "make it look like an old television screen",
        "dark horizontal lines cross the whole picture at regular spacing, with a slight green cast between them",
    ),
    deterministic(
        "checker",
        _overlay("checker", rgb(0.08, 0.02, 0.12), 0.8),
        "put a chess board pattern over the picture",
        "every second square of an eight by eight board is darkened nearly to black",
    ),
    deterministic(
        "blinds",
        _overlay("blinds", rgb(0.85, 0.7, 0.45)),
        "put vertical wooden slats over the picture",
        "evenly spaced vertical tan slats cover half of the picture, which shows between them",
    ),
    deterministic(
        "tiles",
        _overlay("tiles", WHITE),
        "make it look like bathroom tiles",
        "thick white grout lines cut the picture into a four by four grid of square tiles",
    ),
    deterministic(
        "polka_dots",
        _overlay("polka", rgb(1, 0.35, 0.7)),
        "put polka dots all over the picture",
        "a regular four by four grid of large pink dots covers the picture",
    ),
    deterministic(
        "rings",
        _overlay("rings", rgb(0.1, 0.9, 0.9), 0.85),
        "put circles around the middle like a target",
        "concentric turquoise rings of equal width spread from the centre over the whole picture",
    ),
    deterministic(
        "sun_rays",
        _overlay("rays", rgb(1, 0.85, 0.1), 0.85),
        "put sun rays over the picture",
        "yellow wedge shaped rays radiate from the centre to all edges, the picture shows between them",
    ),
    deterministic(
        "vignette",
        _overlay("vignette", BLACK),
        "make the corners dark like a vintage lens",
        "a smooth black vignette darkens edges and corners while the centre keeps its brightness",
    ),
    deterministic(
        "white_vignette",
        _overlay("vignette", WHITE),
        "make the corners fade away like in a memory",
        "a smooth white vignette fades edges and corners to white while the centre is kept",
    ),
    deterministic(
        "black_frame",
        _overlay("frame", BLACK),
        "put a frame around the picture",
        "a flat black frame of even width surrounds the otherwise unchanged picture",
    ),
    deterministic(
        "gold_frame",
        _overlay("frame", rgb(0.95, 0.75, 0.1)),
        "put a golden frame around the picture",
        "a flat golden yellow frame of even width surrounds the otherwise unchanged picture",
    ),
    deterministic(
        "candy_frame",
        candy_frame,
        "put a candy cane frame around the picture",
        "a frame of diagonal red and white stripes surrounds the otherwise unchanged picture",
    ),
    deterministic(
        "instant_photo",
        instant_photo,
        "make it look like an instant photo",
        "the picture is shrunk onto white paper with a wider blank margin at the bottom",
    ),
    deterministic(
        "cinema_bars",
        _overlay("bars", BLACK),
        "make it look like a scene in a cinema",
        "thick black bars cover the top and bottom quarters, leaving a wide strip of the picture",
    ),
    deterministic(
        "porthole",
        _overlay("porthole", rgb(0.05, 0.45, 0.45)),
        "show the picture through a round window",
        "only a central circle of the picture is visible, everything outside is flat dark teal",
    ),
    deterministic(
        "mirror",
        mirror,
        "make the picture symmetric like a butterfly",
        "the right half is replaced by a mirror image of the left half",
    ),
    deterministic(
        "water_reflection",
        water_reflection,
        "make it look reflected in water",
        "the lower half is replaced by a darker bluish mirror image of the upper half",
    ),
    deterministic(
        "upside_down",
        upside_down,
        "turn the whole picture upside down",
        "the whole picture is flipped vertically, so the top edge becomes the bottom edge",
    ),
    deterministic(
        "kaleidoscope",
        kaleidoscope,
        "turn this into a kaleidoscope picture",
        "the central part is repeated in four quarters, mirrored both horizontally and vertically",
    ),
    deterministic(
        "split_negative",
        split_negative,
        "invert one half of the picture",
        "the right half shows inverted colours while the left half is unchanged, with a sharp vertical border",
    ),
    deterministic(
        "four_up",
        four_up,
        "turn this into a pop art poster",
        "four small copies in a two by two grid, tinted red, yellow, green and blue",
    ),
    deterministic(
        "stained_glass",
        stained_glass,
        "turn this into a church window",
        "vivid flat panes of glass separated by thick black square and diagonal lead lines",
    ),
    deterministic(
        "strong_blur",
        strong_blur,
        "make it completely out of focus",
        "the picture is blurred so strongly that only soft patches of colour remain",
    ),
    deterministic(
        "swirl",
        SWIRL,
        "twist the picture like a whirlpool",
        "the picture is twisted around its centre, shapes bend into a spiral while corners stay",
    ),
    deterministic(
        "wave",
        WAVE,
        "make the picture wobble like a flag",
        "rows are shifted sideways in a smooth wave, so vertical edges snake left and right",
    ),
)
