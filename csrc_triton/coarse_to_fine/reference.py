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
        `[R]` (L2 norm of d row / d velocity, before weight and mean, so independent of the batch) and `nonfinite`
        `[R]` (bool: the row's weighted term is not finite).

    Raises:
        ValueError: a shape is not as above.
    """
    scores, anchor_target = complete(velocity, x, sigma, kind, weight, scores, anchor_target)
    dtype = torch.promote_types(torch.promote_types(velocity.dtype, x.dtype), torch.float32)
    scores = Scores(*(t.detach().to(dtype) for t in scores))
    x, sigma, weight, anchor_target = (t.detach().to(dtype) for t in (x, sigma, weight, anchor_target))
    velocity = velocity.to(dtype)

    d = scores.sigma.shape[0]
    dmd, dmd_norm = _dmd_rows(velocity[:d], x[:d], sigma[:d], scores, guidance)
    anchor, anchor_norm = _anchor_rows(velocity[d:], anchor_target)
    rows = weight * torch.cat([dmd, anchor])
    norm = torch.cat([dmd_norm, anchor_norm])

    members = [kind == k for k in (BACKWARD_SIMULATION, TARGET_SIMULATION, ANCHOR)]
    means = [torch.where(m, rows, 0.0).sum() / m.sum().clamp(min=1) for m in members]
    terms = {name: t.detach() for name, t in zip(("dmd_bs", "dmd_ts", "anchor"), means, strict=True)}
    terms |= {"gradient_norm": norm, "nonfinite": ~torch.isfinite(rows.detach())}
    return means[0] + means[1] + means[2], terms


def _dmd_rows(v: Tensor, x: Tensor, sigma: Tensor, scores: Scores, guidance: float) -> tuple[Tensor, Tensor]:
    """Term `[D]` and gradient norm `[D]` of the distribution-matching rows (see `coarse_to_fine_loss`)."""
    x_g = x - _per_row(sigma, x) * v
    fake, cond, uncond = (
        scores.renoised - _per_row(scores.sigma, x) * u for u in (scores.critic, scores.teacher, scores.teacher_uncond)
    )
    real = cond + guidance * (cond - uncond)
    normalizer = (x_g.detach() - real).abs().flatten(1).mean(1).clamp(min=MIN_NORMALIZER)
    g = (fake - real) / _per_row(normalizer, x)
    # Value 0.5 mean(g^2), gradient g / numel. The usual surrogate 0.5 mean((x_g - stopgrad(x_g - g))^2) rounds g to the
    # precision of x_g; the inner product does not.
    inner = (g * x_g).flatten(1).mean(1)
    term = 0.5 * g.square().flatten(1).mean(1) + (inner - inner.detach())
    return term, g.flatten(1).norm(dim=1) * sigma.abs() / x.shape[1:].numel()


def _anchor_rows(v: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Term `[A]` and gradient norm `[A]` of the flow-matching rows."""
    error = (v - target).flatten(1)
    return error.square().mean(1), error.detach().norm(dim=1) * (2 / error.shape[1])


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
        ValueError: a shape is not as `coarse_to_fine_loss` says.
    """
    if scores is None:
        scores = Scores(x[:0], sigma[:0], x[:0], x[:0], x[:0])
    if anchor_target is None:
        anchor_target = x[:0]
    _check_shapes(velocity, x, sigma, kind, weight, scores, anchor_target)
    return scores, anchor_target


def _check_shapes(velocity, x, sigma, kind, weight, scores: Scores, anchor_target) -> None:
    if velocity.ndim < 2:
        raise ValueError(
            f"velocity: expected [R, ...] with at least one latent dimension, found {list(velocity.shape)}"
        )
    rows, latent, d = velocity.shape[0], velocity.shape[1:], scores.sigma.shape[0]
    expected = {
        "x": (x, (rows, *latent)),
        "sigma": (sigma, (rows,)),
        "kind": (kind, (rows,)),
        "weight": (weight, (rows,)),
        "scores.renoised": (scores.renoised, (d, *latent)),
        "scores.critic": (scores.critic, (d, *latent)),
        "scores.teacher": (scores.teacher, (d, *latent)),
        "scores.teacher_uncond": (scores.teacher_uncond, (d, *latent)),
        "anchor_target": (anchor_target, (rows - d, *latent)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name}: expected shape {list(shape)} ({rows} rows, {d} scored), found {list(tensor.shape)}"
            )
