"""The low-rank part, added to the output of a base layer that is given: inputs, truth and ways to compute it.

As `bench.linear`, whose parts this takes, but for the layer: its output is an input here, and must not be changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bench import linear
from bench.cases import AddCase
from bench.linear import LinearInputs, by, expected
from bench.providers import BASE, OURS, Builder, Outputs, compiled
from clora.ops import multi_lora_add

__all__ = ["eager", "expected", "make_inputs", "providers"]


@dataclass(frozen=True)
class AddInputs(LinearInputs):
    """Those of a linear layer and its output.

    Attributes:
        y: `[B, T, N]`, frozen.
    """

    y: Tensor

    def base(self, x: Tensor) -> Tensor:
        """A copy of y, for providers that add in place."""
        return self.y.clone()

    def arguments(self, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple:
        """The arguments of `clora.ops.multi_lora_add`."""
        return self.y, x, lora_A, lora_B, self.scale, self.adapter_ids

    def layer(self) -> nn.Linear:
        """A module that returns y: itself where PEFT does not change it, a copy where it adds in place (mixed batches)."""
        layer = super().layer()
        layer.forward = self.base if self.case.adapters > 1 else lambda x: self.y
        return layer


def make_inputs(case: AddCase, device: torch.device, seed: int = 0) -> AddInputs:
    """Random tensors as those of the linear layer."""
    layer = linear.make_inputs(case, device, seed)
    with torch.no_grad():
        return AddInputs(**vars(layer), y=layer.base(layer.x))


def eager(inputs: AddInputs) -> Outputs:
    """The result of clora's eager definition in the dtype of the case."""
    return by(inputs, multi_lora_add, backend="eager")()


def providers(case: AddCase) -> dict[str, Builder]:
    """Name to builder of every provider that can compute the case's mode and number of adapters."""
    found = {
        BASE: lambda inputs: lambda: {"y": inputs.base(inputs.x)},
        "baddbmm": linear.baddbmm,
        "eager": lambda inputs: partial(eager, inputs),
        "compiled": lambda inputs: by(inputs, compiled(partial(multi_lora_add, backend="eager"))),
        **linear.peft_providers(case),
    }
    if case.mode == "forward":
        found["grouped_mm"] = linear.grouped_mm
    found[OURS] = lambda inputs: by(inputs, multi_lora_add)
    if case.mode == "student":
        found["ours_fp32_factors"] = lambda inputs: by(linear.with_fp32_factors(inputs), multi_lora_add)
    return found
