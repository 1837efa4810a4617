"""The low-rank part alone, added to the output of a base layer that is given: inputs, truth and ways to compute it.

As `bench.linear`, whose parts this takes, but for the layer: its output is an input here, and must not be changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bench import linear
from bench.cases import AddCase
from bench.linear import LinearInputs, expected, run
from bench.providers import BASE, OURS, Builder, Call, Outputs, compiled
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

    def layer(self) -> nn.Linear:
        """A module that gives y: itself where PEFT does not change it, a copy where it adds in place (mixed batches)."""
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
    return _by(inputs, partial(multi_lora_add, backend="eager"))()


def providers(case: AddCase) -> dict[str, Builder]:
    """Name to builder of every provider that can compute the case's mode and number of adapters."""
    shared = {
        BASE: base,
        "baddbmm": linear.baddbmm,
        "eager": lambda inputs: partial(eager, inputs),
        "compiled": compiled_eager,
    }
    if case.mode == "student":
        peft = {"peft": linear.peft_student, "peft_compiled": partial(linear.peft_student, compile=True)}
        return {**shared, **peft, OURS: ours, "ours_fp32_factors": ours_fp32_factors}
    if case.adapters == 1:
        peft = {"peft": linear.peft, "peft_compiled": partial(linear.peft, compile=True)}
    else:
        peft = {"peft_mixed": linear.peft_mixed, "peft_mixed_compiled": partial(linear.peft_mixed, compile=True)}
    return {**shared, **peft, "grouped_mm": linear.grouped_mm, OURS: ours}


def base(inputs: AddInputs) -> Call:
    """A copy of y."""
    return lambda: {"y": inputs.base(inputs.x)}


def compiled_eager(inputs: AddInputs) -> Call:
    """The eager definition under torch.compile."""
    return _by(inputs, compiled(partial(multi_lora_add, backend="eager")))


def ours(inputs: AddInputs) -> Call:
    """`clora.ops.multi_lora_add`."""
    return _by(inputs, multi_lora_add)


def ours_fp32_factors(inputs: AddInputs) -> Call:
    """The same with fp32 factors and gradients over the 16-bit base: what the trainer has."""
    return ours(linear.with_fp32_factors(inputs))


def _by(inputs: AddInputs, op: Callable[..., Tensor]) -> Call:
    """A call of an op with the signature of `clora.ops.multi_lora_add`."""
    scale, ids = inputs.scale, inputs.adapter_ids
    return partial(run, inputs, lambda x, a, b: op(inputs.y, x, a, b, scale, ids))
