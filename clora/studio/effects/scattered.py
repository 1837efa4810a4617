"""Stochastic effects: flakes, leaves, bubbles and lights, each within a token (`marks`), and grain all over."""

import numpy as np

from clora.studio.effects.filters import (
    BLACK,
    WHITE,
    clouds,
    gaussian_blur,
    mix,
    rgb,
    saturate,
    screen,
    smoothstep,
    upsample,
)
from clora.studio.effects.marks import draw_marks
from clora.studio.effects.registry import new_library

EFFECTS, effect = new_library(stochastic=True)

PARTY = np.stack(
    [rgb(1, 0.1, 0.2), rgb(1, 0.85, 0), rgb(0, 0.75, 0.25), rgb(0, 0.45, 1), rgb(1, 0.2, 0.85), rgb(0, 0.85, 0.9)]
)
PAINT = np.stack([rgb(0.95, 0, 0.1), rgb(0, 0.25, 0.95), rgb(1, 0.85, 0), rgb(0, 0.7, 0.3), rgb(0.9, 0.1, 0.7)])
AUTUMN = np.stack([rgb(0.82, 0.22, 0.02), rgb(0.95, 0.6, 0.05), rgb(0.6, 0.08, 0.06), rgb(0.85, 0.4, 0.02)])
SPARKS = np.stack([rgb(1, 0.35, 0.25), rgb(1, 0.85, 0.3), rgb(0.4, 1, 0.5), rgb(0.4, 0.7, 1), rgb(1, 0.45, 0.95)])
LAMPS = np.stack([rgb(1.0, 0.75, 0.35), rgb(1.0, 0.5, 0.3), rgb(0.95, 0.9, 0.6), rgb(1.0, 0.45, 0.6)])


@effect("make it snow with big flakes")
def snow(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Many round white snowflakes of several sizes fall over the scene, which turns slightly pale and bluish."""
    flakes = draw_marks(len(image), rng, 0.6, (1.2, 3.2))
    pale = 0.75 * saturate(image, 0.7) + 0.25 * rgb(0.7, 0.82, 1.0)
    return mix(pale, WHITE, flakes.discs())


@effect("make it rain heavily on the scene")
def rain(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Many thin slanted streaks of rain fall over a darker, duller and slightly blue scene."""
    drops = draw_marks(len(image), rng, 0.65, (2.5, 3.2)).turned(rng, (0.3, 0.4))
    dull = 0.62 * saturate(image, 0.4) * rgb(0.85, 0.95, 1.1) + rgb(0.05, 0.06, 0.08)
    return mix(dull, rgb(0.88, 0.94, 1.0), 0.85 * drops.strokes(1.1))


@effect("cover the lens with drops of rain")
def rain_drops(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Round water drops with dark rims and white highlights lie on a window before a blurred scene."""
    drops = draw_marks(len(image), rng, 0.5, (2.3, 3.4))
    blurred = 0.85 * gaussian_blur(image, 2.2) + 0.08
    # A drop is a lens, which turns what is above down: it is dark above and bright below.
    lens = np.clip(blurred * (1.0 + 0.7 * drops.y / np.abs(drops.radius))[..., None] + 0.06, 0.0, 1.0)
    lens = lens * (1.0 - 0.6 * smoothstep(drops.distance / np.abs(drops.radius), 0.6, 1.0))[..., None]
    spark = np.clip(1.2 - np.hypot(drops.x + 0.9, drops.y + 0.9), 0, 1)
    return mix(blurred, mix(lens, WHITE, spark), drops.discs())


@effect("scatter autumn leaves over the picture")
def leaves(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Small oval leaves in orange, red and yellow lie scattered at random angles over the warm picture."""
    blades = draw_marks(len(image), rng, 0.5, (3.35, 3.35)).turned(rng)
    colours = blades.one_of(AUTUMN, rng)
    # What two circles have in common is a pointed oval.
    oval = 4.4 - np.hypot(blades.y, np.abs(blades.x) + 2.9)
    warm = 0.85 * image + 0.15 * rgb(1.0, 0.75, 0.35)
    vein = np.clip(0.9 - np.abs(blades.x), 0, 1)
    return mix(warm, mix(colours, BLACK, 0.35 * vein), blades.inside(oval))


@effect("throw party confetti all over the picture")
def confetti(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Many small turned paper rectangles in bright mixed party colours rain down over the whole picture."""
    papers = draw_marks(len(image), rng, 0.7, (2.9, 3.3)).turned(rng)
    depth = np.minimum(2.5 - np.abs(papers.x), 1.3 - np.abs(papers.y))
    return mix(image, papers.one_of(PARTY, rng), papers.inside(depth))


@effect("sprinkle red and pink hearts over the picture")
def hearts(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Small red and pink hearts float over the picture, which turns slightly rosy."""
    shapes = draw_marks(len(image), rng, 0.4, (2.6, 3.4))
    colours = shapes.one_of(np.stack([rgb(0.92, 0.05, 0.2), rgb(1.0, 0.42, 0.65)]), rng)
    radius = np.abs(shapes.radius)
    rosy = 0.85 * image + 0.15 * rgb(1.0, 0.7, 0.8)
    return mix(rosy, colours, shapes.inside(radius * _heart(1.1 * shapes.x / radius, 1.1 * shapes.y / radius) / 1.1))


@effect("fill the picture with soap bubbles")
def bubbles(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Clear round soap bubbles with thin shimmering rims and white highlights float over the picture."""
    films = draw_marks(len(image), rng, 0.6, (2.5, 3.4))
    angle = np.arctan2(films.y, films.x)[..., None] + np.float32([0.0, 2.1, 4.2])
    rim = films.discs() * (0.25 + 0.75 * smoothstep(films.depth, 1.6, 0.6))
    spark = films.discs() * np.clip(1.2 - np.hypot(films.x + 1.1, films.y + 1.1), 0, 1)
    return mix(mix(image, 0.75 + 0.25 * np.cos(angle), rim), WHITE, spark)


@effect("let white daisies grow all over it")
def daisies(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Small white flowers with yellow centres are spread over the picture, which turns slightly green."""
    flowers = draw_marks(len(image), rng, 0.4, (2.7, 3.3)).turned(rng)
    petals = flowers.radius * (0.8 + 0.25 * np.cos(6 * np.arctan2(flowers.y, flowers.x))) - flowers.distance
    green = 0.8 * image + 0.2 * rgb(0.45, 0.75, 0.3)
    centre = flowers.inside(1.3 - flowers.distance)
    return mix(mix(green, rgb(1, 0.98, 0.95), flowers.inside(petals)), rgb(1, 0.75, 0.05), centre)


@effect("throw drops of paint on the picture")
def paint_drops(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Round drops of bright wet paint in several colours and sizes, with dark rims, cover the picture."""
    drops = draw_marks(len(image), rng, 0.7, (1.6, 3.5))
    paint = drops.one_of(PAINT, rng) * (1.0 - 0.45 * smoothstep(drops.depth, 1.2, 0.2))[..., None]
    return mix(image, paint, drops.discs())


@effect("make it night with fireflies everywhere")
def fireflies(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The scene becomes a dark blue night in which many small yellow green lights glow."""
    lights = draw_marks(len(image), rng, 0.3, (2.2, 3.2))
    night = 0.32 * saturate(image, 0.5) * rgb(0.6, 0.85, 1.25) + rgb(0.0, 0.01, 0.04)
    out = screen(np.clip(night, 0, 1), (0.95 * lights.glows())[..., None] * rgb(0.8, 0.95, 0.15))
    return mix(out, rgb(1.0, 1.0, 0.75), lights.inside(1.1 - lights.distance))


@effect("let gold glitter sparkle over the picture")
def glitter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Golden stars with four points sparkle all over the picture, which turns darker and golden."""
    stars = draw_marks(len(image), rng, 0.4, (2.4, 3.4))
    points = 1.1 * (stars.radius - (np.sqrt(np.abs(stars.x)) + np.sqrt(np.abs(stars.y))) ** 2) + 0.9
    dark = 0.7 * image * rgb(1.05, 0.95, 0.7)
    return mix(dark, rgb(1.0, 0.93, 0.55), stars.inside(points))


@effect("light up the night sky with fireworks")
def fireworks(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Small bursts of coloured sparks explode all over the scene, which lies in a dark night."""
    bursts = draw_marks(len(image), rng, 0.45, (2.7, 3.4)).turned(rng)
    night = 0.35 * saturate(image, 0.6) * rgb(0.75, 0.8, 1.25)
    rays = 0.5 + 0.5 * np.cos(6 * np.arctan2(bursts.y, bursts.x))
    light = bursts.discs() * np.maximum(rays, 1 - bursts.distance / 1.8)
    return screen(np.clip(night, 0, 1), np.clip(light, 0, 1)[..., None] * bursts.one_of(SPARKS, rng))


@effect("fill it with soft lights out of focus")
def bokeh(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Translucent round lights in warm colours with bright rims shimmer over the dark blurred picture."""
    lights = draw_marks(len(image), rng, 0.6, (2.9, 3.5))
    strength = lights.discs() * (0.6 + 0.4 * smoothstep(lights.depth, 1.4, 0.4))
    return screen(0.6 * gaussian_blur(image, 1.5), strength[..., None] * lights.one_of(LAMPS, rng))


@effect("make it look like coloured noise on a screen")
def colour_static(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each small block of a grid is tinted with a different random strong colour."""
    # A random corner of the colour cube for every block of 4 units.
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
    """Short white scratches and dark specks of dust lie on a faded brownish film picture."""
    faded = (0.14 + 0.75 * saturate(image, 0.2)) * rgb(1.0, 0.94, 0.82)
    scratches = draw_marks(len(image), rng, 0.35, (2.6, 3.4)).turned(rng, (-0.3, 0.3)).strokes(1.0)
    specks = draw_marks(len(image), rng, 0.3, (0.8, 1.8)).discs()
    return mix(mix(faded, rgb(1.0, 0.98, 0.9), scratches), rgb(0.1, 0.06, 0.04), 0.9 * specks)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns how far inside a heart that stands on its point positions are (x to the right, y down), in its radii."""
    x, y = 0.6 * np.abs(x), 0.6 * (0.95 - y)
    lobe = np.sqrt(2) / 4 - np.sqrt((x - 0.25) ** 2 + (y - 0.75) ** 2)
    middle = np.maximum(x + y, 0.0) / 2
    to_sides = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - middle) ** 2 + (y - middle) ** 2))
    return np.where(x + y > 1, lobe, to_sides * np.sign(y - x)) / 0.6
