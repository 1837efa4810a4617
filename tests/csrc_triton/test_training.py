"""The whole training step on the kernels: the same losses and updates as on eager PyTorch."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("pydantic")
pytest.importorskip("diffusers")

from trainers import make_trainer, slots

from clora.testing import random_data, tiny_adapter, tiny_pipeline
from csrc_triton.coarse_to_fine import launch as loss_launch
from csrc_triton.multi_lora import launch as linear_launch
from csrc_triton.registration import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
EFFECTS = ["effect_0", "effect_1", "effect_2"]  # of `random_teachers`


@pytest.fixture(scope="module")
def device_adapter():
    return tiny_adapter(tiny_pipeline().to(DEVICE))


def train(adapter, monkeypatch, backend):
    """Reported values of two student updates, all adapters before and after them, launches of each kernel."""
    monkeypatch.setenv("CLORA_BACKEND", backend)
    launched, reports = count_launches(monkeypatch), []
    data = random_data(adapter, EFFECTS)
    tensors = {name: value for name, value in vars(data).items() if isinstance(value, torch.Tensor)}
    data = dataclasses.replace(data, **{name: tensor.to(DEVICE) for name, tensor in tensors.items()})
    with make_trainer(adapter, data, sampler={"steps": 3}, train={"critic_ratio": 1, "batch_size": 3}) as trainer:
        before = slots(trainer)
        trainer.fit(lambda update, values: reports.append(dict(values)))
        return reports, before, slots(trainer), launched


def count_launches(monkeypatch) -> Counter:
    """Counts launches by kernel from now on."""
    launched = Counter()
    for module in (linear_launch, loss_launch):
        monkeypatch.setattr(module, "wrap_triton", counting(module.wrap_triton, launched))
    return launched


def counting(wrap, launched):
    def wrapped(kernel):
        launched[kernel.__name__] += 1
        return wrap(kernel)

    return wrapped


def factors(states):
    """Every factor of every adapter, by adapter, module and name."""
    return {
        (name, module, factor): getattr(lora, factor)
        for name, state in states.items()
        for module, lora in state.modules.items()
        for factor in ("lora_A", "lora_B")
    }


def test_two_updates_are_the_same_on_both_backends(device_adapter, monkeypatch):
    expected_reports, start, expected, none = train(device_adapter, monkeypatch, "eager")
    assert not none, "eager PyTorch launches no kernel"
    reports, again, found, launched = train(device_adapter, monkeypatch, "triton")
    assert len(reports) == len(expected_reports) == 2
    for ours, theirs in zip(reports, expected_reports, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    start, again, found, expected = map(factors, (start, again, found, expected))
    trained = {key[0] for key in start if not torch.equal(start[key], expected[key])}
    assert trained == {"student", "critic"}
    for key, before in start.items():
        assert torch.equal(before, again[key])
        step = (expected[key] - before).norm()
        assert (found[key] - expected[key]).norm() <= 1e-3 * step, key
    updates, critic_updates = 2, 2
    assert {name: launched[name] for name in ("partials_kernel", "finish_kernel", "gradient_kernel")} == {
        "partials_kernel": updates,
        "finish_kernel": updates,
        "gradient_kernel": updates,
    }
    layers = len({module for name, module, _ in start if name == "student"})
    backwards = (updates + critic_updates) * layers
    assert launched["reduce_kernel"] == 2 * backwards
    assert launched["shrink_kernel"] >= 3 * backwards, "simulation, scoring and both forwards run on the kernels too"
