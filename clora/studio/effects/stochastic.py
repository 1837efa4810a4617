"""Stochastic effects: coarse random structure (4 units and more) that a few-step regression would blur.

What is drawn are positions, lengths and grids in units: one state of the generator gives one picture at every size.
"""

import numpy as np

from clora.studio.effects.filters import (
    UNITS,
    WHITE,
    discs,
    gaussian_blur,
    grid,
    mix,
    offsets,
    rgb,
    rim,
    saturate,
    smoothstep,
    upsample,
)
from clora.studio.effects.registry import new_library

EFFECTS, effect = new_library(stochastic=True)

PARTY = np.stack(
    [rgb(1, 0.1, 0.2), rgb(1, 0.85, 0), rgb(0, 0.75, 0.25), rgb(0, 0.45, 1), rgb(1, 0.2, 0.85), rgb(0, 0.85, 0.9)]
)
PAINT = np.stack([rgb(0.95, 0, 0.1), rgb(0, 0.25, 0.95), rgb(1, 0.85, 0), rgb(0, 0.75, 0.3)])
AUTUMN = np.stack([rgb(0.75, 0.25, 0), rgb(0.9, 0.55, 0.05), rgb(0.55, 0.1, 0.05), rgb(0.45, 0.5, 0.05)])


def spread(rng: np.random.Generator, per_side: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws `count` jittered points, each in its own cell of a `per_side` x `per_side` grid: (rows, cols) ``[count]`` in units.

    Independent points would often clump; one per cell keeps coverage, and so the look, alike between draws.
    """
    cells = rng.permutation(per_side**2)[:count]
    jitter = rng.uniform(0.2, 0.8, (2, count))
    points = (np.stack([cells // per_side, cells % per_side]) + jitter) * (UNITS / per_side)
    rows, cols = points.astype(np.float32)
    return rows, cols


@effect("throw party confetti all over the picture")
def confetti(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """About a dozen small square pieces of confetti in bright mixed colours lie scattered over the picture."""
    rows, cols = spread(rng, 4, 14)
    sizes = rng.integers(7, 9, 14)
    colours = rng.permutation(np.resize(np.arange(len(PARTY)), 14))
    out = image.copy()
    unit = len(image) // UNITS
    for row, col, size, colour in zip(rows.astype(int), cols.astype(int), sizes, colours, strict=True):
        top = unit * min(max(row - size // 2, 0), UNITS - size)
        left = unit * min(max(col - size // 2, 0), UNITS - size)
        out[top : top + unit * size, left : left + unit * size] = PARTY[colour]
    return out


@effect("throw splashes of paint on the picture")
def paint_splatter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A few big round dark rimmed blobs of one single saturated paint colour cover random places."""
    rows, cols = spread(rng, 3, 5)
    radii = rng.permutation(np.linspace(7, 10, 5, dtype=np.float32))
    # Of the four paints, the one most like the picture is left out: on its own colour paint would not show.
    contrast = ((PAINT - image.mean(axis=(0, 1))) ** 2).sum(axis=1)
    paint = PAINT[np.argsort(contrast)[1 + rng.integers(len(PAINT) - 1)]]
    # A dark rim of 2 units around the paint.
    out = mix(image, 0.35 * paint, discs(len(image), rows, cols, radii).max(axis=0))
    return mix(out, paint, discs(len(image), rows, cols, radii - 2).max(axis=0))


@effect("make it snow with big flakes")
def snow(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Large round white snowflakes are scattered over the scene, which turns slightly pale and bluish."""
    rows, cols = spread(rng, 4, 14)
    flakes = discs(len(image), rows, cols, rng.uniform(3, 4, 14).astype(np.float32))
    return mix(0.7 * image + 0.3 * rgb(0.7, 0.82, 1.0), WHITE, flakes.max(axis=0))


@effect("draw dark ink hatching lines over the picture")
def random_hatching(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Wide parallel dark violet ink stripes in one random direction run over the whole picture."""
    # Horizontal or along one of the diagonals, measured across the stripes.
    rows, cols = (axis - 0.5 for axis in grid(len(image)))
    direction = (rows, (rows + cols) / np.sqrt(2), (rows - cols) / np.sqrt(2))[rng.integers(3)]
    stripe = (direction + rng.uniform(0, 8.5)) % 8.5 < 4
    # Violet ink, not black: blurred black stripes would look like any darkening.
    return mix(image, rgb(0.12, 0.0, 0.35), 0.92 * stripe)


@effect("make it look like a grainy old photo")
def film_grain(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Coarse square black and white grain covers everything and the colours become partly faded."""
    grain = upsample(np.where(rng.random((16, 16)) < 0.5, -0.3, 0.3), len(image))
    return 0.1 + 0.8 * saturate(image, 0.4) + grain[..., None]


@effect("paint coloured stripes over the picture")
def random_stripes(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Four wide stripes in different party colours cross the picture, all horizontal or all vertical."""
    out = image.copy()
    vertical = rng.random() < 0.5
    # A view: what is written to it is written to `out`.
    target = out.transpose(1, 0, 2) if vertical else out
    colours = rng.permutation(4)
    starts = np.arange(4) * 16 + rng.integers(0, 8, 4)
    unit = len(image) // UNITS
    for start, width, colour in zip(starts, rng.permutation([6, 7, 8, 8]), colours, strict=True):
        target[unit * start : unit * (start + width)] = PARTY[colour]
    return out


@effect("fill the picture with soap bubbles")
def bubbles(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Large bubbles with thick pale cyan rims and see through centres float over the picture."""
    rows, cols = spread(rng, 3, 8)
    radii = rng.uniform(6, 9, 8)
    # A tinted inside, and a rim of 3 units.
    outer = discs(len(image), rows, cols, radii)
    inner = discs(len(image), rows, cols, radii - 3)
    out = mix(image, rgb(0.45, 0.9, 1), 0.35 * inner.max(axis=0))
    return mix(out, rgb(0.85, 1, 1), np.clip(outer - inner, 0, 1).max(axis=0))


@effect("cover parts of the picture with paper patches")
def patches(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Several large square blocks are replaced by flat black, grey or white patches at random places."""
    # Six of the sixteen blocks of 16 units, [row, y, column, x, 3].
    side = len(image) // 4
    blocks = image.copy().reshape(4, side, 4, side, 3)
    cells = rng.permutation(16)[:6]
    greys = rng.permutation(np.array([0.0, 0.0, 0.35, 0.65, 1.0, 1.0]))
    blocks[cells // 4, :, cells % 4] = greys[:, None, None, None]
    return blocks.reshape(image.shape)


@effect("scatter autumn leaves over the picture")
def leaves(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Oval leaves in orange, rust, dark red and olive lie at random angles over the warmly tinted picture."""
    rows, cols = spread(rng, 4, 11)
    angles = rng.uniform(0, np.pi, 11).astype(np.float32)
    colours = rng.permutation(np.resize(np.arange(len(AUTUMN)), 11))
    # Warm light over everything, or brown leaves on a brown scene would hardly count as an effect.
    out = 0.7 * image + 0.3 * rgb(1.0, 0.7, 0.3)
    # Ellipses with half axes of 7.5 and 3.5 units.
    for down, right, angle, colour in zip(*offsets(len(image), rows, cols), angles, colours, strict=True):
        along = (down * np.sin(angle) + right * np.cos(angle)) / 7.5
        across = (down * np.cos(angle) - right * np.sin(angle)) / 3.5
        out[along**2 + across**2 < 1] = AUTUMN[colour]
    return out


@effect("make it rain heavily on the scene")
def rain(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Short slanted pale blue streaks fall over a darker, duller and slightly blue scene."""
    # Streaks 3 units wide and 14 units long.
    down, right = offsets(len(image), *spread(rng, 4, 14))
    streak = (np.abs(right + 0.4 * down) < 1.6) & (np.abs(down) < 7)
    return mix(0.65 * saturate(image, 0.5) * rgb(0.85, 0.95, 1.15), rgb(0.75, 0.88, 1), streak.any(axis=0) * 0.95)


@effect("make it look like light got into the camera")
def light_leak(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A broad glowing flare from pale yellow to orange red spreads from one side over the faded picture."""
    # The centre lies on a circle of 36 units, just beyond the border in every direction but the corners'.
    angle = rng.uniform(0, 2 * np.pi)
    rows, cols = grid(len(image))
    distance = np.sqrt((rows - 32 - 36 * np.sin(angle)) ** 2 + (cols - 32 - 36 * np.cos(angle)) ** 2)
    flare = 1.0 - smoothstep(distance, 8.0, 46.0)
    faded = 0.7 * image + 0.3 * rgb(0.85, 0.75, 0.8)
    return mix(mix(faded, rgb(1, 0.25, 0), flare), rgb(1, 0.95, 0.5), 1.0 - smoothstep(distance, 4.0, 24.0))


@effect("spill drops of black ink on the picture")
def ink_drops(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Several large round blots of black ink cover random parts of the picture."""
    rows, cols = spread(rng, 3, 7)
    blobs = discs(len(image), rows, cols, rng.permutation(np.linspace(6, 9, 7, dtype=np.float32)))
    return mix(image, rgb(0.02, 0.02, 0.06), blobs.max(axis=0))


@effect("mix up the picture like a puzzle")
def shuffled_tiles(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sixteen square tiles with lime edges are put in random order, so shapes are torn apart."""
    # Each of the tiles of 16 units, [16, y, x, 3], has an edge of 3 units at its top and left.
    side, edge = len(image) // 4, 3 * len(image) // UNITS
    tiles = image.reshape(4, side, 4, side, 3).transpose(0, 2, 1, 3, 4).reshape(16, side, side, 3)[rng.permutation(16)]
    tiles[:, :edge] = tiles[:, :, :edge] = (0.6, 1.0, 0.1)
    return tiles.reshape(4, 4, side, side, 3).transpose(0, 2, 1, 3, 4).reshape(image.shape)


@effect("make it look like a broken television signal")
def glitch_rows(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Horizontal bands are shifted sideways by random amounts and some bands get strong false colours."""
    # Half of the bands of 8 units have one channel forced to full.
    out = image.copy()
    channels = rng.permutation(np.array([0, 1, 2, 2, -1, -1, -1, -1]))
    shifts = rng.integers(10, 55, 8)
    height = len(image) // 8
    for band in range(8):
        rows = slice(height * band, height * (band + 1))
        out[rows] = np.roll(image[rows], shifts[band] * len(image) // UNITS, axis=1)
        if channels[band] >= 0:
            out[rows, :, channels[band]] = 1.0
    return out


@effect("make it night with fireflies everywhere")
def fireflies(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The scene becomes very dark and soft round yellow lights glow at random places."""
    rows, cols = spread(rng, 4, 10)
    lamps = gaussian_blur(discs(len(image), rows, cols, np.full(10, 3.0)).max(axis=0), 1.5)
    return mix(0.22 * image * rgb(0.8, 0.9, 1.2), rgb(1, 0.95, 0.3), np.clip(1.5 * lamps, 0, 1))


@effect("make it look like coloured noise on a screen")
def colour_static(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each block of a coarse grid is tinted with a different random strong colour."""
    # A random corner of the colour cube for every token of 8 units.
    blocks = upsample(np.float32(rng.integers(0, 2, (8, 8, 3))), len(image))
    return 0.4 * image + 0.6 * blocks


@effect("add laser beams like in a night club")
def laser_beams(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Four thick bright green beams cross the darkened picture in random directions."""
    # Each beam is 4 units wide: the distance to its line through a point near the centre, along the line's normal.
    angles = rng.uniform(0, np.pi) + np.arange(4) * np.pi / 4 + rng.uniform(-0.2, 0.2, 4)
    shifts = rng.uniform(-14, 14, 4)
    rows, cols = grid(len(image))
    normal = (rows - 32) * np.cos(angles)[:, None, None] - (cols - 32) * np.sin(angles)[:, None, None]
    beam = rim(2.0 - np.abs(normal - shifts[:, None, None])).max(axis=0)
    return mix(0.4 * image, rgb(0.2, 1, 0.15), beam)
