"""The numerical operations of clora, on Triton or eager PyTorch (`clora.backend`).

The only module that imports `csrc_triton`, whose kernels it loads when they are first used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clora.backend import Obstacle, use_triton
from csrc_triton.coarse_to_fine import reference as coarse_to_fine
from csrc_triton.coarse_to_fine.reference import ANCHOR, BACKWARD_SIMULATION, TARGET_SIMULATION, Scores
from csrc_triton.multi_lora import reference as multi_lora

__all__ = [
    "ANCHOR",
    "BACKWARD_SIMULATION",
    "TARGET_SIMULATION",
    "Scores",
    "coarse_to_fine_loss",
    "multi_lora_linear",
]

FP64 = Obstacle("its input is fp64, and the kernels compute in fp32", "cast it")
TRAINED_BASE = Obstacle(
    "weight or bias requires a gradient, which the kernels do not compute", "freeze them with requires_grad_(False)"
)


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    adapter_ids: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Linear layer whose samples each add the low-rank delta of their own adapter.

    Meaning, arguments and result: `csrc_triton.multi_lora.reference.multi_lora_linear`. The Triton kernels cover all
    of it but fp64 and a weight or bias that is trained.

    Args:
        backend: `auto`, `triton` or `eager` for this call; None takes `CLORA_BACKEND`.

    Raises:
        ValueError: a shape or dtype is wrong.
        CloraError: Triton was asked for and cannot run this call, or the backend is unknown.
    """
    arguments = (x, weight, bias, lora_A, lora_B, scale, adapter_ids)
    if not use_triton("multi_lora_linear", x.device, _multi_lora_gap(x, weight, bias), backend):
        return multi_lora.multi_lora_linear(*arguments)
    from csrc_triton.multi_lora.op import multi_lora_linear_triton

    return multi_lora_linear_triton(*arguments)


def coarse_to_fine_loss(
    velocity: Tensor,
    x: Tensor,
    sigma: Tensor,
    kind: Tensor,
    weight: Tensor,
    scores: Scores | None,
    anchor_target: Tensor | None,
    guidance: float,
    *,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the student: distribution matching and trajectory anchoring, with its terms.

    Meaning, arguments and result: `csrc_triton.coarse_to_fine.reference.coarse_to_fine_loss`. The Triton kernels cover
    all of it but fp64.

    Args:
        backend: `auto`, `triton` or `eager` for this call; None takes `CLORA_BACKEND`.

    Raises:
        ValueError: a shape is wrong.
        CloraError: Triton was asked for and cannot run this call, or the backend is unknown.
    """
    arguments = (velocity, x, sigma, kind, weight, scores, anchor_target, guidance)
    gap = FP64 if torch.float64 in (velocity.dtype, x.dtype) else None
    if not use_triton("coarse_to_fine_loss", velocity.device, gap, backend):
        return coarse_to_fine.coarse_to_fine_loss(*arguments)
    from csrc_triton.coarse_to_fine.op import coarse_to_fine_loss_triton

    return coarse_to_fine_loss_triton(*arguments)


def _multi_lora_gap(x: Tensor, weight: Tensor, bias: Tensor | None) -> Obstacle | None:
    """What of this call the kernels of `multi_lora_linear` do not cover."""
    if torch.float64 in (x.dtype, weight.dtype):
        return FP64
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    return TRAINED_BASE if trained and torch.is_grad_enabled() else None
