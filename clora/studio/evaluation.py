"""Evaluation on held-out photographs: effects against the judges, general edits against their exact results."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np

from clora.progress import stage
from clora.studio.edits import FAMILIES, Edit, sample_edit
from clora.studio.effects import EFFECTS
from clora.studio.judges import Judge, Verdict, features
from clora.studio.scenes import make_scene, render

NUM_SCENES = 48  # on which each effect is judged
NOISES = 2  # of each scene: 96 outputs of an effect
NUM_GENERAL = 96
FIRST_HELD_OUT = 1_000_000_000
FIRST_GENERAL = 1_100_000_000
GENERAL_FAMILIES = tuple(name for name, family in FAMILIES.items() if not family.random)


@dataclass(frozen=True)
class GeneralCase:
    """One held-out general edit.

    Attributes:
        edit: the requested edit, with the picture before and its exact result.
        others: ``[K, F]`` features that a correct output must be further from: those of the unchanged source and of
            other edits of the same scene, two of them of the same kind with other words.
    """

    edit: Edit
    others: np.ndarray

    def is_correct(self, output: np.ndarray) -> bool:
        """Decides whether the exact result is nearer to ``output`` than anything else."""
        found, exact = features(np.stack([output, self.edit.result]))
        return bool(np.linalg.norm(found - exact) < np.linalg.norm(self.others - found, axis=1).min())


@cache
def general_cases(count: int, size: int) -> tuple[GeneralCase, ...]:
    """Draws held-out general edits at a size, the kinds of edit in turn."""
    return tuple(_general_case(index, size) for index in range(count))


def _general_case(index: int, size: int) -> GeneralCase:
    scene = make_scene(FIRST_GENERAL + index, "held_out", min_objects=1)
    rng = np.random.default_rng([index, 5])
    family = GENERAL_FAMILIES[index % len(GENERAL_FAMILIES)]
    # The first draw that shows: the removal of an object at the border may not.
    draws = [sample_edit(scene, rng, family, size) for _ in range(8)]
    edit = next((edit for edit in draws if _differ(edit.result, edit.source)), draws[0])
    # Other things that could have been done to this scene, two of them of the same kind with other words.
    rivals = [sample_edit(scene, rng, other, size) for other in (*GENERAL_FAMILIES, family, family)]
    images = [rival.result for rival in rivals if rival.instruction != edit.instruction] + [edit.source]
    # A rival that looks like the exact result would make a correct output count as wrong.
    distinct = [image for image in images if _differ(image, edit.result)]
    return GeneralCase(edit, features(np.stack(distinct)))


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).mean() > 0.01)


@cache
def held_out_sources(count: int, size: int) -> np.ndarray:
    """Renders held-out scenes for effects: ``[count, size, size, 3]``."""
    return np.stack([render(make_scene(FIRST_HELD_OUT + i, "held_out"), size) for i in range(count)])


_judges: dict[tuple[int, int], Judge] = {}
"""By scene and size."""


def judges(count: int, size: int) -> list[Judge]:
    """Returns one judge per held-out scene. Making one takes one core a second; it is kept."""
    missing = [index for index in range(count) if (index, size) not in _judges]
    if missing:
        sources = held_out_sources(count, size)
        with stage("make judges", len(missing)) as advance, ThreadPoolExecutor() as pool:
            made = pool.map(lambda index: Judge.for_source(sources[index], index, EFFECTS), missing)
            for index, judge in zip(missing, made, strict=True):
                _judges[index, size] = judge
                advance(1)
    return [_judges[index, size] for index in range(count)]


def judge_effects(outputs: Mapping[str, np.ndarray], scenes: int) -> dict[str, list[Verdict]]:
    """Judges the outputs of each effect.

    Args:
        outputs: effect name to images ``[N, S, S, 3]`` in [0, 1] of the first held-out scenes in order, once for each noise:
            output i is of scene ``i % scenes``.
        scenes: how many there are; N is a multiple.

    Returns:
        Effect name to its N verdicts.

    Raises:
        ValueError: values that are not finite, pictures of another shape, or another number of them.
    """
    verdicts = {}
    for effect, images in outputs.items():
        if len(images) % scenes:
            raise ValueError(f"expected a multiple of {scenes} outputs of {effect!r}, found {len(images)}")
        known = judges(scenes, images.shape[1])
        verdicts[effect] = [known[i % len(known)].score(image, effect) for i, image in enumerate(images)]
    return verdicts


def general_results(outputs: np.ndarray) -> list[bool]:
    """Returns which of the outputs ``[N, S, S, 3]`` of the first N general cases are correct."""
    cases = general_cases(len(outputs), outputs.shape[1])
    return [case.is_correct(image) for case, image in zip(cases, outputs, strict=True)]
