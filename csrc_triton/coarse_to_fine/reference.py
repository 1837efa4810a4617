"""Eager coarse-to-fine loss: the definition that other backends are tested against.

Legend: R student rows = D distribution-matching rows (backward or target simulation) followed by A anchor rows;
`...` is any latent shape. Source: docs/method.md section 4(c).
"""

from typing import NamedTuple

import torch
from torch import Tensor

BACKWARD_SIMULATION, TARGET_SIMULATION, ANCHOR = 0, 1, 2
MIN_NORMALIZER = 1e-8
"""Floor of mean|x_g - x0_real|: keeps a student that equals its teacher from dividing by zero (g stays finite)."""


class Scores(NamedTuple):
    """Velocities of critic and teacher on the re-noised student predictions of the D distribution-matching rows.

    Attributes:
        renoised: `[D, ...]` student prediction noised to `sigma`.
        sigma: `[D]` noise level of `renoised`.
        critic: `[D, ...]` velocity of the critic.
        teacher: `[D, ...]` velocity of the teacher with its prompt.
        teacher_uncond: `[D, ...]` velocity of the teacher with the empty prompt.
    """

    renoised: Tensor
    sigma: Tensor
    critic: Tensor
    teacher: Tensor
    teacher_uncond: Tensor


def coarse_to_fine_loss(
    velocity: Tensor,
    x: Tensor,
    sigma: Tensor,
    kind: Tensor,
    weight: Tensor,
    scores: Scores | None,
    anchor_target: Tensor | None,
    guidance: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the student: distribution matching on the first D rows, flow matching on the A rows after them.

    ::

        x_g     = x - sigma v                                          # student's clean prediction
        x0_fake = renoised - sigma_s critic                            # sigma_s: scores.sigma
        x0_cond, x0_uncond = renoised - sigma_s (teacher, teacher_uncond)
        x0_real = x0_cond + guidance (x0_cond - x0_uncond)
        g       = (x0_fake - x0_real) / max(mean|x_g - x0_real|, 1e-8) # mean per row
        row     = 0.5 mean(g^2), with d row / d x_g = g / numel        # DMD rows; d x_g / d v = -sigma
        row     = mean((v - anchor_target)^2)                          # anchor rows
        loss    = sum over kinds of the mean over that kind's rows of weight * row   # 0 for an absent kind

    Works in fp32, or fp64 when velocity or x is fp64; never synchronises with the host. Non-finite rows are reported in
    `terms["nonfinite"]`, not hidden: the loss is non-finite as well.

    The gradient comes with the loss: `velocity.backward(terms["velocity_gradient"])` is `loss.backward()` without the
    multiplication by the gradient of the loss. It has no gradient itself.

    Args:
        velocity: `[R, ...]` student velocity, the only input that receives a gradient.
        x: `[R, ...]` input of the student.
        sigma: `[R]` noise level of x.
        kind: `[R]` integers on velocity's device: 0 backward simulation, 1 target simulation, 2 anchor. The first D
            rows must be 0 or 1 and the rest 2; the values are not checked (that would synchronise).
        weight: `[R]` factor of each row's term.
        scores: critic and teacher on the D rows; None when D = 0.
        anchor_target: `[A, ...]` eps - y; None when A = 0.
        guidance: w of the teacher (`guidance_scale - 1` of a pipeline).

    Returns:
        Scalar loss, and detached terms: `dmd_bs`, `dmd_ts`, `anchor` (scalars that sum to the loss), `gradient_norm`
        `[R]` (L2 norm of d row / d velocity, before weight and mean, so independent of the batch), `nonfinite` `[R]`
        (bool: the row's weighted term is not finite) and `velocity_gradient` `[R, ...]` (d loss / d velocity in
        `gradient_dtype`: velocity's, but fp32 for fp16).

    Raises:
        ValueError: a shape is not as above.
    """
    scores, anchor_target = complete(velocity, x, sigma, kind, weight, scores, anchor_target)
    dtype = torch.promote_types(torch.promote_types(velocity.dtype, x.dtype), torch.float32)
    scores = Scores(*(t.detach().to(dtype) for t in scores))
    v, x, sigma, weight, anchor_target = (t.detach().to(dtype) for t in (velocity, x, sigma, weight, anchor_target))
    loss, terms = _loss(v, x, sigma, kind, weight, scores, anchor_target, guidance)
    gradient = terms["velocity_gradient"].to(gradient_dtype(velocity.dtype))
    return _WithGradient.apply(velocity, loss, gradient), terms | {"velocity_gradient": gradient}


def gradient_dtype(velocity: torch.dtype) -> torch.dtype:
    """Dtype of `velocity_gradient`: fp16 would lose such small numbers before a loss scale is applied to them."""
    return torch.float32 if velocity == torch.float16 else velocity


class _WithGradient(torch.autograd.Function):
    """The loss as a function of velocity whose gradient is known."""

    @staticmethod
    def forward(ctx, velocity: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = velocity.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return scaled_gradient(gradient, upstream, ctx.dtype), None, None


def scaled_gradient(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of velocity (of `dtype`) from `velocity_gradient` and the gradient of the loss; has none itself."""
    return (upstream.detach() * gradient).to(dtype)


def _loss(
    v: Tensor,
    x: Tensor,
    sigma: Tensor,
    kind: Tensor,
    weight: Tensor,
    scores: Scores,
    anchor_target: Tensor,
    guidance: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and terms (see `coarse_to_fine_loss`) of detached arguments of one dtype; the gradient has it too."""
    # [3, R]: the rows of each kind. A row's part of the loss is its term by the number of rows of its kind, so that
    # factor [R] is d loss / d row over the row's elements.
    members = torch.stack([kind == k for k in (BACKWARD_SIMULATION, TARGET_SIMULATION, ANCHOR)])
    counts = members.sum(1, keepdim=True).clamp(min=1)
    factor = (members.to(v.dtype) / counts).sum(0) * weight / v.shape[1:].numel()
    d = scores.sigma.shape[0]  # the rest are anchors
    dmd = _dmd_rows(v[:d], x[:d], sigma[:d], scores, guidance, factor[:d])
    anchors = _anchor_rows(v[d:], anchor_target, factor[d:])
    rows, norm, gradient = (torch.cat(parts) for parts in zip(dmd, anchors, strict=True))
    rows = weight * rows

    means = [torch.where(m, rows, 0.0).sum() / count for m, count in zip(members, counts.squeeze(1), strict=True)]
    terms = dict(zip(("dmd_bs", "dmd_ts", "anchor"), means, strict=True))
    terms |= {"gradient_norm": norm, "nonfinite": ~torch.isfinite(rows), "velocity_gradient": gradient}
    return means[0] + means[1] + means[2], terms


def _dmd_rows(
    v: Tensor, x: Tensor, sigma: Tensor, scores: Scores, guidance: float, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the distribution-matching rows (see `coarse_to_fine_loss`): terms, gradient norms `[D]`, gradients `[D, ...]`.

    Args:
        factor: `[D]` d loss / d row, over the row's elements.
    """
    # x0 = x - sigma v, of the student and of the three scores on its re-noised prediction.
    x_g = x - _per_row(sigma, x) * v
    fake, cond, uncond = (
        scores.renoised - _per_row(scores.sigma, x) * u for u in (scores.critic, scores.teacher, scores.teacher_uncond)
    )
    real = cond + guidance * (cond - uncond)
    normalizer = (x_g - real).abs().flatten(1).mean(1).clamp(min=MIN_NORMALIZER)
    # Dividing by infinity would turn a non-finite row into a finite zero.
    g = (fake - real) / _per_row(torch.where(normalizer.isinf(), torch.nan, normalizer), x)
    # d row / d v = (d row / d x_g) (d x_g / d v) = (g / numel) (-sigma).
    norm = g.flatten(1).norm(dim=1) * sigma.abs() / x.shape[1:].numel()
    return 0.5 * g.square().flatten(1).mean(1), norm, _per_row(factor, x) * g * _per_row(-sigma, x)


def _anchor_rows(v: Tensor, target: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Terms and gradient norms `[A]`, gradients `[A, ...]` of the flow-matching rows; factor as in `_dmd_rows`."""
    error = v - target
    norm = 2 * error.flatten(1).norm(dim=1) / error.shape[1:].numel()
    return error.square().flatten(1).mean(1), norm, _per_row(factor, v) * (2 * error)


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    """`[R]` reshaped to broadcast over the latent dimensions of `like` `[R, ...]`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def complete(
    velocity: Tensor,
    x: Tensor,
    sigma: Tensor,
    kind: Tensor,
    weight: Tensor,
    scores: Scores | None,
    anchor_target: Tensor | None,
) -> tuple[Scores, Tensor]:
    """Scores and anchor target, of no rows where they are None, after a check of all shapes.

    Raises:
        ValueError: a shape is not as `coarse_to_fine_loss` takes it.
    """
    if scores is None:
        scores = Scores(x[:0], sigma[:0], x[:0], x[:0], x[:0])
    if anchor_target is None:
        anchor_target = x[:0]
    if velocity.ndim < 2:
        raise ValueError(
            f"velocity: expected [R, ...] with at least one latent dimension, found {list(velocity.shape)}"
        )
    rows, *latent = velocity.shape
    d = scores.sigma.shape[0]
    expected = {
        "x": (x, (rows, *latent)),
        "sigma": (sigma, (rows,)),
        "kind": (kind, (rows,)),
        "weight": (weight, (rows,)),
        "anchor_target": (anchor_target, (rows - d, *latent)),
    }
    for name in ("renoised", "critic", "teacher", "teacher_uncond"):
        expected[f"scores.{name}"] = (getattr(scores, name), (d, *latent))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name}: expected shape {list(shape)} ({rows} rows, {d} scored), found {list(tensor.shape)}"
            )
    return scores, anchor_target
