"""The precision in which the studio is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from clora.devices import has_amx


@contextmanager
def reduced_precision(device: torch.device) -> Iterator[None]:
    """Computes in bfloat16 on GPUs and on CPUs with AMX, where it is faster; weights stay as they are."""
    if device.type == "cpu" and not has_amx():
        yield
        return
    with torch.autocast(device.type, torch.bfloat16):
        yield
