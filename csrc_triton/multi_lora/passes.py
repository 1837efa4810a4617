"""The passes of the multi-adapter linear layer, forward and backward, as PyTorch's operations and launches of kernels.

They are written for `csrc_triton.replay`: what they do to tensors, they do by `do` and by the functions of `launch.py`.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from csrc_triton.multi_lora.designs import Shape, device_of, exact_design
from csrc_triton.multi_lora.launch import expand, gradients, linear, reduce, shrink
from csrc_triton.replay import do


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


def layers_of(parts: Sequence[Tensor | None]) -> list[Layer]:
    """The layers whose parts stand one after the other."""
    return [Layer(*parts[i : i + 4]) for i in range(0, len(parts), 4)]


def offsets_of(lora_A: Sequence[Tensor]) -> list[int]:
    """Start of each layer's ranks among all; the last entry is their sum."""
    return list(accumulate((int(a.shape[1]) for a in lora_A), initial=0))


def forward(x, y, scale, ids, *parts) -> list[Tensor]:
    """The layers' outputs, then the ranks' rows `[B, T, sum of ranks]`, which the gradient of lora_B needs.

    Args:
        parts: those of each `Layer`, and last the design.
    """
    *tensors, design = parts
    layers = [_in_dtype(layer, x.dtype) for layer in layers_of(tensors)]
    lora_A = [layer.lora_A for layer in layers]
    *offsets, ranks = offsets_of(lora_A)
    outputs = []
    # One pass over x for the ranks of all layers, then each layer's base with its expansion on top.
    low = do(Tensor.new_empty, x, *x.shape[:2], ranks)
    shrink(x, lora_A, scale, ids, low)
    for layer, offset in zip(layers, offsets, strict=True):
        if y is not None:
            outputs.append(expand(low, offset, layer.lora_B, ids, base=y))
        elif design_of(x, layer.weight, layer.lora_A, design) == "fused":
            outputs.append(linear(x, layer.weight, layer.bias, low, offset, layer.lora_B, ids))
        else:
            outputs.append(expand(low, offset, layer.lora_B, ids, bias=layer.bias))
            do(_add_product, outputs[-1], x, layer.weight, True)
    return [*outputs, low]


def backward(scale, ids, x, low, *parts) -> list[Tensor]:
    """Gradients of x, of each lora_A and of each lora_B, in this order and only those that are needed.

    Args:
        x, low: the input and the ranks' rows; None where no lora_A or no lora_B, respectively, needs a gradient.
        parts: the tensors of each `Upstream`, and last their offsets, whether x needs a gradient, and the design.
    """
    *parts, offsets, needs_x, design = parts
    layers = [Upstream(*parts[4 * i : 4 * i + 4], offset) for i, offset in enumerate(offsets)]
    upstream = layers[0].grad
    grad_x, grad_A, grad_B = [], [], []
    rounded = [_in_dtype(layer, upstream.dtype) for layer in layers]
    *starts, ranks = offsets_of([layer.lora_A for layer in layers])  # among those whose output was used
    # back = scale dy lora_B, of which the gradients of x and of every lora_A are made.
    back = do(Tensor.new_empty, upstream, (*upstream.shape[:2], ranks)) if needs_x or x is not None else None
    # One pass over each dy, for back and the gradient of lora_B, which has the dtype of lora_B itself.
    for (dy, _, _, factor, offset), layer, start in zip(rounded, layers, starts, strict=True):
        if low is None:
            shrink(dy, [factor.mT], scale, ids, back, start)
        else:
            shrunk = None if back is None else (factor.mT, scale, back, start)
            partial = gradients(dy, low, factor.shape[2], ids, offset, shrunk)
            grad_B.append(reduce(partial, 0, do(Tensor.new_empty, layer.lora_B, factor.shape), ids))
    if needs_x:
        grad_x = [_grad_x(rounded, starts, back, ids, design)]
    if x is not None:  # one pass over x for all layers
        partial = gradients(x, back, ranks, ids)
        for layer, start in zip(layers, starts, strict=True):
            out = do(Tensor.new_empty, layer.lora_A, layer.lora_A.shape)
            grad_A.append(reduce(partial, start, out, ids, transposed=True))
    return [*grad_x, *grad_A, *grad_B]


def _grad_x(layers: list[Upstream], starts: list[int], back: Tensor, ids, design: str | None) -> Tensor:
    """Sum over the layers of ``dy weight + back lora_A``; without a weight, the base's own gradient flows through y."""
    total = None
    if all(weight is not None and design_of(dy, weight.mT, a, design) == "fused" for dy, weight, a, *_ in layers):
        for (dy, weight, lora_A, *_), start in zip(layers, starts, strict=True):
            total = linear(dy, weight.mT, None, back, start, lora_A.mT, ids, total)
        return total
    # One expansion over the ranks of all layers, then each layer's base on top.
    lora_A = layers[0].lora_A if len(layers) == 1 else do(_side_by_side, *[layer.lora_A for layer in layers])
    total = expand(back, 0, lora_A.mT, ids)
    for dy, weight, *_ in layers:
        if weight is not None:
            do(_add_product, total, dy, weight, False)
    return total


def _in_dtype(layer, dtype: torch.dtype):
    """The layer with its factors rounded once per call: in the kernels every tile would round them again."""
    if layer.lora_A.dtype == layer.lora_B.dtype == dtype:
        return layer
    return layer._replace(lora_A=do(Tensor.to, layer.lora_A, dtype), lora_B=do(Tensor.to, layer.lora_B, dtype))


def design_of(x: Tensor, weight: Tensor, lora_A: Tensor, design: str | None) -> str:
    """The design that the caller chose, else that of these tensors on their device."""
    if design is not None:
        return design
    n, k = weight.shape
    shape = Shape(int(k), int(n), int(lora_A.shape[1]), str(x.dtype).removeprefix("torch."))
    return exact_design(x.shape[1], shape, device_of(x.device))


def _side_by_side(*factors: Tensor) -> Tensor:
    return torch.cat(factors, 1)


def _add_product(y: Tensor, x: Tensor, weight: Tensor, transposed: bool) -> None:
    """``y += x @ weight`` in place, or of ``weight.T``, by cuBLAS, which reads y while it multiplies."""
    y.view(-1, y.shape[2]).addmm_(x.reshape(-1, x.shape[2]), weight.mT if transposed else weight)
