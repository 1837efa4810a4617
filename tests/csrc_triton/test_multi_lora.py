"""`multi_lora_linear` against a per-sample loop in fp64, its gradients, and no leaks between samples."""

import pytest
import torch
import torch.nn.functional as F

from clora.ops import multi_lora_linear

CASES = {  # name: (B, T, K, N, E, R, adapter ids)
    "mixed": (5, 7, 6, 9, 3, 4, [2, -1, 0, 0, 1]),
    "one_adapter": (4, 3, 5, 6, 1, 2, [0, -1, 0, 0]),
    "one_sample_one_token": (1, 1, 5, 3, 2, 3, [1]),
    "unused_adapters": (2, 4, 8, 8, 6, 8, [5, 5]),
    "all_base": (3, 2, 4, 5, 2, 2, [-1, -1, -1]),
    "all_base_one_adapter": (3, 2, 4, 5, 1, 2, [-1, -1, -1]),
    "no_adapters": (2, 3, 4, 5, 0, 2, [-1, -1]),
    "empty_batch": (0, 3, 4, 5, 2, 2, []),
    "empty_batch_one_adapter": (0, 3, 4, 5, 1, 2, []),
    "rank_zero": (2, 3, 4, 5, 2, 0, [1, -1]),
}


def make(name, dtype=torch.float64, bias=True):
    num_samples, t, k, n, e, r, ids = CASES[name]
    g = torch.Generator().manual_seed(len(name))
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    inputs = [rand(num_samples, t, k), rand(n, k), rand(n) if bias else None, rand(e, r, k), rand(e, n, r), rand(e)]
    return [*inputs, torch.tensor(ids, dtype=torch.int64)]


def loop(x, weight, bias, lora_A, lora_B, scale, adapter_ids):
    rows = []
    for sample, e in zip(x, adapter_ids.tolist(), strict=True):
        full = weight if e < 0 else weight + scale[e] * lora_B[e] @ lora_A[e]
        rows.append(sample @ full.T + (0 if bias is None else bias))
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1], weight.shape[0])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", CASES)
def test_equals_loop_over_samples(name, bias):
    inputs = make(name, bias=bias)
    torch.testing.assert_close(multi_lora_linear(*inputs), loop(*inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mixed", "one_adapter", "all_base", "all_base_one_adapter"])
def test_gradcheck(name):
    x, weight, bias, lora_A, lora_B, scale, ids = make(name)
    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B)]
    assert torch.autograd.gradcheck(
        lambda x, a, b: multi_lora_linear(x, weight, bias, a, b, scale, ids), leaves, fast_mode=False
    )


@pytest.mark.parametrize("name", ["mixed", "one_adapter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_error_is_of_its_dtype(name, dtype):
    inputs = make(name, dtype)
    out = multi_lora_linear(*inputs)
    exact = loop(*[t.double() if t is not None and t.is_floating_point() else t for t in inputs])
    assert out.dtype == dtype
    assert (out.double() - exact).norm() < 2 * torch.finfo(dtype).eps * exact.norm()


def test_fp32_adapters_over_a_bf16_base():
    x, weight, bias, lora_A, lora_B, scale, ids = make("mixed", torch.bfloat16)
    masters = [t.float().requires_grad_() for t in (lora_A, lora_B)]
    out = multi_lora_linear(x, weight, bias, *masters, scale.float(), ids)
    assert torch.equal(out, multi_lora_linear(x, weight, bias, lora_A, lora_B, scale, ids))
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.abs().sum() > 0 for t in masters)


@pytest.mark.parametrize("name", ["mixed", "one_adapter"])
def test_autocast_computes_in_its_dtype(name):
    """Also for an input that is still fp32, as that of a pipeline's first layers."""
    x, weight, bias, lora_A, lora_B, scale, ids = make(name, torch.float32)
    masters = [t.requires_grad_() for t in (lora_A, lora_B)]
    with torch.autocast("cpu", torch.bfloat16):
        out = multi_lora_linear(x, weight, bias, *masters, scale, ids)
    exact = loop(*[t.detach().double() for t in (x, weight, bias, lora_A, lora_B, scale)], ids)
    assert out.dtype == torch.bfloat16
    # Products are rounded on the way: factors, low-rank products and sums.
    assert (out.double() - exact).norm() < 4 * torch.finfo(torch.bfloat16).eps * exact.norm()
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.abs().sum() > 0 for t in masters)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("poisoned", ["lora_A", "lora_B", "scale", "all"])
@pytest.mark.parametrize("ids", [[-1, 1, -1], [-1, -1, -1]], ids=["mixed", "all_base"])
@pytest.mark.parametrize("num_adapters", [1, 3])
def test_base_rows_are_exact_over_poisoned_adapters(num_adapters, ids, poisoned, poison):
    x, weight, bias = torch.randn(3, 4, 6), torch.randn(5, 6), torch.randn(5)
    ids = torch.tensor(ids).clamp(max=num_adapters - 1)
    lora_A, lora_B, scale = (
        torch.full(shape, poison) if poisoned in (name, "all") else torch.randn(shape)
        for name, shape in [
            ("lora_A", (num_adapters, 2, 6)),
            ("lora_B", (num_adapters, 5, 2)),
            ("scale", (num_adapters,)),
        ]
    )
    lora_A.requires_grad_(), lora_B.requires_grad_()
    x.requires_grad_()
    out = multi_lora_linear(x, weight, bias, lora_A, lora_B, scale, ids)
    base = F.linear(x, weight, bias)
    rows = ids < 0
    assert torch.equal(out[rows], base[rows])
    assert not torch.isfinite(out[~rows]).any()
    out.sum().backward()
    assert torch.equal(x.grad[rows], torch.autograd.grad(base.sum(), x)[0][rows])
    if rows.all():
        assert not lora_A.grad.any()
        assert not lora_B.grad.any()


def test_poisoned_neighbour_adapter_does_not_leak():
    inputs = make("mixed")
    expected = multi_lora_linear(*inputs)
    inputs[3][2], inputs[4][2], inputs[5][2] = float("nan"), float("inf"), float("nan")
    out = multi_lora_linear(*inputs)
    assert torch.equal(out[1:], expected[1:])
    assert not torch.isfinite(out[0]).any()


def test_mixed_ranks_padded_with_zeros_equal_their_own_rank():
    x, weight, bias, lora_A, lora_B, scale, ids = make("mixed")
    ranks = [1, 4, 2]
    for e, r in enumerate(ranks):
        lora_A[e, r:], lora_B[e, :, r:] = 0, 0
    out = multi_lora_linear(x, weight, bias, lora_A, lora_B, scale, ids)
    for b, e in enumerate(ids.tolist()):
        if e >= 0:
            r = ranks[e]
            alone = multi_lora_linear(
                x[b : b + 1], weight, bias, lora_A[e : e + 1, :r], lora_B[e : e + 1, :, :r], scale[e : e + 1], ids[2:3]
            )
            torch.testing.assert_close(out[b : b + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mixed", "one_adapter"])
def test_sample_alone_equals_sample_in_a_mixed_batch(name):
    x, *rest, ids = make(name)
    out = multi_lora_linear(x, *rest, ids)
    for b in range(len(x)):
        alone = multi_lora_linear(x[b : b + 1], *rest, ids[b : b + 1])
        torch.testing.assert_close(alone[0], out[b], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mixed", "one_adapter"])
def test_permuted_batch_permutes_the_output(name):
    x, *rest, ids = make(name)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        multi_lora_linear(x[order], *rest, ids[order]), multi_lora_linear(x, *rest, ids)[order], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", ["mixed", "one_adapter"])
def test_strided_input_and_int32_ids(name):
    x, *rest, ids = make(name)
    strided = x.mT.contiguous().mT
    assert not strided.is_contiguous()
    expected = multi_lora_linear(x, *rest, ids)
    torch.testing.assert_close(multi_lora_linear(strided, *rest, ids.int()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mixed", "one_adapter"])
def test_inputs_are_not_modified(name):
    inputs = make(name)
    copies = [t.clone() for t in inputs]
    multi_lora_linear(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("name", ["mixed", "one_adapter"])
def test_never_reads_a_value_on_the_host(name):
    num_samples, t, k, n, e, r, _ = CASES[name]
    shapes = (num_samples, t, k), (n, k), (n,), (e, r, k), (e, n, r), (e,)
    ids = torch.empty(num_samples, dtype=torch.int64, device="meta")  # has no values: any host read raises
    out = multi_lora_linear(*(torch.empty(shape, device="meta") for shape in shapes), ids)
    assert out.shape == (num_samples, t, n)


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(5, 6), r"expected x \[B, T, K\]"),
        (1, torch.zeros(9, 5), r"weight: expected shape \[9, 6\], found \[9, 5\]"),
        (2, torch.zeros(8), r"bias: expected shape \[9\], found \[8\]"),
        (3, torch.zeros(3, 4, 5), r"lora_A: expected shape \[3, 4, 6\]"),
        (4, torch.zeros(3, 9, 5), r"lora_B: expected shape \[3, 9, 4\]"),
        (5, torch.zeros(2), r"scale: expected shape \[3\]"),
        (6, torch.zeros(4, dtype=torch.int64), r"adapter_ids: expected shape \[5\]"),
        (6, torch.zeros(5), "adapter_ids: expected int32 or int64, found torch.float32"),
    ],
)
def test_wrong_shape_is_named(position, wrong, message):
    inputs = make("mixed")
    inputs[position] = wrong
    with pytest.raises(ValueError, match=message):
        multi_lora_linear(*inputs)
