"""An observer of a bank's layers sees what torch's own hooks would."""

from __future__ import annotations

import torch
from helpers.trainers import plain_velocity

from clora.bank.bank import AdapterBank
from clora.testing import merge_lora, random_lora


def test_observed_inputs_are_those_of_the_layers(adapter, inputs):
    """Once for each layer, also of layers that are computed together, and not beyond the block."""
    transformer = adapter.pipeline.transformer
    state = random_lora(transformer, 2, 0)
    merged, x = merge_lora(transformer, state), inputs(2)
    expected, seen = {}, {}
    for layer in state.modules:
        merged.get_submodule(layer).register_forward_pre_hook(
            lambda _, args, layer=layer: expected.update({layer: args[0]})
        )
    plain = plain_velocity(adapter, merged, *x)
    with torch.no_grad(), AdapterBank(transformer, {"a": state}) as bank:
        with bank.observed(lambda layer, x: seen.setdefault(layer, []).append(x)), bank.route(bank.slots(), [0, 0]):
            torch.testing.assert_close(adapter.velocity(*x), plain, rtol=1e-4, atol=1e-5)
        with bank.route(bank.slots(), [0, 0]):
            adapter.velocity(*x)
    assert set(seen) == set(state.modules)
    for layer, own in seen.items():
        (found,) = own
        torch.testing.assert_close(found, expected[layer], rtol=1e-4, atol=1e-4)
