"""Edits that change colours pixel by pixel."""

import numpy as np

from clora.studio.edits.registry import CHANNELS, HUES, Outcome, Source, new_families, rgb_of
from clora.studio.effects import filters
from clora.studio.effects.filters import gaussian_blur, gradient_map, grey_image, luminance, rgb, smoothstep

FAMILIES, edit = new_families()


@edit(
    "keep the image as it is",
    "change nothing",
    "leave everything the same",
    "return the picture unchanged",
    "do not edit this image",
    share=1.5,
)
def keep(source: Source) -> Outcome:
    return source.image, "", ""


@edit("brighten the image", "make it brighter", "increase the brightness", "turn up the light")
def brighten(source: Source) -> Outcome:
    return source.image * 0.8 + 0.22, "", ""


@edit("darken the image", "make it darker", "lower the brightness", "turn down the light")
def darken(source: Source) -> Outcome:
    return source.image * 0.5, "", ""


@edit("increase the contrast", "make it more contrasty", "boost contrast")
def contrast(source: Source) -> Outcome:
    return source.image * 1.5 - 0.25, "", ""


@edit("fade the picture", "wash out the image", "lower the contrast")
def fade(source: Source) -> Outcome:
    return source.image * 0.45 + 0.28, "", ""


@edit("lighten only the shadows", "open up the dark areas", "lift the dark tones")
def lift_shadows(source: Source) -> Outcome:
    return source.image**0.55, "", ""


@edit("deepen only the shadows", "make the dark areas darker", "push the dark tones down")
def deepen_shadows(source: Source) -> Outcome:
    return source.image**1.8, "", ""


@edit("convert to greyscale", "take the colour out", "turn it grey")
def grey(source: Source) -> Outcome:
    return grey_image(luminance(source.image)), "", ""


@edit("make the colours stronger", "increase the saturation", "more vivid colours")
def saturate(source: Source) -> Outcome:
    return filters.saturate(source.image, 1.6), "", ""


@edit("make it warmer", "give it a warm tone", "warm up the colours")
def warm(source: Source) -> Outcome:
    return source.image * rgb(1.15, 0.97, 0.72), "", ""


@edit("make it cooler", "give it a cold tone", "cool down the colours")
def cool(source: Source) -> Outcome:
    return source.image * rgb(0.75, 0.95, 1.18), "", ""


@edit("tint everything {a}", "apply a {a} tint", "put a {a} filter over it")
def tint(source: Source) -> Outcome:
    colour = source.one_of(HUES)
    return 0.6 * source.image + 0.4 * rgb_of(colour), colour, ""


@edit("invert the {a} channel", "turn the {a} values around", "flip the amount of {a}")
def invert_channel(source: Source) -> Outcome:
    channel = source.one_of(CHANNELS)
    image = source.image.copy()
    image[..., CHANNELS.index(channel)] = 1 - image[..., CHANNELS.index(channel)]
    return image, channel, ""


@edit("invert the brightness", "make dark things light and light things dark", "swap dark and light but keep the hues")
def invert_brightness(source: Source) -> Outcome:
    return source.image + (1 - 2 * luminance(source.image))[..., None], "", ""


@edit("drop the {a} channel", "take all {a} out of the colours", "remove the {a} light")
def drop_channel(source: Source) -> Outcome:
    channel = source.one_of(CHANNELS)
    image = source.image.copy()
    image[..., CHANNELS.index(channel)] = 0
    return image, channel, ""


@edit("show the {a} channel in grey", "make a grey picture of the {a} channel", "keep only the {a} values, in grey")
def show_channel(source: Source) -> Outcome:
    channel = source.one_of(CHANNELS)
    return grey_image(source.image[..., CHANNELS.index(channel)]), channel, ""


@edit("map dark tones to {a} and light tones to {b}", "make the shadows {a} and the highlights {b}", share=2.0)
def two_tones(source: Source) -> Outcome:
    dark = source.colour()
    light = source.colour(dark)
    return gradient_map(luminance(source.image), np.stack([rgb_of(dark), rgb_of(light)])), dark, light


@edit("blend black, {a} and {b} by brightness", "run the tones from black through {a} to {b}", share=1.5)
def three_tones(source: Source) -> Outcome:
    middle = source.one_of(HUES)
    light = source.colour(middle, "black")
    stops = np.stack([rgb(0, 0, 0), rgb_of(middle), rgb_of(light)])
    return gradient_map(luminance(source.image), stops), middle, light


@edit("reduce every channel to {a} levels", "keep only {a} steps of each colour", "quantise it to {a} levels")
def levels(source: Source) -> Outcome:
    count = source.one_of(("two", "three", "four"))
    number = {"two": 2, "three": 3, "four": 4}[count]
    return _steps(gaussian_blur(source.image, 0.8), number), count, ""


def _steps(image: np.ndarray, levels: int) -> np.ndarray:
    """Brings every channel near one of ``levels`` evenly spaced values, with soft steps between them."""
    position = np.clip(image, 0, 1) * (levels - 1)
    lower = np.floor(position)
    return (lower + smoothstep(position - lower, 0.25, 0.75)) / (levels - 1)
