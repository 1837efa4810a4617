"""Every design of the multi-adapter linear layer against every other, on inputs in the order that the trainer makes."""

from __future__ import annotations

from functools import partial

import torch

from bench import linear
from bench.cases import DesignCase
from bench.linear import LinearInputs, base, eager, expected, ours_design
from bench.providers import BASE, OURS, Builder
from csrc_triton.multi_lora.designs import DESIGNS

__all__ = ["eager", "expected", "make_inputs", "providers"]


def make_inputs(case: DesignCase, device: torch.device) -> LinearInputs:
    """Inputs of the linear layer, with factors in the dtype of the case."""
    inputs = linear.make_inputs(case, device)
    return inputs if case.factors == case.dtype else linear.with_fp32_factors(inputs)


def providers(case: DesignCase) -> dict[str, Builder]:
    """The base layer and each design, forced."""
    return {BASE: base} | {f"{OURS}_{design}": partial(ours_design, design=design) for design in DESIGNS}
