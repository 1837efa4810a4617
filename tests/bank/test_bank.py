"""The bank against plain transformers with merged weights; what must not leak between samples and slots."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from clora.bank.bank import AdapterBank, RoutedLinear
from clora.errors import CloraError
from clora.lora.layers import linear_shapes
from clora.lora.state import LoRAModule, LoRAState, fresh_lora
from clora.testing import merge_lora, random_lora, random_teachers

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def teachers(adapter):
    return random_teachers(adapter.pipeline.transformer, 3)


@pytest.fixture
def bank(adapter, teachers):
    with AdapterBank(adapter.pipeline.transformer, teachers) as bank:
        yield bank


@torch.no_grad()
def routed(adapter, bank, ids, x, sigma, conditioning, slots=None):
    with bank.route(slots or bank.slots(), torch.tensor(ids)):
        return adapter.velocity(x, sigma, conditioning)


@torch.no_grad()
def plain(adapter, transformer, x, sigma, conditioning):
    stand_in = copy.copy(adapter)
    stand_in.pipeline = SimpleNamespace(transformer=transformer)
    return stand_in.velocity(x, sigma, conditioning)


def test_mixed_batch_equals_merged_weights_sample_by_sample(adapter, teachers, inputs):
    """Ranks 2, 3, 4 and an attention-only LoRA: nothing of one may leak into another."""
    x, sigma, conditioning = inputs(5)
    base = copy.deepcopy(adapter.pipeline.transformer)
    models = [merge_lora(base, state) for state in teachers.values()]
    ids = [2, 0, -1, 1, 0]
    with AdapterBank(adapter.pipeline.transformer, teachers) as bank:
        mixed = routed(adapter, bank, ids, x, sigma, conditioning)
        alone = torch.cat(
            [routed(adapter, bank, [e], x[[i]], sigma[[i]], conditioning[[i]]) for i, e in enumerate(ids)]
        )
    for i, e in enumerate(ids):
        expected = plain(adapter, base if e < 0 else models[e], x[[i]], sigma[[i]], conditioning[[i]])
        torch.testing.assert_close(mixed[[i]], expected, **TOLERANCE)
        if e >= 0:
            unchanged = plain(adapter, base, x[[i]], sigma[[i]], conditioning[[i]])
            assert (expected - unchanged).abs().max() > 1e-2, "the teacher is too weak for this test to mean anything"
    torch.testing.assert_close(mixed, alone, rtol=0, atol=1e-6)


def test_base_rows_equal_the_plain_transformer(adapter, teachers, inputs):
    x, sigma, conditioning = inputs(4)
    expected = plain(adapter, adapter.pipeline.transformer, x, sigma, conditioning)
    with AdapterBank(adapter.pipeline.transformer, teachers) as bank:
        assert torch.equal(routed(adapter, bank, [-1] * 4, x, sigma, conditioning), expected)


def test_ranks_that_a_slot_lacks_are_zero_and_layers_are_not_there(bank, teachers):
    """A trailing rank or a missing module that kept another slot's numbers would be a leak."""
    slots = bank.slots()
    for name, state in teachers.items():
        slot = slots.slot(name)
        assert set(slot) == set(state.modules)
        for module, (a, b) in slot.items():
            own = state.modules[module]
            assert torch.equal(a[: own.rank], own.lora_A)
            assert torch.equal(b[:, : own.rank], own.lora_B)
            assert not a[own.rank :].any()
            assert not b[:, own.rank :].any()
        stored = bank.state(name).modules
        assert set(stored) == set(state.modules)
        assert all(torch.equal(stored[module].lora_A, own.lora_A) for module, own in state.modules.items())
    assert set(teachers["effect_1"].modules) < set(teachers["effect_0"].modules)


def test_permuting_the_batch_permutes_the_output(adapter, bank, inputs):
    x, sigma, conditioning = inputs(5)
    ids, order = torch.tensor([2, 0, -1, 1, 0]), torch.tensor([3, 0, 4, 2, 1])
    out = routed(adapter, bank, ids.tolist(), x, sigma, conditioning)
    permuted = routed(adapter, bank, ids[order].tolist(), x[order], sigma[order], conditioning[order])
    torch.testing.assert_close(permuted, out[order], rtol=0, atol=1e-6)


def test_a_range_of_slots_counts_from_its_own_first(adapter, bank, inputs):
    x, sigma, conditioning = inputs(2)
    part = bank.slots(["effect_1", "effect_2"])
    expected = routed(adapter, bank, [2, 1], x, sigma, conditioning)
    torch.testing.assert_close(routed(adapter, bank, [1, 0], x, sigma, conditioning, part), expected, **TOLERANCE)


def test_detach_restores_the_modules_and_the_output(adapter, teachers, inputs):
    transformer = adapter.pipeline.transformer
    before, expected = dict(transformer.named_modules()), plain(adapter, transformer, *inputs(2))
    bank = AdapterBank(transformer, teachers)
    assert any(isinstance(module, RoutedLinear) for module in transformer.modules())
    bank.detach()
    after = dict(transformer.named_modules())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(plain(adapter, transformer, *inputs(2)), expected)


def test_forward_outside_route_is_refused(adapter, bank, inputs):
    with pytest.raises(CloraError, match="route"):
        adapter.velocity(*inputs(1))
    with pytest.raises(ZeroDivisionError), bank.route(bank.slots(), torch.tensor([0])):
        raise ZeroDivisionError
    with pytest.raises(CloraError, match="route"):  # an error inside does not leave the routing behind
        adapter.velocity(*inputs(1))
    with bank.route(bank.slots(), torch.tensor([0])):
        with pytest.raises(CloraError, match="already"), bank.route(bank.slots(), torch.tensor([0])):
            pass


@pytest.mark.parametrize(
    "ask",
    [
        lambda bank: bank.slots(["efect_1"]),
        lambda bank: bank.state("efect_1"),
    ],
    ids=["slots", "state"],
)
def test_an_unknown_slot_names_the_nearest(bank, ask):
    with pytest.raises(CloraError, match=r"unknown adapter 'efect_1'.*did you mean 'effect_1'"):
        ask(bank)


def test_slots_must_be_neighbours_and_states_must_fit(adapter, bank):
    with pytest.raises(CloraError, match="neighbouring"):
        bank.slots(["effect_0", "effect_2"])
    with pytest.raises(CloraError, match="at least one"):
        AdapterBank(adapter.pipeline.transformer, {})


def test_a_module_that_the_transformer_lacks_changes_nothing(adapter):
    transformer = adapter.pipeline.transformer
    state = random_lora(transformer, 2, 0)
    wrong = LoRAState(
        {**state.modules, "transformer_blocks.0.attn.to_qq": LoRAModule(torch.ones(1, 2), torch.ones(2, 1))}
    )
    with pytest.raises(CloraError, match=r"to_qq'; did you mean 'transformer_blocks\.0\.attn\.to_q'"):
        AdapterBank(transformer, {"wrong": wrong})
    assert not any(isinstance(module, RoutedLinear) for module in transformer.modules())


def test_training_one_range_is_seen_by_the_others_and_touches_no_other_slot(adapter, bank, inputs):
    x, sigma, conditioning = inputs(2)
    trained, everything = bank.slots(["effect_1"], trainable=True), bank.slots()
    before = {name: bank.state(name) for name in bank.names}
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1, weight_decay=0.0)
    with bank.route(trained, torch.tensor([0, 0])):
        adapter.velocity(x, sigma, conditioning).square().mean().backward()
    optimizer.step()
    for name in bank.names:
        pairs = list(zip(bank.state(name).modules.values(), before[name].modules.values(), strict=True))
        same = [torch.equal(a.lora_A, b.lora_A) and torch.equal(a.lora_B, b.lora_B) for a, b in pairs]
        assert all(same) == (name != "effect_1")
    torch.testing.assert_close(
        routed(adapter, bank, [1, 1], x, sigma, conditioning, everything),
        routed(adapter, bank, [0, 0], x, sigma, conditioning, trained),
        **TOLERANCE,
    )
    assert all(not p.requires_grad for p in everything.parameters())


def test_a_fresh_lora_changes_nothing_but_can_learn(adapter, inputs):
    transformer = adapter.pipeline.transformer
    x, sigma, conditioning = inputs(2)
    expected = plain(adapter, transformer, x, sigma, conditioning)
    state = fresh_lora(linear_shapes(transformer), 3, torch.Generator().manual_seed(0))
    assert all(module.lora_A.any() and not module.lora_B.any() for module in state.modules.values())
    assert set(state.modules) == set(linear_shapes(transformer))
    with AdapterBank(transformer, {"fresh": state}) as bank:
        out = routed(adapter, bank, [0, 0], x, sigma, conditioning)
    torch.testing.assert_close(out, expected, **TOLERANCE)


def test_a_detached_bank_routes_nothing(adapter):
    transformer = adapter.pipeline.transformer
    bank = AdapterBank(transformer, random_teachers(transformer, 1))
    bank.detach()
    with pytest.raises(CloraError, match="the bank is detached.*attach the LoRAs again"), bank.route(bank.slots(), [0]):
        pass
