"""Copies to a device that the host does not wait for.

A plain ``tensor.to(device)`` waits until the device has done all of its work; a training step and a sampler have dozens of
tensors to send, from noise levels and routes to encoded prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on a device (and in a dtype); what comes from the CPU's ordinary memory may be changed at once."""
    device, dtype = torch.device(device), dtype or tensor.dtype
    if device.type == "cuda" and tensor.device.type == "cpu":
        # From ordinary memory the driver may wait for the device first. Expanded tensors cannot be pinned.
        tensor = tensor.to(dtype).contiguous().pin_memory()
    return tensor.to(device, dtype, non_blocking=copies_later(device))


def copies_later(device: torch.device) -> bool:
    """Whether a copy to a device may be left to it.

    Not on Apple GPUs: they read the source when they come to it, even where it has been freed since
    (https://github.com/pytorch/pytorch/issues/189690).
    """
    return device.type not in ("cpu", "mps")


def take(tensor: Tensor, rows: Tensor | slice | int) -> Tensor:
    """Rows of a tensor on any device, chosen by int64 indices on the CPU, a slice or a number."""
    return tensor[send(rows, tensor.device) if isinstance(rows, Tensor) else rows]
