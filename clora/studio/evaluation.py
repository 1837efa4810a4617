"""Evaluation on held-out scenes: effects against the judges, general edits against their exact results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from clora.studio.edits import FAMILIES, Edit, sample_edit
from clora.studio.effects import EFFECTS
from clora.studio.judges import Judge, Verdict, features
from clora.studio.scenes import Scene, make_scene, render

FIRST_HELD_OUT = 1_000_000_000
FIRST_GENERAL = 1_100_000_000
GENERAL_FAMILIES = tuple(name for name, family in FAMILIES.items() if not family.random)


@dataclass(frozen=True)
class GeneralCase:
    """One held-out general edit: its source image, the edit, and the feature vectors it must be told apart from.

    Attributes:
        source: ``[64, 64, 3]``.
        edit: the requested edit with its exact result.
        others: ``[K, F]`` features of the unchanged source and of other edits of the same scene, two of them of the
            same kind with other words.
    """

    source: np.ndarray
    edit: Edit
    others: np.ndarray

    def is_correct(self, output: np.ndarray) -> bool:
        """Whether the exact result is nearer to ``output`` than anything else."""
        vectors = features(np.stack([output, self.edit.result]))
        return bool(np.linalg.norm(vectors[0] - vectors[1]) < np.linalg.norm(self.others - vectors[0], axis=1).min())


@cache
def held_out_sources(count: int) -> np.ndarray:
    """Held-out scenes for effects: ``[count, 64, 64, 3]``."""
    return np.stack([render(make_scene(FIRST_HELD_OUT + i)) for i in range(count)])


@cache
def judges(count: int) -> tuple[Judge, ...]:
    """One judge per held-out scene."""
    return tuple(Judge.for_source(source, seed=i) for i, source in enumerate(held_out_sources(count)))


@cache
def general_cases(count: int) -> tuple[GeneralCase, ...]:
    """Held-out general edits, the kinds of edit in turn."""
    return tuple(_general_case(i) for i in range(count))


def _general_case(index: int) -> GeneralCase:
    scene = make_scene(FIRST_GENERAL + index)
    rng = np.random.default_rng([index, 5])
    family = GENERAL_FAMILIES[index % len(GENERAL_FAMILIES)]
    edit = _visible_edit(scene, rng, family)
    rivals = [sample_edit(scene, rng, other) for other in (*GENERAL_FAMILIES, family, family)]
    images = [r.result for r in rivals if r.instruction != edit.instruction] + [render(scene)]
    distinct = [image for image in images if _differ(image, edit.result)]
    return GeneralCase(render(scene), edit, features(np.stack(distinct)))


def _visible_edit(scene: Scene, rng: np.random.Generator, family: str) -> Edit:
    """An edit that shows: not the removal of a shape that is hidden behind another."""
    source = render(scene)
    draws = [sample_edit(scene, rng, family) for _ in range(8)]
    return next((edit for edit in draws if _differ(edit.result, source)), draws[0])


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).mean() > 0.01)


def judge_effects(
    outputs: Mapping[str, np.ndarray], report: Callable[[int], None] = lambda effects: None
) -> dict[str, list[Verdict]]:
    """Verdicts of effect name to outputs ``[N, 64, 64, 3]`` on the first N held-out scenes, in order.

    ``report(1)`` is called after each effect.
    """
    verdicts = {}
    for effect, images in outputs.items():
        verdicts[effect] = [
            judge.score(image, effect) for judge, image in zip(judges(len(images)), images, strict=True)
        ]
        report(1)
    return verdicts


def general_accuracy(outputs: Sequence[np.ndarray]) -> float:
    """Share of correct outputs of the first ``len(outputs)`` general cases."""
    cases = general_cases(len(outputs))
    return float(np.mean([case.is_correct(image) for case, image in zip(cases, outputs, strict=True)]))


def summary(verdicts: Mapping[str, Sequence[Verdict]], general: float | None) -> dict[str, object]:
    """The measured columns of one row of the results table."""
    everything = [v for row in verdicts.values() for v in row]
    stochastic = [v for name, row in verdicts.items() if EFFECTS[name].stochastic for v in row]
    psnrs = [v.psnr for v in everything if v.psnr is not None]
    return {
        "effect_accuracy": _mean([v.accurate for v in everything]),
        "bad_case_rate": _mean([v.bad_case for v in everything]),
        "bad_case_rate_stochastic": _mean([v.bad_case for v in stochastic]),
        "psnr": _mean(psnrs),
        "subject_alignment": _mean([v.subject_alignment for v in everything]),
        "general_accuracy": general,
        "per_effect": {name: _mean([v.accurate for v in row]) for name, row in verdicts.items()},
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
