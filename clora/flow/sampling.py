"""Samplers over a callable `velocity(x, sigma) -> v` with x `[B, ...]` and sigma `[B]`.

They repeat diffusers' `FlowMatchEulerDiscreteScheduler`, draws of noise included, so that the same seed gives the same
latents as a stock pipeline: fp32 arithmetic, state kept in the network's dtype. Gradients are not disabled here.
Source: docs/method.md section 3.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clora.devices import send, take
from clora.flow.matching import add_noise, velocity_to_x0


def guided(velocity_cond: Tensor, velocity_uncond: Tensor, w: float, norm_rescale: bool = False) -> Tensor:
    """Classifier-free guidance `cond + w (cond - uncond)`; pipelines call `w + 1` the guidance scale.

    With norm_rescale every token (last dimension) is scaled to the norm of the conditional one, as Qwen's pipeline does.
    """
    v = velocity_cond + w * (velocity_cond - velocity_uncond)
    if not norm_rescale:
        return v
    return v * (velocity_cond.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True).clamp(min=1e-12))


def euler_sample(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Tensor) -> Tensor:
    """Euler ODE from noise: `x += (sigmas[k + 1] - sigmas[k]) v(x, sigmas[k])`.

    Args:
        velocity: the network.
        noise: `[B, ...]` start.
        sigmas: `[steps + 1]` ending in 0 (`matching.teacher_schedule`).

    Returns:
        `[B, ...]` clean latents.
    """
    x = noise
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        v = velocity(x, _rows(sigma, x))
        # A partial step towards the clean prediction: x - (sigma - following) v.
        x = velocity_to_x0(x.float(), v, _rows(sigma - following, x)).to(v.dtype)
    return x


def few_step_sample(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    sigmas: Tensor,
    generator: torch.Generator | None = None,
    noises: Sequence[Tensor] | None = None,
) -> Tensor:
    """Stochastic few-step sampler: predict x0, re-noise it to the next level with fresh noise, repeat.

    ::

        x = noise
        for k in range(steps):
            x0 = x - sigmas[k] v(x, sigmas[k])
            x  = (1 - sigmas[k + 1]) x0 + sigmas[k + 1] noises[k]           # while k < steps - 1
        return x0

    Args:
        velocity: the network.
        noise: `[B, ...]` start.
        sigmas: `[steps]` decreasing, without the final 0 (`matching.student_schedule`).
        generator: source of the fresh noise; None is the global generator of noise's device, as in a stock pipeline.
            One draw of the whole batch per step, the last (unused) one included, as diffusers does.
        noises: the `steps - 1` fresh noises, instead of drawing them.

    Returns:
        `[B, ...]` clean latents.
    """
    if noises is None:
        noises = _draw_noises(noise, len(sigmas), generator)
    x = noise
    # The last draw stays unused, so that the noises may be one longer than the transitions between steps.
    for sigma, following, eps in zip(sigmas[:-1], sigmas[1:], noises, strict=False):
        x = _step(velocity(x, _rows(sigma, x)), x, sigma, following, eps)
    v = velocity(x, _rows(sigmas[-1], x))
    return velocity_to_x0(x.float(), v, _rows(sigmas[-1], x)).to(v.dtype)


def simulate_to_step(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    noise: Tensor,
    sigmas: Tensor,
    stop_steps: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Backward simulation: the input of `few_step_sample`'s step `stop_steps[b]`, for every row b.

    Rows that have arrived leave the batch, so a batch costs `sum(stop_steps)` row forwards. Noise is drawn for the
    whole batch at every step: a row's result depends on the seed and its own step, not on the other rows' steps.

    Args:
        velocity: the network as `velocity(x, sigma, rows)`; rows (int64, on the CPU) are the positions in the batch of
            the rows of x, by which the network picks their conditioning.
        noise: `[B, ...]` start, returned unchanged for rows with step 0.
        sigmas: `[steps]` as in `few_step_sample`.
        stop_steps: `[B]` integers in [0, steps), on the CPU (elsewhere reading them synchronises).
        generator: as in `few_step_sample`.

    Returns:
        `[B, ...]` noisy latents, row b at noise level `sigmas[stop_steps[b]]`.

    Raises:
        ValueError: stop_steps has another length than noise or a step outside the schedule.
    """
    steps = stop_steps.tolist()
    if len(steps) != len(noise) or any(not 0 <= k < len(sigmas) for k in steps):
        raise ValueError(f"stop_steps: expected {len(noise)} steps in [0, {len(sigmas)}), found {steps}")
    x = noise
    for k, eps in enumerate(_draw_noises(noise, max(steps, default=0), generator)):
        # Positions [b] of the rows that go on beyond step k; the others have arrived.
        rows = torch.tensor([row for row, stop in enumerate(steps) if stop > k])
        active = take(x, rows)
        v = velocity(active, _rows(sigmas[k], active), rows)
        active = _step(v, active, sigmas[k], sigmas[k + 1], take(eps, rows))
        x = x.index_copy(0, send(rows, x.device), active.to(x.dtype))
    return x


def _step(v: Tensor, x: Tensor, sigma: Tensor, following: Tensor, eps: Tensor) -> Tensor:
    """Predicts x0 from x at sigma and re-noises it to the following level, in v's dtype."""
    x0 = velocity_to_x0(x.float(), v, _rows(sigma, x))
    return add_noise(x0, eps, _rows(following, x)).to(v.dtype)


def _draw_noises(like: Tensor, count: int, generator: torch.Generator | None) -> list[Tensor]:
    """`count` draws of the batch's shape as diffusers' `randn_tensor` makes them: fp32, on the generator's device."""
    # Where the generator is, so that a seed on the CPU draws the same noise for every device.
    device = like.device if generator is None else generator.device
    return [send(torch.randn(like.shape, generator=generator, device=device), like.device) for _ in range(count)]


def _rows(sigma: Tensor, x: Tensor) -> Tensor:
    """Scalar sigma as `[B]` on x's device."""
    return send(sigma, x.device).expand(len(x))
