"""`multi_lora_linear` as PyTorch operators: checked, recomputed, compiled and captured; and the calls that they do not cover."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from helpers.linear_cases import (
    CASES,
    DEVICE,
    LARGE,
    POSITIONS,
    Case,
    assert_same,
    each_design,
    gpu,
    make,
    ours,
    results,
    upstream_of,
)

from csrc_triton.multi_lora import op
from csrc_triton.multi_lora.op import multi_lora_linear_triton, multi_lora_linears
from csrc_triton.registration import INTERPRETED

pytestmark = pytest.mark.usefixtures("poisoned_memory")


# The operators: checked, recomputed and compiled by PyTorch.


def operator_arguments(arguments):
    x, weight, bias, lora_A, lora_B, scale, ids = arguments
    return x, None, [weight], [bias], [True], [lora_A], [lora_B], scale, ids


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
    x, _, weights, _, _, lora_A, lora_B, scale, ids = operator_arguments(make(Case(5, 9, 11, 2, 3, [1, -1, 0])))
    upstream, low = torch.randn(3, 5, 11, device=DEVICE), torch.randn(3, 5, 3, device=DEVICE)
    call = ([upstream], x, low, weights, lora_A, lora_B, [0], scale, ids, True, "fused")
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


# Calls that are not covered.


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
