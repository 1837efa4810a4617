"""The whole training step on the kernels: the same losses and updates as on eager PyTorch."""

from __future__ import annotations

import pytest
from trainers import make_trainer, slots

pytest.importorskip("triton")


def train(adapter, monkeypatch, backend):
    """Reported values of two student updates, and all adapters after them."""
    monkeypatch.setenv("CLORA_BACKEND", backend)
    reports = []
    with make_trainer(adapter) as trainer:
        trainer.fit(lambda update, values: reports.append(dict(values)))
        return reports, slots(trainer)


def test_two_updates_give_the_same_curve_on_both_backends(adapter, monkeypatch):
    eager, expected = train(adapter, monkeypatch, "eager")
    kernels, trained = train(adapter, monkeypatch, "triton")
    assert len(eager) == len(kernels) == 2
    for ours, theirs in zip(kernels, eager, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    print(eager, kernels)
    for name, state in expected.items():
        for module, factors in state.modules.items():
            print(name, module, (trained[name].modules[module].lora_A - factors.lora_A).abs().max(), (trained[name].modules[module].lora_B - factors.lora_B).abs().max())
