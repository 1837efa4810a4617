"""The choice of a design: the model against its published table, measurements before it, and the rule of precision."""

from __future__ import annotations

from math import inf

import pytest
import torch

from csrc_triton.multi_lora import designs
from csrc_triton.multi_lora.by_runs import runs_of
from csrc_triton.multi_lora.designs import (
    CPU,
    Shape,
    adapters_to_merge,
    exact_design,
    gpu_device,
    is_exact_enough,
    overhead,
    rows_to_merge,
)

H100 = gpu_device((9, 0), "3.6.0", designs.FLOPS_PER_BYTE["H100"])
H200 = gpu_device((9, 0), "3.6.0", designs.FLOPS_PER_BYTE["H200"])
ROWS = 8192
BYTE_LIMITS = {  # forward over the bare linear layer at rank 64 in bf16, on an H100 and an H200
    (3072, 3072): {"split": (1.26, 1.18), "fused": (1.107, 1.081)},
    (3072, 12288): {"split": (1.195, 1.135), "fused": (1.042, 1.036)},
    (12288, 3072): {"split": (1.13, 1.09), "fused": (1.092, 1.065)},
}


@pytest.fixture
def table(monkeypatch):
    """Returns fill(entries), which replaces the measurements."""

    def fill(*entries):
        own = designs._table()["precision"]
        for cached in (designs._exact_designs, rows_to_merge, adapters_to_merge):
            cached.cache_clear()
        monkeypatch.setattr(designs, "_table", lambda: {"precision": own, "measured": list(entries)})

    fill()
    yield fill
    monkeypatch.undo()
    for cached in (designs._exact_designs, rows_to_merge, adapters_to_merge):
        cached.cache_clear()


@pytest.mark.parametrize("layer", BYTE_LIMITS)
@pytest.mark.parametrize("design", ["split", "fused"])
def test_the_model_has_the_byte_limits(layer, design, monkeypatch):
    monkeypatch.setattr(designs, "OWN_PRODUCT", {True: 0.0, False: 0.0})
    shape = Shape(*layer, 64, "bfloat16")
    for device, limit in zip((H100, H200), BYTE_LIMITS[layer][design], strict=True):
        assert 1 + overhead(design, ROWS, shape, device) / ROWS == pytest.approx(limit, abs=0.006)


@pytest.mark.parametrize("layer", BYTE_LIMITS)
@pytest.mark.parametrize(("device", "expected"), [(H100, 530), (H200, 367)])
def test_merging_costs_as_much_as_these_rows_of_the_base(layer, device, expected):
    assert overhead("merged", ROWS, Shape(*layer, 64, "bfloat16"), device) == pytest.approx(expected, rel=0.01)


def test_without_a_measurement_the_model_chooses(table):
    chosen = {layer: exact_design(4096, Shape(*layer, 64, "bfloat16"), H100) for layer in BYTE_LIMITS}
    assert chosen == {(3072, 3072): "fused", (3072, 12288): "fused", (12288, 3072): "split"}
    # Before Hopper the kernel has no hardware copies, nor has a layer whose rows begin anywhere.
    assert exact_design(4096, Shape(12288, 3072, 64, "bfloat16"), gpu_device((8, 0), "3.6.0")) == "split"
    assert exact_design(4096, Shape(3073, 12288, 64, "bfloat16"), H200) == "split"
    assert exact_design(4096, Shape(3072, 3072, 64, "float32"), CPU) == "split"


@pytest.mark.parametrize(("rank", "rows"), [(16, 96), (64, 96), (2, 128)])
def test_on_a_cpu_merging_pays_from_these_rows(table, rank, rows):
    """Measured at 192 x 192: at 96 rows merged and split are equal, at rank 16 as at 64. At rank 2 bytes decide."""
    assert rows_to_merge(Shape(192, 192, rank, "float32"), CPU) == pytest.approx(rows, rel=0.01)


def test_a_measurement_comes_before_the_model(table):
    shape = Shape(3072, 3072, 64, "bfloat16")
    entry = {"device": "sm_90", "triton": "3.6", **shape._asdict()}
    table(
        {**entry, "min_tokens": 1024, "design": "split"},
        {**entry, "min_tokens": 4096, "design": "fused"},
        {**entry, "min_rows": 2048, "design": "merged"},
    )
    assert [exact_design(tokens, shape, H100) for tokens in (512, 1024, 4095, 4096)] == [
        "fused",
        "split",
        "split",
        "fused",
    ]
    assert rows_to_merge(shape, H100) == rows_to_merge(shape._replace(rank=40), H100) == 2048
    assert rows_to_merge(shape._replace(rank=128), H100) != 2048
    assert rows_to_merge(shape, gpu_device((9, 0), "3.7.1")) != 2048
    table({**entry, "min_rows": None, "design": "merged"})
    assert rows_to_merge(shape, H100) == inf


@pytest.mark.parametrize(
    ("dtype", "strength", "expected"),
    [
        ("float32", 0.0, True),
        ("float64", 0.0, True),
        ("bfloat16", 0.0, False),
        ("bfloat16", 0.01, False),
        ("bfloat16", 0.2, True),
        ("float16", 0.0, False),
        ("float16", 0.001, False),
        ("float16", 0.02, True),
    ],
)
def test_16_bits_bear_only_strong_adapters(dtype, strength, expected):
    assert is_exact_enough(strength, dtype) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("relative", [0.3, 0.1, 0.03])
def test_the_rule_has_the_error_of_the_low_rank_part(dtype, relative):
    """``|dW' - dW| / |dW|`` of a merged weight, measured, against the figure of the table over the strength."""
    g = torch.Generator().manual_seed(0)
    weight, delta = (
        torch.randn(512, 512, generator=g),
        torch.randn(512, 32, generator=g) @ torch.randn(32, 512, generator=g),
    )
    weight = weight.to(getattr(torch, dtype)).double()
    delta = delta.double() * (relative * weight.norm() / delta.norm())
    merged = (weight + delta).to(getattr(torch, dtype)).double()
    error = (merged - weight - delta).norm() / delta.norm()
    assert error == pytest.approx(designs._table()["precision"][dtype] / relative, rel=0.15)


def test_only_adapters_with_rows_and_strength_are_merged(table):
    shape = Shape(192, 192, 64, "float32")
    runs = runs_of([-1, 0, 0, 1, 0])
    assert adapters_to_merge(runs, 32, shape, CPU, None) == {0}
    assert adapters_to_merge(runs, 31, shape, CPU, None) == frozenset()
    bf16 = shape._replace(dtype="bfloat16")
    assert adapters_to_merge(runs, 1000, bf16, CPU, None) == frozenset()
    assert adapters_to_merge(runs, 1000, bf16, CPU, (0.01, 0.5)) == {1}
