"""Schedules equal diffusers' scheduler; noising and its inverse."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from clora.flow.matching import (
    add_noise,
    per_row,
    sample_sigma,
    student_schedule,
    teacher_schedule,
    time_shift,
    velocity_to_x0,
)


def test_student_schedule_is_the_published_one():
    expected = [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3]
    torch.testing.assert_close(student_schedule(), torch.tensor(expected), rtol=0, atol=5e-5)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 40, 50])
@pytest.mark.parametrize("s", [1.0, 3.0, 5.5])
def test_schedules_equal_diffusers_bit_for_bit(steps, s):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=s, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=2.02)  # as pipelines call it
    assert torch.equal(teacher_schedule(steps, shift=s), scheduler.sigmas)
    assert torch.equal(student_schedule(steps, shift=s), scheduler.sigmas[:-1])
    assert torch.equal(student_schedule(steps, shift=s) * 1000, scheduler.timesteps)


def test_schedule_needs_a_step():
    with pytest.raises(ValueError, match="steps: expected at least 1, found 0"):
        student_schedule(0)


def test_shift():
    assert time_shift(0.5, 3.0) == 0.75
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(time_shift(time_shift(u, 3.0), 1 / 3), u)
    assert torch.equal(time_shift(u, 1.0), u)


def test_add_noise_and_velocity_to_x0_are_inverse_per_row():
    x0, noise = torch.randn(2, 3, 2, 4, 5, dtype=torch.float64)
    sigma = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    x = add_noise(x0, noise, sigma)
    assert torch.equal(x[0], x0[0])
    assert torch.equal(x[2], noise[2])
    torch.testing.assert_close(x[1], 0.7 * x0[1] + 0.3 * noise[1])
    torch.testing.assert_close(velocity_to_x0(x, noise - x0, sigma), x0)


def test_per_row_takes_shape_and_dtype_of_the_latents():
    rows = per_row(torch.tensor([1.0, 2.0]), torch.zeros(2, 3, 4, dtype=torch.float64))
    assert rows.shape == (2, 1, 1)
    assert rows.dtype == torch.float64


def test_sample_sigma_bounds_distribution_and_seed():
    draw = lambda **bounds: sample_sigma(20000, 3.0, torch.Generator().manual_seed(0), **bounds)  # noqa: E731
    sigma = draw()
    assert torch.equal(sigma, draw())
    u = time_shift(sigma, 1 / 3)
    torch.testing.assert_close(u.sort().values, torch.linspace(0, 1, 20000), rtol=0, atol=0.02)
    upper = draw(low_u=0.5)
    assert upper.min() > 0.75
    assert upper.max() <= 1
    assert upper.min() < 0.76
    assert upper.max() > 0.99
    low_u = torch.linspace(0, 0.9, 20000)
    assert (draw(low_u=low_u) >= time_shift(low_u, 3.0)).all()
