"""The low-rank part alone, added to a base layer's output, on Triton; `reference.multi_lora_add` defines its meaning."""

import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from torch.autograd.function import once_differentiable

from csrc_triton.multi_lora import op
from csrc_triton.multi_lora.launch import expand_add, gradients, reduce, shrink
from csrc_triton.multi_lora.reference import check_add_shapes
from csrc_triton.registration import is_traced, kernel_op


def multi_lora_add_triton(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: Tensor, adapter_ids: Tensor
) -> Tensor:
    """`reference.multi_lora_add` on Triton kernels; arguments and results are the same, except:

    Rows with id -1 equal y to the bit. Only y, x, lora_A and lora_B are differentiable, once.

    Raises:
        ValueError: as the reference does, or `unsupported` gives a reason; then the reference computes it.
    """
    if reason := unsupported(y, x, lora_A, lora_B, scale, adapter_ids):
        raise ValueError(f"the Triton kernels do not cover this call: {reason}")
    if 0 in lora_A.shape[:2]:
        return y.clone()
    if is_traced(x):
        return forward_op(y, x, lora_A, lora_B, scale, adapter_ids)[0]
    return _Untraced.apply(y, x, lora_A, lora_B, scale, adapter_ids)


def unsupported(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: Tensor, adapter_ids: Tensor) -> str | None:
    """Why the kernels cannot compute a call, or None.

    Raises:
        ValueError: a shape or the dtype of the ids is wrong, as the reference says it.
    """
    check_add_shapes(y, x, lora_A, lora_B, scale, adapter_ids)
    given = {"y": y, "lora_A": lora_A, "lora_B": lora_B, "scale": scale, "ids": adapter_ids}
    if y.dtype != x.dtype:
        return f"y is {y.dtype}, x {x.dtype}"
    return op.unsupported_tensors(x, given)


def _forward(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: Tensor, ids: Tensor) -> list[Tensor]:
    """The sum, and the ranks' rows `[B, T, R]`, which the gradient of lora_B needs."""
    with torch.cuda.device_of(x):
        total, low = y.clone(memory_format=torch.contiguous_format), _low_like(x, lora_A)
        shrink(x, [lora_A], scale, ids, low)
        expand_add(total, low, 0, lora_B, ids)
    return [total, low]


def _backward(
    upstream: Tensor,
    x: Tensor | None,
    low: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    ids: Tensor,
    needs_x: bool,
    needs_A: bool,
    needs_B: bool,
) -> list[Tensor]:
    """Gradients of x, lora_A and lora_B, in this order and only as far as they are needed; y's is `upstream`."""
    found = []
    with torch.cuda.device_of(scale):
        back = _low_like(upstream, lora_A) if needs_x or needs_A else None
        grad_B = op.pass_over_upstream(upstream, low if needs_B else None, back, lora_B, 0, scale, ids)
        if needs_x:
            found.append(upstream.new_zeros(*upstream.shape[:2], lora_A.shape[2]))
            expand_add(found[0], back, 0, lora_A.mT, ids)
        if needs_A:
            partial = gradients(x, back, back.shape[2], ids)
            found.append(reduce(partial, 0, lora_A.new_empty(lora_A.shape), ids, transposed=True))
    return [*found, grad_B] if needs_B else found


def _low_like(x: Tensor, lora_A: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], lora_A.shape[1])


def _forward_fake(y, x, lora_A, lora_B, scale, ids) -> list[Tensor]:
    return [y.new_empty(y.shape), _low_like(x, lora_A)]


def _backward_fake(upstream, x, low, lora_A, lora_B, scale, ids, needs_x, needs_A, needs_B) -> list[Tensor]:
    grad_x = [upstream.new_empty(*upstream.shape[:2], lora_A.shape[2])] if needs_x else []
    factors = [lora_A] * needs_A + [lora_B] * needs_B
    return [*grad_x, *(factor.new_empty(factor.shape) for factor in factors)]


def _save(ctx, inputs, output) -> None:
    _, x, lora_A, lora_B, scale, ids = inputs
    ctx.needs = (x.requires_grad, lora_A.requires_grad, lora_B.requires_grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if ctx.needs[1] else None, output[1] if ctx.needs[2] else None, lora_A, lora_B, scale, ids)


def _gradients(ctx, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    """One for each argument of the op."""
    saved = ctx.saved_tensors  # once: under checkpointing a second reading raises
    if upstream is None or not any(ctx.needs):
        return upstream, None, None, None, None, None
    if is_traced(upstream):
        found = iter(backward_op(upstream, *saved, *ctx.needs))
    else:
        with set_wrap_triton_enabled(False):
            found = iter(_backward(upstream, *saved, *ctx.needs))
    return upstream, *(next(found) if needed else None for needed in ctx.needs), None, None


class _Untraced(torch.autograd.Function):
    """`forward_op` without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        with set_wrap_triton_enabled(False):
            output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return _gradients(ctx, upstream)


forward_op = kernel_op("clora::multi_lora_add", _forward, _forward_fake)
backward_op = kernel_op("clora::multi_lora_add_backward", _backward, _backward_fake)
forward_op.register_autograd(lambda ctx, upstream: _gradients(ctx, upstream[0]), setup_context=_save)
