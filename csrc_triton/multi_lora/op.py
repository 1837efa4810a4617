"""The multi-adapter linear layer on Triton, as PyTorch operators with a gradient; `reference.py` defines its meaning.

A call is checked by a public function and then takes one of two ways to the same `forward` and `backward` of `passes.py`:
through registered operators where torch.compile or another observer traces it, else as a recording or its replay, which costs
the host less. `multi_lora_add_triton` is a layer without a weight: its base was computed elsewhere.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from csrc_triton import replay
from csrc_triton.multi_lora.by_runs import Projection, Run, spans_without, write_merged
from csrc_triton.multi_lora.checks import unsupported, unsupported_add
from csrc_triton.multi_lora.designs import merged_in_all
from csrc_triton.multi_lora.passes import Layer, Upstream, backward, forward, layers_of, offsets_of
from csrc_triton.registration import is_traced, kernel_op

KERNEL_DESIGNS = ("fused", "split")
MAX_CHOICES = 64
"""Of a tape; when they are too many, all are dropped."""


def multi_lora_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    adapter_ids: Tensor,
    design: str | None = None,
    *,
    checked: bool = False,
) -> Tensor:
    """`reference.multi_lora_linear` on Triton kernels; arguments and results are the same, except:

    Rows with id -1 equal the base layer of the same design to the bit. A sample's result is the same to the bit by
    itself and in any batch: all of it in design "fused", its low-rank part in "split", whose base is cuBLAS's. Only x, lora_A
    and lora_B are differentiable, once.

    Args:
        design: "fused" (base and low-rank part in one kernel), "split" (bias and low-rank part, then cuBLAS adds the base)
            or None, which lets `designs.exact_design` choose.
        checked: `unsupported` returned None for this call.

    Raises:
        ValueError: as the reference does, or `unsupported` returns a reason; then the reference computes it.
    """
    return multi_lora_linears(x, [(weight, bias, lora_A, lora_B)], scale, adapter_ids, design, checked=checked)[0]


def multi_lora_linears(
    x: Tensor,
    projections: Sequence[tuple[Tensor, Tensor | None, Tensor, Tensor]],
    scale: Tensor,
    adapter_ids: Tensor,
    design: str | None = None,
    *,
    checked: bool = False,
) -> list[Tensor]:
    """Several layers of one input (q, k and v; gate and up), whose ranks up to three layers compute in one pass over x.

    ::

        [multi_lora_linear_triton(x, weight, bias, lora_A, lora_B, scale, adapter_ids, design)
         for weight, bias, lora_A, lora_B in projections]

    Args:
        projections: ``(weight, bias, lora_A, lora_B)`` of each layer; the same number of adapters, ranks may differ.
        checked: as in `multi_lora_linear_triton`, of every layer.

    Returns:
        `[B, T, N]` per layer.

    Raises:
        ValueError: as `multi_lora_linear_triton`.
    """
    layers = [Layer(*projection) for projection in projections]
    for layer in layers if not checked else ():
        if reason := unsupported(x, *layer, scale, adapter_ids):
            raise ValueError(f"the Triton kernels do not cover this call: {reason}")
    if design not in (None, *KERNEL_DESIGNS):
        raise ValueError(f"design: expected one of {list(KERNEL_DESIGNS)} or None, found {design!r}")
    # Without adapters or without ranks a layer is its base.
    adapted = [layer for layer in layers if 0 not in layer.lora_A.shape[:2]]
    outputs = iter(_call(x, None, adapted, scale, adapter_ids, design) if adapted else [])
    return [F.linear(x, layer.weight, layer.bias) if 0 in layer.lora_A.shape[:2] else next(outputs) for layer in layers]


def partly_merged_linears(
    x: Tensor,
    projections: Sequence[Projection],
    scale: Tensor,
    adapter_ids: Tensor,
    runs: tuple[Run, ...],
    merged: frozenset[int],
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """`multi_lora_linears` without gradients of a batch of which the kernels compute only the rows that are not merged.

    Args:
        runs: ``adapter_ids`` as the host knows them.
        merged: adapters whose rows `by_runs` computes.
        out: ``[B, T, N]`` per layer, contiguous, to which the outputs are written.
    """
    outputs = [x.new_empty(*x.shape[:2], len(layer[0])) for layer in projections] if out is None else list(out)
    for layer, y in zip(projections, outputs, strict=True):
        write_merged(x, *layer, scale, runs, merged, y)
    for span in spans_without(runs, merged):
        rows = slice(span[0].start, span[-1].stop)
        exact = multi_lora_linears(x[rows], projections, scale, adapter_ids[rows], checked=True)
        for y, own in zip(outputs, exact, strict=True):
            y[rows].copy_(own)
    return outputs


def multi_lora_add_triton(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: Tensor, adapter_ids: Tensor
) -> Tensor:
    """`reference.multi_lora_add` on Triton kernels; arguments and results are the same, except:

    Rows with id -1 equal y to the bit. Only y, x, lora_A and lora_B are differentiable, once.

    Raises:
        ValueError: as the reference does, or `unsupported_add` returns a reason; then the reference computes it.
    """
    if reason := unsupported_add(y, x, lora_A, lora_B, scale, adapter_ids):
        raise ValueError(f"the Triton kernels do not cover this call: {reason}")
    if 0 in lora_A.shape[:2]:
        return y.clone()
    return _call(x, y, [Layer(None, None, lora_A, lora_B)], scale, adapter_ids, None)[0]


def recorded(
    x: Tensor,
    projections: Sequence[tuple[Tensor | None, Tensor | None, Tensor, Tensor]],
    scale: Tensor,
    adapter_ids: Tensor,
    design: str | None = None,
    *,
    runs: tuple[Run, ...] | None = None,
    strengths: Sequence[tuple[float, ...] | None] = (),
    y: Tensor | None = None,
) -> Sequence[Tensor] | None:
    """The outputs of a call of `multi_lora_linears`, if one that is alike was checked and recorded; else None.

    None, too, where an adapter is to be merged.

    Args:
        runs, strengths: as in `designs.merged_in_all`.
        y: that of `multi_lora_add_triton`, whose only projection has neither weight nor bias.
    """
    if is_traced(x):
        return None
    tensors = (x, y, scale, adapter_ids, *chain.from_iterable(projections))
    tape = replay.recorded(replay.signature(forward, tensors, (design,)))
    if tape is None:
        return None
    if runs is not None:
        # All calls of a tape have the same shapes, dtypes and device, so that nothing else decides. To choose takes half as
        # long as a replay.
        key = (runs, *strengths)
        is_merged = tape.choices.get(key)
        if is_merged is None:
            if len(tape.choices) >= MAX_CHOICES:
                tape.choices.clear()
            is_merged = tape.choices[key] = bool(merged_in_all(x, projections, runs, strengths, design))
        if is_merged:
            return None
    return _compute(tape.replay, tensors, design)


def _call(x, y, layers: list[Layer], scale, ids, design: str | None) -> Sequence[Tensor]:
    """The outputs of layers, all with adapters and ranks; y is the base of the only layer if that has no weight."""
    if not is_traced(x):
        tensors = (x, y, scale, ids, *chain.from_iterable(layers))
        key = replay.signature(forward, tensors, (design,))
        tape = replay.recorded(key)
        run = partial(replay.record, key, forward, (design,)) if tape is None else tape.replay
        return _compute(run, tensors, design)
    # The operator takes lists of tensors, without None.
    weights = [layer.weight for layer in layers if layer.weight is not None]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    has_bias = [layer.bias is not None for layer in layers]
    lora_A = [layer.lora_A for layer in layers]
    lora_B = [layer.lora_B for layer in layers]
    return forward_op(x, y, weights, biases, has_bias, lora_A, lora_B, scale, ids, design)[:-1]


def _compute(run: Callable, tensors: tuple[Tensor | None, ...], design: str | None) -> Sequence[Tensor]:
    """The layers' outputs by ``run(tensors)``, a tape or a recording of `forward`; autograd sees it only where something is trained."""
    learns = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if learns or forward_ad._current_level >= 0:
        return _Untraced.apply(run, design, *tensors)
    return run(tensors)[:-1]


def _layers_of(weights, biases, has_bias, lora_A, lora_B) -> list[Layer]:
    """The layers whose parts `_call` passed to the operator."""
    remaining = iter(biases)
    biases = [next(remaining) if has else None for has in has_bias]
    return [Layer(*parts) for parts in zip(weights or [None] * len(biases), biases, lora_A, lora_B, strict=True)]


@kernel_op("clora::multi_lora_linears")
def forward_op(
    x: Tensor,
    y: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    has_bias: list[bool],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scale: Tensor,
    ids: Tensor,
    design: str | None,
) -> list[Tensor]:
    parts = [tensor for layer in _layers_of(weights, biases, has_bias, lora_A, lora_B) for tensor in layer]
    with torch.cuda.device_of(x):
        return forward(x, y, scale, ids, *parts, design)


@forward_op.register_fake
def _(x, y, weights, biases, has_bias, lora_A, lora_B, scale, ids, design) -> list[Tensor]:
    widths = [*(b.shape[1] for b in lora_B), offsets_of(lora_A)[-1]]
    return [x.new_empty(*x.shape[:2], width) for width in widths]


@kernel_op("clora::multi_lora_linears_backward")
def backward_op(
    upstream: list[Tensor],
    x: Tensor | None,
    low: Tensor | None,
    weights: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    offsets: list[int],
    scale: Tensor,
    ids: Tensor,
    needs_x: bool,
    design: str | None,
) -> list[Tensor]:
    columns = zip(upstream, weights or [None] * len(upstream), lora_A, lora_B, strict=True)
    parts = chain.from_iterable(columns)
    with torch.cuda.device_of(scale):
        return backward(scale, ids, x, low, *parts, offsets, needs_x, design)


@backward_op.register_fake
def _(upstream, x, low, weights, lora_A, lora_B, offsets, scale, ids, needs_x, design) -> list[Tensor]:
    grad_x = [upstream[0].new_empty(*upstream[0].shape[:2], lora_A[0].shape[2])] if needs_x else []
    factors = (lora_A if x is not None else []) + (lora_B if low is not None else [])
    return [*grad_x, *(factor.new_empty(factor.shape) for factor in factors)]


class _Untraced(torch.autograd.Function):
    """`forward_op` without the dispatcher, whose lists of tensors take most of the host's time of a call."""

    @staticmethod
    def forward(ctx, run, design, *tensors):
        *outputs, low = run(tensors)
        x, y, scale, ids, *parts = tensors
        _save(ctx, x, y, layers_of(parts), low, scale, ids, design)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        dx, dy, dA, dB = _gradients(ctx, upstream)
        of_layers = chain.from_iterable((None, None, a, b) for a, b in zip(dA, dB, strict=True))
        return None, None, dx, dy, None, None, *of_layers


def _setup(ctx, inputs, output) -> None:
    x, y, *parts, scale, ids, design = inputs
    ctx.counts = [len(part) for part in parts[:2]]  # weights and biases
    _save(ctx, x, y, _layers_of(*parts), output[-1], scale, ids, design)


def _operator_gradients(ctx, upstream: list[Tensor | None]) -> tuple:
    # The last output is the ranks' rows, which no caller sees.
    dx, dy, dA, dB = _gradients(ctx, upstream[:-1])
    weights, biases = ([None] * count for count in ctx.counts)
    return dx, dy, weights, biases, None, dA, dB, None, None, None


def _save(ctx, x, y, layers: list[Layer], low, scale, ids, design) -> None:
    """Keeps the tensors of the gradients: x for those of lora_A, the ranks' rows for those of lora_B."""
    ctx.set_materialize_grads(False)
    ctx.design = design
    ctx.needs_x = x.requires_grad
    ctx.has_y = y is not None
    needs_A = any(layer.lora_A.requires_grad for layer in layers)
    needs_B = any(layer.lora_B.requires_grad for layer in layers)
    tensors = [tensor for layer in layers for tensor in (layer.weight, layer.lora_A, layer.lora_B)]
    ctx.save_for_backward(x if needs_A else None, low if needs_B else None, scale, ids, *tensors)


def _gradients(ctx, upstream: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None, list, list]:
    """Gradients of x, of y, of each lora_A and of each lora_B; without one for an output that was not used."""
    x, low, scale, ids, *tensors = ctx.saved_tensors  # once: under checkpointing a second reading raises
    count = len(upstream)
    *offsets, _ = offsets_of(tensors[1::3])
    used = [i for i in range(count) if upstream[i] is not None]
    layers = [Upstream(upstream[i], *tensors[3 * i : 3 * i + 3], offsets[i]) for i in used]
    dA = [None] * count
    dB = [None] * count
    dy = upstream[0] if ctx.has_y else None
    if not layers or (x is None and low is None and not ctx.needs_x):
        return None, dy, dA, dB
    if is_traced(scale):
        grads, weights, lora_A, lora_B, starts = (list(column) for column in zip(*layers, strict=True))
        weights = [weight for weight in weights if weight is not None]
        found = backward_op(grads, x, low, weights, lora_A, lora_B, starts, scale, ids, ctx.needs_x, ctx.design)
    else:
        parts = chain.from_iterable(layer[:4] for layer in layers)
        starts = tuple(layer.offset for layer in layers)
        tensors = (scale, ids, x, low, *parts)
        found = replay.replayed(backward, tensors, starts, ctx.needs_x, ctx.design)
    remaining = iter(found)
    dx = next(remaining) if ctx.needs_x else None
    for i in used if x is not None else ():
        dA[i] = next(remaining)
    for i in used if low is not None else ():
        dB[i] = next(remaining)
    return dx, dy, dA, dB


forward_op.register_autograd(_operator_gradients, setup_context=_setup)
