"""The whole training step on the kernels: the same losses and updates as on eager PyTorch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("pydantic")
pytest.importorskip("diffusers")

from helpers.trainers import make_trainer, slots

from clora.bank import routing
from clora.bank.bank import AdapterBank
from clora.models.conditioning import Conditioning
from clora.testing import random_teachers, tiny_adapter, tiny_pipeline
from clora.training.faults import raise_first
from csrc_triton import replay
from csrc_triton.coarse_to_fine import launch as loss_launch
from csrc_triton.multi_lora import launch as linear_launch
from csrc_triton.registration import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(scope="module")
def device_adapter():
    return tiny_adapter(tiny_pipeline().to(DEVICE))


def train(adapter, monkeypatch, backend):
    """Reported values of two student updates, all adapters before and after them, launches of each kernel and passes."""
    monkeypatch.setenv("CLORA_BACKEND", backend)
    monkeypatch.setenv("CLORA_DESIGN", "split")  # nothing is merged, which needs no kernel
    launched, reports = count_launches(monkeypatch), []
    op = routing.multi_lora_linears
    monkeypatch.setattr(
        routing, "multi_lora_linears", lambda *call, **options: launched.update(["call"]) or op(*call, **options)
    )
    hook = adapter.pipeline.transformer.register_forward_hook(lambda *_: launched.update(["pass"]))
    with make_trainer(adapter, sampler={"steps": 3}, train={"critic_ratio": 1, "batch_size": 3}) as trainer:
        before = slots(trainer)
        trainer.fit(lambda update, values: reports.append(dict(values)))
        hook.remove()
        return reports, before, slots(trainer), launched


def count_launches(monkeypatch) -> Counter:
    """Counts launches by kernel from now on."""
    launched = Counter()
    monkeypatch.setattr(replay, "enabled", False)
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


@pytest.mark.slow
def test_two_updates_are_the_same_on_both_backends(device_adapter, monkeypatch):
    expected_reports, start, expected, none = train(device_adapter, monkeypatch, "eager")
    assert set(none) == {"pass", "call"}, "eager PyTorch launches no kernel"
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
    # The student's rows that its critic reads too are a pass of their own; the third is the critic's.
    updates, backwards = 2, 2 * 3
    assert launched["partials_kernel"] == launched["finish_kernel"] == updates
    layers = len({module for name, module, _ in start if name == "student"})
    inputs = layers - 4  # q, k and v share theirs, of the picture and of the text
    # Rows of LoRAs of other layers than their neighbours' are calls of their own.
    assert launched["shrink_kernel"] == launched["call"] >= launched["pass"] * inputs
    assert launched["gradients_kernel"] == backwards * (layers + inputs)
    assert launched["reduce_kernel"] == backwards * 2 * layers


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("train", [{}, {"optimizer": "muon", "gradient_rows": 2, "forward_rows": 3}], ids=str)
@pytest.mark.parametrize("pages", [None, 2], ids=["resident", "paged"])
def test_an_update_never_waits_for_the_gpu(device_adapter, monkeypatch, pages, train):
    monkeypatch.setenv("CLORA_BACKEND", "triton")
    with make_trainer(device_adapter, pages=pages, train=train) as trainer:
        raise_first(trainer._iterate(0.5))
        torch.cuda.set_sync_debug_mode("error")
        try:
            checks = trainer._iterate(0.5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        raise_first(checks)


def test_recomputed_activations_give_the_same_gradients(device_adapter, inputs, monkeypatch):
    """Blocks that keep nothing but their inputs, with q, k and v in one call."""
    monkeypatch.setenv("CLORA_BACKEND", "triton")
    monkeypatch.setenv("CLORA_DESIGN", "split")
    launched, shrinks, found = count_launches(monkeypatch), [], []
    transformer = device_adapter.pipeline.transformer
    bank = AdapterBank(transformer, random_teachers(transformer, 2))
    student = bank.slots(["effect_0"], trainable=True)
    x, sigma, conditioning = inputs(1)  # of several samples: tests/models/test_every_family.py, on eager PyTorch
    conditioning = Conditioning(conditioning.text.to(DEVICE), conditioning.source.to(DEVICE))
    for recompute in (transformer.disable_gradient_checkpointing, transformer.enable_gradient_checkpointing):
        recompute()
        with bank.route(student, torch.zeros(1, dtype=torch.int64, device=DEVICE)):
            loss = device_adapter.velocity(x.to(DEVICE), sigma.to(DEVICE), conditioning).square().mean()
            found.append(torch.autograd.grad(loss, student.parameters()))
        shrinks.append(launched.pop("shrink_kernel"))
    transformer.disable_gradient_checkpointing()
    bank.detach()
    assert shrinks[1] > shrinks[0], "nothing was computed again"
    for exact, recomputed in zip(*found, strict=True):
        assert torch.equal(exact, recomputed)
