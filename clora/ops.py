"""The numerical operations of clora, on Triton or eager PyTorch (`clora.backend`).

The only module that imports the ops of `csrc_triton`, whose kernels it loads when they are first used.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from clora.backend import covered, use_triton
from csrc_triton.coarse_to_fine import reference as coarse_to_fine
from csrc_triton.coarse_to_fine.reference import ANCHOR, BACKWARD_SIMULATION, TARGET_SIMULATION, Scores
from csrc_triton.multi_lora import reference as multi_lora

__all__ = [
    "ANCHOR",
    "BACKWARD_SIMULATION",
    "TARGET_SIMULATION",
    "Scores",
    "coarse_to_fine_loss",
    "multi_lora_add",
    "multi_lora_linear",
    "multi_lora_linears",
]


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

    Meaning, arguments and result: `csrc_triton.multi_lora.reference.multi_lora_linear`. What the Triton
    kernels cover of it: `csrc_triton.multi_lora.op.unsupported`.

    Args:
        backend: `auto`, `triton` or `eager` for this call; None takes `CLORA_BACKEND`.

    Raises:
        ValueError: a shape or dtype is wrong.
        CloraError: Triton was asked for and cannot run this call, or the backend is unknown.
    """
    arguments = (x, weight, bias, lora_A, lora_B, scale, adapter_ids)
    if use_triton("multi_lora_linear", x.device, backend):
        from csrc_triton.multi_lora.op import multi_lora_linear_triton, unsupported

        if covered("multi_lora_linear", unsupported(*arguments), x.device, backend):
            return multi_lora_linear_triton(*arguments, checked=True)
    return multi_lora.multi_lora_linear(*arguments)


def multi_lora_linears(
    x: Tensor,
    projections: Sequence[tuple[Tensor, Tensor | None, Tensor, Tensor]],
    scale: Tensor,
    adapter_ids: Tensor,
    *,
    backend: str | None = None,
) -> list[Tensor]:
    """Several layers of one input (q, k and v; gate and up); the Triton kernels read it once for their ranks.

    ::

        [multi_lora_linear(x, weight, bias, lora_A, lora_B, scale, adapter_ids)
         for weight, bias, lora_A, lora_B in projections]

    Layer by layer, exactly so, where eager PyTorch computes or the kernels do not cover one of the layers.

    Args:
        projections: ``(weight, bias, lora_A, lora_B)`` of each layer; ranks and outputs may differ.
        backend: as in `multi_lora_linear`.

    Returns:
        ``[B, T, N]`` per layer.

    Raises:
        ValueError, CloraError: as `multi_lora_linear`.
    """
    if use_triton("multi_lora_linears", x.device, backend):
        from csrc_triton.multi_lora import op

        if not any(op.unsupported(x, *projection, scale, adapter_ids) for projection in projections):
            return op.multi_lora_linears(x, projections, scale, adapter_ids, checked=True)
    return [multi_lora_linear(x, *projection, scale, adapter_ids, backend=backend) for projection in projections]


def multi_lora_add(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    adapter_ids: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Adds each sample's low-rank delta to the output of a base layer that was computed elsewhere.

    Meaning, arguments and result: `csrc_triton.multi_lora.reference.multi_lora_add`. What the Triton kernels cover of
    it: `csrc_triton.multi_lora.add.unsupported`.

    Args:
        backend: as in `multi_lora_linear`.

    Raises:
        ValueError, CloraError: as `multi_lora_linear`.
    """
    arguments = (y, x, lora_A, lora_B, scale, adapter_ids)
    if use_triton("multi_lora_add", x.device, backend):
        from csrc_triton.multi_lora.add import multi_lora_add_triton, unsupported

        if covered("multi_lora_add", unsupported(*arguments), x.device, backend):
            return multi_lora_add_triton(*arguments)
    return multi_lora.multi_lora_add(*arguments)


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
    all of it but fp64 (`csrc_triton.coarse_to_fine.op.unsupported`).

    Args:
        backend: `auto`, `triton` or `eager` for this call; None takes `CLORA_BACKEND`.

    Raises:
        ValueError: a shape is wrong.
        CloraError: Triton was asked for and cannot run this call, or the backend is unknown.
    """
    arguments = (velocity, x, sigma, kind, weight, scores, anchor_target, guidance)
    if use_triton("coarse_to_fine_loss", velocity.device, backend):
        from csrc_triton.coarse_to_fine.op import coarse_to_fine_loss_triton, unsupported

        if covered("coarse_to_fine_loss", unsupported(*arguments), velocity.device, backend):
            return coarse_to_fine_loss_triton(*arguments)
    return coarse_to_fine.coarse_to_fine_loss(*arguments)
