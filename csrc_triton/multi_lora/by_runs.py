"""The multi-adapter linear layer in PyTorch where the host knows which rows share an adapter.

The rows of an adapter ``e`` that is *merged* multiply one weight, made by one product::

    y = x W'^T + bias        W' = W + scale[e] B[e] A[e]

which takes ``N K R`` multiplications, however many rows follow. The rows of the others multiply W, all neighbours at once,
and each run of one adapter adds its own low-rank part::

    y = x W^T + bias         y += (scale[e] x A[e]^T) B[e]^T

which takes ``M R (K + N)`` for M rows. `designs` chooses. Base rows meet no factor in either. Legend as in `reference.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Run(NamedTuple):
    """Neighbouring samples ``[start, stop)`` of a batch that share an adapter, or with -1 only the base."""

    adapter: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """The samples."""
        return slice(self.start, self.stop)


def runs_of(adapter_ids: Sequence[int]) -> tuple[Run, ...]:
    """Splits a batch, given each sample's adapter, into its runs; sorted batches have the fewest."""
    runs = []
    start = 0
    for stop in range(1, len(adapter_ids) + 1):
        if stop == len(adapter_ids) or adapter_ids[stop] != adapter_ids[start]:
            runs.append(Run(adapter_ids[start], start, stop))
            start = stop
    return tuple(runs)


Projection = tuple[Tensor, Tensor | None, Tensor, Tensor]
"""``(weight, bias, lora_A, lora_B)`` of a layer."""


def is_plain(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> bool:
    """Tests whether a layer can be computed by runs: a frozen base of x's dtype, without autocast."""
    frozen = not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (weight, bias, scale))
    one_dtype = all(t is None or t.dtype == x.dtype for t in (weight, bias))
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return frozen and one_dtype and not autocast


def linears_by_runs(
    x: Tensor,
    projections: Sequence[Projection],
    scale: Tensor,
    runs: tuple[Run, ...],
    merged: Sequence[frozenset[int]],
    out: Sequence[Tensor] | None,
) -> list[Tensor]:
    """Computes layers of one input, with the adapters that are merged in each; into ``out``, without gradients, if given."""
    if out is None:
        return [LinearByRuns.apply(x, *layer, scale, runs, own) for layer, own in zip(projections, merged, strict=True)]
    for layer, own, y in zip(projections, merged, out, strict=True):
        linear_by_runs(x, *layer, scale, runs, own, y)
    return list(out)


class LinearByRuns(torch.autograd.Function):
    """The layer, differentiable once in x, lora_A and lora_B.

    Arguments are those of `reference.multi_lora_linear` with the ids as runs, then the adapters that are merged.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scale, runs: tuple[Run, ...], merged: frozenset[int]):
        ctx.runs = runs
        ctx.merged = merged
        trained = lora_A.requires_grad or lora_B.requires_grad
        ctx.save_for_backward(x if trained else None, weight, lora_A, lora_B, scale)
        return linear_by_runs(x, weight, bias, lora_A, lora_B, scale, runs, merged)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, scale = ctx.saved_tensors
        needs_x, _, _, needs_A, needs_B = ctx.needs_input_grad[:5]
        dx = None
        if needs_x:
            # dx = dy W + scale (dy B) A is the same layer with W and both factors transposed.
            dx = linear_by_runs(dy, weight.T, None, lora_B.mT, lora_A.mT, scale, ctx.runs, ctx.merged)
        dA = torch.zeros_like(lora_A) if needs_A else None
        dB = torch.zeros_like(lora_B) if needs_B else None
        for run in ctx.runs if x is not None else ():
            if run.adapter < 0:
                continue
            adapter = run.adapter
            grad_A, grad_B = _factor_gradients(x[run.rows], dy[run.rows], lora_A[adapter], lora_B[adapter])
            if needs_A:
                dA[adapter] += scale[adapter] * grad_A
            if needs_B:
                dB[adapter] += scale[adapter] * grad_B
        return dx, None, None, dA, dB, None, None, None


def linear_by_runs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    runs: Sequence[Run],
    merged: frozenset[int],
    y: Tensor | None = None,
) -> Tensor:
    """`LinearByRuns` without its gradient; written to ``y [B, T, N]``, contiguous, where it is given."""
    if y is None and all(run.adapter < 0 for run in runs):
        # The layer itself: its bits are those of a transformer without a bank.
        return F.linear(x, weight, bias).contiguous()
    y = x.new_empty(*x.shape[:2], weight.shape[0]) if y is None else y
    write_merged(x, weight, bias, lora_A, lora_B, scale, runs, merged, y)
    write_span = _base_first if x.element_size() > 2 else _low_rank_first
    for span in spans_without(runs, merged):
        write_span(x, weight, bias, lora_A, lora_B, scale, span, y)
    return y


def _base_first(x, weight, bias, lora_A, lora_B, scale, span: Sequence[Run], y: Tensor) -> None:
    """Writes neighbouring runs: one product of the base for all of them, to which each low-rank part is added."""
    rows = slice(span[0].start, span[-1].stop)
    _product(x[rows], weight, bias, y[rows])
    for run in span:
        if run.adapter >= 0:
            a, b = _factors(x.dtype, lora_A, lora_B, scale, run.adapter)
            _add_product(_flat(x[run.rows]) @ a.T, b, _flat(y[run.rows]))


def _low_rank_first(x, weight, bias, lora_A, lora_B, scale, span: Sequence[Run], y: Tensor) -> None:
    """The same in 16 bits: added to a base that is already rounded, a weak low-rank part would change nothing."""
    for run in span:
        own, out = _flat(x[run.rows]), _flat(y[run.rows])
        if run.adapter < 0:
            _product(own, weight, bias, out)
        else:
            a, b = _factors(x.dtype, lora_A, lora_B, scale, run.adapter)
            _product(own @ a.T, b, bias, out)
            _add_product(own, weight, out)


def write_merged(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    runs: Sequence[Run],
    merged: frozenset[int],
    y: Tensor,
) -> None:
    """Writes the rows of the merged adapters to ``y [B, T, N]``, which is contiguous."""
    merged_weight = torch.empty_like(weight) if merged else None  # one buffer for all adapters of the call
    for adapter in sorted(merged):
        a, b = _factors(x.dtype, lora_A, lora_B, scale, adapter)
        torch.addmm(weight, b, a, out=merged_weight)
        for run in runs:
            if run.adapter == adapter:
                _product(x[run.rows], merged_weight, bias, y[run.rows])


def spans_without(runs: Sequence[Run], merged: frozenset[int]) -> Iterator[list[Run]]:
    """Yields the stretches of neighbouring runs whose adapters are not merged."""
    for is_merged, span in groupby(runs, key=lambda run: run.adapter in merged):
        if not is_merged:
            yield list(span)


def _factors(dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor, scale: Tensor, adapter: int) -> tuple[Tensor, Tensor]:
    """Returns an adapter's ``A [R, K]`` and ``scale B [N, R]`` in the dtype of the layer."""
    # The scale is not rounded to 16 bits by itself: that would be one error of all tokens.
    b = lora_B[adapter].to(torch.promote_types(lora_B.dtype, scale.dtype)) * scale[adapter]
    return lora_A[adapter].to(dtype), b.to(dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Writes ``x weight^T + bias`` to ``y``, which is contiguous."""
    if bias is None:
        torch.mm(_flat(x), weight.T, out=_flat(y))
    else:
        torch.addmm(bias, _flat(x), weight.T, out=_flat(y))


def _add_product(x: Tensor, weight: Tensor, y: Tensor) -> None:
    """``y += x weight^T`` in place; not by ``addmm_``, which PyTorch's counter of operations overlooks."""
    torch.addmm(y, x, weight.T, out=y)


def _flat(x: Tensor) -> Tensor:
    """Returns the tokens of all samples as rows: a view of contiguous samples."""
    return x.reshape(-1, x.shape[-1])


def _factor_gradients(x: Tensor, dy: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a run's gradients of ``A [R, K]`` and ``B [N, R]``, without the scale, in the way with fewer products.

    Through the gradient of the whole weight, ``G = dy^T x``: ``dA = B^T G``, ``dB = G A^T``. Or through the ranks:
    ``dA = (dy B)^T x``, ``dB = dy^T (x A^T)``.
    """
    a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
    (n, rank), k = b.shape, a.shape[1]
    x, dy = x.reshape(-1, k), dy.reshape(-1, n)
    tokens = len(x)
    if tokens * n * k + 2 * n * k * rank < 2 * tokens * rank * (n + k):
        whole = dy.T @ x
        return b.T @ whole, whole @ a.T
    return (dy @ b).T @ x, dy.T @ (x @ a.T)
