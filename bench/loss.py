"""Inputs of a loss case, its result in fp64, and ways to compute it. Every call makes the loss and its gradient.

The op returns its gradient with the loss, and a training step takes it from there (`_returned`); losses of others have a
backward pass (`_backward`).

Legend: B rows, the first D of them scored (distribution matching), the rest anchors; `...` the latent's shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.cases import LossCase
from bench.providers import OURS, Builder, Outputs, compiled
from clora.ops import Scores, coarse_to_fine_loss

GUIDANCE = 4.0


@dataclass(frozen=True)
class LossInputs:
    """The arguments of `clora.ops.coarse_to_fine_loss`; shapes are documented there. velocity requires a gradient."""

    velocity: Tensor
    x: Tensor
    sigma: Tensor
    kind: Tensor
    weight: Tensor
    scores: Scores
    anchor_target: Tensor
    guidance: float = GUIDANCE


def make_inputs(case: LossCase, device: torch.device, seed: int = 0) -> LossInputs:
    """Random latents and levels in (0.1, 0.9), each tensor in the case's dtype, levels and weights in fp32."""
    generator = torch.Generator(device).manual_seed(seed)
    scored = sum(kind < 2 for kind in case.kinds)

    def draw(rows: int) -> Tensor:
        shape, dtype = (rows, *case.latent), getattr(torch, case.dtype)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def level(rows: int) -> Tensor:
        return 0.1 + 0.8 * torch.rand(rows, generator=generator, device=device)

    # Scores: renoised latents and their levels, then the velocities of critic, teacher and teacher without prompt.
    return LossInputs(
        velocity=draw(case.samples).requires_grad_(),
        x=draw(case.samples),
        sigma=level(case.samples),
        kind=torch.tensor(case.kinds, device=device),
        weight=0.5 + level(case.samples),
        scores=Scores(draw(scored), level(scored), *(draw(scored) for _ in range(3))),
        anchor_target=draw(case.samples - scored),
    )


def expected(inputs: LossInputs) -> Outputs:
    """The result of the eager definition in fp64."""
    upcast = lambda t: t.detach().double() if t.is_floating_point() else t  # noqa: E731
    arguments = {name: upcast(t) for name, t in vars(inputs).items() if isinstance(t, Tensor)}
    scores = Scores(*map(upcast, inputs.scores))
    exact = LossInputs(**arguments, scores=scores, guidance=inputs.guidance)
    exact.velocity.requires_grad_()
    return eager(exact)


def eager(inputs: LossInputs) -> Outputs:
    """The result of the eager definition, in fp32 but for fp64 inputs."""
    return _backward(inputs, _eager_loss)


def providers(case: LossCase) -> dict[str, Builder]:
    """Name to builder: the paper's fp64, eager fp32, that compiled with and without a backward pass, and ours."""
    return {
        "paper_fp64": lambda inputs: partial(_backward, inputs, partial(paper_loss, case=case)),
        "eager": lambda inputs: partial(eager, inputs),
        "compiled": lambda inputs: partial(_backward, inputs, compiled(_eager_loss)),
        "compiled_returned": lambda inputs: partial(_returned, inputs, compiled(partial(_of_ops, backend="eager"))),
        OURS: lambda inputs: partial(_returned, inputs, _of_ops),
    }


def paper_loss(inputs: LossInputs, case: LossCase) -> Tensor:
    """docs/method.md section 4(c) literally, in fp64: x0 of every prediction, one surrogate per row, one term per kind."""
    d = len(inputs.scores.sigma)
    v = inputs.velocity.double()
    x = inputs.x.double()
    sigma = _per_row(inputs.sigma, x)
    rows = []
    if d:
        rows.append(_matching_rows((x - sigma * v)[:d], inputs.scores, inputs.guidance))
    if d < len(v):
        rows.append((v[d:] - inputs.anchor_target.double()).square().flatten(1).mean(1))
    # Rows come in the order of their kinds: the loss is the sum of the kinds' means.
    weighted = torch.cat(rows) * inputs.weight.double()
    counts = [case.kinds.count(kind) for kind in range(3)]
    return torch.stack([part.mean() for part in weighted.split(counts) if len(part)]).sum()


def _matching_rows(x_g: Tensor, scores: Scores, guidance: float) -> Tensor:
    """`[D]` terms whose gradient with respect to x_g is g / numel, as half a squared distance to a fixed target."""
    renoised = scores.renoised.double()
    sigma = _per_row(scores.sigma, renoised)
    with torch.no_grad():
        velocities = (scores.critic, scores.teacher, scores.teacher_uncond)
        fake, cond, uncond = (renoised - sigma * velocity.double() for velocity in velocities)
        real = cond + guidance * (cond - uncond)
        # g = (fake - real) / mean|x_g - real| per row; x_g - target = g makes g / numel the gradient.
        distance = (x_g - real).abs().mean(dim=tuple(range(1, x_g.ndim)), keepdim=True)
        target = x_g - torch.nan_to_num((fake - real) / distance)
    return 0.5 * (x_g - target).square().flatten(1).mean(1)


def _of_ops(inputs: LossInputs, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Loss and gradient."""
    loss, terms = coarse_to_fine_loss(**vars(inputs), backend=backend)
    return loss, terms["velocity_gradient"]


def _eager_loss(inputs: LossInputs) -> Tensor:
    return _of_ops(inputs, backend="eager")[0]


def _returned(inputs: LossInputs, loss: Callable[[LossInputs], tuple[Tensor, Tensor]]) -> Outputs:
    value, gradient = loss(inputs)
    return {"loss": value.detach(), "gradient": gradient}


def _backward(inputs: LossInputs, loss: Callable[[LossInputs], Tensor]) -> Outputs:
    value = loss(inputs)
    (gradient,) = torch.autograd.grad(value, inputs.velocity)
    return {"loss": value.detach(), "gradient": gradient}


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    """fp64, broadcasting over the latent dimensions of `like`."""
    return values.double().reshape(-1, *[1] * (like.ndim - 1))
