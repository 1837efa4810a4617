"""Stochastic effects of light, weather and damage: leaks, flares, fog, grain, cracks.

What is drawn are positions, lengths and grids in units: one state of the generator gives one picture at every size.
"""

import numpy as np

from clora.studio.effects.registry import new_library
from clora.studio.next.effects.filters import (
    UNITS,
    WHITE,
    border_distance,
    clouds,
    gaussian_blur,
    grid,
    mix,
    polar,
    rgb,
    rim,
    saturate,
    screen,
    smoothstep,
    upsample,
)
from clora.studio.next.effects.shapes import around, discs, line, scatter

EFFECTS, effect = new_library(stochastic=True)

SPARKS = np.stack([rgb(1, 0.35, 0.25), rgb(1, 0.85, 0.3), rgb(0.4, 1, 0.5), rgb(0.4, 0.7, 1), rgb(1, 0.45, 0.95)])
LAMPS = np.stack(
    [rgb(1.0, 0.75, 0.35), rgb(1.0, 0.5, 0.3), rgb(0.95, 0.9, 0.6), rgb(0.5, 0.75, 1.0), rgb(1.0, 0.45, 0.6)]
)


@effect("make it look like coloured noise on a screen")
def colour_static(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each small block of a grid is tinted with a different random strong colour."""
    # A random corner of the colour cube for every block of 4 units, four to a token.
    blocks = upsample(np.float32(rng.integers(0, 2, (16, 16, 3))), len(image))
    return 0.55 * image + 0.45 * blocks


@effect("make it look like a grainy old photo")
def film_grain(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Strong grey grain covers the whole photo and its colours are faded."""
    # Not finer: a grain of one unit is lost in the autoencoder.
    grain = clouds(rng.standard_normal((48, 48)), len(image))
    return 0.1 + 0.8 * saturate(image, 0.35) + 0.18 * grain[..., None]


@effect("make it look like a damaged old film")
def dust_scratches(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Long thin vertical white scratches and dark specks of dust lie on a faded brownish film picture."""
    size = len(image)
    out = (0.14 + 0.75 * saturate(image, 0.2)) * rgb(1.0, 0.94, 0.82)
    cols, slants, ends = scatter(rng, 8, 7)[1], rng.uniform(-0.02, 0.02, 7), rng.uniform(25, 100, 7)
    for col, slant, end in zip(cols, slants, ends, strict=True):
        start = np.array([-2.0 if end > 45 else UNITS - end, col])
        scratch = rim(0.2 - line(size, start, start + end * np.array([1.0, slant])))
        out = mix(out, rgb(1.0, 0.98, 0.9), 0.9 * scratch)
    # Specks are the peaks of noise, hence of many shapes.
    specks = smoothstep(clouds(rng.random((24, 24)), size) * clouds(rng.random((40, 40)), size), 0.5, 0.56)
    hairs = np.zeros((size, size), np.float32)
    for row, col, turn, bend in zip(
        *scatter(rng, 3, 4), rng.uniform(0, 2 * np.pi, 4), rng.uniform(3, 6, 4), strict=True
    ):
        x, y = around(size, row, col, turn)
        hairs = np.maximum(hairs, rim(np.minimum(0.25 - np.abs(np.sqrt(x**2 + y**2) - bend), x - 0.55 * bend)))
    return mix(out, rgb(0.1, 0.06, 0.04), 0.9 * np.maximum(specks, hairs))


@effect("make it look like light got into the camera")
def light_leak(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A broad uneven glow of red, orange and yellow light spreads from one side over the faded picture."""
    size = len(image)
    rows, cols = grid(size)
    across = cols if rng.random() < 0.5 else UNITS - cols
    slant, bend = rng.uniform(-0.35, 0.35), rng.uniform(0, 2 * np.pi)
    # The uneven edge of the leak, in units from the side.
    depth = across + slant * (rows - 32) + 4.0 * np.sin(rows * (2 * np.pi / 45) + bend) - rng.uniform(0, 6)
    out = 0.8 * image + rgb(0.14, 0.08, 0.09)
    leaks = ((30.0, 0.8, rgb(0.95, 0.12, 0.08)), (17.0, 0.75, rgb(1.0, 0.55, 0.08)), (8.0, 0.8, rgb(1.0, 0.95, 0.6)))
    for reach, opacity, colour in leaks:
        out = mix(out, colour, opacity * np.exp(-((np.maximum(depth + 4, 0.0) / reach) ** 2)))
    return out


@effect("fill it with big soft lights out of focus")
def bokeh(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Large translucent round lights in warm colours with bright rims shimmer over the darkened picture."""
    size = len(image)
    rows, cols = scatter(rng, 4, 13)
    radii = rng.permutation(np.linspace(4.0, 9.0, 13))
    out = 0.7 * gaussian_blur(image, 0.8)
    for row, col, radius, lamp, strength in zip(
        rows, cols, radii, rng.integers(0, len(LAMPS), 13), rng.uniform(0.45, 0.7, 13), strict=True
    ):
        x, y = around(size, row, col)
        distance = np.sqrt(x**2 + y**2)
        disc = rim(radius - distance) * (0.75 + 0.4 * smoothstep(distance / radius, 0.7, 0.98))
        out = screen(out, np.clip(strength * disc[..., None] * LAMPS[lamp], 0.0, 1.0))
    return out


@effect("let the sun shine right into the lens")
def lens_flare(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A dazzling white sun with long rays stands near the top and throws a line of coloured discs."""
    size = len(image)
    row, col = rng.uniform(8, 18), rng.uniform(8, 56)
    distance, angle = polar(size, row, col)
    rays = np.maximum(np.cos(6 * (angle + rng.uniform(0, np.pi))), 0) ** 8
    light = np.exp(-distance / 11.0) + 0.75 * rays * np.exp(-distance / 16.0)
    out = screen(0.9 * image, np.clip(light, 0.0, 1.0)[..., None] * rgb(1.0, 0.93, 0.7))
    out = mix(out, WHITE, 1.0 - smoothstep(distance, 3.5, 6.5))
    # Reflections lie on the line from the sun through the centre.
    spots = (
        (0.55, 3.0, rgb(1, 0.6, 0.2)),
        (0.95, 2.2, rgb(0.3, 1, 0.6)),
        (1.35, 5.0, rgb(0.35, 0.6, 1)),
        (1.75, 7.0, rgb(0.9, 0.3, 0.8)),
    )
    for along, radius, colour in spots:
        spot = discs(
            size, np.array([row + along * (32 - row)]), np.array([col + along * (32 - col)]), np.array([radius])
        )[0]
        out = screen(out, 0.55 * spot[..., None] * colour)
    return out


@effect("wrap the scene in thick drifting fog")
def fog(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uneven banks of white grey fog drift over the dull picture and hide parts of it."""
    size = len(image)
    coarse, fine = clouds(rng.random((5, 5)), size), clouds(rng.random((10, 10)), size)
    banks = 0.65 * coarse + 0.35 * fine
    cover = 0.42 + 0.54 * smoothstep(banks, 0.36, 0.62)
    return mix(saturate(image, 0.5), rgb(0.86, 0.88, 0.9), cover)


@effect("light up the night sky with fireworks")
def fireworks(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Round bursts of coloured sparks explode over the scene, which lies in a dark night."""
    size = len(image)
    out = 0.35 * saturate(image, 0.6) * rgb(0.75, 0.8, 1.25)
    colours = rng.permutation(len(SPARKS))
    for row, col, colour in zip(*scatter(rng, 2, 4), colours[:4], strict=True):
        distance, angle = polar(size, row, col)
        radius, turn = rng.uniform(12, 17), rng.uniform(0, 2 * np.pi)
        # Each of 22 rays has its own length, and its sparks grow towards the tip.
        ray = (angle + turn) % (2 * np.pi) * (22 / (2 * np.pi))
        reach = radius * rng.uniform(0.65, 1.0, 23)[ray.astype(np.int64)]
        aside = distance * np.abs(ray % 1 - 0.5) * (2 * np.pi / 22)
        share = distance / reach
        sparks = rim(0.1 + 0.4 * share - aside) * smoothstep(share, 0.15, 0.9) * (1.0 - smoothstep(share, 1.0, 1.08))
        glow = 0.5 * np.exp(-((distance / (0.6 * radius)) ** 2))
        out = screen(out, np.maximum(sparks, glow)[..., None] * SPARKS[colour])
        out = mix(out, rgb(1, 1, 0.9), sparks * smoothstep(share, 0.75, 0.95) + 0.8 * np.exp(-((distance / 1.8) ** 2)))
    return out


@effect("let lightning strike in a dark storm")
def lightning(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two jagged white bolts with a violet glow strike down from the top over a dark stormy scene."""
    size = len(image)
    storm = 0.38 * saturate(image, 0.35) * rgb(0.75, 0.75, 1.2) + rgb(0.02, 0.01, 0.06)
    distance = np.full((size, size), np.inf)
    for col, length in zip(scatter(rng, 2, 4)[1][:2], (9, 6), strict=True):
        point = np.array([-1.0, col])
        for _ in range(length):
            step = np.array([rng.uniform(4, 8), rng.uniform(-6, 6)])
            distance = np.minimum(distance, line(size, point, point + step))
            # Here and there a branch leaves the bolt.
            if rng.random() < 0.3:
                branch = point + np.array([rng.uniform(6, 10), rng.choice([-1, 1]) * rng.uniform(6, 11)])
                distance = np.minimum(distance, line(size, point, branch) + 0.35)
            point = point + step
    glow = 0.9 * np.exp(-distance / 2.6) + 0.25 * np.exp(-distance / 12.0)
    out = screen(storm, np.clip(glow, 0, 1)[..., None] * rgb(0.65, 0.5, 1.0))
    return mix(out, WHITE, rim(0.7 - distance))


@effect("add laser beams like in a night club")
def laser_beams(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Glowing green and magenta beams cross the dark picture in random directions."""
    rows, cols = grid(len(image))
    out = 0.35 * saturate(image, 0.7) * rgb(0.8, 0.75, 1.2)
    angles = rng.uniform(0, np.pi) + np.arange(5) * np.pi / 5 + rng.uniform(-0.2, 0.2, 5)
    for number, (angle, shift) in enumerate(zip(angles, rng.uniform(-18, 18, 5), strict=True)):
        aside = np.abs((rows - 32) * np.cos(angle) - (cols - 32) * np.sin(angle) - shift)
        colour = rgb(0.15, 1, 0.2) if number % 2 == 0 else rgb(1, 0.15, 0.85)
        out = screen(out, (0.75 * np.exp(-((aside / 2.4) ** 2)))[..., None] * colour)
        out = mix(out, 0.5 + 0.5 * colour, rim(0.8 - aside))
    return out


@effect("make it look like a broken digital signal")
def glitch(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bands of rows jump sideways and red and cyan ghosts stand apart, with a few bright bars."""
    size = len(image)
    unit = size // UNITS
    # Bands of 4 units; half of them stay in place.
    shifts = np.where(rng.random(16) < 0.5, 0, rng.integers(-14, 15, 16))
    bars = rng.permutation(16)[:2]
    ends = rng.integers(0, 40, 2)
    out = np.empty_like(image)
    for band, shift in enumerate(shifts):
        rows = slice(band * 4 * unit, (band + 1) * 4 * unit)
        for channel, ghost in enumerate((3, 0, -3)):
            out[rows, :, channel] = np.roll(image[rows, :, channel], (shift + ghost) * unit, axis=1)
    for band, end, colour in zip(bars, ends, (rgb(0, 1, 0.9), rgb(1, 0, 0.7)), strict=True):
        rows, cols = slice(band * 4 * unit, (band * 4 + 3) * unit), slice(end * unit, (end + 24) * unit)
        out[rows, cols] = 0.25 * out[rows, cols] + 0.75 * colour
    return out


@effect("tear the edges of the picture like old paper")
def torn_paper(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture has ragged torn edges with a white fibre rim and lies on a dark wooden table."""
    size = len(image)
    rows, _ = grid(size)
    ragged = 7.0 * (clouds(rng.random((8, 8)), size) - 0.5) + 6.0 * (clouds(rng.random((24, 24)), size) - 0.5)
    depth = border_distance(size) + ragged
    table = rgb(0.3, 0.17, 0.09) * (1.0 + 0.25 * np.cos(rows * (2 * np.pi / 8)))[..., None]
    table = table * (1.0 - 0.5 * np.exp(-np.maximum(4.5 - depth, 0) / 1.5))[..., None]
    torn = mix(table, rgb(0.97, 0.95, 0.9), smoothstep(depth, 4.0, 4.8))
    return mix(torn, 0.95 * image + 0.03, smoothstep(depth, 6.3, 7.3))


@effect("show it behind a smashed pane of glass")
def broken_glass(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Thin bright cracks run out from a point of impact and cut the picture into splinters of different brightness."""
    size = len(image)
    row, col = rng.uniform(18, 46, 2)
    distance, angle = polar(size, row, col)
    # Cracks bend a little: their direction changes with the distance.
    bend = 0.25 * np.sin(distance / rng.uniform(5, 8) + rng.uniform(0, 2 * np.pi))
    turns = np.sort((np.arange(13) + rng.uniform(-0.35, 0.35, 13)) * (2 * np.pi / 13))
    around_centre = (angle + bend / (1 + distance / 12)) % (2 * np.pi)
    sector = np.searchsorted(turns, around_centre) % 13
    gap = np.abs((around_centre[..., None] - turns + np.pi) % (2 * np.pi) - np.pi).min(axis=-1)
    # Two rings of cracks, broken off at a different distance in each sector.
    rings = np.stack([6.5 * rng.uniform(0.75, 1.3, 13), 17.0 * rng.uniform(0.7, 1.35, 13)])[:, sector]
    crossing = np.abs(distance - rings).min(axis=0)
    splinter = sector + 13 * (distance > rings).sum(axis=0)
    light = rng.uniform(-0.3, 0.25, 39)[splinter]
    cracks = rim(0.5 - np.minimum(gap * distance, crossing))
    out = np.clip(0.9 * saturate(image, 0.6) + light[..., None], 0.0, 1.0)
    out = mix(out, rgb(0.96, 0.99, 1.0), 0.92 * cracks)
    return mix(out, WHITE, 0.85 * np.exp(-((distance / 2.0) ** 2)))
