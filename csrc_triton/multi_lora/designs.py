"""The choice of a design for the rows of an adapter: what was measured, else a model of bytes and operations.

*merged* gives the rows of an adapter a weight of their own (`by_runs`). *fused* adds the low-rank part inside the product
of the base, *split* beside it (`kernels`); on a CPU the part behind the base is PyTorch's and *split* too. Only *merged*
rounds the adapter to the weight's dtype, so only it must be allowed (`is_exact_enough`).
`designs.json` holds the measurements, and the precision of *merged*.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from math import inf
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from csrc_triton.multi_lora.by_runs import Projection, Run

DESIGNS = ("merged", "fused", "split")
TABLE = Path(__file__).with_name("designs.json")
FLOPS_PER_BYTE = {"cpu": 3.0, "H100": 265.0, "H200": 184.0}
"""Products per second over bytes per second: of a CPU with its operands in cache (measured on AVX-512 cores, fp32, one
thread: 95 GFLOP/s, passes over activations of 1 MB at about 30 GB/s), of GPUs in bf16 from their data sheets."""
OTHER_GPU = 200.0
OWN_PRODUCT = {True: 0.05, False: 0.15}
"""Loss of *fused* against the vendor's product of the base, as a share of it, with and without hardware copies (TMA):
predictions, until measured."""
HOPPER = 90


class Device(NamedTuple):
    """The device of a call, as measurements name it.

    Attributes:
        name: "cpu", or "sm_90" for a GPU of compute capability 9.0.
        triton: the release of Triton, "3.7"; another one may compile to slower kernels. Empty on a CPU.
        flops_per_byte: of the model.
    """

    name: str
    triton: str
    flops_per_byte: float

    @property
    def is_hopper(self) -> bool:
        """Reports whether the GPU is Hopper or newer, with hardware copies of tiles."""
        return self.name != "cpu" and int(self.name.removeprefix("sm_")) >= HOPPER


class Shape(NamedTuple):
    """A layer: K inputs, N outputs, the rank of its adapters, and its dtype by torch's name."""

    in_features: int
    out_features: int
    rank: int
    dtype: str


CPU = Device("cpu", "", FLOPS_PER_BYTE["cpu"])


@lru_cache
def device_of(device: torch.device) -> Device:
    """Describes the device of a call."""
    if device.type != "cuda":
        return CPU
    import triton

    model = torch.cuda.get_device_name(device)
    rate = next((rate for name, rate in FLOPS_PER_BYTE.items() if name in model), OTHER_GPU)
    return gpu_device(torch.cuda.get_device_capability(device), triton.__version__, rate)


def gpu_device(capability: Sequence[int], triton: str, flops_per_byte: float = OTHER_GPU) -> Device:
    """Names a GPU by its compute capability and the release of Triton."""
    return Device(f"sm_{capability[0]}{capability[1]}", release(triton), flops_per_byte)


def release(version: str) -> str:
    """Returns the first two numbers of a version: "3.7" of "3.7.1+git"."""
    return ".".join(version.split(".")[:2])


def exact_design(tokens: int, shape: Shape, device: Device) -> str:
    """Chooses *fused* or *split* by the tokens of one sample: a sample's bits must not depend on its batch.

    A CPU has only *split*.
    """
    chosen = ""
    for min_tokens, design in _exact_designs(shape, device):
        if min_tokens <= tokens:  # by comparisons only: under torch.compile tokens may be symbolic
            chosen = design
    return chosen


@lru_cache(maxsize=4096)
def _exact_designs(shape: Shape, device: Device) -> tuple[tuple[int, str], ...]:
    """Returns the least tokens of each choice, in order: the model's, then those that were measured."""
    if device.name == "cpu":
        return ((0, "split"),)
    predicted = min(("fused", "split"), key=lambda design: overhead(design, 1, shape, device))
    measured = [(entry["min_tokens"], entry["design"]) for entry in _entries(shape, device) if "min_tokens" in entry]
    return ((0, predicted), *sorted(measured))


@lru_cache(maxsize=4096)
def rows_to_merge(shape: Shape, device: Device) -> float:
    """Returns the least rows of an adapter, tokens of all its samples, from which *merged* is the fastest design."""
    measured = [entry["min_rows"] for entry in _entries(shape, device) if "min_rows" in entry]
    if measured:
        return min(inf if rows is None else rows for rows in measured)
    exact = overhead(exact_design(1, shape, device), 1, shape, device)
    # Merging costs the same for any number of rows, the others grow with them.
    return overhead("merged", 1, shape, device) / exact


def overhead(design: str, rows: int, shape: Shape, device: Device) -> float:
    """Predicts a design's forward time beyond the base's, in units of the base's time for one row (`2 K N` operations).

    Each step takes the longer of its operations and its bytes. *split* reads x, and reads and writes y; *fused* reads x
    and multiplies the ranks in the product of the base; *merged* reads W and writes W'.
    """
    k, n, rank, dtype = shape
    itemsize = getattr(torch, dtype).itemsize

    def time(operations: float, elements: float) -> float:
        return max(operations, elements * itemsize * device.flops_per_byte) / (2 * k * n)

    if design == "merged":
        return time(2 * n * k * rank, 2 * n * k)
    shrink = time(2 * rows * k * rank, rows * k)
    if design == "split":
        return shrink + time(2 * rows * n * rank, 2 * rows * n)
    copies = device.is_hopper and k * itemsize % 16 == 0 and n * itemsize % 16 == 0
    return shrink + time(2 * rows * n * rank, 0) + OWN_PRODUCT[copies] * rows


def is_exact_enough(strength: float, dtype: str) -> bool:
    """Tests whether an adapter may be merged into a weight of this dtype.

    Rounding W' to 16 bits changes the low-rank part by the dtype's figure over the adapter's strength, alike for every
    token: 17 % of an adapter of a hundredth of the base in bfloat16. fp32 and fp64 lose nothing that counts.

    Args:
        strength: ``|scale B A| / |W|``, Frobenius norms; 0 for an adapter that is being trained, or not known.
        dtype: of the weight, by torch's name.
    """
    if getattr(torch, dtype).itemsize > 2:
        return True
    precision = _table()["precision"]
    return precision[dtype] <= precision["bound"] * strength


@lru_cache(maxsize=4096)
def adapters_to_merge(
    runs: tuple[Run, ...], tokens: int, shape: Shape, device: Device, strengths: tuple[float, ...] | None
) -> frozenset[int]:
    """Returns the adapters of a batch that *merged* computes: those with rows enough, and strong enough for the dtype.

    Args:
        tokens: of one sample.
        strengths: of each adapter (`is_exact_enough`); None for unknown ones.
    """
    least = rows_to_merge(shape, device)
    samples: dict[int, int] = {}
    for run in runs:
        samples[run.adapter] = samples.get(run.adapter, 0) + run.stop - run.start
    merged = []
    for adapter, count in samples.items():
        strength = strengths[adapter] if strengths and adapter >= 0 else 0.0
        if adapter >= 0 and count * tokens >= least and is_exact_enough(strength, shape.dtype):
            merged.append(adapter)
    return frozenset(merged)


def merged_in_all(
    x: Tensor,
    projections: Sequence[Projection],
    runs: tuple[Run, ...] | None,
    strengths: Sequence[tuple[float, ...] | None],
    design: str | None,
) -> frozenset[int]:
    """Returns the adapters that *merged* computes in every one of some layers of one input.

    Args:
        x: ``[B, T, K]``.
        projections: ``(weight, bias, lora_A, lora_B)`` of each layer.
        runs: of the batch; nothing is merged where they are not known, or within a compiled graph.
        strengths: of each layer, as in `adapters_to_merge`.
        design: None, or the one that was asked for.
    """
    if runs is None or design not in (None, "merged") or torch.compiler.is_compiling():
        return frozenset()
    chosen = frozenset(run.adapter for run in runs if run.adapter >= 0)
    if design == "merged":
        return chosen
    dtype = str(x.dtype).removeprefix("torch.")
    for (weight, _, lora_A, _), strength in zip(projections, strengths, strict=True):
        shape = Shape(x.shape[2], len(weight), lora_A.shape[1], dtype)
        chosen &= adapters_to_merge(runs, x.shape[1], shape, device_of(x.device), strength)
    return chosen


def _entries(shape: Shape, device: Device) -> list[dict]:
    """Returns the measurements of a layer on a device; those of a rank hold for every rank that pads to the same power of two."""
    asked = {
        "device": device.name,
        "triton": device.triton,
        "dtype": shape.dtype,
        "in_features": shape.in_features,
        "out_features": shape.out_features,
    }
    return [e for e in _table()["measured"] if asked.items() <= e.items() and _padded(e["rank"]) == _padded(shape.rank)]


def _padded(rank: int) -> int:
    return 1 << max(rank - 1, 15).bit_length()


@lru_cache
def _table() -> dict:
    return json.loads(TABLE.read_text("utf-8"))
