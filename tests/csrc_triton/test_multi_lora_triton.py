"""`multi_lora_linear` on its Triton kernels: interpreted on a CPU, compiled where there is a GPU.

Wherever memory is allocated for a result it is first filled with NaN: what a kernel forgets to write shows.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from csrc_triton.multi_lora import launch, op
from csrc_triton.multi_lora.op import multi_lora_linear_triton, multi_lora_linears
from csrc_triton.multi_lora.reference import multi_lora_linear
from csrc_triton.multi_lora.tiles import Machine
from csrc_triton.registration import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
FEW = 16
each_design = pytest.mark.parametrize("design", ["fused", "split"])


class Case(NamedTuple):
    """Sizes as in `reference`, and the adapter of each sample."""

    tokens: int
    inputs: int
    outputs: int
    adapters: int
    rank: int
    ids: list[int]


CASES = {
    "mixed": Case(70, 40, 70, 3, 20, [2, -1, 0, 0, 1]),  # no size is a multiple of its tile
    "one_token": Case(1, 33, 17, 2, 4, [1, -1, 0]),
    "one_sample": Case(9, 16, 24, 1, 16, [0]),
    "unused_adapters": Case(4, 8, 8, 6, 8, [5, 5]),
    "all_base": Case(3, 4, 5, 2, 2, [-1, -1]),
    "all_one_adapter": Case(65, 20, 30, 1, 3, [0, 0, 0]),
    "several_rank_blocks": Case(5, 20, 30, 2, 200, [1, 0]),
    "several_chunks": Case(1100, 16, 70, 2, 2, [1, -1]),  # 18 row tiles a sample: more than a group of them
    "empty_batch": Case(3, 4, 5, 2, 2, []),
    "no_tokens": Case(0, 4, 5, 2, 2, [1, 0]),
}
LARGE = {
    "aligned": Case(300, 256, 512, 4, 64, [3, -1, 0, 3]),
    "wide_rank": Case(1500, 512, 320, 2, 256, [1, 0]),
    "model": Case(1024, 3072, 3072, 3, 128, [2, -1, 0]),
}


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = new_empty(self, *args, **kwargs)
        return out.fill_(torch.nan) if type(out) is torch.Tensor and out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def make(case: Case, dtype=torch.float32, factor_dtype=None, bias=True, seed=0):
    """Arguments of the op on the device; factors in fp32 over a 16-bit base by default, as the bank keeps them."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape, dtype=dtype, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(DEVICE, dtype)

    factor_dtype = torch.float32 if factor_dtype is None else factor_dtype
    return [
        rand(len(case.ids), case.tokens, case.inputs),
        rand(case.outputs, case.inputs, scale=case.inputs**-0.5),
        rand(case.outputs) if bias else None,
        rand(case.adapters, case.rank, case.inputs, dtype=factor_dtype, scale=case.inputs**-0.5),
        rand(case.adapters, case.outputs, case.rank, dtype=factor_dtype, scale=case.rank**-0.5),
        rand(case.adapters, dtype=torch.float32) + 1.5,
        torch.tensor(case.ids, dtype=torch.int64, device=DEVICE),
    ]


POSITIONS = {"x": 0, "A": 3, "B": 4}


def results(function, arguments, upstream, wanted="xAB"):
    """The output as `y` and the gradient of each wanted argument."""
    arguments = list(arguments)
    for name in wanted:
        arguments[POSITIONS[name]] = arguments[POSITIONS[name]].detach().requires_grad_()
    y = function(*arguments)
    leaves = [arguments[POSITIONS[name]] for name in wanted]
    return {"y": y.detach()} | dict(zip(wanted, torch.autograd.grad(y, leaves, upstream.to(y.dtype)), strict=True))


def ours(design):
    return lambda *arguments: multi_lora_linear_triton(*arguments, design)


def upstream_of(arguments, seed=1):
    x, weight = arguments[:2]
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*x.shape[:2], len(weight), generator=g).to(x)


def assert_as_accurate_as_eager(function, arguments, reference=multi_lora_linear):
    """Output and gradients: the error against fp64 is at most twice eager's in the same dtype.

    Half a rounding more is allowed for fewer than `FEW` numbers, of which eager's error may be zero by luck.
    """
    exact = [a.double() if a is not None and a.is_floating_point() else a for a in arguments]
    upstream = upstream_of(arguments)
    found, eager, truth = (
        results(f, a, upstream) for f, a in ((function, arguments), (reference, arguments), (reference, exact))
    )
    rounding = torch.finfo(arguments[0].dtype).eps
    for name in found:
        slack = 0.5 * rounding * truth[name].norm() if truth[name].numel() < FEW else 0
        assert found[name].dtype == eager[name].dtype
        error, allowed = ((result[name].double() - truth[name]).norm() for result in (found, eager))
        assert error <= 2 * allowed + slack, (name, error, allowed)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


@each_design
@pytest.mark.parametrize("name", CASES)
def test_fp32(name, design):
    assert_as_accurate_as_eager(ours(design), make(CASES[name]))


@each_design
@pytest.mark.parametrize("factors", [torch.float32, None], ids=["fp32_factors", "low_factors"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_low_precision(dtype, factors, design):
    assert_as_accurate_as_eager(ours(design), make(CASES["mixed"], dtype, factors or dtype))


@gpu
@each_design
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_large(name, dtype, design):
    assert_as_accurate_as_eager(ours(design), make(LARGE[name], dtype))


@settings(max_examples=8 if INTERPRETED else 50, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_shape(data):
    size = lambda most: data.draw(st.integers(1, most))  # noqa: E731
    adapters = size(3)
    ids = data.draw(st.lists(st.integers(-1, adapters - 1), min_size=1, max_size=4))
    case = Case(size(80), size(50), size(80), adapters, size(40), ids)
    arguments = make(case, data.draw(st.sampled_from(DTYPES)), bias=data.draw(st.booleans()))
    assert_as_accurate_as_eager(ours(data.draw(st.sampled_from(["fused", "split"]))), arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensor_descriptors(monkeypatch, dtype):
    """The loop that Hopper takes, over tails in every direction; wherever rows are not aligned it takes pointers."""
    monkeypatch.setattr(launch, "machine_of", lambda device: Machine(232448, descriptors=True))
    seen = launches(monkeypatch)
    assert_as_accurate_as_eager(ours("fused"), make(Case(70, 40, 72, 3, 20, [2, -1, 0]), dtype))
    assert [options["DESCRIPTORS"] for name, options in seen if name == "linear_kernel"] == [True, True]
    assert_as_accurate_as_eager(ours("fused"), make(Case(9, 41, 72, 3, 20, [2, -1, 0]), dtype))
    assert [options["DESCRIPTORS"] for name, options in seen if name == "linear_kernel"][2:] == [False, False]


def launches(monkeypatch):
    """A list to which every launch adds its kernel's name and constants."""
    seen, wrap = [], launch.wrap_triton

    class Seen:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def call(*args, **kwargs):
                seen.append((self.kernel.__name__, kwargs))
                return wrap(self.kernel)[grid](*args, **kwargs)

            return call

    monkeypatch.setattr(launch, "wrap_triton", Seen)
    return seen


# What does not depend on the batch: samples and base rows.


@each_design
def test_sample_alone_equals_sample_in_a_mixed_batch(design):
    arguments = make(CASES["mixed"])
    if design == "split":
        arguments[1], arguments[2] = torch.zeros_like(arguments[1]), None  # F.linear may differ; the rest may not
    upstream = upstream_of(arguments)
    batch = results(ours(design), arguments, upstream, "x")
    for b in range(len(arguments[0])):
        alone = [arguments[0][b : b + 1], *arguments[1:6], arguments[6][b : b + 1]]
        assert_same(
            results(ours(design), alone, upstream[b : b + 1], "x"), {name: t[b : b + 1] for name, t in batch.items()}
        )


@each_design
def test_permuted_batch_permutes_the_output(design):
    arguments, order = make(CASES["mixed"]), torch.tensor([3, 1, 4, 0, 2], device=DEVICE)
    if design == "split":
        arguments[1], arguments[2] = torch.zeros_like(arguments[1]), None
    upstream = upstream_of(arguments)
    expected = results(ours(design), arguments, upstream, "x")
    permuted = [arguments[0][order], *arguments[1:6], arguments[6][order]]
    assert_same(results(ours(design), permuted, upstream[order], "x"), {name: t[order] for name, t in expected.items()})


@each_design
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_base_rows_are_the_base_layer_over_poisoned_adapters(design, poison):
    arguments = make(CASES["mixed"])
    upstream, base = upstream_of(arguments), arguments[6] < 0
    without = results(ours(design), [*arguments[:6], torch.full_like(arguments[6], -1)], upstream)
    for factor in arguments[3:6]:
        factor.fill_(poison)
    found = results(ours(design), arguments, upstream)
    for name in ("y", "x"):
        assert torch.equal(found[name][base], without[name][base])
        assert not torch.isfinite(found[name][~base]).any()
    for name in ("A", "B"):
        assert not without[name].any(), "base rows send no gradient"
    if design == "split":
        plain = arguments[0].detach().requires_grad_()
        y = F.linear(plain, *arguments[1:3])
        assert torch.equal(without["y"], y.detach())
        assert torch.equal(without["x"], torch.autograd.grad(y, plain, upstream)[0])


@each_design
def test_unused_and_neighbouring_adapters_do_not_leak(design):
    arguments = make(CASES["mixed"])
    upstream = upstream_of(arguments)
    expected = results(ours(design), arguments, upstream)
    for factor in arguments[3:6]:
        factor[2] = torch.nan  # only sample 0 uses it
    found = results(ours(design), arguments, upstream)
    for name in ("y", "x"):
        assert torch.equal(found[name][1:], expected[name][1:])
        assert torch.isnan(found[name][0]).all()
    for name in ("A", "B"):
        assert torch.equal(found[name][:2], expected[name][:2])


@each_design
def test_mixed_ranks_padded_with_zeros_equal_their_own_rank(design):
    arguments, ranks = make(CASES["mixed"]), [1, 20, 7]
    for e, rank in enumerate(ranks):
        arguments[3][e, rank:], arguments[4][e, :, rank:] = 0, 0
    y = multi_lora_linear_triton(*arguments, design)
    x, weight, bias, lora_A, lora_B, scale, ids = arguments
    for b, e in enumerate(ids.tolist()):
        if e >= 0:
            own = (lora_A[e : e + 1, : ranks[e]], lora_B[e : e + 1, :, : ranks[e]], scale[e : e + 1])
            alone = multi_lora_linear_triton(x[b : b + 1], weight, bias, *own, torch.zeros_like(ids[:1]), design)
            torch.testing.assert_close(y[b : b + 1], alone, rtol=1e-5, atol=1e-5)


# Layouts of the arguments.


def in_wider_rows(t):
    return torch.stack([t, torch.full_like(t, torch.nan)], -2).flatten(-3, -2)[..., ::2, :]


def with_strided_channels(t):
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


def of_a_larger_tensor(t):
    return F.pad(t, (3, 2, 1, 4), value=torch.nan)[..., 1:-4, 3:-2]


@each_design
@pytest.mark.parametrize("layout", [in_wider_rows, with_strided_channels, of_a_larger_tensor])
@pytest.mark.parametrize("position", [0, 1, 3, 4], ids=["x", "weight", "lora_A", "lora_B"])
def test_strides(position, layout, design):
    arguments = make(Case(5, 9, 11, 2, 3, [1, -1, 0]))
    upstream = upstream_of(arguments)
    expected = results(ours(design), arguments, upstream)
    arguments[position] = layout(arguments[position])
    assert not arguments[position].is_contiguous()
    found = results(ours(design), arguments, upstream)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


@each_design
@pytest.mark.parametrize("layout", [in_wider_rows, with_strided_channels, "of_a_sum", "samples_inside"])
def test_strides_of_the_upstream_gradient(layout, design):
    arguments = make(Case(5, 9, 11, 2, 3, [1, -1, 0]))
    upstream = upstream_of(arguments)
    if layout == "of_a_sum":
        upstream = torch.ones((), device=DEVICE).expand(upstream.shape)
    strided = layout(upstream) if callable(layout) else upstream
    if layout == "samples_inside":
        strided = upstream.transpose(0, 1).contiguous().transpose(0, 1)
    found = results(ours(design), arguments, strided)
    expected = results(ours(design), arguments, upstream.contiguous())
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


@each_design
def test_int32_ids_and_low_precision_scale(design):
    arguments = make(CASES["one_token"])
    arguments[5] = arguments[5].half()
    expected = multi_lora_linear_triton(*arguments, design)
    arguments[5], arguments[6] = arguments[5].float(), arguments[6].int()
    assert torch.equal(multi_lora_linear_triton(*arguments, design), expected)


@each_design
def test_arguments_are_not_modified(design):
    arguments = make(CASES["one_token"])
    copies = [t.clone() for t in arguments]
    results(ours(design), arguments, upstream_of(arguments))
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))


@pytest.mark.parametrize("empty", ["adapters", "rank"])
def test_without_adapters_it_is_the_base_layer(empty):
    arguments = make(CASES["one_token"]._replace(ids=[-1, -1]))
    arguments[3:6] = [t[:0] if empty == "adapters" else t for t in arguments[3:6]]
    if empty == "rank":
        arguments[3:5] = [arguments[3][:, :0], arguments[4][..., :0]]
    assert torch.equal(multi_lora_linear_triton(*arguments), F.linear(*arguments[:3]))


# The backward pass: no more than is needed.


@each_design
@pytest.mark.parametrize("wanted", ["x", "A", "B", "xA", "xB", "AB"])
def test_gradients_that_are_asked_for_equal_all_of_them(wanted, design):
    arguments = make(CASES["mixed"])
    upstream = upstream_of(arguments)
    expected = results(ours(design), arguments, upstream)
    assert_same(results(ours(design), arguments, upstream, wanted), {name: expected[name] for name in ("y", *wanted)})


@pytest.mark.parametrize(
    ("wanted", "design", "kernels"),
    [
        ("x", "fused", ["shrink", "linear", "shrink", "linear"]),
        ("x", "split", ["shrink", "expand_add", "shrink", "expand_add"]),
        ("B", "fused", ["shrink", "linear", "gradients", "reduce"]),
        ("A", "fused", ["shrink", "linear", "shrink", "gradients", "reduce"]),
        ("AB", "split", ["shrink", "expand_add", "gradients", "reduce", "gradients", "reduce"]),
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
        (rand(n + i, k) / 3, rand(n + i) if i % 2 else None, rand(2, r, k) / 3, rand(2, n + i, r) / 2)
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
        ((16, 3), (0, 1)),
        ((5, 2, 8, 3), (0, 1, 2, 3)),
        ((4, 0, 6), (0, 1, 2)),
        ((4, 2, 6), (2,)),
    ],
    ids=["qkv", "two", "four", "one_without_ranks", "one_output_used"],
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


def test_projections_share_their_passes_over_x(monkeypatch):
    x = make(Case(3, 20, 1, 1, 1, [1, -1, 0]))[0]
    seen = launches(monkeypatch)
    together = lambda x, ps: multi_lora_linears(x, ps, torch.ones(2, device=DEVICE), ids, "fused")  # noqa: E731
    ids = torch.tensor([1, -1, 0], device=DEVICE)
    of_projections(together, x, projections_of(x, (4, 4, 4)), (0, 1, 2))
    kernels = [name.removesuffix("_kernel") for name, _ in seen]
    assert kernels[:4] == ["shrink", "linear", "linear", "linear"]
    assert kernels[4:] == ["gradients", "reduce"] * 3 + ["linear"] * 3 + ["gradients"] + ["reduce"] * 3


# The operators: what PyTorch checks, recomputes and compiles.


def operator_arguments(arguments):
    x, weight, bias, lora_A, lora_B, scale, ids = arguments
    return x, [weight], [bias], [True], [lora_A], [lora_B], scale, ids


@each_design
def test_opcheck_forward(design, monkeypatch):
    # The ranks' rows of base samples, which nobody reads, are returned as they were allocated: equal in every run here.
    new_empty = torch.Tensor.new_empty  # fills with NaN, which equals nothing
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).nan_to_num_())
    arguments = make(Case(5, 9, 11, 2, 3, [1, -1, 0]))
    for position in POSITIONS.values():
        arguments[position].requires_grad_()
    torch.library.opcheck(op.forward_op, (*operator_arguments(arguments), design))


def test_opcheck_backward():
    x, weights, _, _, lora_A, lora_B, scale, ids = operator_arguments(make(Case(5, 9, 11, 2, 3, [1, -1, 0])))
    upstream, low = torch.randn(3, 5, 11, device=DEVICE), torch.randn(3, 5, 3, device=DEVICE)
    call = ([upstream], x, low, weights, lora_A, lora_B, [0], 3, scale, ids, True, True, True, "fused")
    torch.library.opcheck(op.backward_op, call)


@each_design
def test_watched_operators_equal_the_direct_path(design):
    """The path that torch.compile and selective checkpointing take, without either."""
    arguments = make(CASES["mixed"])
    upstream, names = upstream_of(arguments), []
    expected = results(ours(design), arguments, upstream)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():
        found = results(ours(design), arguments, upstream)
    assert_same(found, expected)
    assert {"clora::multi_lora_linears", "clora::multi_lora_linears_backward"} <= set(names)


@each_design
def test_activation_checkpointing(design):
    arguments = make(CASES["mixed"])
    upstream = upstream_of(arguments)
    recomputed = lambda *a: checkpoint(ours(design), *a, use_reentrant=False)  # noqa: E731
    assert_same(results(recomputed, arguments, upstream), results(ours(design), arguments, upstream))


def block(x, layers, scale, ids):
    """Attention and a gated feed-forward step, every linear layer with adapters."""
    h = F.layer_norm(x, x.shape[-1:])
    q, k, v = multi_lora_linears(h, layers[:3], scale, ids, "fused")
    x = x + multi_lora_linear_triton(F.scaled_dot_product_attention(q, k, v), *layers[3], scale, ids)
    return x + multi_lora_linear_triton(F.gelu(F.layer_norm(x, x.shape[-1:])), *layers[4], scale, ids)


@pytest.mark.parametrize("backend", ["aot_eager"] if INTERPRETED else ["aot_eager", "inductor"])
def test_torch_compile_of_a_block_has_no_graph_break(backend):
    arguments = [make(Case(6, 16, 16, 2, 4, [1, -1]), seed=i) for i in range(5)]
    x, scale, ids = arguments[0][0].requires_grad_(), *arguments[0][5:]
    layers = [tuple(a[1:5]) for a in arguments]
    leaves = [x, *(factor.requires_grad_() for layer in layers for factor in layer[2:])]
    found = []
    for function in (block, torch.compile(block, fullgraph=True, backend=backend)):
        y = function(x, layers, scale, ids)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    torch._dynamo.reset()
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


@gpu
@each_design
def test_cuda_graph_replays_with_other_ids(design):
    arguments = make(LARGE["aligned"], torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        multi_lora_linear_triton(*arguments, design)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = multi_lora_linear_triton(*arguments, design)
    arguments[6].copy_(torch.tensor([-1, 2, 1, 0]))
    graph.replay()
    assert torch.equal(y, multi_lora_linear_triton(*arguments, design))


@gpu
@each_design
def test_never_waits_for_the_gpu(design):
    arguments = make(LARGE["aligned"], torch.bfloat16)
    upstream = upstream_of(arguments)
    results(ours(design), arguments, upstream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(ours(design), arguments, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# What is not covered.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 1, 32)}, r"weight: expected shape \[17, 32\], found \[17, 33\]"),
        ({1: torch.zeros(17, 33, requires_grad=True)}, "weight require gradients: expected frozen ones"),
        ({2: torch.zeros(17, requires_grad=True)}, "bias require gradients"),
        ({5: torch.zeros(2, requires_grad=True)}, "scale require gradients"),
        ({1: torch.zeros(17, 33, dtype=torch.float16)}, "weight is torch.float16, x torch.float32"),
        ({3: torch.zeros(2, 4, 33, dtype=torch.float64)}, "lora_A is torch.float64, expected one of"),
        ({0: torch.zeros(3, 1, 33, dtype=torch.float64)}, "x is torch.float64"),
        ({3: torch.zeros(2, 300, 33), 4: torch.zeros(2, 17, 300)}, "rank 300 is above 256"),
        ({1: torch.zeros(17, 33, device="meta")}, "weight is on meta, x on"),
    ],
)
def test_what_is_not_covered_is_named(change, message):
    arguments = make(CASES["one_token"])
    for position, tensor in change.items():
        arguments[position] = tensor if tensor.is_meta else tensor.to(DEVICE).requires_grad_(tensor.requires_grad)
    with pytest.raises(ValueError, match=message):
        multi_lora_linear_triton(*arguments)


def test_a_base_that_asks_for_gradients_is_covered_where_none_are_kept():
    arguments = make(CASES["one_token"])
    arguments[1].requires_grad_()
    with torch.no_grad():
        multi_lora_linear_triton(*arguments)


def test_autocast_is_not_covered():
    with torch.autocast(DEVICE, dtype=torch.bfloat16), pytest.raises(ValueError, match="autocast is on"):
        multi_lora_linear_triton(*make(CASES["one_token"]))


def test_unknown_design_is_named():
    with pytest.raises(ValueError, match=r"design: expected one of \['fused', 'split'\] or None, found 'fast'"):
        multi_lora_linear_triton(*make(CASES["one_token"]), design="fast")
