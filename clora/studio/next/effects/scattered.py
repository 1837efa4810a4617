"""Stochastic effects that scatter things over the picture: flakes, leaves, bubbles, splashes.

What is drawn are positions, lengths and grids in units: one state of the generator gives one picture at every size.
Things are at least about 3 units wide: a few-step regression would blur them, and a token sees a good part of one.
"""

import numpy as np

from clora.studio.effects.registry import new_library
from clora.studio.next.effects.filters import (
    BLACK,
    WHITE,
    gaussian_blur,
    grid,
    mix,
    rgb,
    rim,
    sampled,
    saturate,
    screen,
    smoothstep,
)
from clora.studio.next.effects.shapes import around, blob, discs, heart, line, maple, scatter, willow

EFFECTS, effect = new_library(stochastic=True)

PARTY = np.stack(
    [rgb(1, 0.1, 0.2), rgb(1, 0.85, 0), rgb(0, 0.75, 0.25), rgb(0, 0.45, 1), rgb(1, 0.2, 0.85), rgb(0, 0.85, 0.9)]
)
PAINT = np.stack([rgb(0.95, 0, 0.1), rgb(0, 0.25, 0.95), rgb(1, 0.85, 0), rgb(0, 0.7, 0.3), rgb(0.9, 0.1, 0.7)])
AUTUMN = np.stack([rgb(0.82, 0.22, 0.02), rgb(0.95, 0.6, 0.05), rgb(0.6, 0.08, 0.06), rgb(0.85, 0.4, 0.02)])


@effect("make it snow with big flakes")
def snow(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Many round white snowflakes of several sizes fall over the scene, which turns slightly pale and bluish."""
    size = len(image)
    out = 0.75 * saturate(image, 0.7) + 0.25 * rgb(0.7, 0.82, 1.0)
    # Small flakes are far away, hence behind the others and softer.
    for count, low, high, opacity in ((26, 0.9, 1.3, 0.75), (14, 1.7, 2.3, 0.9), (7, 2.8, 3.6, 1.0)):
        rows, cols = scatter(rng, 6, count)
        flakes = discs(size, rows, cols, rng.uniform(low, high, count).astype(np.float32)).max(axis=0)
        out = mix(out, WHITE, opacity * gaussian_blur(flakes, 0.35))
    return out


@effect("make it rain heavily on the scene")
def rain(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Many long thin slanted streaks of rain fall over a darker, duller and slightly blue scene."""
    size = len(image)
    rows, cols = scatter(rng, 8, 54)
    lengths, lights = rng.uniform(8, 16, 54), rng.uniform(0.35, 0.8, 54)
    out = 0.62 * saturate(image, 0.4) * rgb(0.85, 0.95, 1.1) + rgb(0.05, 0.06, 0.08)
    fall = np.array([1.0, -0.3])
    for row, col, length, light in zip(rows, cols, lengths, lights, strict=True):
        head = np.array([row, col])
        streak = rim(0.3 - line(size, head - 0.5 * length * fall, head + 0.5 * length * fall))
        out = mix(out, rgb(0.88, 0.94, 1.0), light * streak)
    return out


@effect("cover the lens with drops of rain")
def rain_drops(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Clear round water drops, each a small bright upside down view, lie on a window before a blurred scene."""
    size = len(image)
    rows, cols = scatter(rng, 5, 18)
    radii = rng.permutation(np.linspace(2.2, 5.5, 18))
    out = 0.85 * gaussian_blur(image, 2.2) + 0.08
    grid_rows, grid_cols = grid(size)
    for row, col, radius in zip(rows, cols, radii, strict=True):
        x, y = around(size, row, col)
        distance = np.sqrt(x**2 + y**2)
        # A drop is a lens: what is inside shows a wide view, upside down, dark above and bright below.
        view = sampled(image, grid_rows - 3.5 * y, grid_cols - 3.5 * x)
        lens = np.clip(view * (1.05 + 0.45 * y / radius)[..., None] + 0.05, 0.0, 1.0)
        lens = lens * (1.0 - 0.55 * smoothstep(distance / radius, 0.75, 1.0))[..., None]
        spark = rim(0.28 * radius - np.sqrt((x + 0.35 * radius) ** 2 + (y + 0.4 * radius) ** 2))
        out = mix(out, mix(lens, WHITE, spark), rim(radius - distance))
    return out


@effect("scatter autumn leaves over the picture")
def leaves(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Maple leaves and oval leaves in orange, red and yellow lie scattered at random angles over the picture."""
    size = len(image)
    rows, cols = scatter(rng, 4, 13)
    radii = rng.uniform(6.0, 8.5, 13)
    angles = rng.uniform(0, 2 * np.pi, 13)
    colours = rng.permutation(np.resize(np.arange(len(AUTUMN)), 13))
    out = 0.85 * image + 0.15 * rgb(1.0, 0.75, 0.35)
    for number, (row, col, radius, angle, colour) in enumerate(zip(rows, cols, radii, angles, colours, strict=True)):
        # A shadow, one unit below and to the right, lifts the leaf off the picture.
        shape = willow if number % 3 == 2 else maple
        shadow, leaf = (
            rim(radius * shape(x / radius, y / radius))
            for x, y in (around(size, row + 0.9, col + 0.9, angle), around(size, row, col, angle))
        )
        x, y = around(size, row, col, angle)
        vein = rim(0.3 - np.abs(y)) * (x > -0.8 * radius)
        out = mix(mix(out, BLACK, 0.4 * shadow), AUTUMN[colour], leaf)
        out = mix(out, 0.55 * AUTUMN[colour], leaf * vein)
    return out


@effect("throw party confetti all over the picture")
def confetti(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Many small turned paper rectangles in bright mixed party colours rain down over the whole picture."""
    size = len(image)
    rows, cols = scatter(rng, 7, 40)
    angles = rng.uniform(0, np.pi, 40)
    heights = rng.uniform(0.9, 1.8, 40)
    colours = rng.permutation(np.resize(np.arange(len(PARTY)), 40))
    out = image.copy()
    for row, col, angle, height, colour in zip(rows, cols, angles, heights, colours, strict=True):
        x, y = around(size, row, col, angle)
        out = mix(out, PARTY[colour], rim(np.minimum(2.4 - np.abs(x), height - np.abs(y))))
    return out


@effect("sprinkle red and pink hearts over the picture")
def hearts(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Red and pink hearts of several sizes float over the picture, which turns slightly rosy."""
    size = len(image)
    rows, cols = scatter(rng, 4, 12)
    radii = rng.permutation(np.linspace(4.0, 8.0, 12))
    tilts = rng.uniform(-0.4, 0.4, 12)
    out = 0.85 * image + 0.15 * rgb(1.0, 0.7, 0.8)
    for row, col, radius, tilt, pink in zip(rows, cols, radii, tilts, rng.random(12), strict=True):
        x, y = around(size, row, col, tilt)
        colour = rgb(0.92, 0.05, 0.2) if pink < 0.5 else rgb(1.0, 0.42, 0.65)
        shine = rim(0.2 * radius - np.sqrt((x + 0.38 * radius) ** 2 + (y + 0.38 * radius) ** 2))
        out = mix(mix(out, colour, rim(radius * heart(x / radius, y / radius))), WHITE, 0.7 * shine)
    return out


@effect("fill the picture with soap bubbles")
def bubbles(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Clear round soap bubbles with thin shimmering rims and white highlights float over the picture."""
    size = len(image)
    rows, cols = scatter(rng, 4, 11)
    radii = rng.permutation(np.linspace(4.0, 9.0, 11))
    out = image.copy()
    for row, col, radius, phase in zip(rows, cols, radii, rng.uniform(0, 2 * np.pi, 11), strict=True):
        x, y = around(size, row, col)
        distance = np.sqrt(x**2 + y**2)
        shimmer = 0.7 + 0.3 * np.cos(np.arctan2(y, x)[..., None] + phase + np.float32([0.0, 2.1, 4.2]))
        film = rim(radius - distance) * (0.15 + 0.83 * smoothstep(distance / radius, 0.5, 0.92))
        spark = rim(0.2 * radius - np.sqrt((x + 0.42 * radius) ** 2 + (y + 0.42 * radius) ** 2))
        out = mix(mix(out, shimmer, film), WHITE, 0.95 * spark)
    return out


@effect("let colourful party balloons rise up")
def balloons(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shiny oval balloons in party colours with thin strings rise over the picture."""
    size = len(image)
    rows, cols = scatter(rng, 3, 7)
    radii = rng.uniform(6.0, 8.5, 7)
    colours = rng.permutation(np.resize(np.arange(len(PARTY)), 7))
    out = image.copy()
    for row, col, radius, colour in zip(rows - 4, cols, radii, colours, strict=True):
        x, y = around(size, row, col)
        depth = radius * (1.0 - np.sqrt((x / (0.85 * radius)) ** 2 + (y / radius) ** 2))
        knot = np.minimum(1.2 - np.abs(y - radius - 0.6), 0.5 * (y - radius + 1) - np.abs(x))
        string = np.minimum(0.4 - np.abs(x - 0.8 * np.sin((y - radius) / 3)), np.minimum(y - radius, radius + 16 - y))
        shade = 1.0 - 0.35 * smoothstep((x + y) / radius, 0.0, 1.3)
        spark = rim(
            1.0 - np.sqrt(((x + 0.35 * radius) / (0.16 * radius)) ** 2 + ((y + 0.45 * radius) / (0.24 * radius)) ** 2)
        )
        out = mix(out, rgb(0.95, 0.95, 0.95), rim(string))
        out = mix(out, PARTY[colour] * shade[..., None], 0.93 * rim(np.maximum(depth, knot)))
        out = mix(out, WHITE, 0.8 * spark)
    return out


@effect("throw splashes of paint on the picture")
def paint_splatter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Big irregular splashes of bright paint in several colours cover random places, with small drops around them."""
    size = len(image)
    rows, cols = scatter(rng, 3, 6)
    colours = rng.permutation(np.resize(np.arange(len(PAINT)), 6))
    out = image.copy()
    for row, col, colour in zip(rows, cols, colours, strict=True):
        radius = rng.uniform(7.0, 10.5)
        waves = np.stack([rng.uniform(0.01, 0.1, 9), rng.uniform(0, 2 * np.pi, 9)])
        x, y = around(size, row, col)
        depth = radius * blob(x / radius, y / radius, waves)
        turns, reach = rng.uniform(0, 2 * np.pi, 6), rng.uniform(0.95, 1.6, 6) * radius
        drops = discs(size, row + reach * np.sin(turns), col + reach * np.cos(turns), rng.uniform(0.7, 1.7, 6)).max(
            axis=0
        )
        # A wet edge is darker, and light falls on the upper left of a splash.
        paint = PAINT[colour] * (1.0 - 0.3 * rim(1.0 - np.abs(depth)))[..., None]
        spark = rim(0.14 * radius - np.sqrt((x + 0.25 * radius) ** 2 + (1.6 * (y + 0.3 * radius)) ** 2))
        out = mix(mix(out, PAINT[colour], drops), paint, rim(depth))
        out = mix(out, WHITE, 0.7 * spark)
    return out


@effect("stain it with rings of spilled coffee")
def coffee_stains(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brown rings and drops of coffee mark the picture, which is printed pale on yellowed paper."""
    size = len(image)
    paper = (0.3 + 0.7 * saturate(image, 0.6)) * rgb(0.98, 0.9, 0.74)
    stain = np.zeros((size, size), np.float32)
    rows, cols = scatter(rng, 2, 3)
    for row, col, radius in zip(rows, cols, rng.uniform(11, 15, 3), strict=True):
        x, y = around(size, row, col)
        depth = radius - np.sqrt(x**2 + y**2)
        # Darker on one side, where the cup was tipped.
        side = 0.7 + 0.3 * np.cos(np.arctan2(y, x) - rng.uniform(0, 2 * np.pi))
        ring = smoothstep(depth, -0.4, 0.4) * (1.0 - smoothstep(depth, 1.6, 3.2))
        stain = np.maximum(stain, side * np.maximum(ring, 0.22 * rim(depth)))
    drops = discs(size, *scatter(rng, 4, 6), rng.uniform(1.2, 2.6, 6)).max(axis=0)
    stain = np.maximum(stain, 0.8 * drops)
    return paper * (1.0 - stain[..., None] * (1.0 - rgb(0.42, 0.24, 0.1)))


@effect("make it night with fireflies everywhere")
def fireflies(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The scene becomes a dark blue night in which many small yellow green lights glow."""
    size = len(image)
    out = 0.32 * saturate(image, 0.5) * rgb(0.6, 0.85, 1.25) + rgb(0.0, 0.01, 0.04)
    rows, cols = scatter(rng, 5, 17)
    for row, col, radius in zip(rows, cols, rng.uniform(0.8, 1.7, 17), strict=True):
        x, y = around(size, row, col)
        distance = np.sqrt(x**2 + y**2) / radius
        out = screen(np.clip(out, 0, 1), np.exp(-0.55 * distance)[..., None] * 0.85 * rgb(0.85, 0.95, 0.2))
        out = mix(out, rgb(1.0, 1.0, 0.75), np.exp(-(distance**2)))
    return out
