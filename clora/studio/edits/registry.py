"""The kinds of general edit: their record, the decorator that makes one of a function, and what they draw from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from clora.studio.effects.filters import rgb
from clora.studio.photographs import Photographs
from clora.studio.scenes import COLOURS, Scene, render

Outcome = tuple[np.ndarray, str, str]
"""A result, not yet clipped, and the words for the slots ``{a}`` and ``{b}`` of the instruction."""
HUES = tuple(colour for colour in COLOURS if colour not in ("black", "white", "grey"))
CHANNELS = ("red", "green", "blue")
SIDES = ("left", "right", "top", "bottom")


@dataclass(frozen=True, slots=True)
class Edit:
    """An instruction, the picture before and its exact result ``[S, S, 3]``; the kind of edit and the words in its slots."""

    family: str
    instruction: str
    source: np.ndarray
    result: np.ndarray
    slots: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Source:
    """What an edit is made from.

    Attributes:
        scene: the scene.
        image: as it is, ``[S, S, 3]``.
        rng: of the edit's draws.
        photographs: with the cut-outs that can be added.
    """

    scene: Scene
    image: np.ndarray
    rng: np.random.Generator
    photographs: Photographs

    @property
    def size(self) -> int:
        return len(self.image)

    def colour(self, *but: str) -> str:
        return str(self.rng.choice([colour for colour in COLOURS if colour not in but]))

    def one_of(self, names: tuple[str, ...]) -> str:
        return str(self.rng.choice(names))

    def with_objects(self, objects) -> np.ndarray:
        return render(replace(self.scene, objects=tuple(objects)), self.size)


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of edit.

    Attributes:
        phrasings: of its instruction, with slots.
        apply: draws one edit of a scene.
        random: its instruction leaves the outcome open.
        of_objects: it needs a scene with objects.
        share: how often it is drawn, in proportion.
    """

    phrasings: tuple[str, ...]
    apply: Callable[[Source], Outcome]
    random: bool
    of_objects: bool
    share: float


def new_families() -> tuple[dict[str, Family], Callable]:
    """Returns an empty set of families by name, and the decorator that makes a function the kind of edit of its name."""
    families: dict[str, Family] = {}

    def edit(*phrasings: str, random: bool = False, of_objects: bool = False, share: float = 1.0) -> Callable:
        def add(function: Callable[[Source], Outcome]) -> Callable:
            families[function.__name__] = Family(phrasings, function, random, of_objects, share)
            return function

        return add

    return families, edit


def rgb_of(colour: str) -> np.ndarray:
    """Returns the ``[3]`` of a colour's name."""
    return rgb(*COLOURS[colour])
