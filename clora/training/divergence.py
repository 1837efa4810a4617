"""Divergence that stays finite: weights that have left the base's size, losses far above their lowest level.

An optimizer such as Adam makes steps of one size whatever the gradient is, so that a rate that is too high lets the factors
walk away without ever reaching infinity, and the normalisations inside a transformer bound the loss.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from math import inf
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from clora.bank.slots import Slots
from clora.config.training import ObjectiveWeights

LARGEST_CHANGE = 10.0
"""Bound of `relative_change`. The studio's teachers have .12, its students .06 to .35 at rates that learn; a tiny model of
random weights still learns at 2. With AdamW at .1 the studio's student passes the bound within ten updates."""
CALM_CHANGE = 1.0
"""A checkpoint with a larger change may be from within an explosion."""
LARGEST_RISE = 10.0
"""Bound of a loss against its lowest level. At rates that learn the studio's rise by up to 1.5."""
CALM_RISE = 3.0
"""A checkpoint with a larger rise may be from within an explosion. So is a run whose flow matching has risen so far and is
worse than predicting nothing: the normalisations of a ruined transformer keep its loss near 2, whatever its lowest level."""
WINDOW = 50
"""The readings whose median is the level of a loss: one batch says little. Medians of 25 readings with a lognormal spread of
1.5, as of single samples, differ by more than `LARGEST_RISE` within 3000."""
SOON = 10
"""The readings that a checkpoint is judged by, sooner; one that is wrongly called unsafe does no harm."""


def base_size(transformer: nn.Module, slots: Slots) -> float:
    """Returns the Frobenius norm of the base's weights in the layers that the first slot changes.

    A layer counts with at least the norm of one that keeps the size of its input, ``out ** .5``: weights of zero, and
    quantised ones or those on ``meta``, whose values cannot be read, have no size of their own.
    """
    square = 0.0
    for module, (a, b) in slots.slot(slots.names[0]).items():
        weight = transformer.get_submodule(module).weight
        shape = (len(b), a.shape[1])
        # The same test as for DoRA's base; a class of its own is a quantised weight.
        plain = type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and not weight.is_meta
        own = weight.detach().float().square().sum().item() if plain and weight.shape == shape else 0.0
        square += max(own, float(shape[0]))
    return square**0.5


@torch.no_grad()
def relative_change(slots: Slots, size: float) -> Tensor:
    """Returns ``|B A| / size`` ``[]`` of the first slot, Frobenius over all layers, on the device; NaN where it overflows."""
    squares = []
    for a, b in slots.slot(slots.names[0]).values():
        # |B A|^2 = tr(B'B A A'): two matrices of rank x rank instead of one of the layer's size.
        squares.append(((b.mT @ b) * (a @ a.mT)).sum())
    # Rounding may leave a sum of zero slightly negative.
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().clamp(min=0).sqrt() / size


class LossLevels:
    """The levels of a run's losses: for each term the median of its last readings, and the lowest that this had.

    Args:
        weights: of the terms of the student's loss.
    """

    def __init__(self, weights: ObjectiveWeights):
        # The loss of flow matching that predicts nothing is above 1, the noise's variance.
        self._nothing = {"anchor": weights.trajectory_anchoring, "critic": 1.0}
        # A level below these counts as these. Distribution matching is relative to the distance from the teacher's picture
        # and may begin near 0, where student and critic begin as the teacher.
        self._floors = {
            "dmd_bs": weights.backward_simulation,
            "dmd_ts": weights.target_simulation,
            **{term: 0.1 * loss for term, loss in self._nothing.items()},
        }
        self._recent: dict[str, deque[float]] = {term: deque(maxlen=WINDOW) for term in self._floors}
        self._lowest: dict[str, float] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Takes the readings of an update."""
        for term, recent in self._recent.items():
            if value := values.get(term):  # 0: the batch had no row of this term
                recent.append(value)
                if len(recent) == WINDOW:
                    level = median(recent)
                    self._lowest[term] = min(self._lowest.get(term, level), level)

    def rises(self, readings: int = WINDOW) -> dict[str, float]:
        """Returns the median of each term's last readings by its lowest level, for terms that have one."""
        return {
            term: median(list(self._recent[term])[-readings:]) / max(lowest, self._floors[term])
            for term, lowest in self._lowest.items()
        }

    def exploded(self) -> dict[str, float]:
        """Returns the rises of the terms that have exploded."""
        return {
            term: rise
            for term, rise in self.rises().items()
            if rise > LARGEST_RISE or (rise > CALM_RISE and median(self._recent[term]) > self._nothing.get(term, inf))
        }

    def state(self) -> dict[str, Any]:
        """Returns what `load_state` restores, for JSON."""
        return {term: [list(recent), self._lowest.get(term)] for term, recent in self._recent.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores the levels; those of a checkpoint of an earlier version begin anew."""
        self._lowest = {}
        for term, recent in self._recent.items():
            readings, lowest = state.get(term, ((), None))
            recent.clear()  # of a checkpoint that was found damaged while it was loaded
            recent.extend(readings)
            if lowest is not None:
                self._lowest[term] = lowest
