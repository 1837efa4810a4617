"""What the steps of an update leave on the device, read in one go when it is done; before, the host waits for nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clora.errors import CloraError


class Fault(NamedTuple):
    """What ends the run if it happened.

    Attributes:
        happened: ``[]`` bool, on the device.
        message: tells it; called if it happened.
    """

    happened: Tensor
    message: Callable[[], str]


@dataclass(frozen=True)
class Readings:
    """Numbers for the report, ``[]`` each and on the device, and possible faults in the order in which they arose."""

    values: Mapping[str, Tensor]
    faults: tuple[Fault, ...] = ()

    def __or__(self, later: Readings) -> Readings:
        return Readings({**self.values, **later.values}, self.faults + later.faults)

    def read(self) -> dict[str, float]:
        """The numbers; waits for the device, once. Raises CloraError for the first fault that happened."""
        found = torch.stack([*self.values.values(), *(fault.happened for fault in self.faults)]).tolist()
        for happened, fault in zip(found[len(self.values) :], self.faults, strict=True):
            if happened:
                raise CloraError(fault.message())
        return dict(zip(self.values, found, strict=False))


class Rows(NamedTuple):
    """What a step says of its rows.

    Attributes:
        nonfinite: ``[R]`` bool: a row's loss is not finite.
        strength: ``[R]``, by which the row that most likely spoiled a gradient is found.
        strongest: what strength is, for the message.
        source: tells where row r comes from.
    """

    nonfinite: Tensor
    strength: Tensor
    strongest: str
    source: Callable[[int], str]


def step_faults(step: str, rows: Rows, gradient_norm: Tensor) -> tuple[Fault, Fault]:
    """A loss and a gradient that are not finite.

    Args:
        step: update and slot, as in ``update 3: the student``.
        rows: the step's.
        gradient_norm: ``[]`` of all parameters.
    """

    def of_loss() -> str:
        source = rows.source(int(rows.nonfinite.nonzero()[0]))
        return f"{step}'s loss is not finite ({source}); lower the learning rates, or check this effect's teacher"

    def of_gradient() -> str:
        source = rows.source(int(rows.strength.nan_to_num(torch.inf).argmax()))
        return f"{step}'s gradient is not finite; the {rows.strongest} comes from {source}; lower its learning rate"

    return Fault(rows.nonfinite.any(), of_loss), Fault(~torch.isfinite(gradient_norm), of_gradient)
