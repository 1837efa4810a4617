"""Which implementation the ops of `clora.ops` run on: the Triton kernels or eager PyTorch.

`auto` (the default) takes Triton for tensors on an NVIDIA GPU and eager PyTorch elsewhere, on AMD GPUs too, and says once
in the log why it fell back. `triton` and `eager` insist; `triton` runs on AMD GPUs. Chosen by the environment variable
`CLORA_BACKEND`, or for one call by the op's argument `backend`.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import NamedTuple

import torch

from clora.errors import CloraError, nearest

VARIABLE = "CLORA_BACKEND"
BACKENDS = ("auto", "triton", "eager")
MIN_CAPABILITY = (8, 0)
"""Oldest NVIDIA GPU that Triton supports (Ampere)."""

logger = logging.getLogger(__name__)


class Obstacle(NamedTuple):
    """Why the kernels cannot run, and what would let them, if anything short of eager PyTorch."""

    reason: str
    remedy: str = ""


def use_triton(op: str, device: torch.device, backend: str | None = None) -> bool:
    """Whether a call may run on the Triton kernels, as far as the machine goes; `covered` says the rest.

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
    """Whether the kernels compute this call of an op, after `use_triton`.

    Args:
        gap: what they do not compute in it, or None.

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
    """How the backend was chosen, for messages."""
    return f"{VARIABLE}={os.environ.get(VARIABLE, '')}" if backend is None else f"backend={backend!r}"


def _fall_back(op: str, obstacle: Obstacle, device_type: str, backend: str | None) -> None:
    """Raises if Triton was asked for; otherwise logs why eager PyTorch runs."""
    if _choice(backend) == "triton":
        remedy = f"{obstacle.remedy}, or use" if obstacle.remedy else "use"
        found = f"{_source(backend)}, but {op} cannot run on Triton: {obstacle.reason}"
        raise CloraError(f"{found}; {remedy} backend 'auto'")
    _report(obstacle.reason, device_type)


def _obstacle(device: torch.device, explicit: bool) -> Obstacle | None:
    """What keeps every kernel from running on this device. `auto` imports Triton on NVIDIA GPUs alone."""
    off_gpu = device.type != "cuda"  # AMD GPUs are "cuda" too
    no_gpu = Obstacle(
        f"the tensors are on {device.type}, and the kernels need a GPU",
        "move them to one, or for tests start Python with TRITON_INTERPRET=1 to interpret the kernels, slowly",
    )
    if off_gpu and not explicit:
        return no_gpu
    if torch.version.hip and not explicit:
        return Obstacle(f"{device} is an AMD GPU, on which they have never run ({VARIABLE}=triton runs them there)")
    if error := _import_error():
        return Obstacle(f"Triton cannot be imported ({error})", "install it with `pip install triton` (Linux)")
    if interpreting():
        return None if explicit else Obstacle("TRITON_INTERPRET is set, a mode for tests", "unset it")
    return no_gpu if off_gpu else _too_old(device)


def _too_old(device: torch.device) -> Obstacle | None:
    if torch.version.hip or (found := torch.cuda.get_device_capability(device)) >= MIN_CAPABILITY:
        return None
    versions = (".".join(map(str, version)) for version in (found, MIN_CAPABILITY))
    return Obstacle("{} has compute capability {}, and Triton needs {}".format(device, *versions))


@functools.cache
def _import_error() -> str:
    """Why Triton cannot be imported; empty if it can."""
    try:
        import triton.language  # noqa: F401
    except Exception as error:  # a broken installation raises more than ImportError
        return f"{type(error).__name__}: {error}"
    return ""


def interpreting() -> bool:
    """Whether Triton was imported to interpret kernels; only where it can be imported."""
    from csrc_triton.registration import INTERPRETED

    return INTERPRETED


@functools.cache
def _report(reason: str, device_type: str) -> None:
    """Logs a fallback, once per reason: expected on a CPU, worth a warning on a GPU."""
    level = logging.WARNING if device_type == "cuda" else logging.INFO
    logger.log(level, "running on eager PyTorch instead of the Triton kernels: %s", reason)
