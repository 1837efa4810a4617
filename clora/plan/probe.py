"""What the device has and how fast it multiplies."""

from __future__ import annotations

import os
import time

import torch

_SIDE = {"cuda": 8192, "mps": 4096, "cpu": 1024}
_ROUNDS = 5


def device_memory(device: torch.device) -> int | None:
    """Bytes of the device's memory, for the CPU the machine's; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    names = getattr(os, "sysconf_names", {})  # not on Windows
    if device.type == "cpu" and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(names):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def measure_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square matrix product, the best of a few rounds; under a second."""
    side = _SIDE[device.type]
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    a @ b
    return 2 * side**3 / min(_timed(a, b) for _ in range(_ROUNDS))


def _timed(a: torch.Tensor, b: torch.Tensor) -> float:
    _synchronize(a.device)
    start = time.perf_counter()
    a @ b
    _synchronize(a.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
