"""The three kinds of cases, each with its inputs, its truth and its providers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import linear, linear_providers, loss, stack
from bench.cases import Case, LinearCase, LossCase, StackCase
from bench.providers import Builder


@dataclass(frozen=True)
class Family:
    """How cases of one kind are computed.

    Attributes:
        make_inputs: from a case and a device.
        expected: the outputs in fp64, from the inputs.
        eager: the outputs in eager PyTorch of the case's dtype, whose error sets the gate.
        providers: name to builder, from a case.
    """

    make_inputs: Callable[[Any, torch.device], Any]
    expected: Callable[[Any], dict[str, Tensor]]
    eager: Callable[[Any], dict[str, Tensor]]
    providers: Callable[[Any], dict[str, Builder]]


FAMILIES = {
    LinearCase: Family(linear.make_inputs, linear.expected, linear.eager, linear_providers.providers),
    LossCase: Family(loss.make_inputs, loss.expected, loss.eager, loss.providers),
    StackCase: Family(stack.make_inputs, stack.expected, stack.eager, stack.providers),
}


def family_of(case: Case) -> Family:
    return FAMILIES[type(case)]
