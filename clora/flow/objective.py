"""Noise levels and losses of training, as functions of tensors; the student's loss is `clora.ops.coarse_to_fine_loss`.

Source: docs/method.md section 4(c, d); where paper and released code differ (section 5), both are options.
"""

import torch
from torch import Tensor

from clora.errors import CloraError
from clora.flow.matching import sample_sigma
from clora.ops import TARGET_SIMULATION

# The bounds of target simulation, on time u before the shift: the student starts below the first, the critic scores above
# the second. The paper's 750 and 500 are timesteps before the shift, and its code compares the same (section 5).
TAU_MAX = 0.75
TAU_MIN = 0.5


def draw_backward_steps(n: int, num_steps: int, generator: torch.Generator) -> Tensor:
    """`[n]` steps uniform in [0, num_steps): where each row's backward simulation stops."""
    return torch.randint(num_steps, (n,), generator=generator, device=generator.device)


def target_simulation_steps(num_steps: int) -> Tensor:
    """Steps of the student's schedule from which target simulation may start: those with `u < TAU_MAX`.

    Args:
        num_steps: of the schedule, whose step k has `u = 1 - k / num_steps` before the shift.

    Returns:
        int64 indices into the schedule, in order: the last 5 of 8.

    Raises:
        CloraError: one step has only pure noise.
    """
    steps = torch.arange(num_steps)
    allowed = steps[1 - steps.double() / num_steps < TAU_MAX]
    if len(allowed) == 0:
        raise CloraError(
            f"objective.target_simulation: expected at least 2 sampler.steps, found {num_steps}: its only input is pure "
            "noise, which keeps nothing of a target; add steps, or set objective.target_simulation to false"
        )
    return allowed


def draw_target_steps(n: int, num_steps: int, generator: torch.Generator) -> Tensor:
    """`[n]` steps uniform over `target_simulation_steps`: where each row's target simulation starts."""
    allowed = target_simulation_steps(num_steps)
    return allowed[draw_backward_steps(n, len(allowed), generator)]


def draw_critic_sigma(kind: Tensor, shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels at which critic and teacher score the student's predictions.

    ::

        backward simulation:  sigma = time_shift(u), u ~ U(0, 1)
        target simulation:    the same with u ~ U(TAU_MIN, 1)

    Args:
        kind: `[D]` BACKWARD_SIMULATION or TARGET_SIMULATION, on the generator's device.
        shift: time shift s.
        generator: source of u.

    Returns:
        `[D]` fp32.
    """
    return sample_sigma(len(kind), shift, generator, low_u=torch.where(kind == TARGET_SIMULATION, TAU_MIN, 0.0))


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
