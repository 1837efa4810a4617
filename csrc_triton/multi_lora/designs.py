"""Which of the two forward designs a shape takes: a table of measurements, `designs.json`, and nothing else."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

DESIGNS = ("fused", "split")
DEFAULT = "split"
"""Where nothing was measured: cuBLAS computes the base layer, so that at most the two extra passes over y are lost."""
TABLE = Path(__file__).with_name("designs.json")


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
    shape = (
        tuple(capability),
        release(triton),
        str(dtype).removeprefix("torch."),
        in_features,
        out_features,
        _padded(rank),
    )
    entries = [entry for entry in (_table() if table is None else table) if _shape_of(entry) == shape]
    best = None
    for entry in entries:
        if tokens >= entry["min_tokens"] and (best is None or entry["min_tokens"] > best["min_tokens"]):
            best = entry
    return DEFAULT if best is None else best["design"]


def release(version: str) -> str:
    """The first two numbers of a version: "3.7" of "3.7.1+git"."""
    return ".".join(version.split(".")[:2])


def _shape_of(entry: dict) -> tuple:
    return (
        tuple(entry["capability"]),
        entry["triton"],
        entry["dtype"],
        entry["in_features"],
        entry["out_features"],
        _padded(entry["rank"]),
    )


def _padded(rank: int) -> int:
    return 1 << max(rank - 1, 15).bit_length()


@lru_cache
def _table() -> list[dict]:
    return json.loads(TABLE.read_text("utf-8"))
