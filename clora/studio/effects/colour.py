"""Deterministic effects that map colours pixel by pixel."""

import functools

import numpy as np

from clora.studio.effects._image import gaussian_blur, gradient_map, luminance, quantise, rgb, saturate
from clora.studio.effects._registry import deterministic

THERMAL = np.stack(
    [rgb(0, 0, 0.15), rgb(0.2, 0, 0.7), rgb(0.8, 0, 0.55), rgb(1, 0.35, 0.05), rgb(1, 0.85, 0.1), rgb(1, 1, 0.9)]
)
RAINBOW = np.stack(
    [rgb(1, 0, 0), rgb(1, 1, 0), rgb(0, 1, 0), rgb(0, 1, 1), rgb(0, 0, 1), rgb(1, 0, 1), rgb(1, 0.2, 0.4)]
)


def negative(image: np.ndarray) -> np.ndarray:
    return 1.0 - image


def toned(image: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Luminance through colour stops ``[S, 3]``, contrast stretched so that mid-tones reach both ends."""
    return gradient_map((luminance(image) - 0.1) / 0.8, stops)


def sepia(image: np.ndarray) -> np.ndarray:
    grey = luminance(image)[..., None]
    return grey * rgb(1.05, 0.85, 0.6) + rgb(0.1, 0.05, 0.0)


def greyscale(image: np.ndarray) -> np.ndarray:
    return luminance(image)[..., None].repeat(3, axis=-1)


def solarise(image: np.ndarray) -> np.ndarray:
    return 1.0 - np.abs(2.0 * image - 1.0)


def permuted(image: np.ndarray, order: tuple[int, int, int]) -> np.ndarray:
    return image[..., order]


def bleach(image: np.ndarray) -> np.ndarray:
    return 0.72 + 0.28 * saturate(image, 0.6)


def threshold(image: np.ndarray) -> np.ndarray:
    # The picture's own mean, not 0.5: a dark scene would turn into one black field.
    grey = gaussian_blur(luminance(image), 1.5)
    return (grey > grey.mean())[..., None].repeat(3, axis=-1)


def posterise(image: np.ndarray) -> np.ndarray:
    return quantise(gaussian_blur(image, 1.0), 2)


def moonlight(image: np.ndarray) -> np.ndarray:
    return 0.42 * saturate(image, 0.35) * rgb(0.55, 0.75, 1.35) + rgb(0, 0.01, 0.07)


def candlelight(image: np.ndarray) -> np.ndarray:
    return image * rgb(1.25, 0.6, 0.12)


def _toned(*stops: np.ndarray) -> functools.partial:
    return functools.partial(toned, stops=np.stack(stops))


EFFECTS = (
    deterministic(
        "negative",
        negative,
        "invert all the colours like a photo negative",
        "every colour is inverted to its complement, so light areas become dark and dark areas become light",
    ),
    deterministic(
        "thermal",
        _toned(*THERMAL),
        "make it look like a thermal camera image",
        "brightness is recoloured as a heat map running from dark blue through magenta and orange to yellow",
    ),
    deterministic(
        "sepia",
        sepia,
        "make it look like an old faded photo",
        "all colours are replaced by warm brown tones, as in an antique sepia photograph",
    ),
    deterministic(
        "night_vision",
        _toned(rgb(0, 0.06, 0), rgb(0.05, 0.6, 0.1), rgb(0.5, 1, 0.45)),
        "make it look like a night vision camera image",
        "the picture becomes monochrome bright green on black, like a view through night vision goggles",
    ),
    deterministic(
        "greyscale",
        greyscale,
        "make it a black and white photo",
        "all colour is removed, leaving neutral grey tones with the original brightness",
    ),
    deterministic(
        "duotone_teal_orange",
        _toned(rgb(0, 0.3, 0.35), rgb(1, 0.6, 0.2)),
        "turn this into a two colour print",
        "shadows become dark teal and highlights become orange, with only blends of these two colours",
    ),
    deterministic(
        "duotone_purple_yellow",
        _toned(rgb(0.35, 0, 0.55), rgb(1, 0.95, 0.25)),
        "turn this into a two colour poster",
        "shadows turn deep purple and highlights turn lemon yellow in a strict two colour gradient",
    ),
    deterministic(
        "duotone_red_cyan",
        _toned(rgb(0.75, 0, 0.05), rgb(0.4, 1, 1)),
        "turn this into a print with two colours",
        "shadows become strong red and highlights become light cyan, so the picture has only two inks",
    ),
    deterministic(
        "golden",
        _toned(rgb(0.1, 0.04, 0), rgb(0.75, 0.5, 0.05), rgb(1, 0.92, 0.4)),
        "make everything look like it is made of gold",
        "all tones become metallic gold, from dark bronze shadows to bright yellow highlights",
    ),
    deterministic(
        "darkroom",
        _toned(rgb(0.04, 0, 0), rgb(0.6, 0, 0), rgb(1, 0.1, 0.08)),
        "light the picture with a red darkroom lamp",
        "the picture becomes monochrome pure red on black, as if lit only by a safelight",
    ),
    deterministic(
        "rainbow_map",
        _toned(*RAINBOW),
        "recolour everything with all the rainbow colours",
        "brightness is mapped to saturated rainbow hues, red in the shadows through green to violet highlights",
    ),
    deterministic(
        "solarise",
        solarise,
        "give it a strange solarised darkroom look",
        "mid tones become bright while both very dark and very bright channel values turn dark",
    ),
    deterministic(
        "swap_red_blue",
        functools.partial(permuted, order=(2, 1, 0)),
        "swap the red and blue colours around",
        "red and blue are exchanged everywhere while green areas and the shapes stay as they were",
    ),
    deterministic(
        "cycle_colours",
        functools.partial(permuted, order=(2, 0, 1)),
        "shift all the colours around the colour wheel",
        "every hue moves a third of the colour wheel, red to green, green to blue, blue to red",
    ),
    deterministic(
        "bleach",
        bleach,
        "make it look washed out and very pale",
        "the whole picture is bleached to faint pastel tints close to white with very low contrast",
    ),
    deterministic(
        "threshold",
        threshold,
        "turn this into a pure black and white stencil",
        "each pixel becomes pure black or pure white, depending on whether it is darker or lighter than average",
    ),
    deterministic(
        "posterise",
        posterise,
        "turn this into a poster with flat colours",
        "colours are reduced to eight pure ones such as red, cyan, black and white in flat areas",
    ),
    deterministic(
        "moonlight",
        moonlight,
        "make it look like it is night",
        "the scene is darkened strongly and tinted blue, as under faint moonlight with little colour left",
    ),
    deterministic(
        "candlelight",
        candlelight,
        "make it look lit by warm light",
        "a strong orange filter removes nearly all blue and half the green while shapes keep their shading",
    ),
)
