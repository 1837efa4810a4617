"""Results of the kernels of `multi_lora_linear` depend neither on the rest of the batch nor on the arguments' layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from helpers.linear_cases import (
    CASES,
    DEVICE,
    Case,
    assert_same,
    each_design,
    make,
    ours,
    results,
    upstream_of,
)

from csrc_triton.multi_lora.op import multi_lora_linear_triton

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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
    if design == "split":  # its base layer is one product on top of the bias
        x, weight, bias = arguments[:3]
        y = bias.repeat(x.shape[0] * x.shape[1], 1).addmm_(x.flatten(0, 1), weight.mT)
        assert torch.equal(without["y"], y.view_as(without["y"]))


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
