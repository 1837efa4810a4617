"""The correctness gate: a provider is timed only where its error against fp64 is at most twice that of eager PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bench.providers import Outputs

FACTOR = 2.0
ROUNDING = torch.finfo(torch.float32).eps
SCALAR_ROUNDINGS = 8
"""Of fp32, allowed for a scalar on top: eager's error of a single number may be zero by luck, a tensor's may not."""


def errors(outputs: Outputs, expected: Outputs) -> dict[str, float]:
    """Per output ``|out - expected| / |expected|`` in L2; infinite where an output is missing or of another shape.

    Args:
        expected: fp64.
    """
    return {name: _error(outputs.get(name), reference) for name, reference in expected.items()}


def bounds(eager: Mapping[str, float], expected: Outputs) -> dict[str, float]:
    """The largest error allowed per output, from the errors of eager PyTorch in the same dtype."""
    # The provider and eager round in the same dtype, in another order: hence an allowance, not equality.
    scalars = {name for name, reference in expected.items() if reference.numel() == 1}
    return {name: FACTOR * error + ROUNDING * SCALAR_ROUNDINGS * (name in scalars) for name, error in eager.items()}


def violation(found: Mapping[str, float], allowed: Mapping[str, float]) -> str | None:
    """Names the output that is off and its error; None where the gate is passed. NaN never passes."""
    for name, bound in allowed.items():
        if not found[name] <= bound:
            return f"{name}: error {found[name]:.2e} against fp64, at most {bound:.2e} allowed"
    return None


def _error(output: Tensor | None, expected: Tensor) -> float:
    if output is None or output.shape != expected.shape:
        return float("inf")
    # By slices, so that no further fp64 copy of a large output is needed.
    output, expected = (t.detach() if t.ndim > 2 else t.detach()[None] for t in (output, expected))
    squared = sum((out.double() - ref).square().sum() for out, ref in zip(output, expected, strict=True))
    norm = sum(ref.square().sum() for ref in expected)
    return float((squared / norm).sqrt())
