"""The entry points of `clora.ops` on the real kernels: the path that CLORA_BACKEND=triton takes."""

from __future__ import annotations

import pytest
import torch
from helpers.loss_cases import CASES, make
from torch.utils._python_dispatch import TorchDispatchMode

from clora.errors import CloraError
from clora.ops import coarse_to_fine_loss, multi_lora_linear, multi_lora_linears, runs_of

pytest.importorskip("triton")

from helpers.linear_cases import launches

from csrc_triton import replay
from csrc_triton.multi_lora import checks as linear_checks
from csrc_triton.multi_lora import designs
from csrc_triton.registration import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"


def linear_inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g).to(DEVICE, dtype)  # noqa: E731
    x, weight, bias, lora_A, lora_B = rand(3, 4, 6), rand(5, 6), rand(5), rand(2, 2, 6), rand(2, 5, 2)
    return [x, weight, bias, lora_A, lora_B, rand(2), torch.tensor([0, -1, 1], device=DEVICE)]


def loss_inputs(dtype=torch.float32):
    c = make(CASES["all_kinds"], dtype=dtype)
    scores = type(c["scores"])(*(t.to(DEVICE) for t in c["scores"]))
    moved = {name: t.detach().to(DEVICE) for name, t in c.items() if isinstance(t, torch.Tensor)}
    return list((c | moved | {"scores": scores}).values())


def flat(out):
    return [out] if isinstance(out, torch.Tensor) else [out[0], *out[1].values()]


OPS = pytest.mark.parametrize(
    ("op", "inputs"), [(multi_lora_linear, linear_inputs), (coarse_to_fine_loss, loss_inputs)], ids=["linear", "loss"]
)


class Operators(TorchDispatchMode):
    """Notes the name of every operator that runs."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@OPS
@pytest.mark.parametrize("by", ["variable", "argument"])
def test_triton_runs_the_kernels(monkeypatch, op, inputs, by):
    given, calls = inputs(), []
    expected = op(*given, backend="eager")
    monkeypatch.setenv("CLORA_BACKEND", "triton" if by == "variable" else "eager")
    argument = {} if by == "variable" else {"backend": "triton"}
    with Operators(calls):
        out = op(*given, **argument)
    assert any(name.startswith("clora::") for name in calls)
    for ours, eager in zip(flat(out), flat(expected), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("position", [1, 2], ids=["weight", "bias"])
def test_a_trained_base_is_not_covered(position):
    given = linear_inputs()
    given[position].requires_grad_()
    with pytest.raises(
        CloraError, match="multi_lora_linear do not cover this call .*(weight|bias).*use backend 'auto'"
    ):
        multi_lora_linear(*given, backend="triton")
    multi_lora_linear(*given, backend="auto").sum().backward()
    assert given[position].grad is not None
    with torch.no_grad():
        multi_lora_linear(*given, backend="triton")


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_wrong_shapes_are_named_before_anything_reads_them(backend):
    given = linear_inputs()
    given[3] = given[3][0, 0]
    with pytest.raises(ValueError, match=r"expected x \[B, T, K\], .*lora_A \[E, R, K\], found .*lora_A \[6\]"):
        multi_lora_linear(*given, backend=backend)


def test_a_call_is_checked_once(monkeypatch):
    checks = []
    monkeypatch.setattr(replay, "enabled", False)
    monkeypatch.setattr(linear_checks, "check_shapes", lambda *args: checks.append(args))
    multi_lora_linear(*linear_inputs(), backend="triton")
    assert len(checks) == 1


@OPS
def test_fp64_is_not_covered(op, inputs):
    given = inputs(torch.float64)
    with pytest.raises(CloraError, match=f"the kernels of {op.__name__} do not cover this call .*(fp|float)64"):
        op(*given, backend="triton")
    assert flat(op(*given, backend="auto"))[0].dtype == torch.float64


def two_layers(*dtypes):
    """A layer twice, its factors of these dtypes."""
    x, weight, bias, lora_A, lora_B, scale, ids = linear_inputs()
    return x, [(weight, bias, lora_A.to(dtype), lora_B.to(dtype)) for dtype in dtypes], scale, ids


def test_layers_of_one_input_share_its_pass_only_on_the_kernels(monkeypatch):
    given, seen = two_layers(torch.float32, torch.float32), launches(monkeypatch)
    expected = multi_lora_linears(*given, backend="eager")
    assert not seen
    for ours, eager in zip(multi_lora_linears(*given, backend="triton"), expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
    assert [name for name, _ in seen] == ["shrink_kernel", "expand_kernel", "expand_kernel"]


def test_layers_of_one_input_are_computed_one_by_one_where_one_is_not_covered():
    given = two_layers(torch.float32, torch.float64)
    with pytest.raises(CloraError, match=r"multi_lora_linear do not cover this call \(lora_A is torch.float64"):
        multi_lora_linears(*given, backend="triton")
    x, layers, scale, ids = given
    for y, layer in zip(multi_lora_linears(*given, backend="auto"), layers, strict=True):
        assert torch.equal(y, multi_lora_linear(x, *layer, scale, ids, backend="auto"))


def merging_inputs(ids):
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g).to(DEVICE)  # noqa: E731
    layers = [(rand(20, 16), rand(20), rand(3, 4, 16), rand(3, 20, 4)) for _ in range(2)]
    return rand(len(ids), 40, 16), layers, rand(3), torch.tensor(ids, device=DEVICE)


def test_merged_rows_beside_those_of_the_kernels(monkeypatch):
    """Adapters with rows enough are merged, others and the base's rows run on the kernels."""
    ids = [-1, 0, 2, 2, 2, 1, 1, 1]
    x, layers, scale, ids_tensor = merging_inputs(ids)
    expected = multi_lora_linears(x, layers, scale, ids_tensor, backend="eager", design="split")
    monkeypatch.setattr("csrc_triton.multi_lora.designs.rows_to_merge", lambda shape, device: 120)
    designs.adapters_to_merge.cache_clear()
    seen = launches(monkeypatch)
    places = [torch.full_like(y, torch.nan) for y in expected]
    with torch.no_grad():
        outputs = multi_lora_linears(x, layers, scale, ids_tensor, runs=runs_of(ids), backend="triton", out=places)
    designs.adapters_to_merge.cache_clear()
    assert seen, "samples 0 and 1 run on the kernels"
    assert all(y is place for y, place in zip(outputs, places, strict=True))
    for y, right in zip(outputs, expected, strict=True):
        torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-4)


def test_with_gradients_a_batch_is_merged_whole_or_not_at_all(monkeypatch):
    monkeypatch.setattr("csrc_triton.multi_lora.designs.rows_to_merge", lambda shape, device: 120)
    designs.adapters_to_merge.cache_clear()
    seen = launches(monkeypatch)
    for ids, is_merged in (([-1, 2, 2, 2], True), ([0, 2, 2, 2], False)):
        x, layers, scale, ids_tensor = merging_inputs(ids)
        x.requires_grad_()
        gradients = []
        for options in ({"backend": "eager", "design": "split"}, {"backend": "triton", "runs": runs_of(ids)}):
            outputs = multi_lora_linears(x, layers, scale, ids_tensor, **options)
            gradients.append(torch.autograd.grad(sum(y.square().sum() for y in outputs), x)[0])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)
        assert (not seen) == is_merged
    designs.adapters_to_merge.cache_clear()


def test_a_forced_merge_needs_the_runs():
    x, layers, scale, ids = merging_inputs([0, 1])
    with pytest.raises(CloraError, match="merged needs `runs`"):
        multi_lora_linears(x, layers, scale, ids, backend="triton", design="merged")
    with pytest.raises(
        CloraError, match="design='fuse': expected one of auto, merged, fused, split; did you mean 'fused'"
    ):
        multi_lora_linears(x, layers, scale, ids, design="fuse")
    same = [multi_lora_linears(x, layers, scale, ids, design=design)[0] for design in ("auto", None)]
    torch.testing.assert_close(*same, rtol=0, atol=0)
    with pytest.raises(CloraError, match="fused .*is one of the Triton kernels"):
        multi_lora_linears(x, layers, scale, ids, backend="eager", design="fused")
