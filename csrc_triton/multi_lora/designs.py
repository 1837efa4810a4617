"""The forward design of a call, "fused" or "split": from `designs.json`, a table of measurements, and nothing else."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

DESIGNS = ("fused", "split")
DEFAULT = "split"
"""For shapes without a measurement: cuBLAS computes the base layer, so that at most two extra passes over y are lost."""
TABLE = Path(__file__).with_name("designs.json")


def design_of(x: Tensor, weight: Tensor, lora_A: Tensor, design: str | None) -> str:
    """The design that the caller asked for, else the one for these tensors on their GPU, else the default."""
    if design is not None or x.device.type != "cuda":
        return design or DEFAULT
    import triton

    capability = torch.cuda.get_device_capability(x.device)
    n, k = weight.shape
    return design_for(x.shape[1], k, n, lora_A.shape[1], x.dtype, capability, triton.__version__)


def design_for(
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    triton: str,
    table: Sequence[dict] | None = None,
) -> str:
    """The measured design of a shape, or the default: never a guess.

    Args:
        tokens: of one sample; the number of samples must not matter, see `tiles`.
        rank: of the adapters; an entry holds for every rank that pads to the same power of two.
        capability: the GPU's compute capability.
        triton: Triton's version, of which the first two numbers count: another release may compile to slower kernels.
        table: entries ``{"capability": [9, 0], "triton": "3.7", "dtype": "bfloat16", "in_features": K, "out_features": N,
            "rank": R, "min_tokens": T, "design": "fused" or "split"}``; of the entries of a shape, the one with the
            largest min_tokens that is not above `tokens` decides. Default: `designs.json`.
    """
    asked = {
        "capability": list(capability),
        "triton": release(triton),
        "dtype": str(dtype).removeprefix("torch."),
        "in_features": in_features,
        "out_features": out_features,
    }
    best = {"min_tokens": -1, "design": DEFAULT}
    for entry in _table() if table is None else table:
        of_this_shape = asked.items() <= entry.items() and _padded(entry["rank"]) == _padded(rank)
        if of_this_shape and best["min_tokens"] < entry["min_tokens"] <= tokens:
            best = entry
    return best["design"]


def release(version: str) -> str:
    """The first two numbers of a version: "3.7" of "3.7.1+git"."""
    return ".".join(version.split(".")[:2])


def _padded(rank: int) -> int:
    return 1 << max(rank - 1, 15).bit_length()


@lru_cache
def _table() -> list[dict]:
    return json.loads(TABLE.read_text("utf-8"))
