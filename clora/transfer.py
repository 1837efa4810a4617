"""Copies to a device that the host does not wait for.

A plain ``tensor.to(device)`` waits until the device has done all of its work; a training step and a sampler have dozens of
small tensors to send (noise levels, routes, indices).
"""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on a device (and in a dtype); from the CPU's ordinary memory this is safe to reuse at once."""
    return tensor.to(device, dtype or tensor.dtype, non_blocking=torch.device(device).type != "cpu")


def take(tensor: Tensor, rows: Tensor | slice | int) -> Tensor:
    """Rows of a tensor on any device, chosen by int64 indices on the CPU, a slice or a number."""
    return tensor[send(rows, tensor.device) if isinstance(rows, Tensor) else rows]
