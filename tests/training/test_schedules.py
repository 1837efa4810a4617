"""Learning rates over a run, compared with diffusers' own schedules."""

from __future__ import annotations

import pytest
import torch
from diffusers.optimization import get_scheduler

from clora.config.training import TrainConfig
from clora.training.schedules import LearningRates


def stock(name, updates, **settings):
    """The rates of a stock run whose base rate is 1."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(name, optimizer, **settings)
    rates = []
    for _ in range(updates):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def rates_of(updates=20, anchor_share=0.0, progress=None, **train):
    """The student's and the critic's rates of each update."""
    config = TrainConfig(updates=updates, **{"learning_rate": 1.0, "critic_learning_rate": 2.0, **train})
    rates = LearningRates(config, anchor_share)
    at = [(k, k / updates if progress is None else progress[k]) for k in range(updates)]
    return [rates.at(k, p, p < anchor_share) for k, p in at]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_a_schedule_is_diffusers_down_to_a_fiftieth(name):
    fall = stock(name, 20, num_warmup_steps=0, num_training_steps=20)
    for (student, critic), factor in zip(rates_of(schedule=name), fall, strict=True):
        assert student == pytest.approx(0.02 + 0.98 * factor)
        assert critic == pytest.approx(2 * student)
    if name == "constant":
        assert {student for student, _ in rates_of(schedule=name)} == {1.0}


def test_warm_up_is_diffusers_and_counts_updates():
    """Also where the run's length is a time, so that updates are no measure of what is done."""
    for progress in (None, [k / 1000 for k in range(20)]):
        found = rates_of(schedule="constant", warmup_updates=8, progress=progress)
        assert [student for student, _ in found] == stock("constant_with_warmup", 20, num_warmup_steps=8)


def test_warm_up_and_fall_multiply_and_each_phase_falls_anew():
    plain = rates_of(anchor_share=0.5, anchor_learning_rate=4.0)
    assert [round(student, 3) for student, _ in plain[8:12]] == [0.864, 0.472, 1.0, 0.902]
    assert plain[0] == (4.0, 2.0)
    warmed = rates_of(anchor_share=0.5, anchor_learning_rate=4.0, warmup_updates=12)
    for k, (rates, rates_warmed) in enumerate(zip(plain, warmed, strict=True)):
        assert rates_warmed == pytest.approx([min(1, k / 12) * rate for rate in rates])


def test_a_lengthened_run_has_its_full_rate_until_the_new_end_of_anchoring():
    rates = LearningRates(TrainConfig(updates=100, learning_rate=1.0), 0.5)
    assert rates.at(30, 0.3, anchoring=False)[0] == rates.at(50, 0.5, anchoring=False)[0] == 1.0
