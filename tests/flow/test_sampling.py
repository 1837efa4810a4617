"""Samplers equal diffusers' scheduler under one seed, and backward simulation equals loops over single rows."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from clora.flow.matching import student_schedule, teacher_schedule
from clora.flow.sampling import euler_sample, few_step_sample, guided, simulate_to_step

SHAPE = (5, 6, 4)


def velocity(x, sigma):
    """A nonlinear stand-in for the network that depends on state and noise level."""
    assert sigma.shape == x.shape[:1]
    return torch.tanh(1.3 * x) * (0.5 + sigma.view(-1, 1, 1)) - 0.2 * x.roll(1, dims=-1)


def conditioned(x, sigma, rows):
    return velocity(x, sigma) + rows.view(-1, 1, 1)


def stock(noise, steps, stochastic):
    """A pipeline's loop: expanded timestep / 1000 to the network, global generator in the scheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=stochastic)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    x, states = noise, []
    for t in scheduler.timesteps:
        states.append(x)
        x = scheduler.step(velocity(x, t.expand(len(x)) / 1000), t, x, return_dict=False)[0]
    return x, states


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_few_step_sample_equals_diffusers_with_the_same_seed(steps):
    noise = torch.randn(SHAPE)
    torch.manual_seed(7)
    expected, _ = stock(noise, steps, stochastic=True)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    out = few_step_sample(velocity, noise, student_schedule(steps))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)  # a second image under the same seed is equal too


@pytest.mark.parametrize("steps", [1, 8, 40])
def test_euler_sample_equals_diffusers(steps):
    noise = torch.randn(SHAPE)
    expected, _ = stock(noise, steps, stochastic=False)
    torch.testing.assert_close(euler_sample(velocity, noise, teacher_schedule(steps)), expected, rtol=0, atol=2e-6)


def test_few_step_sample_takes_generator_or_noises():
    noise = torch.randn(SHAPE)
    out = few_step_sample(velocity, noise, student_schedule(), torch.Generator().manual_seed(3))
    g = torch.Generator().manual_seed(3)
    noises = [torch.randn(SHAPE, generator=g) for _ in range(7)]
    assert torch.equal(few_step_sample(velocity, noise, student_schedule(), noises=noises), out)
    noises[6] = noises[6] + 1
    assert not torch.equal(few_step_sample(velocity, noise, student_schedule(), noises=noises), out)


def test_few_step_sample_by_hand():
    noise, fresh = torch.randn(2, *SHAPE).unbind()
    sigmas = torch.tensor([1.0, 0.25])
    x0 = noise - velocity(noise, torch.ones(5))
    x = 0.75 * x0 + 0.25 * fresh
    expected = x - 0.25 * velocity(x, torch.full((5,), 0.25))
    torch.testing.assert_close(few_step_sample(velocity, noise, sigmas, noises=[fresh]), expected)


def test_samplers_keep_the_networks_dtype():
    low = lambda x, sigma: velocity(x, sigma).bfloat16()  # noqa: E731
    assert few_step_sample(low, torch.randn(SHAPE), student_schedule()).dtype == torch.bfloat16
    assert euler_sample(low, torch.randn(SHAPE), teacher_schedule(4)).dtype == torch.bfloat16


@pytest.mark.parametrize("seed", [None, 11], ids=["global", "generator"])
def test_simulate_to_step_gives_the_samplers_own_states(seed):
    noise = torch.randn(SHAPE)
    torch.manual_seed(11)
    _, states = stock(noise, 8, stochastic=True)
    torch.manual_seed(11)
    stop = torch.tensor([3, 0, 7, 1, 3])
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    out = simulate_to_step(lambda x, s, _: velocity(x, s), noise, student_schedule(), stop, generator)
    for row, k in enumerate(stop.tolist()):
        torch.testing.assert_close(out[row], states[k][row], rtol=0, atol=1e-6)


def test_simulate_to_step_equals_a_loop_over_rows_and_skips_finished_rows():
    noise, stop, sigmas = torch.randn(SHAPE), torch.tensor([2, 5, 0, 1, 5]), student_schedule()
    seen = []

    def recording(x, sigma, rows):
        seen.append((sigma[0].item(), rows.tolist()))
        return conditioned(x, sigma, rows)

    original = noise.clone()
    out = simulate_to_step(recording, noise, sigmas, stop, torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(1)
    fresh = [torch.randn(SHAPE, generator=g) for _ in range(5)]
    for row, k in enumerate(stop.tolist()):
        x = noise[row : row + 1]
        for j in range(k):
            x0 = x - sigmas[j] * conditioned(x, sigmas[j : j + 1], torch.tensor([row]))
            x = (1 - sigmas[j + 1]) * x0 + sigmas[j + 1] * fresh[j][row]
        torch.testing.assert_close(out[row : row + 1], x)
    assert torch.equal(noise, original)
    active = [[0, 1, 3, 4], [0, 1, 4], [1, 4], [1, 4], [1, 4]]
    assert seen == [(sigma, rows) for sigma, rows in zip(sigmas.tolist(), active, strict=False)]


def test_simulate_to_step_row_does_not_depend_on_the_other_rows_steps():
    noise, sigmas = torch.randn(SHAPE), student_schedule()
    run = lambda stop: simulate_to_step(  # noqa: E731
        conditioned, noise, sigmas, torch.tensor(stop), torch.Generator().manual_seed(2)
    )
    assert torch.equal(run([3, 0, 7, 1, 2])[0], run([3, 5, 0, 0, 6])[0])


def test_simulate_to_step_of_nothing_calls_no_network():
    noise, none = torch.randn(SHAPE), torch.zeros(5, dtype=torch.int64)
    assert torch.equal(simulate_to_step(None, noise, student_schedule(), none), noise)
    assert simulate_to_step(None, noise[:0], student_schedule(), none[:0]).shape == (0, *SHAPE[1:])


@pytest.mark.parametrize("stop", [[0, 1], [0, 1, 2, 3, 8], [0, 0, 0, 0, -1]])
def test_simulate_to_step_refuses_steps_outside_the_schedule(stop):
    with pytest.raises(ValueError, match=r"stop_steps: expected 5 steps in \[0, 8\), found"):
        simulate_to_step(conditioned, torch.randn(SHAPE), student_schedule(), torch.tensor(stop))


def test_guided():
    cond, uncond = torch.randn(2, *SHAPE).unbind()
    torch.testing.assert_close(guided(cond, uncond, 4.0), uncond + 5.0 * (cond - uncond))
    assert torch.equal(guided(cond, uncond, 0.0), cond)
    rescaled = guided(cond, uncond, 4.0, norm_rescale=True)
    torch.testing.assert_close(rescaled.norm(dim=-1), cond.norm(dim=-1))
    torch.testing.assert_close(
        torch.cosine_similarity(rescaled, guided(cond, uncond, 4.0), dim=-1), torch.ones(SHAPE[:-1])
    )
