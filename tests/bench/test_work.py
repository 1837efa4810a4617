"""Bytes and operations against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.cases import AddCase, LinearCase, LossCase, StackCase
from bench.work import Work, floor_ms, work_of

CASE = LinearCase(mode="forward", in_features=10, out_features=20, samples=2, tokens=3, adapters=2, rank=4)


def test_linear_forward():
    # 6 rows: base 2*6*10*20 = 2400, shrink 2*6*10*4 = 480, expand 2*6*4*20 = 960.
    # x 60, y 120, weight 200, bias 20, factors 2*4*30 = 240; two bytes each.
    assert work_of(CASE) == Work(3840, 2 * 640)
    assert work_of(CASE, adapted=False) == Work(2400, 2 * 400)
    assert work_of(replace(CASE, bias=False, dtype="float32")) == Work(3840, 4 * 620)


def test_student():
    # Base forward and dX 2*2400; low-rank forward 1440, dU and dB 2*960, dA and its part of dX 2*480.
    # Forward x 60, y 120, weight 200, bias 20, factors 120; backward dy 120, dx 60, weight 200, x 60, factors 120 read
    # and their gradients 120 written.
    case = replace(CASE, mode="student", adapters=1)
    assert work_of(case) == Work(4800 + 1440 + 1920 + 960, 2 * (520 + 680))
    assert work_of(case, adapted=False) == Work(4800, 2 * (400 + 380))


def test_low_rank_part():
    # Forward: x 60, y 120 read and 120 written, factors 240. Without adapters y is copied.
    case = AddCase(**vars(CASE))
    assert work_of(case) == Work(480 + 960, 2 * 540)
    assert work_of(case, adapted=False) == Work(0, 2 * 240)
    # Student: forward 420; backward dy 120, x 60, dx 60, factors 120 read and their gradients 120 written.
    case = replace(case, mode="student", adapters=1)
    assert work_of(case) == Work(1440 + 1920 + 960, 2 * (420 + 480))
    assert work_of(case, adapted=False) == Work(0, 2 * 240)


def test_loss():
    # Rows BS, BS, TS, anchor of 6 elements: 3 * 7 + 3 latents moved, 3 * 20 + 4 operations per element.
    case = LossCase(samples=4, latent=(1, 2, 3))
    assert work_of(case) == Work(6 * 64, 6 * 24 * 4)
    # The estimate in the design notes: 7 reads and 2 writes of a row that is scored and anchored would be 9.4 MB.
    assert work_of(LossCase(samples=1)).bytes == 7 * 262144 * 4


def test_stack():
    # One block, H = 2, 3 rows of 3 tokens: 12 H^2 = 48 weights; ends: q, k, v, out 4 each, up and down 10 each, 36 in all.
    # Per row 2*48 + scores and values 2 * (2*3*2) = 24 + low rank 2*5*36 = 360.
    case = StackCase(blocks=1, heads=1, head_size=2, samples=1, tokens=3, adapters=2, rank=5, dtype="float32")
    assert work_of(case) == Work(3 * (96 + 24 + 360), 4 * (48 + 36 * 5 * 2 + 2 * 3 * 2))
    assert work_of(case, adapted=False) == Work(3 * 120, 4 * (48 + 12))


def test_telling_case_has_the_ratio_of_the_roofline():
    """Rank 64 on 3072 -> 3072 adds 4.2 % of operations (r/N + r/K)."""
    case = LinearCase(mode="forward", in_features=3072, out_features=3072, samples=2, tokens=4096, adapters=1, rank=64)
    assert work_of(case).flops / work_of(case, adapted=False).flops == pytest.approx(1 + 2 * 64 / 3072)


@pytest.mark.parametrize(("work", "milliseconds"), [(Work(2_000_000_000, 1), 2.0), (Work(1, 30_000_000), 3.0)])
def test_floor_is_the_longer_of_arithmetic_and_traffic(work, milliseconds):
    assert floor_ms(work, {"tflop_per_s": 1.0, "gb_per_s": 10.0}) == pytest.approx(milliseconds)
