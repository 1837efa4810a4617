"""The linear layer by runs of rows that share an adapter: both designs against fp64, every gradient, no leaks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clora.errors import CloraError
from clora.ops import multi_lora_linear, multi_lora_linears, runs_of
from csrc_triton.multi_lora.by_runs import LinearByRuns, Run
from csrc_triton.multi_lora.reference import multi_lora_linear as reference

IDS = {
    "sorted": [-1, 0, 0, 2, 2],
    "mixed": [2, -1, 0, 0, 2],
    "one": [1, 1, 1, 1, 1],
    "base": [-1, -1, -1, -1, -1],
}
E, R = 3, 4
DESIGNS = {"split": frozenset(), "merged": frozenset({0, 1, 2}), "both": frozenset({2})}


def make(ids, tokens=7, k=20, n=30, dtype=torch.float64, factor_dtype=None, strength=1.0):
    g = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    x, weight, bias = rand(len(ids), tokens, k), rand(n, k) / k**0.5, rand(n)
    lora_A, lora_B = rand(E, R, k) / k**0.5, strength * rand(E, n, R) / R**0.5
    factors = [factor.to(factor_dtype or dtype) for factor in (lora_A, lora_B)]
    return [x.to(dtype), weight.to(dtype), bias.to(dtype), *factors, rand(E).abs() + 0.5]


def by_runs(arguments, ids, design):
    used = {i for i in ids if i >= 0}
    return LinearByRuns.apply(*arguments, runs_of(ids), frozenset(DESIGNS[design] & used))


def gradients(y, leaves):
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    return torch.autograd.grad(y, leaves, upstream)


each_design = pytest.mark.parametrize("design", DESIGNS)
each_batch = pytest.mark.parametrize("batch", IDS)


def test_runs_of_a_batch():
    assert runs_of([]) == ()
    assert runs_of([2, 2, -1, 2]) == (Run(2, 0, 2), Run(-1, 2, 3), Run(2, 3, 4))


@each_design
@each_batch
@pytest.mark.parametrize("tokens", [1, 7, 90])  # of 90 the factors' gradients go through that of the whole weight
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_definition_with_every_gradient(batch, design, tokens, bias):
    ids, arguments = IDS[batch], make(IDS[batch], tokens)
    if not bias:
        arguments[2] = None
    leaves = [arguments[i].requires_grad_() for i in (0, 3, 4)]
    y = by_runs(arguments, ids, design)
    expected = reference(*arguments, torch.tensor(ids))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for found, right in zip(gradients(y, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)


@each_design
@pytest.mark.parametrize("wanted", [(0,), (3,), (4,), (3, 4)])
def test_gradients_one_by_one(design, wanted):
    ids, arguments = IDS["mixed"], make(IDS["mixed"])
    leaves = [arguments[i].requires_grad_() for i in wanted]
    y = by_runs(arguments, ids, design)
    expected = gradients(reference(*arguments, torch.tensor(ids)), leaves)
    torch.testing.assert_close(gradients(y, leaves), expected, rtol=1e-11, atol=1e-11)


@each_design
@pytest.mark.parametrize(
    ("dtype", "factor_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
    ids=str,
)
def test_error_is_at_most_twice_the_definitions(design, dtype, factor_dtype):
    ids = IDS["mixed"]
    arguments = make(ids, 40, 64, 96, dtype, factor_dtype)
    exact = [a.double() for a in arguments]
    leaves, exact_leaves = ([a[i].requires_grad_() for i in (0, 3, 4)] for a in (arguments, exact))
    ids_tensor = torch.tensor(ids)
    y = by_runs(arguments, ids, design)
    eager = reference(*arguments, ids_tensor)
    truth = reference(*exact, ids_tensor)
    results = [
        (out.detach(), *gradients(out, own)) for out, own in ((y, leaves), (eager, leaves), (truth, exact_leaves))
    ]
    for found, allowed, right in zip(*results, strict=True):
        assert found.dtype == allowed.dtype
        assert (found.double() - right).norm() <= 2 * (allowed.double() - right).norm()


@pytest.mark.parametrize("design", ["split", "merged"])
def test_a_strength_is_rounded_only_with_its_factor(design):
    """0.7 is .6992 in bfloat16: a thousandth of the low-rank part, alike for every token."""
    x, a = torch.ones(1, 1, 1), torch.ones(1, 1, 1)
    b = torch.randn(1, 256, 1, generator=torch.Generator().manual_seed(0)).bfloat16()
    x, a, weight, scale = x.bfloat16(), a.bfloat16(), torch.zeros(256, 1).bfloat16(), torch.tensor([0.7])
    y = multi_lora_linear(x, weight, None, a, b, scale, torch.tensor([0]), design=design)
    assert torch.equal(y[0, 0], (0.7 * b[0, :, 0].float()).bfloat16())


@each_design
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_adapter_reaches_no_other_row(design, poison):
    ids, arguments = IDS["mixed"], make(IDS["mixed"])
    leaves = [arguments[i].requires_grad_() for i in (0, 3, 4)]
    clean = by_runs(arguments, ids, design).detach(), *gradients(by_runs(arguments, ids, design), leaves)
    with torch.no_grad():
        for position in (3, 4, 5):
            arguments[position][2] = poison
    y = by_runs(arguments, ids, design)
    dx, dA, dB = gradients(y, leaves)
    others, poisoned = torch.tensor([1, 2, 3]), torch.tensor([0, 4])
    assert torch.equal(y[others], clean[0][others])
    assert not torch.isfinite(y[poisoned]).any()
    assert torch.equal(dx[others], clean[1][others])
    assert torch.equal(dA[:2], clean[2][:2])
    assert torch.equal(dB[:2], clean[3][:2])


def test_without_adapters_the_bits_are_those_of_the_layer():
    """Also for rows that are not contiguous, which PyTorch multiplies another way."""
    arguments = make(IDS["base"], dtype=torch.float32)
    x = torch.randn(5, 11, 20)[:, :7]
    for bias in (arguments[2], None):
        y = LinearByRuns.apply(x, arguments[1], bias, *arguments[3:], runs_of(IDS["base"]), frozenset())
        assert torch.equal(y, F.linear(x, arguments[1], bias))


@each_design
def test_strided_input_and_upstream(design):
    ids, arguments = IDS["mixed"], make(IDS["mixed"])
    arguments[0] = arguments[0].mT.contiguous().mT.requires_grad_()
    y = by_runs(arguments, ids, design)
    expected = reference(*arguments, torch.tensor(ids))
    upstream = torch.ones((), dtype=y.dtype).expand(y.shape)
    found, right = (torch.autograd.grad(out, arguments[0], upstream)[0] for out in (y, expected))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("design", "products"), [("merged", 2), ("split", 6), (None, 2)])
def test_the_op_takes_the_design_that_was_asked_for(design, products, monkeypatch):
    """Of two adapters with many rows: one product for each merged weight, else two for each low-rank part."""
    ids = [0, 0, 2, 2]
    arguments = make(ids, 90, dtype=torch.float32)
    calls = []
    own = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: calls.append(a) or own(*a, **k))
    y = multi_lora_linear(*arguments, torch.tensor(ids), design=design)
    merging = [a for a in calls if a[0] is arguments[1]]
    assert len(merging) == (0 if design == "split" else products)
    torch.testing.assert_close(y, reference(*arguments, torch.tensor(ids)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["weight", "bias", "scale"])
def test_a_trained_base_gets_its_gradient(what):
    ids, arguments = IDS["sorted"], make(IDS["sorted"], 90)
    leaf = arguments[{"weight": 1, "bias": 2, "scale": 5}[what]].requires_grad_()
    multi_lora_linear(*arguments, torch.tensor(ids)).sum().backward()
    assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("other", [[], [0], [0, 0, 1, 1, 2, 2]])
def test_runs_of_other_samples_are_refused(other):
    arguments = make(IDS["sorted"])
    with pytest.raises(ValueError, match=f"runs: expected those of the 5 samples of x, found those of {len(other)}"):
        multi_lora_linear(*arguments, torch.tensor(IDS["sorted"]), runs=runs_of(other))


def test_a_forced_merge_of_a_trained_base_is_refused():
    arguments = make(IDS["sorted"])
    arguments[1].requires_grad_()
    with pytest.raises(CloraError, match="the design merged needs `runs` and a frozen base of x's dtype.*; use split"):
        multi_lora_linear(*arguments, torch.tensor(IDS["sorted"]), design="merged")


def test_outputs_are_written_where_the_caller_wants_them():
    ids, arguments = IDS["mixed"], make(IDS["mixed"], dtype=torch.float32)
    x, *layer, scale = arguments
    places = [torch.full((5, 7, 30), torch.nan) for _ in range(2)]
    given = multi_lora_linears(x, [layer, layer], scale, torch.tensor(ids), out=places)
    assert all(y is place for y, place in zip(given, places, strict=True))
    for y in given:
        torch.testing.assert_close(y, reference(*arguments, torch.tensor(ids)), rtol=1e-4, atol=1e-4)
