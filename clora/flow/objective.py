"""Noise levels and losses of training, as functions of tensors; the student's loss is `clora.ops.coarse_to_fine_loss`.

Source: docs/method.md section 4(c, d); where paper and released code differ (section 5), both are options.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from clora.errors import CloraError
from clora.flow.matching import sample_sigma
from clora.ops import TARGET_SIMULATION

TauRule = Literal["paper", "released"]


class TauBounds(NamedTuple):
    """Noise levels of target simulation: the student starts below `tau_max`, the critic scores above `tau_min`."""

    tau_max: float
    tau_min: float


TAU_BOUNDS: dict[TauRule, TauBounds] = {
    "paper": TauBounds(tau_max=0.75, tau_min=0.5),
    # The last 5 of 8 steps: sigma <= .8333.
    "released": TauBounds(tau_max=0.834, tau_min=0.75),
}


def draw_backward_steps(n: int, num_steps: int, generator: torch.Generator) -> Tensor:
    """`[n]` steps uniform in [0, num_steps): where each row's backward simulation stops."""
    return torch.randint(num_steps, (n,), generator=generator, device=generator.device)


def target_simulation_steps(sigmas: Tensor, tau_max: float) -> Tensor:
    """Steps of the schedule from which target simulation may start: those with `sigma < tau_max`.

    Args:
        sigmas: `[steps]` student schedule.
        tau_max: exclusive upper bound, `TAU_BOUNDS[rule].tau_max`.

    Returns:
        int64 indices into sigmas, at least one.

    Raises:
        CloraError: no step is below tau_max.
    """
    steps = torch.nonzero(sigmas < tau_max).flatten()
    if len(steps) == 0:
        raise CloraError(
            f"target simulation needs a schedule step below tau_max={tau_max}, but the lowest is {sigmas.min():.4f}: "
            "use more steps or a larger tau_max"
        )
    return steps


def draw_target_steps(n: int, sigmas: Tensor, tau_max: float, generator: torch.Generator) -> Tensor:
    """`[n]` steps uniform over `target_simulation_steps`: where each row's target simulation starts."""
    allowed = target_simulation_steps(sigmas, tau_max)
    return allowed[draw_backward_steps(n, len(allowed), generator)]


def draw_critic_sigma(kind: Tensor, shift: float, tau_min: float, generator: torch.Generator) -> Tensor:
    """Noise levels at which critic and teacher score the student's predictions.

    ::

        backward simulation:  sigma = time_shift(u), u ~ U(0, 1)
        target simulation:    the same, conditioned on sigma > tau_min

    Args:
        kind: `[D]` BACKWARD_SIMULATION or TARGET_SIMULATION, on the generator's device.
        shift: time shift s.
        tau_min: lower bound of target simulation, `TAU_BOUNDS[rule].tau_min`.
        generator: source of u.

    Returns:
        `[D]` fp32.
    """
    # The inverse of the time shift: the u with time_shift(u) = tau_min.
    low_u = tau_min / (shift - (shift - 1) * tau_min)
    return sample_sigma(len(kind), shift, generator, low_u=torch.where(kind == TARGET_SIMULATION, low_u, 0.0))


def draw_anchor_sigma(n: int, shift: float, generator: torch.Generator, floor: Tensor | None = None) -> Tensor:
    """Noise levels of trajectory anchoring: `time_shift(u)` with u uniform in (floor, 1].

    Args:
        n: number of anchor rows.
        shift: time shift s.
        generator: source of u.
        floor: None for the paper's unrestricted level (floor 0). For the released code's, `[n]` sigmas at which the
            critic scored the same step's backward simulation; it takes them as u and shifts again.

    Returns:
        `[n]` fp32.
    """
    return sample_sigma(n, shift, generator, low_u=0.0 if floor is None else floor)


def critic_loss(velocity: Tensor, noise: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """Flow-matching loss `mean((v - (noise - x0))^2)` of the critic on student samples x0.

    Args:
        velocity: `[B, ...]` critic's velocity at `add_noise(x0, noise, sigma)`; receives the gradient.
        noise: `[B, ...]`.
        x0: `[B, ...]` student samples, without gradient.

    Returns:
        Scalar loss (fp32, or fp64 for fp64 input), and each row's, whose mean it is, detached `[B]`.

    Raises:
        ValueError: shapes differ.
    """
    if not velocity.shape == noise.shape == x0.shape:
        raise ValueError(f"noise, x0: expected {list(velocity.shape)}, found {list(noise.shape)}, {list(x0.shape)}")
    # In fp32 at least: in bfloat16 the difference of two near values would lose most of its digits.
    dtype = torch.promote_types(velocity.dtype, torch.float32)
    error = velocity.to(dtype) - (noise.to(dtype) - x0.detach().to(dtype))
    rows = error.square().flatten(1).mean(1)
    return rows.mean(), rows.detach()
