"""The precision in which the studio is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from clora.devices import multiplies_bfloat16


@contextmanager
def reduced_precision(device: torch.device) -> Iterator[None]:
    """Computes in bfloat16 on GPUs and on CPUs that multiply in it, where it is faster; weights stay as they are."""
    if device.type == "cpu" and not multiplies_bfloat16():
        yield
        return
    with torch.autocast(device.type, torch.bfloat16):
        yield
