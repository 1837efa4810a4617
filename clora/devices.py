"""Devices by name, models moved to them, and copies that the host does not wait for.

A plain ``tensor.to(device)`` waits until the device has done all of its work. A training step and a sampler have dozens
of tensors to send, from noise levels and routes to encoded prompts.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clora.errors import CloraError, check_device_name

DTYPES = ("float32", "bfloat16")
"""The names of those that a run computes in."""


def send(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Copies a tensor to a device (and a dtype); a source in the CPU's ordinary memory may be changed at once."""
    device = torch.device(device)
    dtype = dtype or tensor.dtype
    if device.type == "cuda" and tensor.device.type == "cpu":
        # From ordinary memory the driver may wait for the device first. Expanded tensors cannot be pinned.
        tensor = tensor.to(dtype).contiguous().pin_memory()
    return tensor.to(device, dtype, non_blocking=copies_later(device))


def copies_later(device: torch.device) -> bool:
    """Returns True where a copy to a device may be left to it.

    Apple GPUs are not among these: they read the source when they come to it, even where it has been freed since
    (https://github.com/pytorch/pytorch/issues/189690).
    """
    return device.type not in ("cpu", "mps")


def take(tensor: Tensor, rows: Tensor | slice | int) -> Tensor:
    """Returns rows of a tensor on any device, chosen by int64 indices on the CPU, a slice or a number."""
    return tensor[send(rows, tensor.device) if isinstance(rows, Tensor) else rows]


def move(model: nn.Module, device: torch.device) -> None:
    """Moves a model to a device; one in 8 bits by bitsandbytes cannot be moved and stays where it was loaded."""
    if not getattr(model, "is_loaded_in_8bit", False):
        model.to(device)


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Moves a model to a device for the duration of a block."""
    home = model.device
    move(model, device)
    try:
        yield
    finally:
        move(model, home)


def find_device(device: str) -> torch.device:
    """Returns the device of this name; ``auto`` is cuda where torch finds a GPU, else the CPU.

    Raises:
        CloraError: no device has this name, or torch does not find it.
    """
    check_device_name(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise CloraError(
            f"device {device!r}: torch finds {torch.cuda.device_count()} CUDA devices; use another or auto"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise CloraError(f"device {device!r}: torch finds no Apple GPU; use another or auto")
    return torch.device(device)


def find_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of this name; ``auto`` is that of `auto_dtype`."""
    return getattr(torch, auto_dtype(device) if dtype == "auto" else dtype)


def auto_dtype(device: torch.device) -> str:
    """Returns the name of the dtype that ``auto`` is for a new run: bfloat16 on CUDA and on CPUs with AMX, else float32."""
    is_fast = device.type == "cuda" or (device.type == "cpu" and has_amx())
    return "bfloat16" if is_fast else "float32"


def has_amx() -> bool:
    """Reports whether the CPU multiplies matrices in bfloat16 by AMX; False before PyTorch 2.11, which does not say.

    False, too, where the user keeps oneDNN, which multiplies, from AMX.
    """
    return _has("amx_bf16", "AMX")


def multiplies_bfloat16() -> bool:
    """Reports whether the CPU multiplies matrices in bfloat16, by AMX or AVX-512; False before PyTorch 2.11.

    Other CPUs take longer in bfloat16 than in float32, most of them several times as long. With AVX-512 (an AMD EPYC of two
    cores) products of the studio's sizes took .4 of the time of float32, an update of its base .6.
    """
    return has_amx() or _has("avx512_bf16", "AMX", "BF16", "AVX10")


def _has(instructions: str, *limits: str) -> bool:
    """Reports whether the CPU has instructions and oneDNN may use them: its limit is none, or names one of ``limits``.

    https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
    """
    limit = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL").upper()
    may = limit in ("ALL", "DEFAULT") or any(name in limit for name in limits)
    return may and getattr(torch.cpu, "get_capabilities", dict)().get(instructions, False)


def earlier_auto(device: torch.device) -> str:
    """Returns the name of the dtype that ``auto`` was before runs recorded what they computed in."""
    return "bfloat16" if device.type == "cuda" else "float32"


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name that configs and records have for a dtype, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def peak_memory_gb(device: torch.device) -> float:
    """Returns the most memory, in GB, that tensors have had on a GPU, else that the process has had; NaN where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1 << 10  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
