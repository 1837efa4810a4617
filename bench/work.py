"""Bytes and floating-point operations that a case needs at least, and the time that a machine needs for them.

Each input is read once and each output written once per pass (forward, backward); tensors of rank size do not
count, nor does a cache that might keep values between passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from bench.cases import AddCase, Case, DesignCase, LinearCase, LossCase, StackCase

SCORED_ROW = (7, 20)
"""Latents moved and operations per element of a distribution-matching row: reads velocity, x, renoised, critic,
teacher and teacher_uncond, writes the gradient."""
ANCHOR_ROW = (3, 4)
"""The same of an anchor row: reads velocity and target, writes the gradient."""


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one call."""

    flops: int
    bytes: int


def work_of(case: Case, adapted: bool = True) -> Work:
    """The work of a case; without its adapters where not `adapted` (the loss has none)."""
    families = {LinearCase: _linear, DesignCase: _linear, AddCase: _add, StackCase: _stack, LossCase: _loss}
    return families[type(case)](case, adapted)


def floor_ms(work: Work, roof: dict) -> float:
    """The larger of the times that the arithmetic and the traffic take at the measured roof.

    Args:
        roof: ``{"tflop_per_s": ..., "gb_per_s": ...}``.
    """
    return max(work.flops / (roof["tflop_per_s"] * 1e9), work.bytes / (roof["gb_per_s"] * 1e6))


def _item_bytes(case: Case) -> int:
    return getattr(torch, case.dtype).itemsize


def _linear(case: LinearCase, adapted: bool) -> Work:
    m, k, n, r = case.rows, case.in_features, case.out_features, case.rank
    base = 2 * m * k * n
    low_rank = 2 * m * r * (k + n) * adapted  # shrink to the ranks and expand from them
    factors = case.adapters * r * (k + n) * adapted
    forward = m * (k + n) + n * k + n * case.bias + factors
    if case.mode == "forward":
        return Work(base + low_rank, forward * _item_bytes(case))
    # Backward reads dy, the weight and the factors, and x for the gradient of lora_A; it writes the gradients of x and the factors.
    backward = m * (n + k) + n * k + m * k * adapted + 2 * factors
    return Work(2 * base + 3 * low_rank, (forward + backward) * _item_bytes(case))


def _add(case: AddCase, adapted: bool) -> Work:
    """Without its adapters a copy of y, which has no gradient."""
    m, k, n, r = case.rows, case.in_features, case.out_features, case.rank
    if not adapted:
        return Work(0, 2 * m * n * _item_bytes(case))
    low_rank = 2 * m * r * (k + n)
    factors = case.adapters * r * (k + n)
    forward = m * (k + 2 * n) + factors
    if case.mode == "forward":
        return Work(low_rank, forward * _item_bytes(case))
    # Backward reads dy, x and the factors; it writes the gradients of x and the factors.
    backward = m * (n + 2 * k) + 2 * factors
    return Work(3 * low_rank, (forward + backward) * _item_bytes(case))


def _loss(case: LossCase, adapted: bool) -> Work:
    elements = prod(case.latent)
    scored = sum(kind < 2 for kind in case.kinds)
    anchors = case.samples - scored
    moved = elements * (scored * SCORED_ROW[0] + anchors * ANCHOR_ROW[0])
    flops = elements * (scored * SCORED_ROW[1] + anchors * ANCHOR_ROW[1])
    return Work(flops, moved * _item_bytes(case))


def _stack(case: StackCase, adapted: bool) -> Work:
    """Bytes: weights and adapters read once, the hidden states read and written once in all."""
    h = case.hidden
    rows = case.samples * case.tokens
    weights = 12 * h * h  # q, k, v and out: 4 h^2; up and down: 8 h^2
    ends = 4 * 2 * h + 2 * 5 * h  # sum of K + N over the six layers
    attention = 4 * case.tokens * h  # scores and values, per row
    flops = rows * case.blocks * (2 * weights + attention + 2 * case.rank * ends * adapted)
    elements = case.blocks * (weights + ends * case.rank * case.adapters * adapted) + 2 * rows * h
    return Work(flops, elements * _item_bytes(case))
