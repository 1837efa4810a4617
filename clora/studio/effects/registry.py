"""The `Effect` record, and the decorator that makes one of an image function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clora.studio.effects.filters import UNITS


@dataclass(frozen=True, slots=True)
class Effect:
    """One exact image function with the texts that people would use for it.

    Attributes:
        name: unique, snake_case.
        prompt: the teacher's prompt as a person would write it; several effects are deliberately worded alike.
        description: a vision-language model's words for before/after pairs; precise and unique.
        function: ``function(image)``, or ``function(image, rng)`` of a stochastic effect.
        stochastic: the outcome is a distribution, drawn from the generator.
    """

    name: str
    prompt: str
    description: str
    function: Callable[..., np.ndarray]
    stochastic: bool

    def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Applies the effect to an image ``[S, S, 3]`` in [0, 1]; only a stochastic one draws from ``rng``.

        The side S is a multiple of 64. Equal states of ``rng`` give the same picture.

        Raises:
            ValueError: another shape.
        """
        size = len(image)
        if image.shape != (size, size, 3) or size == 0 or size % UNITS:
            raise ValueError(
                f"an effect takes one square image [S, S, 3], S a multiple of {UNITS}; got {list(image.shape)}; resize it first"
            )
        image = np.asarray(image, dtype=np.float32)
        result = self.function(image, rng) if self.stochastic else self.function(image)
        return np.clip(result, 0.0, 1.0).astype(np.float32)


def new_library(stochastic: bool = False) -> tuple[dict[str, Effect], Callable]:
    """Makes an empty library, and the decorator ``@effect(prompt)`` that adds functions to it.

    An effect has the name of its function and, as description, the first line of its docstring.
    """
    library: dict[str, Effect] = {}

    def effect(prompt: str) -> Callable:
        def add(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
            name = function.__name__
            sentence = function.__doc__.splitlines()[0].removesuffix(".")
            description = sentence[0].lower() + sentence[1:]
            library[name] = Effect(name, prompt, description, function, stochastic)
            return function

        return add

    return library, effect
