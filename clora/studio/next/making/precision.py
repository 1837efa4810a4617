"""The precision in which the studio is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def reduced_precision(device: torch.device) -> Iterator[None]:
    """Computes in bfloat16 on GPUs and on CPUs with AMX, where it is faster; weights stay as they are.

    Attention is computed as products and a softmax: the fused kernel's backward pass in bfloat16 is slow on CPUs.
    """
    if device.type == "cpu" and not torch.cpu._is_amx_tile_supported():
        yield
        return
    with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield
