"""`multi_lora_add` on its Triton kernels: against fp64, and beside the layer that it completes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from helpers.linear_cases import CASES, DEVICE, DTYPES, Case, assert_as_accurate_as_eager, make, ours, upstream_of

from clora import ops
from csrc_triton.multi_lora import op
from csrc_triton.multi_lora.reference import multi_lora_add
from csrc_triton.registration import INTERPRETED

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def as_layer(function):
    """`function` as a whole linear layer, whose base PyTorch computes."""

    def layer(x, weight, bias, *rest):
        return function(F.linear(x, weight, bias), x, *rest)

    return layer


@pytest.mark.parametrize("name", CASES)
def test_fp32(name):
    assert_as_accurate_as_eager(as_layer(op.multi_lora_add_triton), make(CASES[name]))


@pytest.mark.parametrize("factors", [torch.float32, None], ids=["fp32_factors", "low_factors"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_low_precision(dtype, factors):
    arguments = make(CASES["mixed"], dtype, factors or dtype)
    assert_as_accurate_as_eager(as_layer(op.multi_lora_add_triton), arguments)


def test_it_completes_the_base_layer_and_leaves_y_alone():
    x, weight, bias, *rest = make(CASES["mixed"])
    y = F.linear(x, weight, bias)
    before = y.clone()
    found = op.multi_lora_add_triton(y, x, *rest)
    torch.testing.assert_close(found, ours("split")(x, weight, bias, *rest), rtol=1e-5, atol=1e-5)
    assert torch.equal(y, before)
    assert torch.equal(found[1], y[1]), "sample 1 has no adapter"


@pytest.mark.parametrize("wanted", ["x", "A", "B", "xB", "AB"])
def test_gradients_that_are_not_needed_change_no_other(wanted):
    x, weight, bias, a, b, scale, ids = make(Case(5, 9, 11, 2, 3, [1, -1, 0]))
    y = F.linear(x, weight, bias)

    def gradients(names):
        leaves = {"y": y.clone(), "x": x.clone(), "A": a.clone(), "B": b.clone()}
        for name in names:
            leaves[name].requires_grad_()
        out = op.multi_lora_add_triton(*leaves.values(), scale, ids)
        upstream = upstream_of((x, weight))
        return dict(zip(names, torch.autograd.grad(out, [leaves[n] for n in names], upstream), strict=True))

    every = gradients("yxAB")
    assert torch.equal(every["y"], upstream_of((x, weight)))
    for name, gradient in gradients(wanted).items():
        assert torch.equal(gradient, every[name])


def test_opcheck(monkeypatch):
    new_empty = torch.Tensor.new_empty  # ranks of base samples are returned as allocated: equal in every run here
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).nan_to_num_())
    x, weight, bias, a, b, scale, ids = make(Case(5, 9, 11, 2, 3, [1, -1, 0]))
    leaves = [tensor.requires_grad_() for tensor in (F.linear(x, weight, bias), x, a, b)]
    y, x, a, b = leaves
    torch.library.opcheck(op.forward_op, (x, y, [], [], [False], [a], [b], scale, ids, None))
    upstream, low = torch.randn(3, 5, 11, device=DEVICE), torch.randn(3, 5, 3, device=DEVICE)
    x, a, b = (tensor.detach() for tensor in (x, a, b))
    call = ([upstream], x, low, [], [a], [b], [0], scale, ids, True, None)
    torch.library.opcheck(op.backward_op, call)


def test_what_the_kernels_do_not_cover():
    x, weight, bias, *rest = make(Case(5, 8, 8, 2, 3, [1, -1, 0]))
    y = F.linear(x, weight, bias)
    assert "y is torch.float64" in op.unsupported_add(y.double(), x, *rest)
    with pytest.raises(ValueError, match=r"expected y \[B, T, N\]"):
        op.unsupported_add(y[:2], x, *rest)
    with pytest.raises(ValueError, match="lora_B"):
        multi_lora_add(y[..., :4], x, *rest)
    backend = "triton" if INTERPRETED else None
    assert torch.equal(ops.multi_lora_add(y, x, *rest, backend=backend), op.multi_lora_add_triton(y, x, *rest))
    assert torch.equal(ops.multi_lora_add(y, x, *rest, backend="eager"), multi_lora_add(y, x, *rest))
