"""The checks of an update's steps, read from the device in one go; until then the host waits for nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clora.errors import CloraError


@dataclass(frozen=True)
class StepCheck:
    """The outcome of an optimizer step, still on the device: numbers for the report, and the signs of a fault.

    Attributes:
        step: update and LoRA, as in ``update 3: the student``.
        values: numbers for the report, ``[]`` each.
        nonfinite: ``[R]`` bool: rows whose loss is not finite.
        gradient_norm: ``[]`` norm of the gradient of all parameters.
        strength: ``[R]``, largest for the row that most likely spoiled a gradient.
        strongest: describes that row, for the message.
        source: describes where row r comes from.
    """

    step: str
    values: Mapping[str, Tensor]
    nonfinite: Tensor
    gradient_norm: Tensor
    strength: Tensor
    strongest: str
    source: Callable[[int], str]


def raise_first(checks: Sequence[StepCheck]) -> dict[str, float]:
    """Reads the checks of an update, which waits for the device once.

    Returns:
        The numbers of all steps; of two with the same name the later one's.

    Raises:
        CloraError: a loss or a gradient is not finite; describes the first such step.
    """
    # Two flags and then the numbers of each step, in one tensor: reading it is the only wait.
    found = []
    for check in checks:
        found += [check.nonfinite.any(), ~torch.isfinite(check.gradient_norm), *check.values.values()]
    read = iter(torch.stack(found).tolist())
    values = {}
    for check in checks:
        if next(read):
            source = check.source(int(check.nonfinite.nonzero()[0]))
            raise CloraError(
                f"{check.step}'s loss is not finite ({source}); lower the learning rates, or check this effect's teacher"
            )
        if next(read):
            source = check.source(int(check.strength.nan_to_num(torch.inf).argmax()))
            raise CloraError(
                f"{check.step}'s gradient is not finite; the {check.strongest} comes from {source}; lower its learning "
                "rate"
            )
        values |= {name: next(read) for name in check.values}
    return values
