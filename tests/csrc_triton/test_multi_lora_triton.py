"""`multi_lora_linear` on its Triton kernels, its gradients and several layers of one input, against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from helpers.linear_cases import (
    CASES,
    DEVICE,
    DTYPES,
    LARGE,
    POSITIONS,
    Case,
    assert_as_accurate_as_eager,
    assert_same,
    each_design,
    gpu,
    interpreted,
    launches,
    make,
    ours,
    results,
    upstream_of,
)

from csrc_triton.multi_lora.op import multi_lora_linear_triton, multi_lora_linears
from csrc_triton.multi_lora.reference import multi_lora_linear
from csrc_triton.multi_lora.tiles import rank_block
from csrc_triton.registration import INTERPRETED

pytestmark = pytest.mark.usefixtures("poisoned_memory")
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "design"),
    [
        pytest.param(name, design, marks=slow if (name, design) == ("several_chunks", "fused") else [])
        for name in CASES
        for design in ("fused", "split")
    ],
)
def test_fp32(name, design):
    assert_as_accurate_as_eager(ours(design), make(CASES[name]))


@each_design
@pytest.mark.parametrize("factors", [torch.float32, None], ids=["fp32_factors", "low_factors"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_low_precision(dtype, factors, design):
    assert_as_accurate_as_eager(ours(design), make(CASES["mixed"], dtype, factors or dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_split_rounds_a_weak_adapter_as_little_as_fused(dtype):
    """The base added to a rounded low-rank part; the low-rank part added to a rounded base had 1.4 times the error."""
    arguments = make(CASES["mixed"], dtype, bias=False)
    arguments[4] *= 0.03
    exact = multi_lora_linear(*(a.double() if a is not None and a.is_floating_point() else a for a in arguments))
    error = {design: (ours(design)(*arguments).double() - exact).norm() for design in ("fused", "split")}
    assert error["split"] <= 1.1 * error["fused"]


@gpu
@each_design
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("aligned", dtype) for dtype in DTYPES),
        ("wide_rank", torch.float32),
        *((n, DTYPES[-1]) for n in ("wide_rank", "model")),
    ],
    ids=str,
)
def test_large(name, dtype, design):
    assert_as_accurate_as_eager(ours(design), make(LARGE[name], dtype))


@settings(max_examples=8 if INTERPRETED else 50, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_shape(data):
    """In the interpreter also any inputs, outputs and rank; for each the compiler would make another kernel."""
    size = lambda most, least=1: data.draw(st.integers(least, most))  # noqa: E731
    adapters = size(3)
    ids = data.draw(st.lists(st.integers(-1, adapters - 1), min_size=1, max_size=4))
    if INTERPRETED:
        case = Case(size(80), size(50), size(80), adapters, size(40), ids)
    else:
        case = CASES["mixed"]._replace(tokens=size(80, least=65), adapters=adapters, ids=ids)
    arguments = make(case, data.draw(st.sampled_from(DTYPES)), bias=data.draw(st.booleans()))
    assert_as_accurate_as_eager(ours(data.draw(st.sampled_from(["fused", "split"]))), arguments)


# The backward pass: no more than is needed.


@each_design
@pytest.mark.parametrize("wanted", ["x", "A", "B", *(pytest.param(two, marks=slow) for two in ("xA", "xB", "AB"))])
def test_gradients_that_are_asked_for_equal_all_of_them(wanted, design):
    arguments = make(CASES["mixed"])
    upstream = upstream_of(arguments)
    expected = results(ours(design), arguments, upstream)
    assert_same(results(ours(design), arguments, upstream, wanted), {name: expected[name] for name in ("y", *wanted)})


@pytest.mark.parametrize(
    ("wanted", "design", "kernels"),
    [
        ("x", "fused", ["shrink", "linear", "shrink", "linear"]),
        ("x", "split", ["shrink", "expand", "shrink", "expand"]),
        ("B", "fused", ["shrink", "linear", "gradients", "reduce"]),
        ("A", "fused", ["shrink", "linear", "shrink", "gradients", "reduce"]),
        ("AB", "split", ["shrink", "expand", "gradients", "reduce", "gradients", "reduce"]),
        ("xAB", "fused", ["shrink", "linear", "gradients", "reduce", "linear", "gradients", "reduce"]),
    ],
)
def test_only_what_is_needed_is_launched(monkeypatch, wanted, design, kernels):
    arguments, seen = make(CASES["one_token"]), launches(monkeypatch)
    results(ours(design), arguments, upstream_of(arguments), wanted)
    assert [name.removesuffix("_kernel") for name, _ in seen] == kernels


@pytest.mark.parametrize(("wanted", "saves_rows"), [("x", False), ("A", True), ("B", True)])
def test_rows_are_saved_only_for_adapters_that_train(wanted, saves_rows):
    arguments, saved = make(CASES["mixed"]), []
    arguments[POSITIONS[wanted]].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = multi_lora_linear_triton(*arguments)
    assert y.requires_grad
    assert any(t.shape[:2] == arguments[0].shape[:2] for t in saved) == saves_rows
    with torch.no_grad():
        assert multi_lora_linear_triton(*arguments).grad_fn is None


def test_two_runs_are_equal():
    arguments = make(CASES["several_chunks"])
    upstream = upstream_of(arguments)
    assert_same(results(ours(None), arguments, upstream), results(ours(None), arguments, upstream))


def test_a_second_derivative_is_an_error():
    arguments = make(CASES["one_token"])
    arguments[0].requires_grad_()
    (gradient,) = torch.autograd.grad(
        multi_lora_linear_triton(*arguments).square().sum(), arguments[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.sum().backward()


# Several projections of one input.


def projections_of(x, ranks, seed=5):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g).to(x.device)  # noqa: E731
    k, n = x.shape[2], 11
    return [
        (rand(n + i, k) / 3, rand(n + i) if i % 2 else None, rand(2, r, k) / 3, rand(2, n + i, r) / max(r, 4) ** 0.5)
        for i, r in enumerate(ranks)
    ]


def of_projections(function, x, projections, used):
    """A weighted sum of the used outputs, and the gradients of x and of the factors."""
    leaves = [x, *(factor for projection in projections for factor in projection[2:])]
    leaves = [t.detach().requires_grad_() for t in leaves]
    factors = iter(leaves[1:])
    outputs = function(leaves[0], [(w, b, next(factors), next(factors)) for w, b, _, _ in projections])
    total = sum((outputs[i].double().sin() * (i + 1)).sum() for i in used)
    return [total, *torch.autograd.grad(total, leaves, allow_unused=True)]


@each_design
@pytest.mark.parametrize(
    ("ranks", "used"),
    [
        ((4, 4, 4), (0, 1, 2)),
        pytest.param((16, 3), (0, 1), marks=interpreted),
        ((5, 2, 8, 3), (0, 1, 2, 3)),
        pytest.param((4, 0, 6), (0, 1, 2), marks=interpreted),
        pytest.param((4, 2, 6), (2,), marks=interpreted),
        ((128, 120, 100), (0, 1, 2)),
    ],
    ids=["qkv", "two", "four", "one_without_ranks", "one_output_used", "several_rank_blocks"],
)
def test_projections_equal_one_by_one(ranks, used, design):
    x, ids = make(Case(70, 20, 1, 1, 1, [1, -1, 0]))[0], torch.tensor([1, -1, 0], device=DEVICE)
    scale = torch.tensor([0.5, 2.0], device=DEVICE)
    together = lambda x, projections: multi_lora_linears(x, projections, scale, ids, design)  # noqa: E731
    each = lambda x, projections: [multi_lora_linear(x, *p, scale, ids) for p in projections]  # noqa: E731
    projections = projections_of(x, ranks)
    found, expected = (of_projections(f, x, projections, used) for f in (together, each))
    for a, b in zip(found, expected, strict=True):
        if b is None or not b.numel():
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_rank_blocks_hold_all_ranks_or_pad_little():
    assert [rank_block(rank) for rank in (1, 20, 129, 256)] == [16, 32, 256, 256]
    assert [rank_block(rank) for rank in (384, 400, 512, 600, 768)] == [128, 256, 256, 128, 256]


def test_projections_share_their_passes_over_x(monkeypatch):
    x = make(Case(3, 20, 1, 1, 1, [1, -1, 0]))[0]
    seen = launches(monkeypatch)
    together = lambda x, ps: multi_lora_linears(x, ps, torch.ones(2, device=DEVICE), ids, "fused")  # noqa: E731
    ids = torch.tensor([1, -1, 0], device=DEVICE)
    of_projections(together, x, projections_of(x, (4, 4, 4)), (0, 1, 2))
    kernels = [name.removesuffix("_kernel") for name, _ in seen]
    assert kernels[:4] == ["shrink", "linear", "linear", "linear"]
    assert kernels[4:] == ["gradients", "reduce"] * 3 + ["linear"] * 3 + ["gradients"] + ["reduce"] * 3
