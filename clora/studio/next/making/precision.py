"""The precision in which the studio is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from clora.devices import has_amx


@contextmanager
def reduced_precision(device: torch.device) -> Iterator[None]:
    """Computes in bfloat16 on GPUs and on CPUs that multiply in it, where it is faster; weights stay as they are."""
    if device.type == "cpu" and not (has_amx() or _has_avx512_bf16()):
        yield
        return
    with torch.autocast(device.type, torch.bfloat16):
        yield


def _has_avx512_bf16() -> bool:
    """Reports whether the CPU has the AVX-512 instructions for products in bfloat16; False before PyTorch 2.11.

    On an AMD EPYC of two cores products of the base's sizes took .4 of the time of float32, an update .6.
    """
    return getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
