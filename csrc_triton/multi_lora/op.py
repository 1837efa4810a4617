"""The multi-adapter linear layer on Triton, as PyTorch operators with a gradient; `reference.py` defines its meaning."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from torch.autograd.function import once_differentiable

from csrc_triton.multi_lora.designs import DEFAULT, DESIGNS, design_for
from csrc_triton.multi_lora.launch import expand_add, gradients, linear, reduce, shrink
from csrc_triton.multi_lora.reference import check_shapes
from csrc_triton.registration import INTERPRETED, is_traced, kernel_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_RANK = 256


class Projection(NamedTuple):
    """One linear layer of several that share their input; shapes as in `reference.multi_lora_linear`."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor


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

    Rows with id -1 equal the base layer of the same design to the bit. A sample's result is the same to the bit alone
    and in any batch: all of it in design "fused", its low-rank part in "split", whose base is `F.linear`. Only x, lora_A
    and lora_B are differentiable, once.

    Args:
        design: "fused" (base and low-rank part in one kernel), "split" (base by `F.linear`) or None: as measured for the
            shape (`designs.design_for`), "split" where it was not.
        checked: `unsupported` was asked about this call and returned None.

    Raises:
        ValueError: as the reference does, or `unsupported` gives a reason; then the reference computes it.
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
    layers = [Projection(*projection) for projection in projections]
    for layer in layers if not checked else ():
        if reason := unsupported(x, *layer, scale, adapter_ids):
            raise ValueError(f"the Triton kernels do not cover this call: {reason}")
    if design not in (None, *DESIGNS):
        raise ValueError(f"design: expected one of {list(DESIGNS)} or None, found {design!r}")
    adapted = [layer for layer in layers if _has_ranks(layer)]
    outputs = iter(_call(x, adapted, scale, adapter_ids, design) if adapted else [])
    return [next(outputs) if _has_ranks(layer) else F.linear(x, layer.weight, layer.bias) for layer in layers]


def unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: Tensor, adapter_ids: Tensor
) -> str | None:
    """Why the kernels cannot compute a call, or None.

    Raises:
        ValueError: a shape or the dtype of the ids is wrong, as the reference says it.
    """
    check_shapes(x, weight, bias, lora_A, lora_B, scale, adapter_ids)
    tensors = {"weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B, "scale": scale, "ids": adapter_ids}
    return unsupported_tensors(x, {name: tensor for name, tensor in tensors.items() if tensor is not None})


def unsupported_tensors(x: Tensor, given: dict[str, Tensor]) -> str | None:
    """`unsupported` for arguments of the right shapes; weight and bias may be absent."""
    for name, tensor in given.items():
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}"
    return _unsupported_kind(x, given) or _unsupported_gradient(given)


def _unsupported_kind(x: Tensor, given: dict[str, Tensor]) -> str | None:
    if x.device.type != "cuda" and not INTERPRETED:
        return f"x is on {x.device}, and Triton's interpreter is off"
    if INTERPRETED and x.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bf16 wrongly"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, expected one of {[str(dtype) for dtype in DTYPES]}"
    for name in ("weight", "bias"):
        if name in given and given[name].dtype != x.dtype:
            return f"{name} is {given[name].dtype}, x {x.dtype}"
    for name in ("lora_A", "lora_B"):
        if given[name].dtype not in DTYPES:
            return f"{name} is {given[name].dtype}, expected one of {[str(dtype) for dtype in DTYPES]}"
    rank = given["lora_A"].shape[1]
    return f"rank {rank} is above {MAX_RANK}" if rank > MAX_RANK else None


def _unsupported_gradient(given: dict[str, Tensor]) -> str | None:
    if not torch.is_grad_enabled():
        return None
    wanted = [name for name in ("weight", "bias", "scale") if name in given and given[name].requires_grad]
    return f"{' and '.join(wanted)} require gradients: expected frozen ones" if wanted else None


def _has_ranks(layer: Projection) -> bool:
    num_adapters, rank, _ = layer.lora_A.shape
    return num_adapters > 0 and rank > 0


def _call(x: Tensor, layers: list[Projection], scale: Tensor, ids: Tensor, design: str | None) -> Sequence[Tensor]:
    weights, biases, lora_A, lora_B = (list(tensors) for tensors in zip(*layers, strict=True))
    has_bias = [bias is not None for bias in biases]
    given = [bias for bias in biases if bias is not None]
    if is_traced(x):
        return forward_op(x, weights, given, has_bias, lora_A, lora_B, scale, ids, design)[:-1]
    return _Untraced.apply(x, scale, ids, has_bias, design, *weights, *lora_A, *lora_B, *given)


def _forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    has_bias: list[bool],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scale: Tensor,
    ids: Tensor,
    design: str | None,
) -> list[Tensor]:
    """The layers' outputs, then the ranks' rows `[B, T, sum of ranks]`, which the gradient of lora_B needs."""
    with torch.cuda.device_of(x):
        given, offsets = iter(biases), _offsets(lora_A)
        low = _low_like(x, lora_A)
        shrink(x, lora_A, scale, ids, low)
        outputs = []
        for i, weight in enumerate(weights):
            bias = next(given) if has_bias[i] else None
            if _design(x, weight, lora_A[i], design) == "fused":
                outputs.append(linear(x, weight, bias, low, offsets[i], lora_B[i], ids))
            else:
                outputs.append(F.linear(x, weight, bias).contiguous())
                expand_add(outputs[-1], low, offsets[i], lora_B[i], ids)
    return [*outputs, low]


def _backward(
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
    needs_A: bool,
    needs_B: bool,
    design: str | None,
) -> list[Tensor]:
    """Gradients of x, of each lora_A and of each lora_B, in this order and only as far as they are needed.

    Args:
        upstream: gradient of each layer's output.
        x, low: the input and the ranks' rows; None where no lora_A or no lora_B, respectively, needs a gradient.
        offsets, ranks: where each layer's ranks begin in low, and its width.
    """
    layers = list(zip(upstream, weights, lora_A, lora_B, offsets, strict=True))
    with torch.cuda.device_of(scale):
        back = upstream[0].new_empty(*upstream[0].shape[:2], ranks) if needs_x or needs_A else None
        grad_B = [
            pass_over_upstream(dy, low if needs_B else None, back, b, offset, scale, ids)
            for dy, _, _, b, offset in layers
        ]
        grad_x = [_grad_x(layers, back, ids, design)] if needs_x else []
        grad_A = _grad_A(x, back, lora_A, offsets, ids) if needs_A else []
    return [*grad_x, *grad_A, *(grad_B if needs_B else [])]


def _backward_untraced(*args) -> list[Tensor]:
    with set_wrap_triton_enabled(False):
        return _backward(*args)


def pass_over_upstream(dy, low, back, lora_B, offset: int, scale, ids) -> Tensor | None:
    """Reads dy once: writes ``back = scale dy lora_B`` where given, and returns the gradient of lora_B where low is."""
    if low is None:
        shrink(dy, [lora_B.mT], scale, ids, back, offset)
        return None
    shrunk = None if back is None else (lora_B.mT, scale, back)
    partial = gradients(dy, low, lora_B.shape[2], ids, offset, shrunk)
    return reduce(partial, 0, lora_B.new_empty(lora_B.shape), ids)


def _grad_A(x, back, lora_A: list[Tensor], offsets: list[int], ids) -> list[Tensor]:
    """One pass over x for all layers."""
    partial = gradients(x, back, back.shape[2], ids)
    return [
        reduce(partial, offset, a.new_empty(a.shape), ids, transposed=True)
        for a, offset in zip(lora_A, offsets, strict=True)
    ]


def _grad_x(layers, back, ids, design: str | None) -> Tensor:
    """Sum over the layers of ``dy weight + back lora_A``."""
    total = None
    for dy, weight, a, _, offset in layers:
        if _design(dy, weight.mT, a, design) == "fused":
            total = linear(dy, weight.mT, None, back, offset, a.mT, ids, total)
        else:
            total = _base_grad_x(dy, weight, total)
            expand_add(total, back, offset, a.mT, ids)
    return total


def _base_grad_x(dy, weight, total: Tensor | None) -> Tensor:
    if total is None:
        return (dy @ weight).contiguous()
    total.view(-1, weight.shape[1]).addmm_(dy.reshape(-1, weight.shape[0]), weight)
    return total


def _forward_fake(x, weights, biases, has_bias, lora_A, lora_B, scale, ids, design) -> list[Tensor]:
    return [*(x.new_empty(*x.shape[:2], weight.shape[0]) for weight in weights), _low_like(x, lora_A)]


def _backward_fake(
    upstream, x, low, weights, lora_A, lora_B, offsets, ranks, scale, ids, needs_x, needs_A, needs_B, design
) -> list[Tensor]:
    grad_x = [upstream[0].new_empty(*upstream[0].shape[:2], weights[0].shape[1])] if needs_x else []
    factors = (lora_A if needs_A else []) + (lora_B if needs_B else [])
    return [*grad_x, *(factor.new_empty(factor.shape) for factor in factors)]


def _setup(ctx, inputs, output) -> None:
    x, weights, biases, _, lora_A, lora_B, scale, ids, design = inputs
    ctx.num_biases = len(biases)
    _save(ctx, x, output[-1], scale, ids, weights, lora_A, lora_B, design)


def _gradient(ctx, upstream: list[Tensor | None]) -> tuple:
    count = len(upstream) - 1  # the last belongs to the ranks' rows, which no caller sees
    dx, dA, dB = _gradients(ctx, upstream[:count])
    return dx, [None] * count, [None] * ctx.num_biases, None, dA, dB, None, None, None


class _Untraced(torch.autograd.Function):
    """`forward_op` without the dispatcher, whose lists of tensors take most of the host's time of a call."""

    @staticmethod
    def forward(ctx, x, scale, ids, has_bias, design, *tensors):
        count = len(has_bias)
        weights, lora_A, lora_B = (list(tensors[i * count : (i + 1) * count]) for i in range(3))
        with set_wrap_triton_enabled(False):
            *outputs, low = _forward(
                x, weights, list(tensors[3 * count :]), has_bias, lora_A, lora_B, scale, ids, design
            )
        _save(ctx, x, low, scale, ids, weights, lora_A, lora_B, design)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        dx, dA, dB = _gradients(ctx, upstream)
        biases = len(ctx.needs_input_grad) - 5 - 3 * len(upstream)
        return dx, None, None, None, None, *[None] * len(upstream), *dA, *dB, *[None] * biases


def _save(ctx, x, low, scale, ids, weights, lora_A, lora_B, design) -> None:
    ctx.set_materialize_grads(False)
    ctx.design = design
    ctx.needs = (x.requires_grad, _any_requires_grad(lora_A), _any_requires_grad(lora_B))
    ctx.save_for_backward(
        x if ctx.needs[1] else None, low if ctx.needs[2] else None, scale, ids, *weights, *lora_A, *lora_B
    )


def _gradients(ctx, upstream: Sequence[Tensor | None]) -> tuple[Tensor | None, list, list]:
    """Gradients of x, the lora_A and the lora_B; an output that was not used gives its factors none."""
    x, low, scale, ids, *tensors = ctx.saved_tensors  # once: under checkpointing a second reading raises
    backward = backward_op if is_traced(scale) else _backward_untraced
    count = len(upstream)
    used = [i for i in range(count) if upstream[i] is not None]
    dx, dA, dB = None, [None] * count, [None] * count
    if not used:
        return dx, dA, dB
    columns = (upstream, *(tensors[i * count : (i + 1) * count] for i in range(3)))
    offsets = _offsets(columns[2])
    dys, weights, lora_A, lora_B, starts = ([column[i] for i in used] for column in (*columns, offsets))
    given = iter(
        backward(dys, x, low, weights, lora_A, lora_B, starts, offsets[-1], scale, ids, *ctx.needs, ctx.design)
    )
    needs_x, needs_A, needs_B = ctx.needs
    if needs_x:
        dx = next(given)
    for needed, grads in ((needs_A, dA), (needs_B, dB)):
        for i in used if needed else ():
            grads[i] = next(given)
    return dx, dA, dB


def _any_requires_grad(tensors: Sequence[Tensor]) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


def _offsets(lora_A: Sequence[Tensor]) -> list[int]:
    """Where each layer's ranks begin among all; the last entry is their sum."""
    return list(accumulate((int(a.shape[1]) for a in lora_A), initial=0))


def _low_like(x: Tensor, lora_A: Sequence[Tensor]) -> Tensor:
    return x.new_empty(*x.shape[:2], _offsets(lora_A)[-1])


def _design(x: Tensor, weight: Tensor, lora_A: Tensor, design: str | None) -> str:
    if design is not None or x.device.type != "cuda":
        return design or DEFAULT
    capability = torch.cuda.get_device_capability(x.device)
    n, k = weight.shape
    return design_for(x.shape[1], k, n, lora_A.shape[1], x.dtype, capability, triton.__version__)


forward_op = kernel_op("clora::multi_lora_linears", _forward, _forward_fake)
backward_op = kernel_op("clora::multi_lora_linears_backward", _backward, _backward_fake)
forward_op.register_autograd(_gradient, setup_context=_setup)
