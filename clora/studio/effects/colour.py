"""Deterministic effects that map colours pixel by pixel."""

import numpy as np

from clora.studio.effects.filters import gaussian_blur, gradient_map, grey_image, luminance, quantise, rgb, saturate
from clora.studio.effects.registry import new_library

EFFECTS, effect = new_library()


def toned(image: np.ndarray, *stops: tuple[float, float, float]) -> np.ndarray:
    """Maps luminance through evenly spaced colour stops, its contrast stretched so that mid-tones reach both ends."""
    return gradient_map((luminance(image) - 0.1) / 0.8, np.array(stops, dtype=np.float32))


@effect("invert all the colours like a photo negative")
def negative(image: np.ndarray) -> np.ndarray:
    """Every colour is inverted to its complement, so light areas become dark and dark areas become light."""
    return 1.0 - image


@effect("make it look like a thermal camera image")
def thermal(image: np.ndarray) -> np.ndarray:
    """Brightness is recoloured as a heat map running from dark blue through magenta and orange to yellow."""
    stops = ((0, 0, 0.15), (0.2, 0, 0.7), (0.8, 0, 0.55), (1, 0.35, 0.05), (1, 0.85, 0.1), (1, 1, 0.9))
    return toned(image, *stops)


@effect("make it look like an old faded photo")
def sepia(image: np.ndarray) -> np.ndarray:
    """All colours are replaced by warm brown tones, as in an antique sepia photograph."""
    return grey_image(luminance(image)) * rgb(1.05, 0.85, 0.6) + rgb(0.1, 0.05, 0.0)


@effect("make it look like a night vision camera image")
def night_vision(image: np.ndarray) -> np.ndarray:
    """The picture becomes monochrome bright green on black, like a view through night vision goggles."""
    return toned(image, (0, 0.06, 0), (0.05, 0.6, 0.1), (0.5, 1, 0.45))


@effect("make it a black and white photo")
def greyscale(image: np.ndarray) -> np.ndarray:
    """All colour is removed, leaving neutral grey tones with the original brightness."""
    return grey_image(luminance(image))


@effect("turn this into a two colour print")
def duotone_teal_orange(image: np.ndarray) -> np.ndarray:
    """Shadows become dark teal and highlights become orange, with only blends of these two colours."""
    return toned(image, (0, 0.3, 0.35), (1, 0.6, 0.2))


@effect("turn this into a two colour poster")
def duotone_purple_yellow(image: np.ndarray) -> np.ndarray:
    """Shadows turn deep purple and highlights turn lemon yellow in a strict two colour gradient."""
    return toned(image, (0.35, 0, 0.55), (1, 0.95, 0.25))


@effect("turn this into a print with two colours")
def duotone_red_cyan(image: np.ndarray) -> np.ndarray:
    """Shadows become strong red and highlights become light cyan, so the picture has only two inks."""
    return toned(image, (0.75, 0, 0.05), (0.4, 1, 1))


@effect("make everything look like it is made of gold")
def golden(image: np.ndarray) -> np.ndarray:
    """All tones become metallic gold, from dark bronze shadows to bright yellow highlights."""
    return toned(image, (0.1, 0.04, 0), (0.75, 0.5, 0.05), (1, 0.92, 0.4))


@effect("light the picture with a red darkroom lamp")
def darkroom(image: np.ndarray) -> np.ndarray:
    """The picture becomes monochrome pure red on black, as if lit only by a safelight."""
    return toned(image, (0.04, 0, 0), (0.6, 0, 0), (1, 0.1, 0.08))


@effect("recolour everything with all the rainbow colours")
def rainbow_map(image: np.ndarray) -> np.ndarray:
    """Brightness is mapped to saturated rainbow hues, red in the shadows through green to violet highlights."""
    return toned(image, (1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1), (1, 0.2, 0.4))


@effect("give it a strange solarised darkroom look")
def solarise(image: np.ndarray) -> np.ndarray:
    """Mid tones become bright while both very dark and very bright channel values turn dark."""
    # A tent: 0 and 1 become dark, 0.5 becomes bright.
    return 1.0 - np.abs(2.0 * image - 1.0)


@effect("swap the red and blue colours around")
def swap_red_blue(image: np.ndarray) -> np.ndarray:
    """Red and blue are exchanged everywhere while green areas and the shapes stay as they were."""
    return image[..., [2, 1, 0]]


@effect("shift all the colours around the colour wheel")
def cycle_colours(image: np.ndarray) -> np.ndarray:
    """Every hue moves a third of the colour wheel, red to green, green to blue, blue to red."""
    return image[..., [2, 0, 1]]


@effect("make it look washed out and very pale")
def bleach(image: np.ndarray) -> np.ndarray:
    """The whole picture is bleached to faint pastel tints close to white with very low contrast."""
    return 0.72 + 0.28 * saturate(image, 0.6)


@effect("turn this into a pure black and white stencil")
def threshold(image: np.ndarray) -> np.ndarray:
    """Each pixel becomes pure black or pure white, depending on whether it is darker or lighter than average."""
    # The picture's own mean, not 0.5: a dark scene would turn into one black field.
    grey = gaussian_blur(luminance(image), 1.5)
    return grey_image(grey > grey.mean())


@effect("turn this into a poster with flat colours")
def posterise(image: np.ndarray) -> np.ndarray:
    """Colours are reduced to eight pure ones such as red, cyan, black and white in flat areas."""
    return quantise(gaussian_blur(image, 1.0), 2)


@effect("make it look like it is night")
def moonlight(image: np.ndarray) -> np.ndarray:
    """The scene is darkened strongly and tinted blue, as under faint moonlight with little colour left."""
    return 0.42 * saturate(image, 0.35) * rgb(0.55, 0.75, 1.35) + rgb(0, 0.01, 0.07)


@effect("make it look lit by warm light")
def candlelight(image: np.ndarray) -> np.ndarray:
    """A strong orange filter removes nearly all blue and half the green while shapes keep their shading."""
    return image * rgb(1.25, 0.6, 0.12)
