"""The gate stops wrong outputs and passes those as good as eager PyTorch's."""

from __future__ import annotations

import math

import pytest
import torch

from bench.gate import bounds, errors, violation

EXACT = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def off_by(relative):
    return EXACT * (1 + relative)


@pytest.mark.parametrize(("relative", "passes"), [(1.9e-3, True), (2.1e-3, False)])
def test_twice_the_error_of_eager_is_allowed(relative, passes):
    allowed = bounds(errors({"y": off_by(1e-3)}, {"y": EXACT}), {"y": EXACT})
    assert (violation(errors({"y": off_by(relative)}, {"y": EXACT}), allowed) is None) == passes


def test_error_is_relative_to_the_whole_output():
    wrong = EXACT.clone()
    wrong[1, 2, 3] += 1.0
    assert errors({"y": wrong}, {"y": EXACT})["y"] == pytest.approx(1.0 / EXACT.norm().item())
    assert errors({"y": wrong[0, 0]}, {"y": EXACT[0, 0]})["y"] == 0


@pytest.mark.parametrize(
    "wrong", [{}, {"y": EXACT[:2]}, {"y": EXACT.mT}, {"y": EXACT * math.nan}, {"y": torch.full_like(EXACT, math.inf)}]
)
def test_missing_misshapen_and_non_finite_outputs_fail(wrong):
    assert violation(errors(wrong, {"y": EXACT}), {"y": 1e9}) is not None


def test_every_output_is_checked_and_named():
    expected = {"y": EXACT, "dx": EXACT}
    found = errors({"y": EXACT, "dx": off_by(0.5)}, expected)
    assert violation(found, {"y": 1e-3, "dx": 1e-3}).startswith("dx: error 5.00e-01")


def test_a_scalar_whose_eager_error_is_zero_by_luck_may_have_roundings():
    scalar = EXACT.sum()
    allowed = bounds({"y": 0.0, "loss": 0.0}, {"y": EXACT, "loss": scalar})
    assert allowed["y"] == 0
    assert violation(errors({"y": EXACT, "loss": scalar * (1 + 9e-7)}, {"y": EXACT, "loss": scalar}), allowed) is None
    assert (
        violation(errors({"y": EXACT, "loss": scalar * (1 + 1e-6)}, {"y": EXACT, "loss": scalar}), allowed) is not None
    )
