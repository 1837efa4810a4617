"""The `Effect` record and the two constructors the effect modules use."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clora.studio.effects._image import apply_deterministic, apply_stochastic


@dataclass(frozen=True, slots=True)
class Effect:
    """One exact image function with the texts people would use for it.

    Attributes:
        name: unique, snake_case.
        prompt: the teacher's prompt as a person would write it; several effects are deliberately worded alike.
        description: what a vision-language model would write after seeing before/after pairs; precise and unique.
        apply: maps a float32 image ``[64, 64, 3]`` in [0, 1] and a generator to a new such image; picklable.
        stochastic: whether `apply` draws from the generator, so that the outcome is a distribution.
    """

    name: str
    prompt: str
    description: str
    apply: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    stochastic: bool = False


def deterministic(name: str, function: Callable[[np.ndarray], np.ndarray], prompt: str, description: str) -> Effect:
    """Build an effect with one outcome per source from ``function(image)``."""
    return Effect(name, prompt, description, functools.partial(apply_deterministic, function))


def stochastic(
    name: str,
    function: Callable[[np.ndarray, np.random.Generator], np.ndarray],
    prompt: str,
    description: str,
) -> Effect:
    """Build an effect with random outcomes from ``function(image, rng)``."""
    return Effect(name, prompt, description, functools.partial(apply_stochastic, function), stochastic=True)
