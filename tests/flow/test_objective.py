"""Noise levels stay in their bounds and cover them; the critic's loss is flow matching."""

import pytest
import torch

from clora.errors import CloraError
from clora.flow.matching import student_schedule, time_shift
from clora.flow.objective import (
    TAU_MAX,
    TAU_MIN,
    critic_loss,
    draw_anchor_sigma,
    draw_backward_steps,
    draw_critic_sigma,
    draw_target_steps,
    target_simulation_steps,
)
from clora.ops import BACKWARD_SIMULATION, TARGET_SIMULATION


def seeded():
    return torch.Generator().manual_seed(0)


def test_backward_steps_cover_the_schedule_uniformly():
    steps = draw_backward_steps(8000, 8, seeded())
    assert torch.equal(steps, draw_backward_steps(8000, 8, seeded()))
    counts = torch.bincount(steps, minlength=8)
    assert len(counts) == 8
    assert counts.min() > 850
    assert counts.max() < 1150


@pytest.mark.parametrize(
    ("num_steps", "allowed"),
    [(2, [1]), (3, [1, 2]), (4, [2, 3]), (8, [3, 4, 5, 6, 7]), (12, [*range(4, 12)]), (40, [*range(11, 40)])],
)
def test_target_simulation_starts_below_tau_max_of_time_before_the_shift(num_steps, allowed):
    """750 of the paper: of 8 steps the last five, as in its code; a step at u = .75 is left out."""
    assert target_simulation_steps(num_steps).tolist() == allowed
    drawn = draw_target_steps(100 * num_steps, num_steps, seeded())
    assert drawn.unique().tolist() == allowed
    for shift in (1.0, 3.0, 7.5):  # the schedule's own levels, moved back
        u = time_shift(student_schedule(num_steps, shift).double(), 1 / shift)
        assert (u < TAU_MAX - 1e-6).nonzero().flatten().tolist() == allowed


def test_a_student_of_one_step_has_no_target_simulation():
    with pytest.raises(CloraError, match="target_simulation: expected at least 2 sampler.steps, found 1"):
        target_simulation_steps(1)


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.5])
def test_critic_sigma_is_bounded_for_target_simulation_only(shift):
    kind = torch.tensor([BACKWARD_SIMULATION, TARGET_SIMULATION]).repeat(10000)
    sigma = draw_critic_sigma(kind, shift, seeded())
    u = time_shift(sigma.double(), 1 / shift)
    for which, low in ((BACKWARD_SIMULATION, 0.0), (TARGET_SIMULATION, TAU_MIN)):  # uniform before the shift
        found = u[kind == which].sort().values
        assert found.min() > low - 1e-6
        torch.testing.assert_close(found, low + (1 - low) * torch.linspace(0, 1, 10000).double(), rtol=0, atol=0.02)
    if shift == 3:  # scored above sigma .75
        assert 0.75 < sigma[kind == TARGET_SIMULATION].min() < 0.76


def test_anchor_sigma_unrestricted_or_above_the_critics():
    free = draw_anchor_sigma(10000, 3.0, seeded())
    assert free.min() < 0.01
    assert free.max() > 0.99
    floor = torch.linspace(0, 1, 10000)
    released = draw_anchor_sigma(10000, 3.0, seeded(), floor)
    assert (released >= time_shift(floor, 3.0) - 1e-6).all()
    assert released.max() <= 1
    assert not torch.equal(released, time_shift(floor, 3.0))


def test_critic_loss_is_flow_matching_on_the_critic_only():
    velocity, noise, x0 = torch.randn(3, 4, 5, 6, dtype=torch.float64).unbind()
    leaves = [velocity.requires_grad_(), x0.requires_grad_()]
    loss, rows = critic_loss(velocity, noise, x0)
    loss.backward()
    error = (velocity - (noise - x0)).detach()
    torch.testing.assert_close(loss.detach(), error.square().mean())
    torch.testing.assert_close(leaves[0].grad, 2 * error / error.numel())
    assert leaves[1].grad is None
    torch.testing.assert_close(rows, error.square().flatten(1).mean(1))


def test_critic_loss_hides_no_row_and_upcasts():
    velocity, noise, x0 = torch.randn(3, 4, 5).bfloat16().unbind()
    assert critic_loss(velocity, noise, x0)[0].dtype == torch.float32
    velocity[2, 1] = float("nan")
    loss, rows = critic_loss(velocity, noise, x0)
    assert torch.isnan(loss)
    assert rows.isnan().tolist() == [False, False, True, False]


def test_critic_loss_refuses_broadcasting():
    with pytest.raises(ValueError, match=r"expected \[4, 5\], found \[4, 5\], \[5\]"):
        critic_loss(torch.zeros(4, 5), torch.zeros(4, 5), torch.zeros(5))
