"""The checks of an update's steps, read from the device in one go; until then the host waits for nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clora.errors import CloraError
from clora.training.divergence import LARGEST_CHANGE, LossLevels

LOSSES = ("loss", "anchor", "dmd_bs", "dmd_ts", "critic")
"""Names of the student's loss, its terms and the critic's loss among an update's numbers."""


@dataclass(frozen=True)
class StepCheck:
    """The outcome of an optimizer step, still on the device: numbers for the report, and the signs of a fault.

    Attributes:
        step: the LoRA, as in ``the student``.
        values: numbers for the report, ``[]`` each.
        nonfinite: ``[R]`` bool: rows whose loss is not finite.
        gradient_norm: ``[]`` norm of the gradient of all parameters.
        change: ``[]`` `relative_change` of the LoRA after the step.
        strength: ``[R]``, largest for the row that most likely spoiled a gradient.
        strongest: describes that row, for the message.
        rates: settings of its learning rate.
        source: describes where row r comes from.
    """

    step: str
    values: Mapping[str, Tensor]
    nonfinite: Tensor
    gradient_norm: Tensor
    change: Tensor
    strength: Tensor
    strongest: str
    rates: str
    source: Callable[[int], str]

    @property
    def strongest_source(self) -> str:
        """Describes the row that most likely spoiled the step; waits for the device."""
        return f"the {self.strongest} comes from {self.source(int(self.strength.nan_to_num(torch.inf).argmax()))}"


def raise_first(checks: Sequence[StepCheck]) -> dict[str, float]:
    """Reads the checks of an update, which waits for the device once.

    Returns:
        The numbers of all steps, and for each LoRA, such as the student, ``student_gradient`` and ``student_change``, the norm of
        its gradient and `StepCheck.change`; of two with the same name the later one's.

    Raises:
        CloraError: a loss or a gradient is not finite, or the weights have exploded; describes the first such step.
    """
    # A flag, the norm, the change and then the numbers of each step, in one tensor: reading it is the only wait.
    found = []
    for check in checks:
        found += [check.nonfinite.any(), check.gradient_norm, check.change, *check.values.values()]
    read = iter(torch.stack(found).tolist())
    values = {}
    for check in checks:
        if next(read):
            source = check.source(int(check.nonfinite.nonzero()[0]))
            raise CloraError(
                f"{check.step}'s loss is not finite ({source}); lower the learning rates, or check this effect's teacher"
            )
        norm, change = next(read), next(read)
        if not math.isfinite(norm):
            raise CloraError(f"{check.step}'s gradient is not finite; {check.strongest_source}; lower {check.rates}")
        if not change <= LARGEST_CHANGE:
            raise CloraError(
                f"{check.step}'s weights have exploded: they change the base by {change:.3g} times its own size, expected "
                f"at most {LARGEST_CHANGE:g}; {check.strongest_source}; lower {check.rates}"
            )
        values |= {name: next(read) for name in check.values}
        name = check.step.removeprefix("the ")
        values |= {f"{name}_gradient": norm, f"{name}_change": change}
    return values


def raise_explosion(checks: Sequence[StepCheck], levels: LossLevels) -> None:
    """Raises CloraError if a loss of these steps has risen far above its lowest level."""
    rises = levels.exploded()
    for check in checks:
        for term in check.values:
            if term in rises:
                raise CloraError(
                    f"{check.step}'s loss has exploded: its term {term} is {rises[term]:.3g} times its lowest level; "
                    f"{check.strongest_source}; lower the learning rates"
                )
