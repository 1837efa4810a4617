"""Deterministic effects that recolour the picture, film and light."""

import numpy as np

from clora.studio.effects.filters import (
    UNITS,
    WHITE,
    border_distance,
    gaussian_blur,
    gradient_map,
    grey_image,
    grid,
    luminance,
    mix,
    paper_noise,
    polar,
    rgb,
    saturate,
    screen,
    smoothstep,
)
from clora.studio.effects.registry import new_library

EFFECTS, effect = new_library()


def toned(plane: np.ndarray, *stops: tuple[float, float, float]) -> np.ndarray:
    """Maps a grey plane ``[S, S]`` through evenly spaced colour stops, its contrast stretched."""
    return gradient_map((plane - 0.1) / 0.8, np.array(stops, dtype=np.float32))


@effect("invert all the colours like a photo negative")
def negative(image: np.ndarray) -> np.ndarray:
    """Every colour is inverted to its complement, so light areas become dark and dark areas become light."""
    return 1.0 - image


@effect("make it look like a thermal camera image")
def thermal(image: np.ndarray) -> np.ndarray:
    """Brightness is recoloured as a heat map running from dark blue through purple and orange to pale yellow."""
    stops = ((0.06, 0.04, 0.32), (0.42, 0.08, 0.5), (0.82, 0.25, 0.34), (0.96, 0.6, 0.2), (1, 0.93, 0.6))
    # Without fine texture: five stops make contrast three times as steep.
    return toned(gaussian_blur(luminance(image), 0.5), *stops)


@effect("make it look like an old faded photo")
def sepia(image: np.ndarray) -> np.ndarray:
    """All colours are replaced by warm brown tones, as in an antique sepia photograph with darkened corners."""
    brown = gradient_map(
        luminance(image), np.stack([rgb(0.16, 0.09, 0.04), rgb(0.62, 0.45, 0.27), rgb(0.98, 0.9, 0.74)])
    )
    return brown * (1.0 - 0.4 * smoothstep(polar(len(image))[0], 24.0, 46.0))[..., None]


@effect("make it look like a night vision camera image")
def night_vision(image: np.ndarray) -> np.ndarray:
    """The picture becomes bright green on black inside a round view, as through night vision goggles."""
    green = toned(luminance(image), (0, 0.06, 0), (0.05, 0.6, 0.1), (0.55, 1, 0.5))
    return green * (1.0 - smoothstep(polar(len(image))[0], 25.0, 33.0))[..., None]


@effect("make it a black and white photo")
def greyscale(image: np.ndarray) -> np.ndarray:
    """All colour is removed, leaving neutral grey tones with slightly stronger contrast."""
    return grey_image(0.5 + 1.15 * (luminance(image) - 0.5))


@effect("turn this into a two colour poster")
def duotone_purple_yellow(image: np.ndarray) -> np.ndarray:
    """Shadows turn deep purple and highlights turn lemon yellow in a strict two colour gradient."""
    return toned(luminance(image), (0.35, 0, 0.55), (1, 0.95, 0.25))


@effect("light the picture with a red darkroom lamp")
def darkroom(image: np.ndarray) -> np.ndarray:
    """The picture becomes monochrome pure red on black, as if lit only by a safelight."""
    return toned(luminance(image), (0.04, 0, 0), (0.6, 0, 0), (1, 0.12, 0.1))


@effect("turn this into a cyanotype print on paper")
def cyanotype(image: np.ndarray) -> np.ndarray:
    """Prussian blue and white tones are brushed onto white paper, which stays bare along the uneven edges."""
    size = len(image)
    blue = toned(luminance(image), (0.01, 0.1, 0.3), (0.2, 0.45, 0.7), (0.92, 0.97, 0.98))
    # Strokes end at different places: the noise changes faster along the border than a wave would.
    brushed = border_distance(size) + 3.0 * (paper_noise(size, 32) - 0.5)
    return mix(np.full_like(image, rgb(0.95, 0.94, 0.9)), blue, smoothstep(brushed, 4.0, 5.0))


@effect("make it look like cross processed film")
def cross_process(image: np.ndarray) -> np.ndarray:
    """Strong contrast with yellow green highlights and deep blue shadows, like slide film in the wrong chemicals."""
    red, green, blue = np.moveaxis(image, -1, 0)
    return np.stack([smoothstep(red, 0.1, 0.9), smoothstep(green, -0.05, 0.85), 0.28 + 0.38 * blue], axis=-1)


@effect("make it look like it is night")
def moonlight(image: np.ndarray) -> np.ndarray:
    """The scene is dark and blue under faint moonlight, with a pale moon in the upper corner."""
    size = len(image)
    night = 0.45 * saturate(image, 0.35) * rgb(0.55, 0.75, 1.35) + rgb(0, 0.01, 0.06)
    distance = polar(size, 9.0, 54.0)[0]
    halo = 0.45 * np.exp(-distance / 8.0)[..., None] * rgb(0.6, 0.75, 1.0)
    return mix(screen(night, halo), rgb(0.97, 0.97, 0.88), 1.0 - smoothstep(distance, 4.2, 5.0))


@effect("bathe the scene in a glowing sunset")
def sunset(image: np.ndarray) -> np.ndarray:
    """Violet light from above turns to glowing orange and red around a low blinding sun at one side."""
    size = len(image)
    rows, _ = grid(size)
    sky = gradient_map(rows / UNITS, np.stack([rgb(0.55, 0.3, 0.7), rgb(1.1, 0.55, 0.4), rgb(0.9, 0.4, 0.2)]))
    distance = polar(size, 34.0, 62.0)[0]
    light = np.exp(-distance / 20.0)[..., None] * rgb(1.0, 0.6, 0.15)
    glare = np.exp(-((distance / 9.0) ** 2))[..., None] * rgb(1.0, 0.9, 0.55)
    lit = 1.15 * (0.35 * image + 0.65 * grey_image(luminance(image))) * sky
    return screen(screen(np.clip(lit, 0.0, 1.0), light), glare)


@effect("put a bright rainbow across the picture")
def rainbow(image: np.ndarray) -> np.ndarray:
    """A wide translucent rainbow arches from the lower left to the lower right corner over the picture."""
    distance = polar(len(image), 66.0, 32.0)[0]
    stops = [
        (0.6, 0.1, 0.9),
        (0.2, 0.25, 1),
        (0, 0.75, 0.9),
        (0.1, 0.85, 0.2),
        (1, 0.95, 0.1),
        (1, 0.55, 0),
        (1, 0.1, 0.1),
    ]
    colours = gradient_map((distance - 38.0) / 16.0, np.array(stops, dtype=np.float32))
    band = smoothstep(distance, 37.0, 40.0) * (1.0 - smoothstep(distance, 52.0, 55.0))
    return mix(0.92 * image + 0.08 * WHITE, colours, 0.72 * band)
