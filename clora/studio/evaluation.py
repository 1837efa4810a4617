"""Evaluation on held-out scenes: effects against the judges, general edits against their exact results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from clora.studio.edits import FAMILIES, Edit, sample_edit
from clora.studio.judges import Judge, Verdict, features
from clora.studio.scenes import make_scene, render

NUM_SCENES = 8  # on which each effect is judged
NUM_GENERAL = 54
FIRST_HELD_OUT = 1_000_000_000
FIRST_GENERAL = 1_100_000_000
GENERAL_FAMILIES = tuple(name for name, family in FAMILIES.items() if not family.random)


@dataclass(frozen=True)
class GeneralCase:
    """One held-out general edit.

    Attributes:
        source: ``[64, 64, 3]``.
        edit: the requested edit with its exact result.
        others: ``[K, F]`` features that a correct output must be further from: those of the unchanged source and of
            other edits of the same scene, two of them of the same kind with other words.
    """

    source: np.ndarray
    edit: Edit
    others: np.ndarray

    def is_correct(self, output: np.ndarray) -> bool:
        """Decides whether the exact result is nearer to ``output`` than anything else."""
        found, exact = features(np.stack([output, self.edit.result]))
        return bool(np.linalg.norm(found - exact) < np.linalg.norm(self.others - found, axis=1).min())


@cache
def held_out_sources(count: int) -> np.ndarray:
    """Renders held-out scenes for effects: ``[count, 64, 64, 3]``."""
    return np.stack([render(make_scene(FIRST_HELD_OUT + i)) for i in range(count)])


@cache
def judges(count: int) -> tuple[Judge, ...]:
    """Makes one judge per held-out scene."""
    return tuple(Judge.for_source(source, seed=i) for i, source in enumerate(held_out_sources(count)))


@cache
def general_cases(count: int) -> tuple[GeneralCase, ...]:
    """Draws held-out general edits, the kinds of edit in turn."""
    return tuple(map(_general_case, range(count)))


def _general_case(index: int) -> GeneralCase:
    scene = make_scene(FIRST_GENERAL + index)
    source = render(scene)
    rng = np.random.default_rng([index, 5])
    family = GENERAL_FAMILIES[index % len(GENERAL_FAMILIES)]
    # The first draw that shows: the removal of a shape that is hidden behind another does not.
    draws = [sample_edit(scene, rng, family) for _ in range(8)]
    edit = next((edit for edit in draws if _differ(edit.result, source)), draws[0])
    # Other things that could have been done to this scene, two of them of the same kind with other words.
    rivals = [sample_edit(scene, rng, other) for other in (*GENERAL_FAMILIES, family, family)]
    images = [rival.result for rival in rivals if rival.instruction != edit.instruction] + [source]
    # A rival that looks like the exact result would make a correct output count as wrong.
    distinct = [image for image in images if _differ(image, edit.result)]
    return GeneralCase(source, edit, features(np.stack(distinct)))


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).mean() > 0.01)


def judge_effects(
    outputs: Mapping[str, np.ndarray], report: Callable[[int], None] = lambda effects: None
) -> dict[str, list[Verdict]]:
    """Judges the outputs of each effect.

    Args:
        outputs: effect name to images ``[N, 64, 64, 3]`` of the first N held-out scenes, in order.
        report: called as ``report(1)`` after each effect.

    Returns:
        Effect name to its N verdicts.
    """
    verdicts = {}
    for effect, images in outputs.items():
        pairs = zip(judges(len(images)), images, strict=True)
        verdicts[effect] = [judge.score(image, effect) for judge, image in pairs]
        report(1)
    return verdicts


def general_accuracy(outputs: Sequence[np.ndarray]) -> float:
    """Returns the share of correct outputs of the first ``len(outputs)`` general cases."""
    cases = general_cases(len(outputs))
    return float(np.mean([case.is_correct(image) for case, image in zip(cases, outputs, strict=True)]))
