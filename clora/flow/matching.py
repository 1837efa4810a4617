"""Flow matching in diffusers' convention: `x_sigma = (1 - sigma) x0 + sigma eps`, velocity `v = eps - x0`.

Source: docs/method.md sections 1 and 3.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from clora.devices import send

FloatOrTensor = TypeVar("FloatOrTensor", float, Tensor)


def time_shift(u: FloatOrTensor, shift: float) -> FloatOrTensor:
    """Time shift `s u / (1 + (s - 1) u)`: moves noise levels u in [0, 1] towards 1 for s > 1."""
    return shift * u / (1 + (shift - 1) * u)


def student_schedule(steps: int = 8, shift: float = 3.0) -> Tensor:
    """Noise levels of the few-step sampler: `time_shift(u)` for u = 1, 1 - 1/steps, ..., 1/steps.

    Args:
        steps: number of network evaluations.
        shift: time shift s.

    Returns:
        `[steps]` fp32, decreasing from 1, without the final 0: 1, .9545, .9, .8333, .75, .6429, .5, .3 by default. Bit
        for bit the sigmas of `FlowMatchEulerDiscreteScheduler(shift=shift)` when a pipeline asks for `steps` steps.
    """
    return teacher_schedule(steps, shift)[:-1]


def teacher_schedule(steps: int, shift: float = 3.0) -> Tensor:
    """Noise levels of an Euler ODE of `steps` steps: the student's levels at `steps`, then 0.

    Returns:
        `[steps + 1]` fp32, equal to `FlowMatchEulerDiscreteScheduler(shift=shift)` after
        `set_timesteps(sigmas=linspace(1, 1 / steps, steps))`, which is what pipelines pass.

    Raises:
        ValueError: steps is not positive.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, found {steps}")
    # The levels are computed in fp64 and shifted in fp32, as diffusers does: any other order differs in the last bit.
    u = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).float()
    return torch.cat([time_shift(u, shift), torch.zeros(1)])


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """`(1 - sigma) x0 + sigma noise` for x0, noise `[B, ...]` and sigma `[B]`."""
    s = per_row(sigma, x0)
    return (1 - s) * x0 + s * noise


def velocity_to_x0(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """Clean prediction `x - sigma v` for x, velocity `[B, ...]` and sigma `[B]`."""
    return x - per_row(sigma, x) * velocity


def sample_sigma(n: int, shift: float, generator: torch.Generator | None, low_u: float | Tensor = 0.0) -> Tensor:
    """Draws `[n]` noise levels `time_shift(u)` with u uniform in (low_u, 1], on the generator's device.

    Args:
        n: number of levels.
        shift: time shift s.
        generator: source of u; None for the CPU's global one.
        low_u: exclusive lower bound of u, or one for each level, `[n]` on that device.
    """
    device = generator.device if generator is not None else None
    # Closed at the top: `torch.rand` may return 0, and the level of u = low_u would break a strict lower bound.
    u = 1 - (1 - low_u) * torch.rand(n, generator=generator, device=device)
    return time_shift(u, shift)


def flow_matching_losses(
    velocity: Callable[[Tensor, Tensor], Tensor], x0: Tensor, shift: float, generator: torch.Generator | None
) -> Tensor:
    """Each row's mean of `(v - (eps - x0))^2` at a drawn noise and noise level.

    Args:
        velocity: the network, `velocity(x, sigma)`.
        x0: `[B, ...]`.
        shift: time shift s of the noise levels.
        generator: source of the noise and its levels, on the CPU.

    Returns:
        `[B]`.
    """
    # Noise first, then levels: the order of the draws is part of what a seed means.
    noise = send(torch.randn(x0.shape, generator=generator), x0.device, x0.dtype)
    sigma = send(sample_sigma(len(x0), shift, generator), x0.device, x0.dtype)
    error = velocity(add_noise(x0, noise, sigma), sigma) - (noise - x0)
    return error.square().flatten(1).mean(1)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """`[B]` reshaped to broadcast over the other dimensions of `like` `[B, ...]`, in its dtype and on its device."""
    return send(values, like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))
