"""The numerical operations of clora, on Triton kernels or eager PyTorch.

First the choice of the backend, then the ops. `auto` (the default) takes Triton for tensors on an NVIDIA GPU. Elsewhere, on
AMD GPUs too, it takes eager PyTorch and logs the reason once. `triton` and `eager` insist; `triton` runs on AMD GPUs.
The environment variable `CLORA_BACKEND` chooses, or for one call the op's argument `backend`.

Only this module imports `csrc_triton`, whose kernels it loads when they are first used.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clora.errors import CloraError, nearest
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


VARIABLE = "CLORA_BACKEND"
BACKENDS = ("auto", "triton", "eager")
MIN_CAPABILITY = (8, 0)
"""Oldest NVIDIA GPU that Triton supports (Ampere)."""

logger = logging.getLogger(__name__)


class Obstacle(NamedTuple):
    """The reason why the kernels cannot run, and the user's remedy, if one exists."""

    reason: str
    remedy: str = ""


def use_triton(op: str, device: torch.device, backend: str | None = None) -> bool:
    """Chooses the Triton kernels for a call, as far as the machine decides; `covered` decides by the arguments.

    Args:
        op: name of the op, for messages.
        device: where its tensors are.
        backend: `auto`, `triton` or `eager`; None takes `CLORA_BACKEND`, and `auto` where that is unset or empty.

    Raises:
        CloraError: the backend's name is unknown, or it is `triton` and the kernels cannot run there.
    """
    choice = _choice(backend)
    if choice == "eager":
        return False
    obstacle = _obstacle(device, explicit=choice == "triton")
    if obstacle is not None:
        _fall_back(op, obstacle, device.type, backend)
    return obstacle is None


def covered(op: str, gap: str | None, device: torch.device, backend: str | None = None) -> bool:
    """Chooses the Triton kernels for a call that `use_triton` allowed, unless its arguments are beyond them.

    Args:
        gap: the part of this call that they do not compute, or None.

    Raises:
        CloraError: there is a gap and the backend is `triton`.
    """
    if gap is not None:
        _fall_back(op, Obstacle(f"the kernels of {op} do not cover this call ({gap})"), device.type, backend)
    return gap is None


# So that torch.compile evaluates the choice while it traces and keeps the answer. This is all that
# torch.compiler.assume_constant_result does, but calling it here would import torch._dynamo, which takes seconds.
use_triton._dynamo_marked_constant = covered._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _choice(backend: str | None) -> str:
    choice = os.environ.get(VARIABLE) or "auto" if backend is None else backend
    if choice not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise CloraError(f"{_source(backend)}: expected one of {known}{nearest(str(choice).lower(), BACKENDS)}")
    return choice


def _source(backend: str | None) -> str:
    """Returns the variable or argument that chose the backend, for messages."""
    return f"{VARIABLE}={os.environ.get(VARIABLE, '')}" if backend is None else f"backend={backend!r}"


def _fall_back(op: str, obstacle: Obstacle, device_type: str, backend: str | None) -> None:
    """Raises if the user chose Triton; otherwise logs why eager PyTorch runs."""
    if _choice(backend) == "triton":
        remedy = f"{obstacle.remedy}, or use" if obstacle.remedy else "use"
        found = f"{_source(backend)}, but {op} cannot run on Triton: {obstacle.reason}"
        raise CloraError(f"{found}; {remedy} backend 'auto'")
    _report(obstacle.reason, device_type)


def _obstacle(device: torch.device, explicit: bool) -> Obstacle | None:
    """Finds the obstacle to every kernel on a device. `auto` imports Triton only on NVIDIA GPUs."""
    off_gpu = device.type != "cuda"  # AMD GPUs are "cuda" too
    no_gpu = Obstacle(
        f"the tensors are on {device.type}, and the kernels need a GPU",
        "move them to one, or for tests start Python with TRITON_INTERPRET=1 to interpret the kernels, slowly",
    )
    # `auto` decides without Triton where it can: importing it takes seconds.
    if off_gpu and not explicit:
        return no_gpu
    if torch.version.hip and not explicit:
        return Obstacle(f"{device} is an AMD GPU, on which they have never run ({VARIABLE}=triton runs them there)")
    if error := _import_error():
        return Obstacle(f"Triton cannot be imported ({error})", "install it with `pip install triton` (Linux)")
    if interpreting():
        return None if explicit else Obstacle("TRITON_INTERPRET is set, a mode for tests", "unset it")
    if off_gpu:
        return no_gpu
    if not torch.version.hip and (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        found, needed = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
        return Obstacle(f"{device} has compute capability {found}, and Triton needs {needed}")
    return None


@functools.cache
def _import_error() -> str:
    """Returns the error of importing Triton; empty if it can be imported."""
    try:
        import triton.language  # noqa: F401
    except Exception as error:  # a broken installation raises more than ImportError
        return f"{type(error).__name__}: {error}"
    return ""


def interpreting() -> bool:
    """Detects that Triton, which must be importable, was imported to interpret kernels."""
    from csrc_triton.registration import INTERPRETED

    return INTERPRETED


@functools.cache
def _report(reason: str, device_type: str) -> None:
    """Logs a fallback, once per reason: expected on a CPU, worth a warning on a GPU."""
    level = logging.WARNING if device_type == "cuda" else logging.INFO
    logger.log(level, "running on eager PyTorch instead of the Triton kernels: %s", reason)


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

    Meaning, arguments and result: `csrc_triton.multi_lora.reference.multi_lora_linear`. The calls that the Triton
    kernels do not cover: `csrc_triton.multi_lora.op.unsupported`.

    Args:
        backend: `auto`, `triton` or `eager` for this call; None takes `CLORA_BACKEND`.

    Raises:
        ValueError: a shape or dtype is wrong.
        CloraError: the backend is `triton` and cannot run this call, or it is unknown.
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

    Exactly this, layer by layer, on eager PyTorch and where the kernels do not cover one of the layers.

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

    Meaning, arguments and result: `csrc_triton.multi_lora.reference.multi_lora_add`. The calls that the Triton kernels
    do not cover: `csrc_triton.multi_lora.op.unsupported_add`.

    Args:
        backend: as in `multi_lora_linear`.

    Raises:
        ValueError, CloraError: as `multi_lora_linear`.
    """
    arguments = (y, x, lora_A, lora_B, scale, adapter_ids)
    if use_triton("multi_lora_add", x.device, backend):
        from csrc_triton.multi_lora.op import multi_lora_add_triton, unsupported_add

        if covered("multi_lora_add", unsupported_add(*arguments), x.device, backend):
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
        CloraError: the backend is `triton` and cannot run this call, or it is unknown.
    """
    arguments = (velocity, x, sigma, kind, weight, scores, anchor_target, guidance)
    if use_triton("coarse_to_fine_loss", velocity.device, backend):
        from csrc_triton.coarse_to_fine.op import coarse_to_fine_loss_triton, unsupported

        if covered("coarse_to_fine_loss", unsupported(*arguments), velocity.device, backend):
            return coarse_to_fine_loss_triton(*arguments)
    return coarse_to_fine.coarse_to_fine_loss(*arguments)
