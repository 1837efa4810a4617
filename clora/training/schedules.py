"""Learning rates over a run; the shapes of rise and fall are diffusers'.

Source: docs/method.md section 4(d).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from clora.config.training import TrainConfig

LOWEST = 0.02
"""The factor at which a falling rate ends."""


class LearningRates:
    """The learning rates of student and critic.

    ::

        rate   = its setting * rise(update) * (LOWEST + (1 - LOWEST) * fall(done))
        rise   = diffusers' "constant_with_warmup" over train.warmup_updates, once, as the run begins
        fall   = diffusers' train.schedule, from 1 to 0 ("constant": 1), over the share of the phase that is done

    Args:
        train: the settings.
        anchor_share: the share of the run with trajectory anchoring only, which is a phase of its own.
    """

    def __init__(self, train: TrainConfig, anchor_share: float):
        self.train = train
        self.anchor_share = anchor_share
        self._rise = _shape("constant_with_warmup", num_warmup_steps=train.warmup_updates)
        # A phase may end by its updates or by time, so that diffusers' one step is the whole phase, of which we ask for
        # fractions.
        self._fall = _shape(train.schedule, num_warmup_steps=0, num_training_steps=1)

    def at(self, update: int, progress: float, anchoring: bool) -> tuple[float, float]:
        """Returns the rates of student and critic.

        Args:
            update: student updates that the run has made.
            progress: the share of the run that is done, in [0, 1).
            anchoring: whether the phase is trajectory anchoring only.
        """
        train, share = self.train, self.anchor_share
        # A run that was lengthened after its anchoring may be before the new end of that: there the fall has not begun.
        done = progress / share if anchoring else max(0.0, (progress - share) / (1 - share))
        factor = self._rise(update) * (LOWEST + (1 - LOWEST) * self._fall(done))
        student = (anchoring and train.anchor_learning_rate) or train.learning_rate
        return student * factor, train.critic_learning_rate * factor


def _shape(name: str, **settings: int) -> Callable[[float], float]:
    """The factor that one of diffusers' schedules gives to a learning rate, of a step."""
    from diffusers.optimization import get_scheduler

    probe: Any = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    return get_scheduler(name, probe, **settings).lr_lambdas[0]
