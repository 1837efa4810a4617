"""Noise levels of both rules stay in their bounds and cover them; the critic's loss is flow matching."""

import pytest
import torch

from clora.flow.matching import student_schedule, time_shift
from clora.flow.objective import (
    TAU_BOUNDS,
    critic_loss,
    draw_anchor_sigma,
    draw_backward_steps,
    draw_critic_sigma,
    draw_target_steps,
    target_simulation_steps,
)
from clora.ops import BACKWARD_SIMULATION, TARGET_SIMULATION

ALLOWED = {"paper": [5, 6, 7], "released": [3, 4, 5, 6, 7]}


def seeded():
    return torch.Generator().manual_seed(0)


def test_backward_steps_cover_the_schedule_uniformly():
    steps = draw_backward_steps(8000, 8, seeded())
    assert torch.equal(steps, draw_backward_steps(8000, 8, seeded()))
    counts = torch.bincount(steps, minlength=8)
    assert len(counts) == 8
    assert counts.min() > 850
    assert counts.max() < 1150


@pytest.mark.parametrize("rule", TAU_BOUNDS)
def test_target_simulation_steps(rule):
    sigmas = student_schedule()
    assert target_simulation_steps(sigmas, TAU_BOUNDS[rule].tau_max).tolist() == ALLOWED[rule]
    drawn = draw_target_steps(600, sigmas, TAU_BOUNDS[rule].tau_max, seeded())
    assert drawn.unique().tolist() == ALLOWED[rule]


def test_no_step_below_tau_max_is_an_error():
    with pytest.raises(ValueError, match="tau_max=0.75, but the lowest is 0.7500"):
        target_simulation_steps(student_schedule(2), 0.75)


@pytest.mark.parametrize(("rule", "tau_min"), [("paper", 0.5), ("released", 0.75)])
def test_critic_sigma_is_bounded_for_target_simulation_only(rule, tau_min):
    kind = torch.tensor([BACKWARD_SIMULATION, TARGET_SIMULATION]).repeat(10000)
    sigma = draw_critic_sigma(kind, 3.0, TAU_BOUNDS[rule].tau_min, seeded())
    bs, ts = sigma[kind == BACKWARD_SIMULATION], sigma[kind == TARGET_SIMULATION]
    assert bs.min() < 0.01
    assert bs.max() > 0.99
    assert tau_min < ts.min() < tau_min + 0.01
    assert 0.99 < ts.max() <= 1
    for values, low in ((bs, 0.0), (ts, tau_min)):  # uniform before the shift, on the allowed interval
        u = time_shift(values.double(), 1 / 3).sort().values
        start = time_shift(torch.tensor(low, dtype=torch.float64), 1 / 3)
        torch.testing.assert_close(u, start + (1 - start) * torch.linspace(0, 1, 10000).double(), rtol=0, atol=0.02)


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
