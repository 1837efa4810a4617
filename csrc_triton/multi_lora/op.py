"""The multi-adapter linear layer on Triton, as PyTorch operators with a gradient; `reference.py` defines its meaning.

A call is checked by a public function and then takes one of two ways to the same `_forward` and `_backward`: through
registered operators where torch.compile or another observer traces it, else through `_Untraced`, which costs the host
less. `multi_lora_add_triton` is a layer without a weight: its base was computed elsewhere.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from torch.autograd.function import once_differentiable

from csrc_triton.multi_lora.designs import DESIGNS, design_of
from csrc_triton.multi_lora.launch import expand_add, gradients, linear, reduce, shrink
from csrc_triton.multi_lora.reference import check_add_shapes, check_shapes
from csrc_triton.registration import INTERPRETED, is_traced, kernel_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_RANK = 256


class Layer(NamedTuple):
    """One of the layers that share an input, as in `reference.multi_lora_linear`; weight None: its base is given as y."""

    weight: Tensor | None
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor


class Upstream(NamedTuple):
    """A layer in the backward pass: only those whose output was used.

    Attributes:
        grad: `[B, T, N]` gradient of the layer's output.
        offset: where the layer's ranks begin among those of all layers.
    """

    grad: Tensor
    weight: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    offset: int


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
    itself and in any batch: all of it in design "fused", its low-rank part in "split", whose base is `F.linear`. Only x, lora_A
    and lora_B are differentiable, once.

    Args:
        design: "fused" (base and low-rank part in one kernel), "split" (base by `F.linear`) or None: as measured for the
            shape (`designs.design_for`), "split" where it was not measured.
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
    if design not in (None, *DESIGNS):
        raise ValueError(f"design: expected one of {list(DESIGNS)} or None, found {design!r}")
    # Without adapters or without ranks a layer is its base.
    adapted = [layer for layer in layers if 0 not in layer.lora_A.shape[:2]]
    outputs = iter(_call(x, None, adapted, scale, adapter_ids, design) if adapted else [])
    return [F.linear(x, layer.weight, layer.bias) if 0 in layer.lora_A.shape[:2] else next(outputs) for layer in layers]


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


def unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: Tensor, adapter_ids: Tensor
) -> str | None:
    """The reason why the kernels cannot compute a call of `multi_lora_linear_triton`, or None.

    Raises:
        ValueError: a shape or the dtype of the ids is not as the reference takes it.
    """
    check_shapes(x, weight, bias, lora_A, lora_B, scale, adapter_ids)
    return _gap(x, weight=weight, bias=bias, lora_A=lora_A, lora_B=lora_B, scale=scale, ids=adapter_ids)


def unsupported_add(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: Tensor, adapter_ids: Tensor
) -> str | None:
    """The reason why the kernels cannot compute a call of `multi_lora_add_triton`, or None.

    Raises:
        ValueError: a shape or the dtype of the ids is not as the reference takes it.
    """
    check_add_shapes(y, x, lora_A, lora_B, scale, adapter_ids)
    return _gap(x, y=y, lora_A=lora_A, lora_B=lora_B, scale=scale, ids=adapter_ids)


def _gap(x: Tensor, **arguments: Tensor | None) -> str | None:
    """The reason why the kernels cannot compute with these arguments, whose shapes are right, or None."""
    given = {name: tensor for name, tensor in arguments.items() if tensor is not None}
    for name, tensor in given.items():
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}"
    if x.device.type != "cuda" and not INTERPRETED:
        return f"x is on {x.device}, and Triton's interpreter is off"
    if INTERPRETED and x.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bf16 wrongly"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    for name, tensor in {"x": x, "lora_A": given["lora_A"], "lora_B": given["lora_B"]}.items():
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, expected one of {[str(dtype) for dtype in DTYPES]}"
    for name in ("weight", "bias", "y"):
        if name in given and given[name].dtype != x.dtype:
            return f"{name} is {given[name].dtype}, x {x.dtype}"
    if (rank := given["lora_A"].shape[1]) > MAX_RANK:
        return f"rank {rank} is above {MAX_RANK}"
    trained = [name for name in ("weight", "bias", "scale") if name in given and given[name].requires_grad]
    if trained and torch.is_grad_enabled():
        return f"{' and '.join(trained)} require gradients: expected frozen ones"
    return None


def _call(x, y, layers: list[Layer], scale, ids, design: str | None) -> Sequence[Tensor]:
    """The outputs of layers, all with adapters and ranks; y is the base of the only layer if that has no weight."""
    lora_A = [layer.lora_A for layer in layers]
    lora_B = [layer.lora_B for layer in layers]
    if not is_traced(x):
        return _Untraced.apply(x, y, layers, scale, ids, design, *lora_A, *lora_B)
    # The operator takes lists of tensors, without None.
    weights = [layer.weight for layer in layers if layer.weight is not None]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    has_bias = [layer.bias is not None for layer in layers]
    return forward_op(x, y, weights, biases, has_bias, lora_A, lora_B, scale, ids, design)[:-1]


def _layers_of(weights, biases, has_bias, lora_A, lora_B) -> list[Layer]:
    """The layers whose parts `_call` passed to the operator."""
    remaining = iter(biases)
    biases = [next(remaining) if has else None for has in has_bias]
    return [Layer(*parts) for parts in zip(weights or [None] * len(biases), biases, lora_A, lora_B, strict=True)]


def _forward(x, y, layers: list[Layer], scale, ids, design: str | None) -> list[Tensor]:
    """The layers' outputs, then the ranks' rows `[B, T, sum of ranks]`, which the gradient of lora_B needs."""
    outputs = []
    with torch.cuda.device_of(x):
        layers = [_in_dtype(layer, x.dtype) for layer in layers]
        lora_A = [layer.lora_A for layer in layers]
        *offsets, ranks = _offsets(lora_A)
        # One pass over x for the ranks of all layers, then each layer's base with its expansion on top.
        low = x.new_empty(*x.shape[:2], ranks)
        shrink(x, lora_A, scale, ids, low)
        for layer, offset in zip(layers, offsets, strict=True):
            if y is None and design_of(x, layer.weight, layer.lora_A, design) == "fused":
                outputs.append(linear(x, layer.weight, layer.bias, low, offset, layer.lora_B, ids))
                continue
            if y is None:
                outputs.append(F.linear(x, layer.weight, layer.bias).contiguous())
            else:
                outputs.append(y.clone(memory_format=torch.contiguous_format))  # the base may keep y for its gradient
            expand_add(outputs[-1], low, offset, layer.lora_B, ids)
    return [*outputs, low]


def _in_dtype(layer, dtype: torch.dtype):
    """The layer with its factors rounded once per call: in the kernels every tile would round them again."""
    return layer._replace(lora_A=layer.lora_A.to(dtype), lora_B=layer.lora_B.to(dtype))


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
    return _forward(x, y, _layers_of(weights, biases, has_bias, lora_A, lora_B), scale, ids, design)


@forward_op.register_fake
def _(x, y, weights, biases, has_bias, lora_A, lora_B, scale, ids, design) -> list[Tensor]:
    widths = [*(b.shape[1] for b in lora_B), _offsets(lora_A)[-1]]
    return [x.new_empty(*x.shape[:2], width) for width in widths]


def _backward(
    layers: list[Upstream], x, low, ranks: int, scale, ids, needs_x: bool, design: str | None
) -> list[Tensor]:
    """Gradients of x, of each lora_A and of each lora_B, in this order and only those that are needed.

    Args:
        x, low: the input and the ranks' rows; None where no lora_A or no lora_B, respectively, needs a gradient.
        ranks: width of low.
    """
    upstream = layers[0].grad
    grad_x, grad_A, grad_B = [], [], []
    with torch.cuda.device_of(scale):
        rounded = [_in_dtype(layer, upstream.dtype) for layer in layers]
        # back = scale dy lora_B, of which the gradients of x and of every lora_A are made.
        back = upstream.new_empty(*upstream.shape[:2], ranks) if needs_x or x is not None else None
        # One pass over each dy, for back and the gradient of lora_B, which has the dtype of lora_B itself.
        for (dy, _, _, factor, offset), layer in zip(rounded, layers, strict=True):
            if low is None:
                shrink(dy, [factor.mT], scale, ids, back, offset)
            else:
                shrunk = None if back is None else (factor.mT, scale, back)
                partial = gradients(dy, low, factor.shape[2], ids, offset, shrunk)
                grad_B.append(reduce(partial, 0, layer.lora_B.new_empty(factor.shape), ids))
        if needs_x:
            grad_x = [_grad_x(rounded, back, ids, design)]
        if x is not None:  # one pass over x for all layers
            partial = gradients(x, back, ranks, ids)
            for _, _, lora_A, _, offset in layers:
                grad_A.append(reduce(partial, offset, lora_A.new_empty(lora_A.shape), ids, transposed=True))
    return [*grad_x, *grad_A, *grad_B]


def _grad_x(layers: list[Upstream], back: Tensor, ids, design: str | None) -> Tensor:
    """Sum over the layers of ``dy weight + back lora_A``; without a weight, the base's own gradient flows through y."""
    total = None
    for dy, weight, lora_A, _, offset in layers:
        if weight is not None and design_of(dy, weight.mT, lora_A, design) == "fused":
            total = linear(dy, weight.mT, None, back, offset, lora_A.mT, ids, total)
            continue
        if weight is None:
            total = dy.new_zeros(*dy.shape[:2], lora_A.shape[2])
        elif total is None:
            total = (dy @ weight).contiguous()
        else:
            total.view(-1, weight.shape[1]).addmm_(dy.reshape(-1, weight.shape[0]), weight)
        expand_add(total, back, offset, lora_A.mT, ids)
    return total


@kernel_op("clora::multi_lora_linears_backward")
def backward_op(
    upstream: list[Tensor],
    x: Tensor | None,
    low: Tensor | None,
    weights: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    offsets: list[int],
    ranks: int,
    scale: Tensor,
    ids: Tensor,
    needs_x: bool,
    design: str | None,
) -> list[Tensor]:
    parts = zip(upstream, weights or [None] * len(upstream), lora_A, lora_B, offsets, strict=True)
    return _backward([Upstream(*each) for each in parts], x, low, ranks, scale, ids, needs_x, design)


@backward_op.register_fake
def _(upstream, x, low, weights, lora_A, lora_B, offsets, ranks, scale, ids, needs_x, design) -> list[Tensor]:
    grad_x = [upstream[0].new_empty(*upstream[0].shape[:2], lora_A[0].shape[2])] if needs_x else []
    factors = (lora_A if x is not None else []) + (lora_B if low is not None else [])
    return [*grad_x, *(factor.new_empty(factor.shape) for factor in factors)]


class _Untraced(torch.autograd.Function):
    """`forward_op` without the dispatcher, whose lists of tensors take most of the host's time of a call.

    The factors of the layers are given once more, one by one: autograd does not look into lists.
    """

    @staticmethod
    def forward(ctx, x, y, layers, scale, ids, design, *factors):
        with set_wrap_triton_enabled(False):
            *outputs, low = _forward(x, y, layers, scale, ids, design)
        _save(ctx, x, y, layers, low, scale, ids, design)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        dx, dy, dA, dB = _gradients(ctx, upstream)
        return dx, dy, None, None, None, None, *dA, *dB


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
    *offsets, ranks = _offsets(tensors[1::3])
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
        found = backward_op(grads, x, low, weights, lora_A, lora_B, starts, ranks, scale, ids, ctx.needs_x, ctx.design)
    else:
        with set_wrap_triton_enabled(False):
            found = _backward(layers, x, low, ranks, scale, ids, ctx.needs_x, ctx.design)
    remaining = iter(found)
    dx = next(remaining) if ctx.needs_x else None
    for i in used if x is not None else ():
        dA[i] = next(remaining)
    for i in used if low is not None else ():
        dB[i] = next(remaining)
    return dx, dy, dA, dB


def _offsets(lora_A: Sequence[Tensor]) -> list[int]:
    """Start of each layer's ranks among all; the last entry is their sum."""
    return list(accumulate((int(a.shape[1]) for a in lora_A), initial=0))


forward_op.register_autograd(_operator_gradients, setup_context=_setup)
