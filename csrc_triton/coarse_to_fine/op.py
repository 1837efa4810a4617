"""The coarse-to-fine loss on Triton, as a PyTorch operator with a gradient; `reference.py` defines its meaning."""

import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled

from csrc_triton.coarse_to_fine.launch import loss_kernels, loss_outputs
from csrc_triton.coarse_to_fine.reference import Scores, complete, scaled_gradient
from csrc_triton.registration import is_traced, kernel_op


def coarse_to_fine_loss_triton(
    velocity: Tensor,
    x: Tensor,
    sigma: Tensor,
    kind: Tensor,
    weight: Tensor,
    scores: Scores | None,
    anchor_target: Tensor | None,
    guidance: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`reference.coarse_to_fine_loss` and its gradient in two launches; arguments, results and errors are the same.

    It computes in fp32 only. A row's results are the same to the bit in any batch, except that its gradient is divided
    by the number of rows of its kind.

    Raises:
        ValueError: a shape is wrong, or `unsupported` returns a reason; then the reference computes it.
    """
    scores, anchor_target = complete(velocity, x, sigma, kind, weight, scores, anchor_target)
    if reason := unsupported(velocity, x, sigma, kind, weight, scores, anchor_target, guidance):
        raise ValueError(f"the Triton kernels do not cover this call: {reason}")
    compute = loss_op if is_traced(velocity) else _Untraced.apply
    loss, terms, *rows = compute(velocity, x, sigma, kind, weight, *scores, anchor_target, guidance)
    values = (*terms.detach().unbind(), *(t.detach() for t in rows))
    names = ("dmd_bs", "dmd_ts", "anchor", "gradient_norm", "nonfinite", "velocity_gradient")
    return loss, dict(zip(names, values, strict=True))


def unsupported(
    velocity: Tensor,
    x: Tensor,
    sigma: Tensor,
    kind: Tensor,
    weight: Tensor,
    scores: Scores | None,
    anchor_target: Tensor | None,
    guidance: float,
) -> str | None:
    """The reason why the kernels cannot compute a call whose shapes are right, or None."""
    if torch.float64 in (velocity.dtype, x.dtype):
        return "velocity or x is fp64, which the eager reference computes in"
    tensors = {"x": x, "sigma": sigma, "kind": kind, "weight": weight, "anchor_target": anchor_target}
    if scores is not None:
        # Not _asdict, which the graph of torch 2.8 breaks at.
        tensors |= {f"scores.{name}": tensor for name, tensor in zip(Scores._fields, scores, strict=True)}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != velocity.device:
            return f"{name} is on {tensor.device}, velocity on {velocity.device}"
    return None


def _setup(ctx, inputs, output) -> None:
    _, *others, gradient = output
    ctx.mark_non_differentiable(*others, gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient)
    ctx.velocity_dtype = inputs[0].dtype


def _backward(ctx, upstream: Tensor | None, *others) -> tuple[Tensor | None, ...]:
    """Gradient of velocity; the other eleven inputs have none."""
    if upstream is None:
        return (None,) * 12
    (gradient,) = ctx.saved_tensors
    return (scaled_gradient(gradient, upstream, ctx.velocity_dtype), *(None,) * 11)


class _Untraced(torch.autograd.Function):
    """`loss_op` without the dispatcher."""

    @staticmethod
    def forward(ctx, *arguments):
        with set_wrap_triton_enabled(False):
            outputs = loss_kernels(*arguments)
        _setup(ctx, arguments, outputs)
        return outputs

    backward = staticmethod(_backward)


loss_op = kernel_op("clora::coarse_to_fine_loss")(loss_kernels)
loss_op.register_fake(lambda velocity, *others: loss_outputs(velocity))
loss_op.register_autograd(_backward, setup_context=_setup)
