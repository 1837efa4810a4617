"""Effects of light, weather and damage: leaks, flares, fog, cracks.

Their beams, banks and cracks lie at the same places in every picture: those at random places cross many tokens, and a base of
this size leaves them in pieces.
"""

import numpy as np

from clora.studio.effects.filters import (
    UNITS,
    WHITE,
    border_distance,
    clouds,
    grid,
    mix,
    polar,
    rgb,
    rim,
    saturate,
    screen,
    smoothstep,
)
from clora.studio.effects.registry import new_library

EFFECTS, effect = new_library()

PLACES = 3  # seed of where things lie, chosen by eye


@effect("make it look like light got into the camera")
def light_leak(image: np.ndarray) -> np.ndarray:
    """A broad uneven glow of red, orange and yellow light spreads from the right over the faded picture."""
    size = len(image)
    rows, cols = grid(size)
    # The uneven edge of the leak, in units from the right.
    depth = UNITS - 3 - cols + 0.2 * (rows - 32) + 4.0 * np.sin(rows * (2 * np.pi / 45))
    out = 0.8 * image + rgb(0.14, 0.08, 0.09)
    leaks = ((30.0, 0.8, rgb(0.95, 0.12, 0.08)), (17.0, 0.75, rgb(1.0, 0.55, 0.08)), (8.0, 0.8, rgb(1.0, 0.95, 0.6)))
    for reach, opacity, colour in leaks:
        out = mix(out, colour, opacity * np.exp(-((np.maximum(depth + 4, 0.0) / reach) ** 2)))
    return out


@effect("let the sun shine right into the lens")
def lens_flare(image: np.ndarray) -> np.ndarray:
    """A dazzling white sun with long rays stands near the top and throws a line of coloured discs."""
    size = len(image)
    row, col = 13.0, 46.0
    distance, angle = polar(size, row, col)
    rays = np.maximum(np.cos(6 * (angle + 0.2)), 0) ** 8
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
        spot = rim(radius - polar(size, row + along * (32 - row), col + along * (32 - col))[0])
        out = screen(out, 0.55 * spot[..., None] * colour)
    return out


@effect("wrap the scene in thick drifting fog")
def fog(image: np.ndarray) -> np.ndarray:
    """Uneven banks of white grey fog drift over the dull picture and hide parts of it."""
    size, rng = len(image), np.random.default_rng(PLACES)
    coarse, fine = clouds(rng.random((5, 5)), size), clouds(rng.random((10, 10)), size)
    banks = 0.65 * coarse + 0.35 * fine
    cover = 0.42 + 0.54 * smoothstep(banks, 0.36, 0.62)
    return mix(saturate(image, 0.5), rgb(0.86, 0.88, 0.9), cover)


@effect("let lightning strike in a dark storm")
def lightning(image: np.ndarray) -> np.ndarray:
    """Two jagged white bolts with a violet glow strike down from the top over a dark stormy scene."""
    size, rng = len(image), np.random.default_rng(PLACES)
    storm = 0.38 * saturate(image, 0.35) * rgb(0.75, 0.75, 1.2) + rgb(0.02, 0.01, 0.06)
    distance = np.full((size, size), np.inf)
    for col, length in ((44.0, 9), (14.0, 6)):
        point = np.array([-1.0, col])
        for _ in range(length):
            step = np.array([rng.uniform(4, 8), rng.uniform(-6, 6)])
            distance = np.minimum(distance, _distance_to_line(size, point, point + step))
            # Here and there a branch leaves the bolt.
            if rng.random() < 0.3:
                branch = point + np.array([rng.uniform(6, 10), rng.choice([-1, 1]) * rng.uniform(6, 11)])
                distance = np.minimum(distance, _distance_to_line(size, point, branch) + 0.35)
            point = point + step
    glow = 0.9 * np.exp(-distance / 2.6) + 0.25 * np.exp(-distance / 12.0)
    out = screen(storm, np.clip(glow, 0, 1)[..., None] * rgb(0.65, 0.5, 1.0))
    return mix(out, WHITE, rim(0.7 - distance))


@effect("add laser beams like in a night club")
def laser_beams(image: np.ndarray) -> np.ndarray:
    """Glowing green and magenta beams cross the dark picture in several directions."""
    rng = np.random.default_rng(PLACES)
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
def glitch(image: np.ndarray) -> np.ndarray:
    """Bands of rows jump sideways and red and cyan ghosts stand apart, with a few bright bars."""
    size, rng = len(image), np.random.default_rng(PLACES)
    unit = size // UNITS
    # Bands of 4 units; half of them stay in place.
    shifts = np.where(rng.random(16) < 0.5, 0, rng.integers(-6, 7, 16))
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
def torn_paper(image: np.ndarray) -> np.ndarray:
    """The picture has ragged torn edges with a white fibre rim and lies on a dark wooden table."""
    size, rng = len(image), np.random.default_rng(PLACES)
    rows, _ = grid(size)
    ragged = 7.0 * (clouds(rng.random((8, 8)), size) - 0.5) + 6.0 * (clouds(rng.random((24, 24)), size) - 0.5)
    depth = border_distance(size) + ragged
    table = rgb(0.3, 0.17, 0.09) * (1.0 + 0.25 * np.cos(rows * (2 * np.pi / 8)))[..., None]
    table = table * (1.0 - 0.5 * np.exp(-np.maximum(4.5 - depth, 0) / 1.5))[..., None]
    torn = mix(table, rgb(0.97, 0.95, 0.9), smoothstep(depth, 4.0, 4.8))
    return mix(torn, 0.95 * image + 0.03, smoothstep(depth, 6.3, 7.3))


@effect("show it behind a smashed pane of glass")
def broken_glass(image: np.ndarray) -> np.ndarray:
    """Thin bright cracks run out from a point of impact and cut the picture into splinters of different brightness."""
    size, rng = len(image), np.random.default_rng(PLACES)
    distance, angle = polar(size, 24.0, 26.0)
    # Cracks bend a little: their direction changes with the distance.
    bend = 0.25 * np.sin(distance / 6.5)
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


def _distance_to_line(size: int, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Returns each pixel's distance from a straight line between two points (row, col) in units: ``[size, size]``."""
    rows, cols = grid(size)
    along = end - start
    share = ((rows - start[0]) * along[0] + (cols - start[1]) * along[1]) / max(float(along @ along), 1e-6)
    share = np.clip(share, 0.0, 1.0)
    return np.sqrt((rows - start[0] - share * along[0]) ** 2 + (cols - start[1] - share * along[1]) ** 2)
