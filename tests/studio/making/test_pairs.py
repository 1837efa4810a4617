"""Many LoRAs trained in one bank learn, and none depends on the data of another."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from clora.bank.bank import AdapterBank
from clora.errors import CloraError
from clora.lora.layers import linear_shapes
from clora.lora.state import fresh_lora
from clora.models.conditioning import Text
from clora.studio.making import teachers
from clora.studio.making.pairs import Pairs

NAMES = ("first", "second")


@pytest.fixture
def pairs(adapter):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return Pairs(
        draw(2, 3, *adapter.latent_shape),
        draw(2, 3, *adapter.latent_shape),
        Text(draw(2, adapter.max_sequence_length, 24)),
    )


@pytest.fixture(autouse=True)
def recipe(monkeypatch):
    """Fast learning from small batches."""
    monkeypatch.setattr(teachers, "LEARNING_RATE", 2e-2)


def train(adapter, pairs, updates, monkeypatch):
    """Trains slots of a bank of fresh LoRAs on the pairs; returns the losses and the states of all slots."""
    monkeypatch.setattr(teachers, "UPDATES", updates)
    monkeypatch.setattr(teachers, "ROWS", {adapter.size[0]: 4})
    transformer = adapter.pipeline.transformer
    generator = torch.Generator().manual_seed(1)
    fresh = {name: fresh_lora(linear_shapes(transformer), 3, generator) for name in NAMES}
    with AdapterBank(transformer, fresh) as bank:
        slots = bank.slots(trainable=True)
        optimizer = torch.optim.AdamW(slots.parameters())
        losses = [
            teachers._step(adapter, bank, slots, pairs, optimizer, generator, update) for update in range(updates)
        ]
        return losses, {name: bank.state(name) for name in NAMES}


def same(state, other):
    modules = zip(state.modules.values(), other.modules.values(), strict=True)
    return all(torch.equal(a.lora_A, b.lora_A) and torch.equal(a.lora_B, b.lora_B) for a, b in modules)


def test_the_loss_decreases(adapter, pairs, monkeypatch):
    pairs.targets[:] = 3 * pairs.targets[0, 0, 0]  # one colour: soon learned
    losses, states = train(adapter, pairs, 25, monkeypatch)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(torch.isfinite(m.delta()).all() for state in states.values() for m in state.modules.values())


def test_a_slot_does_not_depend_on_anothers_data(adapter, pairs, monkeypatch):
    """AdamW would carry any leaked gradient, however small, into the weights: equal bit for bit means none."""
    tensors = (pairs.sources, pairs.targets, pairs.text.embeds)
    sources, targets, embeds = (torch.stack([t[0], 3 * t[1].flip(0)]) for t in tensors)
    other = Pairs(sources, targets, Text(embeds))
    _, states = train(adapter, pairs, 3, monkeypatch)
    _, changed = train(adapter, other, 3, monkeypatch)
    assert same(states["first"], changed["first"])
    assert not same(states["second"], changed["second"])


def test_an_infinite_gradient_names_the_lora_and_changes_nothing(adapter, pairs, monkeypatch):
    """A finite loss whose gradient is not: the root of zero."""
    real, seen = teachers.pair_losses, {}

    def steep(adapter, bank, slots, *rest):
        parameters = list(slots.parameters())
        seen["now"], seen["before"] = parameters, [p.detach().clone() for p in parameters]
        return real(adapter, bank, slots, *rest) + torch.sqrt(0 * parameters[0][1].sum())

    monkeypatch.setattr(teachers, "pair_losses", steep)
    with pytest.raises(CloraError, match="update 1: the gradient of LoRA 'second' is not finite"):
        train(adapter, pairs, 2, monkeypatch)
    assert all(torch.equal(now, before) for now, before in zip(seen["now"], seen["before"], strict=True))


def test_a_nan_names_update_and_lora(adapter, pairs, monkeypatch):
    bad = dataclasses.replace(pairs, targets=pairs.targets.clone())
    bad.targets[1] = torch.nan
    with pytest.raises(CloraError, match="update 1: the loss of LoRA 'second' is not finite"):
        train(adapter, bad, 2, monkeypatch)
